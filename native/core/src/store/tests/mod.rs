//! The store with a backing disk: against a simple model of it, and many at once.

#[cfg(not(any(feature = "loom", feature = "shuttle", miri)))]
mod clusters;
mod concurrent;
#[cfg(not(miri))]
mod crash;
#[cfg(not(miri))]
mod damage;
mod during_the_write;
#[cfg(not(miri))]
mod machine;
mod model;
mod policy;
mod recompress;
#[cfg(not(miri))]
mod recover;
#[cfg(not(any(feature = "loom", feature = "shuttle", miri)))]
mod share;

use super::*;
use crate::backing::{Disk, MemoryDisk, SEGMENT_BYTES};
use crate::codec::Algorithm;
use crate::lru::Incompressible;
use crate::page::PAGE_SIZE;
use crate::sync::Ordering;
use std::time::Duration;

const LZ4: Compression = Compression { algorithm: Algorithm::Lz4, zstd_level: 1 };

/// A page that can be told from every other one by slot and version: noise, or one that compresses to about a tenth, and
/// with zstd to less.
fn page(slot: u32, version: u32, noise: bool) -> Page {
    let mut x = (u64::from(slot) << 32 | u64::from(version)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    let mut page = [0; PAGE_SIZE];
    let length = if noise { PAGE_SIZE } else { 300 };
    let mask = if noise { 0xff } else { 0x3f };
    page[..length].iter_mut().for_each(|byte| *byte = next() & mask);
    page[..4].copy_from_slice(&slot.to_le_bytes());
    page[4..8].copy_from_slice(&version.to_le_bytes());
    page[8] = u8::from(noise);
    page
}

fn new_store(allocator: Allocator, slots: u64, limit_pages: u64, options: DiskOptions) -> Store {
    let limit = limit_pages * PAGE_SIZE as u64;
    let store = Store::new(slots, allocator, limit, Files::default()).expect("store");
    let store = store.with_disk(options).expect("disk");
    store.populate_slots().expect("memory");
    store
}

fn disk_of(segments: u64, disk: impl Disk + 'static) -> DiskOptions {
    let bytes = segments * SEGMENT_BYTES as u64;
    DiskOptions { disk: Box::new(disk), bytes, encryption: true, incompressible: Incompressible::Writeback }
}

fn memory_disk(segments: u64) -> DiskOptions {
    disk_of(segments, MemoryDisk::new(segments as usize * SEGMENT_BYTES))
}

/// Empties and ends a store: nothing is left anywhere.
fn end(store: &Store) {
    store.discard(0..store.slots(), &mut Detached::with_capacity(0));
    assert_eq!(store.destroy(Duration::ZERO).expect("nobody is at work"), vec![]);
    assert!(store.state.cipher().key.iter().all(|word| word.load(Ordering::Relaxed) == 0), "the key was not wiped");
    let metrics = store.metrics();
    for (name, gauge) in [
        ("pages_lz4", &metrics.pages_lz4),
        ("pages_zstd", &metrics.pages_zstd),
        ("pages_zstd_dictionary", &metrics.pages_zstd_dictionary),
        ("pages_incompressible", &metrics.pages_incompressible),
        ("pages_same_filled", &metrics.pages_same_filled),
        ("pages_on_disk", &metrics.pages_on_disk),
        ("pages_in_clusters", &metrics.pages_in_clusters),
        ("pages_lost", &metrics.pages_lost),
        ("pages_shared", &metrics.pages_shared),
        ("shared_pages", &metrics.shared_pages),
        ("compressed_bytes", &metrics.compressed_bytes),
        ("bytes_lz4", &metrics.bytes_lz4),
        ("bytes_zstd", &metrics.bytes_zstd),
        ("bytes_zstd_dictionary", &metrics.bytes_zstd_dictionary),
        ("pool_bytes", &metrics.pool_bytes),
        ("disk_live_bytes", &metrics.disk_live_bytes),
        ("idle_pages", &metrics.idle_pages),
        ("writebacks_in_flight", &metrics.writebacks_in_flight),
        ("cleanings_in_flight", &metrics.cleanings_in_flight),
        ("recompressions_in_flight", &metrics.recompressions_in_flight),
    ] {
        assert_eq!(gauge.get(), 0, "{name}");
    }
    assert!(
        store.dictionaries.installed().iter().all(|installed| installed.pages == 0),
        "{:?}",
        store.dictionaries.installed()
    );
    assert!(store.writeback.as_ref().is_none_or(|writeback| writeback.lru.is_empty()));
}
