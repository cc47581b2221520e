//! The pager's threads.

use crate::Shared;
use std::ffi::CStr;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Bytes of a thread's stack, all of it touched before the thread starts its work.
const STACK: usize = 128 << 10;

/// Lets the calling thread go before others where processors are scarce. Refused, it waits its turn.
pub fn hurry() {
    // SAFETY: changes the nice value of the calling thread (0 means it), nothing else.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
}

/// What the kernel calls this process, and others find it by.
pub fn set_name(name: &CStr) {
    // SAFETY: a string that ends, which the kernel copies.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0) };
}

/// Where the threads wait until there is something to serve: those of a standby, for long.
#[derive(Default)]
pub struct Start {
    shared: Mutex<Option<Arc<Shared>>>,
    begun: Condvar,
}

impl Start {
    fn wait(&self) -> Arc<Shared> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &*shared {
                Some(shared) => return shared.clone(),
                None => shared = self.begun.wait(shared).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Lets all of them begin.
    pub fn begin(&self, shared: Arc<Shared>) {
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(shared);
        self.begun.notify_all();
    }
}

/// Makes a thread whose stack is resident, and which begins its work at the start.
pub fn spawn(name: &str, start: &Arc<Start>, work: impl FnOnce(Arc<Shared>) + Send + 'static) -> io::Result<()> {
    let builder = std::thread::Builder::new().name(name.into()).stack_size(STACK);
    let start = start.clone();
    builder.spawn(move || {
        touch_stack();
        work(start.wait());
    })?;
    Ok(())
}

/// Touches as much of the stack below us as any thread uses, and then some, a page at a time.
#[inline(never)]
fn touch_stack() {
    let mut room = [0u8; STACK / 2];
    touch(&mut room);
}

/// Writes to each page of a buffer, so that it is resident, and locked, from now on.
pub fn touch(buffer: &mut [u8]) {
    let last = buffer.len().saturating_sub(1);
    for at in (0..last).step_by(4096).chain([last]) {
        if let Some(byte) = buffer.get_mut(at) {
            // SAFETY: a plain write through a valid reference, which the compiler must not leave out.
            unsafe { std::ptr::write_volatile(byte, 0) };
        }
    }
}
