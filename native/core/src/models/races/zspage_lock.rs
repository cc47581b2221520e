//! The lock of a zspage.

use super::{explore, join, spawn};
use crate::pool::lock::ZspageLock;
use crate::state::Shadow;
use std::sync::Arc;

/// The bytes that the lock protects are beside it.
#[derive(Default)]
struct Zspage {
    lock: ZspageLock,
    bytes: Shadow,
}

impl Zspage {
    fn read(&self) {
        self.lock.read();
        self.bytes.read();
        self.lock.unlock_read();
    }

    fn try_move(&self) -> bool {
        let locked = self.lock.try_move();
        if locked {
            self.bytes.write();
            self.lock.unlock_move();
        }
        locked
    }
}

/// Readers that find a mover wait, sleep, and are woken, all of them. (A wake-up that is lost is a deadlock.)
#[test]
fn readers_wait_for_a_mover_and_are_woken() {
    explore(|| {
        let zspage = Arc::new(Zspage::default());
        assert!(zspage.lock.try_move());
        let readers = [zspage.clone(), zspage.clone()].map(|zspage| spawn(move || zspage.read()));
        zspage.bytes.write();
        zspage.lock.unlock_move();
        readers.into_iter().for_each(join);
    });
}

/// A mover has the bytes to itself, or does not get the lock.
#[test]
fn a_mover_never_meets_a_reader() {
    explore(|| {
        let zspage = Arc::new(Zspage::default());
        let reader = spawn({
            let zspage = zspage.clone();
            move || zspage.read()
        });
        let other = spawn({
            let zspage = zspage.clone();
            move || zspage.try_move()
        });
        zspage.try_move();
        join(reader);
        join(other);
    });
}

/// A mover's try that fails leaves no mark: more readers come in, and when they are gone the next try succeeds.
#[test]
fn a_failed_try_leaves_no_mark() {
    explore(|| {
        let zspage = Arc::new(Zspage::default());
        zspage.lock.read();
        let mover = spawn({
            let zspage = zspage.clone();
            move || zspage.try_move()
        });
        assert!(zspage.lock.try_read(), "a mover that tries in vain keeps a reader out");
        assert!(!join(mover));
        zspage.lock.unlock_read();
        zspage.lock.unlock_read();
        assert!(zspage.try_move());
    });
}
