//! What a worker has to say in the log: another thread says it, since writing there may wait, for a reader or for memory.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::OnceLock;
use std::thread::Thread;

/// That something fails, with an errno.
pub struct Trouble {
    what: &'static str,
    /// As last noted, and as last said.
    errno: AtomicI32,
    said: AtomicI32,
    teller: OnceLock<Thread>,
}

impl Trouble {
    /// `what` fails.
    pub fn new(what: &'static str) -> Trouble {
        Trouble { what, errno: AtomicI32::new(0), said: AtomicI32::new(0), teller: OnceLock::new() }
    }

    /// Makes the calling thread the one that is woken to call [`Trouble::say`].
    pub fn become_teller(&self) {
        let _only_the_first_counts = self.teller.set(std::thread::current());
    }

    /// Allocates nothing, and never waits.
    pub fn note(&self, errno: i32) {
        let is_news = self.errno.swap(errno, Relaxed) != errno;
        if let Some(teller) = self.teller.get().filter(|_| is_news) {
            teller.unpark();
        }
    }

    /// Says what was noted, unless it is what was said last. Returns whether it has said something.
    pub fn say(&self) -> bool {
        let errno = self.errno.load(Relaxed);
        let is_news = self.said.swap(errno, Relaxed) != errno;
        if is_news {
            let error = io::Error::from_raw_os_error(errno);
            eprintln!("zswapd-pager: {}: {error} (said once)", self.what);
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_is_said_once() {
        let trouble = Trouble::new("a test");
        assert!(!trouble.say());
        for errno in [libc::ENOMEM, libc::EFAULT] {
            trouble.note(errno);
            trouble.note(errno);
            assert!(trouble.say());
            trouble.note(errno);
            assert!(!trouble.say());
        }
    }
}
