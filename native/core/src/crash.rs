//! Crash points: where a process may end, named for tests, which recover from what it would have left behind.
//!
//! They stand before and after whatever changes what a successor finds: slot words, the page map, the nonces, and the
//! backing disk. Without the feature `testing` there are none.

#[cfg(any(test, feature = "testing"))]
pub use testing::{crash_point, with_hook};

#[cfg(not(any(test, feature = "testing")))]
#[inline(always)]
pub fn crash_point(_name: &'static str) {}

#[cfg(any(test, feature = "testing"))]
mod testing {
    use std::cell::RefCell;

    type Hook = Box<dyn FnMut(&'static str)>;

    thread_local! {
        static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
    }

    /// Calls the hook of this thread, if it has one: here the process could end. Not from within the hook.
    pub fn crash_point(name: &'static str) {
        let Some(mut hook) = HOOK.with(|place| place.borrow_mut().take()) else { return };
        hook(name);
        HOOK.with(|place| *place.borrow_mut() = Some(hook));
    }

    /// Runs `what` with a hook for this thread's crash points.
    pub fn with_hook<R>(hook: impl FnMut(&'static str) + 'static, what: impl FnOnce() -> R) -> R {
        HOOK.with(|place| *place.borrow_mut() = Some(Box::new(hook)));
        let result = what();
        HOOK.with(|place| *place.borrow_mut() = None);
        result
    }
}
