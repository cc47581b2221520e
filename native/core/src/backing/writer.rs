//! A segment that is being filled.

use super::{Backing, DiskLocation, Record};
use crate::error::Result;

/// What a segment is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Objects of the pool.
    Evict,
    /// Records of other segments. May take the last free segment.
    Clean,
}

/// One segment in memory: `begin`, `add`…, `write`, then publish what `records` says, `finish`; and again.
///
/// Everything is allocated and touched when it is made. Not dropped between `begin` and `finish`, or its segment is lost.
pub struct Writer {}

impl Writer {
    pub fn new() -> Result<Writer> {
        todo!()
    }

    /// Takes a free segment. Errors: `BackingFull`, `NoWriteback`, `BudgetUsedUp`; nothing has changed then.
    pub fn begin(&mut self, backing: &Backing, purpose: Purpose) -> Result<()> {
        let _ = (backing, purpose);
        todo!()
    }

    /// Appends a record, encrypted. None: there is no room for it. Takes no lock, and touches no disk.
    pub fn add(&mut self, backing: &Backing, slot: u32, generation: u16, object: &[u8]) -> Option<DiskLocation> {
        let _ = (backing, slot, generation, object);
        todo!()
    }

    /// Writes the segment; waits for the disk. From its success on all records are live. Counts bytes, errors, latency.
    ///
    /// Errors: `DiskWrite`: no record is live, and the segment is no longer the writer's. `records` are still listed,
    /// until `finish`.
    pub fn write(&mut self, backing: &Backing) -> Result<()> {
        let _ = backing;
        todo!()
    }

    /// What was added since `begin`.
    pub fn records(&self) -> &[Record] {
        todo!()
    }

    /// After publishing, or to give up: the segment may be freed or cleaned from now on, and is free if nothing was
    /// written to it. To be called after every `begin` that went well, also when `write` has failed.
    pub fn finish(&mut self, backing: &Backing) {
        let _ = backing;
        todo!()
    }
}
