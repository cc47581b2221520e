//! The reserve of free regions. [`Arena::adjust`] restores it, and is the only thing in the arena that may wait for
//! memory. It takes a region in pieces, so that who calls it can look at what the machine has left.

use super::{Arena, Inner, REGION_PAGES};
use crate::error::Result;
use crate::page::PAGE_SIZE;
use crate::pool::class::MAX_CHAIN;
use crate::sync::MODEL;
use std::ops::Range;
use std::thread::Thread;

/// Pages that are taken from the system at a time.
pub const PIECE_PAGES: u32 = if MODEL { REGION_PAGES } else { 16 };
/// The same in bytes.
pub const PIECE_BYTES: u64 = PIECE_PAGES as u64 * PAGE_SIZE as u64;
/// Free regions are added below this many: at full speed a fill uses one up in about 8 ms, and the thread that adds
/// them may have to wait for a processor.
pub const RESERVE_LOW: u64 = if MODEL { 1 } else { 4 };
/// They are given back above this many.
pub const RESERVE_HIGH: u64 = if MODEL { 1 } else { 6 };

const REGION_BYTES: u64 = REGION_PAGES as u64 * PAGE_SIZE as u64;

/// What the reserve needs of the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing, or has something to give back.
    None,
    /// Memory, but not at once: there is a free region.
    Memory,
    /// Memory: there is no free region left.
    Urgent,
}

/// What [`Arena::adjust`] is about to do with a region.
enum Change {
    Back(usize),
    GiveBack(usize),
}

impl Inner {
    /// A region that is backed, and of which nothing is in use, can be handed out from now on.
    fn add_free(&mut self, index: usize) {
        self.regions[index].backed = true;
        self.room[index] = MAX_CHAIN as u8;
        self.free_regions += 1;
        self.touched = self.touched.max(index + 1);
        self.first_with.iter_mut().for_each(|lowest| *lowest = index.min(*lowest));
    }
}

impl Arena {
    /// Whether [`Arena::adjust`] has something to give back.
    pub fn has_too_much(&self) -> bool {
        self.inner.lock().free_regions > RESERVE_HIGH
    }

    /// Waits until there is a free region, taking memory for one if need be. Returns false if the arena has no more.
    ///
    /// May wait for memory. Errors: as [`Arena::adjust`].
    pub fn ensure_region(&self, prepare: impl Fn(Range<u32>) -> Result<()>) -> Result<bool> {
        while self.inner.lock().free_regions == 0 {
            if !self.adjust(&prepare)? && self.inner.lock().free_regions == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What the reserve needs.
    pub fn need(&self) -> Need {
        let inner = self.inner.lock();
        match self.choose(&inner) {
            Some(Change::Back(_)) if inner.free_regions == 0 => Need::Urgent,
            Some(Change::Back(_)) => Need::Memory,
            _ => Need::None,
        }
    }

    /// Takes the next piece of a region from the system, or gives a region back, if the reserve needs it. Returns whether
    /// it did.
    ///
    /// `prepare` is called with pages before they can be handed out for the first time.
    /// May wait for memory (under `Adjust` alone), and for others who are here. Errors: [`Error::System`] if the
    /// system gives none; the arena is unchanged then.
    pub fn adjust(&self, prepare: impl Fn(Range<u32>) -> Result<()>) -> Result<bool> {
        let mut begun = self.adjusting.lock();
        let mut inner = self.inner.lock();
        let Some(change) = self.choose(&inner) else { return Ok(false) };
        match change {
            Change::Back(next) => {
                drop(inner);
                let first = begun.unwrap_or(next as u32 * REGION_PAGES);
                let end = first + PIECE_PAGES;
                prepare(first..end)?;
                self.state.populate(first, PIECE_PAGES)?;
                *begun = (end % REGION_PAGES > 0).then_some(end);
                if begun.is_none() {
                    let mut inner = self.inner.lock();
                    inner.add_free((first / REGION_PAGES) as usize);
                    self.metrics.backed_bytes.add(REGION_BYTES);
                }
            }
            Change::GiveBack(index) => {
                inner.room[index] = 0;
                inner.free_regions -= 1;
                inner.regions[index].backed = false;
                drop(inner);
                if let Err(error) = self.state.punch(index as u32 * REGION_PAGES, REGION_PAGES) {
                    self.inner.lock().add_free(index);
                    return Err(error);
                }
                self.metrics.backed_bytes.sub(REGION_BYTES);
            }
        }
        Ok(true)
    }

    /// The lowest region to back, or the highest free one to give back.
    fn choose(&self, inner: &Inner) -> Option<Change> {
        if inner.free_regions > RESERVE_HIGH {
            // One that is isolated is not given back before it is put back, or it would be handed out meanwhile.
            let free = |&index: &usize| {
                inner.regions[index].backed && inner.regions[index].used_pages == 0 && inner.isolated != Some(index)
            };
            return (0..inner.touched).rev().find(free).map(Change::GiveBack);
        }
        let backed_pages = self.metrics.backed_bytes.get() / PAGE_SIZE as u64;
        let enough = inner.free_regions >= RESERVE_LOW
            // Beyond what the limit can ever use, a region would only lie idle.
            || (inner.free_regions > 0 && backed_pages >= inner.limit_pages);
        if enough || inner.limit_pages == 0 {
            return None;
        }
        let next = (0..inner.touched).find(|&index| !inner.regions[index].backed).unwrap_or(inner.touched);
        (next < inner.regions.len()).then_some(Change::Back(next))
    }

    /// Makes `thread` the one that calls [`Arena::adjust`]: it is unparked when there is something to do.
    pub fn set_adjuster(&self, thread: Thread) {
        let _only_the_first_counts = self.adjuster.set(thread);
    }

    pub fn has_adjuster(&self) -> bool {
        self.adjuster.get().is_some()
    }

    pub(super) fn wake_adjuster(&self) {
        if let Some(thread) = self.adjuster.get() {
            thread.unpark();
        }
    }
}
