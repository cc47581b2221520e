//! How long pages have not been used, and which of them have been recompressed: a byte for each slot, after the kernel's
//! and Google's `kstaled`.
//!
//! ```text
//! bits 7..6   the tier that was last tried to recompress the page to, whether it got smaller or not; 0: none
//! bits 5..0   ticks since it was last read or written, 63 at most
//! ```
//!
//! Nobody's lock guards it: it is a hint, and whoever believes it looks at the slot word too. So it is no matter if a touch
//! goes wrong that meets a tick.

use crate::error::Result;
use crate::memory::{Zeroable, ZeroedTable};
use crate::state::{State, Table};
// Not those of `sync`: it orders nothing, and decides nothing but whose turn it is.
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// The oldest that a page can be, in ticks.
pub const MAX_AGE: u8 = 63;
const TIER_SHIFT: u32 = 6;
/// Tiers are 1 to this.
pub const MAX_TIER: u8 = 3;

#[derive(Default)]
struct Age(AtomicU8);

// SAFETY: an atomic integer, valid when zero, no drop.
unsafe impl Zeroable for Age {}

pub struct Ages(ZeroedTable<Age>);

impl Ages {
    /// Those of the process before, if there was one.
    pub fn new(state: &State) -> Result<Ages> {
        Ok(Ages(state.table(Table::Ages)?))
    }

    /// Takes memory for all, so that using them faults no more. May wait for memory.
    pub fn populate(&self) -> Result<()> {
        self.0.populate(0..self.0.len())
    }

    pub fn metadata_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    /// A page was written.
    pub fn begin(&self, index: u32) {
        self.0[index as usize].0.store(0, Relaxed);
    }

    /// A page was read.
    pub fn touch(&self, index: u32) {
        let age = &self.0[index as usize].0;
        let before = age.load(Relaxed);
        // What is not written stays in the caches of others.
        if before & MAX_AGE > 0 {
            age.store(before & !MAX_AGE, Relaxed);
        }
    }

    /// In ticks, and the tier that was tried.
    pub fn get(&self, index: u32) -> (u8, u8) {
        let age = self.0[index as usize].0.load(Relaxed);
        (age & MAX_AGE, age >> TIER_SHIFT)
    }

    /// Notes that it was tried to recompress a page to a tier.
    pub fn tried(&self, index: u32, tier: u8) {
        let set = |age: u8| Some(age & MAX_AGE | tier.min(MAX_TIER) << TIER_SHIFT);
        let _always = self.0[index as usize].0.fetch_update(Relaxed, Relaxed, set);
    }

    /// A page was made of another one: it is as old, and what was tried with that was tried with it.
    pub fn copy(&self, from: u32, to: u32) {
        self.0[to as usize].0.store(self.0[from as usize].0.load(Relaxed), Relaxed);
    }

    /// Makes these pages a tick older.
    pub fn tick(&self, indexes: impl Iterator<Item = u32>) {
        for index in indexes {
            let older = |age: u8| (age & MAX_AGE < MAX_AGE).then_some(age + 1);
            let _oldest = self.0[index as usize].0.fetch_update(Relaxed, Relaxed, older);
        }
    }

    /// Forgets for these pages that it was tried to recompress them to this tier, or a higher one.
    pub fn forget(&self, indexes: impl Iterator<Item = u32>, tier: u8) {
        for index in indexes {
            let lower = |age: u8| (age >> TIER_SHIFT >= tier).then_some(age & MAX_AGE | (tier - 1) << TIER_SHIFT);
            let _not_tried = self.0[index as usize].0.fetch_update(Relaxed, Relaxed, lower);
        }
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;

    fn ages(slots: u64) -> Ages {
        Ages::new(&State::create(slots, 512, 0, None).expect("state")).expect("ages")
    }

    #[test]
    fn a_page_gets_older_until_it_is_used_and_no_older_than_can_be_told() {
        let ages = ages(3);
        (0..5).for_each(|_| ages.tick(0..2));
        ages.tried(1, 2);
        assert_eq!([0, 1, 2].map(|index| ages.get(index)), [(5, 0), (5, 2), (0, 0)]);
        (0..100).for_each(|_| ages.tick(0..2));
        assert_eq!(ages.get(1), (63, 2));
        ages.touch(1);
        assert_eq!(ages.get(1), (0, 2));
        ages.begin(1);
        assert_eq!(ages.get(1), (0, 0));
    }

    #[test]
    fn what_was_tried_is_forgotten_from_a_tier_on() {
        let ages = ages(4);
        (0..4).for_each(|tier| ages.tried(tier, tier as u8));
        ages.tick(0..4);
        ages.forget(0..4, 2);
        assert_eq!([0, 1, 2, 3].map(|index| ages.get(index)), [(1, 0), (1, 1), (1, 1), (1, 1)]);
    }
}
