//! What is not on the swap file, with the test in the places of both the kernel and pyfuse3.

use super::socket_pair;
use crate::testing::*;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::SeqCst;
use zswapd_core::session::MAX_INIT;
use zswapd_fuse::init::MAX_WRITE;
use zswapd_fuse::swapfile::NODEID;
use zswapd_fuse::wire::{opcode, u32_at, RESENT};

const ROOT: u64 = 1;
/// Splice and the writeback cache, which pyfuse3 must not see.
const HIDDEN: u32 = 1 << 7 | 1 << 9 | 1 << 16;

fn connect(kernel: &Kernel) -> OwnedFd {
    let peer = kernel.shared.relay.connect().expect("nobody else is connected");
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
    assert_eq!(kernel.shared.relay.connect().expect_err("one at a time").raw_os_error(), Some(libc::EBUSY));
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

#[test]
fn init_is_shown_without_what_is_hidden_and_answered_to_the_kernel_once() {
    let kernel = Kernel::new();
    let unique = next_unique();
    let offered = HIDDEN | 1 << 5 | 1 << 22;
    let fields: [(usize, &[u8]); 3] =
        [(0, &7u32.to_ne_bytes()), (4, &38u32.to_ne_bytes()), (12, &offered.to_ne_bytes())];
    let init = request(opcode::INIT, unique, 0, &arguments(64, &fields));
    // Nobody is there yet: it waits.
    kernel.send(&init);
    let answer = reply(unique, 0, &arguments(64, &[(0, &7u32.to_ne_bytes()), (4, &31u32.to_ne_bytes())]));
    for first in [true, false] {
        let peer = connect(&kernel);
        let mut shown = init.clone();
        shown[52..56].copy_from_slice(&(offered & !HIDDEN).to_ne_bytes());
        assert_eq!(receive(&peer), Some(shown));
        send(&peer, &answer);
        if first {
            let raised = kernel.reply();
            assert_eq!((raised.unique, raised.errno, raised.payload.len()), (unique, 0, 64));
            assert_eq!(u32_at(&raised.payload, 12), Some(1 << 5 | 1 << 22));
            assert_eq!(u32_at(&raised.payload, 20), Some(MAX_WRITE as u32));
        }
        let unique = look_up(&kernel);
        assert!(receive(&peer).is_some());
        send(&peer, &reply(unique, 0, &[]));
        expect_error(&kernel, unique, 0);
        kernel.expect_quiet();
        let unanswered = look_up(&kernel);
        assert!(receive(&peer).is_some());
        drop(peer);
        expect_error(&kernel, unanswered, libc::EINTR);
    }
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

#[test]
fn a_successor_goes_on_with_the_same_pyfuse3_and_knows_the_kernel_s_init() {
    let first = Kernel::new();
    let unique = next_unique();
    let init = request(opcode::INIT, unique, 0, &arguments(64, &[(0, &7u32.to_ne_bytes()), (4, &38u32.to_ne_bytes())]));
    first.send(&init);
    let peer = connect(&first);
    assert_eq!(receive(&peer).as_ref(), Some(&init));
    let answer = reply(unique, 0, &arguments(64, &[(0, &7u32.to_ne_bytes()), (4, &31u32.to_ne_bytes())]));
    send(&peer, &answer);
    assert_eq!(first.reply().unique, unique);

    // What the keeper has kept, and the state.
    let (ours, peer) = socket_pair().expect("sockets");
    set_patience(&peer);
    let second = Kernel::new();
    let mut room = [0; MAX_INIT];
    let kept = first.shared.session().init(&mut room).expect("kept");
    let session = second.shared.session();
    assert!(session.set_init(kept));
    session.negotiated.store(1, SeqCst);
    second.shared.relay.go_on(session, Some(ours));
    second.shared.relay.changed.notify_all();
    // To what the first one has passed on, and to what the second one does.
    let unanswered = next_unique();
    send(&peer, &reply(unanswered, 0, b"late"));
    let again = look_up(&second);
    let first = receive(&peer).expect("in time");
    assert_eq!(u32_at(&first, 4), Some(opcode::LOOKUP), "INIT again?");
    send(&peer, &reply(again, 0, b"right"));
    assert_eq!(second.reply(), Reply { unique: again, errno: 0, payload: b"right".to_vec() });
    // The next pyfuse3 is given the same INIT, and what it replies is not for the kernel.
    let unanswered = look_up(&second);
    assert!(receive(&peer).is_some());
    drop(peer);
    expect_error(&second, unanswered, libc::EINTR);
    let next = connect(&second);
    assert_eq!(receive(&next).as_ref(), Some(&init));
    send(&next, &answer);
    second.expect_quiet();
}

#[test]
fn one_that_has_not_answered_init_is_not_gone_on_with() {
    let kernel = Kernel::new();
    let (ours, peer) = socket_pair().expect("sockets");
    set_patience(&peer);
    kernel.shared.relay.go_on(kernel.shared.session(), Some(ours));
    assert_eq!(receive(&peer), Some(vec![]), "it hangs up");
    // INIT is sent again, and kept for the next one.
    let unique = next_unique() | RESENT;
    let init = request(opcode::INIT, unique, 0, &arguments(64, &[(0, &7u32.to_ne_bytes())]));
    kernel.send(&init);
    let peer = connect(&kernel);
    assert_eq!(receive(&peer), Some(init));
    send(&peer, &reply(unique, 0, &arguments(64, &[(0, &7u32.to_ne_bytes())])));
    assert_eq!(kernel.reply().unique, unique);
}
