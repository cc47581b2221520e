//! How many slots name each shared page.
//!
//! Pages that are alike are stored once: in a slot of its own, behind those of the swap file, which has the object or the
//! record as any slot has; the slots whose page it is say SHARED and its index. Each such word is a reference.
//!
//! - One is **taken** under the lock of the shared slot, where its page was compared, and never the first: a count of zero
//!   stays until the slot is made anew. It is counted before a word is published that names the slot.
//! - It is **put** by whoever has replaced that word, afterwards. Whoever reads through a word has its slot locked, so that it
//!   is not put meanwhile: what is named has its page.
//! - A slot that nobody names is emptied under its lock, by who finds it so: who has put the last one, if he need not wait
//!   for the lock, else the next who looks for those that were **left**. He believes only the count and the word that he
//!   finds under the lock; nobody uses what he has put.
//!
//! A successor counts the words anew.

use crate::error::Result;
use crate::memory::{Zeroable, ZeroedTable};
use crate::state::{State, Table};
use crate::sync::Ordering::{AcqRel, Acquire, Relaxed, Release};
use crate::sync::{AtomicBool, AtomicU32};

/// What a word says of the shared page that its slot names: the index of the shared slot; and a tag that tells whose word it
/// is, so that a word that comes to stand elsewhere names nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reference(u64);

const INDEX_BITS: u32 = 32;
const TAG_BITS: u32 = 13;

impl Reference {
    /// By a slot of the swap file to one for shared pages.
    pub fn new(slot: u32, shared: u32) -> Reference {
        Reference(Self::tag(slot, shared) << INDEX_BITS | u64::from(shared))
    }

    /// The shared slot, if this is the word of `slot`.
    pub fn by(self, slot: u32) -> Option<u32> {
        Some(self.0 as u32).filter(|&shared| Reference::new(slot, shared) == self)
    }

    fn tag(slot: u32, shared: u32) -> u64 {
        (u64::from(slot) << INDEX_BITS | u64::from(shared)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - TAG_BITS)
    }

    /// As slot words have it, in 45 bits.
    pub fn to_bits(self) -> u64 {
        self.0
    }

    pub fn from_bits(bits: u64) -> Reference {
        Reference(bits)
    }
}

#[derive(Default)]
struct Count(AtomicU32);

// SAFETY: an atomic integer, valid when zero, no drop.
unsafe impl Zeroable for Count {}

pub struct References {
    /// Index of the first slot for a shared page.
    first: u64,
    /// Invariant: never less than the words that name the slot.
    counts: ZeroedTable<Count>,
    /// Somebody could not empty a slot that nobody names.
    left: AtomicBool,
}

impl References {
    /// To the shared slots of a state: none yet. Errors: [`crate::error::Error::System`].
    pub fn new(state: &State) -> Result<References> {
        Ok(References { first: state.slots(), counts: state.table(Table::References)?, left: AtomicBool::new(false) })
    }

    /// Takes memory for all counts, so that using them faults no more. May wait for memory.
    pub fn populate(&self) -> Result<()> {
        self.counts.populate(0..self.counts.len())
    }

    pub fn metadata_bytes(&self) -> u64 {
        (self.counts.len() * size_of::<Count>()) as u64
    }

    /// None for what is no shared slot: a word may be damaged.
    fn count(&self, index: u32) -> Option<&AtomicU32> {
        let n = u64::from(index).checked_sub(self.first)?;
        self.counts.get(usize::try_from(n).ok()?).map(|Count(count)| count)
    }

    /// Whether anybody names a slot, or is about to.
    pub fn is_named(&self, index: u32) -> bool {
        self.count(index).is_some_and(|count| count.load(Acquire) > 0)
    }

    /// The first one, to a slot that is EMPTY and locked, before it is published.
    pub fn begin(&self, index: u32) {
        let before = self.count(index).map(|count| count.swap(1, AcqRel));
        debug_assert!(before == Some(0), "slot {index} is named, and begins");
    }

    /// Another one, unless there is none. To be called with the slot locked, or by who has one.
    pub fn take(&self, index: u32) -> bool {
        let another = |count: u32| (count > 0).then(|| count + 1);
        self.count(index).is_some_and(|count| count.fetch_update(AcqRel, Acquire, another).is_ok())
    }

    /// Gives one up. Returns whether it was the last: the caller then sees that the slot is emptied.
    pub fn put(&self, index: u32) -> bool {
        let before = self.count(index).map(|count| count.fetch_update(AcqRel, Acquire, |count| count.checked_sub(1)));
        debug_assert!(matches!(before, Some(Ok(_))), "a reference to slot {index} that nobody counted");
        before == Some(Ok(1))
    }

    /// Counts a word that was found, alone, at a recovery.
    pub fn found(&self, index: u32) {
        if let Some(count) = self.count(index) {
            count.fetch_add(1, Relaxed);
        }
    }

    /// There is a slot that nobody names, and that is still to be emptied.
    pub fn leave(&self) {
        self.left.store(true, Release);
    }

    /// Whether there was such a slot since somebody last asked.
    pub fn were_left(&self) -> bool {
        self.left.load(Relaxed) && self.left.swap(false, AcqRel)
    }
}
