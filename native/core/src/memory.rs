//! Memory mappings: of the state file, and of private tables that are as large as the arena but sparse.

use crate::error::{Error, Result};
use crate::page::PAGE_SIZE;
use std::ffi::CStr;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

/// What a mapping shows.
#[derive(Clone, Copy)]
pub enum Backing<'a> {
    /// Zeroed memory of this process alone.
    Private,
    /// A file, readable and writable.
    File(BorrowedFd<'a>),
    /// A file from an offset on, which is a multiple of the page size, readable and writable.
    Part(BorrowedFd<'a>, u64),
    /// A file that another process writes.
    ReadOnly(BorrowedFd<'a>),
}

/// A mapping, unmapped when dropped. Memory is taken page by page, on first touch.
pub struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping is plain memory that belongs to the process; no thread owns it.
unsafe impl Send for Mapping {}
// SAFETY: `Mapping` itself only gives out its address; who dereferences it answers for the sharing.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes (more than 0) of `what`.
    pub fn new(length: usize, what: Backing<'_>) -> Result<Mapping> {
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        let (protection, flags, fd, offset) = match what {
            Backing::Private => (writable, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
            Backing::File(file) => (writable, libc::MAP_SHARED, file.as_raw_fd(), 0),
            Backing::Part(file, offset) => (writable, libc::MAP_SHARED, file.as_raw_fd(), offset as libc::off_t),
            Backing::ReadOnly(file) => (libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0),
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags | libc::MAP_NORESERVE, fd, offset) };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED.cast() => Ok(Mapping { start, length }),
            _ => Err(Error::last_os("cannot map memory for the pool")),
        }
    }

    /// Takes memory for a range of bytes and maps it, writable: touching it then faults no more.
    ///
    /// May wait for memory. Errors: [`Error::System`], with some of the memory taken perhaps.
    pub fn populate(&self, range: Range<usize>) -> Result<()> {
        self.advise(range, libc::MADV_POPULATE_WRITE)
    }

    /// Maps a range of bytes of a file that has memory for all of them: as [`Mapping::populate`], but many pages at once,
    /// and only page tables take memory. A memory file's pages are writable as soon as they are mapped.
    pub fn map_resident(&self, range: Range<usize>) -> Result<()> {
        self.advise(range, libc::MADV_POPULATE_READ)
    }

    fn advise(&self, range: Range<usize>, advice: libc::c_int) -> Result<()> {
        let start = range.start / PAGE_SIZE * PAGE_SIZE;
        let end = range.end.min(self.length);
        if start >= end {
            return Ok(());
        }
        // SAFETY: the range lies inside the mapping; populating changes no contents.
        let result = unsafe { libc::madvise(self.start.as_ptr().add(start).cast(), end - start, advice) };
        match result {
            0 => Ok(()),
            _ => Err(Error::last_os("cannot take memory in advance (madvise)")),
        }
    }

    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub fn length(&self) -> usize {
        self.length
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by `new`, and whoever borrowed from it borrowed `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// A memory file (memfd) of `length` zeroed bytes; sparse.
pub fn memory_file(name: &CStr, length: u64) -> Result<OwnedFd> {
    // SAFETY: `name` is a C string; the result is checked below.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(Error::last_os("cannot make a memory file (memfd_create)"));
    }
    // SAFETY: `fd` was just returned by the kernel, and nobody else has it.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    set_length(file.as_fd(), length)?;
    Ok(file)
}

/// Sets the length of a file; what is added is a hole.
pub fn set_length(file: BorrowedFd<'_>, length: u64) -> Result<()> {
    // SAFETY: plain system call on an open descriptor.
    if unsafe { libc::ftruncate(file.as_raw_fd(), length as libc::off_t) } != 0 {
        return Err(Error::last_os("cannot size a memory file (ftruncate)"));
    }
    Ok(())
}

/// Gives the memory of a range of bytes of a memory file back to the system; it reads zeros afterwards.
///
/// Waits for nobody who is taking memory. Errors: [`Error::System`]; the range then stays resident, with its contents.
pub fn punch(file: BorrowedFd<'_>, range: Range<usize>) -> Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: plain system call on an open descriptor; what is mapped there stays mapped.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, range.start as _, range.len() as _) } {
        0 => Ok(()),
        _ => Err(Error::last_os("cannot give memory back (fallocate)")),
    }
}

/// The length of a file in bytes.
pub fn length_of(file: BorrowedFd<'_>) -> Result<u64> {
    Ok(status_of(file)?.st_size as u64)
}

/// fstat(2).
pub fn status_of(file: BorrowedFd<'_>) -> Result<libc::stat> {
    // SAFETY: all-zero is a valid stat.
    let mut status: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: writes to `status`, which is large enough.
    if unsafe { libc::fstat(file.as_raw_fd(), &mut status) } != 0 {
        return Err(Error::last_os("cannot examine a memory file (fstat)"));
    }
    Ok(status)
}

/// A type whose default value is all bytes zero.
///
/// # Safety
/// All-zero bytes must be a valid value of the type, the one that `Default` gives, and it must need no drop.
pub unsafe trait Zeroable: Default {}

// SAFETY: zero is a number.
unsafe impl Zeroable for u8 {}

/// A fixed array of zeroed elements that takes memory only where it is touched.
pub struct ZeroedTable<T: Zeroable> {
    mapping: Mapping,
    length: usize,
    elements: PhantomData<T>,
}

impl<T: Zeroable> ZeroedTable<T> {
    pub fn new(length: usize) -> Result<Self> {
        Self::over(length, Backing::Private)
    }

    /// Takes memory for a range of elements in advance: see [`Mapping::populate`].
    pub fn populate(&self, range: Range<usize>) -> Result<()> {
        self.mapping.populate(range.start * size_of::<T>()..range.end * size_of::<T>())
    }

    /// A table over `what`: a file must be that large, and hold zeros, or what was written as such a table, or anything
    /// where that is a valid element.
    pub fn over(length: usize, what: Backing<'_>) -> Result<Self> {
        let bytes = (length * size_of::<T>()).max(1);
        Ok(ZeroedTable { mapping: Mapping::new(bytes, what)?, length, elements: PhantomData })
    }
}

impl<T: Zeroable> Deref for ZeroedTable<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the mapping holds `length` elements, page-aligned, zeroed or written since as `T`.
        unsafe { std::slice::from_raw_parts(self.mapping.start().as_ptr().cast(), self.length) }
    }
}

impl<T: Zeroable> DerefMut for ZeroedTable<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.start().as_ptr().cast(), self.length) }
    }
}
