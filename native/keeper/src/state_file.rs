//! The file that the state lies in: unlinked, on a tmpfs that is mounted nowhere and is never swapped.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// linux/mount.h
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;

/// Makes an empty state file. Where the kernel has no `noswap` tmpfs (before 6.4), a memory file, which the process's
/// own lock keeps from being swapped.
pub fn create() -> io::Result<OwnedFd> {
    on_noswap_tmpfs().or_else(|error| {
        eprintln!("zswapd-keeper: no tmpfs without swap ({error}): the lock alone keeps the pool in memory");
        // SAFETY: a valid C string; the result is checked.
        descriptor(i64::from(unsafe { libc::memfd_create(c"zswapd-state".as_ptr(), libc::MFD_CLOEXEC) }))
    })
}

fn on_noswap_tmpfs() -> io::Result<OwnedFd> {
    // SAFETY: a system call with valid descriptors and C strings, whose result is checked; so are those below.
    let context = descriptor(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 1) })?;
    let configure = |command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>| {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: as above; absent strings are null, as fsconfig(2) wants them.
        let result =
            unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, pointer(key), pointer(value), 0) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    configure(FSCONFIG_SET_FLAG, Some(c"noswap"), None)?;
    // The pool has its own limit; the default of half the memory would be a second one.
    configure(FSCONFIG_SET_STRING, Some(c"size"), Some(c"0"))?;
    configure(FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: as above.
    let mount = descriptor(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0) })?;
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: as above.
    descriptor(i64::from(unsafe { libc::openat(mount.as_raw_fd(), c".".as_ptr(), flags, 0o600) }))
}

fn descriptor(result: i64) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: just returned by the kernel, and nobody else has it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
