//! Reading back: one record, or a whole segment to be cleaned.

use super::record::{records_of, Record, Records, UNIT};
use super::{Backing, Victim, BLOCK, SEGMENT_BYTES};
use crate::error::Result;
use crate::memory::ZeroedTable;
use std::io;
use std::ops::Range;

/// The blocks that the longest record whose length fits into a slot word can touch.
const READ_BYTES: usize = (((1 << 9) - 1) * UNIT + BLOCK - UNIT).next_multiple_of(BLOCK);

/// Room for the blocks of one record. All of its memory is taken when it is made.
pub struct ReadBuffer(pub(super) ZeroedTable<u8>);

impl ReadBuffer {
    /// Errors: [`crate::error::Error::System`] without memory.
    pub fn new() -> Result<ReadBuffer> {
        let buffer = ZeroedTable::new(READ_BYTES)?;
        buffer.populate(0..READ_BYTES)?;
        Ok(ReadBuffer(buffer))
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
        match whole {
            Ok(()) => self.length = written,
            Err(_) => backing.metrics.disk_read_errors.add(1),
        }
        whole
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
