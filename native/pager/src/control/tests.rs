//! The control socket as anybody may use it: every command is answered once, and nobody keeps others from theirs.

use super::*;
use crate::testing::*;
use proptest::prelude::*;
use std::path::PathBuf;
use zswapd_core::backing::{Disk, Faults, MemoryDisk};
use zswapd_fuse::swapfile::NODEID;
use zswapd_fuse::wire::opcode;

/// A pager that answers commands until the process ends, or until `stop`.
struct Control {
    shared: std::sync::Arc<Shared>,
    path: PathBuf,
    kernel: std::sync::Arc<Kernel>,
    serving: Option<std::thread::JoinHandle<()>>,
}

impl Control {
    fn new() -> Control {
        Control::of(Kernel::new())
    }

    fn of(kernel: Kernel) -> Control {
        let kernel = std::sync::Arc::new(kernel);
        let serving = {
            let kernel = kernel.clone();
            std::thread::spawn(move || serve(&kernel.listener, &kernel.shared))
        };
        Control { shared: kernel.shared.clone(), path: kernel.path.clone(), kernel, serving: Some(serving) }
    }

    /// Waits until commands are answered no more.
    fn join(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.join().expect("no panic");
        }
    }

    fn connect(&self) -> OwnedFd {
        let socket = zswapd_keeper::socket::connect(&self.path).expect("connected");
        set_patience(&socket);
        socket
    }

    /// What a command is answered; empty if the connection is closed instead.
    fn ask(&self, command: &[u8]) -> String {
        let socket = self.connect();
        send_message(&socket, command);
        let answer = receive(&socket).expect("an answer in time");
        if !answer.is_empty() {
            assert_eq!(receive(&socket), Some(vec![]), "more than one answer");
        }
        String::from_utf8(answer).expect("text")
    }

    fn expect_alive(&self) {
        assert!(self.ask(b"status").starts_with("ok pid="));
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.shared.closer.close();
        self.join();
    }
}

fn send_message(socket: &OwnedFd, message: &[u8]) {
    crate::testing::send(socket, message);
}

fn refused(answer: &str) -> bool {
    answer.starts_with(&format!("error {} ", libc::EINVAL))
}

#[test]
fn commands_are_answered() {
    let control = Control::new();
    assert!(control.ask(b"status").contains(" opens=0 "));
    assert_eq!(control.ask(b"mem-limit 1048576").trim(), "ok");
    assert_eq!(control.shared.engine.store().pool().limit_bytes(), 1 << 20);
    assert_eq!(control.ask(b" compression\tzstd 9\n").trim(), "ok");
    assert_eq!(control.shared.engine.compression().zstd_level, 9);
    assert_eq!(control.ask(b"counters"), "ok");
    assert_eq!(control.ask(b"reset").trim(), "ok");
}

#[test]
fn what_is_no_command_changes_nothing() {
    let control = Control::new();
    let before = control.shared.engine.compression();
    for wrong in [
        &b" "[..],
        b"\0",
        b"\xff\xfe\x80",
        b"status now",
        b"STATUS",
        b"stop\0",
        b"compression lz4",
        b"compression lzo 3",
        b"compression zstd 23",
        b"compression zstd 99999999999999999999",
        b"mem-limit",
        b"mem-limit -1",
        b"mem-limit 1M",
        b"mem-limit 18446744073709551616",
        b"mem-limit 4096 4096",
        b"status\nstop",
        b"mem-limit 4096\nreset",
    ] {
        let answer = control.ask(wrong);
        assert!(refused(&answer), "{:?}: {answer}", String::from_utf8_lossy(wrong));
    }
    assert_eq!(control.shared.engine.compression(), before);
    assert_eq!(control.shared.engine.store().pool().limit_bytes(), 1 << 30);
    control.expect_alive();
}

#[test]
fn numbers_out_of_range_change_nothing_and_the_range_is_said() {
    let control = Control::new();
    for number in ["-1", "0", "4095", "1099511627777", "18446744073709551615", "18446744073709551616", "+", "0x1000"] {
        let answer = control.ask(format!("mem-limit {number}").as_bytes());
        assert!(refused(&answer) && answer.ends_with("from 4096 to 1099511627776"), "{answer}");
    }
    for level in ["-1", "0", "23", "256", "4294967297", "99999999999999999999", "3.0"] {
        for name in ["lz4", "zstd"] {
            let answer = control.ask(format!("compression {name} {level}").as_bytes());
            assert!(refused(&answer) && answer.ends_with("from 1 to 22"), "{answer}");
        }
    }
    assert_eq!(control.shared.engine.store().pool().limit_bytes(), 1 << 30);
    assert_eq!(control.shared.engine.compression().zstd_level, 1);
    for limit in [4096u64, 1 << 40] {
        assert_eq!(control.ask(format!("mem-limit {limit}").as_bytes()).trim(), "ok");
        assert_eq!(control.shared.engine.store().pool().limit_bytes(), limit);
    }
}

/// Cut off after 512 bytes, each of these would be a command.
#[test]
fn a_part_of_a_command_is_no_command() {
    let control = Control::new();
    for command in ["stop", "reset", "mem-limit 4096", "compression zstd 9"] {
        for length in [513, 600, 5000, 100_000] {
            let message = [command.as_bytes(), &vec![b' '; length - command.len() - 1], b"x"].concat();
            assert!(refused(&control.ask(&message)), "{command} of {length} bytes");
        }
    }
    assert_eq!(control.ask(&[b"status".as_slice(), &[b' '; 506]].concat()).split('=').next(), Some("ok pid"));
    assert_eq!(control.shared.engine.store().pool().limit_bytes(), 1 << 30);
}

#[test]
fn an_empty_message_is_answered_with_the_end() {
    let control = Control::new();
    assert_eq!(control.ask(b""), "");
    control.expect_alive();
}

#[test]
fn a_connection_carries_one_command() {
    let control = Control::new();
    let socket = control.connect();
    send_message(&socket, b"mem-limit 8192");
    // The connection may be closed before this one is sent; closed with it unread, it is reset.
    let second = b"mem-limit 4096";
    // SAFETY: the message is valid for its length.
    unsafe { libc::send(socket.as_raw_fd(), second.as_ptr().cast(), second.len(), libc::MSG_NOSIGNAL) };
    let answers = (0..3).filter_map(|_| receive(&socket)).filter(|answer| !answer.is_empty()).count();
    assert!(answers <= 1, "the second command was answered");
    control.expect_alive();
    assert_eq!(control.shared.engine.store().pool().limit_bytes(), 8192);
}

#[test]
fn who_says_nothing_keeps_nobody_waiting() {
    let control = Control::new();
    let silent: Vec<OwnedFd> = (0..=SILENT).map(|_| control.connect()).collect();
    // The oldest had to make room for the newest; the others are still listened to.
    assert_eq!(receive(&silent[0]), Some(vec![]), "not closed");
    control.expect_alive();
    send_message(&silent[SILENT], b"status");
    assert!(receive(&silent[SILENT]).expect("an answer in time").starts_with(b"ok pid="));
}

#[test]
fn who_goes_away_takes_nobody_along() {
    let control = Control::new();
    drop(control.connect());
    for command in [&b"mem-limit 8192"[..], b"status", b"relay", b"no command"] {
        send_message(&control.connect(), command);
    }
    control.expect_alive();
    assert_eq!(control.shared.engine.store().pool().limit_bytes(), 8192, "what was asked is done");
}

#[test]
fn nothing_is_dropped_while_the_swap_file_is_open() {
    let mut control = Control::new();
    let busy = format!("error {} ", libc::EBUSY);
    assert_eq!(control.kernel.ask(opcode::OPEN, &[0; 8]).map(|payload| payload.len()), Ok(16));
    assert_eq!(control.kernel.write(0, &noise(1, 1)), Ok(4096));
    for command in [&b"reset"[..], b"stop"] {
        assert!(control.ask(command).starts_with(&busy));
    }
    assert_eq!(control.kernel.read(0, 4096), Ok(noise(1, 1)));
    assert_eq!(control.kernel.ask(opcode::RELEASE, &[0; 24]), Ok(vec![]));
    control.kernel.expect_quiet();
    assert_eq!(control.ask(b"reset").trim(), "ok");
    assert_eq!(control.kernel.read(0, 4096), Ok(vec![0; 4096]));
    assert_eq!(control.ask(b"stop"), "ok objects=0 pages=0 writebacks=0 cleanings=0");
    control.join();
}

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
    let control = with_disk(Faults::new(memory(), "read:13:eio").expect("valid"), 128);
    assert_eq!(control.ask(b"sample 10"), "ok pages=0");
    assert!(control.ask(b"writeback all").starts_with("ok pages=128 "));
    assert_eq!(control.ask(b"sample 10"), "ok pages=10");
    assert!(control.ask(b"sample 4096").starts_with(&format!("error {} page ", libc::EIO)));
    assert_eq!(control.ask(b"sample 4096"), "ok pages=128");
    let metrics = control.shared.engine.store().metrics();
    assert_eq!((metrics.pages_on_disk.get(), metrics.pages_lost.get(), metrics.disk_read_errors.get()), (128, 0, 0));
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

proptest! {
    #[test]
    fn any_message_is_answered_once(message in prop::collection::vec(any::<u8>(), 1..1200)) {
        thread_local! {
            static CONTROL: Control = Control::new();
        }
        CONTROL.with(|control| {
            let answer = control.ask(&message);
            assert!(refused(&answer), "{answer}");
        });
    }
}

/// All words that commands are made of, but `stop`.
const KNOWN: &[&str] =
    &["status", "counters", "relay", "mem-limit", "compression", "compact", "reset", "drain", "lz4", "zstd"];

/// Almost commands, and commands.
fn words() -> impl Strategy<Value = Vec<String>> {
    let number = prop_oneof![
        any::<i128>().prop_map(|number| number.to_string()),
        (0u32..70).prop_map(|shift| (1u128 << shift).to_string()),
        (-2i64..30).prop_map(|number| number.to_string()),
        "[-+0-9a-fx.eE]{0,24}",
    ];
    let name = prop::sample::select(KNOWN).prop_map(String::from);
    let word = prop_oneof![2 => name.clone(), 2 => number.clone(), 1 => "\\PC{0,12}"];
    prop_oneof![
        prop::collection::vec(word, 1..5),
        number.clone().prop_map(|number| vec!["mem-limit".into(), number]),
        (name, number).prop_map(|(name, number)| vec!["compression".into(), name, number]),
    ]
}

proptest! {
    #[test]
    fn whatever_the_words_the_answer_is_one_and_the_settings_stay_in_range(words in words()) {
        thread_local! {
            static CONTROL: Control = Control::new();
        }
        CONTROL.with(|control| {
            let command = words.join(" ");
            prop_assume!(command.split_whitespace().next() != Some("stop") && !command.is_empty());
            let answer = control.ask(command.as_bytes());
            assert!(answer.starts_with("ok") || answer.starts_with("error "), "{command:?}: {answer}");
            let engine = &control.shared.engine;
            assert!((4096..=1 << 40).contains(&engine.store().pool().limit_bytes()), "{command:?}");
            assert!((1..=22).contains(&engine.compression().zstd_level), "{command:?}");
            Ok(())
        })?;
    }
}
