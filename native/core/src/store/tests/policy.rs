//! Which pages go, when, and when that ends.

use super::*;
use crate::backing::{Faults, ReadBuffer};
use crate::error::Error;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

struct Fixture {
    store: Store,
    scratch: Scratch,
    shrinker: Shrinker,
}

impl Fixture {
    fn new(limit_pages: u64, options: DiskOptions) -> Fixture {
        Fixture {
            store: new_store(Allocator::Zsmalloc, 4096, limit_pages, options),
            scratch: Scratch::new().expect("scratch"),
            shrinker: Shrinker::new().expect("memory"),
        }
    }

    fn put(&mut self, slots: Range<u32>, noise: bool) -> Result<()> {
        slots.into_iter().try_for_each(|slot| self.store.store(slot, &page(slot, 1, noise), LZ4, &mut self.scratch))
    }

    fn read(&mut self, slot: u32) {
        let mut bytes = [0; PAGE_SIZE];
        self.store.load(slot, &mut bytes, &mut self.scratch).expect("readable");
        assert!(bytes == page(slot, 1, bytes[8] == 1));
    }

    fn write_back(&mut self, what: What) -> Job {
        let mut job = Job::new(what);
        while self.store.write_back(&mut self.shrinker, &mut job).expect("room") {}
        job
    }

    fn on_disk(&self, slot: u32) -> bool {
        matches!(self.store.slots.lock(slot).word().entry(), Entry::Disk(_))
    }
}

#[test]
fn shrinking_begins_before_the_limit_and_ends_at_the_accept_threshold() {
    let mut fixture = Fixture::new(1000, memory_disk(40));
    fixture.store.set_accept_threshold(80);
    let mut stored = 0;
    while !fixture.store.wants_shrinking() {
        fixture.put(stored..stored + 1, true).expect("room");
        stored += 1;
    }
    let used = |fixture: &Fixture| fixture.store.metrics().pool_bytes.get() / PAGE_SIZE as u64;
    assert!((951..=1000).contains(&used(&fixture)), "{} pages", used(&fixture));
    while fixture.store.shrink(&mut fixture.shrinker).expect("room") {}
    assert!((700..=800).contains(&used(&fixture)), "{} pages", used(&fixture));
    assert!(!fixture.store.wants_shrinking());
    // The coldest, and not more than was needed.
    assert!(fixture.on_disk(0) && !fixture.on_disk(stored - 1));
    fixture.put(stored..stored + 100, true).expect("room");
    assert!(!fixture.store.wants_shrinking());
    fixture.store.ask_for_shrinking();
    assert!(fixture.store.wants_shrinking());
    (0..stored + 100).for_each(|slot| fixture.read(slot));
    end(&fixture.store);
}

/// The pool is far from its limit, and the system may have memory: evicting is for when it has none.
#[test]
fn an_empty_reserve_is_waited_for_before_pages_are_evicted() {
    let mut fixture = Fixture::new(1 << 20, memory_disk(40));
    let pool = fixture.store.pool();
    // Nobody adds a region by himself then.
    pool.become_adjuster();
    while pool.adjust().expect("memory") {}
    let full = (0..4096).find(|&slot| fixture.put(slot..slot + 1, true).is_err()).expect("the reserve is used up");
    let mut retries = 0;
    while !fixture.store.wants_shrinking() {
        assert!(matches!(fixture.put(full..full + 1, true), Err(Error::NoRoomYet)));
        retries += 1;
        assert!(retries < 1000, "it would wait for ever");
    }
    assert!(retries > 10);
    while fixture.store.pool().adjust().expect("memory") {}
    fixture.put(full..full + 1, true).expect("room");
    end(&fixture.store);
}

/// However much the pool is to shrink in the end.
#[test]
fn who_waits_for_room_is_given_what_compaction_frees_at_once() {
    let mut fixture = Fixture::new(200, memory_disk(40));
    fixture.store.set_accept_threshold(1);
    let full = (0..4096).find(|&slot| fixture.put(slot..slot + 1, false).is_err()).expect("full in the end");
    (0..full).step_by(2).for_each(|slot| {
        fixture.store.discard(u64::from(slot)..u64::from(slot) + 1, &mut Detached::with_capacity(0));
    });
    assert!(matches!(fixture.put(4000..4001, true), Err(Error::NoRoomYet)), "there is room for another class");
    fixture.store.shrink(&mut fixture.shrinker).expect("compacted");
    fixture.put(4000..4001, true).expect("room");
    assert_eq!(fixture.store.metrics().pages_on_disk.get(), 0);
    assert!(fixture.store.metrics().pages_compacted.get() > 0);
    end(&fixture.store);
}

/// Without a disk nobody waits; but what was refused is there when it is tried again.
#[test]
fn who_was_refused_is_compacted_for() {
    let limit = 200 * PAGE_SIZE as u64;
    let mut fixture = Fixture {
        store: Store::new(4096, Allocator::Zsmalloc, limit, Files::default()).expect("a store"),
        scratch: Scratch::new().expect("scratch"),
        shrinker: Shrinker::new().expect("memory"),
    };
    let full = (0..4096).find(|&slot| fixture.put(slot..slot + 1, false).is_err()).expect("full in the end");
    let pool_wants = |fixture: &Fixture| fixture.store.pool().wants_compaction();
    assert!(!pool_wants(&fixture), "there is nothing to gain");
    (0..full).step_by(2).for_each(|slot| {
        fixture.store.discard(u64::from(slot)..u64::from(slot) + 1, &mut Detached::with_capacity(0));
    });
    assert!(!pool_wants(&fixture), "it is too little for its own sake");
    assert!(matches!(fixture.put(4000..4001, true), Err(Error::PoolFull)), "there is room for another class");
    assert!(pool_wants(&fixture));
    fixture.store.compact();
    fixture.put(4000..4001, true).expect("room");
    end(&fixture.store);
}

#[test]
fn shrinking_goes_on_after_an_error_of_the_disk() {
    let disk = Faults::new(MemoryDisk::new(40 * SEGMENT_BYTES), "write:1:eio").expect("rules");
    let mut fixture = Fixture::new(1000, disk_of(40, disk));
    let shrinks = |fixture: &Fixture| fixture.store.wants_shrinking();
    let mut stored = 0;
    let mut store_until_it_shrinks = |fixture: &mut Fixture| {
        let first = stored;
        while !shrinks(fixture) && stored < first + 100 + 900 * u32::from(first == 0) {
            fixture.put(stored..stored + 1, true).expect("room");
            stored += 1;
        }
        shrinks(fixture)
    };
    assert!(store_until_it_shrinks(&mut fixture));
    assert!(fixture.store.shrink(&mut fixture.shrinker).is_err());
    // The shrinkers sleep now: the next store that finds the pool nearly full has to wake them.
    assert!(!shrinks(&fixture));
    assert!(store_until_it_shrinks(&mut fixture), "nobody shrinks the pool ahead of the limit any more");
    while fixture.store.shrink(&mut fixture.shrinker).expect("room") {}
    end(&fixture.store);
}

#[test]
fn a_store_waits_while_there_can_be_room_and_is_refused_when_there_cannot() {
    let mut fixture = Fixture::new(200, memory_disk(4));
    let mut cleaner = Cleaner::new().expect("memory");
    // Three of the segments can be used.
    let refused = (0..4096).find_map(|slot| loop {
        match fixture.put(slot..slot + 1, true) {
            Err(Error::NoRoomYet) => {
                if fixture.store.shrink(&mut fixture.shrinker).is_err() {
                    assert!(fixture.store.clean(&mut cleaner).expect("room"));
                }
            }
            result => return result.err().map(|error| (slot, error)),
        }
    });
    let (slot, error) = refused.expect("it is full in the end");
    assert_eq!(error.errno(), libc::ENOSPC);
    assert!(slot > 200 + 100, "only {slot} pages were stored");
    assert_eq!((fixture.store.metrics().rejected_no_writeback.get(), fixture.store.can_make_room()), (1, false));
    (0..slot).for_each(|slot| fixture.read(slot));
    // With room on the disk, there is some again.
    fixture.store.discard(0..100, &mut Detached::with_capacity(0));
    assert!(fixture.store.can_make_room());
    end(&fixture.store);
    assert!(!fixture.store.can_make_room());
}

#[test]
fn a_budget_and_a_failed_disk_end_the_waiting() {
    let mut fixture = Fixture::new(100, memory_disk(40));
    fixture.put(0..80, true).expect("room");
    assert!(fixture.store.can_make_room());
    let backing = fixture.store.backing().expect("a disk");
    backing.set_budget(Some(SEGMENT_BYTES as u64 - 1));
    assert!(!fixture.store.can_make_room());
    let mut job = Job::new(What::All);
    let result = fixture.store.write_back(&mut fixture.shrinker, &mut job);
    assert!(matches!(result, Err(Error::BudgetUsedUp)));
    backing.set_budget(None);
    backing.fail();
    assert!(!fixture.store.can_make_room());
    assert!(matches!(fixture.store.write_back(&mut fixture.shrinker, &mut job), Err(Error::NoWriteback)));
    backing.resume();
    assert!(fixture.store.can_make_room());
    end(&fixture.store);
}

/// Without an error of the disk as a whole: a segment that could not be written, and one that could not be cleaned.
#[test]
fn segments_that_were_left_alone_come_back_and_so_does_a_disk() {
    let disk = Faults::new(MemoryDisk::new(8 * SEGMENT_BYTES), "write:1:eio,write:3-5:eio").expect("rules");
    let mut fixture = Fixture::new(1000, disk_of(8, disk));
    let mut cleaner = Cleaner::new().expect("memory");
    fixture.put(0..100, true).expect("room");
    let free = |fixture: &Fixture| fixture.store.metrics().backing_free_bytes.get() / SEGMENT_BYTES as u64;
    let mut job = Job::new(What::All);
    assert!(fixture.store.write_back(&mut fixture.shrinker, &mut job).is_err());
    assert_eq!(free(&fixture), 7);
    assert!(!fixture.store.try_disk_again(&mut cleaner).expect("nothing is written"));
    assert_eq!(free(&fixture), 8);
    let mut job = Job::new(What::All);
    fixture.store.write_back(&mut fixture.shrinker, &mut job).expect("written");
    for _ in 0..3 {
        assert!(fixture.store.write_back(&mut fixture.shrinker, &mut Job::new(What::All)).is_err());
    }
    let backing = fixture.store.backing().expect("a disk");
    assert!(backing.is_failed() && free(&fixture) < 7);
    assert!(fixture.store.try_disk_again(&mut cleaner).expect("written"));
    assert!(!backing.is_failed());
    assert_eq!(free(&fixture), 7);
    (0..100).for_each(|slot| fixture.read(slot));
    end(&fixture.store);
    assert!(!fixture.store.try_disk_again(&mut cleaner).expect("the end: nobody is let in"));
}

#[test]
fn what_is_idle_or_huge_or_one_page_is_written_back_and_nothing_else() {
    for (policy, idle, all) in [
        (Incompressible::Writeback, [2, 3, 12, 13].as_slice(), 20),
        (Incompressible::Keep, &[2, 3], 10),
        (Incompressible::First, &[2, 3, 12, 13], 20),
    ] {
        let options = || DiskOptions { incompressible: policy, ..memory_disk(40) };
        let new = || {
            let mut fixture = Fixture::new(1000, options());
            fixture.store.set_promoting(false);
            fixture.put(0..10, false).expect("room");
            fixture.put(10..20, true).expect("room");
            fixture
        };
        let gone = |fixture: &Fixture| (0..20).filter(|&slot| fixture.on_disk(slot)).collect::<Vec<u32>>();

        let mut fixture = new();
        assert_eq!(fixture.store.mark_idle(Duration::from_secs(3600)), 0);
        assert_eq!(fixture.store.mark_idle(Duration::ZERO), 20);
        // Used since: read, or written.
        [0, 1, 10, 11].into_iter().for_each(|slot| fixture.read(slot));
        fixture.put(4..10, false).expect("room");
        fixture.put(14..20, true).expect("room");
        assert_eq!(fixture.store.metrics().idle_pages.get(), 4);
        assert_eq!(fixture.write_back(What::Idle).pages, idle.len() as u64);
        assert_eq!(gone(&fixture), idle, "{policy:?}");
        assert_eq!(fixture.write_back(What::Unused { seconds: 3600 }).pages, 0);
        // Asked for by name they go, whatever the policy.
        fixture.store.mark_idle(Duration::ZERO);
        fixture.read(18);
        let huge_idle = (10..20).filter(|&slot| slot != 18 && !fixture.on_disk(slot)).count();
        assert_eq!(fixture.write_back(What::HugeIdle).pages, huge_idle as u64);
        assert!(!fixture.on_disk(18) && !fixture.on_disk(0));
        assert_eq!(fixture.write_back(What::Page(18)).pages, 1);
        assert_eq!(fixture.write_back(What::Page(19)).pages, 0);
        assert_eq!(fixture.write_back(What::Page(4000)).pages, 0);
        assert_eq!(fixture.write_back(What::Page(u32::MAX)).pages, 0);
        fixture.write_back(What::Huge);
        assert!((10..20).all(|slot| fixture.on_disk(slot)), "{policy:?}");
        end(&fixture.store);

        for what in [What::All, What::Unused { seconds: 0 }] {
            let mut fixture = new();
            assert_eq!(fixture.write_back(what).pages, all);
            end(&fixture.store);
        }

        let mut fixture = new();
        fixture.write_back(What::Coldest { bytes: 1 });
        assert_eq!(gone(&fixture), [if policy == Incompressible::First { 10 } else { 0 }], "{policy:?}");
        end(&fixture.store);
    }
}

#[test]
fn a_page_comes_back_to_the_pool_while_there_is_room_below_the_threshold() {
    let mut fixture = Fixture::new(100, memory_disk(40));
    fixture.put(0..10, true).expect("room");
    assert_eq!(fixture.write_back(What::All).pages, 10);
    fixture.read(0);
    assert!(!fixture.on_disk(0));
    fixture.store.set_promoting(false);
    fixture.read(1);
    fixture.store.set_promoting(true);
    fixture.store.set_accept_threshold(1);
    fixture.read(2);
    assert!(fixture.on_disk(1) && fixture.on_disk(2));
    let metrics = fixture.store.metrics();
    assert_eq!((metrics.pages_promoted.get(), metrics.disk_reads.get(), metrics.pages_on_disk.get()), (1, 3, 9));
    end(&fixture.store);
}

#[test]
fn a_sample_is_spread_over_the_swap_file_and_changes_nothing() {
    let disk = Faults::new(MemoryDisk::new(40 * SEGMENT_BYTES), "write:1:flip,read:8:eio").expect("rules");
    let mut fixture = Fixture::new(1000, disk_of(40, disk));
    let mut buffer = ReadBuffer::new().expect("memory");
    assert_eq!(fixture.store.sample_disk(&mut buffer, 10, 7).expect("nothing to read"), 0);
    fixture.put(0..200, true).expect("room");
    // Its record is the one that is flipped.
    assert_eq!(fixture.write_back(What::Page(100)).pages, 1);
    assert_eq!(fixture.write_back(What::All).pages, 199);
    let mut sample = |most, start| fixture.store.sample_disk(&mut buffer, most, start);
    // Every 50th: 0, 50, 100 and 150; the third one twice.
    assert!(matches!(sample(4, 0), Err(Error::Corrupt { slot: 100 })));
    // And 49, 99, 149, 199.
    assert!(matches!(sample(4, 99), Err(Error::DiskRead { slot: 199, .. })));
    assert_eq!(sample(4, 99).expect("readable again"), 4);
    let metrics = fixture.store.metrics();
    assert_eq!((metrics.pages_on_disk.get(), metrics.pages_lost.get(), metrics.errors_corrupt.get()), (200, 0, 0));
    assert_eq!(metrics.disk_read_errors.get(), 0, "no load has failed");
    end(&fixture.store);
    assert_eq!(fixture.store.sample_disk(&mut buffer, 4, 0).expect("the end"), 0);
}

#[test]
fn a_load_that_the_disk_fails_is_counted() {
    let disk = Faults::new(MemoryDisk::new(40 * SEGMENT_BYTES), "read:1:eio").expect("rules");
    let mut fixture = Fixture::new(100, disk_of(40, disk));
    fixture.put(0..1, true).expect("room");
    fixture.write_back(What::All);
    let failed = fixture.store.load(0, &mut [0; PAGE_SIZE], &mut fixture.scratch);
    assert!(matches!(failed, Err(Error::DiskRead { slot: 0, .. })));
    let metrics = fixture.store.metrics();
    assert_eq!((metrics.disk_read_errors.get(), metrics.disk_reads.get()), (1, 0));
    fixture.read(0);
    end(&fixture.store);
}

#[test]
fn the_hook_is_asked_before_the_disk_is_read_and_only_then() {
    let mut fixture = Fixture::new(100, memory_disk(40));
    fixture.store.set_promoting(false);
    fixture.put(0..2, true).expect("room");
    fixture.write_back(What::Page(0));
    let calls = Arc::new(AtomicU32::new(0));
    let counted = calls.clone();
    fixture.scratch = Scratch::with_hook(move || counted.fetch_add(1, Relaxed) > 0).expect("scratch");
    fixture.read(1);
    assert_eq!(calls.load(Relaxed), 0);
    let refused = fixture.store.load(0, &mut [0; PAGE_SIZE], &mut fixture.scratch);
    assert!(matches!(refused, Err(Error::NotNow { slot: 0 })));
    assert_eq!((calls.load(Relaxed), fixture.store.metrics().disk_reads.get()), (1, 0));
    fixture.read(0);
    assert_eq!((calls.load(Relaxed), fixture.store.metrics().disk_reads.get()), (2, 1));
    end(&fixture.store);
}

/// Who has it locked may wait for the disk.
#[test]
fn who_has_something_else_to_do_does_not_wait_for_a_slot() {
    let mut fixture = Fixture::new(100, memory_disk(40));
    fixture.put(0..3, true).expect("room");
    let calls = Arc::new(AtomicU32::new(0));
    let counted = calls.clone();
    fixture.scratch = Scratch::with_hook(move || {
        counted.fetch_add(1, Relaxed);
        false
    })
    .expect("scratch");
    let Fixture { store, scratch, .. } = &mut fixture;
    let nothing = &mut Detached::with_capacity(0);
    // In a thread of its own: this one has the lock of the slot.
    let locked = store.slots.lock(1);
    std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            assert!(matches!(store.store(1, &page(1, 1, true), LZ4, scratch), Err(Error::NotNow { slot: 1 })));
            assert!(matches!(store.store_part(1, 0, &[7], LZ4, scratch), Err(Error::NotNow { slot: 1 })));
            assert!(matches!(store.try_discard(0..3, nothing, scratch), Err(Error::NotNow { slot: 1 })));
            assert_eq!((calls.load(Relaxed), store.metrics().discards.get()), (0, 1));
            assert!(matches!(store.load(1, &mut [0; PAGE_SIZE], scratch), Err(Error::NotNow { slot: 1 })));
            assert_eq!(calls.load(Relaxed), 1);
        });
        others.join().expect("it did not wait");
    });
    drop(locked);
    fixture.read(1);
    end(&fixture.store);
}

/// In the pager, threads that never end hold on to the store.
#[test]
fn the_end_wipes_the_key_and_what_is_on_the_disk_is_noise() {
    let mut fixture = Fixture::new(100, memory_disk(40));
    fixture.put(0..1, true).expect("room");
    fixture.write_back(What::All);
    let word = fixture.store.slots.lock(0).word();
    let Entry::Disk(at) = word.entry() else { panic!("not on the disk") };
    let (backing, key) = (fixture.store.backing().expect("a disk"), &fixture.store.state.cipher().key);
    let mut buffer = ReadBuffer::new().expect("memory");
    let mut read = || backing.read(at, 0, word.generation(), &mut buffer).map(|_| ());
    read().expect("readable");
    assert!(key.iter().any(|word| word.load(Relaxed) != 0));
    end(&fixture.store);
    assert!(key.iter().all(|word| word.load(Relaxed) == 0), "the key is still there");
    assert!(matches!(read(), Err(Error::Corrupt { .. })), "its schedule is still there");
}

/// A flipped bit in the pool costs the page, whoever comes across it; it does not go to the disk as if it were whole.
#[test]
fn a_damaged_object_is_lost_when_it_is_to_be_written_back() {
    let mut fixture = Fixture::new(100, memory_disk(40));
    fixture.put(0..2, false).expect("room");
    assert!(fixture.store.flip_bit(0, 100));
    assert_eq!(fixture.write_back(What::All).pages, 1);
    let mut bytes = [0; PAGE_SIZE];
    let error = fixture.store.load(0, &mut bytes, &mut fixture.scratch).expect_err("damaged");
    assert!(matches!(error, Error::Lost { slot: 0 }));
    fixture.read(1);
    assert_eq!(fixture.store.metrics().errors_corrupt.get(), 1);
    end(&fixture.store);
}
