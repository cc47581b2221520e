//! The page channel: workers that read requests from /dev/fuse and answer those on the swap file.
//!
//! A task waits for every READ, for most WRITEs nobody does. A READ therefore goes before whatever else a worker has
//! taken in: it waits for a part of a WRITE at most. All else keeps its order.
//!
//! From a request to its reply a worker allocates nothing, takes no page fault, and takes no lock whose holder may wait
//! for memory. It sleeps only when there is no request.

use crate::args::Args;
use crate::idle::Idle;
use crate::inbox::{Inbox, ROOM};
use crate::process::spawn as spawn_thread;
use crate::{no_alloc, Shared};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{ready, Poll};
use std::thread;
use std::time::{Duration, Instant};
use zswapd_core::scratch::Scratch;
use zswapd_core::store::Detached;
use zswapd_fuse::reply;
use zswapd_fuse::swapfile::{self, Tools};
use zswapd_fuse::wire::{opcode, Malformed, Operation, Request};

/// READs that are answered before the oldest of what waits goes on: as much work as a part of a WRITE, or a little more.
const READS: usize = 8;
/// How long a worker waits after an error of the device before it tries again.
const PAUSE: Duration = Duration::from_millis(10);
/// Objects of a punched cluster of 2 MiB, and then some.
const DETACHED: usize = 1024;

/// Starts the workers.
pub fn spawn(shared: &Arc<Shared>, device: BorrowedFd<'_>, args: &Args) -> io::Result<()> {
    let spin = spin_here(args.spin);
    for n in 0..args.workers {
        let mut worker = Worker::new(shared.clone(), device.try_clone_to_owned()?, spin)?;
        spawn_thread(&format!("worker-{n}"), move || no_alloc::forbidden(|| worker.serve()))?;
    }
    Ok(())
}

/// How long to look for a request before sleeping: on the only processor there is, who looks keeps away who would make
/// one.
fn spin_here(most: Duration) -> Duration {
    match thread::available_parallelism() {
        Ok(processors) if processors.get() == 1 => Duration::ZERO,
        _ => most,
    }
}

struct Worker {
    shared: Arc<Shared>,
    device: OwnedFd,
    idle: Idle,
    /// The last read(2) has failed, and the device is not gone.
    cannot_read: bool,
    inbox: Inbox,
    tools: Tools,
}

impl Worker {
    fn new(shared: Arc<Shared>, device: OwnedFd, spin: Duration) -> io::Result<Worker> {
        let scratch = Scratch::new().map_err(io::Error::other)?;
        let tools = Tools::new(scratch, Detached::with_capacity(DETACHED));
        Ok(Worker { shared, device, idle: Idle::new(spin), cannot_read: false, inbox: Inbox::new(), tools })
    }

    fn serve(&mut self) {
        while let Ok(busy) = self.turn() {
            if !busy {
                self.wait();
            }
        }
        // Unmounted or aborted: there is nothing left to serve.
        self.shared.closer.close();
    }

    /// Takes in what there is and answers the READs, then goes on with the oldest of the rest. False: there was nothing
    /// to do. An error means that the device is gone.
    fn turn(&mut self) -> io::Result<bool> {
        let mut busy = false;
        let mut reads = 0;
        while reads < READS {
            let Some(request) = self.receive()? else { break };
            busy = true;
            match self.is_read(&request) {
                true => {
                    reads += 1;
                    let _answered_whole = self.handle(request);
                }
                false => self.inbox.push(request),
            }
        }
        let Some(oldest) = self.inbox.oldest() else { return Ok(busy) };
        if self.handle(oldest).is_ready() {
            self.inbox.pop();
        }
        Ok(true)
    }

    /// Receives a request into the inbox's room. None if there is no request now, or no room.
    fn receive(&mut self) -> io::Result<Option<Range<usize>>> {
        let Some(start) = self.inbox.room() else { return Ok(None) };
        let room = self.inbox.bytes(start..start + ROOM);
        // SAFETY: the room is valid for its length.
        let read = unsafe { libc::read(self.device.as_raw_fd(), room.as_mut_ptr().cast(), room.len()) };
        if let Ok(length) = usize::try_from(read) {
            self.idle.request(Instant::now());
            return Ok(Some(start..start + length));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // ENOENT: the request was interrupted before we had it. EINTR: a signal.
            Some(libc::EAGAIN | libc::ENOENT | libc::EINTR) => {}
            Some(errno) if is_gone(errno) => return Err(error),
            // The kernel had no memory, for one: no reason to leave everybody's pages.
            errno => {
                self.cannot_read = true;
                self.shared.trouble.note(errno.unwrap_or(libc::EIO));
            }
        }
        Ok(None)
    }

    fn wait(&mut self) {
        // There may be a request, which poll(2) would not wait for.
        if std::mem::take(&mut self.cannot_read) {
            return thread::sleep(PAUSE);
        }
        if !self.idle.no_request(Instant::now()) {
            return std::hint::spin_loop();
        }
        let mut waiting = libc::pollfd { fd: self.device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd. Whatever it returns, the next read tells.
        unsafe { libc::poll(&mut waiting, 1, -1) };
    }

    fn is_read(&mut self, request: &Range<usize>) -> bool {
        Request::parse(self.inbox.bytes(request.clone())).is_ok_and(|request| request.opcode == opcode::READ)
    }

    /// Answers a request, or, pending, does a part of what it asks for.
    ///
    /// A reply that the kernel refuses is the matter of one request. Whether the device is gone, the next read tells.
    fn handle(&mut self, at: Range<usize>) -> Poll<()> {
        let gate = &self.shared.gate;
        let _until_the_end = gate.begin();
        let start = at.start;
        let request = match Request::parse(self.inbox.bytes(at)) {
            Ok(request) => request,
            Err(Malformed { unique }) => {
                if let Some(unique) = unique {
                    let _ = reply::send(as_fd(&self.device), unique, Err(libc::EIO));
                }
                return Poll::Ready(());
            }
        };
        if request.nodeid != swapfile::NODEID || !request.wants_reply() {
            let _ = self.shared.relay.forward(&request);
            return Poll::Ready(());
        }
        let (unique, operation) = (request.unique, Operation::parse(&request));
        let (opens, releases) =
            (matches!(operation, Some(Operation::Open { .. })), operation == Some(Operation::Release));
        let engine = &self.shared.engine;
        let mut small = [0; 128];
        let payload = match operation {
            None => Err(libc::EINVAL),
            Some(Operation::Open { .. }) if gate.is_closed() => Err(libc::ENODEV),
            // A READ is answered from the room that it was received into: what is read takes its place.
            Some(Operation::Read { offset, size }) => {
                let room = self.inbox.bytes(start..start + ROOM);
                ready!(swapfile::answer(engine, Operation::Read { offset, size }, room, &mut self.tools))
            }
            Some(Operation::Write { offset, data }) if (self.shared.stored..engine.size()).contains(&offset) => {
                Ok(swapfile::written(&mut small, data.len()))
            }
            Some(other) => ready!(swapfile::answer(engine, other, &mut small, &mut self.tools)),
        };
        let opened = opens && payload.is_ok();
        let delivered = reply::send(as_fd(&self.device), unique, payload).unwrap_or(false);
        // An open that nobody waited for will not be released.
        if opened && delivered {
            gate.opened();
        } else if releases {
            gate.released();
        }
        // Behind the reply: nobody waits for this.
        if !self.tools.detached.is_empty() {
            engine.store().free_detached(&mut self.tools.detached);
        }
        Poll::Ready(())
    }
}

/// Whether an error of read(2) says that the file system was unmounted, or its connection aborted.
fn is_gone(errno: i32) -> bool {
    matches!(errno, libc::ENODEV | libc::ECONNABORTED)
}

fn as_fd(device: &OwnedFd) -> BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(device)
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod turn_tests;
