//! The cleaner, against all that may become of a page while its record is copied.

use super::{explore, join, spawn};
use crate::backing::{MemoryDisk, SEGMENT_BYTES};
use crate::models::Kind::Small;
use crate::models::{Swap, FOREVER};
use crate::store::What;
use std::sync::Arc;

/// The least that a disk may have: two segments with one small page each, of slots 0 and 1, leave one, and are to be
/// cleaned.
const SEGMENTS: usize = 3;

fn sparse_disk() -> Arc<Swap> {
    let swap = Swap::with_disk(3, 24, SEGMENTS, MemoryDisk::new(SEGMENTS * SEGMENT_BYTES));
    swap.set_promoting(false);
    for slot in 0..2 {
        swap.write(slot, Small, slot as u8 + 1);
        swap.evict(What::Page(slot));
    }
    Arc::new(swap)
}

/// Cleans in a thread of its own while `other` does something else; then slots 0 and 1 must read these pages.
fn while_cleaning(swap: Arc<Swap>, expected: [u8; 2], other: impl FnOnce(&Swap)) {
    let cleaner = spawn({
        let swap = swap.clone();
        move || swap.clean_up()
    });
    other(&swap);
    join(cleaner);
    for (slot, stamp) in (0..2).zip(expected) {
        swap.read(slot, Small, &[stamp]);
    }
    swap.end();
}

#[test]
fn there_is_something_to_clean() {
    explore(|| {
        let swap = sparse_disk();
        assert!(swap.wants_cleaning());
        swap.clean_up();
        let metrics = swap.metrics();
        assert_eq!((metrics.cleaned_segments.get(), metrics.pages_on_disk.get()), (2, 2));
        assert_eq!(metrics.backing_free_bytes.get(), 2 * SEGMENT_BYTES as u64);
        (0..2).for_each(|slot| assert_eq!(swap.read(slot, Small, &[slot as u8 + 1]), slot as u8 + 1));
        swap.end();
    });
}

#[test]
fn read_against_clean() {
    explore(|| {
        while_cleaning(sparse_disk(), [1, 2], |swap| {
            swap.read(0, Small, &[1]);
            swap.read(1, Small, &[2]);
        });
    });
}

#[test]
fn overwrite_against_clean() {
    explore(|| {
        while_cleaning(sparse_disk(), [9, 2], |swap| {
            swap.write(0, Small, 9);
            swap.read(0, Small, &[9]);
        });
    });
}

#[test]
fn free_against_clean() {
    explore(|| {
        while_cleaning(sparse_disk(), [0, 2], |swap| {
            swap.free(0);
            swap.read(0, Small, &[0]);
            swap.read(1, Small, &[2]);
        });
    });
}

/// The page comes back to the disk while its old record is being copied: not to the segment that is being cleaned,
/// where it would get the same location.
#[test]
fn overwrite_and_writeback_against_clean() {
    explore(|| {
        while_cleaning(sparse_disk(), [9, 9], |swap| {
            (0..2).for_each(|slot| swap.write(slot, Small, 9));
            swap.evict(What::Page(0));
            swap.read(0, Small, &[9]);
        });
    });
}

#[test]
fn promote_against_clean() {
    explore(|| {
        let swap = sparse_disk();
        swap.set_promoting(true);
        while_cleaning(swap, [1, 2], |swap| {
            swap.read(0, Small, &[1]);
        });
    });
}

/// When `destroy` returns nobody cleans any more, and nothing is given back to the disk afterwards.
#[test]
fn destroy_against_clean() {
    explore(|| {
        let swap = sparse_disk();
        let cleaner = spawn({
            let swap = swap.clone();
            move || swap.clean_up()
        });
        swap.0.reset();
        assert_eq!(swap.destroy(FOREVER).expect("the cleaner comes to its end"), vec![]);
        swap.assert_nothing_left();
        join(cleaner);
        swap.assert_nothing_left();
    });
}
