//! Pages that lie on a disk, which the test has in its hand: who waits for it, and who does not.

use crate::testing::*;
use std::time::Instant;
use zswapd_core::backing::{Faults, MemoryDisk};
use zswapd_core::page::PAGE_SIZE;
use zswapd_core::store::What;
use zswapd_fuse::swapfile::NODEID;
use zswapd_fuse::wire::opcode;

/// Writes pages, all different, and has them written back. They stay there when they are read.
fn on_disk(kernel: &Kernel, pages: usize) -> Vec<Vec<u8>> {
    let store = kernel.shared.engine.store();
    store.set_promoting(false);
    let data: Vec<_> = (0..pages).map(|n| noise(n as u64 + 1, 1)).collect();
    for (n, page) in data.iter().enumerate() {
        assert_eq!(kernel.write((n * PAGE_SIZE) as u64, page), Ok(PAGE_SIZE as u32));
    }
    let swept =
        kernel.shared.sweeper.sweep(What::All).expect("nobody else does").recv().expect("it runs").expect("swept");
    assert_eq!((swept.job.pages, store.metrics().pages_on_disk.get()), (pages as u64, pages as u64));
    data
}

/// Sends a READ of a page; returns its name.
fn send_read(kernel: &Kernel, page: usize) -> u64 {
    let unique = next_unique();
    let fields: [(usize, &[u8]); 2] = [(8, &((page * PAGE_SIZE) as u64).to_ne_bytes()), (16, &4096u32.to_ne_bytes())];
    kernel.send(&request(opcode::READ, unique, NODEID, &arguments(40, &fields)));
    unique
}

fn answer(unique: u64, payload: &[u8]) -> Reply {
    Reply { unique, errno: 0, payload: payload.to_vec() }
}

/// Receives the replies to all of these, in any order.
fn expect_replies(kernel: &Kernel, mut expected: Vec<Reply>) {
    while !expected.is_empty() {
        let reply = kernel.reply();
        let at = expected.iter().position(|other| *other == reply).expect("one that was asked for");
        expected.swap_remove(at);
    }
}

#[track_caller]
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn while_some_wait_for_the_disk_others_are_served() {
    let disk = Held::new();
    let kernel = Kernel::with_disk(1 << 30, disk.clone());
    let pages = on_disk(&kernel, 8);
    disk.hold(READS, true);
    let mut expected = vec![];
    // All but one of the crew.
    for (n, page) in pages[..WORKERS - 1].iter().enumerate() {
        expected.push(answer(send_read(&kernel, n), page));
        disk.wait_for(READS, n + 1);
        let page = noise(100 + n as u64, 20);
        assert_eq!(kernel.write(1 << 20, &page), Ok(page.len() as u32));
        assert_eq!(kernel.read(1 << 20, page.len() as u32), Ok(page));
        kernel.expect_quiet();
    }
    disk.hold(READS, false);
    expect_replies(&kernel, expected);
    kernel.expect_quiet();
}

#[test]
fn one_never_waits_for_the_disk_and_the_first_to_be_free_goes_on() {
    let disk = Held::new();
    let kernel = Kernel::with_disk(1 << 30, disk.clone());
    let pages = on_disk(&kernel, 8);
    for _ in 0..20 {
        disk.hold(READS, true);
        let expected: Vec<_> = pages.iter().enumerate().map(|(n, page)| answer(send_read(&kernel, n), page)).collect();
        disk.wait_for(READS, WORKERS - 1);
        // What is not on the disk does not wait for those that are left, nor does what is written.
        let page = noise(100, 20);
        assert_eq!(kernel.write(1 << 20, &page), Ok(page.len() as u32));
        assert_eq!(kernel.read(1 << 20, page.len() as u32), Ok(page));
        assert_eq!(kernel.read(8 * 4096, 4096), Ok(vec![0; PAGE_SIZE]));
        disk.wait_for(READS, WORKERS - 1);
        disk.hold(READS, false);
        expect_replies(&kernel, expected);
    }
    kernel.expect_quiet();
}

/// A READ of several pages gives the lead away once, whatever the number of its pages that lie on the disk.
#[test]
fn a_read_of_many_pages_on_the_disk_is_answered_whole() {
    let kernel = Kernel::with_disk(1 << 30, Held::new());
    let pages = on_disk(&kernel, 32);
    for _ in 0..20 {
        assert_eq!(kernel.read(0, 32 * 4096), Ok(pages.concat()));
    }
    kernel.expect_quiet();
}

#[test]
fn a_page_that_the_disk_cannot_read_is_an_error_of_its_request() {
    let kernel = Kernel::with_disk(1 << 30, Faults::new(MemoryDisk::new(DISK), "read:1:eio").expect("valid"));
    let pages = on_disk(&kernel, 2);
    assert_eq!(kernel.read(0, 4096), Err(libc::EIO));
    assert_eq!(kernel.read(4096, 4096).as_ref(), Ok(&pages[1]));
    assert_eq!(kernel.read(0, 4096).as_ref(), Ok(&pages[0]), "it may be readable another time");
}

/// It is of another page, that shares its lock with one that is read from the disk. (The swap file has more locks than
/// pages, so that it is of the same one here.)
#[test]
fn a_write_or_a_punch_that_meets_a_read_of_the_disk_keeps_nobody_waiting() {
    let disk = Held::new();
    let kernel = Kernel::with_disk(1 << 30, disk.clone());
    let pages = on_disk(&kernel, 2);
    disk.hold(READS, true);
    let mut expected = vec![answer(send_read(&kernel, 0), &pages[0])];
    disk.wait_for(READS, 1);
    let (write, punch, page) = (next_unique(), next_unique(), noise(7, 1));
    kernel.send(&request(opcode::WRITE, write, NODEID, &write_arguments(0, 4096, &page)));
    let hole = arguments(32, &[(16, &4096u64.to_ne_bytes()), (24, &3u32.to_ne_bytes())]);
    kernel.send(&request(opcode::FALLOCATE, punch, NODEID, &hole));
    for _ in 0..20 {
        assert_eq!(kernel.read(8 * 4096, 4096), Ok(vec![0; PAGE_SIZE]));
    }
    disk.hold(READS, false);
    expected.push(answer(write, &[4096u32.to_ne_bytes(), [0; 4]].concat()));
    expected.push(answer(punch, &[]));
    expect_replies(&kernel, expected);
    assert_eq!(kernel.read(0, 4096), Ok(vec![0; PAGE_SIZE]));
    kernel.expect_quiet();
}

/// Pages of the pool that is full, and of what is written to it.
const FULL: usize = 48;
const MORE: usize = 256;

#[test]
fn a_write_waits_until_the_shrinker_has_made_room_and_reads_do_not() {
    let disk = Held::new();
    let kernel = Kernel::with_disk(FULL as u64 * PAGE_SIZE as u64, disk.clone());
    let metrics = kernel.shared.engine.store().metrics();
    disk.hold(WRITES, true);
    let (unique, data) = (next_unique(), noise(1, MORE));
    kernel.send(&request(opcode::WRITE, unique, NODEID, &write_arguments(0, data.len() as u32, &data)));
    wait_until("the pool is full", || metrics.stores_waited_for_room.get() > 0);
    assert_eq!(kernel.read(0, 4096).as_deref(), Ok(&data[..4096]));
    assert_eq!(kernel.read(SIZE - 4096, 4096), Ok(vec![0; 4096]));
    assert_eq!(metrics.rejected_pool_full.get(), 0);
    disk.hold(WRITES, false);
    assert_eq!(kernel.reply(), answer(unique, &[(data.len() as u32).to_ne_bytes(), [0; 4]].concat()));
    assert!(metrics.pages_written_back.get() >= (MORE - FULL) as u64);
    assert_eq!(metrics.stores.get(), MORE as u64, "a page was stored twice");
    assert!(metrics.stores_waited_for_room.get() <= MORE as u64, "a page that is tried again is counted again");
    for (n, part) in data.chunks(128 << 10).enumerate() {
        assert_eq!(kernel.read(n as u64 * (128 << 10), part.len() as u32).as_deref(), Ok(part));
    }
    kernel.expect_quiet();
}

#[test]
fn a_write_to_a_full_pool_fails_when_the_disk_does() {
    let disk = Faults::new(MemoryDisk::new(DISK), "write:2-:eio").expect("valid");
    let kernel = Kernel::with_disk(FULL as u64 * PAGE_SIZE as u64, disk);
    let data = noise(1, MORE);
    assert_eq!(kernel.write(0, &data), Err(libc::ENOSPC));
    let pages: Vec<_> = (0..MORE).map(|n| kernel.read((n * PAGE_SIZE) as u64, 4096)).collect();
    for (page, written) in pages.iter().zip(data.chunks(4096)) {
        assert!(*page == Ok(written.to_vec()) || *page == Err(libc::EIO), "neither what was written nor an error");
    }
    assert!(pages.iter().filter(|page| page.is_ok()).count() >= FULL / 2);
    assert!(kernel.shared.engine.store().backing().is_some_and(|backing| backing.is_failed()));
    kernel.expect_quiet();
}
