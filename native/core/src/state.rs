//! The state file: what must outlive the process, addressed by index and never by pointer.
//!
//! ```text
//! page 0      header: magic, version, sizes, checksum; key and next nonce of the backing disk; settings; the session; which
//!             dictionaries there are
//! then        slot words, 8 bytes per page of the swap file, and for each page that may be shared
//! then        the page map, 2 bytes per page of the arena (`pool/page_map.rs`)
//! then        tables that are made anew by whoever opens the state; of them, the ages of pages are kept
//! then        dictionaries (`dictionaries.rs`)
//! at 2 MiB·n  the arena: objects, each with its own header
//! ```
//!
//! It is a memory file; everything else (free lists, fullness, counts, locks) is rebuilt from the slot words and the page
//! map. The large tables for that lie in the file too, only so that a successor finds memory for them when the machine has
//! none: what stands there is not looked at. The file is sparse: only pages that were touched take memory.
//!
//! Numbers are in the machine's own order of bytes: a state does not leave its machine.

mod shape;

use crate::dictionaries::{Header, PLACES};
use crate::error::{Error, Result};
use crate::memory::{length_of, memory_file, punch, set_length, status_of, Backing, Mapping, Zeroable, ZeroedTable};
use crate::page::PAGE_SIZE;
use crate::session::{Session, Settings};
use crate::sync::AtomicU64;
use shape::{Shape, HEADER_BYTES};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU16;

/// The arena ends at 1 TiB: a location in a slot word counts 8 bytes, and has 45 bits.
pub const MAX_ARENA_PAGES: u64 = 1 << 28;

/// Where page 0 has what changes, behind what the checksum covers.
const CIPHER_AT: usize = 64;
const SETTINGS_AT: usize = 256;
const SESSION_AT: usize = 512;
const DICTIONARIES_AT: usize = 1024;
const _: () = assert!(HEADER_BYTES <= CIPHER_AT && CIPHER_AT + size_of::<CipherState>() <= SETTINGS_AT);
const _: () = assert!(SETTINGS_AT + size_of::<Settings>() <= SESSION_AT);
const _: () = assert!(SESSION_AT + size_of::<Session>() <= DICTIONARIES_AT);
const _: () = assert!(DICTIONARIES_AT + size_of::<[Header; PLACES]>() <= PAGE_SIZE);

/// What the cipher of the backing disk must not forget as long as the state lives.
#[derive(Default)]
#[repr(C)]
pub struct CipherState {
    /// The next nonce. Invariant: taken from here before it is used, so that none is used twice, whoever dies between.
    pub next_nonce: AtomicU64,
    /// All zero: there is none.
    pub key: [AtomicU64; 4],
}

/// The mapped state file.
pub struct State {
    // Declared before `file`: unmapped before it is closed.
    mapping: Mapping,
    file: OwnedFd,
    shape: Shape,
    /// Another process has made it.
    found: bool,
}

/// A table that lies in the state file, but is none of what outlives a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Of the pages of the arena, up to 24 bytes each.
    Descriptors,
    /// The list of cold pages: 4 bytes for each slot, and 8 bytes, which mean nothing until they are written.
    Notes,
    Links,
    /// A byte for each slot (`ages.rs`). Whatever stands there is valid, and a successor goes on with it.
    Ages,
    /// 4 bytes for each slot for a shared page (`references.rs`).
    References,
}

impl State {
    /// Makes an empty state in `file` (zeroed, of any length) for `slots` pages of swap and `arena_pages` pages of
    /// objects; without a file, in a new memory file. `geometry` stands for the way in which objects are laid out.
    ///
    /// Takes address space, but memory only as it is touched. Errors: [`Error::System`].
    pub fn create(slots: u64, arena_pages: u32, geometry: u64, file: Option<OwnedFd>) -> Result<State> {
        let shape = Shape { slots, arena_pages, geometry };
        let length = shape.length();
        let file = match file {
            Some(file) => set_length(file.as_fd(), length as u64).map(|()| file),
            None => memory_file(c"zswapd-state", length as u64),
        }?;
        let state = State { mapping: Mapping::new(length, Backing::File(file.as_fd()))?, file, shape, found: false };
        let header = shape.to_header();
        // SAFETY: page 0 of the mapping is the header's, and nobody else has the mapping yet.
        unsafe { std::ptr::copy_nonoverlapping(header.as_ptr(), state.mapping.start().as_ptr(), header.len()) };
        Ok(state)
    }

    /// Maps a state that another process has left behind. Changes nothing, and takes no memory.
    ///
    /// Errors: [`Error::Invalid`], which says what is wrong, if it is none, of another version, for objects that are laid
    /// out in another way (than `geometry` says of so many slots), damaged in its header, or not as long as it should be;
    /// [`Error::System`].
    pub fn open(file: OwnedFd, geometry: impl FnOnce(u64) -> u64) -> Result<State> {
        let refused = |what: String| Error::Invalid(format!("the state file cannot be recovered: {what}"));
        let mut header = [0; HEADER_BYTES];
        // SAFETY: `header` is as long as it is said to be.
        let read = unsafe { libc::pread(file.as_raw_fd(), header.as_mut_ptr().cast(), HEADER_BYTES, 0) };
        match usize::try_from(read) {
            Ok(HEADER_BYTES) => {}
            Ok(_) => return Err(refused("it ends in its header".into())),
            Err(_) => return Err(Error::last_os("cannot read the state file")),
        }
        let shape = Shape::of_header(&header).map_err(refused)?;
        if shape.geometry != geometry(shape.slots) {
            return Err(refused("its pages are laid out by another allocator, or in another way".into()));
        }
        let (length, expected) = (length_of(file.as_fd())?, shape.length() as u64);
        if length != expected {
            return Err(refused(format!("it has {length} bytes, and should have {expected}")));
        }
        let mapping = Mapping::new(shape.length(), Backing::File(file.as_fd()))?;
        Ok(State { mapping, file, shape, found: true })
    }

    pub fn slots(&self) -> u64 {
        self.shape.slots
    }

    /// Those of the swap file, and behind them those for pages that several of them share.
    pub fn all_slots(&self) -> u64 {
        self.shape.all_slots()
    }

    pub fn arena_pages(&self) -> u32 {
        self.shape.arena_pages
    }

    pub fn cipher(&self) -> &CipherState {
        // SAFETY: page 0 of the mapping is the header's, which is shorter, and aligned; every bit pattern is valid, and
        // it is only ever accessed as atomics.
        unsafe { &*self.mapping.start().as_ptr().add(CIPHER_AT).cast() }
    }

    pub fn settings(&self) -> &Settings {
        // SAFETY: as above.
        unsafe { &*self.mapping.start().as_ptr().add(SETTINGS_AT).cast() }
    }

    pub fn session(&self) -> &Session {
        // SAFETY: as above.
        unsafe { &*self.mapping.start().as_ptr().add(SESSION_AT).cast() }
    }

    /// The page map, one entry per page of the arena.
    pub fn page_map(&self) -> &[AtomicU16] {
        // SAFETY: from there on the mapping holds as many entries, page-aligned; every bit pattern is a valid u16, and
        // they are only ever accessed as atomics.
        unsafe {
            let start = self.mapping.start().as_ptr().add(self.shape.page_map_start());
            std::slice::from_raw_parts(start.cast(), self.shape.arena_pages as usize)
        }
    }

    /// The slot words, one for each of all slots.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: pages 1.. of the mapping hold so many words, 8-aligned; every bit pattern is a valid u64, and they
        // are only ever accessed as atomics.
        unsafe {
            let start = self.mapping.start().as_ptr().add(PAGE_SIZE).cast();
            std::slice::from_raw_parts(start, self.shape.all_slots() as usize)
        }
    }

    pub fn dictionary_headers(&self) -> &[Header; PLACES] {
        // SAFETY: as of the others of page 0.
        unsafe { &*self.mapping.start().as_ptr().add(DICTIONARIES_AT).cast() }
    }

    /// Where a dictionary lies: so many bytes ([`crate::dictionaries::PLACE_BYTES`]), page-aligned, as long as the state.
    pub fn dictionary(&self, place: usize) -> NonNull<u8> {
        // SAFETY: inside the mapping.
        unsafe { self.mapping.start().add(self.shape.dictionary(place).start) }
    }

    /// Takes memory for a part of a dictionary's place, as [`State::populate`] does for arena pages.
    pub fn populate_dictionary(&self, place: usize, part: Range<usize>) -> Result<()> {
        let start = self.shape.dictionary(place).start;
        self.mapping.populate(start + part.start..start + part.end)
    }

    /// Gives the memory of a dictionary back to the system, if that can be done.
    pub fn forget_dictionary(&self, place: usize) {
        let _kept_for_the_next_one = punch(self.file.as_fd(), self.shape.dictionary(place));
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
        let end = self.shape.arena_pages as usize * PAGE_SIZE;
        assert!(offset < end && length <= end - offset, "{length} bytes at {offset} are not inside the arena");
        // SAFETY: the mapping reaches `arena_pages` pages beyond `arena_start`.
        let start = unsafe { self.mapping.start().as_ptr().add(self.shape.arena_start() + offset) };
        std::ptr::slice_from_raw_parts_mut(start, length)
    }

    /// Takes memory for arena pages from the system and maps it, and for their part of the page map: touching them then
    /// faults no more.
    ///
    /// May wait for memory. Errors: [`Error::System`], with some of the pages taken perhaps.
    pub fn populate(&self, page: u32, pages: u32) -> Result<()> {
        self.mapping.populate(self.page_map_range(page, pages))?;
        self.mapping.populate(self.arena_range(page, pages))
    }

    /// As [`State::populate`], for arena pages that all have memory already: only the mapping takes some.
    pub fn map_resident(&self, page: u32, pages: u32) -> Result<()> {
        self.mapping.populate(self.page_map_range(page, pages))?;
        self.mapping.map_resident(self.arena_range(page, pages))
    }

    fn arena_range(&self, page: u32, pages: u32) -> Range<usize> {
        let start = self.shape.arena_start() + page as usize * PAGE_SIZE;
        start..start + pages as usize * PAGE_SIZE
    }

    fn page_map_range(&self, page: u32, pages: u32) -> Range<usize> {
        let start = self.shape.page_map_start() + page as usize * size_of::<AtomicU16>();
        start..start + pages as usize * size_of::<AtomicU16>()
    }

    /// One of the tables, zeroed. In memory that the process before has taken for it, and else where it is touched. To be
    /// made once.
    ///
    /// Errors: [`Error::System`].
    pub fn table<T: Zeroable>(&self, table: Table) -> Result<ZeroedTable<T>> {
        let (area, elements) = self.shape.area(table);
        assert!(elements * size_of::<T>() <= area.len(), "{table:?} with elements that are too long");
        if self.found && !matches!(table, Table::Links | Table::Ages) {
            self.clear(area.clone())?;
        }
        ZeroedTable::over(elements, Backing::Part(self.file.as_fd(), area.start as u64))
    }

    /// Zeroes a part of the file, where it has memory.
    fn clear(&self, area: Range<usize>) -> Result<()> {
        let mut from = area.start as u64;
        while let Some(data) = self.next_data(from)?.filter(|data| data.start < area.end as u64) {
            let bytes = data.start as usize..area.end.min(data.end as usize);
            self.mapping.map_resident(bytes.clone())?;
            // SAFETY: inside the mapping, and nobody looks there yet.
            unsafe { self.mapping.start().as_ptr().add(bytes.start).write_bytes(0, bytes.len()) };
            from = bytes.end as u64;
        }
        Ok(())
    }

    /// The next pages of the arena, from `page` on, that have memory, up to the first that has none.
    ///
    /// Errors: [`Error::System`].
    pub fn next_resident(&self, page: u32) -> Result<Option<Range<u32>>> {
        let start = self.shape.arena_start() as u64;
        let page_of = |offset: u64| ((offset - start) / PAGE_SIZE as u64) as u32;
        let data = self.next_data(start + u64::from(page) * PAGE_SIZE as u64)?;
        Ok(data.map(|data| page_of(data.start)..page_of(data.end)))
    }

    /// The next bytes of the file, from an offset on, that have memory, up to the first that have none.
    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        let seek = |from: u64, whence| {
            // SAFETY: plain system call; the file's position is used for nothing else.
            let found = unsafe { libc::lseek(self.file.as_raw_fd(), from as libc::off_t, whence) };
            match u64::try_from(found) {
                Ok(found) => Ok(Some(found)),
                Err(_) if std::io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO) => Ok(None),
                Err(_) => Err(Error::last_os("cannot find out where the state file has memory (lseek)")),
            }
        };
        let Some(data) = seek(from, libc::SEEK_DATA)? else { return Ok(None) };
        // There is a hole at the end of every file.
        let hole = seek(data, libc::SEEK_HOLE)?.unwrap_or(self.shape.length() as u64);
        Ok(Some(data..hole))
    }

    /// Takes memory for all slot words, as [`State::populate`] does for arena pages.
    pub fn populate_words(&self) -> Result<()> {
        self.mapping.populate(0..PAGE_SIZE + self.shape.all_slots() as usize * size_of::<AtomicU64>())
    }

    /// Gives the memory of arena pages back to the system; they read zeros afterwards.
    ///
    /// Errors: [`Error::System`]; the pages then stay resident, with their contents.
    pub fn punch(&self, page: u32, pages: u32) -> Result<()> {
        let Range { start, end } = self.arena_range(page, pages);
        punch(self.file.as_fd(), start..end)
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;

    #[test]
    fn punched_pages_read_zeros() {
        let state = State::create(1, 512, 0, None).expect("state");
        let page = state.bytes_mut(5 * PAGE_SIZE, PAGE_SIZE);
        // SAFETY: no one else uses the page.
        unsafe { (*page).fill(7) };
        state.punch(5, 1).expect("punched");
        // SAFETY: as above.
        assert_eq!(unsafe { &*page }, [0; PAGE_SIZE]);
    }
}
