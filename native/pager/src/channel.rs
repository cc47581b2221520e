//! The page channel: workers that read requests from /dev/fuse and answer those on the swap file.
//!
//! One worker leads at a time (see [`crew`](crate::crew)), and takes the requests in. A task waits for every READ, for
//! most WRITEs nobody does. A READ therefore goes before whatever else is taken in: it waits for a part of a WRITE at
//! most. What is not on the swap file does not wait for WRITEs either. All else keeps its order.
//!
//! From a request to its reply a worker allocates nothing, takes no page fault, and takes no lock whose holder may wait
//! for memory. It sleeps only when there is no request, or another leads.

use crate::args::Args;
use crate::crew::{Crew, Next, Pocket};
use crate::idle::Idle;
use crate::inbox::{self, Inbox, ROOM};
use crate::process::{spawn as spawn_thread, touch, Start};
use crate::{no_alloc, Shared};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};
use zswapd_core::scratch::Scratch;
use zswapd_core::store::Detached;
use zswapd_fuse::init::MAX_READ;
use zswapd_fuse::reply;
use zswapd_fuse::swapfile::{self, Progress, Tools};
use zswapd_fuse::wire::{Malformed, Operation, Request};

/// Requests that are answered at once before the oldest of what waits goes on: with READs, as much work as a part of a
/// WRITE, or a little more.
const AT_ONCE: usize = 8;
/// How long the leader waits after an error of the device before it tries again.
const PAUSE: Duration = Duration::from_millis(10);
/// Objects of a punched cluster of 2 MiB, and then some.
const DETACHED: usize = 1024;
/// READs that wait for a worker to come back from the disk: more than the kernel has outstanding.
const LEFT: usize = 512;
/// How long to wait, without a request, before a WRITE that found no room is tried again. A shrinker needs about as long
/// to write a segment.
const RETRY_MS: libc::c_int = 1;

/// Makes the workers. Errors: there is no memory, or a thread cannot be started.
pub fn spawn(start: &Arc<Start>, args: &Args) -> io::Result<()> {
    let crew = Arc::new(Crew::new(room_for_reads()));
    let (workers, room) = if args.backing.is_some() { (args.workers, inbox::MANY) } else { (1, inbox::FEW) };
    let spin = spin_here(args.spin);
    let mut first = Some(Inbox::new(room));
    for n in 0..workers {
        let (crew, inbox, mine) = (crew.clone(), first.take(), Mine::new(&crew, workers)?);
        spawn_thread(&format!("worker-{n}"), start, move |shared| {
            if let Some(inbox) = inbox {
                crew.resign(Box::new(Lead::new(shared.clone(), spin, inbox)));
            }
            let mut worker = Worker { shared, crew, mine };
            no_alloc::forbidden(|| worker.serve());
        })?;
    }
    Ok(())
}

fn room_for_reads() -> VecDeque<Read> {
    // Written, and so resident, before it is empty.
    let mut room = VecDeque::from(vec![Read { unique: 1, offset: 1, size: 1 }; LEFT]);
    room.clear();
    room
}

/// How long to look for a request before sleeping: on the only processor there is, who looks keeps away who would make
/// one.
fn spin_here(most: Duration) -> Duration {
    match thread::available_parallelism() {
        Ok(processors) if processors.get() == 1 => Duration::ZERO,
        _ => most,
    }
}

/// What only the worker that leads has: requests, and what there is to know about them.
struct Lead {
    shared: Arc<Shared>,
    device: Arc<File>,
    idle: Idle,
    /// The last read(2) has failed, and the device is not gone.
    cannot_read: bool,
    inbox: Inbox,
    /// Of the oldest request in the inbox.
    progress: Progress,
    /// Requests that were answered at once since the oldest had its turn.
    at_once: usize,
}

impl Lead {
    fn new(shared: Arc<Shared>, spin: Duration, inbox: Inbox) -> Lead {
        let (device, idle) = (shared.device.clone(), Idle::new(spin));
        Lead { shared, device, idle, cannot_read: false, inbox, progress: Progress::NONE, at_once: 0 }
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

    /// There is nothing to do: looks for the next request, or sleeps until it comes.
    fn wait(&mut self) {
        match self.cannot_read || self.idle.no_request(Instant::now()) {
            true => self.sleep(-1),
            false => std::hint::spin_loop(),
        }
    }

    /// Sleeps until there is a request that can be taken in, for so many milliseconds at most (-1: for ever).
    fn sleep(&mut self, milliseconds: libc::c_int) {
        // There may be a request, which poll(2) would not wait for.
        if std::mem::take(&mut self.cannot_read) {
            return thread::sleep(PAUSE);
        }
        let mut waiting = libc::pollfd { fd: self.device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let requests = self.inbox.room().map_or(0, |_| 1);
        // SAFETY: one valid pollfd, or none. Whatever it returns, the next read tells.
        unsafe { libc::poll(&mut waiting, requests, milliseconds) };
    }

    /// When a request is to be answered.
    fn turn_of(&mut self, at: Range<usize>) -> Turn {
        match Request::parse(self.inbox.bytes(at)) {
            Ok(request) if request.nodeid == swapfile::NODEID => match Operation::parse(&request) {
                Some(Operation::Read { offset, size }) => Turn::Read(Read { unique: request.unique, offset, size }),
                _ => Turn::InOrder,
            },
            _ => Turn::AtOnce,
        }
    }
}

/// A READ of the swap file.
#[derive(Clone)]
struct Read {
    unique: u64,
    offset: u64,
    size: u32,
}

enum Turn {
    Read(Read),
    /// No READ, and not on the swap file.
    AtOnce,
    InOrder,
}

struct Worker {
    shared: Arc<Shared>,
    crew: Arc<Crew<Lead, Read>>,
    mine: Mine,
}

/// What a worker has for itself, resident before it begins.
struct Mine {
    /// Has the lead while a READ is answered, until that needs the disk.
    pocket: Arc<Pocket<Lead>>,
    tools: Tools,
    reply: Vec<u8>,
}

impl Mine {
    /// For one worker of so many.
    fn new(crew: &Arc<Crew<Lead, Read>>, workers: usize) -> io::Result<Mine> {
        let pocket = Arc::new(Pocket::new());
        let may_wait = {
            let (pocket, crew) = (pocket.clone(), crew.clone());
            move || match pocket.take().map(|lead| crew.give(lead)) {
                None | Some(Ok(())) => true,
                Some(Err(lead)) => {
                    pocket.put(lead);
                    false
                }
            }
        };
        // Who is alone has nobody to leave anything to.
        let scratch = if workers > 1 { Scratch::with_hook(may_wait) } else { Scratch::new() };
        let scratch = scratch.map_err(io::Error::other)?;
        let tools = Tools { scratch, detached: Detached::with_capacity(DETACHED) };
        let mut reply = vec![0; MAX_READ];
        touch(&mut reply);
        Ok(Mine { pocket, tools, reply })
    }
}

impl Worker {
    fn serve(&mut self) {
        let mut lead = self.next_lead();
        let gone = loop {
            match self.step(lead) {
                Ok(next) => lead = next,
                Err(last) => break last,
            }
        };
        // Unmounted or aborted: there is nothing left to serve, as whoever leads next finds too.
        self.crew.resign(gone);
        self.shared.closer.close();
    }

    /// Answers READs that were left, until it is our turn to lead.
    fn next_lead(&mut self) -> Box<Lead> {
        loop {
            match self.crew.next() {
                Next::Lead(lead) => return lead,
                Next::Task(read) => {
                    let _always = self.answer(&read);
                }
            }
        }
    }

    /// Answers the next READ. If there is none, goes on with the oldest of the other requests; if there is none either,
    /// waits. Returns the lead, as an error if the device is gone.
    fn step(&mut self, mut lead: Box<Lead>) -> Result<Box<Lead>, Box<Lead>> {
        match self.take_in(&mut lead) {
            Ok(Some(read)) => return Ok(self.read(lead, read)),
            Ok(None) => {}
            Err(_) => return Err(lead),
        }
        let Some(oldest) = lead.inbox.oldest() else {
            lead.wait();
            return Ok(lead);
        };
        lead.at_once = 0;
        match self.handle(&mut lead, oldest) {
            Poll::Ready(()) => lead.inbox.pop(),
            Poll::Pending if lead.progress.is_to_wait() => lead.sleep(RETRY_MS),
            Poll::Pending => {}
        }
        Ok(lead)
    }

    /// Takes in requests until one is a READ, or there are no more, or the oldest has waited long enough.
    fn take_in(&mut self, lead: &mut Lead) -> io::Result<Option<Read>> {
        while lead.at_once < AT_ONCE || lead.inbox.oldest().is_none() {
            let Some(at) = lead.receive()? else { break };
            match lead.turn_of(at.clone()) {
                Turn::InOrder => {
                    lead.inbox.push(at);
                    continue;
                }
                Turn::Read(read) => {
                    lead.at_once += 1;
                    return Ok(Some(read));
                }
                Turn::AtOnce => {
                    lead.at_once += 1;
                    let _never_in_parts = self.handle(lead, at);
                }
            }
        }
        Ok(None)
    }

    /// Answers a READ, or leaves it to who comes back from the disk. Returns the lead: if it was given away meanwhile, when
    /// it is our turn again.
    fn read(&mut self, lead: Box<Lead>, mut read: Read) -> Box<Lead> {
        self.mine.pocket.put(lead);
        while !self.answer(&read) {
            match self.crew.leave(read) {
                Ok(()) => break,
                // Somebody has come back just now; or, with more outstanding than ever should be, somebody will.
                Err(back) => read = back,
            }
        }
        self.mine.pocket.take().unwrap_or_else(|| self.next_lead())
    }

    /// Answers a READ. False if it needs the disk, and nobody is there who could lead meanwhile.
    fn answer(&mut self, &Read { unique, offset, size }: &Read) -> bool {
        let _until_the_end = self.shared.gate().begin();
        let Mine { reply, tools, .. } = &mut self.mine;
        match swapfile::read(&self.shared.engine, offset, size, reply, tools) {
            Err(libc::EAGAIN) => false,
            payload => {
                let _ = reply::send(self.shared.device.as_fd(), unique, payload);
                true
            }
        }
    }

    /// Answers a request, or, pending, does a part of what it asks for.
    ///
    /// A reply that the kernel refuses is the matter of one request. Whether the device is gone, the next read tells.
    fn handle(&mut self, lead: &mut Lead, at: Range<usize>) -> Poll<()> {
        let gate = self.shared.gate();
        let _until_the_end = gate.begin();
        let request = match Request::parse(lead.inbox.bytes(at)) {
            Ok(request) => request,
            Err(Malformed { unique }) => {
                if let Some(unique) = unique {
                    let _ = reply::send(self.shared.device.as_fd(), unique, Err(libc::EIO));
                }
                return Poll::Ready(());
            }
        };
        if request.nodeid != swapfile::NODEID || !request.wants_reply() {
            let _ = self.shared.relay.forward(&request, self.shared.session());
            return Poll::Ready(());
        }
        let (unique, operation) = (request.unique, Operation::parse(&request));
        let (opens, releases) =
            (matches!(operation, Some(Operation::Open { .. })), operation == Some(Operation::Release));
        let engine = &self.shared.engine;
        let Mine { reply: out, tools, .. } = &mut self.mine;
        let payload = match operation {
            None => Poll::Ready(Err(libc::EINVAL)),
            Some(Operation::Open { .. }) if gate.is_closed() => Poll::Ready(Err(libc::ENODEV)),
            Some(Operation::Write { offset, data }) if (self.shared.stored..engine.size()).contains(&offset) => {
                Poll::Ready(Ok(swapfile::written(out, data.len())))
            }
            Some(other) => swapfile::answer(engine, other, out, tools, &mut lead.progress),
        };
        let answered = payload.map(|payload| {
            let opened = opens && payload.is_ok();
            // Before the reply: once the kernel has it, it does not send the request again to who goes on from here.
            if opened {
                gate.opened(unique);
            } else if releases {
                gate.released(unique);
            }
            let delivered = reply::send(self.shared.device.as_fd(), unique, payload).unwrap_or(false);
            if opened && !delivered {
                gate.take_back();
            }
        });
        // Behind the reply: nobody waits for this.
        if !self.mine.tools.detached.is_empty() {
            engine.store().free_detached(&mut self.mine.tools.detached);
        }
        answered
    }
}

/// Whether an error of read(2) says that the file system was unmounted, or its connection aborted.
fn is_gone(errno: i32) -> bool {
    matches!(errno, libc::ENODEV | libc::ECONNABORTED)
}

#[cfg(test)]
mod disk_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod turn_tests;
