//! What is not on the swap file, with the test in the places of both the kernel and pyfuse3.

use super::socket_pair;
use crate::testing::*;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::SeqCst;
use zswapd_core::session::MAX_INIT;
use zswapd_fuse::init::MAX_WRITE;
use zswapd_fuse::swapfile::NODEID;
use zswapd_fuse::wire::{opcode, u32_at, u64_at, RESENT};

const ROOT: u64 = 1;
/// Splice and the writeback cache, which pyfuse3 must not see.
const HIDDEN: u32 = 1 << 7 | 1 << 9 | 1 << 16;

fn connect(kernel: &Kernel) -> OwnedFd {
    let peer = kernel.shared.relay.connect(kernel.shared.session()).expect("nobody else is connected");
    set_patience(&peer);
    peer
}

/// A request on the root directory, sent; returns its name.
fn look_up(kernel: &Kernel) -> u64 {
    let unique = next_unique();
    kernel.send(&request(opcode::LOOKUP, unique, ROOT, b"stats.json\0"));
    unique
}

fn reply(unique: u64, errno: i32, payload: &[u8]) -> Vec<u8> {
    let length = (16 + payload.len()) as u32;
    let fields: [(usize, &[u8]); 3] =
        [(0, &length.to_ne_bytes()), (4, &(-errno).to_ne_bytes()), (8, &unique.to_ne_bytes())];
    [&arguments(16, &fields)[..], payload].concat()
}

#[track_caller]
fn expect_error(kernel: &Kernel, unique: u64, errno: i32) {
    assert_eq!(kernel.reply(), Reply { unique, errno, payload: vec![] });
}

#[test]
fn requests_and_replies_pass_unchanged() {
    let kernel = Kernel::new();
    let peer = connect(&kernel);
    for (opcode, nodeid, length) in
        [(opcode::LOOKUP, ROOT, 11), (opcode::READ, 3, 40), (opcode::WRITE, 5, 8000), (999, u64::MAX, 0)]
    {
        let unique = next_unique();
        let message = request(opcode, unique, nodeid, &noise(unique, 2)[..length]);
        kernel.send(&message);
        assert_eq!(receive(&peer).as_ref(), Some(&message));
        let payload = noise(unique + 1, 50);
        send(&peer, &reply(unique, 0, &payload));
        assert_eq!(kernel.reply(), Reply { unique, errno: 0, payload });
    }
    kernel.expect_quiet();
}

#[test]
fn what_wants_no_reply_gets_none() {
    let kernel = Kernel::new();
    let silent = [opcode::FORGET, opcode::BATCH_FORGET, opcode::INTERRUPT];
    let messages = silent.map(|opcode| [ROOT, NODEID].map(|nodeid| request(opcode, next_unique(), nodeid, &[1; 24])));
    messages.as_flattened().iter().for_each(|message| kernel.send(message));
    kernel.expect_quiet();
    let peer = connect(&kernel);
    for message in messages.as_flattened() {
        kernel.send(message);
        assert_eq!(receive(&peer).as_ref(), Some(message));
    }
    kernel.expect_quiet();
    drop(peer);
    kernel.expect_quiet();
}

#[test]
fn without_pyfuse3_the_answer_is_try_again_and_pages_are_served() {
    let kernel = Kernel::new();
    expect_error(&kernel, look_up(&kernel), libc::EAGAIN);
    let peer = connect(&kernel);
    let second = kernel.shared.relay.connect(kernel.shared.session());
    assert_eq!(second.expect_err("one at a time").raw_os_error(), Some(libc::EBUSY));
    let unanswered = look_up(&kernel);
    assert!(receive(&peer).is_some());
    assert_eq!(kernel.write(0, &noise(1, 1)), Ok(4096));
    drop(peer);
    expect_error(&kernel, unanswered, libc::EINTR);
    expect_error(&kernel, look_up(&kernel), libc::EAGAIN);
    assert_eq!(kernel.read(0, 4096), Ok(noise(1, 1)));

    let peer = connect(&kernel);
    let unique = look_up(&kernel);
    assert!(receive(&peer).is_some());
    send(&peer, &reply(unique, libc::ENOENT, &[]));
    expect_error(&kernel, unique, libc::ENOENT);
    kernel.expect_quiet();
}

#[test]
fn what_is_too_long_for_the_relay_is_refused() {
    let kernel = Kernel::new();
    let _peer = connect(&kernel);
    let unique = next_unique();
    kernel.send(&request(opcode::WRITE, unique, 3, &[0; 8192]));
    expect_error(&kernel, unique, libc::EINVAL);
    kernel.expect_quiet();
}

#[test]
fn more_than_pyfuse3_takes_is_refused_and_everything_answered_once() {
    let kernel = Kernel::new();
    let peer = connect(&kernel);
    let mut sent: Vec<u64> = (0..300).map(|_| look_up(&kernel)).collect();
    // What is refused is answered while nothing else is: at most 64 are in flight and 16 in the queue.
    let refused: Vec<Reply> = (0..sent.len() - 80).map(|_| kernel.reply()).collect();
    assert!(refused.iter().all(|reply| reply.errno == libc::EAGAIN));
    drop(peer);
    let mut answered: Vec<u64> = refused.iter().map(|reply| reply.unique).collect();
    while answered.len() < sent.len() {
        let reply = kernel.reply();
        assert!([libc::EAGAIN, libc::EINTR].contains(&reply.errno), "{reply:?}");
        answered.push(reply.unique);
    }
    sent.sort_unstable();
    answered.sort_unstable();
    assert_eq!(answered, sent);
    kernel.expect_quiet();
}

#[test]
fn replies_that_nobody_waits_for_do_not_pass() {
    let kernel = Kernel::new();
    let peer = connect(&kernel);
    let unique = look_up(&kernel);
    assert!(receive(&peer).is_some());
    let right = reply(unique, 0, b"right");
    let (mut long, mut short) = (right.clone(), right.clone());
    long[0] += 1;
    short[0] -= 1;
    for wrong in [&long, &short, &reply(unique + 1, 0, b"wrong"), &right[..15].to_vec(), &vec![0; 3]] {
        send(&peer, wrong);
    }
    send(&peer, &right);
    send(&peer, &right);
    assert_eq!(kernel.reply(), Reply { unique, errno: 0, payload: b"right".to_vec() });
    // In order: when this one is answered, the second `right` was dealt with.
    let unique = look_up(&kernel);
    assert!(receive(&peer).is_some());
    send(&peer, &reply(unique, 0, &[]));
    expect_error(&kernel, unique, 0);
    kernel.expect_quiet();
}

/// INIT as the kernel sends it, of that name.
fn init(unique: u64, offered: u32) -> Vec<u8> {
    let words = [7, 38, 128 << 10, offered].map(u32::to_ne_bytes);
    request(opcode::INIT, unique, 0, &arguments(64, &[(0, words.as_flattened())]))
}

/// pyfuse3 gets INIT, as `shown`, and answers it; and then a request, so that the answer has been looked at.
fn greet(kernel: &Kernel, peer: &OwnedFd, shown: &[u8]) {
    assert_eq!(receive(peer).as_deref(), Some(shown));
    let unique = u64_at(shown, 8).expect("long enough");
    send(peer, &reply(unique, 0, &arguments(64, &[(0, &7u32.to_ne_bytes()), (4, &31u32.to_ne_bytes())])));
    let unique = look_up(kernel);
    let asked = receive(peer).expect("in time");
    assert_eq!(u32_at(&asked, 4), Some(opcode::LOOKUP));
    send(peer, &reply(unique, 0, &[]));
    expect_error(kernel, unique, 0);
    kernel.expect_quiet();
}

#[test]
fn init_is_answered_at_once_and_shown_to_every_pyfuse3_without_what_is_hidden() {
    let kernel = Kernel::new();
    let unique = next_unique();
    let offered = HIDDEN | 1 << 5 | 1 << 22;
    kernel.send(&init(unique, offered));
    // Nobody is there yet.
    let agreed = kernel.reply();
    assert_eq!((agreed.unique, agreed.errno, agreed.payload.len()), (unique, 0, 64));
    assert_eq!(u32_at(&agreed.payload, 12), Some(1 << 5 | 1 << 22));
    assert_eq!(u32_at(&agreed.payload, 20), Some(MAX_WRITE as u32));
    expect_error(&kernel, look_up(&kernel), libc::EAGAIN);
    for _ in 0..2 {
        let peer = connect(&kernel);
        greet(&kernel, &peer, &init(unique, offered & !HIDDEN));
        let unanswered = look_up(&kernel);
        assert!(receive(&peer).is_some());
        drop(peer);
        expect_error(&kernel, unanswered, libc::EINTR);
    }
}

#[test]
fn what_pyfuse3_waits_for_comes_when_the_kernel_has_sent_it() {
    let kernel = Kernel::new();
    let peer = connect(&kernel);
    assert_eq!(receive_now(&peer), None);
    let unique = next_unique();
    kernel.send(&init(unique, 0));
    assert_eq!(kernel.reply().unique, unique);
    greet(&kernel, &peer, &init(unique, 0));
}

#[test]
fn a_protocol_that_is_not_spoken_is_refused() {
    let kernel = Kernel::new();
    let unique = next_unique();
    let mut older = init(unique, 0);
    older[44] = 20;
    kernel.send(&older);
    expect_error(&kernel, unique, libc::EPROTO);
    assert_eq!(receive_now(&connect(&kernel)), None, "INIT that was refused");
}

#[test]
fn what_is_sent_again_is_relayed_only_if_it_may_be_done_twice() {
    let kernel = Kernel::new();
    let peer = connect(&kernel);
    for opcode in [opcode::LOOKUP, opcode::GETATTR, opcode::OPEN, opcode::READ, opcode::READDIR, opcode::RELEASE] {
        let unique = next_unique() | RESENT;
        let message = request(opcode, unique, 3, &[0; 40]);
        kernel.send(&message);
        assert_eq!(receive(&peer).as_ref(), Some(&message), "{opcode}");
        send(&peer, &reply(unique, 0, &[]));
        expect_error(&kernel, unique, 0);
    }
    for opcode in [opcode::WRITE, opcode::SETATTR, 9, 10, 35] {
        let unique = next_unique() | RESENT;
        kernel.send(&request(opcode, unique, 3, &[0; 40]));
        expect_error(&kernel, unique, libc::EINTR);
    }
    assert_eq!(receive_now(&peer), None, "a command is given twice");
    kernel.expect_quiet();
}

/// Takes over: what the keeper has kept, and the state.
fn succeed(first: &Kernel, ours: OwnedFd) -> Kernel {
    let second = Kernel::new();
    let mut room = [0; MAX_INIT];
    let (theirs, session) = (first.shared.session(), second.shared.session());
    assert!(session.set_init(theirs.init(&mut room).expect("kept")));
    session.greeted.store(theirs.greeted.load(SeqCst), SeqCst);
    second.shared.relay.go_on(session, Some(ours));
    second.shared.relay.changed.notify_all();
    second
}

#[test]
fn a_successor_goes_on_with_the_same_pyfuse3_and_knows_the_kernel_s_init() {
    let first = Kernel::new();
    let unique = next_unique();
    first.send(&init(unique, 0));
    assert_eq!(first.reply().unique, unique);
    greet(&first, &connect(&first), &init(unique, 0));

    let (ours, peer) = socket_pair().expect("sockets");
    set_patience(&peer);
    let second = succeed(&first, ours);
    // To what the first one has passed on, and to what the second one does.
    let unanswered = next_unique();
    send(&peer, &reply(unanswered, 0, b"late"));
    let again = look_up(&second);
    let asked = receive(&peer).expect("in time");
    assert_eq!(u32_at(&asked, 4), Some(opcode::LOOKUP), "INIT again?");
    send(&peer, &reply(again, 0, b"right"));
    assert_eq!(second.reply(), Reply { unique: again, errno: 0, payload: b"right".to_vec() });
    // The next pyfuse3 is given the same INIT.
    let unanswered = look_up(&second);
    assert!(receive(&peer).is_some());
    drop(peer);
    expect_error(&second, unanswered, libc::EINTR);
    greet(&second, &connect(&second), &init(unique, 0));
}

#[test]
fn one_that_has_not_answered_init_is_not_gone_on_with() {
    let first = Kernel::new();
    let unique = next_unique();
    first.send(&init(unique, 0));
    assert_eq!(first.reply().unique, unique);
    // One that has answered; but that is not the one of now.
    let peer = connect(&first);
    greet(&first, &peer, &init(unique, 0));
    let unanswered = look_up(&first);
    assert!(receive(&peer).is_some());
    drop(peer);
    expect_error(&first, unanswered, libc::EINTR);
    let asked = connect(&first);
    assert_eq!(receive(&asked), Some(init(unique, 0)));

    let (ours, peer) = socket_pair().expect("sockets");
    set_patience(&peer);
    let _the_keeper_s = ours.try_clone().expect("descriptor");
    let second = succeed(&first, ours);
    assert_eq!(receive(&peer), Some(vec![]), "it hangs up");
    greet(&second, &connect(&second), &init(unique, 0));
}

#[test]
fn init_that_was_not_answered_is_sent_again_and_given_to_nobody_twice() {
    let (first, second) = (Kernel::new(), Kernel::new());
    let unique = next_unique();
    // The first one ends before it has answered.
    assert!(first.shared.session().set_init(&init(unique, 0)));
    let session = second.shared.session();
    assert!(session.set_init(&init(unique, 0)));
    second.shared.relay.go_on(session, None);
    let peer = connect(&second);
    assert_eq!(receive(&peer), Some(init(unique, 0)));
    second.send(&init(unique | RESENT, 0));
    assert_eq!(second.reply().unique, unique | RESENT);
    let unanswered = look_up(&second);
    let asked = receive(&peer).expect("in time");
    assert_eq!(u64_at(&asked, 8), Some(unanswered), "INIT again?");
}
