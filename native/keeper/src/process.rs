//! What a process on which reclaim depends asks of the kernel for itself.

use std::io;

/// The status of a pager that hands over to its successor.
pub const HAND_OVER: u8 = 75;

/// From linux/prctl.h; the libc crate does not have it.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Locks all memory, marks the process as one that serves I/O for reclaim, and takes it from the OOM killer's sight.
///
/// To be called before any thread starts: threads inherit the mark, and so do children. Errors: a line for each thing
/// that was refused; the others are done.
pub fn protect() -> Result<(), String> {
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
    let refused = steps.into_iter().filter_map(|(what, result)| result.err().map(|error| (what, error)));
    let lines: Vec<String> =
        refused.map(|(what, error)| format!("may not {what}: {error}; do not use it for swap")).collect();
    match lines.is_empty() {
        true => Ok(()),
        false => Err(lines.join("\n")),
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
