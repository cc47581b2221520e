//! When pages leave the pool by themselves: near its limit, or when a store has found no room.
//!
//! With hysteresis: shrinking begins shortly before the limit, so that stores need not wait, and ends at the accept
//! threshold (as zswap's does), a share of the limit. What counts is what the pool takes, in pages of the arena. But
//! the coldest objects lie scattered, and to free some empties few zspages: what compaction would free counts as freed,
//! and when that is enough the shrinker compacts.
//!
//! **Nobody waits for ever.** A store that finds no room is told to come again only while [`Store::can_make_room`]: the
//! disk has room, or the cleaner can make some, and there is a page that may go; or one is on its way. Each such page that
//! a shrinker comes across leaves the list, or goes to the disk; so a store finds room in the end, or an empty list, or a
//! disk that is full or has failed, and gets its ENOSPC.

use super::disk::Writeback;
use super::writeback::{Job, Shrinker, What};
use super::Store;
use crate::backing::SEGMENT_BYTES;
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::sync::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::OnceLock;
use std::thread::Thread;

/// So often a store that finds no region is only told to come again, before pages are evicted for it: some milliseconds,
/// in which the refill thread adds one, if the system has memory.
const REGION_RETRIES: u32 = 20;
/// Until somebody sets another one.
pub const ACCEPT_THRESHOLD_PERCENT: u32 = 90;

/// Threads that are unparked together; of more than so many, not all.
#[derive(Default)]
pub struct Wakers([OnceLock<Thread>; 8]);

impl Wakers {
    /// Adds the calling thread, once and for all.
    fn add(&self) {
        let mut thread = Some(std::thread::current());
        for place in &self.0 {
            if let Some(this) = thread.take() {
                thread = place.set(this).err();
            }
        }
    }

    pub fn wake(&self) {
        self.0.iter().filter_map(OnceLock::get).for_each(Thread::unpark);
    }
}

pub struct Pressure {
    accept_threshold_percent: AtomicU32,
    /// The pool was nearly full, and is not below its accept threshold yet.
    shrinking: AtomicBool,
    /// A store has found no room since a shrinker last looked.
    starved: AtomicBool,
    /// How often stores have found no region since one found room. Orders nothing, and is none of `sync`'s for that.
    region_retries: std::sync::atomic::AtomicU32,
    /// Shrinkers that are about to take a segment, or have taken one: until the room of all its pages is free.
    pub writing: AtomicU32,
    pub shrinkers: Wakers,
    pub cleaners: Wakers,
}

/// Bytes of the pool, in use and where something happens.
struct Marks {
    used: u64,
    /// Above this shrinking begins.
    start: u64,
    /// At or below this it ends.
    target: u64,
}

impl Pressure {
    pub fn new(accept_threshold_percent: u32) -> Pressure {
        Pressure {
            accept_threshold_percent: AtomicU32::new(accept_threshold_percent),
            shrinking: AtomicBool::new(false),
            starved: AtomicBool::new(false),
            region_retries: Default::default(),
            writing: AtomicU32::new(0),
            shrinkers: Wakers::default(),
            cleaners: Wakers::default(),
        }
    }

    fn marks(&self, metrics: &Metrics) -> Marks {
        let (used, limit) = (metrics.pool_bytes.get(), metrics.pool_limit_bytes.get());
        let percent = u64::from(self.accept_threshold_percent.load(Relaxed));
        let target = limit / 100 * percent + limit % 100 * percent / 100;
        Marks { used, start: limit - (limit - target) / 4, target }
    }
}

impl Store {
    /// Makes the calling thread one of those that shrink the pool: it calls [`Store::shrink`] until that returns false
    /// or fails, then parks until it is unparked, and again.
    pub fn become_shrinker(&self) {
        if let Some(writeback) = &self.writeback {
            writeback.pressure.shrinkers.add();
        }
    }

    /// Sets the share of its limit at which the pool stops shrinking, 100 percent at most.
    pub fn set_accept_threshold(&self, percent: u32) {
        if let Some(writeback) = &self.writeback {
            writeback.pressure.accept_threshold_percent.store(percent.min(100), Relaxed);
            self.settings()
                .accept_threshold_percent
                .store(percent.min(100).into(), std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// Wakes the shrinkers to bring the pool below its accept threshold in any case: after the limit was lowered, for
    /// one.
    pub fn ask_for_shrinking(&self) {
        if let Some(Writeback { pressure, .. }) = &self.writeback {
            pressure.shrinking.store(true, Relaxed);
            pressure.shrinkers.wake();
        }
    }

    /// Whether [`Store::shrink`] has something to do: the pool has come near its limit and is not at its accept
    /// threshold yet, or a store has found no room.
    pub fn wants_shrinking(&self) -> bool {
        self.writeback.as_ref().is_some_and(|Writeback { pressure, .. }| {
            let marks = pressure.marks(&self.metrics);
            pressure.starved.load(Relaxed) || marks.used > marks.target && pressure.shrinking.load(Relaxed)
        })
    }

    /// One step of shrinking: compacts, if that is enough, or writes one segment of the coldest pages. Returns whether
    /// there may be more to do.
    ///
    /// Waits for the disk. Allocates nothing. Errors: as [`Store::write_back`]; on [`crate::error::Error::BackingFull`]
    /// the cleaner has been woken, and wakes the shrinkers when it has made room.
    pub fn shrink(&self, shrinker: &mut Shrinker) -> Result<bool> {
        let Some(Writeback { pressure, .. }) = &self.writeback else { return Ok(false) };
        if !self.wants_shrinking() {
            pressure.shrinking.store(false, Relaxed);
            return Ok(false);
        }
        // What finds no room from here on says so again.
        let starved = pressure.starved.swap(false, Relaxed);
        let Marks { used, target, .. } = pressure.marks(&self.metrics);
        let (too_much, to_spare) = (used.saturating_sub(target), self.pool.bytes_to_spare());
        // Who waits for room needs some at once, not all that is to be freed in the end.
        let enough = if starved { 1 } else { too_much.max(1) };
        if to_spare >= enough && self.compact() > 0 {
            return Ok(true);
        }
        // Whole segments, but where that would be much of a tiny pool.
        let least = (SEGMENT_BYTES as u64).min(self.metrics.pool_limit_bytes.get() / 16).max(1);
        let mut job = Job::new(What::Coldest { bytes: too_much.saturating_sub(to_spare).max(least) });
        let result = self.write_back(shrinker, &mut job);
        if result.is_err() || job.bytes == 0 {
            // Nothing may go, or nothing can now: the next store that comes near the limit asks for it again.
            pressure.shrinking.store(false, Relaxed);
        }
        result.map(|_| job.bytes > 0)
    }

    /// Whether a store that has found no room may wait for the shrinkers: they have something to write back and a place
    /// for it, or something is on its way. False for ever once writeback was stopped.
    pub fn can_make_room(&self) -> bool {
        self.writeback.as_ref().is_some_and(|Writeback { backing, lru, pressure, writebacks, .. }| {
            // In this order: who has taken the last segment, or the last page off the list, is counted by then, and as long
            // as what he has taken is not freed.
            let room = backing.has_room() && !lru.is_empty() || pressure.writing.load(Relaxed) > 0;
            room && !writebacks.is_closed()
        })
    }

    /// For a store that has found no room, for this reason: whether it is to be tried again. Then the shrinkers have been
    /// woken; but for lack of a region, which the refill thread may be about to add, only after some tries.
    pub(super) fn waits_for_room(&self, why: &Error) -> bool {
        let Some(Writeback { pressure, .. }) = &self.writeback else { return false };
        if !self.can_make_room() {
            return false;
        }
        if matches!(why, Error::NoRegion) && pressure.region_retries.fetch_add(1, Relaxed) < REGION_RETRIES {
            return true;
        }
        pressure.starved.store(true, Relaxed);
        pressure.shrinkers.wake();
        true
    }

    /// After a store that has found room: wakes the shrinkers if the pool has come near its limit.
    pub(super) fn look_at_pressure(&self) {
        let Some(Writeback { pressure, .. }) = &self.writeback else { return };
        pressure.region_retries.store(0, Relaxed);
        let marks = pressure.marks(&self.metrics);
        if marks.used > marks.start && !pressure.shrinking.load(Relaxed) {
            self.ask_for_shrinking();
        }
    }

    pub(super) fn is_below_accept_threshold(&self) -> bool {
        self.writeback.as_ref().is_some_and(|Writeback { pressure, .. }| {
            let marks = pressure.marks(&self.metrics);
            marks.used < marks.target
        })
    }
}

impl Store {
    /// Makes the calling thread the one that cleans: it calls [`Store::clean`] while [`Store::wants_cleaning`], then
    /// parks until it is unparked, and again.
    pub fn become_cleaner(&self) {
        if let Some(writeback) = &self.writeback {
            writeback.pressure.cleaners.add();
        }
    }

    /// Whether there is a segment that is worth cleaning.
    pub fn wants_cleaning(&self) -> bool {
        self.writeback.as_ref().is_some_and(|writeback| writeback.backing.wants_cleaning())
    }
}
