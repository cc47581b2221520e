//! The log: lines on stderr, which nobody waits for.

use std::fmt::Arguments;
use std::io::{Cursor, Write};

/// Writes a line to the log. Allocates nothing.
#[macro_export]
macro_rules! say {
    ($($what:tt)*) => { $crate::say::line(format_args!($($what)*)) };
}

/// A log that nobody reads, since its reader may be swapped out to the very device that waits for us, goes without.
pub fn line(what: Arguments<'_>) {
    let mut room = [0; 512];
    let mut text = Cursor::new(&mut room[..]);
    let _cut_off = writeln!(text, "zswapd-keeper: {what}");
    let length = text.position() as usize;
    let mut log = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid pollfd, and bytes that are valid for their length.
    unsafe {
        if libc::poll(&mut log, 1, 0) == 1 && log.revents & libc::POLLOUT != 0 {
            libc::write(libc::STDERR_FILENO, room.as_ptr().cast(), length);
        }
    }
}
