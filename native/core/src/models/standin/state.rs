//! Stands in for `state.rs` under a model checker or Miri: no file, the slot words are the checker's atomics, and each access
//! to the bytes of the arena is noted.

use crate::dictionaries::{Header, PLACES, PLACE_BYTES};
use crate::error::{Error, Result};
use crate::memory::{Zeroable, ZeroedTable};
use crate::page::PAGE_SIZE;
use crate::session::{Session, Settings};
use crate::sync::AtomicU64;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU16;

pub const MAX_ARENA_PAGES: u64 = 1 << 29;

/// Slots for shared pages.
const SHARED: u64 = 2;
/// Bytes that one shadow stands for: the smallest size class of a model. Classes of which two objects would share one
/// must not be used in models (2720 bytes).
const SHADOWED: usize = PAGE_SIZE / 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    Descriptors,
    Notes,
    Links,
    Ages,
    References,
}

#[derive(Default)]
pub struct CipherState {
    pub next_nonce: AtomicU64,
    pub key: [AtomicU64; 4],
}

pub struct State {
    cipher: CipherState,
    settings: Settings,
    session: Session,
    /// Not the checker's: only a successor reads it.
    page_map: Box<[AtomicU16]>,
    words: Box<[AtomicU64]>,
    arena: UnsafeCell<Box<[u8]>>,
    arena_pages: u32,
    shadows: Box<[Shadow]>,
    dictionary_headers: [Header; PLACES],
    /// Not the checker's either.
    dictionaries: UnsafeCell<Vec<u64>>,
}

// SAFETY: as of the real one: who dereferences the addresses that it gives out answers for the sharing.
unsafe impl Sync for State {}

impl State {
    pub fn create(slots: u64, arena_pages: u32, _geometry: u64, _file: Option<OwnedFd>) -> Result<State> {
        let bytes = arena_pages as usize * PAGE_SIZE;
        Ok(State {
            cipher: CipherState::default(),
            settings: Settings::default(),
            session: Session::default(),
            page_map: (0..arena_pages).map(|_| AtomicU16::default()).collect(),
            words: (0..slots + SHARED).map(|_| AtomicU64::default()).collect(),
            arena: UnsafeCell::new(vec![0; bytes].into()),
            arena_pages,
            shadows: (0..bytes / SHADOWED).map(|_| Shadow::default()).collect(),
            dictionary_headers: Default::default(),
            dictionaries: UnsafeCell::new(vec![0; PLACES * PLACE_BYTES / 8]),
        })
    }

    pub fn open(_file: OwnedFd, _geometry: impl FnOnce(u64) -> u64) -> Result<State> {
        Err(Error::Invalid("a model has no files".into()))
    }

    pub fn slots(&self) -> u64 {
        self.words.len() as u64 - SHARED
    }

    pub fn all_slots(&self) -> u64 {
        self.words.len() as u64
    }

    pub fn arena_pages(&self) -> u32 {
        self.arena_pages
    }

    pub fn cipher(&self) -> &CipherState {
        &self.cipher
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub fn session(&self) -> &Session {
        &self.session
    }

    pub fn page_map(&self) -> &[AtomicU16] {
        &self.page_map
    }

    pub fn table<T: Zeroable>(&self, table: Table) -> Result<ZeroedTable<T>> {
        ZeroedTable::new(if table == Table::Descriptors { self.page_map.len() } else { self.words.len() })
    }

    pub fn next_resident(&self, _page: u32) -> Result<Option<Range<u32>>> {
        Ok(None)
    }

    pub fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    pub fn dictionary_headers(&self) -> &[Header; PLACES] {
        &self.dictionary_headers
    }

    pub fn dictionary(&self, place: usize) -> NonNull<u8> {
        assert!(place < PLACES);
        // SAFETY: the vector is never replaced; its bytes are only ever reached through this address, and inside it.
        unsafe {
            let start = (*self.dictionaries.get()).as_mut_ptr().cast::<u8>();
            NonNull::new_unchecked(start.add(place * PLACE_BYTES))
        }
    }

    pub fn populate_dictionary(&self, _place: usize, _part: Range<usize>) -> Result<()> {
        Ok(())
    }

    pub fn forget_dictionary(&self, _place: usize) {}

    pub fn resident_bytes(&self) -> u64 {
        0
    }

    fn shadows(&self, offset: usize, length: usize) -> impl Iterator<Item = &Shadow> {
        self.shadows[offset / SHADOWED..(offset + length).div_ceil(SHADOWED)].iter()
    }

    fn address(&self, offset: usize, length: usize) -> *mut [u8] {
        assert!(offset + length <= self.arena_pages as usize * PAGE_SIZE);
        // SAFETY: the box is never replaced; its bytes are only ever reached through this address, and inside it.
        let start = unsafe { (&raw mut **self.arena.get()).cast::<u8>().add(offset) };
        std::ptr::slice_from_raw_parts_mut(start, length)
    }

    pub fn bytes(&self, offset: usize, length: usize) -> *const [u8] {
        self.shadows(offset, length).for_each(Shadow::read);
        self.address(offset, length)
    }

    pub fn bytes_mut(&self, offset: usize, length: usize) -> *mut [u8] {
        self.shadows(offset, length).for_each(Shadow::write);
        self.address(offset, length)
    }

    pub fn populate(&self, _page: u32, _pages: u32) -> Result<()> {
        Ok(())
    }

    pub fn map_resident(&self, _page: u32, _pages: u32) -> Result<()> {
        Ok(())
    }

    pub fn populate_words(&self) -> Result<()> {
        Ok(())
    }

    pub fn punch(&self, page: u32, pages: u32) -> Result<()> {
        let bytes = self.bytes_mut(page as usize * PAGE_SIZE, pages as usize * PAGE_SIZE);
        // SAFETY: as of the real one, the caller owns these pages; the checker has just seen whether that is so.
        unsafe { (*bytes).fill(0) };
        Ok(())
    }
}

/// Stands for plain memory, whose bytes a checker does not see.
#[derive(Default)]
pub struct Shadow(Access);

/// loom reports a write that is not ordered with every other access.
#[cfg(feature = "loom")]
type Access = loom::cell::UnsafeCell<()>;
/// shuttle lets others run before an access.
#[cfg(feature = "shuttle")]
type Access = crate::sync::AtomicU8;
/// Miri sees the bytes themselves.
#[cfg(miri)]
type Access = ();

// SAFETY: there is nothing in it; the checker looks after the order of accesses.
unsafe impl Sync for Shadow {}

impl Shadow {
    pub fn read(&self) {
        #[cfg(feature = "loom")]
        self.0.with(|_| ());
        #[cfg(feature = "shuttle")]
        self.0.load(crate::sync::Ordering::SeqCst);
    }

    pub fn write(&self) {
        #[cfg(feature = "loom")]
        self.0.with_mut(|_| ());
        #[cfg(feature = "shuttle")]
        self.0.store(0, crate::sync::Ordering::SeqCst);
    }
}
