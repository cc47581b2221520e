//! What a process that serves swap asks of the kernel for itself.

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use std::io;

/// From linux/prctl.h; the libc crate does not have it.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

fn check(result: libc::c_int) -> PyResult<()> {
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(PyOSError::new_err((error.raw_os_error(), error.to_string())))
}

/// Locks all memory of the process, now and later, as it is touched (mlockall): it can never be swapped to itself.
#[pyfunction]
pub fn lock_memory() -> PyResult<()> {
    // SAFETY: changes residency of pages only.
    check(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) })
}

/// Tells the kernel that this thread, and those that it starts, serve I/O for reclaim (PR_SET_IO_FLUSHER).
#[pyfunction]
pub fn become_io_flusher() -> PyResult<()> {
    // SAFETY: sets a flag of the calling thread.
    check(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) })
}
