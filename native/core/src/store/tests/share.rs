//! Pages that are alike, stored once.

use super::machine::{clean, evict, load, Machine};
use super::*;
use crate::page::fill;

fn order(pages: u64) -> Order {
    let with = Compression { algorithm: Algorithm::Zstd, zstd_level: 3 };
    let tier = Tier { number: 1, with, dictionary: false };
    Order { tier, age: 0, pages, processor_time: Duration::MAX }
}

/// Looks at all pages that were not looked at yet.
fn share(store: &Store, recompressor: &mut Recompressor) -> Recompressed {
    store.prepare(recompressor, order(0).tier).expect("a tier");
    store.prepare_duplicates(recompressor, true);
    recompressor.begin_anew();
    store.recompress(recompressor, &order(u64::MAX))
}

/// The same in all slots.
fn alike(version: u32) -> Page {
    page(0, version, version % 2 == 0)
}

/// With so many slots that are alike.
fn shared(allocator: Allocator, slots: u32) -> (Store, Scratch, Recompressor) {
    let (store, mut scratch) = (new_store(allocator, 1024, 1000, memory_disk(8)), Scratch::new().expect("scratch"));
    store.set_promoting(false);
    (0..slots).for_each(|slot| store.store(slot, &alike(1), LZ4, &mut scratch).expect("room"));
    let mut recompressor = Recompressor::new().expect("memory");
    assert_eq!(share(&store, &mut recompressor).shared, u64::from(slots) - 1);
    assert_counts(&store, u64::from(slots), 1);
    (store, scratch, recompressor)
}

fn assert_counts(store: &Store, pages_shared: u64, shared_pages: u64) {
    let metrics = store.metrics();
    assert_eq!((metrics.pages_shared.get(), metrics.shared_pages.get()), (pages_shared, shared_pages));
}

fn assert_reads(store: &Store, slot: u32, page: &Page, scratch: &mut Scratch) {
    assert!(load(store, slot, scratch).as_ref() == Some(page), "slot {slot}");
}

fn objects(store: &Store) -> u64 {
    let metrics = store.metrics();
    metrics.pages_lz4.get() + metrics.pages_zstd.get() + metrics.pages_incompressible.get()
}

#[test]
fn two_pages_and_then_a_third_have_one_object() {
    for allocator in Allocator::ALL {
        let (store, mut scratch, mut recompressor) = shared(allocator, 2);
        assert_eq!(objects(&store), 1);
        store.store(700, &alike(1), LZ4, &mut scratch).expect("room");
        assert_eq!(objects(&store), 2);
        assert_eq!(share(&store, &mut recompressor).shared, 1);
        assert_counts(&store, 3, 1);
        assert_eq!(objects(&store), 1);
        [0, 1, 700].into_iter().for_each(|slot| assert_reads(&store, slot, &alike(1), &mut scratch));
        end(&store);
    }
}

/// It is one as any other: to be made smaller, too.
#[test]
fn a_shared_page_is_recompressed() {
    let (store, mut scratch, _) = shared(Allocator::Zsmalloc, 3);
    assert_eq!((store.metrics().pages_zstd.get(), store.metrics().pages_lz4.get()), (1, 0));
    (0..3).for_each(|slot| assert_reads(&store, slot, &alike(1), &mut scratch));
    end(&store);
}

#[test]
fn who_writes_has_a_page_of_its_own_and_the_last_one_takes_the_shared_one_along() {
    for allocator in Allocator::ALL {
        let (store, mut scratch, _) = shared(allocator, 3);
        store.store(1, &page(1, 9, true), LZ4, &mut scratch).expect("room");
        assert_counts(&store, 2, 1);
        assert_reads(&store, 0, &alike(1), &mut scratch);
        assert_reads(&store, 1, &page(1, 9, true), &mut scratch);
        // A part of it.
        store.store_part(0, 100, &[7; 50], LZ4, &mut scratch).expect("room");
        let mut changed = alike(1);
        changed[100..150].fill(7);
        assert_reads(&store, 0, &changed, &mut scratch);
        assert_reads(&store, 2, &alike(1), &mut scratch);
        assert_counts(&store, 1, 1);
        let mut detached = Detached::with_capacity(4);
        assert_eq!(store.discard(2..3, &mut detached), 1);
        assert_reads(&store, 2, &[0; PAGE_SIZE], &mut scratch);
        store.free_detached(&mut detached);
        assert_counts(&store, 0, 0);
        assert_eq!(objects(&store), 2);
        end(&store);
    }
}

#[test]
fn a_refused_store_gives_the_old_page_up_and_the_others_keep_it() {
    let limit = 4 * PAGE_SIZE as u64;
    let store = Store::new(64, Allocator::Zsmalloc, limit, Files::default()).expect("store");
    let mut scratch = Scratch::new().expect("scratch");
    (0..3).for_each(|slot| store.store(slot, &alike(1), LZ4, &mut scratch).expect("room"));
    assert_eq!(share(&store, &mut Recompressor::new().expect("memory")).shared, 2);
    store.pool().set_limit_bytes(0);
    assert_eq!(store.store(1, &page(1, 1, true), LZ4, &mut scratch).expect_err("full").errno(), libc::ENOSPC);
    assert!(load(&store, 1, &mut scratch).is_none());
    [0, 2].into_iter().for_each(|slot| assert_reads(&store, slot, &alike(1), &mut scratch));
    end(&store);
}

#[test]
fn it_goes_to_the_disk_is_cleaned_and_comes_back() {
    for allocator in Allocator::ALL {
        let (store, mut scratch, mut recompressor) = shared(allocator, 3);
        // Enough beside it for all segments but the one that is kept back; most of it goes.
        for slot in 10..420 {
            store.store(slot, &page(slot, 1, true), LZ4, &mut scratch).expect("room");
        }
        evict(&store, What::All);
        assert_eq!((objects(&store), store.metrics().pages_on_disk.get()), (0, 411));
        (0..3).for_each(|slot| assert_reads(&store, slot, &alike(1), &mut scratch));
        for slot in (10..420).filter(|slot| slot % 8 != 0) {
            store.discard(slot..slot + 1, &mut Detached::with_capacity(0));
        }
        clean(&store);
        assert!(store.metrics().cleaned_segments.get() > 0, "nothing was cleaned");
        (0..3).for_each(|slot| assert_reads(&store, slot, &alike(1), &mut scratch));
        // One that is like it finds nothing in the pool to share.
        store.store(3, &alike(1), LZ4, &mut scratch).expect("room");
        assert_eq!(share(&store, &mut recompressor).shared, 0);
        store.set_promoting(true);
        assert_reads(&store, 1, &alike(1), &mut scratch);
        assert_eq!(store.metrics().pages_promoted.get(), 1);
        assert_counts(&store, 3, 1);
        evict(&store, What::All);
        store.discard(0..2, &mut Detached::with_capacity(0));
        assert_counts(&store, 1, 1);
        store.discard(0..3, &mut Detached::with_capacity(0));
        assert_counts(&store, 0, 0);
        end(&store);
    }
}

#[test]
fn it_is_moved_as_any_other() {
    let (store, mut scratch) =
        (new_store(Allocator::Zsmalloc, 1024, 1000, memory_disk(8)), Scratch::new().expect("scratch"));
    for slot in 0..400 {
        store.store(slot, &page(slot / 2, 1, false), LZ4, &mut scratch).expect("room");
    }
    // No more than there are slots for.
    assert_eq!(share(&store, &mut Recompressor::new().expect("memory")).shared, 64);
    assert_counts(&store, 64 * 2, 64);
    store.discard(0..100, &mut Detached::with_capacity(0));
    store.compact();
    for slot in 100..400 {
        assert_reads(&store, slot, &page(slot / 2, 1, false), &mut scratch);
    }
    end(&store);
}

/// That is like what was, or has the same hash.
#[test]
fn what_the_index_says_is_not_believed() {
    let store = new_store(Allocator::Zsmalloc, 1024, 1000, memory_disk(8));
    let mut scratch = Scratch::new().expect("scratch");
    store.store(0, &alike(1), LZ4, &mut scratch).expect("room");
    let mut recompressor = Recompressor::new().expect("memory");
    assert_eq!(share(&store, &mut recompressor).shared, 0);
    let other = page(5, 5, false);
    store.store(5, &other, LZ4, &mut scratch).expect("room");
    store.store(6, &alike(3), LZ4, &mut scratch).expect("room");
    // Slot 0 has changed since.
    store.store(0, &alike(5), LZ4, &mut scratch).expect("room");
    store.store(7, &alike(1), LZ4, &mut scratch).expect("room");
    for slot in [5, 6, 7] {
        let fingerprint = recompressor.duplicates.fingerprint(&alike(3)).expect("all are looked for");
        recompressor.duplicates.insert(fingerprint, slot);
    }
    for candidate in [0, 5, 900, 1024, 1087, 1088, u32::MAX] {
        let fingerprint = recompressor.duplicates.fingerprint(&alike(3)).expect("all are looked for");
        recompressor.duplicates.insert(fingerprint, candidate);
        store.store(6, &alike(3), LZ4, &mut scratch).expect("room");
        assert_eq!(share(&store, &mut recompressor).shared, 0, "candidate {candidate}");
    }
    for (slot, page) in [(0, alike(5)), (5, other), (6, alike(3)), (7, alike(1))] {
        assert_reads(&store, slot, &page, &mut scratch);
    }
    assert_counts(&store, 0, 0);
    end(&store);
}

#[test]
fn pages_without_an_object_are_none() {
    let store = new_store(Allocator::Zsmalloc, 1024, 1000, memory_disk(8));
    let mut scratch = Scratch::new().expect("scratch");
    let mut same = [0; PAGE_SIZE];
    fill(&mut same, 77);
    (0..4).for_each(|slot| store.store(slot, &same, LZ4, &mut scratch).expect("room"));
    assert_eq!(share(&store, &mut Recompressor::new().expect("memory")).shared, 0);
    end(&store);
}

#[test]
fn one_that_is_damaged_costs_all_who_share_it_and_no_other() {
    let (store, mut scratch, _) = shared(Allocator::Zsmalloc, 3);
    store.store(9, &page(9, 1, false), LZ4, &mut scratch).expect("room");
    let first = store.slots() as u32;
    assert!(store.flip_bit(first, 1234));
    let mut page_read = [0; PAGE_SIZE];
    assert!(matches!(store.load(1, &mut page_read, &mut scratch), Err(Error::Corrupt { slot: 1 })));
    assert!(matches!(store.load(2, &mut page_read, &mut scratch), Err(Error::Lost { slot: 2 })));
    assert_reads(&store, 9, &page(9, 1, false), &mut scratch);
    (0..3).for_each(|slot| store.store(slot, &page(slot, 2, true), LZ4, &mut scratch).expect("room"));
    (0..3).for_each(|slot| assert_reads(&store, slot, &page(slot, 2, true), &mut scratch));
    assert_counts(&store, 0, 0);
    end(&store);
}

/// Whoever puts the last reference waits for nobody.
#[test]
fn one_that_was_locked_when_it_was_given_up_is_emptied_later() {
    let (store, mut scratch, mut recompressor) = shared(Allocator::Zsmalloc, 2);
    let locked = store.slots.lock(store.slots() as u32);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut scratch = Scratch::new().expect("scratch");
            store.store(0, &page(0, 2, true), LZ4, &mut scratch).expect("room");
            store.discard(1..2, &mut Detached::with_capacity(0));
        });
    });
    drop(locked);
    assert_counts(&store, 0, 1);
    store.tick();
    assert_counts(&store, 0, 0);
    // It may be used again.
    (3..5).for_each(|slot| store.store(slot, &alike(1), LZ4, &mut scratch).expect("room"));
    assert_eq!(share(&store, &mut recompressor).shared, 1);
    assert_counts(&store, 2, 1);
    end(&store);
}

/// A worker does not wait for another one that reads the shared page from the disk.
#[test]
fn a_worker_that_meets_a_reader_of_the_shared_page_may_do_something_else() {
    let (store, _, _) = shared(Allocator::Zsmalloc, 2);
    let _reader = store.slots.lock(store.slots() as u32);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut scratch = Scratch::with_hook(|| false).expect("scratch");
            let mut read = [0; PAGE_SIZE];
            assert!(matches!(store.load(1, &mut read, &mut scratch), Err(Error::NotNow { slot: 1 })));
            let part = store.store_part(1, 10, &[1], LZ4, &mut scratch);
            assert!(matches!(part, Err(Error::NotNow { slot: 1 })));
            // To write all of it, the old one need not be read.
            store.store(1, &page(1, 1, false), LZ4, &mut scratch).expect("room");
        });
    });
    assert_counts(&store, 1, 1);
}

#[test]
fn it_is_off_unless_it_is_asked_for() {
    let store = new_store(Allocator::Zsmalloc, 1024, 1000, memory_disk(8));
    let mut scratch = Scratch::new().expect("scratch");
    (0..4).for_each(|slot| store.store(slot, &alike(1), LZ4, &mut scratch).expect("room"));
    let mut recompressor = Recompressor::new().expect("memory");
    store.prepare_duplicates(&mut recompressor, true);
    assert!(store.metrics().duplicates_index_bytes.get() > 0);
    store.prepare_duplicates(&mut recompressor, false);
    assert_eq!(store.metrics().duplicates_index_bytes.get(), 0);
    store.prepare(&mut recompressor, order(0).tier).expect("a tier");
    assert_eq!(store.recompress(&mut recompressor, &order(u64::MAX)).shared, 0);
    assert_counts(&store, 0, 0);
    end(&store);
}

#[test]
fn a_successor_counts_who_shares_and_frees_what_nobody_does() {
    for allocator in Allocator::ALL {
        let (machine, mut scratch) = (Machine::new(allocator), Scratch::new().expect("scratch"));
        let store = machine.start(1000);
        for slot in 0..80 {
            store.store(slot, &alike(slot % 4 + 1), LZ4, &mut scratch).expect("room");
        }
        assert_eq!(share(&store, &mut Recompressor::new().expect("memory")).shared, 76);
        drop(store);
        let store = machine.recover();
        assert_counts(&store, 80, 4);
        store.discard(0..40, &mut Detached::with_capacity(0));
        assert_counts(&store, 40, 4);
        // One that nobody names any more: its last word went, and nobody came to empty it.
        let mut left = store.slots.lock(41);
        let reference = left.publish(Entry::Empty, None).entry();
        assert!(matches!(reference, Entry::Shared(_)));
        drop(left);
        drop(store);
        let store = machine.recover();
        assert_counts(&store, 39, 4);
        (42..80).for_each(|slot| assert_reads(&store, slot, &alike(slot % 4 + 1), &mut scratch));
        // The words of all that share one, taken away.
        for slot in (40..80).filter(|slot| slot % 4 == 3) {
            store.slots.lock(slot).publish(Entry::Empty, None);
        }
        drop(store);
        let store = machine.recover();
        assert_counts(&store, 29, 3);
        end(&store);
    }
}

/// Page operations, eviction and compaction beside it, for a while.
#[test]
fn pages_are_whole_while_others_share_them() {
    let (store, _, _) = shared(Allocator::Zsmalloc, 2);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let going = || !stop.load(std::sync::atomic::Ordering::Relaxed);
    std::thread::scope(|scope| {
        for thread in 0..2u32 {
            let store = &store;
            scope.spawn(move || {
                let mut scratch = Scratch::new().expect("scratch");
                for round in 0..3000u32 {
                    let slot = thread * 8 + round % 8;
                    let page = alike(round / 8 % 3 + 1);
                    store.store(slot, &page, LZ4, &mut scratch).expect("room");
                    assert_reads(store, slot, &page, &mut scratch);
                    let before = slot ^ 1;
                    let page = load(store, before, &mut scratch).expect("it is there");
                    assert!((1..=3).any(|version| page == alike(version)) || page == [0; PAGE_SIZE]);
                    if round % 16 == 7 {
                        store.discard(u64::from(slot)..u64::from(slot) + 1, &mut Detached::with_capacity(0));
                    }
                }
            });
        }
        scope.spawn(|| {
            while going() {
                evict(&store, What::All);
                clean(&store);
                store.compact();
            }
        });
        let mut recompressor = Recompressor::new().expect("memory");
        let mut found = 0;
        while found < 500 {
            found += share(&store, &mut recompressor).shared;
            (0..16).for_each(|slot| store.ages.tried(slot, 0));
            if store.metrics().stores.get() >= 6002 {
                break;
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(store.metrics().pages_deduplicated.get() > 1, "nothing was shared meanwhile");
    end(&store);
}
