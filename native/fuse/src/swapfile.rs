//! The requests on the swap file: each is answered here, from the engine alone.
//!
//! Some of them the kernel asks under the inode lock on the path of a page, so that none may wait for Python.

use crate::init::MAX_READ;
use crate::wire::Operation;
use std::task::{ready, Poll};
use zswapd_core::engine::Engine;
use zswapd_core::error::{self, Error};
use zswapd_core::page::PAGE_SIZE;
use zswapd_core::scratch::Scratch;
use zswapd_core::store::Detached;

/// Nodeid, inode number and mode of the swap file. pyfuse3's side uses the same.
pub const NODEID: u64 = 2;
const MODE: u32 = libc::S_IFREG | 0o600;
/// Seconds that attributes hold: they never change.
const ATTRIBUTES_VALID: u64 = 3600;

/// fuse.h
const FATTR_MODE: u32 = 1 << 0;
const FATTR_UID: u32 = 1 << 1;
const FATTR_GID: u32 = 1 << 2;
const FATTR_SIZE: u32 = 1 << 3;
const FOPEN_DIRECT_IO: u32 = 1 << 0;
const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// Bytes of `struct fuse_attr_out`.
const ATTR_OUT: usize = 104;
/// Bytes of `struct fuse_statfs_out`.
const STATFS_OUT: usize = 80;

/// A WRITE is stored in parts, which end where this divides the offset: about 60 µs of work with lz4.
const PART: u64 = 8 * PAGE_SIZE as u64;

/// What a worker answers with, besides the engine.
pub struct Tools {
    pub scratch: Scratch,
    /// What punches have emptied, to be freed after the reply.
    pub detached: Detached,
}

/// How far the request at hand has come. Belongs to the requests, not to the worker: another one may go on with it.
pub struct Progress {
    /// Bytes of a WRITE that are stored.
    stored: usize,
    /// The first error.
    result: Result<(), i32>,
    is_to_wait: bool,
}

impl Progress {
    /// Of a request that has not begun.
    pub const NONE: Progress = Progress { stored: 0, result: Ok(()), is_to_wait: false };

    /// Whether the last thing that was tried found no room, or its slot locked: it is to be tried again in a while.
    pub fn is_to_wait(&self) -> bool {
        self.is_to_wait
    }

    /// `result`, or pending if it is to be tried again.
    fn unless_again<T>(&mut self, engine: &Engine, result: error::Result<T>) -> Poll<Result<T, i32>> {
        if matches!(result, Err(Error::NoRoomYet)) && !self.is_to_wait {
            engine.store().metrics().stores_waited_for_room.add(1);
        }
        self.is_to_wait = matches!(result, Err(Error::NoRoomYet | Error::NotNow { .. }));
        match self.is_to_wait {
            true => Poll::Pending,
            false => Poll::Ready(result.map_err(|error| error.errno())),
        }
    }

    fn store_part(
        &mut self,
        engine: &Engine,
        offset: u64,
        data: &[u8],
        scratch: &mut Scratch,
    ) -> Poll<Result<(), i32>> {
        if self.stored == 0 {
            engine.check_range(offset, data.len() as u64).map_err(|error| error.errno())?;
        }
        // A page at a time: what has found room stays stored.
        loop {
            let from = offset + self.stored as u64;
            let length = (data.len() - self.stored).min(PAGE_SIZE - (from % PAGE_SIZE as u64) as usize);
            let page = engine.write(from, &data[self.stored..][..length], scratch);
            let page = ready!(self.unless_again(engine, page));
            self.result = self.result.and(page);
            self.stored += length;
            if self.stored == data.len() {
                return Poll::Ready(std::mem::replace(self, Progress::NONE).result);
            }
            if (offset + self.stored as u64) % PART == 0 {
                return Poll::Pending;
            }
        }
    }
}

/// Answers an operation: the payload of the reply, written to `out`, or an errno.
///
/// Pending: a part of a WRITE is stored, or it has to wait. The same is to be passed again, with the same progress,
/// until it is ready; others may come between. A WRITE is answered whole or with an error, never short. EAGAIN, for a READ
/// alone, is of [`Error::NotNow`]: it is to be asked again. Does not block or allocate, but for what waits for the disk.
pub fn answer<'a>(
    engine: &Engine,
    operation: Operation<'_>,
    out: &'a mut [u8],
    tools: &mut Tools,
    progress: &mut Progress,
) -> Poll<Result<&'a [u8], i32>> {
    let payload: &[u8] = match operation {
        Operation::Read { offset, size } => return Poll::Ready(read(engine, offset, size, out, tools)),
        Operation::Write { offset, data } => {
            let stored = progress.store_part(engine, offset, data, &mut tools.scratch);
            return stored.map_ok(|()| written(out, data.len()));
        }
        Operation::Fallocate { offset, length, mode } => {
            let within = hole(engine.size(), offset, length, mode as i32)?;
            if within > 0 {
                // What of it is done may be done again.
                let result = engine.discard(offset, within, &mut tools.detached, &mut tools.scratch);
                ready!(progress.unless_again(engine, result))?;
            }
            &[]
        }
        Operation::Lseek { offset, whence } => {
            let found = lseek(engine.size(), offset, whence as i32)?;
            put(out, &[&found.to_ne_bytes()])
        }
        Operation::Setattr { valid, size } => {
            let resized = valid & FATTR_SIZE != 0 && size != engine.size();
            if resized || valid & (FATTR_MODE | FATTR_UID | FATTR_GID) != 0 {
                return Poll::Ready(Err(libc::EPERM));
            }
            attributes(engine, out)
        }
        Operation::Getattr => attributes(engine, out),
        Operation::Statfs => file_system(engine, out),
        // The kernel would take the file to be empty from then on, and not even ask for its pages.
        Operation::Open { flags } if flags & libc::O_TRUNC as u32 != 0 => return Poll::Ready(Err(libc::EPERM)),
        Operation::Open { .. } => {
            // struct fuse_open_out: fh, open_flags, padding.
            let flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
            put(out, &[&1u64.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 4]])
        }
        // A page is stored when its write is answered: there is nothing to sync or flush.
        Operation::Release | Operation::Flush | Operation::Fsync => &[],
        // The kernel does not ask again, and does without.
        Operation::Other => return Poll::Ready(Err(libc::ENOSYS)),
    };
    Poll::Ready(Ok(payload))
}

/// Answers a READ, in full (less only at the end of the file), as [`answer`] does. EAGAIN: see there.
pub fn read<'a>(
    engine: &Engine,
    offset: u64,
    size: u32,
    out: &'a mut [u8],
    tools: &mut Tools,
) -> Result<&'a [u8], i32> {
    // More than was agreed on: refused, since less than asked for would pass for the end of the file.
    let out = out.get_mut(..size as usize).filter(|out| out.len() <= MAX_READ).ok_or(libc::EINVAL)?;
    let read = engine.read(offset, out, &mut tools.scratch).map_err(|error| error.errno())?;
    Ok(&out[..read])
}

/// `struct fuse_write_out`: size, padding.
pub fn written(out: &mut [u8], length: usize) -> &[u8] {
    put(out, &[&(length as u32).to_ne_bytes(), &[0; 4]])
}

/// How much of a range within the file is to be emptied: punched holes and zeroed ranges both read zeros afterwards.
/// Allocating in advance is not offered.
fn hole(size: u64, offset: u64, length: u64, mode: i32) -> Result<u64, i32> {
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    const ZERO_KEEP: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    if !matches!(mode, PUNCH | ZERO_KEEP | libc::FALLOC_FL_ZERO_RANGE) {
        return Err(libc::EOPNOTSUPP);
    }
    let end = offset.checked_add(length).ok_or(libc::EFBIG)?;
    if end > size && mode == libc::FALLOC_FL_ZERO_RANGE {
        return Err(libc::EFBIG);
    }
    // What lies beyond the end is a hole already.
    Ok(size.min(end).saturating_sub(offset))
}

/// The whole file counts as data.
fn lseek(size: u64, offset: u64, whence: i32) -> Result<u64, i32> {
    match whence {
        libc::SEEK_DATA if offset < size => Ok(offset),
        libc::SEEK_HOLE if offset < size => Ok(size),
        libc::SEEK_DATA | libc::SEEK_HOLE => Err(libc::ENXIO),
        _ => Err(libc::EINVAL),
    }
}

/// `struct fuse_attr_out`.
fn attributes<'a>(engine: &Engine, out: &'a mut [u8]) -> &'a [u8] {
    let size = engine.size();
    let out = &mut out[..ATTR_OUT];
    out.fill(0);
    let mut put_u64 = |at: usize, value: u64| out[at..at + 8].copy_from_slice(&value.to_ne_bytes());
    put_u64(0, ATTRIBUTES_VALID);
    put_u64(16, NODEID); // attr.ino
    put_u64(24, size); // attr.size
    put_u64(32, size / 512); // attr.blocks
    let mut put_u32 = |at: usize, value: u32| out[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    put_u32(76, MODE); // attr.mode
    put_u32(80, 1); // attr.nlink
    put_u32(96, 4096); // attr.blksize
    out
}

/// `struct fuse_statfs_out`. The loop driver asks for it, and offers discards in units of its block size.
fn file_system<'a>(engine: &Engine, out: &'a mut [u8]) -> &'a [u8] {
    let out = &mut out[..STATFS_OUT];
    out.fill(0);
    out[..8].copy_from_slice(&(engine.size() / PAGE_SIZE as u64).to_ne_bytes()); // blocks
    out[40..44].copy_from_slice(&(PAGE_SIZE as u32).to_ne_bytes()); // bsize
    out[44..48].copy_from_slice(&255u32.to_ne_bytes()); // namelen
    out[48..52].copy_from_slice(&(PAGE_SIZE as u32).to_ne_bytes()); // frsize
    out
}

fn put<'a>(out: &'a mut [u8], parts: &[&[u8]]) -> &'a [u8] {
    let mut length = 0;
    for part in parts {
        out[length..length + part.len()].copy_from_slice(part);
        length += part.len();
    }
    &out[..length]
}

#[cfg(test)]
mod tests;
