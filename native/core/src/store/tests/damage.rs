//! A state that is damaged when it is recovered: no page is ever wrong, and nothing else is lost than what was damaged.

use super::machine::{load_or_lost, Machine, SLOTS};
use super::*;
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Where the state file has what: see `state.rs`.
const WORDS: u64 = PAGE_SIZE as u64;
const MAP: u64 = WORDS + ((SLOTS as u64 + 64) * 8).next_multiple_of(PAGE_SIZE as u64);
const ARENA: u64 = 2 << 20;

#[derive(Clone, Debug)]
enum Damage {
    /// Up to four neighbouring bits: the check of a word sees every such run.
    FlipWord {
        slot: u32,
        bit: u32,
        run: u32,
    },
    /// A bit of the pages that objects lie on.
    FlipArena {
        at: u64,
        bit: u32,
    },
    FlipMap {
        at: u64,
        bit: u32,
    },
    /// Whatever it says, if it checks.
    SetWord {
        slot: u32,
        state: u64,
        value: u64,
    },
    CopyWord {
        from: u32,
        to: u32,
    },
    SetMap {
        page: u64,
        entry: u16,
    },
    /// Outside of the checksum: settings, session, nonce.
    Settings {
        at: u64,
        value: u64,
    },
}

fn damages() -> impl Strategy<Value = Vec<Damage>> {
    let slot = 0..SLOTS;
    let damage = prop_oneof![
        4 => (slot.clone(), 0..64u32, 1..=4u32).prop_map(|(slot, bit, run)| Damage::FlipWord { slot, bit, run }),
        4 => (0..400_000u64, 0..8u32).prop_map(|(at, bit)| Damage::FlipArena { at, bit }),
        2 => (0..256u64, 0..8u32).prop_map(|(at, bit)| Damage::FlipMap { at, bit }),
        2 => (slot.clone(), 0..8u64, any::<u64>())
            .prop_map(|(slot, state, value)| Damage::SetWord { slot, state, value: value >> (value % 64) }),
        2 => (slot.clone(), slot).prop_map(|(from, to)| Damage::CopyWord { from, to }),
        2 => (0..128u64, any::<u16>()).prop_map(|(page, entry)| Damage::SetMap { page, entry }),
        1 => (160..160 + 64u64, any::<u64>()).prop_map(|(at, value)| Damage::Settings { at, value }),
    ];
    prop::collection::vec(damage, 1..12)
}

fn xor(file: &File, at: u64, mask: u64) {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at).expect("read");
    file.write_all_at(&(u64::from_ne_bytes(bytes) ^ mask).to_ne_bytes(), at).expect("written");
}

fn word(file: &File, slot: u32) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, WORDS + u64::from(slot) * 8).expect("read");
    u64::from_ne_bytes(bytes)
}

fn set_word(file: &File, slot: u32, word: u64) {
    file.write_all_at(&word.to_ne_bytes(), WORDS + u64::from(slot) * 8).expect("written");
}

/// With the check of `slots.rs` right.
fn checked(word: u64) -> u64 {
    let word = word & ((1 << 60) - 1);
    let fold = (0..16).fold(0, |fold, n| fold ^ (word >> (4 * n) & 0xf));
    word | fold << 60
}

fn apply(file: &File, damage: &Damage) {
    match *damage {
        Damage::FlipWord { slot, bit, run } => xor(file, WORDS + u64::from(slot) * 8, ((1 << run) - 1) << bit),
        Damage::FlipArena { at, bit } => xor(file, ARENA + at, 1 << bit),
        Damage::FlipMap { at, bit } => xor(file, MAP + at, 1 << bit),
        Damage::SetWord { slot, state, value } => {
            set_word(file, slot, checked(state << 57 | 3 << 45 | (value & ((1 << 45) - 1))))
        }
        Damage::CopyWord { from, to } => set_word(file, to, word(file, from)),
        Damage::SetMap { page, entry } => file.write_all_at(&entry.to_ne_bytes(), MAP + page * 2).expect("written"),
        Damage::Settings { at, value } => file.write_all_at(&value.to_ne_bytes(), at * 8).expect("written"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 150 } else { 2000 }))]

    #[test]
    fn damage_costs_what_it_hits(
        allocator in prop::sample::select(&Allocator::ALL), on_disk in any::<bool>(), together in any::<bool>(), damages in damages(),
    ) {
        let machine = Machine::new(allocator);
        let mut scratch = Scratch::new().expect("scratch");
        let store = machine.start(1000);
        let written = |slot| page(slot, 1, slot % 16 == 0);
        for slot in 0..SLOTS {
            store.store(slot, &written(slot), LZ4, &mut scratch).expect("room");
        }
        if on_disk {
            super::machine::evict(&store, if together { What::Unused { seconds: 0 } } else { What::Coldest { bytes: 1 << 16 } });
        }
        drop(store);
        damages.iter().for_each(|damage| apply(&machine.state, damage));
        // What nobody can tell from a word of the store's own.
        let forged = |slot: u32| damages.iter().any(|damage| matches!(*damage,
            Damage::SetWord { slot: at, .. } | Damage::CopyWord { to: at, .. } if at == slot));
        let flipped_twice = |slot: u32| damages.iter().filter(|damage| matches!(**damage,
            Damage::FlipWord { slot: at, .. } if at == slot)).count() > 1;
        let hit = |slot: u32| damages.iter().any(|damage| matches!(*damage,
            Damage::FlipWord { slot: at, .. } | Damage::SetWord { slot: at, .. } | Damage::CopyWord { to: at, .. } if at == slot));
        let arena = damages.iter().filter(|damage| matches!(damage, Damage::FlipArena { .. })).count();
        let map = damages.iter().any(|damage| matches!(damage, Damage::FlipMap { .. } | Damage::SetMap { .. }));
        let Ok(store) = Store::recover(allocator, machine.files(), Some(machine.options())) else {
            // Of all of this only another disk is refused.
            let settings = |damage: &Damage| matches!(damage, Damage::Settings { .. });
            prop_assert!(damages.iter().any(settings));
            return Ok(());
        };
        store.pool().set_limit_bytes(1 << 22);
        let (mut lost, mut forged_disk) = (0, false);
        for slot in (0..SLOTS).filter(|&slot| forged(slot) || flipped_twice(slot)) {
            // It may name a record on the disk, whose bytes then count twice.
            forged_disk |= true;
            let _anything_of_its_own = load_or_lost(&store, slot, &mut scratch);
        }
        for slot in (0..SLOTS).filter(|&slot| !forged(slot) && !flipped_twice(slot)) {
            match load_or_lost(&store, slot, &mut scratch) {
                Some(found) => prop_assert!(found == written(slot), "slot {} is wrong", slot),
                None => lost += usize::from(!hit(slot)),
            }
        }
        prop_assert!(lost <= arena || map || on_disk && forged_disk, "{} pages lost, {} bits flipped", lost, arena);
        // And it is a store like any other.
        let mut verifier = Verifier::default();
        while store.verify(&mut verifier) {}
        for slot in 0..SLOTS {
            store.store(slot, &page(slot, 2, false), LZ4, &mut scratch).expect("room");
        }
        store.compact();
        for slot in 0..SLOTS {
            let found = load_or_lost(&store, slot, &mut scratch);
            prop_assert!(found == Some(page(slot, 2, false)));
        }
        store.discard(0..u64::from(SLOTS), &mut Detached::with_capacity(0));
        prop_assert_eq!(store.destroy(Duration::ZERO).expect("nobody is at work"), vec![]);
        prop_assert_eq!(store.metrics().pool_bytes.get(), 0);
    }
}
