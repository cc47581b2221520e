//! Where the state file has what, and the part of its header that says so.

use super::{Table, MAX_ARENA_PAGES};
use crate::dictionaries::{PLACES, PLACE_BYTES};
use crate::page::PAGE_SIZE;
use crate::sync::AtomicU64;
use std::ops::Range;
use std::sync::atomic::AtomicU16;
use xxhash_rust::xxh3::xxh3_64;

const MAGIC: [u8; 8] = *b"zswapd\0\x01";
const VERSION: u32 = 5;
/// Of the part of the header that never changes, with its checksum at the end.
pub const HEADER_BYTES: usize = 48;
/// Regions of the arena are huge pages, if the system makes them so.
const ARENA_ALIGNMENT: usize = 2 << 20;

/// What a state is for. It never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub slots: u64,
    pub arena_pages: u32,
    /// Stands for how objects are laid out: whoever lays them out otherwise must leave them alone.
    pub geometry: u64,
}

impl Shape {
    pub fn page_map_start(self) -> usize {
        PAGE_SIZE + (self.slots as usize * size_of::<AtomicU64>()).next_multiple_of(PAGE_SIZE)
    }

    /// Where a table lies, in whole pages, and how many elements it has.
    pub fn area(self, table: Table) -> (Range<usize>, usize) {
        let (before, bytes, elements) = match table {
            Table::Descriptors => {
                let map_bytes = self.arena_pages as usize * size_of::<AtomicU16>();
                (self.page_map_start() + map_bytes, 24, self.arena_pages as usize)
            }
            Table::Notes => (self.area(Table::Descriptors).0.end, 4, self.slots as usize),
            Table::Links => (self.area(Table::Notes).0.end, 8, self.slots as usize),
            Table::Ages => (self.area(Table::Links).0.end, 1, self.slots as usize),
        };
        let start = before.next_multiple_of(PAGE_SIZE);
        (start..(start + elements * bytes).next_multiple_of(PAGE_SIZE), elements)
    }

    /// Of whole pages.
    pub fn dictionary(self, place: usize) -> Range<usize> {
        assert!(place < PLACES);
        let start = self.area(Table::Ages).0.end + place * PLACE_BYTES;
        start..start + PLACE_BYTES
    }

    pub fn arena_start(self) -> usize {
        self.dictionary(PLACES - 1).end.next_multiple_of(ARENA_ALIGNMENT)
    }

    /// Bytes of the file.
    pub fn length(self) -> usize {
        self.arena_start() + self.arena_pages as usize * PAGE_SIZE
    }

    pub fn to_header(self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_ne_bytes());
        header[12..16].copy_from_slice(&(PAGE_SIZE as u32).to_ne_bytes());
        header[16..24].copy_from_slice(&self.slots.to_ne_bytes());
        header[24..28].copy_from_slice(&self.arena_pages.to_ne_bytes());
        header[32..40].copy_from_slice(&self.geometry.to_ne_bytes());
        let checksum = xxh3_64(&header[..40]);
        header[40..].copy_from_slice(&checksum.to_ne_bytes());
        header
    }

    /// What a header says; or what is wrong with it.
    pub fn of_header(header: &[u8; HEADER_BYTES]) -> std::result::Result<Shape, String> {
        let u32_at = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let u64_at = |at: usize| std::array::from_fn(|n| header[at + n]);
        let u64_at = |at: usize| u64::from_ne_bytes(u64_at(at));
        // The magic and the version stand at the same place in every version; nothing else need.
        if header[..8] != MAGIC {
            return Err("it is none of zswapd's".into());
        }
        if u32_at(8) != VERSION {
            return Err(format!("it is of version {}, and this program knows version {VERSION}", u32_at(8)));
        }
        if u64_at(40) != xxh3_64(&header[..40]) {
            return Err("its header is damaged".into());
        }
        if u32_at(12) != PAGE_SIZE as u32 {
            return Err(format!("it is for pages of {} bytes", u32_at(12)));
        }
        let shape = Shape { slots: u64_at(16), arena_pages: u32_at(24), geometry: u64_at(32) };
        let possible = (1..=1 << 32).contains(&shape.slots) && u64::from(shape.arena_pages) <= MAX_ARENA_PAGES;
        possible.then_some(shape).ok_or_else(|| format!("it cannot be as large as it says: {shape:?}"))
    }
}
