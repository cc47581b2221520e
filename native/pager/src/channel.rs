//! The page channel: workers that read requests from /dev/fuse and answer those on the swap file.
//!
//! From a request to its reply a worker allocates nothing, takes no page fault, and takes no lock whose holder may wait
//! for memory. It sleeps only when there is no request.

use crate::args::Args;
use crate::process::{spawn as spawn_thread, touch};
use crate::{no_alloc, Shared};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use zswapd_core::codec::Scratch;
use zswapd_core::store::Detached;
use zswapd_fuse::init::MAX_TRANSFER;
use zswapd_fuse::wire::{Malformed, Operation, Request};
use zswapd_fuse::{reply, swapfile};

/// A request of the largest size, with its header.
const BUFFER: usize = MAX_TRANSFER + 4096;
/// Objects of a punched cluster of 2 MiB, and then some.
const DETACHED: usize = 1024;

/// Starts the workers.
pub fn spawn(shared: &Arc<Shared>, device: BorrowedFd<'_>, args: &Args) -> io::Result<()> {
    for n in 0..args.workers {
        let mut worker = Worker {
            shared: shared.clone(),
            device: device.try_clone_to_owned()?,
            spin: args.spin,
            buffer: vec![0; BUFFER],
            detached: Detached::with_capacity(DETACHED),
            scratch: Scratch::new().map_err(io::Error::other)?,
        };
        touch(&mut worker.buffer);
        spawn_thread(&format!("worker-{n}"), move || no_alloc::forbidden(|| worker.serve()))?;
    }
    Ok(())
}

struct Worker {
    shared: Arc<Shared>,
    device: OwnedFd,
    spin: Duration,
    buffer: Vec<u8>,
    detached: Detached,
    scratch: Scratch,
}

impl Worker {
    fn serve(&mut self) {
        while let Some(length) = self.next_request() {
            // A reply that the kernel refuses is the matter of one request. Whether the device is gone, the next read
            // tells.
            let _ = self.handle(length);
        }
        // Unmounted or aborted: there is nothing left to serve.
        self.shared.closer.close();
    }

    /// Waits for a request and returns its length. None when the file system is unmounted or aborted.
    fn next_request(&mut self) -> Option<usize> {
        let mut spin_until = None;
        loop {
            // SAFETY: the buffer is valid for its length.
            let read =
                unsafe { libc::read(self.device.as_raw_fd(), self.buffer.as_mut_ptr().cast(), self.buffer.len()) };
            if let Ok(length) = usize::try_from(read) {
                return Some(length);
            }
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::EAGAIN) => {
                    let now = Instant::now();
                    match *spin_until.get_or_insert(now + self.spin) {
                        until if now < until => std::hint::spin_loop(),
                        _ => self.sleep(),
                    }
                }
                // The request was interrupted before we had it; a signal.
                Some(libc::ENOENT | libc::EINTR) => {}
                _ => return None,
            }
        }
    }

    fn sleep(&self) {
        let mut waiting = libc::pollfd { fd: self.device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd. Whatever it returns, the next read tells.
        unsafe { libc::poll(&mut waiting, 1, -1) };
    }

    /// Answers the request in the buffer. An error means that the device is gone.
    fn handle(&mut self, length: usize) -> io::Result<()> {
        let gate = &self.shared.gate;
        let _until_the_end = gate.begin();
        let request = match Request::parse(&self.buffer[..length]) {
            Ok(request) => request,
            Err(Malformed { unique: Some(unique) }) => {
                return reply::send(as_fd(&self.device), unique, Err(libc::EIO)).map(drop)
            }
            Err(Malformed { unique: None }) => return Ok(()),
        };
        if request.nodeid != swapfile::NODEID || !request.wants_reply() {
            return self.shared.relay.forward(&request);
        }
        let (unique, operation) = (request.unique, Operation::parse(&request));
        let (opens, releases) =
            (matches!(operation, Some(Operation::Open { .. })), operation == Some(Operation::Release));
        let engine = &self.shared.engine;
        let mut small = [0; 128];
        let payload = match operation {
            None => Err(libc::EINVAL),
            Some(Operation::Open { .. }) if gate.is_closed() => Err(libc::ENODEV),
            // What is read takes the place of the request, which is done with.
            Some(Operation::Read { offset, size }) => {
                let read = Operation::Read { offset, size };
                swapfile::answer(engine, read, &mut self.buffer, &mut self.detached, &mut self.scratch)
            }
            Some(Operation::Write { offset, data }) if (self.shared.stored..engine.size()).contains(&offset) => {
                Ok(swapfile::written(&mut small, data.len()))
            }
            Some(other) => swapfile::answer(engine, other, &mut small, &mut self.detached, &mut self.scratch),
        };
        let opened = opens && payload.is_ok();
        let delivered = reply::send(as_fd(&self.device), unique, payload)?;
        // An open that nobody waited for will not be released.
        if opened && delivered {
            gate.opened();
        } else if releases {
            gate.released();
        }
        // Behind the reply: nobody waits for this.
        if !self.detached.is_empty() {
            engine.store().free_detached(&mut self.detached);
        }
        Ok(())
    }
}

fn as_fd(device: &OwnedFd) -> BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(device)
}

#[cfg(test)]
mod tests;
