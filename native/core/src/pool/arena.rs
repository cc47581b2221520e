//! The arena: runs of 1 to 8 neighbouring pages for zspages, lowest address first, in regions of 2 MiB.
//!
//! Pages that a zspage leaves go back to the system, but for a small reserve: a workload that frees and allocates in
//! turn would else pay for a fresh zeroed page each time.

use super::class::MAX_CHAIN;
use crate::error::{Error, Result};
use crate::locks::{Rank, Ranked};
use crate::memory::{Zeroable, ZeroedTable};
use crate::state::State;
use std::sync::Arc;

/// Pages of a region.
pub const REGION_PAGES: u32 = 512;
/// At most this many free pages (2 MiB) stay resident.
const RESERVE_PAGES: u32 = 512;

const WORDS: usize = REGION_PAGES as usize / 64;
type Bitmap = [u64; WORDS];

/// What is known of one region; zeroed is "all free, nothing resident".
struct Region {
    /// Bit n is set while page n belongs to a zspage (or is being given back).
    used: Bitmap,
    /// Bit n is set while page n may take memory. Invariant: used implies resident.
    resident: Bitmap,
}

// SAFETY: bitmaps of integers, valid when zero, no drop.
unsafe impl Zeroable for Region {}

/// Counts of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In zspages.
    pub used: u64,
    /// The most that `used` has ever been.
    pub peak: u64,
    /// Free, but still resident.
    pub reserve: u64,
}

struct Inner {
    regions: ZeroedTable<Region>,
    /// Per region: MAX_CHAIN minus the longest free run, at MAX_CHAIN at most. Zeroed is "all free".
    shortage: ZeroedTable<u8>,
    /// Per run length - 1: no region below this one has such a run.
    first_with: [usize; MAX_CHAIN],
    limit: u64,
    usage: Usage,
}

/// The page allocator of the pool (lock rank `Arena`).
pub struct Arena {
    state: Arc<State>,
    inner: Ranked<Inner>,
}

impl Arena {
    /// An empty arena over the state's pages, of which at most `limit` are handed out at a time.
    pub fn new(state: Arc<State>, limit: u64) -> Result<Arena> {
        let regions = (state.arena_pages() / REGION_PAGES) as usize;
        let inner = Inner {
            regions: ZeroedTable::new(regions)?,
            shortage: ZeroedTable::new(regions)?,
            first_with: [0; MAX_CHAIN],
            limit,
            usage: Usage::default(),
        };
        Ok(Arena { state, inner: Ranked::new(Rank::Arena, inner) })
    }

    /// Takes `pages` (1..=8) neighbouring pages of one region and returns the first.
    ///
    /// Their contents are undefined. Errors: [`Error::PoolFull`] at the limit.
    pub fn alloc(&self, pages: usize) -> Result<u32> {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        if inner.usage.used + pages as u64 > inner.limit {
            return Err(Error::PoolFull);
        }
        let from = inner.first_with[pages - 1];
        let enough = (MAX_CHAIN - pages) as u8;
        let found = inner.shortage[from..].iter().position(|&shortage| shortage <= enough).map(|n| from + n);
        inner.first_with[pages - 1] = found.unwrap_or(inner.shortage.len());
        let index = found.ok_or(Error::PoolFull)?;
        let region = &mut inner.regions[index];
        // `shortage` says that there is one.
        let first = first_free_run(&region.used, pages).ok_or(Error::PoolFull)?;
        for page in first..first + pages {
            inner.usage.reserve -= u64::from(test(&region.resident, page));
            set(&mut region.used, page, true);
            set(&mut region.resident, page, true);
        }
        inner.shortage[index] = shortage(&region.used);
        inner.usage.used += pages as u64;
        inner.usage.peak = inner.usage.peak.max(inner.usage.used);
        Ok(index as u32 * REGION_PAGES + first as u32)
    }

    /// Takes back what [`Arena::alloc`] handed out. Beyond the reserve the memory goes back to the system at once.
    pub fn free(&self, first: u32, pages: usize) {
        let mut inner = self.inner.lock();
        let keep = inner.usage.reserve + pages as u64 <= u64::from(RESERVE_PAGES);
        // Punched without the lock: until then the pages stay marked as used, so that nobody is given them.
        let resident = if keep {
            true
        } else {
            drop(inner);
            let punched = self.state.punch(first, pages as u32);
            inner = self.inner.lock();
            !punched
        };
        let inner = &mut *inner;
        let index = (first / REGION_PAGES) as usize;
        let region = &mut inner.regions[index];
        for page in (first % REGION_PAGES) as usize..(first % REGION_PAGES) as usize + pages {
            debug_assert!(test(&region.used, page), "page {page} of region {index} freed twice");
            set(&mut region.used, page, false);
            set(&mut region.resident, page, resident);
            inner.usage.reserve += u64::from(resident);
        }
        inner.shortage[index] = shortage(&region.used);
        for first_with in &mut inner.first_with {
            *first_with = index.min(*first_with);
        }
        inner.usage.used -= pages as u64;
    }

    pub fn usage(&self) -> Usage {
        self.inner.lock().usage
    }

    pub fn limit(&self) -> u64 {
        self.inner.lock().limit
    }

    /// Changes the limit, in pages. Below what is in use it only stops growth.
    pub fn set_limit(&self, limit: u64) {
        self.inner.lock().limit = limit;
    }

    /// Bytes of bookkeeping for the pages that were ever in use.
    pub fn metadata_bytes(&self) -> u64 {
        let regions = self.usage().peak.div_ceil(u64::from(REGION_PAGES));
        regions * (size_of::<Region>() as u64 + 1)
    }
}

fn test(bitmap: &Bitmap, page: usize) -> bool {
    bitmap[page / 64] >> (page % 64) & 1 == 1
}

fn set(bitmap: &mut Bitmap, page: usize, value: bool) {
    let bit = 1 << (page % 64);
    bitmap[page / 64] = if value { bitmap[page / 64] | bit } else { bitmap[page / 64] & !bit };
}

/// Bit n of the result is set if a run of `length` free pages begins at page n.
fn free_runs(used: &Bitmap, length: usize) -> Bitmap {
    let mut runs = used.map(|word| !word);
    for _ in 1..length {
        for i in 0..WORDS {
            let above = runs.get(i + 1).map_or(0, |word| word << 63);
            runs[i] &= runs[i] >> 1 | above;
        }
    }
    runs
}

fn first_free_run(used: &Bitmap, length: usize) -> Option<usize> {
    let runs = free_runs(used, length);
    let word = runs.iter().position(|&word| word != 0)?;
    Some(word * 64 + runs[word].trailing_zeros() as usize)
}

fn shortage(used: &Bitmap) -> u8 {
    let longest = (1..=MAX_CHAIN).rev().find(|&length| free_runs(used, length).iter().any(|&word| word != 0));
    (MAX_CHAIN - longest.unwrap_or(0)) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE_SIZE;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn arena(regions: u32, limit: u64) -> Arena {
        Arena::new(Arc::new(State::create(1, regions * REGION_PAGES).expect("state")), limit).expect("arena")
    }

    proptest! {
        /// Against a set of pages: no page twice, none lost, runs inside one region, counts exact.
        #[test]
        fn runs_never_overlap(steps in prop::collection::vec((any::<bool>(), 1..=MAX_CHAIN, any::<prop::sample::Index>()), 1..600)) {
            let arena = arena(3, 1100);
            let mut taken = BTreeSet::new();
            let mut runs = Vec::new();
            for (allocate, pages, which) in steps {
                if allocate {
                    match arena.alloc(pages) {
                        Ok(first) => {
                            prop_assert_eq!(first / REGION_PAGES, (first + pages as u32 - 1) / REGION_PAGES);
                            for page in first..first + pages as u32 {
                                prop_assert!(taken.insert(page));
                            }
                            runs.push((first, pages));
                        }
                        Err(_) => prop_assert!(taken.len() + pages > 1100),
                    }
                } else if !runs.is_empty() {
                    let (first, pages) = runs.swap_remove(which.index(runs.len()));
                    arena.free(first, pages);
                    (first..first + pages as u32).for_each(|page| { taken.remove(&page); });
                }
                prop_assert_eq!(arena.usage().used, taken.len() as u64);
            }
        }

        #[test]
        fn the_first_free_run_is_found(used in prop::array::uniform8(any::<u64>()), length in 1..=MAX_CHAIN) {
            let slow = (0..=REGION_PAGES as usize - length).find(|&at| (at..at + length).all(|page| !test(&used, page)));
            prop_assert_eq!(first_free_run(&used, length), slow);
            prop_assert_eq!(shortage(&used) as usize <= MAX_CHAIN - length, slow.is_some());
        }
    }

    #[test]
    fn memory_goes_back_to_the_system() {
        let arena = arena(8, 4096);
        let resident = || arena.state.resident_bytes() as usize / PAGE_SIZE;
        let runs: Vec<u32> = (0..500).map(|_| arena.alloc(8).expect("room")).collect();
        for &first in &runs {
            for page in first..first + 8 {
                // SAFETY: the page was just handed to us.
                unsafe { arena.state.arena(page as usize * PAGE_SIZE).write(1) };
            }
        }
        assert!(resident() >= 4000);
        runs.into_iter().for_each(|first| arena.free(first, 8));
        assert_eq!(arena.usage().reserve, u64::from(RESERVE_PAGES));
        assert!(resident() <= RESERVE_PAGES as usize + 8, "{} pages still resident", resident());
    }
}
