//! Reading back: one record, or a whole segment to be cleaned.

use super::record::{records_of, Record, Records, UNIT};
use super::{Backing, Victim, BLOCK, SEGMENT_BYTES};
use crate::error::Result;
use crate::memory::ZeroedTable;
use crate::sync::Ordering::Acquire;
use std::io;
use std::ops::Range;

/// The blocks that the longest record whose length fits into a slot word can touch.
const RECORD_BLOCKS: usize = (((1 << 9) - 1) * UNIT + BLOCK - UNIT).next_multiple_of(BLOCK);
/// What is read ahead of a record at most, and for each page that is wanted next: as much as most records take.
const MOST_AHEAD: usize = 32 << 10;
const AHEAD_PER_PAGE: usize = 2 << 10;

/// Room for the blocks of one record, and of those behind it. All of its memory is taken when it is made.
///
/// Pages that were evicted one after the other lie so on the disk: a request for several needs one transfer then.
pub struct ReadBuffer {
    pub(super) bytes: ZeroedTable<u8>,
    /// What it holds of the disk, and where in `bytes` that begins. Behind the last record that was opened, since
    /// that is done in place.
    held: Range<u64>,
    at: usize,
    /// How many segments had been written when the transfer began. Invariant: what is held is used only as long as no
    /// more have been. A record that a slot names then was there before the transfer: it is written before it is named.
    writes: u64,
    ahead: usize,
}

impl ReadBuffer {
    /// Errors: [`crate::error::Error::System`] without memory.
    pub fn new() -> Result<ReadBuffer> {
        let bytes = RECORD_BLOCKS + MOST_AHEAD;
        let table = ZeroedTable::new(bytes)?;
        table.populate(0..bytes)?;
        Ok(ReadBuffer { bytes: table, held: 0..0, at: 0, writes: 0, ahead: 0 })
    }

    /// Begins a request: forgets what is held.
    pub fn forget(&mut self) {
        (self.held, self.ahead) = (0..0, 0);
    }

    /// So many pages are wanted after the next one.
    pub fn expect(&mut self, pages: usize) {
        self.ahead = pages.saturating_mul(AHEAD_PER_PAGE).min(MOST_AHEAD);
    }

    /// Where in `bytes` a record is, to be opened in place; read from the disk if it is not held.
    pub(super) fn record(&mut self, backing: &Backing, bytes: Range<u64>) -> io::Result<Range<usize>> {
        let writes = backing.writes.load(Acquire);
        if !(self.held.start <= bytes.start && bytes.end <= self.held.end && self.writes == writes) {
            let block = BLOCK as u64;
            let start = bytes.start / block * block;
            let segment_end = (bytes.start / SEGMENT_BYTES as u64 + 1) * SEGMENT_BYTES as u64;
            let end = (bytes.end + self.ahead as u64).min(segment_end).max(bytes.end).next_multiple_of(block);
            self.held = 0..0;
            backing.transfer(start, &mut self.bytes[..(end - start) as usize])?;
            (self.held, self.at, self.writes) = (start..end, 0, writes);
        }
        let skipped = (bytes.start - self.held.start) as usize;
        let length = (bytes.end - bytes.start) as usize;
        let record = self.at + skipped..self.at + skipped + length;
        (self.held.start, self.at) = (bytes.end, record.end);
        Ok(record)
    }
}

/// Room for a segment that is read back to be cleaned. All of its memory is taken when it is made.
pub struct CleanBuffer {
    buffer: ZeroedTable<u8>,
    /// Where the segment begins on the disk, how much was read, and up to where `next_record` has come.
    start: u64,
    length: usize,
    at: usize,
    /// The last one that `next_record` gave.
    record: Option<Record>,
}

impl CleanBuffer {
    /// Errors: [`crate::error::Error::System`] without memory.
    pub fn new() -> Result<CleanBuffer> {
        let buffer = ZeroedTable::new(SEGMENT_BYTES)?;
        buffer.populate(0..SEGMENT_BYTES)?;
        Ok(CleanBuffer { buffer, start: 0, length: 0, at: 0, record: None })
    }

    /// Reads all that was written to the segment, and waits for the disk.
    ///
    /// Errors: the disk's; InvalidData if a record's header is damaged, so that those behind it cannot be found. There
    /// are no records then: such a segment is given back ([`Backing::release`]) as it is, since moving some of it would
    /// cost room, and gain none.
    pub fn read(&mut self, backing: &Backing, victim: &Victim) -> io::Result<()> {
        let written = backing.change(|table| table.written_bytes(victim.segment)) as usize;
        (self.start, self.length, self.at, self.record) = (Backing::offset_of(victim.segment), 0, 0, None);
        let read = backing.disk.read(self.start, &mut self.buffer[..written.next_multiple_of(BLOCK)]);
        let whole =
            read.and_then(|()| match records_of(&self.buffer[..written], self.start).all(|record| record.is_ok()) {
                true => Ok(()),
                false => Err(io::ErrorKind::InvalidData.into()),
            });
        whole.map(|()| self.length = written)
    }

    /// The next record, as its header says, which nobody has verified. None: that was the last one.
    pub fn next_record(&mut self) -> Option<Record> {
        let mut records = Records { bytes: &self.buffer[..self.length], start: self.start, at: self.at };
        // Since it was read whole there are no errors.
        self.record = records.next().and_then(|record| record.ok());
        self.at = records.at;
        self.record
    }

    /// The object of the record that `next_record` has just given, decrypted; asked for at most once. None if it is not
    /// what was written: that may be this reading's fault, so that [`Backing::read`] has the last word.
    pub fn object(&mut self, backing: &Backing) -> Option<&[u8]> {
        let record = self.record.take()?;
        let Range { start, end } = record.location.bytes();
        let bytes = &mut self.buffer[(start - self.start) as usize..(end - self.start) as usize];
        backing.cipher.open(bytes, record.slot, record.generation, record.location)
    }
}
