//! The requests on the swap file: each is answered here, from the engine alone.
//!
//! Some of them the kernel asks under the inode lock on the path of a page, so that none may wait for Python.

use crate::init::MAX_TRANSFER;
use crate::wire::Operation;
use std::task::Poll;
use zswapd_core::engine::Engine;
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
    /// How many bytes of the WRITE at hand are stored, and the first error.
    stored: usize,
    result: Result<(), i32>,
}

impl Tools {
    pub fn new(scratch: Scratch, detached: Detached) -> Tools {
        Tools { scratch, detached, stored: 0, result: Ok(()) }
    }

    fn store_part(&mut self, engine: &Engine, offset: u64, data: &[u8]) -> Poll<Result<(), i32>> {
        if self.stored == 0 {
            engine.check_range(offset, data.len() as u64).map_err(|error| error.errno())?;
        }
        let from = offset + self.stored as u64;
        let length = (data.len() - self.stored).min((PART - from % PART) as usize);
        let part = engine.write(from, &data[self.stored..][..length], &mut self.scratch);
        self.result = self.result.and(part.map_err(|error| error.errno()));
        self.stored += length;
        if self.stored < data.len() {
            return Poll::Pending;
        }
        self.stored = 0;
        Poll::Ready(std::mem::replace(&mut self.result, Ok(())))
    }
}

/// Answers an operation: the payload of the reply, written to `out`, or an errno.
///
/// Pending: a part of a WRITE is stored. The same is to be passed again until it is ready; READs may come between.
/// A READ is answered in full (less only at the end of the file), a WRITE whole or with an error, never short. Does not
/// block, allocate or touch disk.
pub fn answer<'a>(
    engine: &Engine,
    operation: Operation<'_>,
    out: &'a mut [u8],
    tools: &mut Tools,
) -> Poll<Result<&'a [u8], i32>> {
    let payload: &[u8] = match operation {
        Operation::Read { offset, size } => {
            // More than was agreed on: refused, since less than asked for would pass for the end of the file.
            let out = out.get_mut(..size as usize).filter(|out| out.len() <= MAX_TRANSFER).ok_or(libc::EINVAL)?;
            let read = engine.read(offset, out, &mut tools.scratch).map_err(|error| error.errno())?;
            &out[..read]
        }
        Operation::Write { offset, data } => {
            return tools.store_part(engine, offset, data).map_ok(|()| written(out, data.len()));
        }
        Operation::Fallocate { offset, length, mode } => {
            fallocate(engine, offset, length, mode as i32, tools)?;
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

/// `struct fuse_write_out`: size, padding.
pub fn written(out: &mut [u8], length: usize) -> &[u8] {
    put(out, &[&(length as u32).to_ne_bytes(), &[0; 4]])
}

/// Punches holes and zeroes ranges; both read zeros afterwards. Allocating in advance is not offered.
fn fallocate(engine: &Engine, offset: u64, length: u64, mode: i32, tools: &mut Tools) -> Result<(), i32> {
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    const ZERO_KEEP: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    if !matches!(mode, PUNCH | ZERO_KEEP | libc::FALLOC_FL_ZERO_RANGE) {
        return Err(libc::EOPNOTSUPP);
    }
    let end = offset.checked_add(length).ok_or(libc::EFBIG)?;
    if end > engine.size() && mode == libc::FALLOC_FL_ZERO_RANGE {
        return Err(libc::EFBIG);
    }
    // What lies beyond the end is a hole already.
    let within = engine.size().min(end).saturating_sub(offset);
    if within == 0 {
        return Ok(());
    }
    engine.discard(offset, within, &mut tools.detached, &mut tools.scratch).map_err(|error| error.errno())
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
mod tests {
    use super::*;
    use zswapd_core::codec::{Algorithm, Compression};
    use zswapd_core::pool::Allocator;
    use zswapd_core::store::Files;

    const SIZE: u64 = 64 << 12;

    struct Fixture {
        engine: Engine,
        out: Vec<u8>,
        tools: Tools,
    }

    impl Fixture {
        fn new() -> Fixture {
            let compression = Compression::new(Algorithm::Lz4, 3).expect("level");
            Fixture {
                engine: Engine::new(SIZE, Allocator::Zsmalloc, 64 << 20, compression, Files::default())
                    .expect("engine"),
                out: vec![0xee; MAX_TRANSFER],
                tools: Tools::new(Scratch::new().expect("scratch"), Detached::with_capacity(8)),
            }
        }

        fn answer(&mut self, operation: Operation<'_>) -> Result<Vec<u8>, i32> {
            loop {
                match answer(&self.engine, operation, &mut self.out, &mut self.tools) {
                    Poll::Ready(payload) => return payload.map(<[u8]>::to_vec),
                    Poll::Pending => {}
                }
            }
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let mut fixture = Fixture::new();
        let data: Vec<u8> = (0..10_000).map(|n| (n % 251) as u8).collect();
        let written = fixture.answer(Operation::Write { offset: 4000, data: &data }).expect("written");
        assert_eq!(written, [&10_000u32.to_ne_bytes()[..], &[0; 4]].concat());
        assert_eq!(fixture.answer(Operation::Read { offset: 4000, size: 10_000 }), Ok(data));
        assert_eq!(fixture.answer(Operation::Read { offset: SIZE - 4, size: 4096 }), Ok(vec![0; 4]));
        assert_eq!(fixture.answer(Operation::Read { offset: SIZE, size: 4096 }), Ok(vec![]));
        assert_eq!(fixture.answer(Operation::Write { offset: SIZE - 1, data: &[0; 2] }), Err(libc::EFBIG));
    }

    #[test]
    fn a_read_of_more_than_was_agreed_on_is_refused_and_not_cut_short() {
        let compression = Compression::new(Algorithm::Lz4, 3).expect("level");
        let size = 2 * MAX_TRANSFER as u64;
        let mut fixture = Fixture {
            engine: Engine::new(size, Allocator::Zsmalloc, 64 << 20, compression, Files::default()).expect("engine"),
            ..Fixture::new()
        };
        fixture.out.push(0xee);
        let largest = MAX_TRANSFER as u32;
        assert_eq!(fixture.answer(Operation::Read { offset: 0, size: largest }), Ok(vec![0; MAX_TRANSFER]));
        for size in [largest + 1, u32::MAX] {
            assert_eq!(fixture.answer(Operation::Read { offset: 0, size }), Err(libc::EINVAL));
        }
        fixture.out.truncate(4095);
        assert_eq!(fixture.answer(Operation::Read { offset: 0, size: 4096 }), Err(libc::EINVAL));
    }

    #[test]
    fn a_write_is_stored_in_parts_between_which_others_read() {
        let mut fixture = Fixture::new();
        let data = vec![7; 20 * PAGE_SIZE];
        let offset = 3 * PAGE_SIZE as u64;
        let mut written = |out: &mut [u8]| {
            let write = Operation::Write { offset, data: &data };
            answer(&fixture.engine, write, out, &mut fixture.tools).map_ok(<[u8]>::to_vec)
        };
        let read = |page: u64| {
            let mut bytes = vec![0xee; PAGE_SIZE];
            let mut scratch = Scratch::new().expect("scratch");
            fixture.engine.read(page << 12, &mut bytes, &mut scratch).expect("read");
            bytes[0]
        };
        // Pages 3 to 7, 8 to 15 and 16 to 22.
        for (last, next) in [(7, 8), (15, 16)] {
            assert!(written(&mut fixture.out).is_pending());
            assert_eq!((read(last), read(next)), (7, 0));
        }
        assert!(matches!(written(&mut fixture.out), Poll::Ready(Ok(_))));
        assert_eq!((read(2), read(22), read(23)), (0, 7, 0));
    }

    #[test]
    fn a_write_that_ends_outside_the_file_leaves_it_alone() {
        let mut fixture = Fixture::new();
        let offset = SIZE - 20 * PAGE_SIZE as u64;
        let data = vec![7; 20 * PAGE_SIZE + 1];
        assert_eq!(fixture.answer(Operation::Write { offset, data: &data }), Err(libc::EFBIG));
        assert_eq!(fixture.answer(Operation::Read { offset, size: 4096 }), Ok(vec![0; 4096]));
    }

    #[test]
    fn a_write_fails_if_any_part_does_and_the_next_one_starts_anew() {
        let mut fixture = Fixture::new();
        let noise = {
            let mut x = 1u64;
            let mut next = || {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (x >> 56) as u8
            };
            (0..8 * PAGE_SIZE).map(|_| next()).collect::<Vec<u8>>()
        };
        fixture.engine.store().pool().set_limit_bytes(4 << 12);
        assert_eq!(
            fixture.answer(Operation::Write { offset: 0, data: &[noise, vec![0; 12 * PAGE_SIZE]].concat() }),
            Err(libc::ENOSPC)
        );
        assert!(fixture.answer(Operation::Write { offset: 0, data: &[0; 20 * PAGE_SIZE] }).is_ok());
        assert_eq!(fixture.answer(Operation::Read { offset: 0, size: 4096 }), Ok(vec![0; 4096]));
    }

    #[test]
    fn punches_and_zeroed_ranges_read_zeros() {
        let mut fixture = Fixture::new();
        let (punch, zero) = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, libc::FALLOC_FL_ZERO_RANGE);
        for (mode, expected) in
            [(punch, Ok(vec![])), (zero, Ok(vec![])), (0, Err(libc::EOPNOTSUPP)), (!0, Err(libc::EOPNOTSUPP))]
        {
            fixture.answer(Operation::Write { offset: 0, data: &[7; 8192] }).expect("written");
            let answer = fixture.answer(Operation::Fallocate { offset: 100, length: 8000, mode: mode as u32 });
            assert_eq!(answer, expected);
            let zeros = fixture.answer(Operation::Read { offset: 0, size: 8192 }).expect("read");
            let zeroed = if expected.is_ok() { 8000 } else { 0 };
            assert_eq!(zeros.iter().filter(|&&byte| byte == 0).count(), zeroed);
        }
        for (offset, length, expected) in [(SIZE, 10, Ok(())), (u64::MAX, 2, Err(libc::EFBIG)), (SIZE - 1, 100, Ok(()))]
        {
            let answer = fixture.answer(Operation::Fallocate { offset, length, mode: punch as u32 });
            assert_eq!(answer.map(drop), expected);
        }
    }

    #[test]
    fn the_size_cannot_be_changed() {
        let mut fixture = Fixture::new();
        assert!(fixture.answer(Operation::Setattr { valid: FATTR_SIZE, size: SIZE }).is_ok());
        assert_eq!(fixture.answer(Operation::Setattr { valid: FATTR_SIZE, size: 0 }), Err(libc::EPERM));
        assert_eq!(fixture.answer(Operation::Setattr { valid: FATTR_MODE, size: 0 }), Err(libc::EPERM));
        assert_eq!(fixture.answer(Operation::Open { flags: libc::O_TRUNC as u32 }), Err(libc::EPERM));
        assert!(fixture.answer(Operation::Open { flags: libc::O_RDWR as u32 }).is_ok());
        assert_eq!(fixture.answer(Operation::Getattr).expect("attributes").len(), ATTR_OUT);
        assert_eq!(fixture.answer(Operation::Statfs).expect("file system").len(), STATFS_OUT);
    }

    #[test]
    fn seeking_knows_only_data() {
        for (offset, whence, expected) in [
            (5, libc::SEEK_DATA, Ok(5)),
            (5, libc::SEEK_HOLE, Ok(SIZE)),
            (SIZE, libc::SEEK_DATA, Err(libc::ENXIO)),
            (0, 99, Err(libc::EINVAL)),
        ] {
            assert_eq!(lseek(SIZE, offset, whence), expected);
        }
    }
}
