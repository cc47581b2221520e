//! The one seam through which the core takes its atomics and locks, so that a model checker can stand in.

pub use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};
pub use std::sync::{Mutex, MutexGuard, PoisonError};
