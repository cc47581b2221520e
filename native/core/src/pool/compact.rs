//! Moving objects while others read and write: compaction within a class, and migration out of a region.
//!
//! Compaction (the kernel's `__zs_compact`) moves objects from the emptiest zspages of a class into its fullest, until
//! the emptiest are gone. Migration (`zs_page_isolate`, `zs_page_migrate`, `zs_page_putback`, for a region at a time)
//! empties the sparsest region of the arena, so that the system gets it back whole. Both are made of one step:
//!
//! 1. take the lock of the class, and look again whether the zspage is still there;
//! 2. try the lock of the zspage: if a reader has it, come back later;
//! 3. copy each object into another zspage, and exchange the location in the slot word that names it ("commit"). Who
//!    has published or emptied the slot meanwhile wins: the copy is freed, and the object is left to its owner;
//! 4. unlock, and give the zspage's pages back to the arena if it has become empty.
//!
//! A step moves a few objects only. Readers wait no longer than that, and no thread waits for a mover's waiting.

use super::zspage::{objects_in_use, zspage_of, ClassLists};
use super::{location_of, Location, Pool};
use crate::locks::Guard;
use crate::page::PAGE_SIZE;
use crate::sync::{Ordering::Relaxed, MODEL};
use std::ops::Range;

/// Objects that a step moves at most: readers of the zspage, and who allocates in its class, wait so long.
const BATCH: usize = if MODEL { 1 } else { 8 };
/// Steps in vain at one zspage before it is left for another time.
const PATIENCE: usize = if MODEL { 2 } else { 16 };
/// Frees between two looks at whether there is something to compact.
const FREES: u32 = 1024;
/// Compaction by itself begins where it frees at least this share of the pool, and this much.
const WORTH_SHARE: u64 = 16;
const WORTH_PAGES: u64 = 256;

/// What a step has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Some objects were moved; there may be more.
    Moved,
    /// Nothing could be moved now: somebody reads there, or is about to publish or free.
    Again,
    /// There is nothing to move here.
    Done,
    /// There is no room to move anything to.
    NoRoom,
}

/// Makes the slot that names the object at the first location name its copy at the second one; false if no slot does.
/// The bytes are the copy's.
pub trait Commit: Fn(&[u8], Location, Location) -> bool {}

impl<F: Fn(&[u8], Location, Location) -> bool> Commit for F {}

impl Pool {
    /// Moves objects together: frees the zspages that their classes can do without, then the regions that the arena
    /// can do without. Returns how many pages it has freed.
    ///
    /// Takes locks for short steps only; page operations go on meanwhile. Allocates no memory, touches no disk. Ends
    /// early when the pool is being destroyed.
    pub fn compact(&self, commit: &impl Commit) -> u64 {
        let pages = (0..self.classes.len()).map(|class| self.compact_class(class, commit)).sum();
        while let Some(region) = self.arena.isolate_sparsest() {
            self.evacuate(region, commit);
            if !self.arena.putback() {
                break;
            }
        }
        self.metrics.pages_compacted.add(pages);
        pages
    }

    /// Makes the calling thread the one that compacts: it is unparked when it is to look at [`Pool::wants_compaction`].
    pub fn become_compactor(&self) {
        let _only_the_first_counts = self.compactor.set(std::thread::current());
    }

    /// Wakes the compactor to compact in any case.
    pub fn ask_for_compaction(&self) {
        self.compaction_asked.store(true, Relaxed);
        self.wake_compactor();
    }

    /// Whether somebody has asked for compaction since the last time, or it is worth its while.
    pub fn wants_compaction(&self) -> bool {
        let pages = |class| self.zspages_to_spare(class) * self.table.classes()[class].pages as u64;
        let spare = (0..self.classes.len()).map(pages).sum::<u64>() + self.arena.pages_to_spare();
        let used = self.metrics.pool_bytes.get() / PAGE_SIZE as u64;
        self.compaction_asked.swap(false, Relaxed) || spare >= WORTH_PAGES.max(used / WORTH_SHARE)
    }

    /// To be called with every free: frees are what fragments a pool.
    pub(super) fn wake_compactor_now_and_then(&self) {
        if self.frees.fetch_add(1, Relaxed) % FREES == FREES - 1 {
            self.wake_compactor();
        }
    }

    fn wake_compactor(&self) {
        if let Some(thread) = self.compactor.get() {
            thread.unpark();
        }
    }

    /// How many zspages fewer would do for the objects of a class (the kernel's `zs_can_compact`).
    fn zspages_to_spare(&self, class: usize) -> u64 {
        let (geometry, counters) = (&self.table.classes()[class], &self.metrics.classes[class]);
        let objects = geometry.objects as u64;
        (counters.zspages.get() * objects).saturating_sub(counters.objects.get()) / objects
    }

    fn compact_class(&self, class: usize, commit: &impl Commit) -> u64 {
        let zspages = &self.metrics.classes[class].zspages;
        let before = zspages.get();
        let mut in_vain = 0;
        while in_vain < PATIENCE {
            match self.compact_step(class, commit) {
                Step::Moved => in_vain = 0,
                Step::Again => in_vain += 1,
                Step::Done | Step::NoRoom => break,
            }
        }
        before.saturating_sub(zspages.get()) * self.table.classes()[class].pages as u64
    }

    fn compact_step(&self, class: usize, commit: &impl Commit) -> Step {
        // Given up last, when all that this step frees has been freed: see `Pool::destroy`.
        let Some(_pass) = self.movers.enter() else { return Step::Done };
        let lists = self.classes[class].lock();
        if self.zspages_to_spare(class) == 0 {
            return Step::Done;
        }
        let Some(source) = lists.emptiest(&self.descriptors) else { return Step::Done };
        self.move_some(lists, class, source, |zspage| zspage == source, false, commit)
    }

    /// Moves all objects out of an isolated region.
    fn evacuate(&self, region: Range<u32>, commit: &impl Commit) {
        for page in region.clone() {
            let mut in_vain = 0;
            while in_vain < PATIENCE {
                match self.evacuate_step(page, &region, commit) {
                    Step::Moved => in_vain = 0,
                    Step::Again => in_vain += 1,
                    Step::Done => break,
                    Step::NoRoom => return,
                }
            }
        }
    }

    fn evacuate_step(&self, page: u32, region: &Range<u32>, commit: &impl Commit) -> Step {
        // As in `compact_step`.
        let Some(_pass) = self.movers.enter() else { return Step::NoRoom };
        let Some((source, class)) = zspage_of(&self.descriptors, page) else { return Step::Done };
        let lists = self.classes[class].lock();
        // It may have been freed before we had the lock; from here on it stays on its list.
        if zspage_of(&self.descriptors, page) != Some((source, class)) {
            return Step::Again;
        }
        self.move_some(lists, class, source, |zspage| region.contains(&zspage), true, commit)
    }

    /// Moves some objects of `source`, a zspage of the class that `lists` has locked, into zspages that are not to be
    /// avoided, or into a new one if they are all full and the class may `grow`.
    fn move_some(
        &self,
        mut lists: Guard<'_, ClassLists>,
        class: usize,
        source: u32,
        avoid: impl Fn(u32) -> bool,
        grow: bool,
        commit: &impl Commit,
    ) -> Step {
        let geometry = &self.table.classes()[class];
        let lock = &self.descriptors[source as usize].lock;
        if !lock.try_move() {
            return Step::Again;
        }
        let mut step = Step::Again;
        let mut emptied = false;
        for object in objects_in_use(&self.descriptors, source, geometry.pages).take(BATCH) {
            let taken = lists.take_object(&self.descriptors, geometry, &avoid);
            let taken = taken.or_else(|| {
                let first = grow.then(|| self.arena.alloc_beside(geometry.pages).ok()).flatten()?;
                self.grow(&mut lists, class, first)
            });
            let Some((target, copy)) = taken else {
                step = Step::NoRoom;
                break;
            };
            let (from, to) = (location_of(source, object, geometry), location_of(target, copy, geometry));
            if commit(self.copy(from, to, geometry.size), from, to) {
                emptied = self.put(&mut lists, class, source, object);
                step = Step::Moved;
            } else if self.put(&mut lists, class, target, copy) {
                // A zspage made for this copy alone. What the arena has too much now, the next free gives back.
                self.arena.free(target, geometry.pages);
            }
        }
        lock.unlock_move();
        drop(lists);
        if emptied {
            self.free_pages(source, geometry.pages);
        }
        step
    }

    /// Copies the bytes of an object, and returns the copy's.
    fn copy(&self, from: Location, to: Location, size: usize) -> &[u8] {
        // SAFETY: both objects lie inside the arena, and they are two. Nobody writes to the source: its zspage is
        // locked by us, and objects are written only while pinned. Nobody knows the copy: it was free until now, and
        // the lock of its class is ours.
        let (from, to) =
            unsafe { (&*self.state.bytes(from.offset(), size), &mut *self.state.bytes_mut(to.offset(), size)) };
        to.copy_from_slice(from);
        to
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::SharedMetrics;
    use crate::pool::arena::{REGION_PAGES, RESERVE_HIGH};
    use crate::state::State;
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::sync::Arc;

    fn pool(regions: u32) -> Pool {
        let state = State::create(1, regions * REGION_PAGES, None).expect("state");
        Pool::new(Arc::new(state), u64::MAX / 2, SharedMetrics::new(None).expect("metrics")).expect("pool")
    }

    /// Objects by name, as a slot table would have them: the first four bytes say which slot it is.
    #[derive(Default)]
    struct Named(RefCell<BTreeMap<u32, Location>>);

    impl Named {
        fn fill(&self, pool: &Pool, objects: u32, length: impl Fn(u32) -> usize) {
            for name in 0..objects {
                let object = pool
                    .insert(length(name), |object| {
                        object.fill(name as u8);
                        object[..4].copy_from_slice(&name.to_le_bytes());
                    })
                    .expect("room");
                self.0.borrow_mut().insert(name, object.location());
            }
        }

        fn free(&self, pool: &Pool, which: impl Fn(u32) -> bool) {
            self.0.borrow_mut().retain(|&name, &mut location| {
                if which(name) {
                    pool.free(location);
                }
                !which(name)
            });
        }

        fn commit(&self, copy: &[u8], from: Location, to: Location) -> bool {
            let name = u32::from_le_bytes(copy[..4].try_into().expect("four bytes"));
            let mut named = self.0.borrow_mut();
            let is_named = named.get(&name) == Some(&from);
            if is_named {
                named.insert(name, to);
            }
            is_named
        }

        fn verify(&self, pool: &Pool) {
            for (&name, &location) in self.0.borrow().iter() {
                let object = pool.pin(location).expect("an object");
                // SAFETY: one thread, and the object is named.
                let bytes = unsafe { object.bytes() };
                assert_eq!(bytes[..4], name.to_le_bytes());
                assert!(bytes[4..].iter().all(|&byte| byte == name as u8));
            }
        }
    }

    fn used_pages(pool: &Pool) -> u64 {
        pool.metrics.pool_bytes.get() / PAGE_SIZE as u64
    }

    #[test]
    fn compaction_needs_no_more_zspages_than_a_fresh_pool() {
        let (sparse, fresh) = (pool(16), pool(16));
        let (named, again) = (Named::default(), Named::default());
        let length = |name: u32| 100 + name as usize * 7 % 4000;
        named.fill(&sparse, 8000, length);
        named.free(&sparse, |name| name % 3 != 0);
        let before = used_pages(&sparse);
        let freed = sparse.compact(&|copy: &[u8], from, to| named.commit(copy, from, to));
        named.verify(&sparse);
        again.fill(&fresh, 8000 / 3, |name| length(name * 3));
        assert_eq!(before - used_pages(&sparse), freed);
        assert!(
            used_pages(&sparse) <= used_pages(&fresh) + 8,
            "{} against {}",
            used_pages(&sparse),
            used_pages(&fresh)
        );
        named.free(&sparse, |_| true);
        assert_eq!(used_pages(&sparse), 0);
    }

    #[test]
    fn sparse_regions_go_back_to_the_system() {
        let pool = pool(64);
        let named = Named::default();
        // One object a page: only whole pages become free, all over the arena.
        named.fill(&pool, 30_000, |_| 4000);
        named.free(&pool, |name| name % 4 != 0);
        let backed = || pool.metrics.backed_bytes.get() / PAGE_SIZE as u64;
        let in_reserve = RESERVE_HIGH * u64::from(REGION_PAGES);
        assert!(backed() >= used_pages(&pool) * 3 + in_reserve, "nothing is fragmented");
        pool.compact(&|copy: &[u8], from, to| named.commit(copy, from, to));
        named.verify(&pool);
        while pool.adjust().expect("memory given back") {}
        let needed = used_pages(&pool).next_multiple_of(u64::from(REGION_PAGES)) + in_reserve;
        assert!(backed() <= needed + u64::from(REGION_PAGES), "{} pages, {needed} needed", backed());
    }

    #[test]
    fn a_pinned_object_stays_and_so_does_one_that_no_slot_names() {
        let pool = pool(4);
        let named = Named::default();
        // Four objects a zspage.
        named.fill(&pool, 64, |_| 1024);
        named.free(&pool, |name| name % 4 != 0);
        let all: Vec<Location> = named.0.borrow().values().copied().collect();
        let pins: Vec<_> = all.iter().map(|&location| pool.find(location).expect("an object").first).collect();
        pins.iter().for_each(|&first| pool.descriptors[first as usize].lock.read());
        assert_eq!(pool.compact(&|copy: &[u8], from, to| named.commit(copy, from, to)), 0);
        pins.iter().for_each(|&first| pool.descriptors[first as usize].lock.unlock_read());
        assert_eq!(pool.compact(&|_: &[u8], _, _| false), 0);
        named.verify(&pool);
        assert_eq!(pool.metrics.classes.iter().map(|class| class.objects.get()).sum::<u64>(), 16);
        assert!(pool.compact(&|copy: &[u8], from, to| named.commit(copy, from, to)) > 0);
        named.verify(&pool);
    }
}
