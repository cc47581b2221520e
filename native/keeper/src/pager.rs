//! A pager as its keeper sees it: started, listened to, missed.

use crate::kept::Kept;
use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::ptr;
use zswapd_keeper::channel::Channel;
use zswapd_keeper::socket;

/// The program, and its arguments as execv(2) wants them.
pub struct Program {
    /// Invariant: what `arguments` points to.
    _words: Vec<CString>,
    arguments: Vec<*const libc::c_char>,
    /// Under this number a pager finds its channel.
    channel: OwnedFd,
    /// What a pager is to inherit besides.
    inherited: [RawFd; 4],
}

pub struct Pager {
    pub pid: libc::pid_t,
    pub process: OwnedFd,
    /// None when the pager has hung up, as one does that dies.
    pub channel: Option<Channel>,
    /// It has said that all is set.
    pub ready: bool,
    /// It has said that it serves.
    pub serving: bool,
    /// It has said why it cannot.
    pub said_why: bool,
}

/// How a process has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exited(u8),
    Signalled(i32),
}

impl Program {
    /// `words`: the program's path, then the arguments that all pagers have.
    pub fn new(words: Vec<OsString>, kept: &Kept) -> io::Result<Program> {
        let channel = OwnedFd::from(std::fs::File::open("/dev/null")?);
        let descriptors = kept.descriptors(channel.as_raw_fd());
        let inherited = [descriptors.fuse, descriptors.state, descriptors.counters, descriptors.control];
        let more = [OsString::from("--keeper"), descriptors.to_string().into()];
        let words: io::Result<Vec<CString>> =
            words.into_iter().chain(more).map(|word| Ok(CString::new(word.into_vec())?)).collect();
        let words = words?;
        let arguments = words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect();
        Ok(Program { _words: words, arguments, channel, inherited })
    }

    /// Starts a pager. Allocates nothing.
    pub fn start(&self) -> io::Result<Pager> {
        let (ours, theirs) = socket::pair()?;
        // SAFETY: there is one thread, and what the child does is only system calls.
        let pid = unsafe { libc::fork() };
        match pid {
            0 => self.become_pager(&theirs),
            1.. => {}
            _ => return Err(io::Error::last_os_error()),
        }
        // SAFETY: plain system call; the child is ours, and not reaped, so that the number is its.
        let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as RawFd;
        if process < 0 {
            // Its channel hangs up, and it ends.
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just returned by the kernel, and nobody else has it; then a flag of a descriptor that we own.
        let process = unsafe {
            libc::fcntl(ours.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK);
            OwnedFd::from_raw_fd(process)
        };
        Ok(Pager { pid, process, channel: Some(Channel::new(ours)), ready: false, serving: false, said_why: false })
    }

    fn become_pager(&self, channel: &OwnedFd) -> ! {
        // SAFETY: system calls on descriptors that are open, and with strings that end; none returns to the parent's
        // code.
        unsafe {
            libc::dup2(channel.as_raw_fd(), self.channel.as_raw_fd());
            for fd in self.inherited {
                libc::fcntl(fd, libc::F_SETFD, 0);
            }
            libc::execv(self.arguments[0], self.arguments.as_ptr());
            crate::say!("cannot run the pager: {}", io::Error::last_os_error());
            libc::_exit(127)
        }
    }
}

impl Pager {
    /// How it has ended, if it has: it is reaped then, none of its threads runs any more, and none is in a system call.
    pub fn reap(&self) -> Option<Ended> {
        self.wait(libc::WNOHANG)
    }

    /// Ends it, whatever it is about, and waits for that.
    pub fn end(self) {
        // SAFETY: plain system call on a descriptor that we own.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.process.as_raw_fd(), libc::SIGKILL, 0, 0) };
        self.wait(0);
    }

    fn wait(&self, flags: libc::c_int) -> Option<Ended> {
        // SAFETY: all-zero is a valid siginfo_t.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let id = self.process.as_raw_fd() as libc::id_t;
        // SAFETY: writes to `info`, which is large enough; its fields are those of SIGCHLD, or zero.
        unsafe {
            let result = libc::waitid(libc::P_PIDFD, id, &mut info, libc::WEXITED | flags);
            match info.si_code {
                _ if result != 0 || info.si_pid() == 0 => None,
                libc::CLD_EXITED => Some(Ended::Exited(info.si_status() as u8)),
                _ => Some(Ended::Signalled(info.si_status())),
            }
        }
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ended::Exited(status) => write!(f, "status {status}"),
            Ended::Signalled(signal) => write!(f, "signal {signal}"),
        }
    }
}
