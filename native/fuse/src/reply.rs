//! Replies to /dev/fuse: a header, then what was asked for, in one write.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bytes of `struct fuse_out_header`.
pub const OUT_HEADER: usize = 16;

/// `struct fuse_out_header`; `error` is 0 or a positive errno.
pub fn out_header(unique: u64, error: i32, payload: usize) -> [u8; OUT_HEADER] {
    let mut header = [0; OUT_HEADER];
    header[..4].copy_from_slice(&((OUT_HEADER + payload) as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&(-error).to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// Sends a reply.
///
/// Returns false if nobody waits for it any more (ENOENT: the request was interrupted): that is no error. Does not
/// block, and allocates nothing in user space.
pub fn send(device: BorrowedFd<'_>, unique: u64, payload: Result<&[u8], i32>) -> io::Result<bool> {
    let (error, payload) = match payload {
        Ok(payload) => (0, payload),
        Err(errno) => (errno, &[][..]),
    };
    let header = out_header(unique, error, payload.len());
    send_parts(device, &[IoSlice::new(&header), IoSlice::new(payload)])
}

/// Sends a message that is already complete. Returns as [`send`] does.
pub fn send_raw(device: BorrowedFd<'_>, message: &[u8]) -> io::Result<bool> {
    send_parts(device, &[IoSlice::new(message)])
}

/// Has the kernel send again what was sent to a process that is gone, and not answered: first of all, with
/// [`RESENT`](crate::wire::RESENT) in its name.
///
/// To be called when that process has ended, and before anybody reads. Errors: EINVAL where the kernel cannot (before
/// 6.9).
pub fn resend(device: BorrowedFd<'_>) -> io::Result<()> {
    /// FUSE_NOTIFY_RESEND: a notification has its code where a reply has an error, and no name.
    const NOTIFY_RESEND: i32 = 7;
    send_raw(device, &out_header(0, -NOTIFY_RESEND, 0)).map(drop)
}

fn send_parts(device: BorrowedFd<'_>, parts: &[IoSlice<'_>]) -> io::Result<bool> {
    // SAFETY: IoSlice has the layout of iovec, and every part is valid for the call.
    let written = unsafe { libc::writev(device.as_raw_fd(), parts.as_ptr().cast(), parts.len() as libc::c_int) };
    if written >= 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOENT) => Ok(false),
        _ => Err(error),
    }
}
