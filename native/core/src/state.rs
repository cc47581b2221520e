//! The state file: what must outlive the process, addressed by index and never by pointer.
//!
//! ```text
//! page 0      header: magic, version, sizes, checksum; key and next nonce of the backing disk
//! then        slot words, 8 bytes per page of the swap file
//! at 2 MiB·n  the arena: objects, each with its own header
//! ```
//!
//! It is a memory file; everything else (free lists, fullness, counts, locks) is private memory that can be rebuilt
//! from the slot words. The file is sparse: only pages that were touched take memory.

use crate::error::Result;
use crate::memory::{memory_file, punch, set_length, status_of, Backing, Mapping};
use crate::page::PAGE_SIZE;
use crate::sync::AtomicU64;
use std::os::fd::{AsFd, OwnedFd};
use xxhash_rust::xxh3::xxh3_64;

const MAGIC: [u8; 8] = *b"zswapd\0\x01";
const VERSION: u32 = 2;

/// The arena ends at 1 TiB: a location in a slot word counts 8 bytes, and has 45 bits.
pub const MAX_ARENA_PAGES: u64 = 1 << 28;

/// Where the header has the [`CipherState`]: behind what the checksum covers, since it changes.
const CIPHER_AT: usize = 64;

/// What the cipher of the backing disk must not forget as long as the state lives.
#[derive(Default)]
#[repr(C)]
pub struct CipherState {
    /// The next nonce. Invariant: taken from here before it is used, so that none is used twice, whoever dies between.
    pub next_nonce: AtomicU64,
    /// All zero: there is none.
    pub key: [AtomicU64; 4],
}

/// Regions of the arena are huge pages, if the system makes them so.
const ARENA_ALIGNMENT: usize = 2 << 20;

/// The mapped state file.
pub struct State {
    // Declared before `file`: unmapped before it is closed.
    mapping: Mapping,
    file: OwnedFd,
    slots: u64,
    arena_pages: u32,
    arena_start: usize,
}

impl State {
    /// Makes an empty state in `file` (zeroed, of any length) for `slots` pages of swap and `arena_pages` pages of
    /// objects; without a file, in a new memory file.
    ///
    /// Takes address space, but memory only as it is touched. Errors: [`Error::System`].
    pub fn create(slots: u64, arena_pages: u32, file: Option<OwnedFd>) -> Result<State> {
        let words_bytes = (slots as usize * size_of::<AtomicU64>()).next_multiple_of(PAGE_SIZE);
        let arena_start = (PAGE_SIZE + words_bytes).next_multiple_of(ARENA_ALIGNMENT);
        let length = arena_start + arena_pages as usize * PAGE_SIZE;
        let file = match file {
            Some(file) => set_length(file.as_fd(), length as u64).map(|()| file),
            None => memory_file(c"zswapd-state", length as u64),
        }?;
        let mapping = Mapping::new(length, Backing::File(file.as_fd()))?;
        let state = State { mapping, file, slots, arena_pages, arena_start };
        state.write_header();
        Ok(state)
    }

    fn write_header(&self) {
        let mut header = [0u8; 40];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        header[16..24].copy_from_slice(&self.slots.to_le_bytes());
        header[24..28].copy_from_slice(&self.arena_pages.to_le_bytes());
        let checksum = xxh3_64(&header[..32]);
        header[32..].copy_from_slice(&checksum.to_le_bytes());
        // SAFETY: page 0 of the mapping is the header's, and nobody else has the mapping yet.
        unsafe { std::ptr::copy_nonoverlapping(header.as_ptr(), self.mapping.start().as_ptr(), header.len()) };
    }

    pub fn slots(&self) -> u64 {
        self.slots
    }

    pub fn arena_pages(&self) -> u32 {
        self.arena_pages
    }

    pub fn cipher(&self) -> &CipherState {
        // SAFETY: page 0 of the mapping is the header's, which is shorter, and aligned; every bit pattern is valid, and
        // it is only ever accessed as atomics.
        unsafe { &*self.mapping.start().as_ptr().add(CIPHER_AT).cast() }
    }

    /// The slot words, one per page of the swap file.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: pages 1.. of the mapping hold `slots` words, 8-aligned; every bit pattern is a valid u64, and they
        // are only ever accessed as atomics.
        unsafe { std::slice::from_raw_parts(self.mapping.start().as_ptr().add(PAGE_SIZE).cast(), self.slots as usize) }
    }

    /// Bytes of memory that the file takes now: header, touched slot words and resident arena pages.
    pub fn resident_bytes(&self) -> u64 {
        status_of(self.file.as_fd()).map_or(0, |status| status.st_blocks as u64 * 512)
    }

    /// Bytes of the arena, to be read: valid as long as the state. Panics if they are outside.
    pub fn bytes(&self, offset: usize, length: usize) -> *const [u8] {
        self.bytes_mut(offset, length)
    }

    /// Bytes of the arena, to be written: see [`State::bytes`].
    pub fn bytes_mut(&self, offset: usize, length: usize) -> *mut [u8] {
        let end = self.arena_pages as usize * PAGE_SIZE;
        assert!(offset < end && length <= end - offset, "{length} bytes at {offset} are not inside the arena");
        // SAFETY: the mapping reaches `arena_pages` pages beyond `arena_start`.
        let start = unsafe { self.mapping.start().as_ptr().add(self.arena_start + offset) };
        std::ptr::slice_from_raw_parts_mut(start, length)
    }

    /// Takes memory for arena pages from the system and maps it: touching them then faults no more.
    ///
    /// May wait for memory. Errors: [`Error::System`], with some of the pages taken perhaps.
    pub fn populate(&self, page: u32, pages: u32) -> Result<()> {
        let offset = self.arena_start + page as usize * PAGE_SIZE;
        self.mapping.populate(offset..offset + pages as usize * PAGE_SIZE)
    }

    /// Takes memory for all slot words, as [`State::populate`] does for arena pages.
    pub fn populate_words(&self) -> Result<()> {
        self.mapping.populate(0..PAGE_SIZE + self.slots as usize * size_of::<AtomicU64>())
    }

    /// Gives the memory of arena pages back to the system; they read zeros afterwards.
    ///
    /// Errors: [`Error::System`]; the pages then stay resident, with their contents.
    pub fn punch(&self, page: u32, pages: u32) -> Result<()> {
        let offset = self.arena_start + page as usize * PAGE_SIZE;
        punch(self.file.as_fd(), offset..offset + pages as usize * PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn punched_pages_read_zeros() {
        let state = State::create(1, 512, None).expect("state");
        let page = state.bytes_mut(5 * PAGE_SIZE, PAGE_SIZE);
        // SAFETY: no one else uses the page.
        unsafe { (*page).fill(7) };
        state.punch(5, 1).expect("punched");
        // SAFETY: as above.
        assert_eq!(unsafe { &*page }, [0; PAGE_SIZE]);
    }
}
