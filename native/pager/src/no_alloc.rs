//! In debug builds: a worker that allocates, once it serves pages, ends the process. A worker that allocates might
//! wait for the memory that its own answer is to free.

#[cfg(debug_assertions)]
mod checked {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    thread_local! {
        static FORBIDDEN: Cell<bool> = const { Cell::new(false) };
    }

    struct Checked;

    // SAFETY: passes everything on to the system's allocator.
    unsafe impl GlobalAlloc for Checked {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            check();
            // SAFETY: the caller's promise.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            check();
            // SAFETY: the caller's promise.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    #[global_allocator]
    static CHECKED: Checked = Checked;

    fn check() {
        if FORBIDDEN.get() {
            const MESSAGE: &str = "zswapd-pager: a worker allocated memory on the path of a page\n";
            // SAFETY: writes constant bytes; abort never returns.
            unsafe {
                libc::write(2, MESSAGE.as_ptr().cast(), MESSAGE.len());
                libc::abort();
            }
        }
    }

    pub fn forbid(yes: bool) {
        FORBIDDEN.set(yes);
    }
}

/// Runs `work`, during which this thread may not allocate or free.
pub fn forbidden<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(debug_assertions)]
    checked::forbid(true);
    let result = work();
    #[cfg(debug_assertions)]
    checked::forbid(false);
    result
}
