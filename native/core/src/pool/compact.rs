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
//! A step moves a few objects only. Readers wait no longer than that, and no thread waits for a mover's waiting. What
//! cannot be moved now (pinned, not published yet, or whose slot refuses) is left where it is; the others go on.

use super::driver::Commit;
use super::zsmalloc::{object_of, Zsmalloc};
use super::zspage::{objects_in_use, zspage_of};
use crate::sync::MODEL;
use std::ops::Range;

/// Objects that a step looks at, at most: readers of the zspage, and who allocates in its class, wait so long.
const BATCH: usize = if MODEL { 1 } else { 8 };
/// Tries in vain to lock a zspage before it is left for another time.
const PATIENCE: usize = if MODEL { 2 } else { 16 };
/// Zspages of a class, or regions, that are left for another time before all of the rest is.
const LEFT: usize = if MODEL { 1 } else { 16 };

/// What is left for another time: something there cannot be moved now.
#[derive(Default)]
pub(super) struct Left {
    first_pages: [u32; LEFT],
    count: usize,
}

impl Left {
    pub fn contains(&self, first: u32) -> bool {
        self.first_pages[..self.count].contains(&first)
    }

    /// Returns false if there is too much already.
    pub fn add(&mut self, first: u32) -> bool {
        let free = self.first_pages.get_mut(self.count);
        let has_room = free.is_some();
        if let Some(free) = free {
            *free = first;
            self.count += 1;
        }
        has_room
    }
}

/// A zspage whose objects are moved, into zspages of its class that are not to be avoided, or, if they are all full and
/// it may `grow`, into a new one.
struct Move<'a> {
    source: u32,
    class: usize,
    avoid: &'a dyn Fn(u32) -> bool,
    grow: bool,
    commit: &'a Commit<'a>,
}

/// What a step has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// It goes on with object `next`; 0: that was the last one. Some were moved, or none.
    Looked { next: usize, moved: bool },
    /// Somebody has the zspage locked.
    Again,
    /// The zspage is no more.
    Gone,
    /// There is no room to move anything to, or the pool is being destroyed.
    NoRoom,
}

/// What has become of a zspage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drained {
    Gone,
    /// Some of its objects cannot be moved now.
    Left,
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
        let mut left = Left::default();
        while let Some(source) = self.worth_draining(class, &left) {
            match self.drain(&Move { source, class, avoid: &|zspage| zspage == source, grow: false, commit }) {
                Drained::Gone => {}
                Drained::Left if left.add(source) => {}
                Drained::Left | Drained::NoRoom => break,
            }
        }
        before.saturating_sub(zspages.get()) * self.table.classes()[class].pages as u64
    }

    fn worth_draining(&self, class: usize, left: &Left) -> Option<u32> {
        let lists = self.classes[class].lock();
        let emptiest = || lists.emptiest(&self.descriptors, |zspage| left.contains(zspage));
        (self.zspages_to_spare(class) > 0).then(emptiest)?
    }

    /// Moves the objects out of an isolated region, but those that cannot be moved now.
    pub(super) fn evacuate_region(&self, region: Range<u32>, commit: &Commit<'_>) {
        let avoid = |zspage| region.contains(&zspage);
        for page in region.clone() {
            let Some((source, class)) = zspage_of(&self.descriptors, page) else { continue };
            let what = Move { source, class, avoid: &avoid, grow: true, commit };
            if source == page && self.drain(&what) == Drained::NoRoom {
                return;
            }
        }
    }

    /// Moves objects of a zspage step by step, until none is left that can be moved.
    fn drain(&self, what: &Move<'_>) -> Drained {
        let (mut object, mut some_moved, mut in_vain) = (0, false, 0);
        while in_vain < PATIENCE {
            match self.step(what, object) {
                Step::Looked { next, moved } => {
                    (object, in_vain, some_moved) = (next, 0, some_moved || moved);
                    // Once through without a move: so it would be the next time.
                    if next == 0 && !std::mem::take(&mut some_moved) {
                        break;
                    }
                }
                Step::Again => in_vain += 1,
                Step::Gone => return Drained::Gone,
                Step::NoRoom => return Drained::NoRoom,
            }
        }
        Drained::Left
    }

    /// Moves some objects of a zspage, from number `object` on.
    fn step(&self, &Move { source, class, avoid, grow, commit }: &Move<'_>, object: usize) -> Step {
        if self.base.movers.is_closed() {
            return Step::NoRoom;
        }
        let geometry = &self.table.classes()[class];
        let mut lists = self.classes[class].lock();
        // It may have been freed before we had the lock, and another one begun there. One of this class stays on its list.
        if zspage_of(&self.descriptors, source) != Some((source, class)) {
            return Step::Gone;
        }
        let lock = &self.descriptors[source as usize].lock;
        if !lock.try_move() {
            return Step::Again;
        }
        let (mut moved, mut emptied, mut no_room) = (false, false, false);
        let mut objects = objects_in_use(&self.descriptors, source, geometry.objects).skip_while(|&n| n < object);
        for object in objects.by_ref().take(BATCH) {
            let taken = lists.take_object(&self.descriptors, geometry, avoid);
            let taken = taken.or_else(|| {
                let first = grow.then(|| self.base.arena.alloc_beside(geometry.pages).ok()).flatten()?;
                self.grow(&mut lists, class, first)
            });
            let Some((target, copy)) = taken else {
                no_room = true;
                break;
            };
            let (from, to) = (object_of(source, object, geometry), object_of(target, copy, geometry));
            // SAFETY: the zspage of the source is locked by us. The copy was free until now, and the lock of its class
            // is ours.
            let bytes = unsafe { self.base.copy(&from, &to) };
            if commit(bytes, from.location(), to.location()) {
                emptied = self.put(&mut lists, class, source, object);
                moved = true;
            } else if self.put(&mut lists, class, target, copy) {
                // A zspage made for this copy alone.
                self.base.arena.free(target, geometry.pages);
            }
        }
        let next = objects.next().unwrap_or(0);
        lock.unlock_move();
        drop(lists);
        if emptied {
            self.base.arena.free(source, geometry.pages);
        }
        match (emptied, no_room) {
            (true, _) => Step::Gone,
            (false, true) => Step::NoRoom,
            (false, false) => Step::Looked { next, moved },
        }
    }
}
