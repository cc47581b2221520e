//! Records: an object on the disk, or a cluster of pages, and where it lies.
//!
//! ```text
//! 0..4    index of the slot that the object belongs to; of a cluster, the first
//! 4..6    length of the object
//! 6..8    generation of the slot word that names the record; or that it is a cluster (`cluster.rs`)
//! 8..16   nonce
//! 16..    the object (its own header and payload), encrypted
//! then    16 bytes: tag, or checksum
//! then    zeros up to the next multiple of 16
//! ```
//!
//! The header is readable, but vouched for by the tag, as is the location (`cipher.rs`).

use super::cluster::{CLUSTER, GENERATIONS};
use crate::object::HEADER_SIZE;
use crate::page::{CLUSTER_PAGES, PAGE_SIZE};
use crate::sync::MODEL;
use std::ops::Range;

pub const RECORD_HEADER: usize = 16;
pub const TAG: usize = 16;
/// Of locations, lengths and starts of records.
pub const UNIT: usize = 16;
/// A page that does not get smaller.
pub const MAX_OBJECT: usize = HEADER_SIZE + PAGE_SIZE;
const MAX_SINGLE: usize = record_bytes(MAX_OBJECT);
/// A cluster's, which a slot word can still say the length of. The segments of models have no room for that.
pub const MAX_RECORD: usize = if MODEL { MAX_SINGLE } else { ((1 << LENGTH_BITS) - 1) * UNIT };
/// What a cluster's record has room for, generations included.
pub const MAX_CLUSTER: usize = MAX_RECORD - RECORD_HEADER - TAG;

const START_BITS: u32 = 36;
const LENGTH_BITS: u32 = 9;
const LOCATION_MASK: u64 = (1 << (START_BITS + LENGTH_BITS)) - 1;
const IS_CLUSTER: u64 = 1 << (START_BITS + LENGTH_BITS);
/// A disk is used up to here: 1 TiB.
pub const MAX_DISK_BYTES: u64 = (UNIT as u64) << START_BITS;

/// What a record with an object of this length takes.
pub const fn record_bytes(object: usize) -> usize {
    (RECORD_HEADER + object + TAG).next_multiple_of(UNIT)
}

/// The longest object that the record of this generation, or of a cluster, may have.
pub fn max_object(generation: u16) -> usize {
    if generation == CLUSTER {
        MAX_CLUSTER
    } else {
        MAX_OBJECT
    }
}

/// Where a record lies, and how long it is: 36 and 9 bits, in units of 16 bytes. And whether it is a cluster: slot words
/// say that by their state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskLocation(u64);

impl DiskLocation {
    pub(super) fn new(bytes: Range<u64>) -> DiskLocation {
        let (start, length) = (bytes.start / UNIT as u64, (bytes.end - bytes.start) / UNIT as u64);
        debug_assert!(bytes.end <= MAX_DISK_BYTES && length >> LENGTH_BITS == 0, "no record: {bytes:?}");
        DiskLocation(length << START_BITS | start)
    }

    /// 45 bits.
    pub fn to_bits(self) -> u64 {
        self.0 & LOCATION_MASK
    }

    /// The same, of a cluster.
    pub fn of_cluster(self) -> DiskLocation {
        DiskLocation(self.0 | IS_CLUSTER)
    }

    /// Whether other slots may name the record too, each a page of it.
    pub fn is_cluster(self) -> bool {
        self.0 & IS_CLUSTER != 0
    }

    /// Bytes of the record that one slot word stands for: of a cluster a quarter, exactly.
    pub(super) fn share(self) -> u32 {
        let Range { start, end } = self.bytes();
        (end - start) as u32 / if self.is_cluster() { CLUSTER_PAGES as u32 } else { 1 }
    }

    /// What the share weighs when segments are to be cleaned: a page that has to leave its cluster takes about half as much
    /// again by itself (MEASURED.md, "Clusters on the disk").
    pub(super) fn weight(self) -> u32 {
        let share = self.share();
        share + if self.is_cluster() { share / 2 } else { 0 }
    }

    /// Of any bits, as a damaged slot word may have them: whether there is such a record shows when it is read.
    pub fn from_bits(bits: u64) -> DiskLocation {
        DiskLocation(bits & LOCATION_MASK)
    }

    /// Of the disk.
    pub(crate) fn bytes(self) -> Range<u64> {
        let start = (self.0 & ((1 << START_BITS) - 1)) * UNIT as u64;
        start..start + (self.to_bits() >> START_BITS) * UNIT as u64
    }
}

/// A record of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Of a cluster, the first.
    pub slot: u32,
    /// Of the slot word that names it; or [`CLUSTER`].
    pub generation: u16,
    pub location: DiskLocation,
}

/// What stands in a record's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub slot: u32,
    pub object_bytes: u16,
    pub generation: u16,
    pub nonce: u64,
}

impl Header {
    pub fn to_bytes(self) -> [u8; RECORD_HEADER] {
        let mut bytes = [0; RECORD_HEADER];
        bytes[..4].copy_from_slice(&self.slot.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.object_bytes.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.generation.to_le_bytes());
        bytes[8..].copy_from_slice(&self.nonce.to_le_bytes());
        bytes
    }

    /// None if this is too short, or not the header of a record that would end inside `record`.
    pub fn of(record: &[u8]) -> Option<Header> {
        let (header, _) = record.split_first_chunk::<RECORD_HEADER>()?;
        let [a, b, c, d, e, f, g, h, nonce @ ..] = *header;
        let header = Header {
            slot: u32::from_le_bytes([a, b, c, d]),
            object_bytes: u16::from_le_bytes([e, f]),
            generation: u16::from_le_bytes([g, h]),
            nonce: u64::from_le_bytes(nonce),
        };
        let object = usize::from(header.object_bytes);
        let least = if header.generation == CLUSTER { GENERATIONS + 1 } else { 1 };
        let possible = (least..=max_object(header.generation)).contains(&object);
        (possible && record_bytes(object) <= record.len()).then_some(header)
    }
}

/// The bytes here are no record, and there is no way to know where the next one begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged;

/// The records of a segment as it was read back, one behind the other, as their headers say, which nobody has verified.
/// Ends with the bytes, or behind an error.
pub struct Records<'a> {
    pub(super) bytes: &'a [u8],
    /// Where on the disk `bytes` begin, and where in `bytes` the next record does.
    pub(super) start: u64,
    pub(super) at: usize,
}

/// The records of what was written at `start` of the disk.
pub fn records_of(bytes: &[u8], start: u64) -> Records<'_> {
    Records { bytes, start, at: 0 }
}

impl Iterator for Records<'_> {
    type Item = Result<Record, Damaged>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.bytes.get(self.at..).filter(|rest| !rest.is_empty())?;
        let Some(header) = Header::of(rest) else {
            self.at = self.bytes.len();
            return Some(Err(Damaged));
        };
        let (start, length) = (self.start + self.at as u64, record_bytes(usize::from(header.object_bytes)));
        self.at += length;
        let location = DiskLocation::new(start..start + length as u64);
        let location = if header.generation == CLUSTER { location.of_cluster() } else { location };
        Some(Ok(Record { slot: header.slot, generation: header.generation, location }))
    }
}
