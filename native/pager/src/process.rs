//! What the process asks of the kernel for itself.

use std::io;

/// Bytes of a thread's stack, all of it touched before the thread starts its work.
const STACK: usize = 128 << 10;

/// From linux/prctl.h; the libc crate does not have it.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Locks all memory, marks the process as one that serves I/O for reclaim, and takes it from the OOM killer's sight.
///
/// To be called before any thread starts: threads inherit the mark. What is refused is said, and done without: then it
/// returns false, and such a pager is fit for tests, not for a machine's swap.
#[must_use]
pub fn protect() -> bool {
    // What is mapped now (program, libraries) becomes resident; what comes later is locked as it is touched, since
    // most of it is sparse.
    // SAFETY: changes how the kernel treats this process's memory, nothing else.
    let current = unsafe { libc::mlockall(libc::MCL_CURRENT) };
    // SAFETY: as above.
    let future = unsafe { libc::mlockall(libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    // SAFETY: sets a flag of this thread.
    let flusher = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    let steps = [
        ("lock its memory (CAP_IPC_LOCK)", check(current).and(check(future))),
        ("become an I/O flusher (CAP_SYS_RESOURCE)", check(flusher)),
        ("leave the OOM killer's sight (CAP_SYS_RESOURCE)", std::fs::write("/proc/self/oom_score_adj", "-1000")),
    ];
    let mut protected = true;
    for (what, result) in steps {
        if let Err(error) = result {
            eprintln!("zswapd-pager: may not {what}: {error}; do not use it for swap");
            protected = false;
        }
    }
    protected
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets the calling thread go before others where processors are scarce. Refused, it waits its turn.
pub fn hurry() {
    // SAFETY: changes the nice value of the calling thread (0 means it), nothing else.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
}

/// Starts a thread whose stack is resident before its work begins.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = std::thread::Builder::new().name(name.into()).stack_size(STACK);
    builder.spawn(move || {
        touch_stack();
        work();
    })?;
    Ok(())
}

/// Touches most of the stack below us, a page at a time.
#[inline(never)]
fn touch_stack() {
    let mut room = [0u8; STACK - (32 << 10)];
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
