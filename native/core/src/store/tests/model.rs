//! Every step of one thread, with all that can go wrong with a disk, against what each page must read.

use super::*;
use crate::backing::Faults;
use crate::error::Error;
use proptest::prelude::*;

const SLOTS: u32 = 700;
const SEGMENTS: u64 = 6;

#[derive(Clone, Debug)]
enum Step {
    /// So many slots from there on.
    Store {
        slot: u32,
        count: u32,
        noise: bool,
    },
    /// As `Store`, and all are the same.
    Alike {
        slot: u32,
        count: u32,
        version: u32,
    },
    /// Stores those once that are alike.
    Share,
    SameFilled {
        slot: u32,
    },
    StorePart {
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
    Shrink,
    WriteBack(What),
    Clean,
    MarkIdle,
    SetLimit(u64),
    SetThreshold(u32),
    SetPromoting(bool),
    Compact,
    Budget(Option<u64>),
    Fail,
    Resume,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (slot, count) = (0..SLOTS, 1..150u32);
    let what = prop_oneof![
        Just(What::All),
        Just(What::Idle),
        Just(What::Unused { seconds: 0 }),
        Just(What::Huge),
        (0..SLOTS).prop_map(What::Page),
        (0..1u64 << 20).prop_map(|bytes| What::Coldest { bytes }),
    ];
    let step = prop_oneof![
        12 => (slot.clone(), count.clone(), any::<bool>())
            .prop_map(|(slot, count, noise)| Step::Store { slot, count, noise }),
        5 => (slot.clone(), count.clone(), 0..4u32)
            .prop_map(|(slot, count, version)| Step::Alike { slot, count, version }),
        4 => Just(Step::Share),
        1 => slot.clone().prop_map(|slot| Step::SameFilled { slot }),
        1 => slot.clone().prop_map(|slot| Step::StorePart { slot }),
        8 => (slot.clone(), count.clone()).prop_map(|(slot, count)| Step::Load { slot, count }),
        3 => (slot, count).prop_map(|(slot, count)| Step::Discard { slot, count }),
        3 => Just(Step::Shrink),
        3 => what.prop_map(Step::WriteBack),
        3 => Just(Step::Clean),
        1 => Just(Step::MarkIdle),
        2 => (0..600u64).prop_map(Step::SetLimit),
        1 => (0..=100u32).prop_map(Step::SetThreshold),
        1 => any::<bool>().prop_map(Step::SetPromoting),
        1 => Just(Step::Compact),
        1 => prop::option::of(0..3u64 << 20).prop_map(Step::Budget),
        1 => Just(Step::Fail),
        2 => Just(Step::Resume),
    ];
    prop::collection::vec(step, 1..80)
}

fn allocators() -> impl Strategy<Value = Allocator> {
    prop::sample::select(&Allocator::ALL)
}

/// Faults that are reported, or some that are not too.
fn faults(silent: bool) -> impl Strategy<Value = String> {
    let kinds: &[&str] = if silent { &["eio", "enospc", "short", "torn", "flip"] } else { &["eio", "enospc", "short"] };
    let rule =
        (any::<bool>(), 1..40u32, 0..4u32, prop::sample::select(kinds)).prop_map(|(write, first, more, kind)| {
            format!("{}:{first}-{}:{kind}", if write { "write" } else { "read" }, first + more)
        });
    prop::collection::vec(rule, 1..8).prop_map(|rules| rules.join(","))
}

/// What a slot must read: a version of its page, zeros, or EIO.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Holds {
    Version(u32, bool),
    Alike(u32),
    Word(u32),
    Part(u32, bool),
    Lost,
}

struct World {
    store: Store,
    scratch: Scratch,
    shrinker: Shrinker,
    cleaner: Cleaner,
    recompressor: Recompressor,
    slots: Vec<Holds>,
    version: u32,
    /// Whether the disk may give back other bytes than were written.
    silent: bool,
}

impl World {
    fn new(allocator: Allocator, limit_pages: u64, rules: &str, silent: bool) -> World {
        let disk = Faults::new(MemoryDisk::new(SEGMENTS as usize * SEGMENT_BYTES), rules).expect("rules");
        World {
            store: new_store(allocator, u64::from(SLOTS), limit_pages, disk_of(SEGMENTS, disk)),
            scratch: Scratch::new().expect("scratch"),
            shrinker: Shrinker::with_clusters().expect("memory"),
            cleaner: Cleaner::new().expect("memory"),
            recompressor: Recompressor::new().expect("memory"),
            slots: vec![Holds::Word(0); SLOTS as usize],
            version: 0,
            silent,
        }
    }

    /// Goes on until there is room, or there cannot be any: it may never take for ever.
    fn until_there_is_room(&mut self, mut attempt: impl FnMut(&Store, &mut Scratch) -> Result<()>) -> Result<()> {
        for _ in 0..2000 {
            let possible = self.store.can_make_room();
            match attempt(&self.store, &mut self.scratch) {
                Err(Error::PoolFull | Error::NoRegion) if possible => panic!("refused, though there could be room"),
                Err(Error::NoRoomYet) => {
                    assert!(self.store.wants_shrinking());
                    if self.store.shrink(&mut self.shrinker).is_err() {
                        let _full_perhaps = self.store.clean(&mut self.cleaner);
                    }
                }
                result => return result,
            }
        }
        panic!("a store waits for ever: {:?}", self.store.backing().map(|backing| backing.has_room()));
    }

    fn put(&mut self, slot: u32, page: &Page, holds: Holds) {
        let stored = self.until_there_is_room(|store, scratch| store.store(slot, page, LZ4, scratch));
        self.slots[slot as usize] = match stored {
            Ok(()) => holds,
            Err(error) => {
                assert!(matches!(error, Error::PoolFull | Error::NoRegion), "{error}");
                Holds::Lost
            }
        };
    }

    fn expected(&self, slot: u32) -> Option<Page> {
        match self.slots[slot as usize] {
            Holds::Lost => None,
            Holds::Word(word) => {
                let mut page = [0; PAGE_SIZE];
                page::fill(&mut page, word);
                Some(page)
            }
            Holds::Version(version, noise) => Some(page(slot, version, noise)),
            Holds::Alike(version) => Some(page(0, version, version % 2 == 0)),
            Holds::Part(version, noise) => {
                let mut page = page(slot, version, noise);
                page[100..200].fill(7);
                Some(page)
            }
        }
    }

    fn load(&mut self, slot: u32) {
        let mut page = [0xee; PAGE_SIZE];
        let expected = self.expected(slot);
        match self.store.load(slot, &mut page, &mut self.scratch) {
            Ok(()) => assert!(expected == Some(page), "slot {slot} reads another page"),
            // It may be readable another time, and is then what it was.
            Err(Error::DiskRead { .. }) => assert!(expected.is_some()),
            Err(Error::Lost { .. }) => assert!(expected.is_none(), "slot {slot} was lost"),
            Err(Error::Corrupt { .. }) => {
                assert!(self.silent && expected.is_some(), "slot {slot} was lost");
                self.slots[slot as usize] = Holds::Lost;
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn step(&mut self, step: Step) {
        let within = |slot: u32, count: u32| slot..SLOTS.min(slot + count);
        match step {
            Step::Store { slot, count, noise } => {
                for slot in within(slot, count) {
                    self.version += 1;
                    self.put(slot, &page(slot, self.version, noise), Holds::Version(self.version, noise));
                }
            }
            Step::Alike { slot, count, version } => {
                let page = page(0, version, version % 2 == 0);
                within(slot, count).for_each(|slot| self.put(slot, &page, Holds::Alike(version)));
            }
            // On a disk that lies it would not be known whose page a bad record costs.
            Step::Share if self.silent => {}
            Step::Share => {
                let with = Compression { algorithm: Algorithm::Zstd, zstd_level: 1 };
                let tier = Tier { number: 1, with, dictionary: false };
                (0..SLOTS).for_each(|slot| self.store.ages.tried(slot, 0));
                self.store.prepare(&mut self.recompressor, tier).expect("a tier");
                self.store.prepare_duplicates(&mut self.recompressor, true);
                let order = Order { tier, age: 0, pages: u64::MAX, processor_time: Duration::MAX };
                self.store.recompress(&mut self.recompressor, &order);
            }
            Step::SameFilled { slot } => {
                self.version += 1;
                let mut page = [0; PAGE_SIZE];
                page::fill(&mut page, self.version);
                self.put(slot, &page, Holds::Word(self.version));
            }
            Step::StorePart { slot } => {
                let Holds::Version(version, noise) = self.slots[slot as usize] else { return };
                let part = [7; 100];
                let stored =
                    self.until_there_is_room(|store, scratch| store.store_part(slot, 100, &part, LZ4, scratch));
                self.slots[slot as usize] = match stored {
                    Ok(()) => Holds::Part(version, noise),
                    Err(Error::DiskRead { .. }) => return,
                    Err(Error::PoolFull | Error::NoRegion) => Holds::Lost,
                    Err(Error::Corrupt { .. }) if self.silent => Holds::Lost,
                    Err(error) => panic!("{error}"),
                };
            }
            Step::Load { slot, count } => within(slot, count).for_each(|slot| self.load(slot)),
            Step::Discard { slot, count } => {
                let range = within(slot, count);
                self.store.discard(u64::from(range.start)..u64::from(range.end), &mut Detached::with_capacity(0));
                range.for_each(|slot| self.slots[slot as usize] = Holds::Word(0));
            }
            Step::Shrink => while let Ok(true) = self.store.shrink(&mut self.shrinker) {},
            Step::WriteBack(what) => {
                let mut job = Job::new(what);
                while let Ok(true) = self.store.write_back(&mut self.shrinker, &mut job) {}
            }
            Step::Clean => while let Ok(true) = self.store.clean(&mut self.cleaner) {},
            Step::MarkIdle => {
                self.store.mark_idle(Duration::ZERO);
            }
            Step::SetLimit(pages) => self.store.pool().set_limit_bytes(pages * PAGE_SIZE as u64),
            Step::SetThreshold(percent) => self.store.set_accept_threshold(percent),
            Step::SetPromoting(on) => self.store.set_promoting(on),
            Step::Compact => {
                self.store.compact();
            }
            Step::Budget(bytes) => self.store.backing().expect("a disk").set_budget(bytes),
            Step::Fail => self.store.backing().expect("a disk").fail(),
            Step::Resume => self.store.backing().expect("a disk").resume(),
        }
    }

    fn check(&self) {
        let metrics = self.store.metrics();
        let lost = self.slots.iter().filter(|&&holds| holds == Holds::Lost).count() as u64;
        // A page whose record is bad is not known to be lost before it is read.
        assert_eq!(metrics.pages_lost.get(), lost);
        assert!(metrics.pool_bytes.get() == 0 || metrics.pool_peak_bytes.get() > 0);
        let objects = [&metrics.pages_lz4, &metrics.pages_zstd, &metrics.pages_incompressible, &metrics.pages_on_disk];
        let pages = objects.iter().map(|pages| pages.get()).sum::<u64>() + metrics.pages_shared.get()
            - metrics.shared_pages.get();
        let held = |holds: &&Holds| matches!(holds, Holds::Version(..) | Holds::Alike(..) | Holds::Part(..));
        assert_eq!(pages, self.slots.iter().filter(held).count() as u64, "pages are counted wrong");
    }
}

fn live(allocator: Allocator, steps: Vec<Step>, limit_pages: u64, rules: &str, silent: bool) {
    let mut world = World::new(allocator, limit_pages, rules, silent);
    for step in steps {
        world.step(step);
        world.check();
    }
    (0..SLOTS).for_each(|slot| world.load(slot));
    end(&world.store);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 60 } else { 400 }))]

    /// What the disk reports it has not done costs no page.
    #[test]
    fn no_page_is_lost_on_a_disk_that_says_when_it_fails(
        allocator in allocators(), steps in steps(), limit in 0u64..500, rules in faults(false),
    ) {
        live(allocator, steps, limit, &rules, false);
    }

    /// What it does not report costs pages, but none ever reads as another one.
    #[test]
    fn no_page_is_wrong_on_a_disk_that_lies(
        allocator in allocators(), steps in steps(), limit in 0u64..500, rules in faults(true),
    ) {
        live(allocator, steps, limit, &rules, true);
    }
}
