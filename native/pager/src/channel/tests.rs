//! The swap file as the kernel finds it: every request that wants a reply gets one, whole or an error, and no other.

use crate::testing::*;
use proptest::prelude::*;
use zswapd_core::page::PAGE_SIZE;
use zswapd_fuse::init::{MAX_READ, MAX_WRITE};
use zswapd_fuse::swapfile::NODEID;
use zswapd_fuse::wire::{opcode, u64_at};

const GETXATTR: u32 = 22;
const COPY_FILE_RANGE: u32 = 47;

/// One reply to a message with this name: this errno.
#[track_caller]
fn expect_error(kernel: &Kernel, message: &[u8], unique: u64, errno: i32) {
    kernel.send(message);
    assert_eq!(kernel.reply(), Reply { unique, errno, payload: vec![] });
    kernel.expect_quiet();
}

#[test]
fn a_header_without_a_name_is_ignored() {
    let kernel = Kernel::new();
    let whole = request(opcode::READ, 8, NODEID, &[0; 40]);
    for length in 1..16 {
        kernel.send(&whole[..length]);
    }
    kernel.expect_quiet();
}

#[test]
fn a_truncated_header_is_an_error_of_its_request() {
    let kernel = Kernel::new();
    let whole = request(opcode::READ, 8, NODEID, &[0; 40]);
    for length in 16..80 {
        expect_error(&kernel, &whole[..length], 8, libc::EIO);
    }
}

#[test]
fn a_length_that_lies_is_an_error() {
    let kernel = Kernel::new();
    for length in [0u32, 39, 40, 79, 81, 1 << 20, u32::MAX] {
        let mut message = request(opcode::READ, 8, NODEID, &[0; 40]);
        message[..4].copy_from_slice(&length.to_ne_bytes());
        expect_error(&kernel, &message, 8, libc::EIO);
    }
}

#[test]
fn arguments_that_are_too_short_are_an_error() {
    let kernel = Kernel::new();
    // As much as is needed: WRITE of 3 bytes, READ of 3, LSEEK to SEEK_DATA (3).
    let whole = arguments(43, &[(16, &3u32.to_ne_bytes())]);
    for (opcode, needed) in [
        (opcode::READ, 20),
        (opcode::WRITE, 43),
        (opcode::FALLOCATE, 28),
        (opcode::LSEEK, 20),
        (opcode::SETATTR, 24),
        (opcode::OPEN, 4),
    ] {
        for length in 0..needed {
            expect_error(&kernel, &request(opcode, 8, NODEID, &whole[..length]), 8, libc::EINVAL);
        }
        let answer = kernel.ask(opcode, &whole[..needed]);
        assert!(answer.is_ok() || answer == Err(libc::EOPNOTSUPP), "opcode {opcode}: {answer:?}");
    }
}

#[test]
fn a_write_of_more_or_less_data_than_it_says_writes_nothing() {
    let kernel = Kernel::new();
    let old = noise(1, 2);
    assert_eq!(kernel.write(0, &old), Ok(old.len() as u32));
    for size in [0, 1, 4095, 4097, 8192, u32::MAX] {
        let message = request(opcode::WRITE, 8, NODEID, &write_arguments(0, size, &noise(2, 1)));
        expect_error(&kernel, &message, 8, libc::EINVAL);
    }
    assert_eq!(kernel.read(0, 8192), Ok(old));
}

#[test]
fn what_is_not_known_is_not_implemented() {
    let kernel = Kernel::new();
    for opcode in [0, GETXATTR, COPY_FILE_RANGE, 59, 4096, u32::MAX] {
        assert_eq!(kernel.ask(opcode, &[0; 64]), Err(libc::ENOSYS), "opcode {opcode}");
    }
    kernel.expect_quiet();
}

#[test]
fn the_largest_requests_are_answered_whole_and_larger_ones_refused() {
    let kernel = Kernel::new();
    let data = noise(3, MAX_WRITE / PAGE_SIZE);
    assert_eq!(kernel.write(4096, &data), Ok(MAX_WRITE as u32));
    for (at, part) in data.chunks(MAX_READ).enumerate() {
        assert_eq!(kernel.read((4096 + at * MAX_READ) as u64, MAX_READ as u32).as_deref(), Ok(part));
    }
    for size in [MAX_READ as u32 + 1, 2 << 20, u32::MAX] {
        assert_eq!(kernel.read(0, size), Err(libc::EINVAL));
    }
    // /dev/fuse refuses what is longer than the buffer; the socket cuts it short.
    let larger = vec![1; MAX_WRITE + 8192];
    expect_error(
        &kernel,
        &request(opcode::WRITE, 8, NODEID, &write_arguments(0, larger.len() as u32, &larger)),
        8,
        libc::EIO,
    );
    assert_eq!(kernel.read(0, 4096), Ok(vec![0; 4096]));
}

#[test]
fn beyond_the_end_writes_fail_and_reads_find_the_end() {
    let kernel = Kernel::new();
    let page = noise(4, 1);
    assert_eq!(kernel.write(SIZE - 4096, &page), Ok(4096));
    for offset in [SIZE - 4095, SIZE - 1, SIZE, SIZE + 4096, i64::MAX as u64, u64::MAX - 4095, u64::MAX] {
        assert_eq!(kernel.write(offset, &noise(5, 1)), Err(libc::EFBIG), "at {offset}");
        let end = SIZE.saturating_sub(offset) as usize;
        assert_eq!(kernel.read(offset, 4096), Ok(page[4096 - end..].to_vec()), "at {offset}");
    }
    assert_eq!(kernel.read(SIZE - 4096, 8192), Ok(page));
}

#[test]
fn nothing_can_be_written_and_read() {
    let kernel = Kernel::new();
    for offset in [0, 5, SIZE] {
        assert_eq!(kernel.write(offset, &[]), Ok(0));
        assert_eq!(kernel.read(offset, 0), Ok(vec![]));
    }
    assert_eq!(kernel.write(SIZE + 1, &[]), Err(libc::EFBIG));
}

#[test]
fn a_full_pool_refuses_a_write_whole_and_keeps_no_old_page() {
    let kernel = Kernel::with(48 * PAGE_SIZE as u64, u64::MAX);
    let (old, new) = (noise(6, 8), noise(7, 64));
    assert_eq!(kernel.write(0, &old), Ok(old.len() as u32));
    assert_eq!(kernel.write(0, &new), Err(libc::ENOSPC));
    let pages: Vec<_> = (0..64).map(|n| kernel.read(n * 4096, 4096)).collect();
    for (page, new) in pages.iter().zip(new.chunks(4096)) {
        assert!(*page == Ok(new.to_vec()) || *page == Err(libc::EIO), "neither what was written nor an error");
    }
    assert!(pages.iter().any(Result::is_ok) && pages.iter().any(Result::is_err));
    // A page that needs no memory, and one that gives its own back, still find room.
    assert_eq!(kernel.write(63 * 4096, &[7; 4096]), Ok(4096));
    let stored = pages.iter().position(Result::is_ok).expect("a page was stored") as u64;
    assert_eq!(kernel.write(stored * 4096, &noise(8, 1)), Ok(4096));
    kernel.expect_quiet();
}

#[test]
fn what_a_pager_that_stores_nothing_forgets_lies_in_the_file() {
    let kernel = Kernel::with(1 << 30, 2 << 20);
    let page = noise(9, 1);
    assert_eq!(kernel.write(0, &page), Ok(4096));
    assert_eq!(kernel.write(2 << 20, &page), Ok(4096));
    assert_eq!(kernel.read(0, 4096), Ok(page.clone()));
    assert_eq!(kernel.read(2 << 20, 4096), Ok(vec![0; 4096]));
    for offset in [SIZE, u64::MAX] {
        assert_eq!(kernel.write(offset, &page), Err(libc::EFBIG));
    }
}

#[test]
fn punches_are_answered_and_read_zeros() {
    let kernel = Kernel::new();
    assert_eq!(kernel.write(0, &noise(10, 256)), Ok(1 << 20));
    let ask = |offset: u64, length: u64, mode: i32| {
        let fields: [(usize, &[u8]); 3] =
            [(8, &offset.to_ne_bytes()), (16, &length.to_ne_bytes()), (24, &mode.to_ne_bytes())];
        kernel.ask(opcode::FALLOCATE, &arguments(32, &fields))
    };
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    assert_eq!(ask(0, SIZE, punch), Ok(vec![]));
    for at in (0..1 << 20).step_by(MAX_READ) {
        assert_eq!(kernel.read(at, MAX_READ as u32), Ok(vec![0; MAX_READ]));
    }
    assert_eq!(ask(SIZE, 4096, punch), Ok(vec![]));
    assert_eq!(ask(u64::MAX, 2, punch), Err(libc::EFBIG));
    assert_eq!(ask(0, 4096, 0), Err(libc::EOPNOTSUPP));
    kernel.expect_quiet();
    // What was punched is freed behind the reply: before the next request, at the latest.
    assert_eq!(kernel.shared.engine.store().metrics().pool_bytes.get(), 0);
}

#[test]
fn an_open_counts_once_it_is_answered_and_a_truncating_one_is_refused() {
    let kernel = Kernel::new();
    let open = |flags: i32| kernel.ask(opcode::OPEN, &arguments(8, &[(0, &flags.to_ne_bytes())]));
    assert_eq!(open(libc::O_RDWR).map(|payload| payload.len()), Ok(16));
    assert_eq!(open(libc::O_RDWR | libc::O_TRUNC), Err(libc::EPERM));
    kernel.expect_quiet();
    assert_eq!(kernel.shared.gate().opens(), 1);
    for opcode in [opcode::FLUSH, opcode::FSYNC, opcode::RELEASE] {
        assert_eq!(kernel.ask(opcode, &[0; 24]), Ok(vec![]));
    }
    kernel.expect_quiet();
    assert_eq!(kernel.shared.gate().opens(), 0);
}

#[test]
fn the_size_stays_and_only_data_is_sought() {
    let kernel = Kernel::new();
    let resize = arguments(88, &[(0, &(1u32 << 3).to_ne_bytes()), (16, &4096u64.to_ne_bytes())]);
    assert_eq!(kernel.ask(opcode::SETATTR, &resize), Err(libc::EPERM));
    let seek = |offset: u64, whence: i32| {
        kernel.ask(opcode::LSEEK, &arguments(24, &[(8, &offset.to_ne_bytes()), (16, &whence.to_ne_bytes())]))
    };
    assert_eq!(seek(5, libc::SEEK_DATA), Ok(5u64.to_ne_bytes().to_vec()));
    assert_eq!(seek(5, libc::SEEK_HOLE), Ok(SIZE.to_ne_bytes().to_vec()));
    assert_eq!(seek(SIZE, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(0, libc::SEEK_END), Err(libc::EINVAL));
    assert_eq!(kernel.ask(opcode::STATFS, &[]).map(|payload| payload.len()), Ok(80));
    kernel.expect_quiet();
}

#[test]
fn many_requests_at_once_are_each_answered_once() {
    let kernel = Kernel::new();
    let uniques: Vec<u64> = (0..100).map(|_| next_unique()).collect();
    for (n, &unique) in uniques.iter().enumerate() {
        let at = (n as u64 / 2 % 10) * 4096;
        let (opcode, arguments) = match n % 2 {
            0 => (opcode::WRITE, write_arguments(at, 4096, &noise(n as u64, 1))),
            _ => (opcode::READ, arguments(40, &[(8, &at.to_ne_bytes()), (16, &4096u32.to_ne_bytes())])),
        };
        kernel.send(&request(opcode, unique, NODEID, &arguments));
    }
    let mut answered: Vec<u64> = uniques.iter().map(|_| kernel.reply()).map(|reply| reply.unique).collect();
    answered.sort_unstable();
    assert_eq!(answered, uniques);
    kernel.expect_quiet();
}

/// As EINVAL from /dev/fuse would be: the reply cannot be sent, but requests still come.
#[test]
fn a_reply_that_is_refused_is_not_the_end() {
    let kernel = Kernel::new();
    // SAFETY: plain system call on a descriptor that we own.
    unsafe { libc::shutdown(std::os::fd::AsRawFd::as_raw_fd(&kernel.socket), libc::SHUT_RD) };
    for n in 0..3 {
        kernel.send(&request(opcode::WRITE, next_unique(), NODEID, &write_arguments(n * 4096, 4096, &[1; 4096])));
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while kernel.shared.engine.store().metrics().stores.get() <= n {
            assert!(std::time::Instant::now() < deadline, "write {n} was not served");
            std::thread::yield_now();
        }
    }
}

proptest! {
    #[test]
    fn any_message_is_answered_once_if_at_all_and_the_next_one_served(
        messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..120), 1..8),
        requests in prop::collection::vec((0u32..64, 0u64..4, prop::collection::vec(any::<u8>(), 0..100)), 0..8),
    ) {
        thread_local! {
            static KERNEL: Kernel = Kernel::new();
        }
        KERNEL.with(|kernel| {
            let mut expected = Vec::new();
            for message in &messages {
                kernel.send(message);
                expected.extend(u64_at(message, 8));
            }
            for (opcode, nodeid, arguments) in &requests {
                let unique = next_unique();
                kernel.send(&request(*opcode, unique, *nodeid, arguments));
                if ![opcode::FORGET, opcode::BATCH_FORGET, opcode::INTERRUPT].contains(opcode) {
                    expected.push(unique);
                }
            }
            let mut answered: Vec<u64> = expected.iter().map(|_| kernel.reply().unique).collect();
            expected.sort_unstable();
            answered.sort_unstable();
            assert_eq!(answered, expected);
            kernel.expect_quiet();
        });
    }
}
