//! Records: an object on the disk, and where it lies.

/// Where a record lies: 9 bits of length and 36 bits of start, both in units of 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskLocation(u64);

impl DiskLocation {
    /// 45 bits.
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// Of any bits: whether there is such a record shows when it is read.
    pub fn from_bits(bits: u64) -> DiskLocation {
        DiskLocation(bits & ((1 << 45) - 1))
    }
}

/// A record of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub slot: u32,
    /// Of the slot word that names it.
    pub generation: u16,
    pub location: DiskLocation,
}

/// The bytes here are no record, nor is there any way to know where the next one begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged;
