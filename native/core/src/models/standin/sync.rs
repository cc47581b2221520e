//! Stands in for `sync.rs` under a model checker: every atomic and lock of the core is the checker's.

#[cfg(feature = "loom")]
use loom as checker;
#[cfg(feature = "shuttle")]
use shuttle as checker;

pub use checker::hint::spin_loop;
pub use checker::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};
pub use checker::sync::{Condvar, Mutex, MutexGuard};
pub use checker::thread_local;
pub use std::sync::PoisonError;

pub const MODEL: bool = true;

checker::lazy_static! {
    /// The kernel's hash bucket, one for all words: its lock makes one step of the look at the word and falling asleep.
    static ref BUCKET: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
}

/// Who sleeps here and is never woken is a deadlock, which the checker reports.
pub fn futex_wait(word: &AtomicU32, value: u32) {
    let bucket = BUCKET.0.lock().unwrap_or_else(PoisonError::into_inner);
    if word.load(Ordering::SeqCst) == value {
        drop(BUCKET.1.wait(bucket));
    }
}

pub fn futex_wake_all(_word: &AtomicU32) {
    let _bucket = BUCKET.0.lock().unwrap_or_else(PoisonError::into_inner);
    BUCKET.1.notify_all();
}
