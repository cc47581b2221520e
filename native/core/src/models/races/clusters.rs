//! Clusters of cold pages, against what may become of one of the four: each slot word is for itself.

use super::{explore, join, spawn};
use crate::backing::{MemoryDisk, SEGMENT_BYTES};
use crate::models::Kind::{Loose, Small};
use crate::models::Swap;
use std::sync::Arc;

const SEGMENTS: usize = 3;

/// Four pages that are neighbours, in the pool.
fn four_pages() -> Arc<Swap> {
    let swap = Swap::with_disk(8, 24, SEGMENTS, MemoryDisk::new(SEGMENTS * SEGMENT_BYTES));
    swap.set_promoting(false);
    (0..4).for_each(|slot| swap.write(slot, Small, slot as u8 + 1));
    Arc::new(swap)
}

/// They go to the disk while `other` changes slot 0, which must read `last` in the end; the others what they did.
fn while_clustering(last: u8, other: impl FnOnce(&Swap)) {
    let swap = four_pages();
    let shrinker = spawn({
        let swap = swap.clone();
        move || swap.evict_cold()
    });
    other(&swap);
    join(shrinker);
    for (slot, stamp) in [(0, last), (1, 2), (3, 4)] {
        swap.read(slot, Small, &[stamp]);
    }
    swap.end();
}

/// Alone, so that the models below are of what they say.
#[test]
fn there_is_a_cluster() {
    explore(|| {
        let swap = four_pages();
        swap.evict_cold();
        assert_eq!((swap.metrics().pages_on_disk.get(), swap.metrics().pages_in_clusters.get()), (4, 4));
        (0..4).for_each(|slot| assert_eq!(swap.read(slot, Small, &[slot as u8 + 1]), slot as u8 + 1));
        swap.end();
    });
}

#[test]
fn overwrite_against_cluster() {
    explore(|| {
        while_clustering(9, |swap| {
            swap.write(0, Small, 9);
            swap.read(0, Small, &[9]);
        });
    });
}

#[test]
fn free_against_cluster() {
    explore(|| {
        while_clustering(0, |swap| {
            swap.free(0);
            swap.read(0, Small, &[0]);
        });
    });
}

/// Whoever reads one of the four finds it in the pool, or in the record.
#[test]
fn read_against_cluster() {
    explore(|| {
        while_clustering(1, |swap| {
            swap.read(0, Small, &[1]);
        });
    });
}

/// Two pages leave their cluster at the same time: each gives back its own share.
#[test]
fn free_against_free() {
    explore(|| {
        let swap = four_pages();
        swap.evict_cold();
        let other = spawn({
            let swap = swap.clone();
            move || swap.free(1)
        });
        swap.free(0);
        join(other);
        for (slot, stamp) in [(0, 0), (1, 0), (2, 3), (3, 4)] {
            swap.read(slot, Small, &[stamp]);
        }
        swap.end();
    });
}

/// Three pages of a cluster, and one of another segment: both are sparse.
fn sparse_disk() -> Arc<Swap> {
    let swap = four_pages();
    swap.evict_cold();
    swap.free(3);
    swap.write(4, Loose, 5);
    swap.evict(crate::store::What::Page(4));
    swap
}

/// A page that is taken out of its cluster, and is overwritten meanwhile.
#[test]
fn overwrite_against_taking_apart() {
    explore(|| {
        let swap = sparse_disk();
        let cleaner = spawn({
            let swap = swap.clone();
            move || swap.clean_up()
        });
        swap.write(0, Small, 9);
        swap.read(0, Small, &[9]);
        join(cleaner);
        for (slot, stamp) in [(0, 9), (1, 2), (2, 3), (3, 0)] {
            swap.read(slot, Small, &[stamp]);
        }
        swap.read(4, Loose, &[5]);
        swap.end();
    });
}

#[test]
fn free_against_taking_apart() {
    explore(|| {
        let swap = sparse_disk();
        let cleaner = spawn({
            let swap = swap.clone();
            move || swap.clean_up()
        });
        swap.free(0);
        join(cleaner);
        for (slot, stamp) in [(0, 0), (1, 2), (2, 3), (3, 0)] {
            swap.read(slot, Small, &[stamp]);
        }
        swap.end();
    });
}
