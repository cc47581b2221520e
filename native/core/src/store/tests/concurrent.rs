//! Threads that write, read and punch, while shrinkers, a cleaner and a compactor are at work without a pause.

use super::*;
use crate::backing::Faults;
use crate::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const SLOTS: u32 = 1500;
/// Far less than all pages take, in the pool; and on the disk, so that it is cleaned all the time.
const LIMIT_PAGES: u64 = 300;
const SEGMENTS: u64 = 30;
const ROUNDS: u32 = if cfg!(debug_assertions) { 20_000 } else { 500_000 };

#[test]
fn no_page_is_lost_or_torn() {
    let store = new_store(Allocator::Zsmalloc, u64::from(SLOTS), LIMIT_PAGES, memory_disk(SEGMENTS));
    churn(&store, &[LIMIT_PAGES]);
    let metrics = store.metrics();
    let happened = [
        ("pages_written_back", &metrics.pages_written_back),
        ("pages_promoted", &metrics.pages_promoted),
        ("cleaned_segments", &metrics.cleaned_segments),
        ("disk_reads", &metrics.disk_reads),
    ];
    happened.iter().for_each(|(name, counter)| assert!(counter.get() > 0, "{name}: nothing of that happened"));
    for (name, counter) in [("errors_lost", &metrics.errors_lost), ("errors_corrupt", &metrics.errors_corrupt)] {
        assert_eq!(counter.get(), 0, "{name}");
    }
}

/// Failing writes cost no page; after three in a row nothing is written any more, and what lies on the disk is read.
#[test]
fn no_page_is_lost_or_torn_when_the_disk_begins_to_fail() {
    let disk = MemoryDisk::new(SEGMENTS as usize * SEGMENT_BYTES);
    let faults = "write:20:eio,write:40-41:enospc,write:60:short,write:100-:eio";
    let options = disk_of(SEGMENTS, Faults::new(disk, faults).expect("rules"));
    let store = new_store(Allocator::Zsmalloc, u64::from(SLOTS), LIMIT_PAGES, options);
    churn(&store, &[LIMIT_PAGES]);
    assert_eq!(store.metrics().errors_corrupt.get(), 0);
    assert!(store.backing().is_some_and(|backing| backing.is_failed()));
}

/// Without a disk: what finds no room is lost, and nothing else; whatever the limit is meanwhile.
#[test]
fn no_page_is_torn_while_the_limit_changes() {
    const ENOUGH: u64 = SLOTS as u64 * 4;
    for allocator in Allocator::ALL {
        let limit = ENOUGH * PAGE_SIZE as u64;
        let store = Store::new(u64::from(SLOTS), allocator, limit, Files::default()).expect("a store");
        churn(&store, &[ENOUGH, 1, 400, 0, ENOUGH, 50]);
        let metrics = store.metrics();
        assert!(metrics.rejected_pool_full.get() > 0 && metrics.pages_compacted.get() > 0);
        assert_eq!(metrics.errors_corrupt.get(), 0);
    }
}

/// `limits` of the pool, in pages, take turns.
fn churn(store: &Store, limits: &[u64]) {
    let (stop, versions) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut shrinker = Shrinker::new().expect("memory");
                store.become_shrinker();
                while !stop.load(Ordering::Relaxed) {
                    if !store.shrink(&mut shrinker).unwrap_or(false) {
                        std::thread::park_timeout(Duration::from_millis(1));
                    }
                }
            });
        }
        scope.spawn(|| {
            let mut cleaner = Cleaner::new().expect("memory");
            store.become_cleaner();
            while !stop.load(Ordering::Relaxed) {
                if !store.clean(&mut cleaner).unwrap_or(false) {
                    std::thread::park_timeout(Duration::from_millis(1));
                }
            }
        });
        scope.spawn(|| {
            for limit in limits.iter().cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
                store.pool().set_limit_bytes(limit * PAGE_SIZE as u64);
                store.compact();
                store.mark_idle(Duration::ZERO);
                std::thread::yield_now();
            }
        });
        let workers = [0, 1].map(|thread| {
            let versions = &versions;
            scope.spawn(move || work(store, thread, versions))
        });
        workers.into_iter().for_each(|worker| worker.join().expect("a worker that does not panic"));
        stop.store(true, Ordering::Relaxed);
    });
    end(store);
}

/// Works on slots of its own, so that it knows what they hold.
fn work(store: &Store, thread: u32, versions: &AtomicU64) {
    let mut scratch = Scratch::new().expect("scratch");
    let mut holds: Vec<Option<Page>> = vec![Some([0; PAGE_SIZE]); SLOTS as usize];
    let mut x = u64::from(thread) + 1;
    for _ in 0..ROUNDS {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let random = (x >> 33) as u32;
        // Neighbours are of different threads, and of one stripe now and then; a few slots are hot.
        let slot = if random & 0x300 == 0 { random % 40 } else { random / 1024 % SLOTS } / 2 * 2 + thread;
        match random % 8 {
            0..=3 => {
                let version = versions.fetch_add(1, Ordering::Relaxed) as u32;
                let new = page(slot, version, version % 3 > 0);
                let stored = loop {
                    match store.store(slot, &new, LZ4, &mut scratch) {
                        Err(Error::NoRoomYet) => std::thread::yield_now(),
                        result => break result,
                    }
                };
                holds[slot as usize] = match stored {
                    Ok(()) => Some(new),
                    Err(Error::PoolFull | Error::NoRegion) => None,
                    Err(error) => panic!("{error}"),
                };
            }
            4 => {
                store.discard(u64::from(slot)..u64::from(slot) + 1, &mut Detached::with_capacity(0));
                holds[slot as usize] = Some([0; PAGE_SIZE]);
            }
            _ => {
                let mut page = [0xee; PAGE_SIZE];
                match (store.load(slot, &mut page, &mut scratch), holds[slot as usize]) {
                    (Ok(()), Some(expected)) => assert!(page == expected, "slot {slot} reads another page"),
                    (Err(Error::Lost { .. }), None) => {}
                    (result, held) => panic!("slot {slot}: {result:?}, and holds a page: {}", held.is_some()),
                }
            }
        }
    }
}
