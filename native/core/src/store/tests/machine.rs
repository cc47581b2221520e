//! What outlives a process, and what a successor has to find there.

use super::*;
use crate::backing::records_of;
use crate::crash::with_hook;
use crate::error::Error;
use crate::memory::memory_file;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;

pub const SLOTS: u32 = 90;
pub const SEGMENTS: u64 = 8;

/// What outlives a process.
pub struct Machine {
    pub allocator: Allocator,
    pub state: File,
    pub disk: Arc<MemoryDisk>,
}

impl Machine {
    pub fn new(allocator: Allocator) -> Machine {
        let state = memory_file(c"state", 0).expect("memory").into();
        Machine { allocator, state, disk: Arc::new(MemoryDisk::new(SEGMENTS as usize * SEGMENT_BYTES)) }
    }

    pub fn files(&self) -> Files {
        Files { state: Some(self.state.try_clone().expect("descriptor").into()), counters: None }
    }

    pub fn start(&self, limit_pages: u64) -> Store {
        let limit = limit_pages * PAGE_SIZE as u64;
        let store = Store::new(u64::from(SLOTS), self.allocator, limit, self.files()).expect("store");
        store.with_disk(self.options()).expect("disk")
    }

    pub fn recover(&self) -> Store {
        Store::recover(self.allocator, self.files(), Some(self.options())).expect("recovered")
    }

    pub fn options(&self) -> DiskOptions {
        disk_of(SEGMENTS, self.disk.clone())
    }

    fn share(&self) -> Machine {
        let state = self.state.try_clone().expect("descriptor");
        Machine { allocator: self.allocator, state, disk: self.disk.clone() }
    }

    /// As it is now, holes and all.
    pub fn copy(&self) -> Machine {
        let length = self.state.metadata().expect("length").len();
        let copy: File = memory_file(c"copy", length).expect("memory").into();
        let seek = |from, whence| {
            // SAFETY: plain system call.
            unsafe { libc::lseek(self.state.as_raw_fd(), from, whence) }
        };
        let mut data = seek(0, libc::SEEK_DATA);
        while data >= 0 {
            let hole = seek(data, libc::SEEK_HOLE);
            let mut bytes = vec![0; (hole - data) as usize];
            self.state.read_exact_at(&mut bytes, data as u64).expect("read");
            copy.write_all_at(&bytes, data as u64).expect("written");
            data = seek(hole, libc::SEEK_DATA);
        }
        let disk = MemoryDisk::new(SEGMENTS as usize * SEGMENT_BYTES);
        self.disk.with(|from| disk.with(|to| to.copy_from_slice(from)));
        Machine { allocator: self.allocator, state: copy, disk: Arc::new(disk) }
    }

    /// The nonces of all records on the disk.
    fn nonces(&self) -> Vec<u64> {
        self.disk.with(|bytes| {
            let segments = bytes.chunks(SEGMENT_BYTES);
            let records = segments.flat_map(|segment| {
                records_of(segment, 0).map_while(|record| record.ok()).map(|record| {
                    let at = record.location.bytes().start as usize;
                    u64::from_le_bytes(segment[at + 8..at + 16].try_into().expect("8 bytes"))
                })
            });
            records.collect()
        })
    }
}

/// What a slot must read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Holds {
    Word(u32),
    Version(u32, bool),
    /// The same page as in others.
    Alike(u32, bool),
    Lost,
}

impl Holds {
    pub fn page(self, slot: u32) -> Option<Page> {
        match self {
            Holds::Word(word) => {
                let mut page = [0; PAGE_SIZE];
                page::fill(&mut page, word);
                Some(page)
            }
            Holds::Version(version, noise) => Some(page(slot, version, noise)),
            Holds::Alike(version, noise) => Some(page(0, version, noise)),
            Holds::Lost => None,
        }
    }
}

/// What slots read before what is under way, and what they read after it.
#[derive(Clone)]
pub struct Expected {
    pub before: Vec<Holds>,
    pub after: Vec<Holds>,
    /// An overwrite in a full pool loses the old page first.
    pub full: bool,
}

pub fn load(store: &Store, slot: u32, scratch: &mut Scratch) -> Option<Page> {
    let mut page = [0xee; PAGE_SIZE];
    match store.load(slot, &mut page, scratch) {
        Ok(()) => Some(page),
        Err(Error::Lost { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

/// A page, if it can be read.
pub fn load_or_lost(store: &Store, slot: u32, scratch: &mut Scratch) -> Option<Page> {
    let mut page = [0xee; PAGE_SIZE];
    store.load(slot, &mut page, scratch).is_ok().then_some(page)
}

/// Makes room where a store waits for it, as the shrinkers and the cleaner would: it may never wait for ever.
pub fn put(store: &Store, slot: u32, page: &Page, scratch: &mut Scratch) -> Result<()> {
    let mut threads = None;
    for _ in 0..2000 {
        match store.store(slot, page, LZ4, scratch) {
            Err(Error::NoRoomYet) => {
                let (shrinker, cleaner) =
                    threads.get_or_insert_with(|| (Shrinker::new().expect("memory"), Cleaner::new().expect("memory")));
                if store.shrink(shrinker).is_err() {
                    let _full_perhaps = store.clean(cleaner);
                }
            }
            result => return result,
        }
    }
    panic!("a store waits for ever: {:?}", store.backing().map(|backing| backing.has_room()));
}

pub fn evict(store: &Store, what: What) {
    let (mut shrinker, mut job) = (Shrinker::with_clusters().expect("memory"), Job::new(what));
    while let Ok(true) = store.write_back(&mut shrinker, &mut job) {}
}

/// Makes all pages smaller that can be, and stores those once that are alike, whatever their age.
pub fn recompress(store: &Store, tier: Tier) -> Recompressed {
    let mut recompressor = Recompressor::new().expect("memory");
    store.prepare(&mut recompressor, tier).expect("a tier");
    store.prepare_duplicates(&mut recompressor, true);
    store.recompress(&mut recompressor, &Order { tier, age: 0, pages: u64::MAX, processor_time: Duration::MAX })
}

pub fn clean(store: &Store) {
    let mut cleaner = Cleaner::new().expect("memory");
    while let Ok(true) = store.clean(&mut cleaner) {}
}

/// All that is as of now.
pub fn gauges(store: &Store) -> Vec<u64> {
    let metrics = store.metrics();
    let single = [
        &metrics.pages_lz4,
        &metrics.pages_zstd,
        &metrics.pages_zstd_dictionary,
        &metrics.bytes_lz4,
        &metrics.bytes_zstd,
        &metrics.bytes_zstd_dictionary,
        &metrics.recompressions_in_flight,
        &metrics.pages_incompressible,
        &metrics.pages_same_filled,
        &metrics.pages_on_disk,
        &metrics.pages_in_clusters,
        &metrics.pages_lost,
        &metrics.pages_shared,
        &metrics.shared_pages,
        &metrics.compressed_bytes,
        &metrics.pool_bytes,
        &metrics.pool_limit_bytes,
        &metrics.backed_bytes,
        &metrics.backing_state,
        &metrics.backing_bytes,
        &metrics.backing_free_bytes,
        &metrics.disk_live_bytes,
        &metrics.writeback_budget_bytes,
        &metrics.writebacks_in_flight,
        &metrics.cleanings_in_flight,
    ];
    let classes =
        metrics.classes.iter().flat_map(|class| [&class.zspages, &class.objects].into_iter().chain(&class.groups));
    let needed = store.dictionaries.installed().into_iter().map(|installed| installed.pages);
    single.into_iter().chain(classes).map(|gauge| gauge.get()).chain(needed).collect()
}

/// What all slots read, which must be as expected.
fn read_all(store: &Store, expected: &Expected) -> Vec<Holds> {
    store.set_promoting(false);
    let mut scratch = Scratch::new().expect("scratch");
    let mut holds = Vec::new();
    for slot in 0..SLOTS {
        let (before, after) = (expected.before[slot as usize], expected.after[slot as usize]);
        let page = load(store, slot, &mut scratch);
        let possible = [before, after, Holds::Lost];
        let possible = &possible[..if expected.full && before != after { 3 } else { 2 }];
        let found = possible.iter().find(|holds| holds.page(slot) == page);
        holds.push(*found.unwrap_or_else(|| panic!("slot {slot} reads neither {before:?} nor {after:?}")));
    }
    holds
}

/// A successor goes on with what is left: every page is what it was, or what it was about to be, and the store is as good
/// as one that nobody has killed.
pub fn survive(machine: &Machine, expected: &Expected) {
    let state =
        State::open(machine.files().state.expect("a file"), |slots| machine.allocator.geometry(slots)).expect("whole");
    let next_nonce = state.cipher().next_nonce.load(Relaxed);
    assert!(machine.nonces().into_iter().all(|nonce| nonce < next_nonce), "a nonce would be used again");
    // The successor may be killed itself.
    let (again, as_before) = (machine.share(), expected.clone());
    let mut times = 0;
    let hook = move |_| {
        times += 1;
        if times <= 2 {
            let (copy, expected) = (again.copy(), as_before.clone());
            std::thread::spawn(move || read_all(&copy.recover(), &expected)).join().expect("every page is there");
        }
    };
    let store = with_hook(hook, || machine.recover());
    let mut holds = read_all(&store, expected);
    let mut scratch = Scratch::new().expect("scratch");
    let mut verifier = Verifier::default();
    while store.verify(&mut verifier) {}
    assert_eq!(store.metrics().objects_found_bad.get(), 0);
    store.set_promoting(true);
    // It goes on as any other, with every kind of step.
    for slot in (0..SLOTS).filter(|slot| slot % 3 == 0) {
        let new = Holds::Version(1 << 20 | slot, slot % 2 == 0);
        let stored = put(&store, slot, &new.page(slot).expect("a page"), &mut scratch);
        holds[slot as usize] = if stored.is_ok() { new } else { Holds::Lost };
    }
    store.compact();
    evict(&store, What::Coldest { bytes: 1 << 15 });
    clean(&store);
    for slot in 0..SLOTS {
        assert!(load(&store, slot, &mut scratch) == holds[slot as usize].page(slot), "slot {slot} afterwards");
    }
    end(&store);
}
