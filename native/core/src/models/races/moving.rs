//! What moves objects, against what reads, writes and frees them.

use super::{explore, join, spawn};
use crate::metrics::SharedMetrics;
use crate::models::Kind::{self, Large, Small};
use crate::models::{page, with_scratch, Swap};
use crate::page::PAGE_SIZE;
use crate::pool::Allocator::Zsmalloc;
use crate::pool::{Location, Pool};
use crate::state::State;
use crate::store::Detached;
use crate::sync::{AtomicBool, Ordering::Relaxed};
use std::sync::Arc;

impl Swap {
    pub(super) fn write(&self, slot: u32, kind: Kind, stamp: u8) {
        with_scratch(|scratch| self.store(slot, &page(kind, stamp), self.0.compression(), scratch)).expect("room");
    }

    /// Reads a page that has to be one of these, or empty (0), and returns which.
    pub(super) fn read(&self, slot: u32, kind: Kind, stamps: &[u8]) -> u8 {
        let mut bytes = [0xff; PAGE_SIZE];
        let read = with_scratch(|scratch| self.load(slot, &mut bytes, scratch));
        read.unwrap_or_else(|error| panic!("slot {slot}: {error}"));
        let stamp = bytes[0];
        assert!(stamps.contains(&stamp), "slot {slot} reads page {stamp}, not one of {stamps:?}");
        let whole = if stamp == 0 { [0; PAGE_SIZE] } else { page(kind, stamp) };
        assert!(bytes == whole, "slot {slot} is torn");
        stamp
    }

    pub(super) fn free(&self, slot: u32) {
        self.discard(u64::from(slot)..u64::from(slot) + 1, &mut Detached::with_capacity(0));
    }
}

/// Two zspages, of slots 0 and 1 and of slots 2 and 3, with one small object left in each: compaction moves that of the
/// second one.
fn sparse_class(freed: [u32; 2]) -> Arc<Swap> {
    let swap = Swap::new(Zsmalloc, 5, 24);
    (0..4).for_each(|slot| swap.write(slot, Small, slot as u8 + 1));
    freed.into_iter().for_each(|slot| swap.free(slot));
    Arc::new(swap)
}

/// Two regions with one large object each: migration moves that of slot 0 to the region of slot 4.
fn sparse_regions() -> Arc<Swap> {
    let swap = Swap::new(Zsmalloc, 5, 24);
    (0..5).for_each(|slot| swap.write(slot, Large, slot as u8 + 1));
    (1..4).for_each(|slot| swap.free(slot));
    Arc::new(swap)
}

/// Moves objects in a thread of its own while `other` does something else, then ends the store.
fn while_moving(swap: Arc<Swap>, other: impl FnOnce(&Swap)) {
    let mover = spawn({
        let swap = swap.clone();
        move || swap.compact()
    });
    other(&swap);
    join(mover);
    swap.end();
}

/// Alone, so that the models below are of what they say.
#[test]
fn there_is_something_to_move() {
    explore(|| {
        let swap = sparse_class([1, 3]);
        assert_eq!(swap.compact(), 1);
        assert_eq!(swap.metrics().pool_bytes.get(), 4096);
        let swap = sparse_regions();
        swap.compact();
        assert_eq!(swap.metrics().backed_bytes.get(), 2 * 8 * 4096);
        swap.end();
    });
}

/// The zspage that is to be emptied is freed by somebody else first, and its place used for one of another class.
#[test]
fn reuse_by_another_class_against_compact() {
    explore(|| {
        while_moving(sparse_class([1, 3]), |swap| {
            swap.free(2);
            swap.write(4, Large, 9);
            swap.read(4, Large, &[9]);
        });
    });
}

/// A reader finds its page whole, wherever it is.
#[test]
fn read_against_compact() {
    explore(|| {
        while_moving(sparse_class([1, 3]), |swap| {
            swap.read(2, Small, &[3]);
        });
    });
}

#[test]
fn read_against_migrate() {
    explore(|| {
        while_moving(sparse_regions(), |swap| {
            swap.read(0, Large, &[1]);
        });
    });
}

/// As before, and the place that the object has left is used again at once: for its class, or for another one.
#[test]
fn read_against_compact_and_reuse() {
    explore(|| read_while_moving_and_writing(sparse_class([1, 3]), 2, Small));
}

#[test]
fn read_against_compact_and_reuse_by_another_class() {
    explore(|| read_while_moving_and_writing(sparse_class([0, 2]), 3, Large));
}

fn read_while_moving_and_writing(swap: Arc<Swap>, moved: u32, written: Kind) {
    let mover = spawn({
        let swap = swap.clone();
        move || {
            swap.compact();
            swap.write(4, written, 9);
        }
    });
    swap.read(moved, Small, &[moved as u8 + 1]);
    join(mover);
    swap.read(4, written, &[9]);
    swap.end();
}

/// As before, and the other object of the zspage that it is moved to is freed meanwhile.
#[test]
fn read_against_compact_and_free() {
    explore(|| {
        let swap = sparse_class([1, 3]);
        let freeing = spawn({
            let swap = swap.clone();
            move || swap.free(0)
        });
        while_moving(swap, |swap| {
            swap.read(2, Small, &[3]);
            join(freeing);
        });
    });
}

/// The new page is published, or the old one's object is moved first: no object is lost, and none is freed twice. (The
/// new one is of another class: it does not keep the mover out by being pinned beside the old one.)
#[test]
fn overwrite_against_compact() {
    explore(|| {
        while_moving(sparse_class([1, 3]), |swap| {
            swap.write(2, Large, 9);
            swap.read(2, Large, &[9]);
        });
    });
}

#[test]
fn overwrite_against_migrate() {
    explore(|| {
        while_moving(sparse_regions(), |swap| {
            swap.write(0, Small, 9);
            swap.read(0, Small, &[9]);
        });
    });
}

#[test]
fn free_against_compact() {
    explore(|| {
        while_moving(sparse_class([1, 3]), |swap| {
            swap.free(2);
            swap.read(2, Small, &[0]);
        });
    });
}

#[test]
fn free_against_migrate() {
    explore(|| {
        while_moving(sparse_regions(), |swap| {
            swap.free(0);
            swap.read(0, Large, &[0]);
        });
    });
}

/// A mover does not look at the bytes of an object while they are written, and does not move it before a slot names it.
#[test]
fn alloc_against_migrate() {
    explore(|| {
        let swap = sparse_regions();
        // Its first region is free then; with the new object it is the sparsest.
        swap.free(0);
        while_moving(swap, |swap| {
            swap.write(1, Large, 9);
            swap.read(1, Large, &[9]);
        });
    });
}

#[test]
fn alloc_against_compact() {
    explore(|| {
        while_moving(sparse_class([1, 3]), |swap| {
            swap.write(4, Small, 9);
            swap.read(4, Small, &[9]);
        });
    });
}

/// When `destroy` returns nothing lives any more, and nothing is given back to the arena afterwards, nor by the arena.
#[test]
fn destroy_against_compact() {
    explore(|| destroy_while_moving(sparse_class([1, 3])));
}

#[test]
fn destroy_against_migrate() {
    explore(|| destroy_while_moving(sparse_regions()));
}

fn destroy_while_moving(swap: Arc<Swap>) {
    let mover = spawn({
        let swap = swap.clone();
        move || swap.compact()
    });
    swap.end();
    let backed = swap.metrics().backed_bytes.get();
    join(mover);
    swap.assert_nothing_left();
    assert_eq!(swap.metrics().backed_bytes.get(), backed, "a region is put back after the end");
}

/// A pool without a store: two zspages with one object each, at these locations.
fn sparse_pool() -> (Arc<Pool>, [Location; 2]) {
    let state = Arc::new(State::create(1, 24, 0, None).expect("state"));
    let pool = Pool::new(state, Zsmalloc, 1 << 20, SharedMetrics::new(None).expect("metrics")).expect("a pool");
    let objects = [0; 4].map(|_| pool.insert(100, |object| object.fill(1)).expect("room").location());
    pool.free(objects[1]);
    pool.free(objects[3]);
    (Arc::new(pool), [objects[0], objects[2]])
}

/// An object that was pinned was there, and stays there.
#[test]
fn pin_against_compact() {
    explore(|| {
        let (pool, [_, moving]) = sparse_pool();
        let moved = Arc::new(AtomicBool::new(false));
        let mover = spawn({
            let (pool, moved) = (pool.clone(), moved.clone());
            move || {
                pool.compact(&|_: &[u8], from, _| {
                    if from == moving {
                        moved.store(true, Relaxed);
                    }
                    true
                })
            }
        });
        if let Some(pinned) = pool.pin(moving) {
            // SAFETY: pinned, and nobody frees it.
            assert_eq!(unsafe { pinned.bytes() }[0], 1);
            assert!(!moved.load(Relaxed), "an object was pinned where it no longer is");
        }
        join(mover);
    });
}

/// Somebody who has an object pinned may wait for the lock of a class, which a mover holds: so the mover waits for none.
#[test]
fn a_mover_waits_for_no_reader() {
    explore(|| {
        let (pool, [other, moving]) = sparse_pool();
        let mover = spawn({
            let pool = pool.clone();
            move || pool.compact(&|_: &[u8], _, _| false)
        });
        let pinned = pool.pin(moving).expect("an object");
        pool.free(other);
        drop(pinned);
        join(mover);
    });
}
