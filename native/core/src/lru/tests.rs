use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;

const SLOTS: u64 = 8;

fn lru(incompressible: Incompressible) -> Lru {
    let state = State::create(SLOTS, 512, 0, None).expect("state");
    let lru = Lru::new(&state, incompressible, SharedMetrics::new(None).expect("metrics")).expect("memory");
    lru.populate().expect("memory");
    lru
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u32),
    Remove(u32),
    Touch(u32),
    /// Looks for so many cold pages.
    Look(usize),
    MarkIdle,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let slot = 0..SLOTS as u32;
    let step = prop_oneof![
        4 => slot.clone().prop_map(Step::Insert),
        2 => slot.clone().prop_map(Step::Remove),
        2 => slot.prop_map(Step::Touch),
        2 => (1usize..4).prop_map(Step::Look),
        1 => Just(Step::MarkIdle),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    /// Against a queue of (slot, used, idle), oldest first.
    #[test]
    fn it_is_a_clock(steps in steps()) {
        let lru = lru(Incompressible::Writeback);
        let mut model: VecDeque<(u32, bool, bool)> = VecDeque::new();
        for step in steps {
            match step {
                Step::Insert(slot) => {
                    lru.insert(slot, slot % 2 == 0, 0);
                    model.retain(|&(other, ..)| other != slot);
                    model.push_back((slot, false, false));
                }
                Step::Remove(slot) => {
                    lru.remove(slot);
                    model.retain(|&(other, ..)| other != slot);
                }
                Step::Touch(slot) => {
                    if let Some(entry) = model.iter_mut().find(|entry| entry.0 == slot) {
                        lru.touch(slot, 0);
                        *entry = (slot, true, false);
                    }
                }
                Step::Look(count) => {
                    let (mut pass, mut left) = (lru.pass(), model.len() * 2);
                    let heeded = model.len();
                    for _ in 0..count {
                        let mut expected = None;
                        while let (None, 1..) = (expected, left) {
                            left -= 1;
                            let (slot, used, idle) = model.pop_front().expect("not empty");
                            model.push_back((slot, false, idle));
                            expected = (!used || left < heeded).then_some(slot);
                        }
                        prop_assert_eq!(lru.next(&mut pass), expected);
                    }
                }
                Step::MarkIdle => {
                    model.iter_mut().for_each(|entry| entry.2 = true);
                    prop_assert_eq!(lru.mark_idle(0, 0), model.len() as u64);
                }
            }
            prop_assert_eq!(lru.is_empty(), model.is_empty());
            prop_assert_eq!(lru.metrics.idle_pages.get(), model.iter().filter(|entry| entry.2).count() as u64);
            for slot in 0..SLOTS as u32 {
                let entry = model.iter().find(|entry| entry.0 == slot);
                prop_assert_eq!(lru.is_listed(slot), entry.is_some());
                prop_assert_eq!(lru.is_idle(slot), entry.is_some_and(|entry| entry.2));
                prop_assert_eq!(lru.is_raw(slot), entry.is_some() && slot % 2 == 0);
            }
        }
    }
}

#[test]
fn a_page_that_was_read_goes_later_but_goes_in_the_end() {
    let lru = lru(Incompressible::Writeback);
    (0..3).for_each(|slot| lru.insert(slot, false, 0));
    lru.touch(0, 0);
    let mut pass = lru.pass();
    assert_eq!([(); 3].map(|()| lru.next(&mut pass)), [Some(1), Some(2), Some(0)]);
    (0..3).for_each(|slot| lru.touch(slot, 0));
    // All are in use: the first round finds none, the second takes them, and then it is over.
    let mut pass = lru.pass();
    assert_eq!([(); 4].map(|()| lru.next(&mut pass)), [Some(1), Some(2), Some(0), None]);
}

#[test]
fn incompressible_pages_go_as_the_policy_says() {
    for (policy, expected) in [
        (Incompressible::Writeback, &[0, 1, 2, 3][..]),
        (Incompressible::Keep, &[0, 2]),
        (Incompressible::First, &[1, 3, 0, 2]),
    ] {
        let lru = lru(policy);
        (0..4).for_each(|slot| lru.insert(slot, slot % 2 == 1, 0));
        let mut pass = lru.pass();
        let gone = || lru.next(&mut pass).inspect(|&slot| lru.remove(slot));
        assert_eq!(std::iter::from_fn(gone).collect::<Vec<_>>(), expected, "{policy:?}");
        (0..4).for_each(|slot| lru.insert(slot, slot % 2 == 1, 0));
        assert!(lru.is_raw(3) && !lru.is_raw(2));
        // From one kind to the other.
        (0..4).for_each(|slot| lru.insert(slot, slot % 2 == 0, 0));
        (0..4).for_each(|slot| lru.remove(slot));
        assert!(lru.is_empty() && lru.rings.lock().rings.iter().all(|ring| ring.length == 0));
    }
}

#[test]
fn what_was_not_used_for_long_enough_is_idle() {
    let lru = lru(Incompressible::Writeback);
    lru.insert(0, false, 10);
    lru.insert(1, false, 15);
    lru.insert(2, false, 10);
    lru.touch(2, 16);
    assert_eq!(lru.mark_idle(10, 20), 1);
    assert!(lru.is_idle(0) && !lru.is_idle(1) && !lru.is_idle(2) && !lru.is_idle(3));
    assert_eq!(lru.mark_idle(5, 20), 2);
    lru.touch(0, 21);
    lru.insert(1, false, 21);
    assert_eq!((lru.metrics.idle_pages.get(), lru.is_idle(0), lru.is_idle(1)), (0, false, false));
}
