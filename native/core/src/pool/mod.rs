//! The pool: objects of 64 to 4112 bytes in size classes, after the kernel's zsmalloc.
//!
//! An object is known by its [`Location`] in the arena, which is what the slot word holds: there is no table of
//! handles. Allocation takes the lock of the class, and that of the arena when the class has to grow.

mod arena;
mod class;
mod zspage;

use crate::error::{Error, Result};
use crate::locks::{Rank, Ranked};
use crate::page::PAGE_SIZE;
use crate::state::{State, MAX_ARENA_PAGES};
use arena::{Arena, REGION_PAGES};
use class::{ClassTable, Geometry, MAX_CHAIN, UNIT};
use std::sync::Arc;
use zspage::{ClassLists, Descriptors, PageDesc};

pub use arena::Usage;

/// Where an object lies in the arena, in units of 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location(u64);

impl Location {
    pub fn from_units(units: u64) -> Location {
        Location(units)
    }

    pub fn units(self) -> u64 {
        self.0
    }
}

/// Occupancy of one size class.
#[derive(Clone, Copy, Debug)]
pub struct ClassUsage {
    pub size: usize,
    pub pages_per_zspage: usize,
    pub objects_per_zspage: usize,
    pub zspages: u64,
    pub objects: u64,
}

/// A zsmalloc pool over the arena of a state file.
pub struct Pool {
    state: Arc<State>,
    arena: Arena,
    table: ClassTable,
    classes: Box<[Ranked<ClassLists>]>,
    descriptors: Descriptors,
}

/// A live object, found through its location.
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
        let partly_filled = (ClassTable::new().classes().len() * MAX_CHAIN) as u64;
        let pages = (slots * 2 + partly_filled).min(MAX_ARENA_PAGES);
        pages.next_multiple_of(u64::from(REGION_PAGES)) as u32
    }

    /// An empty pool. Errors: [`Error::System`] if its tables cannot be mapped.
    pub fn new(state: Arc<State>, limit_bytes: u64) -> Result<Pool> {
        let table = ClassTable::new();
        Ok(Pool {
            arena: Arena::new(state.clone(), limit_bytes / PAGE_SIZE as u64)?,
            classes: table.classes().iter().map(|_| Ranked::new(Rank::Class, ClassLists::new())).collect(),
            descriptors: Descriptors::new(state.arena_pages() as usize)?,
            table,
            state,
        })
    }

    /// Allocates an object of `length` bytes (header included) and lets `write` fill it; the object may be longer.
    ///
    /// Errors: [`Error::PoolFull`], with nothing changed. May take memory from the system when the class grows.
    pub fn insert(&self, length: usize, write: impl FnOnce(&mut [u8])) -> Result<Location> {
        let class = self.table.index_for(length);
        let geometry = &self.table.classes()[class];
        let (first, object) = self.take_object(class, geometry)?;
        let offset = first as usize * PAGE_SIZE + object * geometry.size;
        // SAFETY: the object lies inside its zspage, which lies inside the arena. It was free until now and its
        // location is known to nobody else, so that this is the only reference to these bytes.
        write(unsafe { std::slice::from_raw_parts_mut(self.state.arena(offset), geometry.size) });
        Ok(Location((offset / UNIT) as u64))
    }

    fn take_object(&self, class: usize, geometry: &Geometry) -> Result<(u32, usize)> {
        let mut lists = self.classes[class].lock();
        if let Some(taken) = lists.take_object(&self.descriptors, geometry) {
            return Ok(taken);
        }
        let first = self.arena.alloc(geometry.pages)?;
        lists.insert_zspage(&self.descriptors, first, class, geometry);
        // A fresh zspage has an object.
        lists.take_object(&self.descriptors, geometry).ok_or(Error::PoolFull)
    }

    /// Lets `read` see an object's bytes (up to the size of its class). None if no object lives there.
    ///
    /// # Safety
    /// The object must not be freed meanwhile: the caller holds the lock of the slot that it belongs to.
    pub unsafe fn with_object<R>(&self, location: Location, read: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let found = self.find(location)?;
        let size = self.table.classes()[found.class].size;
        // SAFETY: a live object lies inside the arena; by the caller's promise it stays, and objects are written only
        // before their location is known.
        Some(read(unsafe { std::slice::from_raw_parts(self.state.arena(found.offset), size) }))
    }

    /// Frees an object. The memory of a zspage that it leaves empty may go back to the system (a system call).
    ///
    /// A location where no object lives (a damaged slot word) is left alone.
    pub fn free(&self, location: Location) {
        let Some(found) = self.find(location) else { return };
        let geometry = &self.table.classes()[found.class];
        let mut lists = self.classes[found.class].lock();
        let empty = lists.put_object(&self.descriptors, geometry, found.first, found.object);
        drop(lists);
        if empty {
            self.arena.free(found.first, geometry.pages);
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
        Some(self.state.arena(self.find(location)?.offset))
    }

    pub fn usage(&self) -> Usage {
        self.arena.usage()
    }

    pub fn limit_bytes(&self) -> u64 {
        self.arena.limit() * PAGE_SIZE as u64
    }

    /// Changes the limit, rounded down to pages. Below what is in use, inserts fail until enough is freed.
    pub fn set_limit_bytes(&self, bytes: u64) {
        self.arena.set_limit(bytes / PAGE_SIZE as u64);
    }

    /// Occupancy of every class, from small to large; each class is locked for a moment.
    pub fn class_usage(&self) -> Vec<ClassUsage> {
        let usage = |(class, lists): (&Geometry, &Ranked<ClassLists>)| {
            let lists = lists.lock();
            ClassUsage {
                size: class.size,
                pages_per_zspage: class.pages,
                objects_per_zspage: class.objects,
                zspages: lists.zspages,
                objects: lists.objects,
            }
        };
        self.table.classes().iter().zip(self.classes.iter()).map(usage).collect()
    }

    /// Bytes of descriptors and bookkeeping for the pages that were ever in use.
    pub fn metadata_bytes(&self) -> u64 {
        self.usage().peak * size_of::<PageDesc>() as u64
            + self.arena.metadata_bytes()
            + (self.classes.len() * size_of::<Ranked<ClassLists>>()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::class::MAX_SIZE;
    use proptest::prelude::*;

    fn pool(limit_pages: u64) -> Pool {
        let state = State::create(1, REGION_PAGES * 4).expect("state");
        Pool::new(Arc::new(state), limit_pages * PAGE_SIZE as u64).expect("pool")
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
                        Ok(location) => live.push((location, length, stamp)),
                        Err(error) => {
                            prop_assert!(matches!(error, Error::PoolFull));
                            prop_assert!(pool.usage().used + MAX_CHAIN as u64 > limit);
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
            let classes = pool.class_usage();
            prop_assert_eq!(classes.iter().map(|class| class.objects).sum::<u64>(), live.len() as u64);
            prop_assert_eq!(classes.iter().map(|class| class.zspages * class.pages_per_zspage as u64).sum::<u64>(), pool.usage().used);
            live.into_iter().for_each(|(location, _, _)| pool.free(location));
            prop_assert_eq!(pool.usage().used, 0);
        }
    }

    #[test]
    fn a_wrong_location_finds_nothing() {
        let pool = pool(100);
        let location = pool.insert(1000, |_| ()).expect("room");
        for wrong in [location.0 + 1, location.0 + 10_000, u64::MAX >> 27, u64::MAX] {
            assert!(pool.find(Location(wrong)).is_none());
            pool.free(Location(wrong));
        }
        pool.free(location);
        assert!(pool.find(location).is_none());
        assert_eq!(pool.usage().used, 0);
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
