//! The backing disk: where objects go that the pool has no room for.

mod disk;
mod reader;
mod record;
mod writer;

#[cfg(any(test, debug_assertions))]
pub use disk::MemoryDisk;
pub use disk::{Disk, FileDisk};
pub use reader::{CleanBuffer, ReadBuffer};
pub use record::{DiskLocation, Record};
pub use writer::{Purpose, Writer};

use crate::error::Result;
use crate::metrics::SharedMetrics;
use crate::state::State;
use crate::sync::MODEL;
use std::io;
use std::sync::Arc;

/// What is written at a time: filled in memory, written once, and freed as a whole.
pub const SEGMENT_BYTES: usize = if MODEL { 8 << 10 } else { 256 << 10 };

#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// AES-256-GCM; without it, a checksum.
    pub encryption: bool,
}

/// All methods take `&self` and may be called from several threads.
pub struct Backing {}

/// A segment that is being cleaned: it is neither freed nor handed out again before it is given to
/// [`Backing::release`] or [`Backing::put_back`].
#[must_use]
#[derive(Debug)]
pub struct Victim {
    segment: u32,
}

impl Backing {
    /// The first `bytes` of a disk, all free. Takes memory, and may wait for it.
    ///
    /// Errors: [`crate::error::Error::Invalid`] if it is too small; [`crate::error::Error::System`] without randomness or memory.
    pub fn new(
        disk: Box<dyn Disk>,
        bytes: u64,
        options: Options,
        state: Arc<State>,
        metrics: SharedMetrics,
    ) -> Result<Backing> {
        let _ = (disk, bytes, options, state, metrics);
        todo!()
    }

    /// A record is dead: no slot names it, and nobody reads it. Takes the lock `Backing`; no disk, no allocation.
    pub fn free(&self, at: DiskLocation) {
        let _ = at;
        todo!()
    }

    /// Reads a record's object (header and payload, as it was given to [`Writer::add`]).
    ///
    /// The caller holds the slot's lock, so that the record is not freed meanwhile. Reads the blocks that it lies in, and
    /// waits for the disk. Counts `disk_reads`, `disk_read_bytes`, `disk_read_errors`, `disk_read_latency`.
    ///
    /// Errors: `DiskRead` (may be readable another time); `Corrupt` if it is not what was written for this slot,
    /// generation and location.
    pub fn read<'b>(
        &self,
        at: DiskLocation,
        slot: u32,
        generation: u16,
        buffer: &'b mut ReadBuffer,
    ) -> Result<&'b [u8]> {
        let _ = (at, slot, generation, buffer);
        todo!()
    }

    /// Whether records can be written: now, or when the cleaner has made room (then [`Writer::begin`] says
    /// `BackingFull` meanwhile). False if the disk has failed or is full, or the budget is used up.
    pub fn has_room(&self) -> bool {
        todo!()
    }

    /// Nothing is written to the disk any more. What lies there stays readable.
    pub fn is_failed(&self) -> bool {
        todo!()
    }

    /// As after three failed writes in a row.
    pub fn fail(&self) {
        todo!()
    }

    /// Tries again, segments that could not be written included.
    pub fn resume(&self) {
        todo!()
    }

    /// Bytes that may still be written, for evictions and cleaning together. None: no limit.
    pub fn set_budget(&self, bytes: Option<u64>) {
        let _ = bytes;
        todo!()
    }

    /// A segment to clean, now the caller's: the emptiest one, if free segments are few and cleaning gains some. None:
    /// there is nothing to clean now (also: failed, or no budget).
    pub fn victim(&self) -> Option<Victim> {
        todo!()
    }

    /// Whether [`Backing::victim`] would give one.
    pub fn wants_cleaning(&self) -> bool {
        todo!()
    }

    /// The end of a cleaning: all records of the segment were looked at and the live ones moved, as far as it could be
    /// read. It is free if nothing is live in it; else it is not picked again, and free once its last record is.
    pub fn release(&self, victim: Victim) {
        let _ = victim;
        todo!()
    }

    /// A cleaning was given up, for a reason that is not the segment's (a failed write, no budget, an end): it may be
    /// picked again.
    pub fn put_back(&self, victim: Victim) {
        let _ = victim;
        todo!()
    }
}

fn _unused(victim: &Victim, _: io::Error) -> u32 {
    victim.segment
}
