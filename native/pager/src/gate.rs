//! The gate: how often the swap file is open, and whether it may be opened.
//!
//! Who empties the store closes the gate first: whoever has the swap file open may have pages in it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst};
use zswapd_core::error::Error;

#[derive(Default)]
pub struct Gate {
    closed: AtomicBool,
    opens: AtomicI64,
    under_way: AtomicI64,
}

/// A request that a worker has begun, and ends when this is dropped.
pub struct UnderWay<'a>(&'a Gate);

impl Gate {
    /// How often the swap file is open: by a loop device, for one.
    pub fn opens(&self) -> i64 {
        self.opens.load(SeqCst)
    }

    /// Whether an OPEN is to be refused. To be asked with a request under way, and so before or after [`Gate::close`],
    /// which waits for it.
    pub fn is_closed(&self) -> bool {
        self.closed.load(SeqCst)
    }

    pub fn begin(&self) -> UnderWay<'_> {
        self.under_way.fetch_add(1, SeqCst);
        UnderWay(self)
    }

    /// The kernel has been told that the swap file is open.
    pub fn opened(&self) {
        self.opens.fetch_add(1, SeqCst);
    }

    pub fn released(&self) {
        self.opens.fetch_sub(1, SeqCst);
    }

    /// Closes the gate. True when nothing is under way any more: until then, ask again.
    ///
    /// Errors: EBUSY while the swap file is open; the gate is open then.
    pub fn close(&self) -> Result<bool, Error> {
        self.closed.store(true, SeqCst);
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
        self.closed.store(false, SeqCst);
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_open_while_the_file_is_open() {
        let gate = Gate::default();
        gate.opened();
        assert_eq!(gate.close().expect_err("open").errno(), libc::EBUSY);
        assert!(!gate.is_closed());
        gate.released();
        assert!(gate.close().expect("not open"));
        assert!(gate.is_closed());
    }

    #[test]
    fn an_open_that_is_under_way_counts() {
        let gate = Gate::default();
        let request = gate.begin();
        assert!(!gate.is_closed());
        assert!(!gate.close().expect("not open yet"));
        gate.opened();
        drop(request);
        assert!(gate.close().is_err());
        assert!(!gate.is_closed());
    }
}
