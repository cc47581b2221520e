//! The control socket as anybody may use it: every command is answered once, and nobody keeps others from theirs.

use super::*;
use crate::testing::*;
use proptest::prelude::*;
use std::path::PathBuf;
use zswapd_fuse::wire::opcode;

/// A pager that answers commands until the process ends, or until `stop`.
pub(super) struct Control {
    pub(super) shared: std::sync::Arc<Shared>,
    path: PathBuf,
    pub(super) kernel: std::sync::Arc<Kernel>,
    serving: Option<std::thread::JoinHandle<()>>,
}

impl Control {
    pub(super) fn new() -> Control {
        Control::of(Kernel::new())
    }

    pub(super) fn of(kernel: Kernel) -> Control {
        let kernel = std::sync::Arc::new(kernel);
        let serving = {
            let kernel = kernel.clone();
            std::thread::spawn(move || serve(&kernel.listener, &kernel.shared))
        };
        Control { shared: kernel.shared.clone(), path: kernel.path.clone(), kernel, serving: Some(serving) }
    }

    /// Waits until commands are answered no more.
    pub(super) fn join(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.join().expect("no panic");
        }
    }

    pub(super) fn connect(&self) -> OwnedFd {
        let socket = zswapd_keeper::socket::connect(&self.path).expect("connected");
        set_patience(&socket);
        socket
    }

    /// What a command is answered; empty if the connection is closed instead.
    pub(super) fn ask(&self, command: &[u8]) -> String {
        let socket = self.connect();
        send_message(&socket, command);
        let answer = receive(&socket).expect("an answer in time");
        if !answer.is_empty() {
            assert_eq!(receive(&socket), Some(vec![]), "more than one answer");
        }
        String::from_utf8(answer).expect("text")
    }

    pub(super) fn expect_alive(&self) {
        assert!(self.ask(b"status").starts_with("ok pid="));
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.shared.closer.close();
        self.join();
    }
}

pub(super) fn send_message(socket: &OwnedFd, message: &[u8]) {
    crate::testing::send(socket, message);
}

pub(super) fn refused(answer: &str) -> bool {
    answer.starts_with(&format!("error {} ", libc::EINVAL))
}

#[test]
fn commands_are_answered() {
    let control = Control::new();
    assert!(control.ask(b"status").contains(" opens=0 "));
    assert!(control.ask(b"status").ends_with(" zswapd=0"));
    let _relay = control.shared.relay.connect(control.shared.session()).expect("nobody else is connected");
    assert!(control.ask(b"status").ends_with(" zswapd=1"));
    assert_eq!(control.ask(b"mem-limit 1048576").trim(), "ok");
    assert_eq!(control.shared.engine.store().pool().limit_bytes(), 1 << 20);
    assert_eq!(control.ask(b" compression\tzstd 9\n").trim(), "ok");
    assert_eq!(control.shared.engine.compression().zstd_level, 9);
    assert_eq!(control.ask(b"counters"), "ok");
    assert_eq!(control.ask(b"reset").trim(), "ok");
}

/// As `Control::ask`, with a descriptor, and the one that comes back.
fn ask_with(control: &Control, command: &str, given: Option<&OwnedFd>) -> (String, Option<OwnedFd>) {
    let socket = control.connect();
    let given = given.map(std::os::fd::AsFd::as_fd);
    zswapd_keeper::socket::send_with_descriptor(&socket, command.as_bytes(), given).expect("sent");
    let mut room = [0; 512];
    let (length, found) = zswapd_keeper::socket::receive_with_descriptor(&socket, &mut room).expect("an answer");
    (String::from_utf8_lossy(&room[..length]).into_owned(), found)
}

#[test]
fn pages_that_nobody_uses_are_recompressed_as_told() {
    use std::os::unix::fs::FileExt;
    let control = Control::new();
    // One is read, and of the others one of four is in the sample.
    let pages: Vec<u8> = noise(1, 33).iter().map(|byte| byte & 0x3f).collect();
    assert_eq!(control.kernel.write(0, &pages), Ok(33 * 4096));
    (0..3).for_each(|_| assert_eq!(control.ask(b"tick").trim(), "ok"));
    assert_eq!(control.kernel.read(0, 4096), Ok(pages[..4096].to_vec()));
    let answer = control.ask(b"recompress 1 zstd 3 4 1000 1000000");
    assert!(answer.starts_with("ok looked=512 recompressed=0 ") && answer.ends_with(" end=done"), "{answer}");
    let answer = control.ask(b"recompress 1 zstd 3 3 5 1000000");
    assert!(answer.contains(" recompressed=5 ") && answer.ends_with(" end=budget"), "{answer}");
    assert!(control.ask(b"recompress 1 dictionary 9 0 5 1000000").starts_with(&format!("error {} ", libc::ENOENT)));
    let (answer, sample) = ask_with(&control, "sample-pool 3 8", None);
    assert_eq!(answer, "ok pages=8");
    let sample = std::fs::File::from(sample.expect("a file"));
    let mut bytes = vec![0; 8 * 4096];
    sample.read_exact_at(&mut bytes, 0).expect("so many pages");
    assert!(bytes.chunks(4096).all(|page| pages.chunks(4096).any(|other| page == other)));
    assert!(refused(&control.ask(b"dictionary")));
    let sample = OwnedFd::from(sample);
    assert_eq!(ask_with(&control, "dictionary", Some(&sample)).0, "ok serial=1");
    let answer = control.ask(b"recompress 2 dictionary 9 0 1000 10000000");
    assert!(answer.ends_with(" end=done"), "{answer}");
    let metrics = control.shared.engine.store().metrics();
    // Those that are in the dictionary, at least.
    assert!(metrics.pages_zstd_dictionary.get() >= 8, "{answer}");
    let status = control.ask(b"status");
    assert!(status.starts_with("ok "), "{status}");
    assert_eq!(metrics.dictionaries[1].serial.get(), 1);
    assert_eq!(control.kernel.read(0, 16 * 4096), Ok(pages[..16 * 4096].to_vec()));
}

#[test]
fn pages_that_are_alike_are_shared_if_that_is_said() {
    let control = Control::new();
    let pages = noise(1, 1).repeat(9);
    assert_eq!(control.kernel.write(0, &pages), Ok(9 * 4096));
    let answer = control.ask(b"recompress 1 zstd 3 0 1000 10000000");
    assert!(answer.contains(" shared=0 "), "{answer}");
    let answer = control.ask(b"recompress 2 zstd 3 0 1000 10000000 share");
    assert!(answer.contains(" shared=8 "), "{answer}");
    assert_eq!(control.kernel.read(0, 9 * 4096), Ok(pages));
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
        b"tick 1",
        b"recompress 0 zstd 3 1 1 1",
        b"recompress 4 zstd 3 1 1 1",
        b"recompress 1 lzo 3 1 1 1",
        b"recompress 1 zstd 13 1 1 1",
        b"recompress 1 zstd 3 64 1 1",
        b"recompress 1 zstd 3 1 1",
        b"recompress 1 zstd 3 1 1 1 1",
        b"recompress 1 zstd 3 1 1 1 share share",
        b"sample-pool 1",
        b"sample-pool 1 0",
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
