//! Stands in for `memory.rs` under a model checker, whose atomics are not valid when zero, or Miri: a table is a box.

use crate::error::{Error, Result};
use std::ffi::CStr;
use std::ops::{Deref, DerefMut, Range};
use std::os::fd::{BorrowedFd, OwnedFd};

#[derive(Clone, Copy)]
pub enum Backing<'a> {
    Private,
    File(BorrowedFd<'a>),
    ReadOnly(BorrowedFd<'a>),
}

pub fn memory_file(_name: &CStr, _length: u64) -> Result<OwnedFd> {
    Err(Error::Invalid("a model has no files".into()))
}

pub fn length_of(_file: BorrowedFd<'_>) -> Result<u64> {
    Ok(0)
}

/// # Safety
/// As of the real one.
pub unsafe trait Zeroable: Default {}

// SAFETY: as of the real one.
unsafe impl Zeroable for u8 {}

pub struct ZeroedTable<T: Zeroable>(Box<[T]>);

impl<T: Zeroable> ZeroedTable<T> {
    pub fn new(length: usize) -> Result<Self> {
        Ok(ZeroedTable((0..length).map(|_| T::default()).collect()))
    }

    pub fn populate(&self, _range: Range<usize>) -> Result<()> {
        Ok(())
    }

    pub fn over(length: usize, _what: Backing<'_>) -> Result<Self> {
        Self::new(length)
    }
}

impl<T: Zeroable> Deref for ZeroedTable<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Zeroable> DerefMut for ZeroedTable<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}
