//! The lock of a zspage: shared by whoever reads or writes bytes of its objects, exclusive for who moves them.
//!
//! The rules, after the kernel's preemptible zspage lock:
//!
//! - Readers may sleep, and be preempted, while they hold it (a page is decompressed under it). They never block each
//!   other, and may wait for a mover.
//! - A mover only tries. It never waits for the lock, and does neither I/O nor long work under it. From before it tries
//!   until after it has unlocked, the zspage cannot go: zsmalloc holds the lock of the class, z3fold a reference. A try
//!   that fails leaves no mark.
//!
//! In the kernel a mover cannot be preempted, and readers spin. Here it can: a reader spins for a while, then sleeps.
//!
//! A lock lives in a table of descriptors that outlives every reader. So one may be taken for a zspage that is no
//! more: who has it looks again whether it is the right one.

use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::sync::{futex_wait, futex_wake_all, spin_loop, AtomicU32, MODEL};

/// A mover has it.
const MOVER: u32 = 1 << 31;
/// Readers sleep until the mover unlocks. Only ever set together with [`MOVER`].
const SLEEPERS: u32 = 1 << 30;
/// A mover needs some 10 µs for what it does under the lock: longer only if it was preempted.
const SPINS: u32 = if MODEL { 0 } else { 200 };

/// Zeroed is unlocked. Otherwise: the number of readers, or [`MOVER`].
#[derive(Default)]
pub struct ZspageLock(AtomicU32);

impl ZspageLock {
    /// Takes the lock shared if there is no mover. Never waits.
    pub fn try_read(&self) -> bool {
        let mut state = self.0.load(Relaxed);
        while state & MOVER == 0 {
            match self.0.compare_exchange_weak(state, state + 1, Acquire, Relaxed) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
        false
    }

    /// Takes the lock shared; waits for a mover.
    pub fn read(&self) {
        let mut spins = 0;
        while !self.try_read() {
            if spins < SPINS {
                spins += 1;
                spin_loop();
                continue;
            }
            let marked = MOVER | SLEEPERS;
            if self.0.compare_exchange(MOVER, marked, Relaxed, Relaxed).is_ok() || self.0.load(Relaxed) == marked {
                futex_wait(&self.0, marked);
            }
        }
    }

    /// Takes the lock shared where there can be no mover: the caller holds what a mover would have to hold.
    pub fn read_unmoved(&self) {
        let locked = self.try_read();
        debug_assert!(locked, "a mover has a zspage, and not the lock of its class");
        if !locked {
            self.read();
        }
    }

    pub fn unlock_read(&self) {
        let before = self.0.fetch_sub(1, Release);
        debug_assert!(before & MOVER == 0 && before > 0, "a zspage is unlocked that was not locked: {before:#x}");
    }

    /// Takes the lock exclusively if nobody has it. Never waits.
    pub fn try_move(&self) -> bool {
        self.0.compare_exchange(0, MOVER, Acquire, Relaxed).is_ok()
    }

    pub fn unlock_move(&self) {
        let before = self.0.swap(0, Release);
        debug_assert!(before & MOVER != 0, "a zspage is unlocked that was not locked: {before:#x}");
        if before & SLEEPERS != 0 {
            futex_wake_all(&self.0);
        }
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;

    #[test]
    fn readers_share_and_a_mover_has_it_alone() {
        let lock = ZspageLock::default();
        assert!(lock.try_read() && lock.try_read());
        assert!(!lock.try_move());
        lock.unlock_read();
        assert!(!lock.try_move());
        lock.unlock_read();
        // The tries have left nothing behind.
        assert!(lock.try_move());
        assert!(!lock.try_read() && !lock.try_move());
        lock.unlock_move();
        assert!(lock.try_read());
    }

    #[test]
    fn readers_that_sleep_are_woken() {
        let lock = ZspageLock::default();
        assert!(lock.try_move());
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    lock.read();
                    lock.unlock_read();
                });
            }
            while lock.0.load(Relaxed) & SLEEPERS == 0 {
                std::thread::yield_now();
            }
            lock.unlock_move();
        });
        assert!(lock.try_move());
    }
}
