//! The relay: requests that are not on the swap file go to pyfuse3, over a SOCK_SEQPACKET pair, and its replies back.
//!
//! A send to a socket allocates in the kernel, so that no worker does it: a worker puts the request into a queue of
//! fixed size, or answers EAGAIN if that is full. pyfuse3 may be gone at any time: what it had not answered by then is
//! answered EINTR, and what comes before its successor is there, EAGAIN. INIT is answered by the pager itself.
//!
//! The pager may be gone at any time too. Its successor goes on with the same pair, and pyfuse3 does not notice. What the
//! kernel then sends again may have been relayed before: it is relayed again if that makes no difference, and answered
//! EINTR if it may. What pyfuse3 replies to the request as it was first sent is for nobody.

use crate::keeper::Keeper;
use crate::process::{spawn as spawn_thread, touch, Start};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use zswapd_core::session::{Session, MAX_INIT};
use zswapd_fuse::wire::{opcode, u32_at, u64_at, Request};
use zswapd_fuse::{init, reply};
use zswapd_keeper::socket;

/// The longest request that is relayed: a command to a control file is far shorter.
const MESSAGE: usize = 8 << 10;
/// The longest reply: stats.json, several times over.
const REPLY: usize = 256 << 10;
/// Requests that wait to be sent.
const QUEUE: usize = 16;
/// Requests that pyfuse3 may have unanswered.
const IN_FLIGHT: usize = 64;
/// Asked for on both ends of the pair: room for the longest message.
const SOCKET_BUFFER: libc::c_int = 1 << 20;

/// A request as the kernel sent it.
#[derive(Clone)]
struct Message {
    bytes: [u8; MESSAGE],
    length: usize,
}

impl Message {
    const EMPTY: Message = Message { bytes: [0; MESSAGE], length: 0 };

    fn set(&mut self, bytes: &[u8]) {
        self.length = bytes.len();
        self.bytes[..bytes.len()].copy_from_slice(bytes);
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

struct Inner {
    /// A ring: `queued` messages from `first` on.
    ring: Box<[Message]>,
    first: usize,
    queued: usize,
    /// Uniques of what pyfuse3 has not answered; never grows beyond `IN_FLIGHT`.
    in_flight: Vec<u64>,
    /// Our end of the pair to the pyfuse3 of now.
    peer: Option<Arc<OwnedFd>>,
    /// The kernel's INIT as pyfuse3 may see it, kept for every pyfuse3 to come. Empty before the kernel has sent it.
    init: Box<Message>,
    /// INIT is to be sent to the peer.
    send_init: bool,
}

impl Inner {
    /// Keeps the kernel's INIT, as pyfuse3 may see it.
    fn keep_init(&mut self, request: &[u8]) {
        self.init.set(request);
        init::mask_request(&mut self.init.bytes[..request.len()]);
    }
}

/// The way to pyfuse3. The lock is held for bounded work only, never while sending or receiving.
pub struct Relay {
    device: Arc<File>,
    keeper: Arc<Keeper>,
    inner: Mutex<Inner>,
    changed: Condvar,
}

/// What relay-out has to send.
enum Outgoing {
    Init,
    Request,
}

impl Relay {
    pub fn new(device: Arc<File>, keeper: Arc<Keeper>) -> Relay {
        // Workers fill what relay-out empties. Fresh memory is all zeros, and would fault only then.
        let mut ring: Box<[Message]> = vec![Message::EMPTY; QUEUE].into();
        let mut init = Box::new(Message::EMPTY);
        ring.iter_mut().chain([&mut *init]).for_each(|message| touch(&mut message.bytes));
        let inner = Inner {
            ring,
            first: 0,
            queued: 0,
            in_flight: Vec::with_capacity(IN_FLIGHT),
            peer: None,
            init,
            send_init: false,
        };
        Relay { device, keeper, inner: Mutex::new(inner), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on where another process has ended: with what `session` says, and its end of the pair to pyfuse3. To be
    /// called before any thread begins.
    pub fn go_on(&self, session: &Session, peer: Option<OwnedFd>) {
        let mut inner = self.lock();
        let mut room = [0; MAX_INIT];
        // Else the kernel sends it, again if need be.
        if let Some(request) = session.init(&mut room) {
            inner.keep_init(request);
        }
        match peer {
            // It may have had INIT, and would not take it twice.
            Some(peer) if session.greeted.load(SeqCst) == 0 => hang_up(&peer),
            peer => inner.peer = peer.map(Arc::new),
        }
    }

    /// Whether there is a pyfuse3, as far as we know.
    pub fn is_connected(&self) -> bool {
        self.lock().peer.is_some()
    }

    /// Takes a request from a worker. Never waits for pyfuse3. An error means that the device is gone.
    pub fn forward(&self, request: &Request<'_>, session: &Session) -> io::Result<()> {
        if request.bytes.len() > MESSAGE {
            return self.refuse(request, libc::EINVAL);
        }
        if request.is_resent() && request.opcode != opcode::INIT && !request.may_be_repeated() {
            return self.refuse(request, libc::EINTR);
        }
        if request.opcode == opcode::INIT {
            return self.answer_init(request, session);
        }
        let mut inner = self.lock();
        if inner.peer.is_none() || inner.queued == QUEUE {
            drop(inner);
            return self.refuse(request, libc::EAGAIN);
        }
        let last = (inner.first + inner.queued) % QUEUE;
        inner.ring[last].set(request.bytes);
        inner.queued += 1;
        self.changed.notify_all();
        Ok(())
    }

    fn answer_init(&self, request: &Request<'_>, session: &Session) -> io::Result<()> {
        let Some(payload) = init::reply(request.bytes).filter(|_| session.set_init(request.bytes)) else {
            return self.refuse(request, libc::EPROTO);
        };
        // A process that ends before this is sent INIT again; after it, `session` has it.
        reply::send(self.device.as_fd(), request.unique, Ok(&payload))?;
        let mut inner = self.lock();
        // If it was sent again, `go_on` has it, and a pyfuse3 may have been given it.
        if inner.init.length == 0 {
            inner.keep_init(request.bytes);
            inner.send_init = true;
            self.changed.notify_all();
        }
        Ok(())
    }

    fn refuse(&self, request: &Request<'_>, errno: i32) -> io::Result<()> {
        match request.wants_reply() {
            true => reply::send(self.device.as_fd(), request.unique, Err(errno)).map(drop),
            false => Ok(()),
        }
    }

    /// Makes a new pair, sends INIT through it if the kernel has, and returns the end for pyfuse3.
    ///
    /// Errors: EBUSY while another pyfuse3 has the last one.
    pub fn connect(&self, session: &Session) -> io::Result<OwnedFd> {
        let (ours, theirs) = socket_pair()?;
        let mut inner = self.lock();
        if inner.peer.is_some() {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        // In this order, and before anything is sent over it: a successor must not take it for the last one.
        session.greeted.store(0, SeqCst);
        self.keeper.keep_relay(Some(ours.as_fd()));
        inner.peer = Some(Arc::new(ours));
        inner.send_init = inner.init.length > 0;
        self.changed.notify_all();
        Ok(theirs)
    }

    /// Answers everything that a pyfuse3 that is gone has left: it may or may not have been done.
    fn give_up(&self, inner: &mut Inner) {
        let queued = (0..inner.queued).map(|n| &inner.ring[(inner.first + n) % QUEUE]);
        let queued = queued.filter_map(|message| Request::parse(message.bytes()).ok());
        let unanswered = queued.filter(Request::wants_reply).map(|request| request.unique);
        for unique in unanswered.chain(inner.in_flight.iter().copied()) {
            // A device that is gone waits for no reply.
            let _ = reply::send(self.device.as_fd(), unique, Err(libc::EINTR));
        }
        inner.queued = 0;
        inner.in_flight.clear();
    }

    /// The peer has hung up; the other thread may have seen it first, and have a successor already.
    fn hung_up(&self, peer: &Arc<OwnedFd>) {
        let mut inner = self.lock();
        if inner.peer.as_ref().is_some_and(|current| Arc::ptr_eq(current, peer)) {
            inner.peer = None;
            self.keeper.keep_relay(None);
            self.give_up(&mut inner);
            // A log that nobody reads must not hold up a worker.
            drop(inner);
            eprintln!("zswapd-pager: zswapd is gone; pages are served, control files are not");
        }
    }

    /// relay-out: sends, for ever.
    fn send_all(&self) {
        let mut message = Box::new(Message::EMPTY);
        loop {
            let peer = self.next_outgoing(&mut message);
            if send(&peer, message.bytes()).is_err() {
                self.hung_up(&peer);
            }
        }
    }

    /// Waits for something to send, copies it, and notes that it is in flight.
    fn next_outgoing(&self, message: &mut Message) -> Arc<OwnedFd> {
        let mut inner = self.lock();
        loop {
            let ready = match &inner.peer {
                Some(peer) if inner.send_init => Some((peer.clone(), Outgoing::Init)),
                Some(peer) if inner.queued > 0 && inner.in_flight.len() < IN_FLIGHT => {
                    Some((peer.clone(), Outgoing::Request))
                }
                _ => None,
            };
            match ready {
                Some((peer, Outgoing::Init)) => {
                    inner.send_init = false;
                    message.set(inner.init.bytes());
                    return peer;
                }
                Some((peer, Outgoing::Request)) => {
                    let first = inner.first;
                    message.set(inner.ring[first].bytes());
                    inner.first = (first + 1) % QUEUE;
                    inner.queued -= 1;
                    if let Some(request) = Request::parse(message.bytes()).ok().filter(Request::wants_reply) {
                        inner.in_flight.push(request.unique);
                    }
                    return peer;
                }
                None => inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// relay-in: receives, for ever.
    fn receive_all(&self, session: &Session) {
        let mut buffer = vec![0; REPLY];
        touch(&mut buffer);
        loop {
            let peer = self.wait_for_peer();
            while let Some(length) = receive(&peer, &mut buffer) {
                self.pass_on(&peer, &buffer[..length], session);
            }
            self.hung_up(&peer);
        }
    }

    fn wait_for_peer(&self) -> Arc<OwnedFd> {
        let mut inner = self.lock();
        loop {
            match &inner.peer {
                Some(peer) => return peer.clone(),
                None => inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Passes a reply or a notification of pyfuse3 to the kernel, if the kernel waits for it.
    fn pass_on(&self, peer: &Arc<OwnedFd>, message: &[u8], session: &Session) {
        let Some(unique) = u64_at(message, 8).filter(|_| u32_at(message, 0) == Some(message.len() as u32)) else {
            return;
        };
        let mut inner = self.lock();
        // Not of one that the other thread has found gone.
        if !inner.peer.as_ref().is_some_and(|current| Arc::ptr_eq(current, peer)) {
            return;
        }
        if unique != 0 {
            if u64_at(inner.init.bytes(), 8) == Some(unique) {
                // The kernel has had its reply from the pager.
                session.greeted.store(1, SeqCst);
                return;
            }
            let Some(at) = inner.in_flight.iter().position(|&other| other == unique) else { return };
            inner.in_flight.swap_remove(at);
            self.changed.notify_all();
        }
        drop(inner);
        // What the kernel refuses, it does not wait for.
        let _ = reply::send_raw(self.device.as_fd(), message);
    }
}

/// Makes relay-out and relay-in.
pub fn spawn(start: &Arc<Start>) -> io::Result<()> {
    spawn_thread("relay-out", start, |shared| shared.relay.send_all())?;
    spawn_thread("relay-in", start, |shared| shared.relay.receive_all(shared.session()))
}

/// A pair of sockets that keep messages whole, with room for the longest.
pub fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socket::pair()?;
    let size = SOCKET_BUFFER;
    for socket in [&ours, &theirs] {
        for option in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
            let (value, length) = (&raw const size, size_of_val(&size) as libc::socklen_t);
            // SAFETY: `value` points to `length` bytes. Refused, the default must do.
            unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, value.cast(), length) };
        }
    }
    Ok((ours, theirs))
}

/// For every copy: the keeper has one of our end.
fn hang_up(socket: &OwnedFd) {
    // SAFETY: plain system call on a descriptor that we own. What has hung up itself needs no more.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

/// Sends one message; waits for room.
fn send(socket: &OwnedFd, message: &[u8]) -> io::Result<()> {
    // SAFETY: the message is valid for its length.
    let sent = unsafe { libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), libc::MSG_NOSIGNAL) };
    if sent >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Waits for one message and returns its length. None at the end, or for a message that is longer than the buffer.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Option<usize> {
    loop {
        // SAFETY: the buffer is valid for its length.
        let received =
            unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_TRUNC) };
        match usize::try_from(received) {
            Ok(0) => return None,
            Ok(length) if length <= buffer.len() => return Some(length),
            // Its request will never be answered: cut the peer off, so that it is answered EINTR.
            Ok(_) => return None,
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests;
