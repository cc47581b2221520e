//! systemd's store of descriptors (sd_notify(3), `FDSTORE=1`), which outlives the keeper; and its being told how we are.

use std::env;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use zswapd_keeper::socket;

/// The first descriptor that systemd passes.
const FIRST: RawFd = 3;
/// What the store's names begin with.
const PREFIX: &str = "zswapd-";

/// What was in the store when we were started, and the way to it. Without systemd there is neither.
pub struct Store {
    taken: Vec<(String, Option<OwnedFd>)>,
    notify: Option<OwnedFd>,
}

impl Store {
    /// To be called once, first of all: it takes the descriptors over.
    pub fn new() -> Store {
        let number = |name: &str| env::var(name).ok()?.parse::<u32>().ok();
        let ours = number("LISTEN_PID") == Some(std::process::id());
        let count = number("LISTEN_FDS").filter(|_| ours).unwrap_or(0) as RawFd;
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        let taken = (FIRST..FIRST + count).zip(names.split(':')).map(|(fd, name)| {
            // SAFETY: systemd has opened it for us, and nobody else in this process knows of it.
            let descriptor = unsafe { OwnedFd::from_raw_fd(fd) };
            // SAFETY: sets a flag of a descriptor that we own.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
            (name.to_owned(), Some(descriptor))
        });
        Store { taken: taken.collect(), notify: notify_socket() }
    }

    /// Whether an earlier keeper has left pages.
    pub fn has_pages(&self) -> bool {
        self.taken.iter().any(|(name, _)| name.strip_prefix(PREFIX) == Some("state"))
    }

    pub fn take(&mut self, what: &str) -> Option<OwnedFd> {
        self.taken.iter_mut().find(|(name, _)| name.strip_prefix(PREFIX) == Some(what))?.1.take()
    }

    /// Puts a descriptor into the store. Without FDPOLL=0 systemd would drop /dev/fuse with its first error.
    pub fn put(&self, what: &str, descriptor: BorrowedFd<'_>) {
        self.send(&format!("FDSTORE=1\nFDNAME={PREFIX}{what}\nFDPOLL=0"), Some(descriptor));
    }

    pub fn remove(&self, what: &str) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={PREFIX}{what}"), None);
    }

    pub fn serving(&self) {
        self.send("READY=1", None);
    }

    /// Nothing depends on it being told: there may be no systemd, or none that listens.
    fn send(&self, text: &str, descriptor: Option<BorrowedFd<'_>>) {
        if let Some(notify) = &self.notify {
            let _ = socket::send_with_descriptor(notify, text.as_bytes(), descriptor);
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
    let result =
        unsafe { libc::connect(socket.as_fd().as_raw_fd(), (&raw const address).cast(), length as libc::socklen_t) };
    (result == 0).then_some(socket)
}
