//! Operations on the swap file, answered from an engine of their own.

use super::*;
use zswapd_core::backing::MemoryDisk;
use zswapd_core::codec::{Algorithm, Compression};
use zswapd_core::lru::Incompressible;
use zswapd_core::pool::Allocator;
use zswapd_core::store::{DiskOptions, Files, Shrinker};

const SIZE: u64 = 64 << 12;

struct Fixture {
    engine: Engine,
    out: Vec<u8>,
    tools: Tools,
    progress: Progress,
}

impl Fixture {
    fn new() -> Fixture {
        let compression = Compression::new(Algorithm::Lz4, 3).expect("level");
        Fixture {
            engine: Engine::new(SIZE, Allocator::Zsmalloc, 64 << 20, compression, Files::default()).expect("engine"),
            out: vec![0xee; MAX_READ],
            tools: Tools { scratch: Scratch::new().expect("scratch"), detached: Detached::with_capacity(8) },
            progress: Progress::NONE,
        }
    }

    fn answer(&mut self, operation: Operation<'_>) -> Result<Vec<u8>, i32> {
        loop {
            match answer(&self.engine, operation, &mut self.out, &mut self.tools, &mut self.progress) {
                Poll::Ready(payload) => return payload.map(<[u8]>::to_vec),
                Poll::Pending => {}
            }
        }
    }
}

/// What cannot be compressed.
fn noise(length: usize) -> Vec<u8> {
    let mut x = 1u64;
    let mut next = || {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 56) as u8
    };
    (0..length).map(|_| next()).collect()
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
    let size = 2 * MAX_READ as u64;
    let mut fixture = Fixture {
        engine: Engine::new(size, Allocator::Zsmalloc, 64 << 20, compression, Files::default()).expect("engine"),
        ..Fixture::new()
    };
    fixture.out.push(0xee);
    let largest = MAX_READ as u32;
    assert_eq!(fixture.answer(Operation::Read { offset: 0, size: largest }), Ok(vec![0; MAX_READ]));
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
        answer(&fixture.engine, write, out, &mut fixture.tools, &mut fixture.progress).map_ok(<[u8]>::to_vec)
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
    let noise = noise(8 * PAGE_SIZE);
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
    for (offset, length, expected) in [(SIZE, 10, Ok(())), (u64::MAX, 2, Err(libc::EFBIG)), (SIZE - 1, 100, Ok(()))] {
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

/// The test is the only shrinker.
#[test]
fn what_finds_no_room_is_tried_again_and_stores_nothing_twice() {
    let (mut fixture, mut shrinker) = (Fixture::new(), Shrinker::new().expect("memory"));
    let compression = Compression::new(Algorithm::Lz4, 3).expect("level");
    let disk = Box::new(MemoryDisk::new(16 << 20));
    let options = DiskOptions { disk, bytes: 16 << 20, encryption: true, incompressible: Incompressible::Writeback };
    let engine = Engine::new(SIZE, Allocator::Zsmalloc, 32 << 12, compression, Files::default());
    fixture.engine = engine.and_then(|engine| engine.with_disk(options)).expect("engine");
    let mut answer = |operation: Operation<'_>| {
        let Fixture { engine, out, tools, progress } = &mut fixture;
        let mut waited = false;
        loop {
            match answer(engine, operation, out, tools, progress).map_ok(<[u8]>::to_vec) {
                Poll::Ready(payload) => return (payload, waited, engine.store().metrics().stores.get()),
                Poll::Pending if progress.is_to_wait() => {
                    assert!(answer(engine, operation, out, tools, progress).is_pending() && progress.is_to_wait());
                    waited = true;
                    engine.store().shrink(&mut shrinker).expect("written back");
                }
                Poll::Pending => {}
            }
        }
    };
    let (data, pages) = (noise(SIZE as usize), SIZE / PAGE_SIZE as u64);
    let (written, waited, stores) = answer(Operation::Write { offset: 0, data: &data });
    assert!(written.is_ok() && waited);
    assert_eq!(stores, pages);
    // The rest of the page needs room of its own, until all is full again.
    let mut waited = false;
    for page in 0..pages {
        let zero = Operation::Fallocate { offset: page << 12, length: 100, mode: libc::FALLOC_FL_ZERO_RANGE as u32 };
        let (zeroed, has_waited, _) = answer(zero);
        assert_eq!(zeroed, Ok(vec![]));
        waited |= has_waited;
    }
    assert!(waited);
    for (page, old) in data.chunks(PAGE_SIZE).enumerate() {
        let (read, ..) = answer(Operation::Read { offset: (page << 12) as u64, size: PAGE_SIZE as u32 });
        assert_eq!(read, Ok([&[0; 100], &old[100..]].concat()));
    }
}
