//! The arena: runs of up to 32 neighbouring pages for zspages, lowest address first, in regions of 2 MiB.
//!
//! Memory comes from the system, and goes back to it, by the region. A page is only handed out from a region that is
//! backed by memory, so that neither handing it out nor touching it waits for the system. A few wholly free regions
//! are kept in reserve (`reserve.rs`).

mod bitmap;
mod recover;
mod reserve;

use super::class::MAX_CHAIN;
use crate::error::{Error, Result};
use crate::locks::{Rank, Ranked};
use crate::memory::{Zeroable, ZeroedTable};
use crate::metrics::{Metrics, SharedMetrics};
use crate::page::PAGE_SIZE;
use crate::state::State;
use crate::sync::MODEL;
use bitmap::{first_free_run, longest_free_run, Bitmap};
use reserve::RESERVE_LOW;
pub use reserve::{Need, PIECE_BYTES, RESERVE_HIGH};
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::thread::Thread;

/// Pages of a region.
pub const REGION_PAGES: u32 = if MODEL { 8 } else { 512 };

/// Zeroed is "nothing used, not backed".
#[derive(Default)]
struct Region {
    /// The pages that belong to zspages.
    used: Bitmap,
    used_pages: u32,
    backed: bool,
}

// SAFETY: integers and a bool, valid when zero, no drop.
unsafe impl Zeroable for Region {}

struct Inner {
    regions: ZeroedTable<Region>,
    /// Per region: the longest run of pages that can be handed out, MAX_CHAIN at most.
    room: ZeroedTable<u8>,
    /// Per run length - 1: no region below this one has room for such a run.
    first_with: [usize; MAX_CHAIN],
    /// Regions at and above this one were never backed.
    touched: usize,
    /// Backed regions with no page used, of which pages can be handed out: not an isolated one.
    free_regions: u64,
    used_pages: u64,
    limit_pages: u64,
    /// The region that is being emptied: nothing is handed out from it, so its room is 0.
    isolated: Option<usize>,
    /// So many pages may be in use for that: a zspage more than the limit, or than there were, since what is copied is
    /// freed only then. All of them have memory already.
    limit_beside: u64,
}

impl Inner {
    fn pages_to_spare(&self, metrics: &Metrics) -> u64 {
        let backed_pages = metrics.backed_bytes.get() / PAGE_SIZE as u64;
        let in_reserve = self.free_regions * u64::from(REGION_PAGES);
        let idle = backed_pages.saturating_sub(self.used_pages + in_reserve);
        // Less than a region would not empty one; and as free pages lie in runs of some length, it takes some more.
        idle.saturating_sub(u64::from(REGION_PAGES + REGION_PAGES / 4))
    }
}

/// The page allocator of the pool (lock rank `Arena`).
pub struct Arena {
    state: Arc<State>,
    metrics: SharedMetrics,
    inner: Ranked<Inner>,
    /// Held to change which regions are backed. Of the region that is being backed, if there is one: the next page to be
    /// taken. Those before it are, but none is handed out, or counted, before all are.
    adjusting: Ranked<Option<u32>>,
    /// The thread that calls [`Arena::adjust`] in the background; without one, who needs a region calls it.
    adjuster: OnceLock<Thread>,
}

impl Arena {
    /// An empty arena over the state's pages, of which at most `limit_pages` are handed out at a time (to
    /// who empties a region, a zspage more).
    pub fn new(state: Arc<State>, limit_pages: u64, metrics: SharedMetrics) -> Result<Arena> {
        let regions = (state.arena_pages() / REGION_PAGES) as usize;
        let inner = Inner {
            regions: ZeroedTable::new(regions)?,
            room: ZeroedTable::new(regions)?,
            first_with: [0; MAX_CHAIN],
            touched: 0,
            free_regions: 0,
            used_pages: 0,
            limit_pages,
            isolated: None,
            limit_beside: 0,
        };
        let arena = Arena {
            state,
            metrics,
            inner: Ranked::new(Rank::Arena, inner),
            adjusting: Ranked::new(Rank::Adjust, None),
            adjuster: OnceLock::new(),
        };
        arena.set_limit(limit_pages);
        Ok(arena)
    }

    /// Takes `pages` (1..=32) neighbouring pages of one region and returns the first; their contents are undefined.
    ///
    /// Errors: [`Error::PoolFull`] at the limit; [`Error::NoRegion`] if no backed region has room: `adjust` may help.
    pub fn alloc(&self, pages: usize) -> Result<u32> {
        let mut inner = self.inner.lock();
        let from = inner.first_with[pages - 1].min(inner.touched);
        let found = inner.room[from..inner.touched].iter().position(|&room| usize::from(room) >= pages);
        inner.first_with[pages - 1] = found.map_or(inner.touched, |n| from + n);
        let limit = inner.limit_pages;
        let taken = self.take(&mut inner, found.map(|n| from + n), pages, limit);
        let low = inner.free_regions < RESERVE_LOW;
        drop(inner);
        if low {
            self.wake_adjuster();
        }
        taken
    }

    /// As [`Arena::alloc`], for what empties the isolated region: only from regions that are in use, as it must not begin
    /// another. In a full pool too: that is where it matters that regions go back to the system.
    pub fn alloc_beside(&self, pages: usize) -> Result<u32> {
        let mut inner = self.inner.lock();
        let has_room = |&index: &usize| usize::from(inner.room[index]) >= pages && inner.regions[index].used_pages > 0;
        let found = (0..inner.touched).find(has_room);
        let limit = inner.limit_beside;
        self.take(&mut inner, found, pages, limit)
    }

    fn take(&self, inner: &mut Inner, region: Option<usize>, pages: usize, limit: u64) -> Result<u32> {
        if inner.used_pages + pages as u64 > limit {
            return Err(Error::PoolFull);
        }
        let run = region.and_then(|index| Some((index, first_free_run(&inner.regions[index].used, pages)?)));
        let (index, first) = run.ok_or(Error::NoRegion)?;
        let region = &mut inner.regions[index];
        (first..first + pages).for_each(|page| region.used[page / 64] |= 1 << (page % 64));
        inner.free_regions -= u64::from(region.used_pages == 0);
        region.used_pages += pages as u32;
        inner.room[index] = longest_free_run(&region.used);
        inner.used_pages += pages as u64;
        self.publish_usage(inner);
        Ok(index as u32 * REGION_PAGES + first as u32)
    }

    /// Takes back what [`Arena::alloc`] handed out.
    pub fn free(&self, first: u32, pages: usize) {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        let index = (first / REGION_PAGES) as usize;
        let region = &mut inner.regions[index];
        for page in (first % REGION_PAGES) as usize..(first % REGION_PAGES) as usize + pages {
            assert!(region.used[page / 64] >> (page % 64) & 1 == 1, "page {page} of region {index} freed twice");
            region.used[page / 64] &= !(1 << (page % 64));
        }
        region.used_pages -= pages as u32;
        if inner.isolated != Some(index) {
            inner.free_regions += u64::from(region.used_pages == 0);
            inner.room[index] = longest_free_run(&region.used);
        }
        inner.first_with.iter_mut().for_each(|lowest| *lowest = index.min(*lowest));
        inner.used_pages -= pages as u64;
        let high = inner.free_regions > RESERVE_HIGH;
        self.publish_usage(inner);
        drop(guard);
        if high {
            self.wake_adjuster();
        }
    }

    /// Pages of regions in use that other regions have room for: what emptying the sparsest ones would give back.
    pub fn pages_to_spare(&self) -> u64 {
        self.inner.lock().pages_to_spare(&self.metrics)
    }

    /// No page at or above this one was ever handed out.
    pub fn touched_pages(&self) -> u32 {
        self.inner.lock().touched as u32 * REGION_PAGES
    }

    /// Isolates the region with the fewest pages in use that is not to be avoided (it is known by its first page), if the
    /// idle pages of the others have room for them. Returns its pages. Nothing is handed out from it until
    /// [`Arena::putback`]; one region is isolated at a time.
    pub fn isolate_sparsest(&self, avoid: impl Fn(u32) -> bool) -> Option<Range<u32>> {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        if inner.isolated.is_some() || inner.pages_to_spare(&self.metrics) == 0 {
            return None;
        }
        let first = |index: usize| index as u32 * REGION_PAGES;
        let eligible = |&index: &usize| inner.regions[index].used_pages > 0 && !avoid(first(index));
        let index = (0..inner.touched).filter(eligible).min_by_key(|&index| inner.regions[index].used_pages)?;
        inner.isolated = Some(index);
        inner.room[index] = 0;
        inner.limit_beside = inner.limit_pages.max(inner.used_pages) + MAX_CHAIN as u64;
        Some(first(index)..first(index) + REGION_PAGES)
    }

    /// Ends the isolation. Returns true if the region was emptied: [`Arena::adjust`] may give it back then.
    pub fn putback(&self) -> bool {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        let Some(index) = inner.isolated.take() else { return false };
        inner.room[index] = longest_free_run(&inner.regions[index].used);
        inner.first_with.iter_mut().for_each(|lowest| *lowest = index.min(*lowest));
        let emptied = inner.regions[index].used_pages == 0;
        inner.free_regions += u64::from(emptied);
        drop(guard);
        if emptied {
            self.wake_adjuster();
        }
        emptied
    }

    pub fn limit(&self) -> u64 {
        self.inner.lock().limit_pages
    }

    /// Changes the limit, in pages. Below what is in use it only stops growth.
    pub fn set_limit(&self, pages: u64) {
        self.inner.lock().limit_pages = pages;
        let bytes = pages.saturating_mul(PAGE_SIZE as u64);
        self.metrics.pool_limit_bytes.set(bytes);
        self.state.settings().limit_bytes.store(bytes, Relaxed);
        self.wake_adjuster();
    }

    fn publish_usage(&self, inner: &Inner) {
        let metrics: &Metrics = &self.metrics;
        let bytes = inner.used_pages * PAGE_SIZE as u64;
        metrics.pool_bytes.set(bytes);
        if bytes > metrics.pool_peak_bytes.get() {
            metrics.pool_peak_bytes.set(bytes);
            let regions = inner.touched * (size_of::<Region>() + 1);
            metrics.arena_metadata_bytes.set(regions as u64);
        }
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::reserve::PIECE_PAGES;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn arena(regions: u32, limit: u64) -> Arena {
        let state = Arc::new(State::create(1, regions * REGION_PAGES, 0, None).expect("state"));
        Arena::new(state, limit, SharedMetrics::new(None).expect("metrics")).expect("arena")
    }

    fn no_preparation(_: Range<u32>) -> Result<()> {
        Ok(())
    }

    /// As the pool does without an adjuster.
    fn alloc(arena: &Arena, pages: usize) -> Result<u32> {
        loop {
            match arena.alloc(pages) {
                Err(Error::NoRegion) if arena.ensure_region(no_preparation)? => {}
                result => return result,
            }
        }
    }

    fn free(arena: &Arena, first: u32, pages: usize) {
        arena.free(first, pages);
        if arena.has_too_much() {
            arena.adjust(no_preparation).expect("punched");
        }
    }

    proptest! {
        /// Against a set of pages: no page twice, none lost, runs inside one region, counts exact.
        #[test]
        fn runs_never_overlap(steps in prop::collection::vec((any::<bool>(), 1..=MAX_CHAIN, any::<prop::sample::Index>()), 1..600)) {
            let arena = arena(4, 1100);
            let mut taken = BTreeSet::new();
            let mut runs = Vec::new();
            for (allocate, pages, which) in steps {
                if allocate {
                    match alloc(&arena, pages) {
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
                    free(&arena, first, pages);
                    (first..first + pages as u32).for_each(|page| { taken.remove(&page); });
                }
                prop_assert_eq!(arena.metrics.pool_bytes.get(), (taken.len() * PAGE_SIZE) as u64);
            }
        }
    }

    #[test]
    fn memory_goes_back_to_the_system() {
        let arena = arena(10, 5120);
        let resident = || arena.state.resident_bytes() as usize / PAGE_SIZE;
        let runs: Vec<u32> = (0..500).map(|_| alloc(&arena, 8).expect("room")).collect();
        assert!(resident() >= 4000);
        runs.into_iter().for_each(|first| free(&arena, first, 8));
        let reserve = (RESERVE_HIGH * u64::from(REGION_PAGES)) as usize;
        assert_eq!(arena.metrics.backed_bytes.get() as usize, reserve * PAGE_SIZE);
        assert!(resident() <= reserve + 8, "{} pages still resident", resident());
    }

    #[test]
    fn an_isolated_region_is_not_in_reserve() {
        let arena = arena(3, 1536);
        let runs: Vec<u32> = (0..128).map(|_| alloc(&arena, 8).expect("room")).collect();
        runs.iter().filter(|&first| first % REGION_PAGES > 0).for_each(|&first| free(&arena, first, 8));
        let isolated = arena.isolate_sparsest(|_| false).expect("pages to spare");
        free(&arena, isolated.start, 8);
        while arena.alloc(8).is_ok() {}
        assert!(arena.ensure_region(no_preparation).expect("memory"));
        arena.alloc(8).expect("a region that is not isolated");
        assert!(arena.putback());
        arena.alloc(8).expect("the one that was");
    }

    #[test]
    fn pages_are_handed_out_only_from_backed_regions() {
        let arena = arena(2, 1024);
        for piece in 0..REGION_PAGES / PIECE_PAGES {
            assert!(matches!(arena.alloc(1), Err(Error::NoRegion)), "after {piece} pieces");
            assert!(arena.adjust(no_preparation).expect("memory"));
        }
        arena.alloc(8).expect("backed");
    }
}
