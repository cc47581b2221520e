//! The slot table: one 64-bit word per page of the swap file, the only commit point.
//!
//! ```text
//! bits 63..61  state: EMPTY, LOST, SAME_FILLED, POOL
//! bits 60..37  generation: grows by one with every change, so that an old word can be told from a new one
//! bits 36..0   SAME_FILLED: the 32-bit word that the page repeats; POOL: the location of the object in the arena
//! ```
//!
//! A change publishes the new word first and frees the old object afterwards: whoever reads the word finds either
//! the old page whole or the new one.

use crate::locks::{Guard, Rank, Ranked};
use crate::pool::Location;
use crate::state::State;
use crate::sync::Ordering::{Acquire, Release};
use std::sync::Arc;

const STATE_SHIFT: u32 = 61;
const GENERATION_SHIFT: u32 = 37;
const GENERATION_MASK: u64 = (1 << (STATE_SHIFT - GENERATION_SHIFT)) - 1;
const VALUE_MASK: u64 = (1 << GENERATION_SHIFT) - 1;

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Never written, or punched: reads zeros.
    Empty,
    /// The last store failed, or the stored bytes are bad: reads EIO until written or punched.
    Lost,
    /// The page repeats this word.
    SameFilled(u32),
    /// The page is the object at this location.
    Pool(Location),
}

/// A slot word as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word(u64);

impl Word {
    fn new(entry: Entry, generation: u64) -> Word {
        let (state, value) = match entry {
            Entry::Empty => (0, 0),
            Entry::Lost => (1, 0),
            Entry::SameFilled(word) => (2, u64::from(word)),
            Entry::Pool(location) => (3, location.units()),
        };
        debug_assert!(value <= VALUE_MASK);
        Word(state << STATE_SHIFT | (generation & GENERATION_MASK) << GENERATION_SHIFT | value)
    }

    /// Decodes the word. A state that does not exist (a damaged word) counts as LOST.
    pub fn entry(self) -> Entry {
        let value = self.0 & VALUE_MASK;
        match self.0 >> STATE_SHIFT {
            0 => Entry::Empty,
            2 => Entry::SameFilled(value as u32),
            3 => Entry::Pool(Location::from_units(value)),
            _ => Entry::Lost,
        }
    }

    pub fn generation(self) -> u64 {
        self.0 >> GENERATION_SHIFT & GENERATION_MASK
    }
}

/// More stripes than threads by far, so that two pages rarely meet in one.
const STRIPES: usize = 1024;

/// The slot words of the state file, and the locks that guard them (rank `Slot`).
pub struct SlotTable {
    state: Arc<State>,
    stripes: Box<[Ranked<()>]>,
}

/// One slot, locked: its word does not change and its object is not freed while this lives.
pub struct Slot<'a> {
    table: &'a SlotTable,
    index: u32,
    _stripe: Guard<'a, ()>,
}

impl SlotTable {
    pub fn new(state: Arc<State>) -> SlotTable {
        SlotTable { state, stripes: (0..STRIPES).map(|_| Ranked::new(Rank::Slot, ())).collect() }
    }

    /// Locks a slot; waits for whoever works on it, or on another one in its stripe.
    pub fn lock(&self, index: u32) -> Slot<'_> {
        Slot { table: self, index, _stripe: self.stripes[index as usize % STRIPES].lock() }
    }

    /// Bytes of slot words and locks.
    pub fn metadata_bytes(&self) -> u64 {
        self.state.slots() * 8 + (STRIPES * size_of::<Ranked<()>>()) as u64
    }
}

impl Slot<'_> {
    pub fn index(&self) -> u32 {
        self.index
    }

    pub fn word(&self) -> Word {
        Word(self.table.state.words()[self.index as usize].load(Acquire))
    }

    /// Makes `entry` what the slot holds, in a new generation, and returns what it held.
    ///
    /// Release order: the object's bytes are written before its location can be seen.
    pub fn publish(&mut self, entry: Entry) -> Entry {
        let old = self.word();
        let new = Word::new(entry, old.generation() + 1);
        self.table.state.words()[self.index as usize].store(new.0, Release);
        old.entry()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entries() -> impl Strategy<Value = Entry> {
        prop_oneof![
            Just(Entry::Empty),
            Just(Entry::Lost),
            any::<u32>().prop_map(Entry::SameFilled),
            (0..=VALUE_MASK).prop_map(|units| Entry::Pool(Location::from_units(units))),
        ]
    }

    proptest! {
        #[test]
        fn a_word_gives_back_what_it_was_made_of(entry in entries(), generation in 0..=GENERATION_MASK) {
            let word = Word::new(entry, generation);
            prop_assert_eq!((word.entry(), word.generation()), (entry, generation));
        }

        #[test]
        fn every_change_is_a_new_generation(before in entries(), after in entries()) {
            let table = SlotTable::new(Arc::new(State::create(1, 512, None).expect("state")));
            let mut slot = table.lock(0);
            slot.publish(before);
            let old = slot.word();
            prop_assert_eq!(slot.publish(after), before);
            prop_assert_ne!(slot.word(), old);
        }
    }

    #[test]
    fn fresh_memory_is_empty_and_damage_is_lost() {
        assert_eq!(Word(0).entry(), Entry::Empty);
        assert_eq!(Word(7 << STATE_SHIFT).entry(), Entry::Lost);
    }
}
