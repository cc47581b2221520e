//! A gate: whoever is inside is counted, and who closes it can wait until all are out.
//!
//! This settles how something may be torn down that others still use: a store with page operations in flight, a pool
//! with a migration under way. "Closed" and the count are one atomic, so that nobody enters unseen after the close;
//! and a pass is given up last, after whatever its holder has freed or queued: when the count is zero there is nothing
//! left to come. To wait for a queue before the gate is empty would be too early (the race of the kernel's
//! `zs_destroy_pool` against `zs_page_migrate`).

use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::sync::{AtomicU32, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

const CLOSED: u32 = 1 << 31;

/// Open when new.
#[derive(Default)]
pub struct Gate {
    /// [`CLOSED`], and how many are inside.
    state: AtomicU32,
    waiting: Mutex<()>,
    empty: Condvar,
}

/// Being inside, until dropped.
pub struct Pass<'a>(&'a Gate);

impl Gate {
    pub fn new() -> Gate {
        Gate::default()
    }

    /// Goes in. None once the gate is closed. Never blocks.
    pub fn enter(&self) -> Option<Pass<'_>> {
        let mut state = self.state.load(Relaxed);
        while state & CLOSED == 0 {
            match self.state.compare_exchange_weak(state, state + 1, Acquire, Relaxed) {
                Ok(_) => return Some(Pass(self)),
                Err(now) => state = now,
            }
        }
        None
    }

    /// Lets nobody in any more. Never blocks.
    pub fn close(&self) {
        self.state.fetch_or(CLOSED, Acquire);
    }

    /// Whether nobody gets in any more. Who is inside asks it to come to an end early; it orders nothing.
    pub fn is_closed(&self) -> bool {
        self.state.load(Relaxed) & CLOSED != 0
    }

    /// How many are inside.
    pub fn inside(&self) -> u32 {
        self.state.load(Acquire) & !CLOSED
    }

    /// Waits, for `patience` at most, until nobody is inside. Returns how many still are.
    ///
    /// What those who were inside have done is then seen here. To be called after [`Gate::close`].
    pub fn wait(&self, patience: Duration) -> u32 {
        let deadline = Instant::now() + patience;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while self.inside() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            waiting = self.empty.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        self.inside()
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let before = self.0.state.fetch_sub(1, Release);
        if before == CLOSED | 1 {
            // Under the lock, or it could fall between the look and the sleep of who waits.
            let _waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            self.0.empty.notify_all();
        }
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn nobody_enters_after_the_close() {
        let gate = Gate::new();
        let inside = gate.enter().expect("open");
        gate.close();
        assert!(gate.enter().is_none());
        assert_eq!(gate.wait(Duration::ZERO), 1);
        drop(inside);
        assert_eq!(gate.wait(LONG), 0);
    }

    #[test]
    fn who_waits_sees_what_was_done_inside() {
        let (gate, done) = (Gate::new(), std::sync::atomic::AtomicBool::new(false));
        std::thread::scope(|scope| {
            let pass = gate.enter().expect("open");
            gate.close();
            let done = &done;
            scope.spawn(move || {
                std::thread::yield_now();
                done.store(true, Relaxed);
                drop(pass);
            });
            assert_eq!(gate.wait(LONG), 0);
            assert!(done.load(Relaxed));
        });
    }
}
