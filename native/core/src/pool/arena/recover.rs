//! Which regions have memory, and which pages are in use, found out anew.

use super::{longest_free_run, Arena, REGION_PAGES};
use crate::error::Result;
use crate::page::PAGE_SIZE;
use std::ops::Range;

fn pages_of(region: usize) -> Range<u32> {
    let first = region as u32 * REGION_PAGES;
    first..first + REGION_PAGES
}

impl Arena {
    /// Finds the regions that have memory, before the first [`Arena::claim`]: whoever looks into another one takes
    /// memory. Maps them, and has them prepared as [`Arena::adjust`] does.
    ///
    /// Takes what `prepare` takes, and page tables. Errors: [`crate::error::Error::System`].
    pub fn find_backed(&self, prepare: impl Fn(Range<u32>) -> Result<()>) -> Result<()> {
        self.resident_regions(|region, pages| {
            prepare(pages_of(region))?;
            if pages == REGION_PAGES {
                self.state.map_resident(pages_of(region).start, REGION_PAGES)?;
            }
            let mut inner = self.inner.lock();
            inner.regions[region].backed = true;
            inner.touched = region + 1;
            Ok(())
        })
    }

    pub fn is_backed(&self, page: u32) -> bool {
        self.inner.lock().regions.get((page / REGION_PAGES) as usize).is_some_and(|region| region.backed)
    }

    /// Takes the pages of a zspage that is there, which must lie in one region. False, with nothing changed, if one of
    /// them is taken already, or has no memory.
    pub fn claim(&self, first: u32, pages: usize) -> bool {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        let Some(region) = inner.regions.get_mut((first / REGION_PAGES) as usize) else { return false };
        let within = (first % REGION_PAGES) as usize..(first % REGION_PAGES) as usize + pages;
        let free = |page: usize| region.used[page / 64] >> (page % 64) & 1 == 0;
        if !region.backed || within.end > REGION_PAGES as usize || !within.clone().all(free) {
            return false;
        }
        within.for_each(|page| region.used[page / 64] |= 1 << (page % 64));
        region.used_pages += pages as u32;
        inner.used_pages += pages as u64;
        true
    }

    /// After the last [`Arena::claim`]. A region that has memory for some of its pages only was on its way, in or out:
    /// then nothing of it is in use, and it is given back; or else, after damage, given the rest.
    ///
    /// Errors: [`crate::error::Error::System`].
    pub fn end_recovery(&self) -> Result<()> {
        self.resident_regions(|region, pages| {
            if pages == REGION_PAGES {
                return Ok(());
            }
            let first = pages_of(region).start;
            let in_use = self.inner.lock().regions[region].used_pages > 0;
            match in_use {
                true => self.state.populate(first, REGION_PAGES)?,
                false => self.state.punch(first, REGION_PAGES)?,
            }
            self.inner.lock().regions[region].backed = in_use;
            Ok(())
        })?;
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        let mut backed = 0;
        for index in 0..inner.touched {
            let region = &inner.regions[index];
            if region.backed {
                backed += 1;
                inner.free_regions += u64::from(region.used_pages == 0);
                inner.room[index] = longest_free_run(&region.used);
            }
        }
        self.metrics.backed_bytes.set(backed * u64::from(REGION_PAGES) * PAGE_SIZE as u64);
        self.publish_usage(inner);
        Ok(())
    }

    /// Shows the regions that have memory, in order, and for how many of their pages.
    fn resident_regions(&self, mut see: impl FnMut(usize, u32) -> Result<()>) -> Result<()> {
        let (mut region, mut pages, mut next) = (0, 0, 0);
        while let Some(resident) = self.state.next_resident(next)? {
            next = resident.start;
            while next < resident.end {
                let this = (next / REGION_PAGES) as usize;
                if this != region && pages > 0 {
                    see(region, std::mem::take(&mut pages))?;
                }
                region = this;
                let end = resident.end.min(pages_of(region).end);
                pages += end - next;
                next = end;
            }
        }
        if pages > 0 {
            see(region, pages)?;
        }
        Ok(())
    }
}
