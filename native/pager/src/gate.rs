//! The gate: how often the swap file is open, and whether it may be opened.
//!
//! Who empties the store closes the gate first: whoever has the swap file open may have pages in it. Both are in the
//! session, so that a successor knows.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use zswapd_core::error::Error;
use zswapd_core::session::Session;

/// Bits of `Session::opens` that count. Those above name the request that was counted last: it is resent if its reply
/// was not delivered, and must not count twice.
const COUNT_BITS: u32 = 16;
const COUNT: u64 = (1 << COUNT_BITS) - 1;

#[derive(Clone, Copy)]
pub struct Gate<'a> {
    session: &'a Session,
    under_way: &'a AtomicU64,
}

/// A request that a worker has begun, and ends when this is dropped.
pub struct UnderWay<'a>(&'a AtomicU64);

impl<'a> Gate<'a> {
    /// `under_way`: requests that a worker of this process has begun.
    pub fn new(session: &'a Session, under_way: &'a AtomicU64) -> Gate<'a> {
        Gate { session, under_way }
    }

    /// How often the swap file is open: by a loop device, for one.
    pub fn opens(&self) -> u64 {
        self.session.opens.load(SeqCst) & COUNT
    }

    /// Whether an OPEN is to be refused. To be asked with a request under way, and so before or after [`Gate::close`],
    /// which waits for it.
    pub fn is_closed(&self) -> bool {
        self.session.closed.load(SeqCst) != 0
    }

    /// How many requests are under way.
    pub fn under_way(&self) -> u64 {
        self.under_way.load(SeqCst)
    }

    pub fn begin(&self) -> UnderWay<'a> {
        self.under_way.fetch_add(1, SeqCst);
        UnderWay(self.under_way)
    }

    /// The kernel is about to be told that the swap file is open. `unique`: the name of the request.
    pub fn opened(&self, unique: u64) {
        self.count(unique, 1);
    }

    /// The kernel is about to be told that it is released.
    pub fn released(&self, unique: u64) {
        self.count(unique, -1);
    }

    /// An open that nobody waited for will not be released.
    pub fn take_back(&self) {
        self.count(0, -1);
    }

    /// Requests are counted by one worker at a time.
    fn count(&self, unique: u64, change: i64) {
        let last = self.session.opens.load(SeqCst);
        let name = unique << COUNT_BITS;
        if name == 0 || name != last & !COUNT {
            let opens = (last & COUNT).saturating_add_signed(change).min(COUNT);
            self.session.opens.store(name | opens, SeqCst);
        }
    }

    /// Closes the gate. True when nothing is under way any more: until then, ask again.
    ///
    /// Errors: EBUSY while the swap file is open; the gate is open then.
    pub fn close(&self) -> Result<bool, Error> {
        self.session.closed.store(1, SeqCst);
        // In this order: what is under way may be an OPEN from before, which counts when it ends.
        let quiet = self.under_way.load(SeqCst) == 0;
        if self.opens() == 0 {
            return Ok(quiet);
        }
        self.open();
        Err(Error::System { what: "the swap file is open", source: io::Error::from_raw_os_error(libc::EBUSY) })
    }

    /// Lets the swap file be opened again.
    pub fn open(&self) {
        self.session.closed.store(0, SeqCst);
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_open_while_the_file_is_open() {
        let (session, under_way) = (Session::default(), AtomicU64::new(0));
        let gate = Gate::new(&session, &under_way);
        gate.opened(2);
        assert_eq!(gate.close().expect_err("open").errno(), libc::EBUSY);
        assert!(!gate.is_closed());
        gate.released(4);
        assert!(gate.close().expect("not open"));
        assert!(gate.is_closed());
    }

    #[test]
    fn an_open_that_is_under_way_counts() {
        let (session, under_way) = (Session::default(), AtomicU64::new(0));
        let gate = Gate::new(&session, &under_way);
        let request = gate.begin();
        assert!(!gate.is_closed());
        assert!(!gate.close().expect("not open yet"));
        gate.opened(2);
        drop(request);
        assert!(gate.close().is_err());
        assert!(!gate.is_closed());
    }

    #[test]
    fn what_is_resent_is_counted_once_whether_its_process_has_counted_it_or_not() {
        let (session, under_way) = (Session::default(), AtomicU64::new(0));
        for counted in [true, false] {
            for (unique, expected) in [(1002, 1), (1004, 2)] {
                if counted {
                    Gate::new(&session, &under_way).opened(unique);
                }
                let successor = Gate::new(&session, &under_way);
                successor.opened(unique | zswapd_fuse::wire::RESENT);
                assert_eq!(successor.opens(), expected);
            }
            for (unique, expected) in [(1006, 1), (1008, 0)] {
                if counted {
                    Gate::new(&session, &under_way).released(unique);
                }
                let successor = Gate::new(&session, &under_way);
                successor.released(unique | zswapd_fuse::wire::RESENT);
                assert_eq!(successor.opens(), expected);
            }
        }
        let gate = Gate::new(&session, &under_way);
        gate.opened(2);
        gate.take_back();
        assert_eq!(gate.opens(), 0);
    }
}
