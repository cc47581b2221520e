//! The pool: objects of 64 to 4112 bytes in size classes, after the kernel's zsmalloc.
//!
//! An object is known by its [`Location`] in the arena, which is what the slot word holds: there is no table of
//! handles. Allocation takes the lock of the class, and that of the arena when the class has to grow. Objects are moved
//! while others read and write ([`compact`]): whoever touches an object's bytes has it pinned.

mod arena;
mod class;
mod compact;
pub(crate) mod lock;
mod zspage;

use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::locks::{hold, Held, Rank, Ranked};
use crate::metrics::SharedMetrics;
use crate::page::PAGE_SIZE;
use crate::state::{State, MAX_ARENA_PAGES};
use crate::sync::{AtomicBool, AtomicU32};
use arena::Arena;
use arena::REGION_PAGES;
use class::{ClassTable, Geometry, MAX_CHAIN, UNIT};
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};
use zspage::{ClassLists, Descriptors, PageDesc};

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

    /// In bytes from the arena's start.
    fn offset(self) -> usize {
        self.0 as usize * UNIT
    }
}

/// A zsmalloc pool over the arena of a state file.
pub struct Pool {
    state: Arc<State>,
    arena: Arena,
    table: &'static ClassTable,
    classes: Box<[Ranked<ClassLists>]>,
    descriptors: Descriptors,
    metrics: SharedMetrics,
    /// Who moves objects is inside; closed by [`Pool::destroy`].
    movers: Gate,
    /// Is woken when there may be something to compact.
    compactor: OnceLock<Thread>,
    compaction_asked: AtomicBool,
    frees: AtomicU32,
}

/// An object whose bytes stay where they are while this lives: its zspage is locked, shared (rank `Zspage`).
pub struct Pinned<'a> {
    pool: &'a Pool,
    location: Location,
    first: u32,
    size: usize,
    _held: Held,
}

impl Pinned<'_> {
    pub fn location(&self) -> Location {
        self.location
    }

    /// The object's bytes, up to the size of its class.
    ///
    /// # Safety
    /// A slot that the caller has locked must have named the location after it was pinned: nobody frees it then.
    pub unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: a live object lies inside the arena; by the caller's promise it stays live, as it is pinned it stays
        // in its place, and objects are written only before their location is known.
        unsafe { &*self.pool.state.bytes(self.location.offset(), self.size) }
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.pool.descriptors[self.first as usize].lock.unlock_read();
    }
}

/// A live object, found through its location.
#[derive(PartialEq)]
struct Found {
    class: usize,
    first: u32,
    object: usize,
    offset: usize,
}

impl Pool {
    /// Arena pages that hold `slots` pages even if none can be compressed, up to the largest possible arena.
    pub fn arena_pages_for(slots: u64) -> u32 {
        // At worst a whole page and its header, which take less than two pages; and a zspage in each class that is
        // not full. Address space costs nothing, so this is generous.
        let partly_filled = (ClassTable::get().classes().len() * MAX_CHAIN) as u64;
        let pages = (slots * 2 + partly_filled).min(MAX_ARENA_PAGES);
        pages.next_multiple_of(u64::from(REGION_PAGES)) as u32
    }

    /// An empty pool. Errors: [`Error::System`] if its tables cannot be mapped.
    pub fn new(state: Arc<State>, limit_bytes: u64, metrics: SharedMetrics) -> Result<Pool> {
        let table = ClassTable::get();
        for (class, counters) in table.classes().iter().zip(&metrics.classes) {
            counters.size_bytes.set(class.size as u64);
            counters.pages_per_zspage.set(class.pages as u64);
            counters.objects_per_zspage.set(class.objects as u64);
        }
        Ok(Pool {
            arena: Arena::new(state.clone(), limit_bytes / PAGE_SIZE as u64, metrics.clone())?,
            classes: table.classes().iter().map(|_| Ranked::new(Rank::Class, ClassLists::new())).collect(),
            descriptors: Descriptors::new(state.arena_pages() as usize)?,
            table,
            state,
            metrics,
            movers: Gate::new(),
            compactor: OnceLock::new(),
            compaction_asked: AtomicBool::new(false),
            frees: AtomicU32::new(0),
        })
    }

    /// Allocates an object of `length` bytes (header included) and lets `write` fill it; the object may be longer.
    ///
    /// It comes pinned, and has to stay so until a slot names it, or it is freed: nobody looks at it before, let alone
    /// moves it. Errors: [`Error::PoolFull`], or [`Error::NoRegion`] when the reserve is used up, with nothing changed.
    /// Waits for memory only in a pool without an adjuster.
    pub fn insert(&self, length: usize, write: impl FnOnce(&mut [u8])) -> Result<Pinned<'_>> {
        let class = self.table.index_for(length);
        let geometry = &self.table.classes()[class];
        let (first, object) = self.take_object(class, geometry)?;
        let location = location_of(first, object, geometry);
        let pinned = Pinned { pool: self, location, first, size: geometry.size, _held: hold(Rank::Zspage) };
        // SAFETY: the object lies inside its zspage, which lies inside the arena. It was free until now and its
        // location is known to nobody else, so that this is the only reference to these bytes.
        write(unsafe { &mut *self.state.bytes_mut(location.offset(), geometry.size) });
        Ok(pinned)
    }

    /// Pins the object at a location, so that it is not moved. None if no object lives there (any more).
    ///
    /// Waits for who is moving objects of its zspage. Who has found the location in a slot word looks at the word again
    /// afterwards: until it was pinned, the object may have been moved away.
    pub fn pin(&self, location: Location) -> Option<Pinned<'_>> {
        let found = self.find(location)?;
        let held = hold(Rank::Zspage);
        let lock = &self.descriptors[found.first as usize].lock;
        if !lock.try_read() {
            let start = Instant::now();
            lock.read();
            self.metrics.mover_waits.record_since(start);
        }
        let size = self.table.classes()[found.class].size;
        let pinned = Pinned { pool: self, location, first: found.first, size, _held: held };
        // Before the lock, the zspage may have been freed and another one made there: then we hold the wrong lock.
        (self.find(location) == Some(found)).then_some(pinned)
    }

    fn take_object(&self, class: usize, geometry: &Geometry) -> Result<(u32, usize)> {
        loop {
            match self.try_take_object(class, geometry) {
                // Without a thread that keeps the reserve filled, we take memory ourselves, and wait for it.
                Err(Error::NoRegion)
                    if !self.arena.has_adjuster() && self.arena.ensure_region(|pages| self.prepare(pages))? => {}
                result => return result,
            }
        }
    }

    fn try_take_object(&self, class: usize, geometry: &Geometry) -> Result<(u32, usize)> {
        let counters = &self.metrics.classes[class];
        let mut lists = self.classes[class].lock();
        let taken = match lists.take_object(&self.descriptors, geometry, |_| false) {
            Some(taken) => taken,
            None => {
                let first = self.arena.alloc(geometry.pages)?;
                self.grow(&mut lists, class, first).ok_or(Error::PoolFull)?
            }
        };
        counters.objects.add(1);
        // Pinned before anyone can see the object. There is no mover to wait for: it would hold the lock of the class.
        self.descriptors[taken.0 as usize].lock.read();
        Ok(taken)
    }

    /// Makes a zspage of pages from the arena, and takes an object of it. It has one, or it would not be a class.
    fn grow(&self, lists: &mut ClassLists, class: usize, first: u32) -> Option<(u32, usize)> {
        let geometry = &self.table.classes()[class];
        lists.insert_zspage(&self.descriptors, first, class, geometry);
        self.metrics.classes[class].zspages.add(1);
        lists.take_object(&self.descriptors, geometry, |zspage| zspage != first)
    }

    /// Lets `read` see the bytes of an object that no slot names (up to the size of its class). None if no object lives
    /// there.
    ///
    /// # Safety
    /// The object must be the caller's: it is not freed meanwhile, and is not moved, as no slot names it.
    pub unsafe fn with_object<R>(&self, location: Location, read: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let found = self.find(location)?;
        let size = self.table.classes()[found.class].size;
        // SAFETY: a live object lies inside the arena; by the caller's promise it stays, and objects are written only
        // before their location is known.
        Some(read(unsafe { &*self.state.bytes(found.offset, size) }))
    }

    /// Frees an object. In a pool without an adjuster, memory may go back to the system (a system call).
    ///
    /// A location where no object lives (a damaged slot word) is left alone.
    pub fn free(&self, location: Location) {
        let Some(found) = self.find(location) else { return };
        let geometry = &self.table.classes()[found.class];
        let mut lists = self.classes[found.class].lock();
        let empty = self.put(&mut lists, found.class, found.first, found.object);
        self.metrics.classes[found.class].objects.sub(1);
        drop(lists);
        if empty {
            self.free_pages(found.first, geometry.pages);
        }
        self.wake_compactor_now_and_then();
    }

    /// Takes an object out of its zspage. Returns true if the zspage is no more: its pages are then the caller's.
    fn put(&self, lists: &mut ClassLists, class: usize, first: u32, object: usize) -> bool {
        let empty = lists.put_object(&self.descriptors, &self.table.classes()[class], first, object);
        self.metrics.classes[class].zspages.sub(u64::from(empty));
        empty
    }

    /// Gives the pages of a zspage that is no more back to the arena.
    fn free_pages(&self, first: u32, pages: usize) {
        if self.arena.free(first, pages) && !self.arena.has_adjuster() {
            // A region that cannot be given back stays in reserve.
            let _ = self.adjust();
        }
    }

    fn find(&self, location: Location) -> Option<Found> {
        let offset = usize::try_from(location.0).ok()?.checked_mul(UNIT)?;
        let page = u32::try_from(offset / PAGE_SIZE).ok()?;
        let (first, class) = zspage::zspage_of(&self.descriptors, page)?;
        let geometry = self.table.classes().get(class)?;
        let within = offset - first as usize * PAGE_SIZE;
        let object = within / geometry.size;
        let exists = within % geometry.size == 0
            && object < geometry.objects
            && zspage::is_used(&self.descriptors, first, object);
        exists.then_some(Found { class, first, object, offset })
    }

    /// Address of a live object's bytes, for tests that damage them.
    #[cfg(test)]
    pub fn address(&self, location: Location) -> Option<*mut u8> {
        Some(self.state.bytes_mut(self.find(location)?.offset, UNIT).cast())
    }

    /// Makes the calling thread the one that keeps the reserve of memory filled: from now on nobody else waits for
    /// memory. It calls [`Pool::adjust`] until that returns false, and again whenever it is unparked.
    pub fn become_adjuster(&self) {
        self.arena.set_adjuster(std::thread::current());
    }

    /// Takes a region of memory from the system, or gives one back, if the reserve needs it: see [`Arena::adjust`].
    pub fn adjust(&self) -> Result<bool> {
        self.arena.adjust(|pages| self.prepare(pages))
    }

    /// Takes memory for the descriptors of pages, so that using them faults no more.
    fn prepare(&self, pages: Range<u32>) -> Result<()> {
        self.descriptors.populate(pages.start as usize..pages.end as usize)
    }

    /// Ends all moving of objects, and shows `leaked` each object that still lives (the size of its class, its bytes).
    ///
    /// To be called when no page operation is in flight, and none will come. Waits, for `patience` at most, for those
    /// who are moving objects; they finish the step that they are at. What their step has freed is back in the arena by
    /// then: a mover leaves the gate last. Returns how many were still there: the pool may not be dropped then.
    pub fn destroy(&self, patience: Duration, mut leaked: impl FnMut(usize, &[u8])) -> u32 {
        self.movers.close();
        let inside = self.movers.wait(patience);
        if inside > 0 {
            return inside;
        }
        for page in 0..self.arena.touched_pages() {
            let Some((first, class)) = zspage::zspage_of(&self.descriptors, page).filter(|&(first, _)| first == page)
            else {
                continue;
            };
            let geometry = &self.table.classes()[class];
            for object in zspage::objects_in_use(&self.descriptors, first, geometry.pages) {
                let offset = location_of(first, object, geometry).offset();
                // SAFETY: inside the arena; by the caller's promise and ours nobody writes or frees it any more.
                leaked(geometry.size, unsafe { &*self.state.bytes(offset, geometry.size) });
            }
        }
        0
    }

    pub fn limit_bytes(&self) -> u64 {
        self.arena.limit() * PAGE_SIZE as u64
    }

    /// Changes the limit, rounded down to pages. Below what is in use, inserts fail until enough is freed.
    pub fn set_limit_bytes(&self, bytes: u64) {
        self.arena.set_limit(bytes / PAGE_SIZE as u64);
    }

    /// Bytes of descriptors for the pages that were ever in use, and of the locks.
    pub fn metadata_bytes(&self) -> u64 {
        let pages = self.metrics.pool_peak_bytes.get() / PAGE_SIZE as u64;
        pages * size_of::<PageDesc>() as u64 + (self.classes.len() * size_of::<Ranked<ClassLists>>()) as u64
    }
}

fn location_of(first: u32, object: usize, geometry: &Geometry) -> Location {
    Location(((first as usize * PAGE_SIZE + object * geometry.size) / UNIT) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::class::MAX_SIZE;
    use proptest::prelude::*;

    fn pool(limit_pages: u64) -> Pool {
        let state = State::create(1, REGION_PAGES * 4, None).expect("state");
        let metrics = SharedMetrics::new(None).expect("metrics");
        Pool::new(Arc::new(state), limit_pages * PAGE_SIZE as u64, metrics).expect("pool")
    }

    fn used_pages(pool: &Pool) -> u64 {
        pool.metrics.pool_bytes.get() / PAGE_SIZE as u64
    }

    proptest! {
        /// Against a list of what every object was filled with: nothing overlaps, counts and pages are exact.
        #[test]
        fn objects_keep_their_bytes(
            steps in prop::collection::vec((0u8..3, 1..=MAX_SIZE, any::<prop::sample::Index>()), 1..800), limit in 50u64..1500,
        ) {
            let pool = pool(limit);
            let mut live: Vec<(Location, usize, u8)> = Vec::new();
            for (n, (step, length, which)) in steps.into_iter().enumerate() {
                let stamp = n as u8;
                if step > 0 {
                    match pool.insert(length, |object| object.fill(stamp)) {
                        Ok(object) => live.push((object.location(), length, stamp)),
                        Err(error) => {
                            prop_assert!(matches!(error, Error::PoolFull));
                            prop_assert!(used_pages(&pool) + MAX_CHAIN as u64 > limit);
                        }
                    }
                } else if !live.is_empty() {
                    let (location, length, stamp) = live.swap_remove(which.index(live.len()));
                    // SAFETY: one thread, and the object is live.
                    let whole = unsafe { pool.with_object(location, |object| object.len() >= length && object.iter().all(|&b| b == stamp)) };
                    prop_assert_eq!(whole, Some(true));
                    pool.free(location);
                }
            }
            for &(location, _, stamp) in &live {
                // SAFETY: as above.
                prop_assert_eq!(unsafe { pool.with_object(location, |object| object.iter().all(|&b| b == stamp)) }, Some(true));
            }
            let classes = &pool.metrics.classes;
            prop_assert_eq!(classes.iter().map(|class| class.objects.get()).sum::<u64>(), live.len() as u64);
            let pages = classes.iter().map(|class| class.zspages.get() * class.pages_per_zspage.get());
            prop_assert_eq!(pages.sum::<u64>(), used_pages(&pool));
            live.into_iter().for_each(|(location, _, _)| pool.free(location));
            prop_assert_eq!(used_pages(&pool), 0);
        }
    }

    #[test]
    fn a_wrong_location_finds_nothing() {
        let pool = pool(100);
        let location = pool.insert(1000, |_| ()).expect("room").location();
        for wrong in [location.0 + 1, location.0 + 10_000, u64::MAX >> 27, u64::MAX] {
            assert!(pool.find(Location(wrong)).is_none());
            pool.free(Location(wrong));
        }
        pool.free(location);
        assert!(pool.find(location).is_none());
        assert_eq!(used_pages(&pool), 0);
    }

    #[test]
    fn the_arena_is_large_enough_for_noise() {
        for slots in [1, 1000, 1 << 18, 1 << 32] {
            let pages = Pool::arena_pages_for(slots);
            assert_eq!(pages % REGION_PAGES, 0);
            assert!(u64::from(pages) >= (slots * 2).min(MAX_ARENA_PAGES));
        }
    }
}
