//! The control socket: its listener, and connections that carry whole messages.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;
use zswapd_core::error::Error;
use zswapd_keeper::socket::{send_with_descriptor, try_receive_with_descriptor};

/// The longest message that is received.
const MESSAGE: usize = 512;

/// The socket that others connect to. It is the keeper's, and outlives this process.
pub struct Listener(OwnedFd);

impl Listener {
    pub fn new(socket: OwnedFd) -> Listener {
        Listener(socket)
    }

    pub fn closer(&self) -> io::Result<Closer> {
        Ok(Closer(self.0.try_clone()?))
    }

    /// The next connection; waits for one. None when the listener is closed.
    pub fn accept(&self) -> io::Result<Option<Connection>> {
        let (socket, flags) = (self.0.as_raw_fd(), libc::SOCK_CLOEXEC);
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
        let mut all: Vec<_> = std::iter::once(self.0.as_raw_fd()).chain(connections).map(readable).collect();
        let milliseconds = patience.map_or(-1, |patience| patience.as_millis() as libc::c_int);
        // SAFETY: so many pollfds.
        if unsafe { libc::poll(all.as_mut_ptr(), all.len() as libc::nfds_t, milliseconds) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((all[0].revents != 0, all[1..].iter().map(|one| one.revents != 0).collect()))
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
    /// The message that is there, and the descriptor that came with it. None if there is none, or the other side has hung
    /// up. Errors: it is too long: what there is of it might be another command.
    pub fn receive(&self) -> Option<Result<(String, Option<OwnedFd>), Error>> {
        let mut buffer = [0; MESSAGE];
        let (length, descriptor) = try_receive_with_descriptor(&self.0, &mut buffer).ok()?;
        if length == 0 {
            return None;
        }
        let message = buffer.get(..length).map(|message| String::from_utf8_lossy(message).into_owned());
        let message = message.ok_or_else(|| Error::Invalid(format!("a command of {length} bytes is too long")));
        Some(message.map(|message| (message, descriptor)))
    }

    /// Sends one message, with a descriptor or without. Never waits: whoever has no room for it goes without.
    pub fn send(&self, text: &str, descriptor: Option<&OwnedFd>) {
        let _gone_or_full = send_with_descriptor(&self.0, text.as_bytes(), descriptor.map(AsFd::as_fd));
    }
}
