//! What happens while a segment is being written, when no lock may be held: done by the disk itself, in the middle of
//! its write, on the shrinker's own thread. A slot lock held over the write would be a deadlock, or a panic of the lock
//! order.

use super::*;
use crate::error::Error;
use std::io;
use std::sync::{Mutex, OnceLock, Weak};

type Meanwhile = Box<dyn FnOnce(&Store) + Send>;

/// A disk that does something else in the middle of its next write, or read.
#[derive(Default)]
struct Interrupted {
    store: OnceLock<Weak<Store>>,
    during_write: Mutex<Option<Meanwhile>>,
    fails: std::sync::atomic::AtomicBool,
}

struct InterruptedDisk(MemoryDisk, Arc<Interrupted>);

impl Disk for InterruptedDisk {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let meanwhile = self.1.during_write.lock().expect("not poisoned").take();
        if let (Some(meanwhile), Some(store)) = (meanwhile, self.1.store.get().and_then(Weak::upgrade)) {
            meanwhile(&store);
        }
        if self.1.fails.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.0.write(offset, from)
    }
}

const SLOTS: u64 = 32;

struct Fixture {
    store: Arc<Store>,
    interrupted: Arc<Interrupted>,
    scratch: Scratch,
    shrinker: Shrinker,
    cleaner: Cleaner,
}

impl Fixture {
    /// Slots 0 to 7 hold version 1.
    fn new(segments: u64) -> Fixture {
        let interrupted = Arc::new(Interrupted::default());
        let disk = InterruptedDisk(MemoryDisk::new(segments as usize * SEGMENT_BYTES), interrupted.clone());
        let store = Arc::new(new_store(Allocator::Zsmalloc, SLOTS, 100, disk_of(segments, disk)));
        interrupted.store.set(Arc::downgrade(&store)).expect("once");
        store.set_promoting(false);
        let mut fixture = Fixture {
            store,
            interrupted,
            scratch: Scratch::new().expect("scratch"),
            shrinker: Shrinker::with_clusters().expect("memory"),
            cleaner: Cleaner::new().expect("memory"),
        };
        (0..8).for_each(|slot| put(&fixture.store, slot, 1));
        fixture.reads(&[(0, 1), (7, 1)]);
        fixture
    }

    fn meanwhile(&self, what: impl FnOnce(&Store) + Send + 'static) {
        *self.interrupted.during_write.lock().expect("not poisoned") = Some(Box::new(what));
    }

    fn write_back(&mut self, what: What) -> (Result<bool>, Job) {
        let mut job = Job::new(what);
        let result = self.store.write_back(&mut self.shrinker, &mut job);
        assert!(self.interrupted.during_write.lock().expect("not poisoned").is_none(), "nothing was written");
        (result, job)
    }

    /// Versions that slots must read; 0: zeros.
    fn reads(&mut self, expected: &[(u32, u32)]) {
        for &(slot, version) in expected {
            let mut bytes = [0xee; PAGE_SIZE];
            self.store.load(slot, &mut bytes, &mut self.scratch).expect("readable");
            let expected = if version == 0 { [0; PAGE_SIZE] } else { page(slot, version, false) };
            assert!(bytes == expected, "slot {slot} is not version {version}");
        }
    }
}

fn put(store: &Store, slot: u32, version: u32) {
    let mut scratch = Scratch::new().expect("scratch");
    store.store(slot, &page(slot, version, false), LZ4, &mut scratch).expect("room");
}

#[test]
fn whoever_changes_a_page_during_the_write_wins() {
    let mut fixture = Fixture::new(8);
    fixture.meanwhile(|store| {
        put(store, 0, 2);
        store.discard(1..2, &mut Detached::with_capacity(0));
        store.store(2, &[7; PAGE_SIZE], LZ4, &mut Scratch::new().expect("scratch")).expect("room");
        store.store_part(3, 100, &[9; 10], LZ4, &mut Scratch::new().expect("scratch")).expect("room");
        // Neither another shrinker nor a mover takes what is under way.
        let (mut other, mut job) = (Shrinker::new().expect("memory"), Job::new(What::Page(4)));
        store.write_back(&mut other, &mut job).expect("room");
        assert_eq!(job.pages, 0);
        store.compact();
        let mut bytes = [0; PAGE_SIZE];
        store.load(4, &mut bytes, &mut Scratch::new().expect("scratch")).expect("readable");
        assert!(bytes == page(4, 1, false));
    });
    let (result, job) = fixture.write_back(What::All);
    assert!(!result.expect("written"));
    assert_eq!(job.pages, 4);
    assert_eq!(fixture.store.metrics().pages_on_disk.get(), 4);
    assert_eq!(fixture.store.metrics().pages_written_back.get(), 4);
    fixture.reads(&[(0, 2), (1, 0), (4, 1), (5, 1), (6, 1), (7, 1)]);
    end(&fixture.store);
}

/// Of a cluster, the others are where they were to be.
#[test]
fn whoever_changes_a_page_of_a_cluster_during_the_write_wins() {
    let mut fixture = Fixture::new(8);
    fixture.meanwhile(|store| {
        put(store, 0, 2);
        store.discard(1..2, &mut Detached::with_capacity(0));
        (0..5000).for_each(|version| put(store, 2, 2 + version));
        let mut bytes = [0; PAGE_SIZE];
        store.load(3, &mut bytes, &mut Scratch::new().expect("scratch")).expect("readable");
        assert!(bytes == page(3, 1, false));
    });
    let (result, job) = fixture.write_back(What::Unused { seconds: 0 });
    assert!(!result.expect("written"));
    let metrics = fixture.store.metrics();
    assert_eq!((job.pages, metrics.pages_on_disk.get(), metrics.pages_in_clusters.get()), (5, 5, 5));
    fixture.reads(&[(0, 2), (1, 0), (2, 5001), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1)]);
    // A new generation of the same slot, which an old cluster has no page of.
    fixture.write_back(What::Unused { seconds: 0 }).0.expect("written");
    fixture.reads(&[(0, 2), (1, 0), (2, 5001), (3, 1)]);
    end(&fixture.store);
}

/// Nobody else needs the dictionary that a cluster takes which is being written.
#[test]
fn a_dictionary_stays_while_a_cluster_that_takes_it_is_written() {
    let mut fixture = Fixture::new(8);
    let dictionary: Vec<u8> = (0..8).flat_map(|slot| page(slot, 1, false)[..300].to_vec()).collect();
    fixture.store.install_dictionary(&dictionary).expect("a dictionary");
    let with = Compression { algorithm: Algorithm::Zstd, zstd_level: 9 };
    let mut recompressor = Recompressor::new().expect("memory");
    fixture.store.prepare(&mut recompressor, Tier { number: 2, with, dictionary: true }).expect("a dictionary");
    fixture.meanwhile(|store| {
        store.install_dictionary(&[7; 300]).expect("another one");
        store.install_dictionary(&[8; 300]).expect("and another");
    });
    fixture.write_back(What::Unused { seconds: 0 }).0.expect("written");
    assert_eq!(fixture.store.metrics().pages_in_clusters.get(), 8);
    let needed = fixture.store.dictionaries.installed().map(|installed| installed.pages);
    assert_eq!(needed.iter().sum::<u64>(), 8, "{needed:?}");
    fixture.reads(&[(0, 1), (3, 1), (4, 1), (7, 1)]);
    end(&fixture.store);
}

#[test]
fn a_page_that_goes_round_during_the_write_is_not_taken_for_what_it_was() {
    let mut fixture = Fixture::new(8);
    // Written again and again, it comes by every generation; its object lies where it was only for the shrinker.
    fixture.meanwhile(|store| (0..5000).for_each(|version| put(store, 0, 2 + version)));
    fixture.write_back(What::All).0.expect("written");
    fixture.reads(&[(0, 5001)]);
    end(&fixture.store);
}

#[test]
fn when_the_write_fails_every_page_stays_where_it_was_and_can_be_written_back_again() {
    let mut fixture = Fixture::new(8);
    fixture.interrupted.fails.store(true, std::sync::atomic::Ordering::Relaxed);
    fixture.meanwhile(|store| {
        put(store, 0, 2);
        store.discard(1..2, &mut Detached::with_capacity(0));
    });
    let (result, job) = fixture.write_back(What::All);
    assert!(matches!(result, Err(Error::DiskWrite(_))));
    assert_eq!((job.pages, fixture.store.metrics().pages_on_disk.get()), (0, 0));
    assert_eq!(fixture.store.metrics().writeback_errors.get(), 1);
    fixture.reads(&[(0, 2), (1, 0), (2, 1), (7, 1)]);
    fixture.interrupted.fails.store(false, std::sync::atomic::Ordering::Relaxed);
    let (result, job) = fixture.write_back(What::All);
    result.expect("written");
    assert_eq!((job.pages, fixture.store.metrics().pages_on_disk.get()), (7, 7));
    fixture.reads(&[(0, 2), (1, 0), (2, 1), (7, 1)]);
    end(&fixture.store);
}

#[test]
fn whoever_changes_a_page_while_its_segment_is_cleaned_wins() {
    let mut fixture = Fixture::new(3);
    (0..4).for_each(|slot| assert!(fixture.write_back(What::Page(slot)).0.is_ok() || slot > 1));
    assert!(fixture.store.wants_cleaning());
    fixture.meanwhile(|store| {
        put(store, 0, 2);
        let mut bytes = [0; PAGE_SIZE];
        store.load(1, &mut bytes, &mut Scratch::new().expect("scratch")).expect("readable");
        assert!(bytes == page(1, 1, false));
    });
    assert!(fixture.store.clean(&mut fixture.cleaner).expect("cleaned"));
    assert!(fixture.interrupted.during_write.lock().expect("not poisoned").is_none(), "nothing was cleaned");
    assert_eq!(fixture.store.metrics().pages_on_disk.get(), 1);
    fixture.reads(&[(0, 2), (1, 1), (2, 1), (3, 1)]);
    end(&fixture.store);
}

#[test]
fn the_end_waits_for_who_is_writing() {
    let mut fixture = Fixture::new(8);
    fixture.meanwhile(|store| {
        store.discard(0..SLOTS, &mut Detached::with_capacity(0));
        let busy = store.destroy(Duration::ZERO).expect_err("somebody is writing");
        assert!(matches!(busy, Error::Busy { writebacks: 1, cleanings: 0, recompressions: 0, movers: 0 }), "{busy}");
        assert_eq!(store.in_flight(), InFlight { writebacks: 1, cleanings: 0, recompressions: 0, movers: 0 });
        assert!(!store.can_make_room());
    });
    fixture.write_back(What::All).0.expect("written");
    end(&fixture.store);
    let mut job = Job::new(What::All);
    assert!(matches!(fixture.store.write_back(&mut fixture.shrinker, &mut job), Err(Error::NoWriteback)));
}
