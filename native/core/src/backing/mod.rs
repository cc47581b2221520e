//! The backing disk: where objects go that the pool has no room for.
//!
//! Log-structured: objects are written as they are, compressed, many at a time. A [`Writer`] fills a segment in memory
//! with records (`record.rs`), sealed by AES-256-GCM (`cipher.rs`), and writes it once. Nothing on the disk says which
//! records are live; the slot words do, and `table.rs` counts the bytes for each segment. A segment in which nothing
//! lives is free at once; the live records of a sparse one are moved to a new segment by the cleaner.
//!
//! ```text
//! pool ── Writer ──> segment ── Backing::read ──> reply
//!            ^          │ Backing::victim
//!            └──────────┘ CleanBuffer
//! ```
//!
//! Whoever holds a slot's lock may read and free the record that its word names; a record is never freed while it is
//! read. Nothing here allocates on the way of a page, and no lock is held over a transfer.

#[cfg(all(test, not(feature = "model")))]
pub(crate) mod alloc_tests;
mod cipher;
#[cfg(all(test, not(feature = "model")))]
mod cleaning_tests;
pub mod cluster;
mod disk;
#[cfg(any(test, debug_assertions, feature = "testing"))]
mod faults;
mod reader;
mod record;
mod table;
#[cfg(all(test, not(feature = "model")))]
mod tests;
mod writer;

#[cfg(any(test, debug_assertions, feature = "testing"))]
pub use disk::MemoryDisk;
pub use disk::{Disk, FileDisk};
#[cfg(any(test, debug_assertions, feature = "testing"))]
pub use faults::Faults;
pub use reader::{CleanBuffer, ReadBuffer};
pub use record::{record_bytes, records_of, Damaged, DiskLocation, Record, Records, MAX_CLUSTER};
pub use writer::{Purpose, Writer, MAX_RECORDS};

use crate::crash::crash_point;
use crate::error::{Error, Result};
use crate::locks::{Rank, Ranked};
use crate::metrics::SharedMetrics;
use crate::state::State;
use crate::sync::{AtomicU64, Ordering::Acquire, MODEL};
use cipher::Cipher;
use cluster::CLUSTER;
use record::{MAX_DISK_BYTES, RECORD_HEADER};
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::time::Instant;
use table::{Table, MIN_SEGMENTS};

/// What is written at a time, and freed as a whole.
pub const SEGMENT_BYTES: usize = if MODEL { 8 << 10 } else { 256 << 10 };
/// Transfers are whole blocks: no disk has larger ones.
pub const BLOCK: usize = 4096;

#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// AES-256-GCM; without it, a checksum.
    pub encryption: bool,
}

/// All methods take `&self` and may be called from several threads.
pub struct Backing {
    disk: Box<dyn Disk>,
    cipher: Cipher,
    table: Ranked<Table>,
    /// Segments that were written. Raised with Release order before any of their records is named.
    writes: AtomicU64,
    state: Arc<State>,
    metrics: SharedMetrics,
}

/// A segment that is being cleaned: neither freed nor handed out before it is given to [`Backing::release`] or
/// [`Backing::put_back`].
#[must_use]
#[derive(Debug)]
pub struct Victim {
    segment: u32,
}

impl Backing {
    /// How much of a disk of so many bytes is used: whole segments.
    pub fn usable_bytes(bytes: u64) -> u64 {
        bytes.min(MAX_DISK_BYTES) / SEGMENT_BYTES as u64 * SEGMENT_BYTES as u64
    }

    /// The first `bytes` of a disk, in whole segments, all of them free but for what is adopted. Takes memory, 20 bytes
    /// for a segment. With the state's key, or a new one if it has none.
    ///
    /// Errors: [`Error::Invalid`] if it is too small; [`Error::System`] if there is no randomness for a key.
    pub fn new(
        disk: Box<dyn Disk>,
        bytes: u64,
        options: Options,
        state: Arc<State>,
        metrics: SharedMetrics,
    ) -> Result<Backing> {
        let segments = (Backing::usable_bytes(bytes) / SEGMENT_BYTES as u64) as u32;
        if segments < MIN_SEGMENTS {
            let least = u64::from(MIN_SEGMENTS) * SEGMENT_BYTES as u64;
            return Err(Error::Invalid(format!("the backing disk has {bytes} bytes; it needs {least}")));
        }
        let cipher = Cipher::new(options.encryption, state.clone())?;
        metrics.backing_bytes.set(u64::from(segments) * SEGMENT_BYTES as u64);
        let table = Ranked::new(Rank::Backing, Table::new(segments));
        let backing = Backing { disk, cipher, table, writes: AtomicU64::new(0), state, metrics };
        backing.change(|_| ());
        Ok(backing)
    }

    /// A slot names this record, from before: it is live. Before anything else is done. False if there can be none.
    pub fn adopt(&self, at: DiskLocation) -> bool {
        self.change(|table| table.adopt(at))
    }

    /// A record is dead: no slot names it, and nobody reads it. Takes the lock `Backing`; does not touch the disk.
    pub fn free(&self, at: DiskLocation) {
        self.change(|table| table.free(at));
        crash_point("record freed");
    }

    /// How many segments were written: as long as no more are, what was read of one that a slot names is still right.
    pub fn segments_written(&self) -> u64 {
        self.writes.load(Acquire)
    }

    /// Reads a record's object, as it was given to [`Writer::add`]: the blocks that it lies in, and for a request that
    /// wants more pages those behind it. Twice, if it is not what was written: the fault may be the first reading's.
    ///
    /// Waits for the disk, unless the buffer has them already. The caller holds the slot's lock, so that the record is
    /// not freed meanwhile.
    /// Errors: [`Error::DiskRead`]: it may be readable another time. [`Error::Corrupt`]: what lies there is not what was
    /// written there for this slot and generation, or `at` is nowhere. Of a cluster nothing else counts than that it was
    /// written for this slot and generation, too.
    pub fn read<'b>(
        &self,
        at: DiskLocation,
        slot: u32,
        generation: u16,
        buffer: &'b mut ReadBuffer,
    ) -> Result<&'b [u8]> {
        let bytes = at.bytes();
        if bytes.end > self.metrics.backing_bytes.get() {
            return Err(Error::Corrupt { slot });
        }
        let (owner, said) = if at.is_cluster() { (cluster::first_of(slot), CLUSTER) } else { (slot, generation) };
        let is_its = |object: &&[u8]| {
            let of_cluster = || cluster::split(object).map(|(generations, _)| generations[cluster::member_of(slot)]);
            !at.is_cluster() || of_cluster() == Some(generation)
        };
        let mut open = |again: bool| {
            if again {
                buffer.forget();
            }
            let place = buffer.record(self, bytes.clone()).map_err(|source| Error::DiskRead { slot, source })?;
            let object = self.cipher.open(&mut buffer.bytes[place.clone()], owner, said, at).filter(is_its);
            Ok(object.map(<[u8]>::len).map(|length| place.start + RECORD_HEADER..place.start + RECORD_HEADER + length))
        };
        let object = match open(false)? {
            None => open(true)?.ok_or(Error::Corrupt { slot })?,
            Some(object) => object,
        };
        Ok(&buffer.bytes[object])
    }

    /// Reads blocks of a record, and counts that if it went well.
    fn transfer(&self, start: u64, blocks: &mut [u8]) -> io::Result<()> {
        let begun = Instant::now();
        self.disk.read(start, blocks)?;
        self.metrics.disk_reads.add(1);
        self.metrics.disk_read_bytes.add(blocks.len() as u64);
        self.metrics.disk_read_latency.record_since(begun);
        Ok(())
    }

    /// Whether records can be written: now, or when the cleaner has made room, until when [`Writer::begin`] says
    /// [`Error::BackingFull`]. False if the disk has failed or is full, or the budget is used up.
    pub fn has_room(&self) -> bool {
        self.table.lock().has_room()
    }

    /// Whether nothing is written any more. What lies on the disk stays readable, if the disk can.
    pub fn is_failed(&self) -> bool {
        self.table.lock().is_failed()
    }

    /// Writes nothing any more, as after three failed writes in a row, until [`Writer::probe`] goes well.
    pub fn fail(&self) {
        self.change(Table::fail);
    }

    /// Writes again, as after a [`Writer::probe`] that went well: also to segments that could not be written, and cleans
    /// those that could not be read.
    #[cfg(test)]
    pub fn resume(&self) {
        self.change(Table::resume);
    }

    /// For a disk that has not failed: writes again to segments that could not be written, and cleans those that could
    /// not be read.
    pub fn give_segments_another_chance(&self) {
        self.change(Table::give_another_chance);
    }

    /// Sets how many bytes may still be written, for evictions and cleaning together. None: no limit.
    ///
    /// A segment is begun only if a whole one may be written; those under way count when they are.
    pub fn set_budget(&self, bytes: Option<u64>) {
        self.change(|table| table.set_budget(bytes));
    }

    /// Adds to what may still be written; to 0 if there was no limit.
    pub fn add_to_budget(&self, bytes: u64) {
        self.change(|table| table.set_budget(Some(table.budget().unwrap_or(0).saturating_add(bytes))));
    }

    /// A segment that is worth cleaning now, for the caller to clean: the emptiest one, if few are free and cleaning
    /// makes room (`table.rs` says what it may cost). None otherwise, and if the disk has failed or the budget is used
    /// up. For one cleaner at a time.
    ///
    /// So that there is always a segment to fill, the cleaner puts whole victims into its [`Writer`], one after the
    /// other; and gives back those that it has moved before it begins the next one.
    pub fn victim(&self) -> Option<Victim> {
        self.change(Table::victim).map(|segment| Victim { segment })
    }

    /// Whether there is a victim.
    pub fn wants_cleaning(&self) -> bool {
        self.table.lock().next_victim().is_some()
    }

    /// The end of a cleaning: all live records were moved, or the segment cannot be read. It is free if nothing lives in
    /// it; else it is not picked again before it is given another chance, and free when its last record is.
    pub fn release(&self, victim: Victim) {
        if self.change(|table| table.end_cleaning(victim.segment, true)) {
            self.metrics.cleaned_segments.add(1);
        }
    }

    /// A cleaning was given up, for a reason that is not the segment's: a failed write, no budget, the end.
    pub fn put_back(&self, victim: Victim) {
        self.change(|table| table.end_cleaning(victim.segment, false));
    }

    /// Forgets the key: what the disk holds is noise from now on. For the end, when nobody reads or writes any more.
    pub fn wipe_key(&self) {
        self.cipher.wipe();
    }

    fn offset_of(segment: u32) -> u64 {
        u64::from(segment) * SEGMENT_BYTES as u64
    }

    /// Changes the table, and the gauges with it.
    fn change<R>(&self, change: impl FnOnce(&mut Table) -> R) -> R {
        let mut table = self.table.lock();
        let result = change(&mut table);
        self.metrics.backing_state.set(if table.is_failed() { 2 } else { 1 });
        self.metrics.backing_free_bytes.set(u64::from(table.free_segments()) * SEGMENT_BYTES as u64);
        self.metrics.disk_live_bytes.set(table.live_bytes());
        let budget = table.budget().unwrap_or(u64::MAX);
        self.metrics.writeback_budget_bytes.set(budget);
        self.state.settings().budget_bytes.store(budget, Relaxed);
        result
    }
}
