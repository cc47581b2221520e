//! Commands about the backing disk, which the test has in its hand.

use super::tests::*;
use crate::testing::*;
use zswapd_core::backing::{Disk, Faults, MemoryDisk};
use zswapd_fuse::swapfile::NODEID;
use zswapd_fuse::wire::opcode;

/// A pager with a disk, and so many pages in its pool.
fn with_disk(disk: impl Disk + 'static, pages: usize) -> Control {
    let control = Control::of(Kernel::with_disk(1 << 30, disk));
    assert_eq!(control.kernel.write(0, &noise(1, pages)), Ok(pages as u32 * 4096));
    control
}

fn memory() -> MemoryDisk {
    MemoryDisk::new(DISK)
}

#[test]
fn pages_are_written_back_as_told() {
    let control = with_disk(memory(), 16);
    let (store, done) = (control.shared.engine.store(), |answer: String, pages: u64| {
        let expected = format!("ok pages={pages} bytes=");
        assert!(answer.starts_with(&expected) && answer.ends_with(" end=done"), "{answer}");
    });
    assert_eq!(control.ask(b"idle 3600"), "ok pages=0");
    done(control.ask(b"writeback idle"), 0);
    done(control.ask(b"writeback page 3"), 1);
    done(control.ask(b"writeback page 3"), 0);
    assert_eq!(control.ask(b"idle all"), "ok pages=15");
    assert_eq!(control.kernel.read(0, 4096), Ok(noise(1, 1)));
    done(control.ask(b"writeback idle"), 14);
    let compressible: Vec<u8> = (0..4096).map(|n| (n / 9) as u8).collect();
    assert_eq!(control.kernel.write(1 << 20, &compressible), Ok(4096));
    done(control.ask(b"writeback huge_idle"), 0);
    done(control.ask(b"writeback unused 3600"), 0);
    done(control.ask(b"writeback huge"), 1);
    done(control.ask(b"writeback all"), 1);
    assert_eq!((store.metrics().pages_on_disk.get(), store.metrics().pool_bytes.get()), (17, 0));
    assert_eq!(control.kernel.read(0, 16 * 4096), Ok(noise(1, 16)));
}

#[test]
fn the_pool_shrinks_by_as_much_as_told() {
    let control = with_disk(memory(), 64);
    let answer = control.ask(b"shrink 65536");
    assert!(answer.starts_with("ok pages=") && answer.ends_with(" end=done"), "{answer}");
    let pages = control.shared.engine.store().metrics().pages_on_disk.get();
    assert!((8..32).contains(&pages), "{pages} of 64 pages");
}

#[test]
fn the_limit_and_the_disk_end_a_writeback_early() {
    let control = with_disk(memory(), 128);
    assert_eq!(control.ask(b"writeback-limit 4096").trim(), "ok");
    assert_eq!(control.ask(b"writeback all"), "ok pages=0 bytes=0 end=budget");
    let left = || control.shared.engine.store().metrics().writeback_budget_bytes.get();
    for (command, bytes) in [("+4096", 8192), ("none", u64::MAX), ("+4096", 4096), ("none", u64::MAX)] {
        assert_eq!(control.ask(format!("writeback-limit {command}").as_bytes()).trim(), "ok");
        assert_eq!(left(), bytes);
    }
    assert!(control.ask(b"writeback all").starts_with("ok pages=128 "));

    let control = with_disk(Faults::new(memory(), "write:1-:eio").expect("valid"), 8);
    assert_eq!(control.ask(b"writeback all"), "ok pages=0 bytes=0 end=failed");
    assert!(control.shared.disk_trouble.say(), "not in the log");
    assert_eq!(control.kernel.read(0, 8 * 4096), Ok(noise(1, 8)));
}

#[test]
fn a_disk_that_was_away_is_written_to_again_when_told_and_by_itself() {
    let is_failed = |control: &Control| control.shared.engine.store().backing().expect("a disk").is_failed();
    for told in [true, false] {
        let control = with_disk(Faults::new(memory(), "write:1-3:eio").expect("valid"), 8);
        while !is_failed(&control) {
            assert_eq!(control.ask(b"writeback all"), "ok pages=0 bytes=0 end=failed");
        }
        if told {
            assert_eq!(control.ask(b"writeback resume"), "ok pages=0 bytes=0 end=done");
            assert!(!is_failed(&control));
        }
        let deadline = std::time::Instant::now() + crate::testing::PATIENCE;
        while is_failed(&control) {
            assert!(std::time::Instant::now() < deadline, "it was not tried again");
            std::thread::yield_now();
        }
        assert!(control.ask(b"writeback all").starts_with("ok pages=8 "));
    }
}

#[test]
fn a_disk_that_is_not_well_yet_is_not_said_to_be() {
    let control = with_disk(Faults::new(memory(), "write:1-:eio").expect("valid"), 8);
    assert_eq!(control.ask(b"writeback resume"), "ok pages=0 bytes=0 end=done", "it has not failed");
    let metrics = control.shared.engine.store().metrics();
    while metrics.backing_state.get() != 2 {
        assert_eq!(control.ask(b"writeback all"), "ok pages=0 bytes=0 end=failed");
    }
    let failed = format!("error {} the backing disk cannot be written", libc::EIO);
    assert!(control.ask(b"writeback resume").starts_with(&failed));
    assert_eq!(metrics.backing_state.get(), 2);
    assert_eq!(control.ask(b"writeback-limit 4096").trim(), "ok");
    assert!(control.ask(b"writeback resume").starts_with(&format!("error {} the budget", libc::ENOSPC)));
}

#[test]
fn a_sample_of_the_disk_is_read_and_nothing_moves() {
    let control = with_disk(Faults::new(memory(), "read:13:eio").expect("valid"), 130);
    assert_eq!(control.ask(b"sample 10"), "ok pages=0");
    assert!(control.ask(b"writeback all").starts_with("ok pages=130 "));
    assert_eq!(control.ask(b"sample 10"), "ok pages=10");
    assert!(control.ask(b"sample 4096").starts_with(&format!("error {} page ", libc::EIO)));
    assert_eq!(control.ask(b"sample 4096"), "ok pages=130");
    let metrics = control.shared.engine.store().metrics();
    assert_eq!((metrics.pages_on_disk.get(), metrics.pages_lost.get(), metrics.disk_read_errors.get()), (130, 0, 0));
    for wrong in ["sample", "sample 0", "sample 4097", "sample all"] {
        assert!(refused(&control.ask(wrong.as_bytes())), "{wrong}");
    }
}

#[test]
fn what_is_under_way_can_be_seen() {
    let disk = Held::new();
    let control = with_disk(disk.clone(), 8);
    assert!(control.ask(b"writeback all").starts_with("ok pages=8 "));
    let metrics = control.shared.engine.store().metrics();
    disk.hold(READS, true);
    std::thread::scope(|scope| {
        let read = scope.spawn(|| control.kernel.read(0, 4096));
        disk.wait_for(READS, 1);
        assert_eq!(metrics.page_operations.get(), 1);
        disk.hold(READS, false);
        assert!(read.join().expect("no panic").is_ok());
    });
    let deadline = std::time::Instant::now() + crate::testing::PATIENCE;
    while metrics.page_operations.get() > 0 {
        assert!(std::time::Instant::now() < deadline, "it is over");
        std::thread::yield_now();
    }
}

#[test]
fn thresholds_and_promotion_are_set() {
    let control = with_disk(memory(), 8);
    for command in [&b"accept-threshold 50"[..], b"accept-threshold 100", b"promote off", b"promote on"] {
        assert_eq!(control.ask(command).trim(), "ok");
    }
    let on_disk = || control.shared.engine.store().metrics().pages_on_disk.get();
    assert_eq!(control.ask(b"promote off").trim(), "ok");
    assert!(control.ask(b"writeback all").starts_with("ok pages=8 "));
    assert!(control.kernel.read(0, 4096).is_ok());
    assert_eq!(on_disk(), 8);
    assert_eq!(control.ask(b"promote on").trim(), "ok");
    assert!(control.kernel.read(0, 4096).is_ok());
    assert_eq!(on_disk(), 7);
    // Who has switched it off may have died: the next zswapd begins anew.
    assert_eq!(control.ask(b"promote off").trim(), "ok");
    assert_eq!(control.ask(b"relay").trim(), "ok");
    assert!(control.kernel.read(4096, 4096).is_ok());
    assert_eq!(on_disk(), 6);
}

#[test]
fn what_is_no_writeback_is_refused() {
    let control = with_disk(memory(), 1);
    for wrong in [
        "idle",
        "idle -1",
        "idle soon",
        "writeback",
        "writeback none",
        "writeback page",
        "writeback unused",
        "writeback unused soon",
        "writeback huge_idle now",
        "writeback page -1",
        "writeback page 1024",
        "writeback page 4294967296",
        "writeback resume now",
        "writeback all now",
        "shrink",
        "shrink 10%",
        "writeback-limit",
        "writeback-limit 1G",
        "writeback-limit ++1",
        "writeback-limit -1",
        "accept-threshold 0",
        "accept-threshold 101",
        "accept-threshold 90%",
        "promote",
        "promote maybe",
    ] {
        let answer = control.ask(wrong.as_bytes());
        assert!(refused(&answer), "{wrong}: {answer}");
    }
    assert_eq!(control.shared.engine.store().metrics().pages_on_disk.get(), 0);
}

#[test]
fn without_a_disk_there_is_no_writeback() {
    let control = Control::new();
    let none = format!("error {} ", libc::ENODEV);
    for command in [
        "idle all",
        "writeback all",
        "writeback resume",
        "sample 10",
        "writeback page 1",
        "shrink 4096",
        "writeback-limit none",
        "accept-threshold 90",
        "promote on",
    ] {
        let answer = control.ask(command.as_bytes());
        assert!(answer.starts_with(&none), "{command}: {answer}");
    }
}

#[test]
fn a_writeback_keeps_no_other_command_waiting_but_the_next_one_and_ends_with_paging() {
    let disk = Held::new();
    let mut control = with_disk(disk.clone(), 128);
    disk.hold(WRITES, true);
    let waiting = control.connect();
    send_message(&waiting, b"writeback all");
    disk.wait_for(WRITES, 1);
    control.expect_alive();
    assert!(control.ask(b"writeback idle").starts_with(&format!("error {} ", libc::EBUSY)));
    let drained = control.ask(b"drain");
    assert!(drained.ends_with(" writebacks=1 cleanings=0"), "{drained}");
    let stopping = control.connect();
    send_message(&stopping, b"stop");
    control.expect_alive();
    assert_eq!(receive_now(&stopping), None, "stopped in the middle of a writeback");
    disk.hold(WRITES, false);
    let swept = String::from_utf8(receive(&waiting).expect("an answer")).expect("text");
    // Nothing, if the pager was gone first.
    assert!(swept.is_empty() || swept.ends_with(" end=stopped"), "{swept}");
    assert_eq!(receive(&stopping).as_deref(), Some(&b"ok objects=0 pages=0 writebacks=0 cleanings=0"[..]));
    control.join();
}

#[test]
fn paging_ends_after_the_last_read_of_the_disk() {
    let disk = Held::new();
    let control = with_disk(disk.clone(), 1);
    assert!(control.ask(b"writeback all").starts_with("ok pages=1 "));
    disk.hold(READS, true);
    control.kernel.send(&request(opcode::READ, 2, NODEID, &arguments(40, &[(16, &4096u32.to_ne_bytes())])));
    disk.wait_for(READS, 1);
    let drained = control.connect();
    send_message(&drained, b"drain");
    control.expect_alive();
    assert_eq!(receive_now(&drained), None, "a request is under way");
    disk.hold(READS, false);
    assert_eq!(control.kernel.reply(), crate::testing::Reply { unique: 2, errno: 0, payload: noise(1, 1) });
    assert!(receive(&drained).expect("an answer in time").starts_with(b"ok objects="));
}
