//! Ends at crash points: whatever a process leaves behind there, a successor goes on with every page.

use super::*;
use crate::backing::records_of;
use crate::crash::with_hook;
use crate::error::Error;
use crate::memory::memory_file;
use crate::state::State;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Mutex;

pub const SLOTS: u32 = 90;
const SEGMENTS: u64 = 8;

/// What outlives a process.
pub struct Machine {
    pub allocator: Allocator,
    pub state: File,
    disk: Arc<MemoryDisk>,
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

    fn recover(&self) -> Store {
        Store::recover(self.allocator, self.files(), Some(self.options())).expect("recovered")
    }

    pub fn options(&self) -> DiskOptions {
        disk_of(SEGMENTS, self.disk.clone())
    }

    /// As it is now, holes and all.
    fn copy(&self) -> Machine {
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
enum Holds {
    Word(u32),
    Version(u32, bool),
    Lost,
}

impl Holds {
    fn page(self, slot: u32) -> Option<Page> {
        match self {
            Holds::Word(word) => {
                let mut page = [0; PAGE_SIZE];
                page::fill(&mut page, word);
                Some(page)
            }
            Holds::Version(version, noise) => Some(page(slot, version, noise)),
            Holds::Lost => None,
        }
    }
}

/// What slots read before what is under way, and what they read after it.
#[derive(Clone)]
struct Expected {
    before: Vec<Holds>,
    after: Vec<Holds>,
    /// An overwrite in a full pool loses the old page first.
    full: bool,
}

fn load(store: &Store, slot: u32, scratch: &mut Scratch) -> Option<Page> {
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

fn put(store: &Store, slot: u32, page: &Page, scratch: &mut Scratch) -> Result<()> {
    let mut shrinker = None;
    loop {
        match store.store(slot, page, LZ4, scratch) {
            Err(Error::NoRoomYet) => {
                let shrinker = shrinker.get_or_insert_with(|| Shrinker::new().expect("memory"));
                let _full_perhaps = store.shrink(shrinker);
            }
            result => return result,
        }
    }
}

fn evict(store: &Store, what: What) {
    let (mut shrinker, mut job) = (Shrinker::new().expect("memory"), Job::new(what));
    while let Ok(true) = store.write_back(&mut shrinker, &mut job) {}
}

fn clean(store: &Store) {
    let mut cleaner = Cleaner::new().expect("memory");
    while let Ok(true) = store.clean(&mut cleaner) {}
}

/// All that is as of now.
fn gauges(store: &Store) -> Vec<u64> {
    let metrics = store.metrics();
    let single = [
        &metrics.pages_lz4,
        &metrics.pages_incompressible,
        &metrics.pages_same_filled,
        &metrics.pages_on_disk,
        &metrics.pages_lost,
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
    single.into_iter().chain(classes).map(|gauge| gauge.get()).collect()
}

/// A successor goes on with what is left: every page is what it was, or what it was about to be, and the store is as good
/// as one that nobody has killed.
fn survive(machine: &Machine, expected: &Expected) {
    let next_nonce = {
        let file = machine.files().state.expect("a file");
        let state = State::open(file, machine.allocator.geometry()).expect("whole");
        let next = state.cipher().next_nonce.load(Relaxed);
        next
    };
    assert!(machine.nonces().into_iter().all(|nonce| nonce < next_nonce), "a nonce would be used again");
    let store = machine.recover();
    store.set_promoting(false);
    let mut scratch = Scratch::new().expect("scratch");
    let mut holds = Vec::new();
    for slot in 0..SLOTS {
        let (before, after) = (expected.before[slot as usize], expected.after[slot as usize]);
        let page = load(&store, slot, &mut scratch);
        let possible = [before, after, Holds::Lost];
        let possible = &possible[..if expected.full && before != after { 3 } else { 2 }];
        let found = possible.iter().find(|holds| holds.page(slot) == page);
        holds.push(*found.unwrap_or_else(|| panic!("slot {slot} reads neither {before:?} nor {after:?}")));
    }
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

#[derive(Clone, Debug)]
enum Step {
    Store {
        slot: u32,
        count: u32,
        noise: bool,
    },
    SameFilled {
        slot: u32,
    },
    Load {
        slot: u32,
        count: u32,
    },
    Discard {
        slot: u32,
        count: u32,
    },
    /// Leaves one slot of so many.
    Thin {
        leave: u32,
    },
    Compact,
    WriteBack(What),
    Clean,
    Shrink,
    /// The process ends between two steps, and another goes on.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (slot, count) = (0..SLOTS, 1..40u32);
    let what = prop_oneof![Just(What::All), (0..1u64 << 17).prop_map(|bytes| What::Coldest { bytes })];
    let step = prop_oneof![
        6 => (slot.clone(), count.clone(), any::<bool>())
            .prop_map(|(slot, count, noise)| Step::Store { slot, count, noise }),
        1 => slot.clone().prop_map(|slot| Step::SameFilled { slot }),
        3 => (slot.clone(), count.clone()).prop_map(|(slot, count)| Step::Load { slot, count }),
        2 => (slot, count).prop_map(|(slot, count)| Step::Discard { slot, count }),
        1 => (2..6u32).prop_map(|leave| Step::Thin { leave }),
        2 => Just(Step::Compact),
        2 => what.prop_map(Step::WriteBack),
        1 => Just(Step::Clean),
        1 => Just(Step::Shrink),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..14)
}

/// A store whose process could end at any of its crash points; those that it has come to; and how often it has come to
/// each in this step.
struct World {
    machine: Arc<Machine>,
    store: Option<Store>,
    expected: Arc<Mutex<Expected>>,
    reached: Arc<Mutex<BTreeSet<&'static str>>>,
    in_this_step: Arc<Mutex<BTreeMap<&'static str, u32>>>,
    scratch: Scratch,
    version: u32,
    /// Of all crash points that a step comes to by one name, so many are looked at, and one of `every`.
    first: u32,
    every: u32,
}

impl World {
    fn new(allocator: Allocator, limit_pages: u64, first: u32, every: u32) -> World {
        let machine = Arc::new(Machine::new(allocator));
        let nothing = vec![Holds::Word(0); SLOTS as usize];
        let full = limit_pages < 2 * u64::from(SLOTS);
        World {
            store: Some(machine.start(limit_pages)),
            machine,
            expected: Arc::new(Mutex::new(Expected { before: nothing.clone(), after: nothing, full })),
            reached: Arc::default(),
            in_this_step: Arc::default(),
            scratch: Scratch::new().expect("scratch"),
            version: 0,
            first,
            every,
        }
    }

    /// Does something that changes slots to what is given, and looks at what a successor would find in the middle.
    fn attempt<R>(&mut self, after: &[(u32, Holds)], what: impl FnOnce(&Store, &mut Scratch) -> R) -> R {
        {
            let mut expected = self.expected.lock().expect("not poisoned");
            for &(slot, holds) in after {
                expected.after[slot as usize] = holds;
            }
        }
        let (machine, expected, reached) = (self.machine.clone(), self.expected.clone(), self.reached.clone());
        let (first, every, in_this_step) = (self.first, self.every, self.in_this_step.clone());
        let hook = move |name: &'static str| {
            reached.lock().expect("not poisoned").insert(name);
            let mut in_this_step = in_this_step.lock().expect("not poisoned");
            let times = in_this_step.entry(name).or_default();
            *times += 1;
            if *times <= first || *times % every == 0 {
                let (copy, expected) = (machine.copy(), expected.lock().expect("not poisoned").clone());
                // A thread of its own: this one may hold locks.
                let survived = std::thread::spawn(move || survive(&copy, &expected)).join();
                assert!(survived.is_ok(), "a process that ends at {name:?} leaves no whole state behind");
            }
        };
        let (store, scratch) = (self.store.as_ref().expect("a store"), &mut self.scratch);
        with_hook(hook, || what(store, scratch))
    }

    /// What slots hold from now on.
    fn settle(&mut self, changed: &[(u32, Holds)]) {
        let mut expected = self.expected.lock().expect("not poisoned");
        for &(slot, holds) in changed {
            (expected.before[slot as usize], expected.after[slot as usize]) = (holds, holds);
        }
    }

    fn put(&mut self, slot: u32, holds: Holds) {
        let page = holds.page(slot).expect("a page");
        let stored = self.attempt(&[(slot, holds)], |store, scratch| put(store, slot, &page, scratch));
        self.settle(&[(slot, if stored.is_ok() { holds } else { Holds::Lost })]);
    }

    fn step(&mut self, step: &Step) {
        self.in_this_step.lock().expect("not poisoned").clear();
        let within = |slot: u32, count: u32| slot..SLOTS.min(slot + count);
        match *step {
            Step::Store { slot, count, noise } => {
                for slot in within(slot, count) {
                    self.version += 1;
                    self.put(slot, Holds::Version(self.version, noise));
                }
            }
            Step::SameFilled { slot } => {
                self.version += 1;
                self.put(slot, Holds::Word(self.version));
            }
            Step::Load { slot, count } => self.attempt(&[], |store, scratch| {
                for slot in within(slot, count) {
                    let _what_it_reads_is_looked_at_later = load(store, slot, scratch);
                }
            }),
            Step::Discard { slot, count } => {
                let range = within(slot, count);
                let empty: Vec<_> = range.clone().map(|slot| (slot, Holds::Word(0))).collect();
                self.attempt(&empty, |store, _| {
                    store.discard(u64::from(range.start)..u64::from(range.end), &mut Detached::with_capacity(0))
                });
                self.settle(&empty);
            }
            Step::Thin { leave } => {
                let slots = (0..SLOTS).filter(|slot| slot % leave > 0);
                let empty: Vec<_> = slots.map(|slot| (slot, Holds::Word(0))).collect();
                self.attempt(&empty, |store, _| {
                    for &(slot, _) in &empty {
                        let slot = u64::from(slot);
                        store.discard(slot..slot + 1, &mut Detached::with_capacity(0));
                    }
                });
                self.settle(&empty);
            }
            Step::Compact => {
                self.attempt(&[], |store, _| store.compact());
            }
            Step::WriteBack(what) => self.attempt(&[], |store, _| evict(store, what)),
            Step::Clean => self.attempt(&[], |store, _| clean(store)),
            Step::Shrink => self.attempt(&[], |store, _| {
                store.ask_for_shrinking();
                let mut shrinker = Shrinker::new().expect("memory");
                while let Ok(true) = store.shrink(&mut shrinker) {}
            }),
            Step::Restart => {
                self.store = None;
                self.store = Some(self.machine.recover());
            }
        }
        // Between two steps, a successor counts what this one does.
        let copy = self.machine.copy();
        let of_successor = gauges(&copy.recover());
        assert_eq!(gauges(self.store.as_ref().expect("a store")), of_successor, "after {step:?}");
        survive(&self.machine.copy(), &self.expected.lock().expect("not poisoned"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 10 } else { 100 }))]

    #[test]
    fn a_process_may_end_anywhere(
        allocator in prop::sample::select(&Allocator::ALL), limit in prop_oneof![Just(1000), 40..120u64], steps in steps(),
    ) {
        let mut world = World::new(allocator, limit, 1, 61);
        steps.iter().for_each(|step| world.step(step));
        end(world.store.as_ref().expect("a store"));
    }
}

/// All of them, and several times each.
#[test]
fn every_crash_point_is_survived() {
    for allocator in Allocator::ALL {
        let mut world = World::new(allocator, 1000, 3, 47);
        let store = |slot, count, noise| Step::Store { slot, count, noise };
        let rounds = (0..SEGMENTS as u32 + 1).flat_map(|round| {
            // Of each segment some pages stay on the disk, and the others are written anew.
            [store(0, 60, true), Step::WriteBack(What::All), Step::Discard { slot: round * 5, count: 3 }]
        });
        let steps = [
            store(0, SLOTS, false),
            store(20, 30, true),
            store(10, 30, false),
            Step::SameFilled { slot: 3 },
            Step::Thin { leave: 5 },
            Step::Compact,
            store(0, SLOTS, true),
            Step::Thin { leave: 3 },
            Step::Compact,
            Step::Restart,
            Step::WriteBack(What::All),
            Step::Load { slot: 60, count: 30 },
        ];
        steps.into_iter().chain(rounds).chain([Step::Restart, Step::Clean]).for_each(|step| world.step(&step));
        end(world.store.as_ref().expect("a store"));
        let reached: BTreeSet<_> = world.reached.lock().expect("not poisoned").clone();
        let of_zsmalloc = ["page map", "page map written"];
        let all = [
            "after the nonce",
            "after the segment",
            "after the word",
            "before the nonce",
            "before the segment",
            "before the word",
            "move: after the word",
            "move: before the word",
            "object freed",
            "record freed",
            "writeback: after the word",
            "writeback: before the word",
        ];
        let zsmalloc = allocator == Allocator::Zsmalloc;
        assert_eq!(reached, all.into_iter().chain(of_zsmalloc.into_iter().filter(|_| zsmalloc)).collect());
    }
}

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
    refused(&write(8, const { &2u32.to_ne_bytes() }), "of version 2, and this program knows version 3");
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
