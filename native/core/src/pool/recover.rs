//! A pool over objects that are there already: which of them live is said by who has the slot words.
//!
//! Nothing is believed but what fits together: an object that is of its slot, on pages that have memory, where its
//! allocator can have laid it out, and apart from all others.

use super::{guard, Allocator, Location, Pool, REGION_PAGES};
use crate::codec::Codec;
use crate::error::Result;
use crate::object;
use crate::pool::class::ClassTable;
use crate::pool::z3fold::CHUNK;
use xxhash_rust::xxh3::Xxh3;

impl Allocator {
    /// Stands for the way in which this program lays out the objects of so many slots.
    pub fn geometry(self, slots: u64) -> u64 {
        let mut hasher = Xxh3::new();
        hasher.update(self.name().as_bytes());
        let mut number = |number: usize| hasher.update(&(number as u64).to_ne_bytes());
        number(REGION_PAGES as usize);
        number(object::HEADER_SIZE + guard::BYTES);
        match self {
            Allocator::Zsmalloc => ClassTable::for_slots(slots).classes().iter().for_each(|class| {
                number(class.size);
                number(class.pages);
            }),
            Allocator::Z3fold => number(CHUNK),
        }
        hasher.digest()
    }
}

impl Pool {
    /// Finds the memory that the pool has, before the first [`Pool::adopt`]. In a new pool, alone.
    ///
    /// Takes page tables for the regions that have memory (4 KiB for 2 MiB). Errors: [`crate::error::Error::System`].
    pub fn begin_recovery(&self) -> Result<()> {
        self.base.arena.find_backed(|pages| self.allocator.prepare(pages))
    }

    /// Makes the object at a location live that its slot names, and returns its codec and length. None, with nothing
    /// changed, if there can be no such object.
    ///
    /// Nobody has looked at its payload then, and it may still be damaged.
    pub fn adopt(&self, location: Location, slot: u32) -> Option<(Codec, usize)> {
        let object = self.allocator.adopt(location, slot)?;
        // SAFETY: it lives, and nobody else is at work. Whatever has damaged it, was before.
        unsafe {
            guard::set(&self.base.state, &object);
            object::peek(self.base.bytes(&object))
        }
    }

    /// After the last [`Pool::adopt`]: from here on it is a pool like any other.
    ///
    /// Errors: [`crate::error::Error::System`].
    pub fn end_recovery(&self) -> Result<()> {
        self.base.arena.end_recovery()
    }
}
