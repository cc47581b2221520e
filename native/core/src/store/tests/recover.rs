//! What a successor finds, and what it refuses.

use super::machine::*;
use super::*;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;

/// What is wrong is said, and nothing is changed.
#[test]
fn what_is_no_state_of_ours_is_refused_as_it_is() {
    let machine = Machine::new(Allocator::Zsmalloc);
    let mut scratch = Scratch::new().expect("scratch");
    let store = machine.start(1000);
    (0..SLOTS).for_each(|slot| put(&store, slot, &page(slot, 1, false), &mut scratch).expect("room"));
    evict(&store, What::Coldest { bytes: 1 << 16 });
    drop(store);
    let length = machine.state.metadata().expect("length").len();
    let contents = |file: &File| {
        let mut bytes = vec![0; 1 << 20];
        let read = file.read_at(&mut bytes, 0).expect("read");
        (bytes, read, file.metadata().expect("length").len())
    };
    let refused = |change: &dyn Fn(&mut Machine) -> Option<DiskOptions>, message: &str| {
        let mut copy = machine.copy();
        let disk = change(&mut copy);
        let before = contents(&copy.state);
        let error = Store::recover(copy.allocator, copy.files(), disk).err().expect(message);
        assert!(error.to_string().contains(message), "{error}");
        assert!(before == contents(&copy.state), "changed, and refused: {error}");
    };
    let write = |at: u64, bytes: &'static [u8]| {
        move |copy: &mut Machine| {
            copy.state.write_all_at(bytes, at).expect("written");
            Some(copy.options())
        }
    };
    let cut = |length: u64| {
        move |copy: &mut Machine| {
            copy.state.set_len(length).expect("cut");
            Some(copy.options())
        }
    };
    refused(&write(0, b"somebody"), "none of zswapd's");
    refused(&write(8, const { &2u32.to_ne_bytes() }), "of version 2, and this program knows version 5");
    for at in 12..48 {
        refused(&write(at, b"\xee"), "damaged");
    }
    refused(&cut(0), "ends in its header");
    refused(&cut(40), "ends in its header");
    refused(&cut(length - 4096), "should have");
    refused(&cut(length + 4096), "should have");
    refused(
        &|copy| {
            copy.allocator = Allocator::Z3fold;
            Some(copy.options())
        },
        "another allocator",
    );
    refused(&|_| None, "none was named");
    refused(&|copy| Some(disk_of(SEGMENTS - 1, copy.disk.clone())), "usable bytes");
    refused(&|copy| Some(DiskOptions { encryption: false, ..copy.options() }), "encrypted");
    survive(&machine, &{
        let all = vec![Holds::Version(1, false); SLOTS as usize];
        Expected { before: all.clone(), after: all, full: false }
    });
}

/// With a newer one there, each stays only because pages need it. A damaged one costs its pages.
#[test]
fn a_successor_has_the_dictionaries_and_knows_who_needs_them() {
    for allocator in Allocator::ALL {
        let machine = Machine::new(allocator);
        let mut scratch = Scratch::new().expect("scratch");
        let store = machine.start(1000);
        (0..SLOTS).for_each(|slot| put(&store, slot, &page(slot, 1, false), &mut scratch).expect("room"));
        let dictionary = |seed| (0..16).flat_map(|slot| page(slot, seed, false)[..300].to_vec()).collect::<Vec<u8>>();
        store.install_dictionary(&dictionary(1)).expect("a dictionary");
        let with = Compression { algorithm: Algorithm::Zstd, zstd_level: 9 };
        let tier = Tier { number: 1, with, dictionary: true };
        let order = Order { tier, age: 0, pages: u64::MAX, processor_time: Duration::MAX };
        let mut recompressor = Recompressor::new().expect("memory");
        store.prepare(&mut recompressor, tier).expect("a tier");
        let need_it = store.recompress(&mut recompressor, &order).recompressed;
        assert!(need_it > 0);
        evict(&store, What::Coldest { bytes: 4096 });
        assert!(store.metrics().pages_on_disk.get() > 0);
        store.install_dictionary(&dictionary(2)).expect("a dictionary");
        drop(store);

        let copy = machine.copy();
        let successor = || Store::recover(copy.allocator, copy.files(), Some(copy.options())).expect("recovered");
        let store = successor();
        let installed = store.dictionaries.installed();
        assert_eq!([1, 2].map(|n| (installed[n].serial, installed[n].pages)), [(1, need_it), (2, 0)]);
        for slot in 0..SLOTS {
            let mut found = [0; PAGE_SIZE];
            store.load(slot, &mut found, &mut scratch).expect("it is there");
            assert!(found == page(slot, 1, false), "slot {slot}");
        }
        let byte: *mut u8 = store.state.dictionary(1).as_ptr().cast();
        // SAFETY: inside the first dictionary, which nobody reads now.
        unsafe { *byte.add(99) ^= 4 };
        drop(store);

        let store = successor();
        assert_eq!((store.dictionaries.installed()[1].serial, store.metrics().pages_lost.get()), (0, need_it));
        let mut lost = 0;
        for slot in 0..SLOTS {
            let mut found = [0; PAGE_SIZE];
            match store.load(slot, &mut found, &mut scratch) {
                Ok(()) => assert!(found == page(slot, 1, false), "slot {slot}"),
                Err(_) => lost += 1,
            }
        }
        assert_eq!(lost, need_it);
    }
}

/// A region that was on its way in or out has no memory afterwards, or all of it.
#[test]
fn a_region_that_is_half_there_is_taken_or_given_back() {
    for allocator in Allocator::ALL {
        let machine = Machine::new(allocator);
        let mut scratch = Scratch::new().expect("scratch");
        let store = machine.start(1000);
        (0..SLOTS).for_each(|slot| put(&store, slot, &page(slot, 1, true), &mut scratch).expect("room"));
        let state = store.state.clone();
        drop(store);
        // The last pages of the first region are free, and some of the third one are there.
        state.punch(500, 12).expect("punched");
        state.populate(1024, 100).expect("memory");
        let all = vec![Holds::Version(1, true); SLOTS as usize];
        let store = machine.recover();
        assert_eq!(store.metrics().backed_bytes.get() % (2 << 20), 0);
        let resident = state.next_resident(0).expect("known").expect("pages");
        assert_eq!(u64::from(resident.end) * PAGE_SIZE as u64, store.metrics().backed_bytes.get());
        assert_eq!(state.next_resident(resident.end).expect("known"), None);
        drop(store);
        survive(&machine, &Expected { before: all.clone(), after: all, full: false });
    }
}

/// When the machine has no memory left, a successor finds its tables where those of the one before were; whatever stands
/// in them.
#[test]
fn a_successor_takes_the_memory_that_is_there() {
    for allocator in Allocator::ALL {
        let machine = Machine::new(allocator);
        let mut scratch = Scratch::new().expect("scratch");
        let store = machine.start(1000);
        store.populate_slots().expect("memory");
        (0..SLOTS).for_each(|slot| put(&store, slot, &page(slot, 1, slot % 2 == 0), &mut scratch).expect("room"));
        let (map, arena) = (PAGE_SIZE as u64 * 2, 2u64 << 20);
        let tables = map + u64::from(store.state.arena_pages()) * 2..arena;
        let before = store.state.resident_bytes();
        drop(store);
        let mut scrambled = 0;
        for at in (tables.start.next_multiple_of(PAGE_SIZE as u64)..tables.end).step_by(PAGE_SIZE) {
            // SAFETY: plain system call.
            let data = unsafe { libc::lseek(machine.state.as_raw_fd(), at as libc::off_t, libc::SEEK_DATA) };
            if data as u64 == at {
                machine.state.write_all_at(&[0xee; PAGE_SIZE], at).expect("written");
                scrambled += 1;
            }
        }
        assert!(scrambled >= 3, "{scrambled} pages of tables");
        let store = machine.recover();
        store.populate_slots().expect("memory");
        assert_eq!(store.state.resident_bytes(), before);
        drop(store);
        let all: Vec<_> = (0..SLOTS).map(|slot| Holds::Version(1, slot % 2 == 0)).collect();
        survive(&machine, &Expected { before: all.clone(), after: all, full: false });
    }
}

/// What one that ended at its very start has not come to.
#[test]
fn a_disk_that_was_not_set_up_is() {
    let machine = Machine::new(Allocator::Zsmalloc);
    let mut scratch = Scratch::new().expect("scratch");
    let store = Store::new(u64::from(SLOTS), machine.allocator, 1 << 30, machine.files()).expect("store");
    store.state.cipher().key[0].store(7, Relaxed);
    drop(store);
    let store = machine.recover();
    assert_eq!(store.metrics().writeback_budget_bytes.get(), u64::MAX);
    assert_ne!(store.state.cipher().key[0].load(Relaxed), 7);
    put(&store, 1, &page(1, 1, true), &mut scratch).expect("room");
    evict(&store, What::All);
    assert!(load(&store, 1, &mut scratch) == Some(page(1, 1, true)));
    assert_eq!(store.metrics().pages_promoted.get(), 1);
    end(&store);
}

/// Counters are counted on, and settings stay as they were set.
#[test]
fn counters_and_settings_go_on() {
    let machine = Machine::new(Allocator::Zsmalloc);
    let counters = SharedMetrics::file().expect("memory");
    let files = || Files { counters: Some(counters.try_clone().expect("descriptor")), ..machine.files() };
    let mut scratch = Scratch::new().expect("scratch");
    let store = Store::new(u64::from(SLOTS), machine.allocator, 1 << 30, files()).expect("store");
    let store = store.with_disk(machine.options()).expect("disk");
    (0..10).for_each(|slot| put(&store, slot, &page(slot, 1, false), &mut scratch).expect("room"));
    store.pool().set_limit_bytes(1 << 22);
    store.set_accept_threshold(70);
    store.set_promoting(false);
    store.backing().expect("a disk").set_budget(Some(1 << 20));
    evict(&store, What::All);
    let (written, gauges_before) = (store.metrics().writeback_bytes.get(), gauges(&store));
    drop(store);
    let store = Store::recover(machine.allocator, files(), Some(machine.options())).expect("recovered");
    let metrics = store.metrics();
    assert_eq!((metrics.stores.get(), metrics.writeback_bytes.get()), (10, written));
    assert_eq!(gauges(&store), gauges_before);
    assert_eq!(metrics.writeback_budget_bytes.get(), (1 << 20) - written);
    assert_eq!(store.pool().limit_bytes(), 1 << 22);
    (0..10).for_each(|slot| assert!(load(&store, slot, &mut scratch) == Some(page(slot, 1, false))));
    assert_eq!(metrics.pages_promoted.get(), 0);
    store.session().opens.fetch_add(1, Relaxed);
    drop(store);
    let other = SharedMetrics::new(Some(counters.as_fd())).expect("map");
    other.layout.set(1);
    let error = Store::recover(machine.allocator, files(), Some(machine.options())).err().expect("another layout");
    assert!(error.to_string().contains("layout 1"), "{error}");
    let store = machine.recover();
    assert_eq!(store.session().opens.load(Relaxed), 1);
}
