//! The lock order, in one table, checked in debug builds.
//!
//! A thread takes locks in the order of the table, at most one of each rank at a time:
//!
//! | rank | lock | protects |
//! | --- | --- | --- |
//! | `Recompression` | one for the store | which dictionaries there are, while pages are recompressed |
//! | `Slot` | a stripe of the slot table | the slot word, and the life of the object that it names |
//! | `Shared` | a stripe of its part for shared pages | the same of these |
//! | `Zspage` | a zspage, shared (`pool/lock.rs`) | where the objects are whose bytes are read or written |
//! | `Class` | one size class, or all of z3fold | its lists and the descriptors of their zspages |
//! | `Adjust` | the arena's reserve | who takes memory from the system, or gives it back |
//! | `Arena` | the arena | which of its pages are in use, and which are resident |
//! | `Lru` | the list of pages in the pool | which of them was used least recently |
//! | `Backing` | the backing disk | which of its segments are free, and how much lives in the others |
//!
//! Who moves objects or allocates takes `Zspage` under `Class`, against the order: it only tries, or knows that no mover
//! has it, and so waits for nobody.
//!
//! `Adjust` may be held while waiting for memory, the others only for bounded work. In the pager only the thread that
//! keeps the reserve filled takes it, and holds nothing else then; without such a thread (an embedded engine) a store
//! takes it under `Slot`, and any lock may be held while a table is touched for the first time.

use crate::sync::{Mutex, MutexGuard, PoisonError};
use std::ops::{Deref, DerefMut};
use std::sync::TryLockError;

/// Position in the lock order; a higher rank is taken later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Rank {
    Recompression,
    Slot,
    Shared,
    Zspage,
    Class,
    Adjust,
    Arena,
    Lru,
    Backing,
}

/// A mutex with a place in the lock order.
pub struct Ranked<T> {
    rank: Rank,
    mutex: Mutex<T>,
}

/// Holds the lock until dropped.
pub struct Guard<'a, T> {
    // Declared before `held`, so that the lock is released before the rank is.
    inner: MutexGuard<'a, T>,
    #[cfg(debug_assertions)]
    _held: debug::Held,
}

impl<T> Ranked<T> {
    pub fn new(rank: Rank, value: T) -> Self {
        Ranked { rank, mutex: Mutex::new(value) }
    }

    /// Takes the lock; waits for its holder.
    ///
    /// # Panics
    /// In debug builds, if this thread holds a lock of the same or a higher rank.
    pub fn lock(&self) -> Guard<'_, T> {
        #[cfg(debug_assertions)]
        let held = debug::Held::new(self.rank);
        let _ = self.rank;
        Guard {
            // Release builds abort on panic, so that only a test can meet a poisoned lock.
            inner: self.mutex.lock().unwrap_or_else(PoisonError::into_inner),
            #[cfg(debug_assertions)]
            _held: held,
        }
    }
}

impl<T> Ranked<T> {
    /// Takes the lock if nobody holds it.
    ///
    /// # Panics
    /// As [`Ranked::lock`].
    pub fn try_lock(&self) -> Option<Guard<'_, T>> {
        #[cfg(debug_assertions)]
        let held = debug::Held::new(self.rank);
        let inner = match self.mutex.try_lock() {
            Ok(inner) => inner,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Guard {
            inner,
            #[cfg(debug_assertions)]
            _held: held,
        })
    }
}

/// Notes that the calling thread holds, or is about to wait for, a lock of a kind of its own, until dropped.
///
/// # Panics
/// In debug builds, if this thread holds a lock of the same or a higher rank.
pub fn hold(rank: Rank) -> Held {
    let _ = rank;
    Held {
        #[cfg(debug_assertions)]
        _held: debug::Held::new(rank),
    }
}

/// See [`hold`].
pub struct Held {
    #[cfg(debug_assertions)]
    _held: debug::Held,
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

#[cfg(debug_assertions)]
mod debug {
    use super::Rank;
    use crate::sync::thread_local;
    use std::cell::Cell;

    thread_local! {
        /// Bit n is set while this thread holds a lock of rank n.
        static HELD: Cell<u16> = Cell::default();
    }

    pub struct Held(Rank);

    impl Held {
        pub fn new(rank: Rank) -> Held {
            HELD.with(|held| {
                assert!(
                    held.get() >> rank as u8 == 0,
                    "lock order: {rank:?} taken while holding ranks {:#b}",
                    held.get()
                );
                held.set(held.get() | 1 << rank as u16);
            });
            Held(rank)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            HELD.with(|held| held.set(held.get() & !(1 << self.0 as u16)));
        }
    }
}

#[cfg(all(test, debug_assertions, not(feature = "model")))]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_the_table_is_allowed() {
        let (slot, class, arena) =
            (Ranked::new(Rank::Slot, ()), Ranked::new(Rank::Class, ()), Ranked::new(Rank::Arena, ()));
        for _ in 0..2 {
            let _slot = slot.lock();
            let _class = class.lock();
            let _arena = arena.lock();
        }
    }

    #[test]
    #[should_panic(expected = "lock order")]
    fn an_inversion_panics() {
        let (class, arena) = (Ranked::new(Rank::Class, ()), Ranked::new(Rank::Arena, ()));
        let _arena = arena.lock();
        let _class = class.lock();
    }

    #[test]
    #[should_panic(expected = "lock order")]
    fn two_locks_of_one_rank_panic() {
        let (a, b) = (Ranked::new(Rank::Class, ()), Ranked::new(Rank::Class, ()));
        let _a = a.lock();
        let _b = b.lock();
    }
}
