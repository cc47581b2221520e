//! Memory mappings: of the state file, and of private tables that are as large as the arena but sparse.

use crate::error::{Error, Result};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

/// A readable and writable mapping, unmapped when dropped. Memory is taken page by page, on first touch.
pub struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping is plain memory that belongs to the process; no thread owns it.
unsafe impl Send for Mapping {}
// SAFETY: `Mapping` itself only gives out its address; who dereferences it answers for the sharing.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes (a positive multiple of the page size), shared from `file`, else private and zeroed.
    pub fn new(length: usize, file: Option<BorrowedFd<'_>>) -> Result<Mapping> {
        let (flags, fd) = match file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_NORESERVE, fd, 0)
        };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED.cast() => Ok(Mapping { start, length }),
            _ => Err(Error::last_os("cannot map memory for the pool")),
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

/// A type whose value with all bytes zero is valid.
///
/// # Safety
/// All-zero bytes must be a valid value of the type, and it must need no drop.
pub unsafe trait Zeroable {}

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
        let bytes = (length * size_of::<T>()).max(1);
        Ok(ZeroedTable { mapping: Mapping::new(bytes, None)?, length, elements: PhantomData })
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
