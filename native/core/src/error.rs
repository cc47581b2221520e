//! The one error type of the core, and its one mapping to errno.

use std::io;
use thiserror::Error;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, Error)]
pub enum Error {
    /// The pool is at its limit, or the arena has no room. The slot that was written reads EIO from now on.
    #[error("the pool is full")]
    PoolFull,
    /// No region of the arena that is backed by memory has room: the reserve is used up.
    #[error("the pool's reserve of memory is used up")]
    NoRegion,
    /// The slot's last store failed, or its stored bytes were found bad: it reads EIO until written or punched.
    #[error("page {slot} is lost: its last store failed or its stored bytes are bad")]
    Lost { slot: u32 },
    /// The stored bytes of the page do not match their checksum, or do not decode. The slot has become LOST.
    #[error("the stored bytes of page {slot} are corrupt")]
    Corrupt { slot: u32 },
    #[error("the range {offset}+{length} is outside the swap file of {size} bytes")]
    OutOfRange { offset: u64, length: u64, size: u64 },
    /// Others are at work where a teardown needs to be alone.
    #[error("{movers} are still moving objects of the pool")]
    Busy { movers: u32 },
    #[error("{0}")]
    Invalid(String),
    /// The system refused memory or a system call at start.
    #[error("{what}: {source}")]
    System { what: &'static str, source: io::Error },
}

impl Error {
    /// An [`Error::System`] from errno of the call that just failed.
    pub fn last_os(what: &'static str) -> Error {
        Error::System { what, source: io::Error::last_os_error() }
    }

    /// The errno that a caller of read(2), write(2) or fallocate(2) sees.
    pub fn errno(&self) -> i32 {
        match self {
            Error::PoolFull | Error::NoRegion => libc::ENOSPC,
            Error::Lost { .. } | Error::Corrupt { .. } => libc::EIO,
            Error::OutOfRange { .. } => libc::EFBIG,
            Error::Busy { .. } => libc::EBUSY,
            Error::Invalid(_) => libc::EINVAL,
            Error::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}
