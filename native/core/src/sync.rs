//! The one seam through which the core takes its atomics and locks, so that a model checker can stand in
//! (`models/standin`).

pub use std::hint::spin_loop;
pub use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};
pub use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
#[cfg(debug_assertions)]
pub use std::thread_local;

/// Whether a model checker runs the core: every schedule of something tiny tells more than a few of something large.
pub const MODEL: bool = false;

/// Sleeps while the word has this value; may wake for no reason (futex(2), FUTEX_WAIT).
pub fn futex_wait(word: &AtomicU32, value: u32) {
    let no_timeout = std::ptr::null::<libc::timespec>();
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word is valid for the call; whatever it returns, the caller looks at the word again.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, no_timeout) };
}

/// Wakes all who sleep on the word (futex(2), FUTEX_WAKE).
pub fn futex_wake_all(word: &AtomicU32) {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: only the address of the word is used.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, i32::MAX) };
}
