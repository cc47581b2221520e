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

use super::driver::Commit;
use super::zsmalloc::{object_of, Zsmalloc};
use super::zspage::{objects_in_use, zspage_of, ClassLists};
use crate::locks::Guard;
use crate::sync::MODEL;
use std::ops::Range;

/// Objects that a step moves at most: readers of the zspage, and who allocates in its class, wait so long.
const BATCH: usize = if MODEL { 1 } else { 8 };
/// Steps in vain at one zspage before it is left for another time.
const PATIENCE: usize = if MODEL { 2 } else { 16 };

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

impl Zsmalloc {
    /// How many zspages fewer would do for the objects of a class (the kernel's `zs_can_compact`).
    pub(super) fn zspages_to_spare(&self, class: usize) -> u64 {
        let (geometry, counters) = (&self.table.classes()[class], &self.base.metrics.classes[class]);
        let objects = geometry.objects as u64;
        (counters.zspages.get() * objects).saturating_sub(counters.objects.get()) / objects
    }

    pub(super) fn compact_class(&self, class: usize, commit: &Commit<'_>) -> u64 {
        let zspages = &self.base.metrics.classes[class].zspages;
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

    fn compact_step(&self, class: usize, commit: &Commit<'_>) -> Step {
        if self.base.movers.is_closed() {
            return Step::Done;
        }
        let lists = self.classes[class].lock();
        if self.zspages_to_spare(class) == 0 {
            return Step::Done;
        }
        let Some(source) = lists.emptiest(&self.descriptors) else { return Step::Done };
        self.move_some(lists, class, source, |zspage| zspage == source, false, commit)
    }

    /// Moves all objects out of an isolated region.
    pub(super) fn evacuate_region(&self, region: Range<u32>, commit: &Commit<'_>) {
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

    fn evacuate_step(&self, page: u32, region: &Range<u32>, commit: &Commit<'_>) -> Step {
        if self.base.movers.is_closed() {
            return Step::NoRoom;
        }
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
        commit: &Commit<'_>,
    ) -> Step {
        let geometry = &self.table.classes()[class];
        let lock = &self.descriptors[source as usize].lock;
        if !lock.try_move() {
            return Step::Again;
        }
        let mut step = Step::Again;
        let mut emptied = false;
        for object in objects_in_use(&self.descriptors, source, geometry.objects).take(BATCH) {
            let taken = lists.take_object(&self.descriptors, geometry, &avoid);
            let taken = taken.or_else(|| {
                let first = grow.then(|| self.base.arena.alloc_beside(geometry.pages).ok()).flatten()?;
                self.grow(&mut lists, class, first)
            });
            let Some((target, copy)) = taken else {
                step = Step::NoRoom;
                break;
            };
            let (from, to) = (object_of(source, object, geometry), object_of(target, copy, geometry));
            // SAFETY: the zspage of the source is locked by us. The copy was free until now, and the lock of its class
            // is ours.
            let bytes = unsafe { self.base.copy(&from, &to) };
            if commit(bytes, from.location(), to.location()) {
                emptied = self.put(&mut lists, class, source, object);
                step = Step::Moved;
            } else if self.put(&mut lists, class, target, copy) {
                // A zspage made for this copy alone.
                self.base.arena.free(target, geometry.pages);
            }
        }
        lock.unlock_move();
        drop(lists);
        if emptied {
            self.base.arena.free(source, geometry.pages);
        }
        step
    }
}
