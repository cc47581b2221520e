//! Pages that are alike come to share one, while they are read, written and given up; and who gives up the last reference,
//! against all that may be done to what is shared.

use super::{explore, join, spawn};
use crate::backing::{MemoryDisk, SEGMENT_BYTES};
use crate::codec::{Algorithm, Compression};
use crate::models::Kind::Small;
use crate::models::{Swap, FOREVER};
use crate::pool::Allocator;
use crate::store::{Order, Recompressor, Tier, What};
use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

thread_local! {
    /// One is too dear to be made for every schedule.
    static IDLE: RefCell<Option<Recompressor>> = const { RefCell::new(None) };
}

/// One that knows no page.
fn recompressor(swap: &Swap) -> Recompressor {
    let idle = IDLE.with(|idle| idle.borrow_mut().take());
    let mut recompressor = idle.unwrap_or_else(|| Recompressor::new().expect("a recompressor"));
    swap.prepare_duplicates(&mut recompressor, false);
    recompressor
}

fn share(swap: &Swap, recompressor: &mut Recompressor) {
    let with = Compression { algorithm: Algorithm::Lz4, zstd_level: 1 };
    let tier = Tier { number: 1, with, dictionary: false };
    swap.prepare(recompressor, tier).expect("a tier");
    swap.prepare_duplicates(recompressor, true);
    recompressor.begin_anew();
    swap.recompress(recompressor, &Order { tier, age: 0, pages: u64::MAX, processor_time: Duration::MAX });
}

/// So many slots, the first of which hold the same page.
fn alike(swap: Swap, pages: u32) -> Arc<Swap> {
    (0..pages).for_each(|slot| swap.write(slot, Small, 1));
    Arc::new(swap)
}

fn two_alike() -> Arc<Swap> {
    alike(Swap::new(Allocator::Zsmalloc, 3, 24), 2)
}

/// The same, which share one already; and who knows that.
fn two_shared(swap: Swap) -> (Arc<Swap>, Recompressor) {
    let swap = alike(swap, 2);
    let mut recompressor = recompressor(&swap);
    share(&swap, &mut recompressor);
    assert_eq!((swap.metrics().pages_shared.get(), swap.metrics().shared_pages.get()), (2, 1));
    (swap, recompressor)
}

fn in_memory() -> Swap {
    Swap::new(Allocator::Zsmalloc, 3, 24)
}

/// Shares in a thread of its own while `other` does something else. These pages are what must be read then, and when both
/// are through.
fn while_sharing(swap: Arc<Swap>, by: Recompressor, last: &[(u32, u8)], other: impl FnOnce(&Swap)) {
    let sharer = spawn({
        let swap = swap.clone();
        let mut by = by;
        move || {
            share(&swap, &mut by);
            by
        }
    });
    let read = || last.iter().for_each(|&(slot, stamp)| assert_eq!(swap.read(slot, Small, &[stamp]), stamp));
    other(&swap);
    read();
    let by = join(sharer);
    read();
    IDLE.with(|idle| *idle.borrow_mut() = Some(by));
    swap.end();
}

/// Alone, so that the models below are of what they say.
#[test]
fn there_is_something_to_share() {
    explore(|| {
        let (swap, recompressor) = two_shared(in_memory());
        [0, 1].into_iter().for_each(|slot| assert_eq!(swap.read(slot, Small, &[1]), 1));
        swap.write(0, Small, 2);
        assert_eq!((swap.read(0, Small, &[2]), swap.read(1, Small, &[1])), (2, 1));
        IDLE.with(|idle| *idle.borrow_mut() = Some(recompressor));
        swap.end();
    });
}

/// The first is the candidate, the second the one that is looked for: what was written last is read, whichever it is.
#[test]
fn overwrite_against_share() {
    for slot in 0..2 {
        explore(move || {
            let swap = two_alike();
            let by = recompressor(&swap);
            while_sharing(swap, by, &[(slot, 9), (1 - slot, 1)], |swap| swap.write(slot, Small, 9));
        });
    }
}

/// As before, and somebody else's page comes to lie where the old one was, were it not the recompressor's to free.
#[test]
fn free_and_write_against_share() {
    explore(|| {
        let swap = two_alike();
        let by = recompressor(&swap);
        while_sharing(swap, by, &[(0, 0), (1, 1), (2, 7)], |swap| {
            swap.free(0);
            swap.write(2, Small, 7);
        });
    });
}

/// A reader finds its page whole, its own or the shared one.
#[test]
fn read_against_share() {
    explore(|| {
        let swap = two_alike();
        let by = recompressor(&swap);
        while_sharing(swap, by, &[(1, 1), (0, 1)], |_| ());
    });
}

/// A reference is taken while the last ones are put: who has got it has the page.
#[test]
fn last_put_against_take() {
    explore(|| {
        let (swap, by) = two_shared(in_memory());
        swap.write(2, Small, 1);
        while_sharing(swap, by, &[(0, 0), (1, 0), (2, 1)], |swap| {
            swap.free(0);
            swap.free(1);
        });
    });
}

/// Runs `this` in a thread of its own beside `other`, on two slots that share a page; nothing is left of it.
fn beside(swap: fn() -> Swap, this: fn(&Swap), other: fn(&Swap)) {
    explore(move || {
        let (swap, recompressor) = two_shared(swap());
        IDLE.with(|idle| *idle.borrow_mut() = Some(recompressor));
        let thread = spawn({
            let swap = swap.clone();
            move || this(&swap)
        });
        other(&swap);
        join(thread);
        swap.end();
    });
}

fn free_both(swap: &Swap) {
    swap.free(0);
    swap.free(1);
}

/// One of the two is the last, and sees to the page.
#[test]
fn put_against_put() {
    beside(in_memory, |swap| swap.free(0), |swap| swap.free(1));
}

/// What is read stays until it is read.
#[test]
fn last_put_against_read() {
    let read = |swap: &Swap| {
        swap.read(0, Small, &[1, 0]);
    };
    beside(in_memory, read, free_both);
}

#[test]
fn last_put_against_compact() {
    let sparse = || {
        let swap = Swap::new(Allocator::Zsmalloc, 3, 24);
        swap.write(2, Small, 3);
        swap
    };
    let compact = |swap: &Swap| {
        swap.compact();
    };
    beside(sparse, compact, free_both);
}

/// Who writes it back frees the object, and whoever empties the slot the record, or neither is made.
#[test]
fn last_put_against_writeback() {
    let on_disk = || {
        let swap = Swap::with_disk(3, 24, 4, MemoryDisk::new(4 * SEGMENT_BYTES));
        swap.set_promoting(false);
        swap
    };
    beside(on_disk, |swap| swap.evict(What::All), free_both);
}

/// When `destroy` returns nothing that is shared is left.
#[test]
fn destroy_against_share() {
    explore(|| {
        let swap = two_alike();
        let mut by = recompressor(&swap);
        let sharer = spawn({
            let swap = swap.clone();
            move || {
                share(&swap, &mut by);
                by
            }
        });
        swap.0.reset();
        assert_eq!(swap.destroy(FOREVER).expect("the recompressor comes to its end"), vec![]);
        swap.assert_nothing_left();
        let by = join(sharer);
        swap.assert_nothing_left();
        IDLE.with(|idle| *idle.borrow_mut() = Some(by));
    });
}
