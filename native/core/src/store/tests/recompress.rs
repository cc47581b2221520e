//! Recompression by itself, and dictionaries as they come and go.

use super::*;
use crate::page::fill;
use std::sync::atomic::Ordering::Relaxed;

const SLOTS: u32 = 64;

fn tier(number: u8, zstd_level: i32, dictionary: bool) -> Tier {
    Tier { number, with: Compression { algorithm: Algorithm::Zstd, zstd_level }, dictionary }
}

fn recompress(store: &Store, recompressor: &mut Recompressor, tier: Tier, age: u8) -> Recompressed {
    store.prepare(recompressor, tier).expect("a tier");
    store.recompress(recompressor, &Order { tier, age, pages: u64::MAX, processor_time: Duration::MAX })
}

fn filled(allocator: Allocator) -> (Store, Scratch) {
    let (store, mut scratch) = (new_store(allocator, 1024, 1000, memory_disk(8)), Scratch::new().expect("scratch"));
    store.set_promoting(false);
    for slot in 0..SLOTS {
        store.store(slot, &page(slot, 1, false), LZ4, &mut scratch).expect("room");
    }
    (store, scratch)
}

/// All pages are what they were.
fn assert_whole(store: &Store, scratch: &mut Scratch) {
    for slot in 0..SLOTS {
        let mut found = [0; PAGE_SIZE];
        store.load(slot, &mut found, scratch).expect("it is there");
        assert!(found == page(slot, 1, false), "slot {slot}");
    }
}

fn dictionary(seed: u32) -> Vec<u8> {
    (0..16).flat_map(|slot| page(slot, seed, false)[..300].to_vec()).collect()
}

#[test]
fn pages_get_smaller_and_are_tried_once_for_a_tier() {
    for allocator in Allocator::ALL {
        let (store, mut scratch) = filled(allocator);
        let mut recompressor = Recompressor::new().expect("memory");
        let before = store.metrics().compressed_bytes.get();
        let done = recompress(&store, &mut recompressor, tier(1, 3, false), 0);
        assert_eq!(done.outcome, Outcome::Done);
        assert_eq!(done.recompressed + done.not_smaller, u64::from(SLOTS), "{done:?}");
        assert!(done.recompressed > 0 && done.saved_bytes > 0, "{done:?}");
        let metrics = store.metrics();
        assert_eq!(metrics.pages_zstd.get(), done.recompressed);
        assert_eq!(metrics.pages_zstd.get() + metrics.pages_lz4.get(), u64::from(SLOTS));
        assert_eq!(metrics.bytes_zstd.get() + metrics.bytes_lz4.get(), metrics.compressed_bytes.get());
        assert!(metrics.compressed_bytes.get() < before);
        assert_whole(&store, &mut scratch);
        // Reading them has not made them candidates again, nor does a lower tier.
        for again in [tier(1, 3, false), tier(2, 9, false), tier(1, 3, false)] {
            let done = recompress(&store, &mut recompressor, again, 0);
            assert_eq!(done.recompressed + done.not_smaller, if again.number == 2 { u64::from(SLOTS) } else { 0 });
        }
        // Another level is another tier.
        let done = recompress(&store, &mut recompressor, tier(2, 12, false), 0);
        assert_eq!(done.recompressed + done.not_smaller, u64::from(SLOTS));
        assert_whole(&store, &mut scratch);
        end(&store);
    }
}

#[test]
fn only_pages_that_nobody_uses_are_recompressed() {
    let (store, mut scratch) = filled(Allocator::Zsmalloc);
    let mut recompressor = Recompressor::new().expect("memory");
    (0..3).for_each(|_| store.tick());
    let mut read = [0; PAGE_SIZE];
    store.load(5, &mut read, &mut scratch).expect("it is there");
    store.store(6, &page(6, 1, false), LZ4, &mut scratch).expect("room");
    store.tick();
    assert_eq!(recompress(&store, &mut recompressor, tier(1, 3, false), 5).looked_at, 512);
    assert_eq!(store.metrics().pages_zstd.get(), 0);
    let done = recompress(&store, &mut recompressor, tier(1, 3, false), 4);
    assert_eq!(done.recompressed + done.not_smaller, u64::from(SLOTS) - 2);
    // Nor has the sample made them younger.
    assert_eq!(store.sample_cold(&mut recompressor, 4, 1000, 0, |_| true), u64::from(SLOTS) - 2);
    assert_eq!(store.sample_cold(&mut recompressor, 4, 1000, 0, |_| true), u64::from(SLOTS) - 2);
    assert_eq!(store.sample_cold(&mut recompressor, 4, 10, 3, |_| true), 9);
    end(&store);
}

#[test]
fn a_call_ends_with_its_budget_and_the_next_goes_on() {
    let (store, mut scratch) = filled(Allocator::Zsmalloc);
    let mut recompressor = Recompressor::new().expect("memory");
    let tier = tier(1, 3, false);
    store.prepare(&mut recompressor, tier).expect("a tier");
    let (mut pages, mut calls) = (0, 0);
    loop {
        let order = Order { tier, age: 0, pages: 10, processor_time: Duration::MAX };
        let done = store.recompress(&mut recompressor, &order);
        pages += done.recompressed + done.not_smaller;
        calls += 1;
        if done.outcome == Outcome::Done {
            break;
        }
        assert_eq!(done.outcome, Outcome::Budget);
    }
    assert_eq!((pages, calls), (u64::from(SLOTS), 7));
    assert_whole(&store, &mut scratch);
    (0..SLOTS).for_each(|slot| store.store(slot, &page(slot, 1, false), LZ4, &mut scratch).expect("room"));
    let order = Order { tier, age: 0, pages: u64::MAX, processor_time: Duration::ZERO };
    let done = store.recompress(&mut recompressor, &order);
    assert_eq!((done.recompressed + done.not_smaller, done.outcome), (1, Outcome::Budget));
    end(&store);
}

#[test]
fn a_dictionary_stays_as_long_as_a_page_needs_it_wherever_that_lies() {
    let (store, mut scratch) = filled(Allocator::Zsmalloc);
    let mut recompressor = Recompressor::new().expect("memory");
    let nothing = store.prepare(&mut recompressor, tier(1, 9, true)).expect_err("there is no dictionary");
    assert_eq!(nothing.errno(), libc::ENOENT);
    assert_eq!(store.install_dictionary(&dictionary(1)).expect("a dictionary"), 1);
    let done = recompress(&store, &mut recompressor, tier(1, 9, true), 0);
    assert!(done.recompressed > 0, "{done:?}");
    let of_serial = |serial| store.dictionaries.installed().into_iter().find(|found| found.serial == serial);
    assert_eq!(of_serial(1).expect("installed").pages, done.recompressed);
    // Some of them on the disk.
    evict(&store, What::Coldest { bytes: 4096 });
    assert!(store.metrics().pages_on_disk.get() > 0);
    assert_eq!(of_serial(1).expect("installed").pages, done.recompressed);
    assert_whole(&store, &mut scratch);
    assert_eq!(store.install_dictionary(&dictionary(2)).expect("a dictionary"), 2);
    store.discard(0..u64::from(SLOTS) - 1, &mut Detached::with_capacity(0));
    let last = of_serial(1).expect("still needed").pages;
    store.discard(0..u64::from(SLOTS), &mut Detached::with_capacity(0));
    assert!(last <= 1);
    // The next who comes gives it up.
    store.prepare(&mut recompressor, tier(1, 9, true)).expect("the newest");
    assert_eq!(of_serial(1), None);
    assert!(of_serial(2).is_some());
    end(&store);
}

#[test]
fn a_fifth_dictionary_waits_for_a_place_and_pages_leave_the_oldest() {
    let (store, mut scratch) = filled(Allocator::Zsmalloc);
    let mut recompressor = Recompressor::new().expect("memory");
    for seed in 1..=4 {
        store.install_dictionary(&dictionary(seed)).expect("a place");
        let slot = seed - 1;
        // A page of its own for each.
        store.store(slot, &page(slot, seed, false), LZ4, &mut scratch).expect("room");
        let order = Order { tier: tier(1, 9, true), age: 0, pages: 1, processor_time: Duration::MAX };
        store.prepare(&mut recompressor, order.tier).expect("a tier");
        recompressor = Recompressor::new().expect("memory");
        store.prepare(&mut recompressor, order.tier).expect("a tier");
        (0..slot).for_each(|slot| store.ages.tried(slot, 3));
        assert_eq!(store.recompress(&mut recompressor, &order).recompressed, 1, "dictionary {seed}");
    }
    assert_eq!(store.install_dictionary(&dictionary(5)).expect_err("no place").errno(), libc::EBUSY);
    (0..4).for_each(|slot| store.ages.tried(slot, 0));
    // To the end, and then from the beginning.
    for _ in 0..2 {
        recompress(&store, &mut recompressor, tier(2, 9, true), 0);
    }
    let left = store.dictionaries.installed();
    assert!(left.iter().all(|found| found.serial != 1 || found.pages == 0), "{left:?}");
    assert_eq!(store.install_dictionary(&dictionary(5)).expect("places"), 5);
    end(&store);
}

#[test]
fn what_is_no_dictionary_is_refused() {
    let (store, _) = filled(Allocator::Zsmalloc);
    let trained_but_damaged = [&0xec30_a437u32.to_le_bytes()[..], &[7; 100]].concat();
    for bytes in [vec![], vec![1; (112 << 10) + 1], trained_but_damaged] {
        assert_eq!(store.install_dictionary(&bytes).expect_err("refused").errno(), libc::EINVAL);
    }
    assert!(store.dictionaries.installed().iter().all(|found| found.serial == 0));
    end(&store);
}

/// That was noise to lz4 only.
#[test]
fn a_page_that_was_incompressible_gets_smaller_and_stays_in_its_order() {
    let mut options = memory_disk(8);
    options.incompressible = Incompressible::Keep;
    let (store, mut scratch) = (new_store(Allocator::Zsmalloc, 1024, 1000, options), Scratch::new().expect("scratch"));
    let mut noise = page(3, 1, true);
    noise.iter_mut().for_each(|byte| *byte &= 0x3f);
    store.store(3, &noise, LZ4, &mut scratch).expect("room");
    store.store(4, &page(4, 1, false), LZ4, &mut scratch).expect("room");
    assert_eq!(store.metrics().pages_incompressible.get(), 1);
    let mut recompressor = Recompressor::new().expect("memory");
    recompress(&store, &mut recompressor, tier(1, 3, false), 0);
    assert_eq!(store.metrics().pages_incompressible.get(), 0);
    let lru = &store.writeback.as_ref().expect("a disk").lru;
    assert!(!lru.is_raw(3));
    assert_eq!(lru.next(&mut lru.pass()), Some(3), "it is the oldest");
    let mut found = [0; PAGE_SIZE];
    store.load(3, &mut found, &mut scratch).expect("it is there");
    assert!(found == noise);
    end(&store);
}

#[test]
fn a_damaged_object_is_found_and_nothing_is_made_of_it() {
    let (store, mut scratch) = filled(Allocator::Zsmalloc);
    store.flip_bit(7, 1234);
    let mut recompressor = Recompressor::new().expect("memory");
    recompress(&store, &mut recompressor, tier(1, 3, false), 0);
    assert_eq!(store.metrics().errors_corrupt.get(), 1);
    let mut found = [0; PAGE_SIZE];
    assert!(matches!(store.load(7, &mut found, &mut scratch), Err(Error::Lost { slot: 7 })));
    end(&store);
}

#[test]
fn the_end_of_the_store_ends_it() {
    let (store, mut scratch) = filled(Allocator::Zsmalloc);
    let mut recompressor = Recompressor::new().expect("memory");
    let tier = tier(1, 3, false);
    store.prepare(&mut recompressor, tier).expect("a tier");
    store.stop_writeback(Duration::ZERO);
    let order = Order { tier, age: 0, pages: u64::MAX, processor_time: Duration::MAX };
    assert_eq!(store.recompress(&mut recompressor, &order).outcome, Outcome::Stopped);
    assert_whole(&store, &mut scratch);
    end(&store);
}

/// Page operations and compaction beside it, for a while.
#[test]
fn pages_are_whole_while_others_use_them() {
    for allocator in Allocator::ALL {
        let (store, mut scratch) = filled(allocator);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut recompressor = Recompressor::new().expect("memory");
                for round in 0u32.. {
                    if stop.load(Relaxed) {
                        break;
                    }
                    if round % 8 == 0 {
                        let _all_needed = store.install_dictionary(&dictionary(round));
                    }
                    let tier = tier((round % 3) as u8 + 1, 1 + (round % 9) as i32, round % 2 == 0);
                    recompress(&store, &mut recompressor, tier, 0);
                    store.compact();
                }
            });
            let rounds = if cfg!(miri) { 3 } else { 300 };
            for version in 2..rounds {
                for slot in (0..SLOTS).step_by(3) {
                    let mut found = [0; PAGE_SIZE];
                    match version % 7 {
                        0 => drop(store.discard(u64::from(slot)..u64::from(slot) + 1, &mut Detached::with_capacity(0))),
                        _ => store.store(slot, &page(slot, version, false), LZ4, &mut scratch).expect("room"),
                    }
                    store.load(slot, &mut found, &mut scratch).expect("it is there");
                    let mut expected = page(slot, version, false);
                    if version % 7 == 0 {
                        fill(&mut expected, 0);
                    }
                    assert!(found == expected, "slot {slot}, version {version}");
                }
                if version % 50 == 0 {
                    evict(&store, What::Coldest { bytes: 8192 });
                }
            }
            stop.store(true, Relaxed);
        });
        end(&store);
    }
}

fn evict(store: &Store, what: What) {
    let (mut shrinker, mut job) = (Shrinker::new().expect("memory"), Job::new(what));
    while let Ok(true) = store.write_back(&mut shrinker, &mut job) {}
}
