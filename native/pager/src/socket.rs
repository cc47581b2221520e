//! A SOCK_SEQPACKET socket in the file system: its listener, and connections that carry whole messages.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use zswapd_core::error::Error;

/// The longest message that is received.
const MESSAGE: usize = 512;

/// The socket that others connect to. Removed when dropped.
pub struct Listener {
    socket: OwnedFd,
    pub path: PathBuf,
}

impl Listener {
    /// Makes the socket, for root alone. A socket file that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> io::Result<Listener> {
        let socket = seqpacket()?;
        let address = address_of(path)?;
        let length = size_of_val(&address) as libc::socklen_t;
        let bind = || {
            // SAFETY: `address` is a sockaddr_un of that length.
            check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })
        };
        // SAFETY: sets the mask of the only thread that there is yet.
        let mask = unsafe { libc::umask(0o177) };
        let bound = bind().or_else(|error| {
            let probe = seqpacket()?;
            // SAFETY: as for bind.
            let alive = unsafe { libc::connect(probe.as_raw_fd(), (&raw const address).cast(), length) } == 0;
            if error.raw_os_error() != Some(libc::EADDRINUSE) || alive {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            bind()
        });
        // SAFETY: as above.
        unsafe { libc::umask(mask) };
        bound?;
        // Long: who connects without waiting, as zswapd does, is refused where it is full.
        // SAFETY: plain system call on our socket.
        check(unsafe { libc::listen(socket.as_raw_fd(), libc::SOMAXCONN) })?;
        Ok(Listener { socket, path: path.to_owned() })
    }

    pub fn closer(&self) -> io::Result<Closer> {
        Ok(Closer(self.socket.try_clone()?))
    }

    /// The next connection; waits for one. None when the listener is closed.
    pub fn accept(&self) -> io::Result<Option<Connection>> {
        let (socket, flags) = (self.socket.as_raw_fd(), libc::SOCK_CLOEXEC);
        // SAFETY: plain system call; the result is checked.
        let accepted = unsafe { libc::accept4(socket, std::ptr::null_mut(), std::ptr::null_mut(), flags) };
        if accepted < 0 {
            let error = io::Error::last_os_error();
            // Of a socket that is shut down.
            return if error.raw_os_error() == Some(libc::EINVAL) { Ok(None) } else { Err(error) };
        }
        // SAFETY: just returned by the kernel, and nobody else has it.
        Ok(Some(Connection(unsafe { OwnedFd::from_raw_fd(accepted) })))
    }

    /// Whether there is something to accept, and which of `connections` have something to receive (or have hung up).
    /// Waits until there is anything, for `patience` at most (None: for ever).
    pub fn poll(
        &self,
        connections: &VecDeque<Connection>,
        patience: Option<Duration>,
    ) -> io::Result<(bool, Vec<bool>)> {
        let readable = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let connections = connections.iter().map(|connection| connection.0.as_raw_fd());
        let mut all: Vec<_> = std::iter::once(self.socket.as_raw_fd()).chain(connections).map(readable).collect();
        let milliseconds = patience.map_or(-1, |patience| patience.as_millis() as libc::c_int);
        // SAFETY: so many pollfds.
        if unsafe { libc::poll(all.as_mut_ptr(), all.len() as libc::nfds_t, milliseconds) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((all[0].revents != 0, all[1..].iter().map(|one| one.revents != 0).collect()))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Closes a [`Listener`] from another thread.
pub struct Closer(OwnedFd);

impl Closer {
    pub fn close(&self) {
        // SAFETY: plain system call on a descriptor that we own.
        unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

pub struct Connection(OwnedFd);

impl Connection {
    /// The message that is there. None if there is none, or the other side has hung up. Errors: it is too long: what
    /// there is of it might be another command.
    pub fn receive(&self) -> Option<Result<String, Error>> {
        let mut buffer = [0; MESSAGE];
        // SAFETY: the buffer is valid for its length.
        let received = unsafe {
            let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
            libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags)
        };
        let length = usize::try_from(received).ok().filter(|&length| length > 0)?;
        let message = buffer.get(..length).map(|message| String::from_utf8_lossy(message).into_owned());
        Some(message.ok_or_else(|| Error::Invalid(format!("a command of {length} bytes is too long"))))
    }

    /// Sends one message, with a descriptor or without. Never waits: whoever has no room for it goes without.
    pub fn send(&self, text: &str, descriptor: Option<&OwnedFd>) {
        let mut part = libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() };
        // SAFETY: all-zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &mut part;
        message.msg_iovlen = 1;
        // u64 for alignment: more than enough for the header and one descriptor.
        let mut control = [0u64; 8];
        if let Some(descriptor) = descriptor {
            let payload = size_of::<libc::c_int>() as u32;
            message.msg_control = control.as_mut_ptr().cast();
            // SAFETY: takes a number, returns a number.
            message.msg_controllen = unsafe { libc::CMSG_SPACE(payload) } as _;
            // SAFETY: `control` has room for one header and one descriptor, and is aligned.
            unsafe {
                let header = libc::CMSG_FIRSTHDR(&message);
                (*header).cmsg_level = libc::SOL_SOCKET;
                (*header).cmsg_type = libc::SCM_RIGHTS;
                (*header).cmsg_len = libc::CMSG_LEN(payload) as _;
                libc::CMSG_DATA(header).cast::<libc::c_int>().write_unaligned(descriptor.as_raw_fd());
            }
        }
        // SAFETY: all that `message` points to lives until the call returns.
        unsafe { libc::sendmsg(self.0.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    }
}

pub(crate) fn seqpacket() -> io::Result<OwnedFd> {
    // SAFETY: plain system call; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) };
    check(fd.min(0))?;
    // SAFETY: just returned by the kernel, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn address_of(path: &Path) -> io::Result<libc::sockaddr_un> {
    // SAFETY: all-zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is too long for a socket", path.display()),
        ));
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(address)
}

pub(crate) fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
