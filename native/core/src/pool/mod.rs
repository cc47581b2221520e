//! The pool: compressed pages as objects of up to 4106 bytes, laid out by an allocator on pages of the arena.
//!
//! An object is known by its [`Location`] in the arena, which is what the slot word holds: there is no table of
//! handles. Which [`Allocator`] lays the objects out is chosen when the pool is made; here is what both have in common.
//! Objects are moved while others read and write: whoever touches an object's bytes has it pinned.

mod arena;
mod class;
mod compact;
mod driver;
mod guard;
pub(crate) mod lock;
mod page_map;
mod recover;
mod z3fold;
mod zsmalloc;
mod zspage;

use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::locks::{hold, Held, Rank};
use crate::metrics::SharedMetrics;
use crate::page::PAGE_SIZE;
use crate::state::{State, MAX_ARENA_PAGES};
use crate::sync::{AtomicBool, AtomicU32, Ordering::Relaxed};
use arena::{Arena, REGION_PAGES};
pub use arena::{Need, PIECE_BYTES};
pub use class::LENGTHS;
use class::{ClassTable, MAX_CHAIN, UNIT};
use compact::Left;
pub use driver::Commit;
use driver::{Base, Driver, Object};
use lock::ZspageLock;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};
use z3fold::Z3fold;
use zsmalloc::Zsmalloc;

/// Frees between two looks at whether there is something to compact.
const FREES: u32 = 1024;
/// Compaction by itself begins where it frees at least this share of the pool, and this much.
const WORTH_SHARE: u64 = 16;
const WORTH_PAGES: u64 = 256;

/// How a pool lays out its objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocator {
    /// In size classes: the least memory.
    Zsmalloc,
    /// Up to three a page.
    Z3fold,
}

impl Allocator {
    pub const ALL: [Allocator; 2] = [Allocator::Zsmalloc, Allocator::Z3fold];

    pub fn name(self) -> &'static str {
        match self {
            Allocator::Zsmalloc => "zsmalloc",
            Allocator::Z3fold => "z3fold",
        }
    }
}

impl FromStr for Allocator {
    type Err = Error;
    fn from_str(name: &str) -> Result<Allocator> {
        Allocator::ALL
            .into_iter()
            .find(|allocator| allocator.name() == name)
            .ok_or_else(|| Error::Invalid(format!("unknown allocator {name:?}: use zsmalloc or z3fold")))
    }
}

/// Where an object lies in the arena, in units of 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location(u64);

impl Location {
    pub fn from_units(units: u64) -> Location {
        Location(units)
    }

    pub fn units(self) -> u64 {
        self.0
    }

    /// In bytes from the arena's start; None beyond what can be counted.
    fn offset(self) -> Option<usize> {
        usize::try_from(self.0).ok()?.checked_mul(UNIT)
    }
}

/// A pool over the arena of a state file.
pub struct Pool {
    base: Arc<Base>,
    allocator: Box<dyn Driver>,
    /// Is woken when there may be something to compact.
    compactor: OnceLock<Thread>,
    compaction_asked: AtomicBool,
    /// Somebody has found no room since [`Pool::wants_compaction`] was last asked.
    was_full: AtomicBool,
    frees: AtomicU32,
}

/// An object whose bytes stay where they are while this lives: its zspage is locked, shared (rank `Zspage`).
pub struct Pinned<'a> {
    base: &'a Base,
    lock: &'a ZspageLock,
    object: Object,
    _held: Held,
}

impl Pinned<'_> {
    pub fn location(&self) -> Location {
        self.object.location()
    }

    /// The object's bytes, of which there may be more than it was made with.
    ///
    /// # Safety
    /// A slot that the caller has locked must have named the location after it was pinned: nobody frees it then.
    pub unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: by the caller's promise it stays live, as it is pinned it stays in its place, and objects are written
        // only before their location is known.
        unsafe { self.base.bytes(&self.object) }
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.lock.unlock_read();
    }
}

impl Pool {
    /// Arena pages that hold `slots` pages even if none can be compressed, up to the largest possible arena.
    pub fn arena_pages_for(slots: u64) -> u32 {
        // At worst a whole page and its header, which take two pages at most; and a zspage in each class that is not
        // full. Address space costs nothing, so this is generous.
        let partly_filled = (ClassTable::for_slots(slots).classes().len() * MAX_CHAIN) as u64;
        let pages = (slots * 2 + partly_filled).min(MAX_ARENA_PAGES);
        pages.next_multiple_of(u64::from(REGION_PAGES)) as u32
    }

    /// An empty pool. Errors: [`Error::System`] if its tables cannot be mapped.
    pub fn new(state: Arc<State>, allocator: Allocator, limit_bytes: u64, metrics: SharedMetrics) -> Result<Pool> {
        let arena = Arena::new(state.clone(), limit_bytes / PAGE_SIZE as u64, metrics.clone())?;
        let base = Arc::new(Base { state, arena, metrics, movers: Gate::new() });
        base.metrics.allocator.set(allocator as u64);
        let allocator: Box<dyn Driver> = match allocator {
            Allocator::Zsmalloc => Box::new(Zsmalloc::new(base.clone())?),
            Allocator::Z3fold => Box::new(Z3fold::new(base.clone())?),
        };
        Ok(Pool {
            base,
            allocator,
            compactor: OnceLock::new(),
            compaction_asked: AtomicBool::new(false),
            was_full: AtomicBool::new(false),
            frees: AtomicU32::new(0),
        })
    }

    /// Allocates an object of `length` bytes (header included) and lets `write` fill it; the object may be longer.
    ///
    /// It comes pinned, and has to stay so until a slot names it, or it is freed: nobody looks at it before, let alone
    /// moves it. Errors: [`Error::PoolFull`], or [`Error::NoRegion`] when the reserve is used up, with nothing changed.
    /// Waits for memory only in a pool without an adjuster.
    pub fn insert(&self, length: usize, write: impl FnOnce(&mut [u8])) -> Result<Pinned<'_>> {
        let object = self.take(length)?;
        let lock = self.allocator.lock(object.first);
        let pinned = Pinned { base: &self.base, lock, object, _held: hold(Rank::Zspage) };
        // SAFETY: the object lies inside the arena. It was free until now and its location is known to nobody else, so
        // that this is the only reference to these bytes.
        write(unsafe { &mut *self.base.fresh_bytes(&object) });
        Ok(pinned)
    }

    fn take(&self, length: usize) -> Result<Object> {
        loop {
            match self.allocator.take(length + guard::BYTES) {
                // Without a thread that keeps the reserve filled, we take memory ourselves, and wait for it.
                Err(Error::NoRegion)
                    if !self.base.arena.has_adjuster()
                        && self.base.arena.ensure_region(|pages| self.allocator.prepare(pages))? => {}
                result => return result,
            }
        }
    }

    /// Bytes that an object of `length` bytes would have, as [`Pinned::bytes`] counts them.
    pub fn size_for(&self, length: usize) -> usize {
        self.allocator.size_for(length + guard::BYTES) - guard::BYTES
    }

    /// Pins the object at a location, so that it is not moved. None if no object lives there (any more).
    ///
    /// Waits for who is moving objects of its zspage. Who has found the location in a slot word looks at the word again
    /// afterwards: until it was pinned, the object may have been moved away.
    pub fn pin(&self, location: Location) -> Option<Pinned<'_>> {
        let object = self.allocator.find(location)?;
        let held = hold(Rank::Zspage);
        let lock = self.allocator.lock(object.first);
        if !lock.try_read() {
            let start = Instant::now();
            lock.read();
            self.base.metrics.mover_waits.record_since(start);
        }
        let pinned = Pinned { base: &self.base, lock, object, _held: held };
        // Before the lock, the zspage may have been freed and another one made there: then we hold the wrong lock.
        (self.allocator.find(location) == Some(object)).then_some(pinned)
    }

    /// Lets `read` see the bytes of an object that no slot names (it may be longer than it was made). None if no object
    /// lives there.
    ///
    /// # Safety
    /// The object must be the caller's: it is not freed meanwhile, and is not moved, as no slot names it.
    pub unsafe fn with_object<R>(&self, location: Location, read: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let object = self.allocator.find(location)?;
        // SAFETY: by the caller's promise it stays, and objects are written only before their location is known.
        Some(read(unsafe { self.base.bytes(&object) }))
    }

    /// Frees an object. In a pool without an adjuster, memory may go back to the system (a system call).
    ///
    /// A location where no object lives (a damaged slot word) is left alone.
    pub fn free(&self, location: Location) {
        let Some(object) = self.allocator.find(location) else { return };
        // SAFETY: it is the caller's, who frees it.
        unsafe { guard::check(&self.base.state, &object) };
        self.allocator.free(&object);
        self.give_back();
        // Frees are what fragments a pool.
        if self.frees.fetch_add(1, Relaxed) % FREES == FREES - 1 {
            self.wake_compactor();
        }
    }

    /// Address of a live object's bytes, for tests that damage them.
    #[cfg(test)]
    pub fn address(&self, location: Location) -> Option<*mut u8> {
        let object = self.allocator.find(location)?;
        Some(self.base.state.bytes_mut(object.offset, object.size).cast())
    }

    /// Makes the calling thread the one that keeps the reserve of memory filled: from now on nobody else waits for
    /// memory. It calls [`Pool::adjust`] until that returns false, and again whenever it is unparked.
    pub fn become_adjuster(&self) {
        self.base.arena.set_adjuster(std::thread::current());
    }

    /// What the reserve of memory needs: [`Pool::adjust`] takes it.
    pub fn need(&self) -> Need {
        self.base.arena.need()
    }

    /// Takes some memory from the system ([`PIECE_BYTES`]), or gives some back, if the reserve needs it: see
    /// [`Arena::adjust`].
    pub fn adjust(&self) -> Result<bool> {
        self.base.arena.adjust(|pages| self.allocator.prepare(pages))
    }

    /// In a pool without an adjuster, gives the system back what the arena has too much.
    fn give_back(&self) {
        let arena = &self.base.arena;
        // A region that cannot be given back stays in reserve.
        while !arena.has_adjuster() && arena.has_too_much() && matches!(self.adjust(), Ok(true)) {}
    }

    /// Moves objects together: frees the zspages that the allocator can do without, then the regions that the arena can
    /// do without. What cannot be moved now stays, and costs no more than its own zspage or region. Returns how many
    /// pages it has freed.
    ///
    /// Takes locks for short steps only; page operations go on meanwhile. Allocates no memory, touches no disk. Ends
    /// early when the pool is being destroyed.
    pub fn compact(&self, commit: &Commit<'_>) -> u64 {
        // Given up last, when nothing is isolated, and all that was freed is back in the arena: see `Pool::destroy`.
        let Some(_pass) = self.base.movers.enter() else { return 0 };
        let pages = self.allocator.compact(commit);
        let mut left = Left::default();
        while let Some(region) = self.base.arena.isolate_sparsest(|first| left.contains(first)) {
            let first = region.start;
            self.allocator.evacuate(region, commit);
            if !self.base.arena.putback() && !left.add(first) {
                break;
            }
        }
        self.give_back();
        self.base.metrics.pages_compacted.add(pages);
        pages
    }

    /// Makes the calling thread the one that compacts: it is unparked when it is to look at [`Pool::wants_compaction`].
    pub fn become_compactor(&self) {
        let _only_the_first_counts = self.compactor.set(std::thread::current());
    }

    /// About how many bytes of what is in use [`Pool::compact`] would free.
    pub fn bytes_to_spare(&self) -> u64 {
        self.allocator.pages_to_spare() * PAGE_SIZE as u64
    }

    /// How many are moving objects.
    pub fn movers(&self) -> u32 {
        self.base.movers.inside()
    }

    /// Wakes the compactor to compact in any case.
    pub fn ask_for_compaction(&self) {
        self.compaction_asked.store(true, Relaxed);
        self.wake_compactor();
    }

    /// Wakes the compactor because an object has found no room: less is worth its while then.
    pub fn was_full(&self) {
        self.was_full.store(true, Relaxed);
        self.wake_compactor();
    }

    /// Whether somebody has asked for compaction since the last time, or it is worth its while.
    pub fn wants_compaction(&self) -> bool {
        let (in_zspages, in_regions) = (self.allocator.pages_to_spare(), self.base.arena.pages_to_spare());
        let used = self.base.metrics.pool_bytes.get() / PAGE_SIZE as u64;
        let would_give_room = self.was_full.swap(false, Relaxed) && in_zspages >= MAX_CHAIN as u64;
        self.compaction_asked.swap(false, Relaxed)
            || would_give_room
            || in_zspages + in_regions >= WORTH_PAGES.max(used / WORTH_SHARE)
    }

    fn wake_compactor(&self) {
        if let Some(thread) = self.compactor.get() {
            thread.unpark();
        }
    }

    /// Ends all moving of objects, and shows `leaked` each object that still lives (its size in the pool, its bytes).
    ///
    /// To be called when no page operation is in flight, and none will come. Waits, for `patience` at most, for those
    /// who are moving objects; they finish the step that they are at. No region is isolated by then, and what they have
    /// freed is back in the arena: a mover leaves the gate last. Returns how many were still there: the pool may not be dropped then.
    pub fn destroy(&self, patience: Duration, mut leaked: impl FnMut(usize, &[u8])) -> u32 {
        let (movers, awaited) = (&self.base.movers, &self.base.metrics.movers_awaited);
        movers.close();
        awaited.set(u64::from(movers.inside()));
        let inside = movers.wait(patience);
        awaited.set(u64::from(inside));
        if inside > 0 {
            return inside;
        }
        for page in 0..self.base.arena.touched_pages() {
            self.allocator.visit(page, &mut |object| {
                // SAFETY: inside the arena; by the caller's promise and ours nobody writes or frees it any more.
                leaked(object.size, unsafe { self.base.bytes(object) });
            });
        }
        0
    }

    pub fn limit_bytes(&self) -> u64 {
        self.base.arena.limit() * PAGE_SIZE as u64
    }

    /// Changes the limit, rounded down to pages. Below what is in use, inserts fail until enough is freed.
    pub fn set_limit_bytes(&self, bytes: u64) {
        self.base.arena.set_limit(bytes / PAGE_SIZE as u64);
    }

    /// Bytes of descriptors for the pages that were ever in use, and of the locks.
    pub fn metadata_bytes(&self) -> u64 {
        self.allocator.metadata_bytes(self.base.metrics.pool_peak_bytes.get() / PAGE_SIZE as u64)
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests;
