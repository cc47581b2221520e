//! What a backing disk is to the rest.

use crate::sync::{Mutex, PoisonError};
use std::io;
use std::os::fd::OwnedFd;

/// A disk, or a file, read and written in whole blocks of 4 KiB. A transfer is whole, or an error.
pub trait Disk: Send + Sync {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()>;
}

impl<D: Disk + ?Sized> Disk for std::sync::Arc<D> {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        (**self).read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        (**self).write(offset, from)
    }
}

/// A block device or file opened with O_DIRECT, for reading and writing.
pub struct FileDisk(OwnedFd);

impl FileDisk {
    pub fn new(file: OwnedFd) -> FileDisk {
        FileDisk(file)
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> io::Result<u64> {
        todo!()
    }
}

impl Disk for FileDisk {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let _ = (offset, into, &self.0);
        todo!()
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let _ = (offset, from);
        todo!()
    }
}

/// Stands in for a disk in tests and models: what is written stays, what was not is zero.
#[cfg(any(test, debug_assertions))]
pub struct MemoryDisk(Mutex<Box<[u8]>>);

#[cfg(any(test, debug_assertions))]
impl MemoryDisk {
    pub fn new(bytes: usize) -> MemoryDisk {
        MemoryDisk(Mutex::new(vec![0; bytes].into()))
    }

    /// Gives its bytes to `change`: as another would find or damage them.
    pub fn with<R>(&self, change: impl FnOnce(&mut [u8]) -> R) -> R {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(any(test, debug_assertions))]
impl Disk for MemoryDisk {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let _ = (offset, into);
        todo!()
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let _ = (offset, from);
        todo!()
    }
}
