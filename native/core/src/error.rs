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
    /// The pool is full, but the shrinker is making room: nothing has changed, and the store is to be tried again. Never
    /// an answer to who has written the page.
    #[error("the pool is full until the shrinker has made room")]
    NoRoomYet,
    /// Who works on the slot, or on another one that shares its lock, waits for the disk; or the page lies there, and it is
    /// not for this thread to wait: nothing has changed, and the same is to be tried again. Never an answer to who wants
    /// the page.
    #[error("page {slot} has to wait for the backing disk")]
    NotNow { slot: u32 },
    /// The disk could not read the page. It stays where it is, and may be read another time.
    #[error("page {slot} cannot be read from the backing disk: {source}")]
    DiskRead { slot: u32, source: io::Error },
    /// The disk could not write a segment. No page is lost: those that were to go there stay in the pool.
    #[error("the backing disk cannot be written: {0}")]
    DiskWrite(io::Error),
    /// There is no backing disk, or it has failed: nothing is written back.
    #[error("there is no backing disk that works")]
    NoWriteback,
    /// No segment of the backing disk is free.
    #[error("the backing disk is full")]
    BackingFull,
    /// As much was written as the budget allows.
    #[error("the budget of bytes written to the backing disk is used up")]
    BudgetUsedUp,
    /// The slot's last store failed, or its stored bytes were found bad: it reads EIO until written or punched.
    #[error("page {slot} is lost: its last store failed or its stored bytes are bad")]
    Lost { slot: u32 },
    /// The stored bytes of the page do not match their checksum, or do not decode. The slot has become LOST.
    #[error("the stored bytes of page {slot} are corrupt")]
    Corrupt { slot: u32 },
    #[error("the range {offset}+{length} is outside the swap file of {size} bytes")]
    OutOfRange { offset: u64, length: u64, size: u64 },
    /// Others are at work where a teardown needs to be alone: writing segments of evicted pages, cleaning segments,
    /// recompressing pages, or moving objects of the pool.
    #[error(
        "still at work: {writebacks} writing back, {cleanings} cleaning, {recompressions} recompressing, \
         {movers} moving objects of the pool"
    )]
    Busy { writebacks: u32, cleanings: u32, recompressions: u32, movers: u32 },
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

    /// The same of the page that shares the one that it was found at.
    pub fn of_page(self, index: u32) -> Error {
        match self {
            Error::NotNow { .. } => Error::NotNow { slot: index },
            Error::Lost { .. } => Error::Lost { slot: index },
            Error::Corrupt { .. } => Error::Corrupt { slot: index },
            Error::DiskRead { source, .. } => Error::DiskRead { slot: index, source },
            error => error,
        }
    }

    /// The errno that a caller of read(2), write(2) or fallocate(2) sees.
    pub fn errno(&self) -> i32 {
        match self {
            Error::PoolFull | Error::NoRegion | Error::BackingFull | Error::BudgetUsedUp => libc::ENOSPC,
            Error::Lost { .. } | Error::Corrupt { .. } | Error::DiskRead { .. } | Error::DiskWrite(_) => libc::EIO,
            Error::NoRoomYet | Error::NotNow { .. } => libc::EAGAIN,
            Error::NoWriteback => libc::ENODEV,
            Error::OutOfRange { .. } => libc::EFBIG,
            Error::Busy { .. } => libc::EBUSY,
            Error::Invalid(_) => libc::EINVAL,
            Error::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}
