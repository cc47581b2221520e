//! The threads that write to the backing disk: shrinkers, which evict pages when the pool is full; the sweeper, which
//! evicts those that somebody asks for; and the cleaner.
//!
//! Once started they allocate nothing: what they need is made, and resident, before.

use crate::process::{spawn as spawn_thread, Start};
use crate::{args, no_alloc, Shared};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use zswapd_core::error::Error;
use zswapd_core::store::{Cleaner, Job, Shrinker, What};

/// How long the sweeper waits for the cleaner before it looks again.
const PAUSE: Duration = Duration::from_millis(10);
/// How long a disk that has failed, or segments of it, are left alone before they are tried again.
const RETRY: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

/// How a sweep has ended.
#[derive(Debug)]
pub struct Swept {
    /// What was done.
    pub job: Job,
    pub end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All that was to go has gone, unless it was used meanwhile.
    Done,
    /// Paging ends.
    Stopped,
    /// The disk is full, or as much was written as the budget allows.
    Full,
    Budget,
    /// The disk cannot be written.
    Failed,
}

struct Order {
    what: What,
    reply: Sender<Swept>,
}

/// Orders for the sweeper.
pub struct Sweeper {
    orders: Sender<Order>,
    busy: AtomicBool,
}

/// Where the sweeper finds them.
pub struct Orders(Receiver<Order>);

impl Sweeper {
    pub fn new() -> (Sweeper, Orders) {
        let (orders, received) = mpsc::channel();
        (Sweeper { orders, busy: AtomicBool::new(false) }, Orders(received))
    }

    /// Has pages written back. What becomes of it is received when it is done. None while another sweep is under way.
    pub fn sweep(&self, what: What) -> Option<Receiver<Swept>> {
        if self.busy.swap(true, SeqCst) {
            return None;
        }
        let (reply, swept) = mpsc::channel();
        // Without a sweeper the reply is dropped here, as the receiver finds.
        let _ = self.orders.send(Order { what, reply });
        Some(swept)
    }
}

/// Makes the threads of a backing disk. Errors: there is no memory, or a thread cannot be started.
pub fn spawn(start: &Arc<Start>, orders: Orders, args: &args::Backing) -> io::Result<()> {
    for n in 0..args.shrinkers {
        let mut shrinker = Shrinker::new().map_err(io::Error::other)?;
        let work = move |shared: Arc<Shared>| no_alloc::forbidden(|| shrink(&shared, &mut shrinker));
        spawn_thread(&format!("shrinker-{n}"), start, work)?;
    }
    let mut shrinker = Shrinker::new().map_err(io::Error::other)?;
    spawn_thread("sweeper", start, move |shared| sweep_all(&shared, &mut shrinker, &orders))?;
    let mut cleaner = Cleaner::new().map_err(io::Error::other)?;
    spawn_thread("cleaner", start, move |shared| no_alloc::forbidden(|| clean(&shared, &mut cleaner)))
}

/// Keeps the pool below its limit, for ever.
fn shrink(shared: &Shared, shrinker: &mut Shrinker) {
    let store = shared.engine.store();
    store.become_shrinker();
    loop {
        // After an error too: who still needs room wakes us again, as the cleaner does when it has made some on the disk.
        if !noted(shared, store.shrink(shrinker)).unwrap_or(false) {
            thread::park();
        }
    }
}

/// Cleans the disk when it is worth it, and tries again from time to time what has failed, for ever.
fn clean(shared: &Shared, cleaner: &mut Cleaner) {
    let store = shared.engine.store();
    store.become_cleaner();
    let mut retry = Instant::now() + RETRY;
    loop {
        if Instant::now() >= retry {
            let _noted = noted(shared, store.try_disk_again(cleaner));
            retry = Instant::now() + RETRY;
        }
        if !(store.wants_cleaning() && noted(shared, store.clean(cleaner)).unwrap_or(false)) {
            thread::park_timeout(retry.saturating_duration_since(Instant::now()));
        }
    }
}

/// Does what it is told, one thing after the other, until nobody can tell it anything.
fn sweep_all(shared: &Shared, shrinker: &mut Shrinker, orders: &Orders) {
    while let Ok(Order { what, reply }) = orders.0.recv() {
        let mut job = Job::new(what);
        let end = no_alloc::forbidden(|| sweep(shared, shrinker, &mut job));
        shared.sweeper.busy.store(false, SeqCst);
        // Who has asked may be gone.
        let _ = reply.send(Swept { job, end });
    }
}

fn sweep(shared: &Shared, shrinker: &mut Shrinker, job: &mut Job) -> End {
    let store = shared.engine.store();
    loop {
        if shared.gate().is_closed() {
            return End::Stopped;
        }
        match noted(shared, store.write_back(shrinker, job)) {
            Ok(true) => {}
            Ok(false) => return End::Done,
            // The cleaner is making some.
            Err(Error::BackingFull) if store.backing().is_some_and(|backing| backing.has_room()) => {
                thread::sleep(PAUSE)
            }
            Err(Error::BackingFull) => return End::Full,
            Err(Error::BudgetUsedUp) => return End::Budget,
            Err(_) => return End::Failed,
        }
    }
}

/// The result; an error of the disk goes to the log, which these threads do not wait for.
fn noted(shared: &Shared, result: Result<bool, Error>) -> Result<bool, Error> {
    if let Err(Error::DiskWrite(error)) = &result {
        shared.disk_trouble.note(error.raw_os_error().unwrap_or(libc::EIO));
    }
    result
}
