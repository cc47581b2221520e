//! systemd's store of descriptors (sd_notify(3), `FDSTORE=1`), which outlives the keeper; and its being told how we are.

use std::env;
use std::fmt::Arguments;
use std::io::{Cursor, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use zswapd_keeper::socket;

/// The first descriptor that systemd passes.
const FIRST: RawFd = 3;

/// What is stored, and under which names.
const NAMES: [&str; 4] = ["zswapd-fuse", "zswapd-state", "zswapd-counters", "zswapd-control"];
/// The program that serves.
const PROGRAM: &str = "zswapd-program";

/// What an earlier keeper has left in the store, in the order of [`NAMES`], and the program. All of it or nothing: the
/// pages are out of reach without the mount, and the other way round. Without the program alone, the one at its path must
/// do. To be called once, first of all.
pub fn stored() -> (Option<[OwnedFd; 4]>, Option<OwnedFd>) {
    let mut passed = passed().unwrap_or_default();
    let mut take = |name: &str| passed.iter().position(|(other, _)| other == name).map(|at| passed.swap_remove(at).1);
    let program = take(PROGRAM);
    let [fuse, state, counters, control] = NAMES.map(take);
    let kept = || Some([fuse?, state?, counters?, control?]);
    (kept(), program)
}

/// The descriptors that systemd passes to this process, by name.
fn passed() -> Option<Vec<(String, OwnedFd)>> {
    let number = |name: &str| env::var(name).ok()?.parse::<u32>().ok();
    let ours = number("LISTEN_PID") == Some(std::process::id());
    let count = number("LISTEN_FDS").filter(|_| ours)? as RawFd;
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let passed = (FIRST..FIRST + count).zip(names.split(':')).map(|(fd, name)| {
        // SAFETY: systemd has opened it for us, and nobody else in this process knows of it; sets a flag.
        let descriptor = unsafe {
            libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
            OwnedFd::from_raw_fd(fd)
        };
        (name.to_owned(), descriptor)
    });
    Some(passed.collect())
}

/// The way to systemd; nothing depends on anybody listening.
pub struct Systemd(Option<OwnedFd>);

impl Systemd {
    /// None has started us: then nothing is told.
    pub fn new() -> Systemd {
        Systemd(notify_socket())
    }

    /// Stores descriptors, and says that pages are served. Without FDPOLL=0 systemd would drop /dev/fuse at its first
    /// error.
    pub fn serving(&self, kept: [BorrowedFd<'_>; 4], program: BorrowedFd<'_>) {
        NAMES.into_iter().zip(kept).for_each(|(name, descriptor)| self.store(name, descriptor));
        self.store(PROGRAM, program);
        self.send(format_args!("READY=1"), None);
    }

    /// Another program serves.
    pub fn upgraded(&self, program: BorrowedFd<'_>) {
        self.remove(PROGRAM);
        self.store(PROGRAM, program);
    }

    /// Takes all of them out of the store: there is nothing left to go on with.
    pub fn ended(&self) {
        NAMES.into_iter().chain([PROGRAM]).for_each(|name| self.remove(name));
    }

    fn store(&self, name: &str, descriptor: BorrowedFd<'_>) {
        self.send(format_args!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), Some(descriptor));
    }

    fn remove(&self, name: &str) {
        self.send(format_args!("FDSTOREREMOVE=1\nFDNAME={name}"), None);
    }

    fn send(&self, text: Arguments<'_>, descriptor: Option<BorrowedFd<'_>>) {
        let Some(socket) = &self.0 else { return };
        let mut room = [0; 128];
        let mut bytes = Cursor::new(&mut room[..]);
        if bytes.write_fmt(text).is_ok() {
            let length = bytes.position() as usize;
            let _not_heard = socket::send_with_descriptor(socket, &room[..length], descriptor);
        }
    }
}

/// Connected to systemd's socket, whose address may be abstract: a zero byte, for which the variable has an @.
fn notify_socket() -> Option<OwnedFd> {
    let path = env::var_os("NOTIFY_SOCKET")?;
    let mut bytes = path.as_bytes().to_vec();
    // SAFETY: all-zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() {
        return None;
    }
    if bytes[0] == b'@' {
        bytes[0] = 0;
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(&bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: plain system call; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    // SAFETY: just returned by the kernel, and nobody else has it.
    let socket = (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })?;
    let length = std::mem::offset_of!(libc::sockaddr_un, sun_path) + bytes.len();
    // SAFETY: `address` is a sockaddr_un, and longer.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length as libc::socklen_t) };
    (result == 0).then_some(socket)
}
