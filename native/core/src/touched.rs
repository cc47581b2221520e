//! Which slots have ever held something, by the chunk: what empties a range passes over the rest of it.
//!
//! Private memory: who finds slot words from before marks the chunks of those that are not EMPTY.

use crate::error::Result;
use crate::memory::{Zeroable, ZeroedTable};
use crate::sync::{AtomicBool, Ordering::Relaxed, MODEL};
use std::ops::Range;

/// Slots of a chunk: those of a cluster of 2 MiB, which is what the kernel punches.
const CHUNK: u64 = if MODEL { 2 } else { 512 };

/// Set under the lock of the slot whose word is published, and never cleared.
#[derive(Default)]
struct Chunk(AtomicBool);

// SAFETY: an atomic bool, false when zero, no drop.
unsafe impl Zeroable for Chunk {}

pub struct Touched(ZeroedTable<Chunk>);

impl Touched {
    /// Nothing of so many slots is touched. Errors: [`crate::error::Error::System`].
    pub fn new(slots: u64) -> Result<Touched> {
        ZeroedTable::new(slots.div_ceil(CHUNK) as usize).map(Touched)
    }

    /// Takes memory for all marks, so that setting them faults no more. May wait for memory.
    pub fn populate(&self) -> Result<()> {
        self.0.populate(0..self.0.len())
    }

    /// To be called under the lock of the slot in which something is published: whoever finds it there has had that lock
    /// since, and finds the mark too.
    pub fn mark(&self, index: u32) {
        let chunk = &self.0[(u64::from(index) / CHUNK) as usize].0;
        // Looked at first: a line that is only read is not taken away from other processors.
        if !chunk.load(Relaxed) {
            chunk.store(true, Relaxed);
        }
    }

    /// The slots of a range that may hold something, in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let chunks = range.start / CHUNK..range.end.div_ceil(CHUNK);
        let marked = chunks.filter(|&chunk| self.0[chunk as usize].0.load(Relaxed));
        marked.map(move |chunk| range.start.max(chunk * CHUNK)..range.end.min((chunk + 1) * CHUNK))
    }

    pub fn metadata_bytes(&self) -> u64 {
        self.0.len() as u64
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;

    #[test]
    fn only_touched_chunks_are_found_and_only_what_was_asked_for() {
        let touched = Touched::new(10 * CHUNK + 1).expect("table");
        let found = |range| touched.within(range).collect::<Vec<_>>();
        assert_eq!(found(0..10 * CHUNK + 1), []);
        [3 * CHUNK, 4 * CHUNK - 1, 5 * CHUNK + 1, 10 * CHUNK].iter().for_each(|&index| touched.mark(index as u32));
        let last = 10 * CHUNK..10 * CHUNK + 1;
        assert_eq!(found(0..10 * CHUNK + 1), [3 * CHUNK..4 * CHUNK, 5 * CHUNK..6 * CHUNK, last.clone()]);
        assert_eq!(found(3 * CHUNK + 1..5 * CHUNK + 1), [3 * CHUNK + 1..4 * CHUNK, 5 * CHUNK..5 * CHUNK + 1]);
        assert_eq!(found(last.clone()), [last]);
        assert_eq!(found(4 * CHUNK..5 * CHUNK), []);
        assert_eq!(found(4 * CHUNK..4 * CHUNK), []);
    }
}
