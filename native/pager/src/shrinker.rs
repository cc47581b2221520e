//! The threads that write to the backing disk: shrinkers, which evict pages when the pool is full; the sweeper, which
//! evicts those that somebody asks for, and tries the disk when somebody does; and the cleaner.
//!
//! Once started they allocate nothing: what they need is made, and resident, before.

use crate::process::{spawn as spawn_thread, Start};
use crate::{args, no_alloc, Shared};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use zswapd_core::backing::ReadBuffer;
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

type Answer<T> = Sender<Result<T, Error>>;

/// The last two are quick, and come between two steps of the first.
enum Order {
    Sweep(What, Answer<Swept>),
    Sample(u64, Answer<u64>),
    Resume(Answer<()>),
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
    pub fn sweep(&self, what: What) -> Option<Receiver<Result<Swept, Error>>> {
        (!self.busy.swap(true, SeqCst)).then(|| self.order(|answer| Order::Sweep(what, answer)))
    }

    /// Has so many pages on the disk read, as [`Store::sample_disk`] does.
    pub fn sample(&self, most: u64) -> Receiver<Result<u64, Error>> {
        self.order(|answer| Order::Sample(most, answer))
    }

    /// Has a disk that has failed tried, as [`Store::resume_writeback`] does.
    pub fn resume(&self) -> Receiver<Result<(), Error>> {
        self.order(Order::Resume)
    }

    fn order<T>(&self, order: impl FnOnce(Answer<T>) -> Order) -> Receiver<Result<T, Error>> {
        let (answer, received) = mpsc::channel();
        // Without a sweeper the answer is dropped here, as the receiver finds.
        let _ = self.orders.send(order(answer));
        received
    }
}

/// Makes the threads of a backing disk. Errors: there is no memory, or a thread cannot be started.
pub fn spawn(start: &Arc<Start>, orders: Orders, args: &args::Backing) -> io::Result<()> {
    for n in 0..args.shrinkers {
        let mut shrinker = Shrinker::new().map_err(io::Error::other)?;
        let work = move |shared: Arc<Shared>| no_alloc::forbidden(|| shrink(&shared, &mut shrinker));
        spawn_thread(&format!("shrinker-{n}"), start, work)?;
    }
    let mut tools = SweeperTools {
        shrinker: Shrinker::with_clusters().map_err(io::Error::other)?,
        buffer: ReadBuffer::new().map_err(io::Error::other)?,
    };
    spawn_thread("sweeper", start, move |shared| sweep_all(&shared, &mut tools, &orders))?;
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

/// What the sweeper has, resident before it begins.
struct SweeperTools {
    shrinker: Shrinker,
    buffer: ReadBuffer,
}

/// Does what it is told until nobody can tell it anything.
fn sweep_all(shared: &Shared, tools: &mut SweeperTools, orders: &Orders) {
    // Nobody orders another one before it is done.
    let mut sweep: Option<(Job, Answer<Swept>)> = None;
    loop {
        let order = match sweep {
            None => orders.0.recv().map_err(TryRecvError::from),
            Some(_) => orders.0.try_recv(),
        };
        // Who has asked may be gone.
        match order {
            Ok(Order::Sweep(what, answer)) => sweep = Some((Job::new(what), answer)),
            Ok(Order::Sample(most, answer)) => drop(answer.send(sample(shared, &mut tools.buffer, most))),
            Ok(Order::Resume(answer)) => {
                let resumed = no_alloc::forbidden(|| shared.engine.store().resume_writeback(&mut tools.shrinker));
                drop(answer.send(noted(shared, resumed)));
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return,
        }
        let end = sweep.as_mut().and_then(|(job, _)| no_alloc::forbidden(|| step(shared, &mut tools.shrinker, job)));
        if let (Some(end), Some((job, answer))) = (end, sweep.take_if(|_| end.is_some())) {
            shared.sweeper.busy.store(false, SeqCst);
            drop(answer.send(Ok(Swept { job, end })));
        }
    }
}

fn sample(shared: &Shared, buffer: &mut ReadBuffer, most: u64) -> Result<u64, Error> {
    // Others than the last time.
    let start = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| u64::from(time.subsec_nanos()));
    no_alloc::forbidden(|| shared.engine.store().sample_disk(buffer, most, start))
}

/// One step of a sweep. Returns how it has ended, if it has.
fn step(shared: &Shared, shrinker: &mut Shrinker, job: &mut Job) -> Option<End> {
    let store = shared.engine.store();
    if shared.gate().is_closed() {
        return Some(End::Stopped);
    }
    match noted(shared, store.write_back(shrinker, job)) {
        Ok(true) => None,
        Ok(false) => Some(End::Done),
        // The cleaner is making some.
        Err(Error::BackingFull) if store.backing().is_some_and(|backing| backing.has_room()) => {
            thread::sleep(PAUSE);
            None
        }
        Err(Error::BackingFull) => Some(End::Full),
        Err(Error::BudgetUsedUp) => Some(End::Budget),
        Err(_) => Some(End::Failed),
    }
}

/// The result; an error of the disk goes to the log, which these threads do not wait for.
fn noted<T>(shared: &Shared, result: Result<T, Error>) -> Result<T, Error> {
    if let Err(Error::DiskWrite(error)) = &result {
        shared.disk_trouble.note(error.raw_os_error().unwrap_or(libc::EIO));
    }
    result
}
