//! Clusters of cold pages: how they are made, read, taken apart by overwrites, and cleaned.

use super::*;
use crate::backing::alloc_tests;
use crate::backing::Faults;
use crate::error::Error;

const SLOTS: u32 = 2560;

struct Fixture {
    store: Store,
    disk: Arc<MemoryDisk>,
    shrinker: Shrinker,
    cleaner: Cleaner,
    scratch: Scratch,
}

impl Fixture {
    fn new(limit_pages: u64, segments: u64) -> Fixture {
        Fixture::with_faults(limit_pages, segments, "write:1000000:eio")
    }

    fn with_faults(limit_pages: u64, segments: u64, rules: &str) -> Fixture {
        let disk = Arc::new(MemoryDisk::new(segments as usize * SEGMENT_BYTES));
        let faults = Faults::new(disk.clone(), rules).expect("rules");
        let store = new_store(Allocator::Zsmalloc, u64::from(SLOTS), limit_pages, disk_of(segments, faults));
        store.set_promoting(false);
        Fixture {
            store,
            disk,
            shrinker: Shrinker::with_clusters().expect("memory"),
            cleaner: Cleaner::new().expect("memory"),
            scratch: Scratch::new().expect("scratch"),
        }
    }

    fn put(&mut self, slots: Range<u32>, version: u32) {
        for slot in slots {
            self.store.store(slot, &page(slot, version, false), LZ4, &mut self.scratch).expect("room");
        }
    }

    fn write_back(&mut self, what: What) -> Result<Job> {
        let mut job = Job::new(what);
        while self.store.write_back(&mut self.shrinker, &mut job)? {}
        Ok(job)
    }

    /// All that are in the pool, as cold ones.
    fn write_back_cold(&mut self) -> u64 {
        self.write_back(What::Unused { seconds: 0 }).expect("room").pages
    }

    fn discard(&self, slots: Range<u32>) {
        self.store.discard(u64::from(slots.start)..u64::from(slots.end), &mut Detached::with_capacity(0));
    }

    /// What a slot reads from the disk itself; None: it cannot be read.
    fn read(&mut self, slot: u32) -> Option<Page> {
        let mut found = [0xee; PAGE_SIZE];
        self.scratch.begin_request();
        self.store.load(slot, &mut found, &mut self.scratch).is_ok().then_some(found)
    }

    fn assert_reads(&mut self, slots: impl IntoIterator<Item = u32>, version: u32) {
        for slot in slots {
            assert!(self.read(slot) == Some(page(slot, version, false)), "slot {slot} is not version {version}");
        }
    }

    fn counts(&self) -> [u64; 2] {
        [self.store.metrics().pages_on_disk.get(), self.store.metrics().pages_in_clusters.get()]
    }

    fn live(&self) -> u64 {
        self.store.metrics().disk_live_bytes.get()
    }

    fn clean(&mut self) -> u64 {
        let before = self.store.metrics().cleaned_segments.get();
        while self.store.clean(&mut self.cleaner).expect("a disk") {}
        self.store.metrics().cleaned_segments.get() - before
    }
}

#[test]
fn cold_pages_go_together_and_come_back_one_by_one() {
    let mut alone = Fixture::new(1000, 8);
    alone.put(0..400, 1);
    assert_eq!(alone.write_back(What::All).expect("room").pages, 400);
    assert_eq!(alone.counts(), [400, 0]);
    let mut fixture = Fixture::new(1000, 8);
    fixture.put(0..400, 1);
    assert_eq!(fixture.write_back_cold(), 400);
    assert_eq!(fixture.counts(), [400, 400]);
    assert!(fixture.live() * 10 < alone.live() * 9, "{} bytes, {} one by one", fixture.live(), alone.live());
    assert!(fixture.store.metrics().cluster_ns.get() > 0);
    fixture.assert_reads((0..400).rev(), 1);
    // A request that wants all four waits for the disk once.
    let reads = || fixture.store.metrics().disk_reads.get();
    let (before, mut found) = (reads(), [0; PAGE_SIZE]);
    fixture.scratch.begin_request();
    for slot in 8..12 {
        fixture.store.load(slot, &mut found, &mut fixture.scratch).expect("readable");
        assert!(found == page(slot, 1, false));
    }
    assert_eq!(reads(), before + 1);
    end(&fixture.store);
    end(&alone.store);
}

/// Three, those that are not aligned, and those of which one is incompressible or not there.
#[test]
fn only_whole_groups_go_together() {
    let mut fixture = Fixture::new(1000, 8);
    for slot in [0, 1, 2, 5, 6, 7, 8, 12, 13, 14, 15] {
        fixture.put(slot..slot + 1, 1);
    }
    fixture.store.store(15, &page(15, 1, true), LZ4, &mut fixture.scratch).expect("room");
    assert_eq!(fixture.write_back_cold(), 11);
    assert_eq!(fixture.counts(), [11, 0]);
    fixture.assert_reads([0, 1, 2, 5, 6, 7, 8, 12, 13, 14], 1);
    assert!(fixture.read(15) == Some(page(15, 1, true)));
    end(&fixture.store);
}

/// Pages of which each compresses, but not so far that four fit into what a slot word can name.
fn half_noise(slot: u32) -> Page {
    let mut half = page(slot, 1, true);
    half[3000..].fill(0);
    half
}

#[test]
fn what_gains_nothing_goes_one_by_one() {
    let mut fixture = Fixture::new(1000, 8);
    (0..8).for_each(|slot| fixture.store.store(slot, &half_noise(slot), LZ4, &mut fixture.scratch).expect("room"));
    assert_eq!(fixture.write_back_cold(), 8);
    assert_eq!(fixture.counts(), [8, 0]);
    (0..8).for_each(|slot| assert!(fixture.read(slot) == Some(half_noise(slot))));
    end(&fixture.store);
}

/// Each word is for itself: what becomes of one page is nothing to the other three, and each gives back a quarter.
#[test]
fn a_page_leaves_its_cluster_alone() {
    let mut fixture = Fixture::new(1000, 8);
    fixture.put(0..4, 1);
    fixture.write_back_cold();
    let record = fixture.live();
    fixture.put(1..2, 2);
    assert_eq!(fixture.live(), record / 4 * 3);
    fixture.assert_reads([0, 2, 3], 1);
    fixture.discard(3..4);
    assert_eq!(fixture.live(), record / 4 * 2);
    fixture.assert_reads([0, 2], 1);
    fixture.store.set_promoting(true);
    fixture.assert_reads([0], 1);
    assert_eq!((fixture.live(), fixture.store.metrics().pages_promoted.get()), (record / 4, 1));
    assert_eq!(fixture.counts(), [1, 1]);
    fixture.store.set_promoting(false);
    fixture.assert_reads([0, 2], 1);
    fixture.assert_reads([1], 2);
    // The segment is not written anew while one lives: the rest of the disk is.
    for version in 3..20 {
        fixture.put(100..1100, version);
        fixture.write_back_cold();
    }
    fixture.assert_reads([0, 2], 1);
    fixture.discard(2..3);
    assert_eq!(fixture.read(3), Some([0; PAGE_SIZE]));
    end(&fixture.store);
}

/// Segments in which of each cluster so many pages still live.
fn sparse(live: u32) -> Fixture {
    let mut fixture = Fixture::new(1 << 14, 3);
    for round in 0..2 {
        let slots = round * 1000..round * 1000 + 1000;
        fixture.put(slots.clone(), 1);
        assert_eq!(fixture.write_back_cold(), 1000);
        // Of what is left there are not many.
        fixture.discard(slots.start + 200..slots.end);
        for group in (slots.start..slots.start + 200).step_by(4) {
            fixture.discard(group + live..group + 4);
        }
    }
    fixture
}

fn living(live: u32) -> impl Iterator<Item = u32> {
    (0..200).chain(1000..1200).filter(move |slot| slot % 4 < live)
}

#[test]
fn the_cleaner_moves_whole_clusters_and_takes_others_apart() {
    for live in 1..=4 {
        let mut fixture = sparse(live);
        let before = fixture.live();
        assert_eq!(fixture.clean(), 2, "{live} live");
        let pages = 100 * u64::from(live);
        assert_eq!(fixture.counts(), [pages, if live == 4 { pages } else { 0 }]);
        if live == 4 {
            assert_eq!(fixture.live(), before);
        }
        fixture.assert_reads(living(live), 1);
        for slot in living(live) {
            fixture.put(slot..slot + 1, 2);
        }
        fixture.assert_reads(living(live), 2);
        assert_eq!(fixture.live(), 0);
        end(&fixture.store);
    }
}

fn tier() -> Tier {
    let with = Compression { algorithm: Algorithm::Zstd, zstd_level: 9 };
    Tier { number: 2, with, dictionary: true }
}

fn dictionary() -> Vec<u8> {
    (0..16).flat_map(|slot| page(slot, 1, false)[..300].to_vec()).collect()
}

/// The newest dictionary compresses clusters too, and stays as long as one of their pages is there.
#[test]
fn clusters_take_the_newest_dictionary() {
    let mut fixture = Fixture::new(1000, 8);
    fixture.store.install_dictionary(&dictionary()).expect("a dictionary");
    let mut recompressor = Recompressor::new().expect("memory");
    fixture.put(0..16, 1);
    fixture.put(16..24, 7);
    fixture.store.prepare(&mut recompressor, tier()).expect("a dictionary");
    let order = Order { tier: tier(), age: 0, pages: u64::MAX, processor_time: Duration::MAX };
    assert!(fixture.store.recompress(&mut recompressor, &order).recompressed >= 16);
    let needed = |fixture: &Fixture| -> Vec<u64> {
        fixture.store.dictionaries.installed().iter().map(|found| found.pages).filter(|&pages| pages > 0).collect()
    };
    fixture.write_back_cold();
    assert_eq!(fixture.counts()[0], 24);
    assert!(fixture.counts()[1] >= 16, "{:?}", fixture.counts());
    assert_eq!(needed(&fixture), [24]);
    fixture.assert_reads(0..16, 1);
    fixture.assert_reads(16..24, 7);
    // Another takes its place, but the first is still needed.
    fixture.store.install_dictionary(&[3; 200]).expect("another one");
    fixture.discard(1..24);
    assert_eq!(needed(&fixture), [1]);
    fixture.assert_reads([0], 1);
    fixture.discard(0..1);
    fixture.store.prepare(&mut recompressor, tier()).expect("the other");
    assert_eq!(fixture.store.dictionaries.installed().iter().filter(|found| found.serial > 0).count(), 1);
    // What compresses with one that is not the newest is not used.
    fixture.store.install_dictionary(&dictionary()).expect("a third");
    fixture.put(0..8, 1);
    fixture.write_back_cold();
    assert_eq!(needed(&fixture), []);
    fixture.assert_reads(0..8, 1);
    end(&fixture.store);
}

/// Of a segment that could not be written all stays in the pool, and no dictionary is needed for it.
#[test]
fn a_write_that_fails_leaves_all_pages_in_the_pool() {
    let mut fixture = Fixture::with_faults(1000, 8, "write:1:eio");
    fixture.store.install_dictionary(&dictionary()).expect("a dictionary");
    let mut recompressor = Recompressor::new().expect("memory");
    fixture.put(0..16, 1);
    fixture.store.prepare(&mut recompressor, tier()).expect("a dictionary");
    assert!(matches!(fixture.write_back(What::Unused { seconds: 0 }), Err(Error::DiskWrite(_))));
    assert_eq!((fixture.counts(), fixture.live()), ([0, 0], 0));
    assert!(fixture.store.dictionaries.installed().iter().all(|found| found.pages == 0));
    fixture.assert_reads(0..16, 1);
    assert_eq!(fixture.write_back_cold(), 16);
    assert_eq!(fixture.counts(), [16, 16]);
    fixture.assert_reads(0..16, 1);
    end(&fixture.store);
}

/// What is wrong on the disk costs all that lives in the cluster, and nothing else.
#[test]
fn a_flipped_bit_costs_the_pages_of_its_cluster() {
    let mut fixture = Fixture::new(1000, 8);
    fixture.put(0..16, 1);
    fixture.write_back_cold();
    fixture.discard(5..6);
    // The second of four, which are of about the same length.
    let at = (fixture.live() / 4 + fixture.live() / 8) as usize;
    fixture.disk.with(|bytes| bytes[at] ^= 1);
    assert_eq!(fixture.read(4), None);
    assert_eq!(fixture.store.metrics().pages_lost.get(), 1);
    for slot in [6, 7] {
        assert_eq!(fixture.read(slot), None);
    }
    assert_eq!(fixture.store.metrics().errors_corrupt.get(), 3);
    assert_eq!(fixture.read(5), Some([0; PAGE_SIZE]));
    fixture.assert_reads((0..4).chain(8..16), 1);
    end(&fixture.store);
}

/// What came to a cluster and what went meanwhile: the pages are theirs who have them now.
#[test]
fn a_disk_that_is_full_of_clusters_takes_what_fits_and_ends() {
    for (leave, alike) in [(1, false), (3, false), (2, true)] {
        let mut fixture = Fixture::new(64, 6);
        let written = |slot: u32, version: u32| {
            if alike {
                like_its_neighbours(slot, version)
            } else {
                page(slot, version, false)
            }
        };
        let mut versions = vec![0; SLOTS as usize];
        let mut refused = 0;
        for version in 1..3 {
            for slot in 0..SLOTS {
                let page = written(slot, version);
                let stored = put_cold(&mut fixture, slot, &page);
                versions[slot as usize] = if stored { version } else { 0 };
                refused += u32::from(!stored);
                // Of what is there some is given up, so that clusters get sparse.
                if slot % 4 >= leave && slot >= 400 {
                    let given_up = slot - 400;
                    fixture.discard(given_up..given_up + 1);
                    versions[given_up as usize] = u32::MAX;
                }
            }
        }
        for slot in 0..SLOTS {
            let expected = match versions[slot as usize] {
                0 => None,
                u32::MAX => Some([0; PAGE_SIZE]),
                version => Some(written(slot, version)),
            };
            assert!(fixture.read(slot) == expected, "slot {slot}, {refused} refused");
        }
        end(&fixture.store);
    }
}

/// Half of it is noise, which all four have: by itself each takes four times its share.
fn like_its_neighbours(slot: u32, version: u32) -> Page {
    let mut alike = page(slot / 4, version, true);
    alike[2048..].fill(0);
    alike[3000..3004].copy_from_slice(&slot.to_le_bytes());
    alike
}

/// What was expected to make room does not: it is left alone, and nobody waits for it.
#[test]
fn clusters_that_take_more_room_apart_are_not_cleaned_for_ever() {
    let mut fixture = Fixture::new(1 << 14, 6);
    for slot in 0..SLOTS {
        let page = like_its_neighbours(slot, 1);
        fixture.store.store(slot, &page, LZ4, &mut fixture.scratch).expect("room");
    }
    // Whole segments; the rest stays in the pool.
    assert!(matches!(fixture.write_back(What::Unused { seconds: 0 }), Err(Error::BackingFull)));
    let [on_disk, clustered] = fixture.counts();
    assert!(on_disk == clustered && on_disk > 2000, "{on_disk} pages, {clustered} in clusters");
    for group in (0..SLOTS).step_by(4) {
        fixture.discard(group + 2..group + 4);
    }
    assert!(fixture.store.wants_cleaning());
    assert!(!fixture.store.clean(&mut fixture.cleaner).expect("a disk"));
    for attempt in 0.. {
        assert!(attempt < 20, "the cleaner never ends");
        if !fixture.store.wants_cleaning() {
            break;
        }
        let _no_gain = fixture.store.clean(&mut fixture.cleaner).expect("a disk");
    }
    assert!(!fixture.store.backing().expect("a disk").has_room());
    for slot in (0..SLOTS).filter(|slot| slot % 4 < 2) {
        assert!(fixture.read(slot) == Some(like_its_neighbours(slot, 1)), "slot {slot}");
    }
    end(&fixture.store);
}

/// As the workers, the shrinkers, the sweeper and the cleaner do: it may never take for ever.
fn put_cold(fixture: &mut Fixture, slot: u32, page: &Page) -> bool {
    for _ in 0..3000 {
        match fixture.store.store(slot, page, LZ4, &mut fixture.scratch) {
            Ok(()) => return true,
            Err(Error::NoRoomYet) => {
                let mut job = Job::new(What::Unused { seconds: 0 });
                if fixture.store.write_back(&mut fixture.shrinker, &mut job).is_err() {
                    let _full_perhaps = fixture.store.clean(&mut fixture.cleaner);
                }
            }
            Err(_) => return false,
        }
    }
    panic!("a store waits for ever: {:?}", fixture.store.backing().map(|backing| backing.has_room()));
}

#[test]
fn clusters_allocate_nothing() {
    let mut fixture = sparse(3);
    fixture.put(600..616, 1);
    let before = alloc_tests::count();
    assert!(fixture.store.clean(&mut fixture.cleaner).expect("a disk"));
    let mut job = Job::new(What::Unused { seconds: 0 });
    assert!(fixture.store.write_back(&mut fixture.shrinker, &mut job).is_ok());
    let mut found = [0; PAGE_SIZE];
    for slot in [600, 601, 1000] {
        fixture.store.load(slot, &mut found, &mut fixture.scratch).expect("readable");
    }
    fixture.store.set_promoting(true);
    fixture.store.load(602, &mut found, &mut fixture.scratch).expect("readable");
    assert_eq!(alloc_tests::count(), before);
    assert_eq!(fixture.store.metrics().pages_promoted.get(), 1);
    end(&fixture.store);
}
