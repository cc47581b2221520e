//! The slot table: one 64-bit word per page of the swap file, the only commit point.
//!
//! ```text
//! bits 63..60  check: makes the exclusive or of the word's sixteen groups of 4 bits zero
//! bits 59..57  state: EMPTY, LOST, SAME_FILLED, POOL, WRITEBACK, DISK, SHARED, CLUSTER
//! bits 56..54  dictionary: 0, or one more than the place of the one that POOL, WRITEBACK, DISK, CLUSTER are compressed with
//! bits 53..45  generation: grows by one with every change, so that an old word can be told from a new one
//! bits 44..0   SAME_FILLED: the 32-bit word that the page repeats; POOL, WRITEBACK: the location of the object in the
//!              arena; DISK: that of the record on the backing disk; SHARED: the index of the slot that has the page, and
//!              a tag; CLUSTER: of the record that has this page and others
//! ```
//!
//! The check finds every single flipped bit, and every run of up to four. Fresh memory, all zero, is EMPTY and checks.
//!
//! A change publishes the new word first and frees the old object afterwards: whoever reads the word finds either
//! the old page whole or the new one.
//!
//! WRITEBACK is POOL, while a shrinker writes a copy of the object to the disk, or the recompressor makes a smaller one of
//! it: it is read where it lies, and is not moved. Whoever takes the word away leaves the object to that one, who frees
//! it when it comes back and no longer finds its word. So the location is not used again before, and the word cannot come
//! back meanwhile: that nobody is deceived does not depend on the generation, which begins anew after 512 changes.
//!
//! SHARED names another slot, one of those behind the swap file's, whose page this one is too; that one is POOL, WRITEBACK,
//! DISK or LOST as any other, and never SHARED. How many name it is counted ([`crate::references`]). Its lock is taken under
//! that of a slot that names it, and has a rank of its own.
//!
//! CLUSTER is DISK, of a record that has the pages of four neighbouring slots, aligned: which of them this one is, the index
//! says. Each of the four words comes and goes by itself.
//!
//! That the word says which dictionary it takes to read the page, on the disk too, is how it is known when a dictionary is
//! needed no more ([`crate::dictionaries`]).
//!
//! What a slot holds changes under its lock. Where it lies may also change without: [`SlotTable::relocate`], by who
//! has moved the object. Both exchange the word they have seen for a new one, so that one of them wins.

use crate::backing::DiskLocation;
use crate::crash::crash_point;
use crate::dictionaries::Place;
use crate::error::Result;
use crate::locks::{Guard, Rank, Ranked};
use crate::pool::Location;
use crate::references::Reference;
use crate::state::State;
use crate::sync::Ordering::{AcqRel, Acquire};
use crate::sync::MODEL;
use crate::touched::Touched;
use std::ops::Range;
use std::sync::Arc;

const CHECK_SHIFT: u32 = 60;
const STATE_SHIFT: u32 = 57;
const DICTIONARY_SHIFT: u32 = 54;
const GENERATION_SHIFT: u32 = 45;
const GENERATION_MASK: u16 = (1 << (DICTIONARY_SHIFT - GENERATION_SHIFT)) - 1;
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
    /// As `Pool`; a shrinker writes a copy, or the recompressor makes a smaller one, and frees the object.
    Writeback(Location),
    /// The page is the record at this location of the backing disk, or in it ([`DiskLocation::is_cluster`]).
    Disk(DiskLocation),
    /// The page is a shared one.
    Shared(Reference),
    /// The word is not as it was stored: what the slot held is lost. Never stored itself.
    Damaged,
}

impl Entry {
    /// The object of the pool that is the page.
    pub fn object(self) -> Option<Location> {
        match self {
            Entry::Pool(location) | Entry::Writeback(location) => Some(location),
            _ => None,
        }
    }
}

/// A slot word as stored; fresh, it is EMPTY.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Word(u64);

impl Word {
    fn new(entry: Entry, dictionary: Option<Place>, generation: u16) -> Word {
        let (state, value) = match entry {
            Entry::Empty => (0, 0),
            Entry::Lost | Entry::Damaged => (1, 0),
            Entry::SameFilled(word) => (2, u64::from(word)),
            Entry::Pool(location) => (3, location.units()),
            Entry::Writeback(location) => (4, location.units()),
            Entry::Disk(location) => (if location.is_cluster() { 7 } else { 5 }, location.to_bits()),
            Entry::Shared(reference) => (6, reference.to_bits()),
        };
        debug_assert!(value <= VALUE_MASK);
        let generation = u64::from(generation & GENERATION_MASK) << GENERATION_SHIFT;
        let word = state << STATE_SHIFT | Place::to_bits(dictionary) << DICTIONARY_SHIFT | generation | value;
        Word(word | fold(word) << CHECK_SHIFT)
    }

    pub fn entry(self) -> Entry {
        let value = self.0 & VALUE_MASK;
        match self.0 >> STATE_SHIFT & 7 {
            _ if fold(self.0) != 0 || Place::from_bits(self.0 >> DICTIONARY_SHIFT & 7).is_err() => Entry::Damaged,
            0 => Entry::Empty,
            1 => Entry::Lost,
            2 => Entry::SameFilled(value as u32),
            3 => Entry::Pool(Location::from_units(value)),
            4 => Entry::Writeback(Location::from_units(value)),
            5 => Entry::Disk(DiskLocation::from_bits(value)),
            6 => Entry::Shared(Reference::from_bits(value)),
            7 => Entry::Disk(DiskLocation::from_bits(value).of_cluster()),
            _ => Entry::Damaged,
        }
    }

    /// What it takes to decompress the page. It means nothing in a damaged word.
    pub fn dictionary(self) -> Option<Place> {
        Place::from_bits(self.0 >> DICTIONARY_SHIFT & 7).ok().flatten()
    }

    pub fn generation(self) -> u16 {
        (self.0 >> GENERATION_SHIFT) as u16 & GENERATION_MASK
    }

    /// The generation of the word that is so many changes after this one. In models it stands still, so that they tell
    /// whether something depends on it.
    pub fn generation_after(self, changes: u16) -> u16 {
        let changes = if MODEL { 0 } else { changes };
        (self.generation() + changes) & GENERATION_MASK
    }
}

/// The exclusive or of the word's groups of 4 bits.
fn fold(word: u64) -> u64 {
    let word = word ^ word >> 32;
    let word = word ^ word >> 16;
    let word = word ^ word >> 8;
    (word ^ word >> 4) & 0xf
}

/// More stripes than threads by far, so that two pages rarely meet in one.
const STRIPES: usize = if MODEL { 4 } else { 1024 };
/// With a backing disk: one may be held for as long as a read takes, and a WRITE is of up to 256 pages.
const STRIPES_WITH_DISK: usize = if MODEL { 4 } else { 1 << 16 };
/// The same of slots for shared pages, of which there are fewer: one of so many.
const SHARED_STRIPES: usize = if MODEL { 2 } else { 4 };

/// The slot words of the state file, and the locks that guard them (ranks `Slot` and `Shared`).
pub struct SlotTable {
    state: Arc<State>,
    touched: Touched,
    stripes: Box<[Ranked<()>]>,
    shared_stripes: Box<[Ranked<()>]>,
}

/// One slot, locked: what it holds does not change while this lives, and its object is not freed, but may be moved.
pub struct Slot<'a> {
    table: &'a SlotTable,
    index: u32,
    _stripe: Guard<'a, ()>,
}

impl SlotTable {
    /// A table over slot words that are all EMPTY, or see [`SlotTable::mark_touched`]. Errors: [`crate::error::Error::System`].
    pub fn new(state: Arc<State>) -> Result<SlotTable> {
        let touched = Touched::new(state.all_slots())?;
        let shared_stripes = stripes(Rank::Shared, STRIPES / SHARED_STRIPES);
        Ok(SlotTable { touched, state, stripes: stripes(Rank::Slot, STRIPES), shared_stripes })
    }

    /// Makes more of the locks, for reads of a backing disk. Nobody may have used the table yet.
    pub fn expect_disk(&mut self) {
        self.stripes = stripes(Rank::Slot, STRIPES_WITH_DISK);
        self.shared_stripes = stripes(Rank::Shared, STRIPES_WITH_DISK / SHARED_STRIPES);
    }

    /// Takes memory for all slot words, so that using them faults no more. May wait for memory.
    pub fn populate(&self) -> Result<()> {
        self.state.populate_words()?;
        self.touched.populate()
    }

    /// Marks the slots that hold something, in a table over words from before, which nobody changes meanwhile.
    pub fn mark_touched(&self) {
        for (index, word) in self.state.words().iter().enumerate() {
            if Word(word.load(Acquire)).entry() != Entry::Empty {
                self.touched.mark(index as u32);
            }
        }
    }

    /// The slots of a range that may hold something: all others have been EMPTY for ever.
    pub fn touched(&self, range: Range<u64>) -> impl Iterator<Item = u32> + '_ {
        self.touched.within(range).flatten().map(|index| index as u32)
    }

    /// Locks a slot; waits for whoever works on it, or on another one in its stripe.
    pub fn lock(&self, index: u32) -> Slot<'_> {
        Slot { table: self, index, _stripe: self.stripe(index).lock() }
    }

    /// Locks a slot, unless somebody works on it, or on another one in its stripe.
    pub fn try_lock(&self, index: u32) -> Option<Slot<'_>> {
        Some(Slot { table: self, index, _stripe: self.stripe(index).try_lock()? })
    }

    fn stripe(&self, index: u32) -> &Ranked<()> {
        let stripes = if self.is_shared(index) { &self.shared_stripes } else { &self.stripes };
        &stripes[index as usize % stripes.len()]
    }

    /// Whether this is a slot for a shared page. A damaged word may name what is none, or no slot at all.
    pub fn is_shared(&self, index: u32) -> bool {
        self.shared().contains(&u64::from(index))
    }

    /// The slots for shared pages.
    pub fn shared(&self) -> Range<u64> {
        self.state.slots()..self.state.all_slots()
    }

    /// All slots, these too.
    pub fn all(&self) -> Range<u64> {
        0..self.state.all_slots()
    }

    /// The word of a slot that is not locked: it may change at any time.
    pub fn peek(&self, index: u32) -> Option<Word> {
        Some(Word(self.state.words().get(index as usize)?.load(Acquire)))
    }

    /// Makes a slot that names the object at `from` name its copy at `to`. Returns false if it does not name it: the
    /// object belongs to whoever is about to publish it, or to free it, or is being written back. Takes no lock and
    /// never blocks.
    ///
    /// Release order: whoever finds the new location finds the copy's bytes.
    pub fn relocate(&self, index: u32, from: Location, to: Location) -> bool {
        let Some(word) = self.state.words().get(index as usize) else { return false };
        let old = Word(word.load(Acquire));
        let new = Word::new(Entry::Pool(to), old.dictionary(), old.generation_after(1));
        crash_point("move: before the word");
        let moved = old.entry() == Entry::Pool(from) && word.compare_exchange(old.0, new.0, AcqRel, Acquire).is_ok();
        crash_point("move: after the word");
        moved
    }

    /// Bytes of slot words, marks and locks.
    pub fn metadata_bytes(&self) -> u64 {
        let stripes = size_of_val(&*self.stripes) + size_of_val(&*self.shared_stripes);
        self.state.all_slots() * 8 + self.touched.metadata_bytes() + stripes as u64
    }
}

/// Written once, and so resident.
fn stripes(rank: Rank, count: usize) -> Box<[Ranked<()>]> {
    (0..count).map(|_| Ranked::new(rank, ())).collect()
}

impl Slot<'_> {
    pub fn index(&self) -> u32 {
        self.index
    }

    pub fn word(&self) -> Word {
        Word(self.table.state.words()[self.index as usize].load(Acquire))
    }

    /// Makes `entry`, which takes this dictionary to be read, what the slot holds, in a new generation, and returns the
    /// word that was there.
    ///
    /// Release order: the object's bytes are written before its location can be seen.
    pub fn publish(&mut self, entry: Entry, dictionary: Option<Place>) -> Word {
        self.table.touched.mark(self.index);
        crash_point("before the word");
        loop {
            let old = self.word();
            let new = Word::new(entry, dictionary, old.generation_after(1));
            let word = &self.table.state.words()[self.index as usize];
            // It fails if the old object has just been moved: then it is the copy that is to be freed.
            if word.compare_exchange(old.0, new.0, AcqRel, Acquire).is_ok() {
                crash_point("after the word");
                return old;
            }
        }
    }

    /// Makes `entry` what the slot holds, in the next generation, if its word is still `old`. Returns whether it was. The
    /// dictionary stays: it is the same page in another place.
    pub fn publish_over(&mut self, old: Word, entry: Entry) -> bool {
        let new = Word::new(entry, old.dictionary(), old.generation_after(1));
        let word = &self.table.state.words()[self.index as usize];
        crash_point("writeback: before the word");
        let published = word.compare_exchange(old.0, new.0, AcqRel, Acquire).is_ok();
        crash_point("writeback: after the word");
        published
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entries() -> impl Strategy<Value = Entry> {
        prop_oneof![
            Just(Entry::Empty),
            Just(Entry::Lost),
            any::<u32>().prop_map(Entry::SameFilled),
            (0..=VALUE_MASK).prop_map(|units| Entry::Pool(Location::from_units(units))),
            (0..=VALUE_MASK).prop_map(|units| Entry::Writeback(Location::from_units(units))),
            (0..=VALUE_MASK).prop_map(|bits| Entry::Disk(DiskLocation::from_bits(bits))),
            any::<(u32, u32)>().prop_map(|(slot, shared)| Entry::Shared(Reference::new(slot, shared))),
            (0..=VALUE_MASK).prop_map(|bits| Entry::Disk(DiskLocation::from_bits(bits).of_cluster())),
        ]
    }

    fn dictionaries() -> impl Strategy<Value = Option<Place>> {
        (0..=4u64).prop_map(|bits| Place::from_bits(bits).expect("a place"))
    }

    proptest! {
        #[test]
        fn a_word_gives_back_what_it_was_made_of(
            entry in entries(), dictionary in dictionaries(), generation in 0..=GENERATION_MASK,
        ) {
            let word = Word::new(entry, dictionary, generation);
            prop_assert_eq!((word.entry(), word.dictionary(), word.generation()), (entry, dictionary, generation));
        }

        #[test]
        fn a_flipped_bit_is_damage(
            entry in entries(), dictionary in dictionaries(), generation in 0..=GENERATION_MASK, bit in 0..64,
        ) {
            let word = Word(Word::new(entry, dictionary, generation).0 ^ 1u64 << bit);
            prop_assert_eq!(word.entry(), Entry::Damaged);
        }

        #[test]
        fn every_change_is_a_new_generation(before in entries(), after in entries()) {
            let table = SlotTable::new(Arc::new(State::create(1, 512, 0, None).expect("state"))).expect("table");
            let mut slot = table.lock(0);
            slot.publish(before, None);
            let old = slot.word();
            prop_assert_eq!(slot.publish(after, None).entry(), before);
            prop_assert_ne!(slot.word(), old);
            prop_assert_eq!(slot.word().generation(), old.generation_after(1));
        }

        #[test]
        fn a_word_is_published_over_the_one_that_was_seen_and_no_other(entries in prop::array::uniform3(entries())) {
            let table = SlotTable::new(Arc::new(State::create(1, 512, 0, None).expect("state"))).expect("table");
            let mut slot = table.lock(0);
            slot.publish(entries[0], None);
            let old = slot.word();
            prop_assert!(slot.publish_over(old, entries[1]));
            let new = slot.word();
            prop_assert!(!slot.publish_over(old, entries[2]));
            prop_assert_eq!(slot.word(), new);
        }
    }

    /// Resident is not touched: in a large swap a punch would look at all of it.
    #[test]
    fn only_chunks_that_were_published_to_are_looked_at() {
        let slots = 1 << 20;
        let table = SlotTable::new(Arc::new(State::create(slots, 512, 0, None).expect("state"))).expect("table");
        table.populate().expect("memory");
        assert_eq!(table.touched(0..slots).count(), 0);
        table.lock(700_000).publish(Entry::Lost, None);
        let found: Vec<u32> = table.touched(0..slots).collect();
        assert!(found.contains(&700_000) && found.len() <= 512, "{} slots", found.len());
        assert_eq!(table.touched(700_000..700_001).collect::<Vec<_>>(), [700_000]);
    }

    #[test]
    fn fresh_memory_is_empty_and_a_place_that_does_not_exist_is_damage() {
        assert_eq!(Word(0).entry(), Entry::Empty);
        let unknown = 3 << STATE_SHIFT | 5 << DICTIONARY_SHIFT;
        assert_eq!(Word(unknown | fold(unknown) << CHECK_SHIFT).entry(), Entry::Damaged);
    }
}
