//! Ends at crash points: whatever a process leaves behind there, a successor goes on with every page.

use super::machine::*;
use super::*;
use crate::crash::with_hook;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

#[derive(Clone, Debug)]
enum Step {
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
    /// All pages, with a dictionary or without.
    Recompress {
        tier: u8,
        dictionary: bool,
    },
    /// If pages do not need all that there are.
    Install {
        seed: u32,
    },
    /// The process ends between two steps, and another goes on.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (slot, count) = (0..SLOTS, 1..40u32);
    let cold = Just(What::Unused { seconds: 0 });
    let what = prop_oneof![Just(What::All), cold, (0..1u64 << 17).prop_map(|bytes| What::Coldest { bytes })];
    let step = prop_oneof![
        6 => (slot.clone(), count.clone(), any::<bool>())
            .prop_map(|(slot, count, noise)| Step::Store { slot, count, noise }),
        4 => (slot.clone(), count.clone(), 0..3u32)
            .prop_map(|(slot, count, version)| Step::Alike { slot, count, version }),
        1 => slot.clone().prop_map(|slot| Step::SameFilled { slot }),
        3 => (slot.clone(), count.clone()).prop_map(|(slot, count)| Step::Load { slot, count }),
        2 => (slot, count).prop_map(|(slot, count)| Step::Discard { slot, count }),
        1 => (2..6u32).prop_map(|leave| Step::Thin { leave }),
        2 => Just(Step::Compact),
        2 => what.prop_map(Step::WriteBack),
        1 => Just(Step::Clean),
        1 => Just(Step::Shrink),
        3 => (1..=3u8, any::<bool>()).prop_map(|(tier, dictionary)| Step::Recompress { tier, dictionary }),
        1 => any::<u32>().prop_map(|seed| Step::Install { seed }),
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
            Step::Alike { slot, count, version } => {
                within(slot, count).for_each(|slot| self.put(slot, Holds::Alike(version, version % 2 == 0)));
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
            Step::Recompress { tier, dictionary } => {
                let store = self.store.as_ref().expect("a store");
                let dictionary = dictionary && store.dictionaries.installed().iter().any(|found| found.serial > 0);
                let with = Compression { algorithm: Algorithm::Zstd, zstd_level: 3 * i32::from(tier) };
                let tier = Tier { number: tier, with, dictionary };
                self.attempt(&[], |store, _| recompress(store, tier));
            }
            Step::Install { seed } => {
                let bytes: Vec<u8> = (0..4).flat_map(|n| page(n, seed, false)[..300].to_vec()).collect();
                self.attempt(&[], |store, _| {
                    let _all_are_needed_perhaps = store.install_dictionary(&bytes);
                })
            }
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
            store(0, SLOTS, false),
            Step::Recompress { tier: 1, dictionary: false },
            Step::Install { seed: 1 },
            Step::Recompress { tier: 2, dictionary: true },
            Step::WriteBack(What::Coldest { bytes: 1 << 12 }),
            Step::WriteBack(What::Unused { seconds: 0 }),
            Step::Install { seed: 2 },
            store(0, 10, false),
            Step::Load { slot: 20, count: 10 },
            Step::Recompress { tier: 3, dictionary: true },
            Step::Restart,
            Step::Discard { slot: 0, count: SLOTS },
            Step::Install { seed: 3 },
            Step::Alike { slot: 0, count: 20, version: 1 },
            Step::Recompress { tier: 1, dictionary: true },
            Step::Alike { slot: 10, count: 20, version: 1 },
            store(3, 2, true),
            Step::Recompress { tier: 2, dictionary: false },
            Step::WriteBack(What::All),
            Step::Restart,
            Step::Load { slot: 0, count: 10 },
            Step::Discard { slot: 0, count: SLOTS },
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
            "dictionary: after its serial number",
            "dictionary: before its serial number",
            "dictionary: given up",
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
