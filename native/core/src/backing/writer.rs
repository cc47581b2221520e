//! A segment that is being filled, in memory, and then written at once.

use super::cluster::CLUSTER;
use super::record::{max_object, record_bytes, DiskLocation, Record};
use super::table::Table;
use super::{Backing, BLOCK, SEGMENT_BYTES};
use crate::crash::crash_point;
use crate::error::{Error, Result};
use crate::memory::ZeroedTable;
use crate::page::CLUSTER_PAGES;
use crate::sync::Ordering::Release;
use std::time::Instant;

/// What a segment is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Objects of the pool.
    Evict,
    /// Records of other segments. May take the last free segment.
    Clean,
}

/// Of a segment. More than ever fit, unless objects become very small; then a segment is written before it is full.
pub const MAX_RECORDS: usize = SEGMENT_BYTES / 64;

/// One segment in memory: `begin`, `add` until it is full, `write`, then publish what `records` says, `finish`; and again.
///
/// All of its memory is taken when it is made. To be dropped only after `finish`, or its segment is never free again.
pub struct Writer {
    buffer: ZeroedTable<u8>,
    used: usize,
    /// What the records weigh: see [`DiskLocation::weight`].
    weight: u32,
    records: Vec<Record>,
    /// The segment that is being filled, and for what; none before `begin`, and after a failed `write`.
    pub(super) segment: Option<(u32, Purpose)>,
    written: bool,
}

impl Writer {
    /// Errors: [`Error::System`] without memory.
    pub fn new() -> Result<Writer> {
        let buffer = ZeroedTable::new(SEGMENT_BYTES)?;
        buffer.populate(0..SEGMENT_BYTES)?;
        // Written once, so that it is resident.
        let nothing = Record { slot: u32::MAX, generation: 0, location: DiskLocation::from_bits(0) };
        let mut records = vec![nothing; MAX_RECORDS];
        records.clear();
        Ok(Writer { buffer, used: 0, weight: 0, records, segment: None, written: false })
    }

    /// Takes a free segment. Neither waits nor touches the disk.
    ///
    /// Errors: [`Error::BackingFull`], [`Error::NoWriteback`], [`Error::BudgetUsedUp`]; nothing has changed then.
    pub fn begin(&mut self, backing: &Backing, purpose: Purpose) -> Result<()> {
        debug_assert!(self.segment.is_none() && self.records.is_empty(), "begun before it was finished");
        self.segment = Some((backing.change(|table| table.take(purpose))?, purpose));
        Ok(())
    }

    /// Appends a record of an object (header and payload, without padding), sealed for this slot, generation and the
    /// place that it returns. None: it does not fit. Takes no lock, and does not touch the disk. A cluster's object has the
    /// generation [`CLUSTER`], and is sealed for its first slot.
    pub fn add(&mut self, backing: &Backing, slot: u32, generation: u16, object: &[u8]) -> Option<DiskLocation> {
        let (segment, _) = self.segment?;
        let place = self.used..self.used + record_bytes(object.len());
        let fits = place.end <= SEGMENT_BYTES && self.records.len() < MAX_RECORDS;
        debug_assert!(object.len() <= max_object(generation) && !self.written);
        if !fits || object.len() > max_object(generation) || self.written {
            return None;
        }
        let start = Backing::offset_of(segment);
        let location = DiskLocation::new(start + place.start as u64..start + place.end as u64);
        let location = if generation == CLUSTER { location.of_cluster() } else { location };
        let shares = if location.is_cluster() { CLUSTER_PAGES as u32 } else { 1 };
        self.weight += shares * location.weight();
        self.used = place.end;
        backing.cipher.seal(&mut self.buffer[place], slot, generation, location, object);
        self.records.push(Record { slot, generation, location });
        Some(location)
    }

    /// Bytes of records for which there is room.
    pub fn room(&self) -> usize {
        SEGMENT_BYTES - self.used
    }

    /// Writes what was added, in whole blocks, and waits for the disk. From its success on all records are live.
    ///
    /// Errors: [`Error::DiskWrite`]: no record is live, and none may be published; `records` are listed until `finish`,
    /// and more cannot be added.
    pub fn write(&mut self, backing: &Backing) -> Result<()> {
        let (segment, purpose) = match self.segment {
            _ if self.records.is_empty() => return Ok(()),
            Some(_) if self.written => return Ok(()),
            Some(segment) => segment,
            // It has failed before.
            None => return Err(Error::NoWriteback),
        };
        let start = Instant::now();
        let blocks = self.used.next_multiple_of(BLOCK);
        self.buffer[self.used..blocks].fill(0);
        let errors = backing.change(|table| table.writing(blocks as u64));
        let counter = match purpose {
            Purpose::Evict => &backing.metrics.writeback_bytes,
            Purpose::Clean => &backing.metrics.cleaning_bytes,
        };
        counter.add(blocks as u64);
        self.written = true;
        crash_point("before the segment");
        let result = backing.disk.write(Backing::offset_of(segment), &self.buffer[..blocks]);
        crash_point("after the segment");
        if let Err(error) = result {
            backing.metrics.writeback_errors.add(1);
            backing.change(|table| table.write_failed(segment, errors));
            self.segment = None;
            return Err(Error::DiskWrite(error));
        }
        if purpose == Purpose::Evict {
            backing.metrics.writeback_latency.record_since(start);
        }
        backing.writes.fetch_add(1, Release);
        backing.change(|table| table.written(segment, self.used as u32, self.weight));
        Ok(())
    }

    /// Writes a segment of zeros to a disk that has failed, and waits for it: if that goes well, so does the disk again.
    /// Else, or without budget, nothing has changed. Counts as cleaning. To be called after `finish`, or instead of
    /// `begin`.
    ///
    /// Errors: [`Error::DiskWrite`].
    pub fn probe(&mut self, backing: &Backing) -> Result<()> {
        debug_assert!(self.segment.is_none() && self.records.is_empty(), "probed before it was finished");
        let Some(segment) = backing.change(Table::probe) else { return Ok(()) };
        self.buffer.fill(0);
        backing.change(|table| table.writing(SEGMENT_BYTES as u64));
        backing.metrics.cleaning_bytes.add(SEGMENT_BYTES as u64);
        let written = backing.disk.write(Backing::offset_of(segment), &self.buffer);
        backing.change(|table| {
            table.finish(segment);
            if written.is_ok() {
                table.resume();
            }
        });
        written.inspect_err(|_| backing.metrics.writeback_errors.add(1)).map_err(Error::DiskWrite)
    }

    /// What was added since `begin`.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// After publishing, or to give up: the segment may be freed or cleaned from now on, and is free if nothing lives in
    /// it. To be called after every `begin` that went well, also when `write` has failed.
    pub fn finish(&mut self, backing: &Backing) {
        if let Some((segment, _)) = self.segment.take() {
            backing.change(|table| {
                if !self.written {
                    table.writing(0);
                }
                table.finish(segment);
            });
        }
        self.records.clear();
        (self.used, self.weight, self.written) = (0, 0, false);
    }
}
