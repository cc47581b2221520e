//! The page map: to which zspage a page of the arena belongs, for who recovers the pool from its state.
//!
//! An entry has the size class + 1 in its low byte, and in its high byte how many pages before this one the zspage
//! begins. All entries of a zspage are written before its first object can be published, and never cleared: they are
//! believed only where a slot word leads to them, and an object of that slot and class lies there.
//!
//! A zspage is believed only if the entries of all of its pages agree. So two that are believed never overlap, whatever
//! stands there.

use super::class::ClassTable;
use super::REGION_PAGES;
use crate::crash::crash_point;
use crate::state::State;
use std::sync::atomic::Ordering::Relaxed;

fn entry(class: usize, back: usize) -> u16 {
    (back as u16) << 8 | (class as u16 + 1)
}

/// Notes a zspage, under the lock of its class.
///
/// Relaxed: the slot word that leads here is published later, with Release order.
pub fn note(state: &State, first: u32, class: usize, pages: usize) {
    let first = first as usize;
    for (back, noted) in state.page_map()[first..first + pages].iter().enumerate() {
        crash_point("page map");
        noted.store(entry(class, back), Relaxed);
    }
    crash_point("page map written");
}

/// First page and class of the zspage that a page belongs to, as it was noted.
pub fn zspage_of(state: &State, table: &ClassTable, page: u32) -> Option<(u32, usize)> {
    let map = state.page_map();
    let noted = map.get(page as usize)?.load(Relaxed);
    let class = usize::from(noted & 0xff).checked_sub(1)?;
    let pages = table.classes().get(class)?.pages;
    let first = page.checked_sub(u32::from(noted >> 8))?;
    let all = map.get(first as usize..first as usize + pages)?;
    let agree = all.iter().enumerate().all(|(back, noted)| noted.load(Relaxed) == entry(class, back));
    // No zspage reaches beyond its region.
    let inside = first % REGION_PAGES + pages as u32 <= REGION_PAGES;
    (agree && inside && page - first < pages as u32).then_some((first, class))
}
