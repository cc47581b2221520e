//! A pager as its keeper sees it: started, listened to, missed.

use crate::kept::Kept;
use crate::patience::Patience;
use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::ptr;
use zswapd_keeper::channel::{Channel, Kind};
use zswapd_keeper::socket;

extern "C" {
    static environ: *const *const libc::c_char;
}

/// The program, and its arguments as execve(2) wants them.
pub struct Program {
    /// What serves. Whatever has become of its path meanwhile, a standby is of the same version.
    pub file: OwnedFd,
    /// Which it is: counted, the first is 1.
    pub number: u64,
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
    /// Nothing more is expected of it than its end.
    pub dismissed: bool,
    /// Its program: which it is, and its file if it is not what serves.
    pub number: u64,
    pub file: Option<OwnedFd>,
    /// While it is waited for.
    pub patience: Patience,
}

/// How a process has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exited(u8),
    Signalled(i32),
}

impl Program {
    /// `words`: the program's path, then the arguments that all pagers have. `file`: what has served before, if there was
    /// something.
    pub fn new(words: Vec<OsString>, kept: &Kept, file: Option<OwnedFd>) -> io::Result<Program> {
        let channel = OwnedFd::from(std::fs::File::open("/dev/null")?);
        let descriptors = kept.descriptors(channel.as_raw_fd());
        let inherited = [descriptors.fuse, descriptors.state, descriptors.counters, descriptors.control];
        let more = [OsString::from("--keeper"), descriptors.to_string().into()];
        let words: io::Result<Vec<CString>> =
            words.into_iter().chain(more).map(|word| Ok(CString::new(word.into_vec())?)).collect();
        let words = words?;
        let arguments: Vec<_> = words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect();
        let file = file.map_or_else(|| open(arguments[0]), Ok)?;
        Ok(Program { file, number: 1, _words: words, arguments, channel, inherited })
    }

    /// Starts a pager of what serves. Allocates nothing.
    pub fn start(&self) -> io::Result<Pager> {
        self.start_from(Some(&self.file), self.number)
    }

    /// Starts a pager of what lies at the program's path by now: it says what that is, if it can be opened.
    pub fn start_new(&self, number: u64) -> io::Result<Pager> {
        self.start_from(None, number)
    }

    fn start_from(&self, file: Option<&OwnedFd>, number: u64) -> io::Result<Pager> {
        let (ours, theirs) = socket::pair()?;
        // SAFETY: there is one thread, so that the child may do whatever we may.
        let pid = unsafe { libc::fork() };
        match pid {
            0 => self.become_pager(file, &Channel::new(theirs)),
            1.. => {}
            _ => return Err(io::Error::last_os_error()),
        }
        // SAFETY: plain system call; the child is ours, and not reaped, so that the number is its.
        let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as RawFd;
        if process < 0 {
            let error = io::Error::last_os_error();
            // SAFETY: as above; nobody else waits for it.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, ptr::null_mut(), 0);
            }
            return Err(error);
        }
        // SAFETY: just returned by the kernel, and nobody else has it; then a flag of a descriptor that we own.
        let process = unsafe {
            libc::fcntl(ours.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK);
            OwnedFd::from_raw_fd(process)
        };
        Ok(Pager {
            pid,
            process,
            channel: Some(Channel::new(ours)),
            ready: false,
            serving: false,
            dismissed: false,
            number,
            file: None,
            patience: Patience::default(),
        })
    }

    fn become_pager(&self, file: Option<&OwnedFd>, channel: &Channel) -> ! {
        let why = match file {
            Some(file) => self.run(file, channel),
            // Here, where nobody waits for a disk that hangs.
            None => open(self.arguments[0]).map_or_else(
                |error| error,
                |file| {
                    let _it_hangs_up = channel.send(Kind::Program, 0, "", Some(file.as_fd()));
                    self.run(&file, channel)
                },
            ),
        };
        // SAFETY: the first argument, a string that ends.
        let path = unsafe { CStr::from_ptr(self.arguments[0]) }.to_string_lossy();
        let why = format!("{path} cannot be run: {why}");
        crate::say!("the pager: {why}");
        let _not_heard = channel.send(Kind::Failed, 0, &why, None);
        // SAFETY: never returns.
        unsafe { libc::_exit(127) }
    }

    /// Returns only if it cannot be run, and why.
    fn run(&self, file: &OwnedFd, channel: &Channel) -> io::Error {
        let run = || {
            // SAFETY: an open descriptor, and strings that end, in arrays that do.
            unsafe { libc::fexecve(file.as_raw_fd(), self.arguments.as_ptr(), environ) };
            io::Error::last_os_error()
        };
        // SAFETY: system calls on descriptors that are open.
        unsafe {
            libc::dup2(channel.as_raw_fd(), self.channel.as_raw_fd());
            for fd in self.inherited {
                libc::fcntl(fd, libc::F_SETFD, 0);
            }
        }
        let error = run();
        if error.raw_os_error() != Some(libc::ENOENT) {
            return error;
        }
        // A script, which its interpreter is to open.
        // SAFETY: as above.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
        run()
    }
}

fn open(path: *const libc::c_char) -> io::Result<OwnedFd> {
    // SAFETY: a string that ends. Whoever is at the other end of what is no file is not waited for.
    let fd = unsafe { libc::open(path, libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just returned by the kernel, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Pager {
    /// How it has ended, if it has: it is reaped then, none of its threads runs any more, and none is in a system call.
    pub fn reap(&self) -> Option<Ended> {
        self.wait(libc::WNOHANG)
    }

    /// Ends it, whatever it is about, and waits for that.
    pub fn end(self) {
        self.signal(libc::SIGKILL);
        self.wait(0);
    }

    pub fn signal(&self, number: libc::c_int) {
        // SAFETY: plain system call on a descriptor that we own.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.process.as_raw_fd(), number, 0, 0) };
    }

    /// For how long it has run on a processor, in nanoseconds.
    pub fn ran(&self) -> u64 {
        let mut clock: libc::clockid_t = 0;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: both write to what they are given; it is not reaped, so that the number is its.
        unsafe {
            if libc::clock_getcpuclockid(self.pid, &mut clock) == 0 {
                libc::clock_gettime(clock, &mut time);
            }
        }
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
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
