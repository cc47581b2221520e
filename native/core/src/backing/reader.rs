//! Reading back: one record, or a whole segment to be cleaned.

use super::record::Damaged;
use super::{Backing, Record, Victim};
use crate::error::Result;
use std::io;

/// Room for the blocks of one record, page-aligned, touched.
pub struct ReadBuffer {}

impl ReadBuffer {
    pub fn new() -> Result<ReadBuffer> {
        todo!()
    }
}

/// Room for a segment, page-aligned, touched.
pub struct CleanBuffer {}

impl CleanBuffer {
    pub fn new() -> Result<CleanBuffer> {
        todo!()
    }

    /// Reads all that was written to the segment. Errors: those of the disk; there is nothing in the buffer then.
    pub fn read(&mut self, backing: &Backing, victim: &Victim) -> io::Result<()> {
        let _ = (backing, victim);
        todo!()
    }

    /// The next record, as its header says, which nobody has verified. None: that was the last one. After an error there
    /// are no more.
    pub fn next_record(&mut self) -> Option<std::result::Result<Record, Damaged>> {
        todo!()
    }

    /// The object of the record that `next_record` has just given, decrypted; at most once. None if it does not authenticate.
    pub fn object(&mut self, backing: &Backing) -> Option<&[u8]> {
        let _ = backing;
        todo!()
    }
}
