//! A shrinker, against all that may become of a page while it is copied and written: "a concurrent overwrite, read,
//! discard or teardown always wins".

use super::{explore, join, spawn};
use crate::backing::{Faults, MemoryDisk, SEGMENT_BYTES};
use crate::error::Error;
use crate::models::Kind::{self, Large, Small};
use crate::models::{page, with_scratch, Swap, FOREVER};
use crate::store::What;
use std::sync::Arc;

const SEGMENTS: usize = 4;

fn disk() -> MemoryDisk {
    MemoryDisk::new(SEGMENTS * SEGMENT_BYTES)
}

/// Two pages in one zspage, of slots 0 and 1.
fn two_pages() -> Arc<Swap> {
    let swap = Swap::with_disk(3, 24, SEGMENTS, disk());
    swap.set_promoting(false);
    (0..2).for_each(|slot| swap.write(slot, Small, slot as u8 + 1));
    Arc::new(swap)
}

/// The same on a disk whose writes fail.
fn two_pages_on_a_bad_disk() -> Arc<Swap> {
    let swap = Swap::with_disk(3, 24, SEGMENTS, Faults::new(disk(), "write:1-:eio").expect("a rule"));
    (0..2).for_each(|slot| swap.write(slot, Small, slot as u8 + 1));
    Arc::new(swap)
}

/// Writes pages back in a thread of its own while `other` does something else. These pages are what must be read then,
/// and when both are through.
fn while_evicting(swap: Arc<Swap>, what: What, last: &[(u32, Kind, u8)], other: impl FnOnce(&Swap)) {
    let shrinker = spawn({
        let swap = swap.clone();
        move || swap.evict(what)
    });
    let read = || last.iter().for_each(|&(slot, kind, stamp)| assert_eq!(swap.read(slot, kind, &[stamp]), stamp));
    other(&swap);
    read();
    join(shrinker);
    read();
    swap.end();
}

const COLDEST: What = What::Coldest { bytes: 1 };

/// Alone, so that the models below are of what they say.
#[test]
fn there_is_something_to_write_back() {
    explore(|| {
        let swap = two_pages();
        swap.evict(COLDEST);
        assert_eq!((swap.metrics().pages_on_disk.get(), swap.metrics().pages_lz4.get()), (1, 1));
        swap.evict(What::All);
        assert_eq!((swap.metrics().pages_on_disk.get(), swap.metrics().pool_bytes.get()), (2, 0));
        [0, 1].into_iter().for_each(|slot| assert_eq!(swap.read(slot, Small, &[slot as u8 + 1]), slot as u8 + 1));
        swap.end();
    });
}

/// What was written last is read, in every moment.
#[test]
fn overwrite_against_writeback() {
    explore(|| {
        while_evicting(two_pages(), COLDEST, &[(0, Small, 9)], |swap| {
            swap.write(0, Small, 9);
        });
    });
}

/// As before, and the object of the old page is where it was: the shrinker frees it, and nobody else.
#[test]
fn overwrite_by_another_class_against_writeback() {
    explore(|| {
        while_evicting(two_pages(), COLDEST, &[(0, Large, 9), (2, Small, 7)], |swap| {
            swap.write(0, Large, 9);
            swap.write(2, Small, 7);
        });
    });
}

#[test]
fn free_against_writeback() {
    explore(|| {
        while_evicting(two_pages(), COLDEST, &[(0, Small, 0)], |swap| {
            swap.free(0);
        });
    });
}

/// A reader finds its page whole, in the pool or on the disk.
#[test]
fn read_against_writeback() {
    explore(|| {
        while_evicting(two_pages(), What::All, &[(0, Small, 1), (1, Small, 2)], |_| ());
    });
}

/// Two shrinkers never take the same page.
#[test]
fn writeback_against_writeback() {
    explore(|| {
        while_evicting(two_pages(), What::All, &[(0, Small, 1)], |swap| {
            swap.evict(COLDEST);
        });
    });
}

/// An object that is being written back is not moved, and one that is being moved is not written back.
#[test]
fn compact_against_writeback() {
    explore(|| {
        let swap = Swap::with_disk(5, 24, SEGMENTS, disk());
        swap.set_promoting(false);
        (0..4).for_each(|slot| swap.write(slot, Small, slot as u8 + 1));
        [1, 3].into_iter().for_each(|slot| swap.free(slot));
        let swap = Arc::new(swap);
        while_evicting(swap, What::Page(2), &[(2, Small, 3)], |swap| {
            swap.compact();
        });
    });
}

/// A page is on its way to the last segment that is free: who finds the pool full has to wait for its room, from the first
/// moment to the last.
#[test]
fn store_against_the_last_writeback() {
    explore(|| {
        const LEAST: usize = 3;
        let swap = Arc::new(Swap::with_disk(3, 2, LEAST, MemoryDisk::new(LEAST * SEGMENT_BYTES)));
        swap.set_promoting(false);
        swap.write(0, Large, 1);
        swap.evict(What::Page(0));
        swap.write(1, Large, 2);
        let shrinker = spawn({
            let swap = swap.clone();
            move || swap.evict(What::Page(1))
        });
        let compression = swap.0.compression();
        let stored = with_scratch(|scratch| swap.store(2, &page(Large, 3), compression, scratch));
        assert!(matches!(stored, Ok(()) | Err(Error::NoRoomYet)), "refused: {stored:?}");
        join(shrinker);
        swap.write(2, Large, 3);
        (0..3).for_each(|slot| assert_eq!(swap.read(slot, Large, &[slot as u8 + 1]), slot as u8 + 1));
        swap.end();
    });
}

/// What could not be written stays, and whoever has overwritten it meanwhile is not undone.
#[test]
fn overwrite_against_a_writeback_that_fails() {
    explore(|| {
        while_evicting(two_pages_on_a_bad_disk(), What::Page(0), &[(0, Small, 9), (1, Small, 2)], |swap| {
            swap.write(0, Small, 9);
        });
    });
}

/// A page that could not be written back is still among those that are looked at.
#[test]
fn a_page_that_failed_is_found_again() {
    explore(|| {
        let swap = two_pages_on_a_bad_disk();
        let shrinker = spawn({
            let swap = swap.clone();
            move || swap.evict(COLDEST)
        });
        swap.free(1);
        join(shrinker);
        assert!(swap.can_make_room(), "a page is in the pool, and nobody finds it");
        swap.read(0, Small, &[1]);
        swap.end();
    });
}

/// When `destroy` returns nobody writes back any more, and nothing is given back to the pool or the disk afterwards.
#[test]
fn destroy_against_writeback() {
    explore(|| {
        let swap = two_pages();
        let shrinker = spawn({
            let swap = swap.clone();
            move || swap.evict(COLDEST)
        });
        swap.0.reset();
        assert_eq!(swap.destroy(FOREVER).expect("the shrinker comes to its end"), vec![]);
        swap.assert_nothing_left();
        join(shrinker);
        swap.assert_nothing_left();
    });
}

/// A page that is read from the disk moves to the pool, or it is gone, or it is another one: never two of these.
#[test]
fn free_against_promote() {
    explore(|| {
        let swap = two_pages();
        swap.evict(What::Page(0));
        swap.set_promoting(true);
        let reader = spawn({
            let swap = swap.clone();
            move || swap.read(0, Small, &[0, 1])
        });
        swap.free(0);
        swap.read(0, Small, &[0]);
        join(reader);
        swap.read(0, Small, &[0]);
        swap.end();
    });
}

#[test]
fn overwrite_against_promote() {
    explore(|| {
        let swap = two_pages();
        swap.evict(What::Page(0));
        swap.set_promoting(true);
        let reader = spawn({
            let swap = swap.clone();
            move || swap.read(0, Small, &[1, 9])
        });
        swap.write(0, Small, 9);
        join(reader);
        swap.read(0, Small, &[9]);
        swap.end();
    });
}
