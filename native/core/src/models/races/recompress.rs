//! The recompressor, against all that may become of a page while it makes it smaller: as with a shrinker, the other one
//! always wins.

use super::{explore, join, spawn};
use crate::backing::{MemoryDisk, SEGMENT_BYTES};
use crate::codec::{Algorithm, Compression};
use crate::models::Kind::{self, Loose, Small};
use crate::models::{Swap, FOREVER};
use crate::pool::Allocator;
use crate::store::{Order, Recompressor, Tier, What};
use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

impl Swap {
    /// Makes all pages smaller that can be.
    fn recompress_all(&self) {
        // One is too dear to be made for every schedule, and what it remembers is no matter when it is through.
        thread_local! {
            static IDLE: RefCell<Option<Recompressor>> = const { RefCell::new(None) };
        }
        let idle = IDLE.with(|idle| idle.borrow_mut().take());
        let mut recompressor = idle.unwrap_or_else(|| Recompressor::new().expect("a recompressor"));
        let with = Compression { algorithm: Algorithm::Zstd, zstd_level: 1 };
        let tier = Tier { number: 1, with, dictionary: false };
        self.prepare(&mut recompressor, tier).expect("a tier");
        recompressor.begin_anew();
        self.recompress(&mut recompressor, &Order { tier, age: 0, pages: u64::MAX, processor_time: Duration::MAX });
        IDLE.with(|idle| *idle.borrow_mut() = Some(recompressor));
    }
}

/// One page that can be made smaller, of slot 0.
fn one_page() -> Arc<Swap> {
    let swap = Swap::new(Allocator::Zsmalloc, 3, 24);
    swap.write(0, Loose, 1);
    Arc::new(swap)
}

/// Recompresses in a thread of its own while `other` does something else. These pages are what must be read then, and
/// when both are through.
fn while_recompressing(swap: Arc<Swap>, last: &[(u32, Kind, u8)], other: impl FnOnce(&Swap)) {
    let recompressor = spawn({
        let swap = swap.clone();
        move || swap.recompress_all()
    });
    let read = || last.iter().for_each(|&(slot, kind, stamp)| assert_eq!(swap.read(slot, kind, &[stamp]), stamp));
    other(&swap);
    read();
    join(recompressor);
    read();
    swap.end();
}

/// Alone, so that the models below are of what they say.
#[test]
fn there_is_something_to_recompress() {
    explore(|| {
        let swap = one_page();
        swap.recompress_all();
        assert_eq!((swap.metrics().pages_zstd.get(), swap.metrics().pages_recompressed.get()), (1, 1));
        assert_eq!(swap.read(0, Loose, &[1]), 1);
        swap.end();
    });
}

/// What was written last is read, in every moment.
#[test]
fn overwrite_against_recompress() {
    explore(|| {
        while_recompressing(one_page(), &[(0, Loose, 9)], |swap| {
            swap.write(0, Loose, 9);
        });
    });
}

/// As before, and somebody else's page comes to lie where the old one was, were it not the recompressor's to free.
#[test]
fn overwrite_by_another_class_against_recompress() {
    explore(|| {
        while_recompressing(one_page(), &[(0, Small, 9), (2, Loose, 7)], |swap| {
            swap.write(0, Small, 9);
            swap.write(2, Loose, 7);
        });
    });
}

#[test]
fn free_against_recompress() {
    explore(|| {
        while_recompressing(one_page(), &[(0, Loose, 0)], |swap| {
            swap.free(0);
        });
    });
}

/// A reader finds its page whole, as it was or smaller.
#[test]
fn read_against_recompress() {
    explore(|| {
        while_recompressing(one_page(), &[(0, Loose, 1)], |_| ());
    });
}

/// An object that is being recompressed is not moved, and one that is being moved is not recompressed.
#[test]
fn compact_against_recompress() {
    explore(|| {
        let swap = Swap::new(Allocator::Zsmalloc, 4, 24);
        // Two zspages of which each has a page to spare.
        (0..4).for_each(|slot| swap.write(slot, if slot == 2 { Small } else { Loose }, slot as u8 + 1));
        [0, 3].into_iter().for_each(|slot| swap.free(slot));
        let swap = Arc::new(swap);
        while_recompressing(swap, &[(1, Loose, 2), (2, Small, 3)], |swap| {
            swap.compact();
        });
    });
}

/// A page is written back, or recompressed, or the one after the other: never both at once.
#[test]
fn writeback_against_recompress() {
    explore(|| {
        let swap = Swap::with_disk(3, 24, 4, MemoryDisk::new(4 * SEGMENT_BYTES));
        swap.set_promoting(false);
        swap.write(0, Loose, 1);
        while_recompressing(Arc::new(swap), &[(0, Loose, 1)], |swap| {
            swap.evict(What::Page(0));
        });
    });
}

/// When `destroy` returns nobody recompresses any more, and nothing is given back to the pool afterwards.
#[test]
fn destroy_against_recompress() {
    explore(|| {
        let swap = one_page();
        let recompressor = spawn({
            let swap = swap.clone();
            move || swap.recompress_all()
        });
        swap.0.reset();
        assert_eq!(swap.destroy(FOREVER).expect("the recompressor comes to its end"), vec![]);
        swap.assert_nothing_left();
        join(recompressor);
        swap.assert_nothing_left();
    });
}
