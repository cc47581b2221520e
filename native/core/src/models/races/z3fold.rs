//! z3fold, whose pages are counted by references: no lock is held while the objects of one are moved.

use super::{explore, join, spawn};
use crate::models::Kind::{Large, Small};
use crate::models::Swap;
use crate::pool::Allocator::Z3fold;
use std::sync::Arc;

/// Two pages, of slots 0 and 1 and of slots 2 and 3, with one object left on each: compaction moves that of the second.
fn sparse_pages() -> Arc<Swap> {
    let swap = Swap::new(Z3fold, 6, 24);
    (0..4).for_each(|slot| swap.write(slot, Small, slot as u8 + 1));
    [1, 3].into_iter().for_each(|slot| swap.free(slot));
    Arc::new(swap)
}

/// Two regions with one large object each: migration moves that of slot 0 to the region of slot 4.
fn sparse_regions() -> Arc<Swap> {
    let swap = Swap::new(Z3fold, 6, 24);
    (0..5).for_each(|slot| swap.write(slot, Large, slot as u8 + 1));
    (1..4).for_each(|slot| swap.free(slot));
    Arc::new(swap)
}

/// Moves objects in a thread of its own while `other` does something else. Then takes the pages that are free for
/// something else, and what is on a list, of which none may be free; and ends the store.
fn while_moving(swap: Arc<Swap>, other: impl FnOnce(&Swap)) {
    let mover = spawn({
        let swap = swap.clone();
        move || swap.compact()
    });
    other(&swap);
    join(mover);
    let written = [(5, Large, 11), (1, Small, 7), (3, Small, 9)];
    for (slot, kind, stamp) in written {
        swap.write(slot, kind, stamp);
    }
    for (slot, kind, stamp) in written {
        swap.read(slot, kind, &[stamp]);
    }
    swap.end();
}

/// Alone, so that the models below are of what they say.
#[test]
fn there_is_something_to_move() {
    explore(|| {
        let swap = sparse_pages();
        assert_eq!(swap.compact(), 1);
        assert_eq!(swap.metrics().pool_bytes.get(), 4096);
        let swap = sparse_regions();
        swap.compact();
        assert_eq!(swap.metrics().backed_bytes.get(), 2 * 8 * 4096);
        swap.end();
    });
}

/// The last object of a page is freed while the page is emptied: it is given back once, and is on no list then.
#[test]
fn free_against_compact() {
    explore(|| {
        while_moving(sparse_pages(), |swap| {
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

/// A reader finds its page whole, wherever it is.
#[test]
fn read_against_compact() {
    explore(|| {
        while_moving(sparse_pages(), |swap| {
            swap.read(2, Small, &[3]);
        });
    });
}

/// The place that the object has left, in a region that is in use again, is written to at once.
#[test]
fn read_against_migrate() {
    explore(|| {
        let swap = sparse_regions();
        let mover = spawn({
            let swap = swap.clone();
            move || {
                swap.compact();
                swap.write(5, Large, 9);
            }
        });
        swap.read(0, Large, &[1]);
        join(mover);
        swap.read(5, Large, &[9]);
        swap.end();
    });
}

/// The new page is published, or the old one's object is moved first: of the two copies that there may be one stays.
#[test]
fn overwrite_against_compact() {
    explore(|| {
        while_moving(sparse_pages(), |swap| {
            swap.write(2, Large, 9);
            swap.read(2, Large, &[9]);
        });
    });
}

/// The place beside the object that is moved is taken: its page stays then.
#[test]
fn alloc_against_compact() {
    explore(|| {
        while_moving(sparse_pages(), |swap| {
            swap.write(4, Small, 9);
            swap.read(4, Small, &[9]);
        });
    });
}

/// Each of two movers would move what the other one moves. A reader that finds an object gone finds its copy.
#[test]
fn compact_against_compact() {
    explore(|| {
        while_moving(sparse_pages(), |swap| {
            swap.compact();
            swap.read(0, Small, &[1]);
            swap.read(2, Small, &[3]);
        });
    });
}

/// When `destroy` returns nothing lives any more, and nothing is given back to the arena afterwards.
#[test]
fn destroy_against_compact() {
    explore(|| destroy_while_moving(sparse_pages()));
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
    join(mover);
    swap.assert_nothing_left();
}
