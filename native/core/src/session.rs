//! What a successor goes on with beside the pages: what it was told to do, and what was agreed on with the kernel.
//!
//! Both lie in the header of the state, outside of its checksum, as they change. Plain atomics: each stands for itself,
//! and is read by a successor, or by who has set it.

// Not those of `sync`: nothing is ordered by them.
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::Release};

/// The longest INIT request that is kept.
pub const MAX_INIT: usize = 128;

/// The settings in force.
#[derive(Default)]
#[repr(C)]
pub struct Settings {
    /// Of the pool.
    pub limit_bytes: AtomicU64,
    /// As the engine packs them: the algorithm, and the level of zstd.
    pub compression: AtomicU64,
    /// Bytes of the backing disk in use; 0: there is none. Set when it has its key.
    pub disk_bytes: AtomicU64,
    /// 1: what lies on the disk is encrypted.
    pub disk_encrypted: AtomicU64,
    pub accept_threshold_percent: AtomicU64,
    /// 1: pages move back to the pool when they are read.
    pub promoting: AtomicU64,
    /// Bytes that may still be written to the disk; [`u64::MAX`]: no limit. Lowered before they are.
    pub budget_bytes: AtomicU64,
}

/// What was agreed on with the kernel, for the process that serves it next. The core only keeps it.
#[derive(Default)]
#[repr(C)]
pub struct Session {
    /// How long [`Session::init`] is; 0: the kernel has not sent it. Set last.
    init_bytes: AtomicU64,
    init: [AtomicU64; MAX_INIT / 8],
    /// 1: the pyfuse3 of now has been given INIT, and has answered it.
    pub greeted: AtomicU64,
    /// How often the swap file is open: whoever counts says how.
    pub opens: AtomicU64,
    /// 1: the gate is closed, and the swap file cannot be opened any more.
    pub closed: AtomicU64,
}

impl Session {
    /// Keeps the kernel's INIT request, whole, for every pyfuse3 to come. Returns false, with nothing changed, if it is
    /// longer than [`MAX_INIT`]. For one thread at a time.
    pub fn set_init(&self, request: &[u8]) -> bool {
        if request.len() > MAX_INIT {
            return false;
        }
        self.init_bytes.store(0, Relaxed);
        for (word, bytes) in self.init.iter().zip(request.chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(padded), Release);
        }
        // Each store stays behind those before it, also for the compiler: a process may end at any instruction.
        self.init_bytes.store(request.len() as u64, Release);
        true
    }

    /// The kernel's INIT request, copied into `buffer`; None if there is none.
    pub fn init<'b>(&self, buffer: &'b mut [u8; MAX_INIT]) -> Option<&'b [u8]> {
        let length = usize::try_from(self.init_bytes.load(Relaxed)).ok().filter(|&n| (1..=MAX_INIT).contains(&n))?;
        for (bytes, word) in buffer.chunks_mut(8).zip(&self.init) {
            bytes.copy_from_slice(&word.load(Relaxed).to_ne_bytes());
        }
        Some(&buffer[..length])
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;

    #[test]
    fn an_init_is_kept_whole_or_not_at_all() {
        let (session, mut buffer) = (Session::default(), [0xee; MAX_INIT]);
        assert_eq!(session.init(&mut buffer), None);
        let request: Vec<u8> = (0..MAX_INIT as u8).collect();
        for length in [1, 7, 8, 104, MAX_INIT] {
            assert!(session.set_init(&request[..length]));
            assert_eq!(session.init(&mut buffer), Some(&request[..length]));
        }
        assert!(!session.set_init(&[0; MAX_INIT + 1]));
        assert_eq!(session.init(&mut buffer), Some(&request[..]));
        // Whatever stands there.
        session.init_bytes.store(u64::MAX, Relaxed);
        assert_eq!(session.init(&mut buffer), None);
    }
}
