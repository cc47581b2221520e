//! What is negotiated at mount: INIT as pyfuse3 is shown it, and the reply as the kernel is given it.
//!
//! pyfuse3 answers INIT, since most requests are its own; the pager raises in its reply what concerns the page path.

use crate::reply::OUT_HEADER;
use crate::wire::{u32_at, IN_HEADER};

/// Largest WRITE, in bytes: 256 pages, the most that the kernel allows by default (fs.fuse.max_pages_limit).
pub const MAX_WRITE: usize = 1 << 20;
const MAX_PAGES: u16 = (MAX_WRITE / 4096) as u16;
/// Largest READ, in bytes: the most that swap reads at once (`vm.page-cluster` of 5). Agreed on by a mount option.
pub const MAX_READ: usize = 128 << 10;
/// Requests that the kernel may have under way in the background. The loop driver's direct I/O counts here: with the
/// default of 12 its worker blocks.
const MAX_BACKGROUND: u16 = 128;
const CONGESTION_THRESHOLD: u16 = 96;

/// Flags of `struct fuse_init_in` and `_out`.
mod flag {
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const SPLICE_WRITE: u32 = 1 << 7;
    pub const SPLICE_MOVE: u32 = 1 << 8;
    pub const SPLICE_READ: u32 = 1 << 9;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const WRITEBACK_CACHE: u32 = 1 << 16;
    pub const NO_OPEN_SUPPORT: u32 = 1 << 17;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const NO_OPENDIR_SUPPORT: u32 = 1 << 24;
    pub const INIT_EXT: u32 = 1 << 30;

    /// In flags2.
    pub const HAS_RESEND: u32 = 1 << 7;
}

/// Offered by the kernel, but not to be seen by pyfuse3: splice does not work on a socket as on /dev/fuse; a writeback
/// cache and opens without messages would go past the pager; extended flags are the pager's own business.
const HIDDEN: u32 = flag::SPLICE_WRITE
    | flag::SPLICE_MOVE
    | flag::SPLICE_READ
    | flag::WRITEBACK_CACHE
    | flag::NO_OPEN_SUPPORT
    | flag::NO_OPENDIR_SUPPORT
    | flag::INIT_EXT;

/// Where in `struct fuse_init_in` and `_out` the flags stand (after major, minor, max_readahead).
const FLAGS: usize = 12;
/// Where in `struct fuse_init_in` the further ones stand.
const FLAGS2: usize = 16;

/// Whether the kernel, whose INIT this is, can send requests again that were sent to a process that is gone.
pub fn has_resend(request: &[u8]) -> bool {
    let flags = u32_at(request, IN_HEADER + FLAGS).unwrap_or(0);
    let more = u32_at(request, IN_HEADER + FLAGS2).filter(|_| flags & flag::INIT_EXT != 0);
    more.is_some_and(|more| more & flag::HAS_RESEND != 0)
}

/// Changes an INIT request to what pyfuse3 may see. False, with nothing changed, if it is too short.
pub fn mask_request(message: &mut [u8]) -> bool {
    change_u32(message, IN_HEADER + FLAGS, |flags| flags & !HIDDEN)
}

/// Changes pyfuse3's reply to `request` into what the kernel is to get. False if it is an error or too short.
///
/// Only flags that the kernel offered are added. The reply keeps its length: what it does not have stays default.
pub fn raise_reply(request: &[u8], reply: &mut [u8]) -> bool {
    // struct fuse_init_out: major, minor, max_readahead, flags, max_background and congestion_threshold (u16),
    // max_write, time_gran, max_pages (u16), ...
    const LIMITS: usize = OUT_HEADER + 16;
    const MAX_PAGES_AT: usize = OUT_HEADER + 28;
    let Some(offered) = u32_at(request, IN_HEADER + FLAGS) else { return false };
    if u32_at(reply, 4) != Some(0) || reply.len() < MAX_PAGES_AT + 4 {
        return false;
    }
    let wanted = flag::ASYNC_READ | flag::BIG_WRITES | flag::ASYNC_DIO | flag::MAX_PAGES;
    change_u32(reply, OUT_HEADER + FLAGS, |flags| (flags & !HIDDEN) | (wanted & offered));
    reply[LIMITS..LIMITS + 2].copy_from_slice(&MAX_BACKGROUND.to_ne_bytes());
    reply[LIMITS + 2..LIMITS + 4].copy_from_slice(&CONGESTION_THRESHOLD.to_ne_bytes());
    reply[LIMITS + 4..LIMITS + 8].copy_from_slice(&(MAX_WRITE as u32).to_ne_bytes());
    reply[MAX_PAGES_AT..MAX_PAGES_AT + 2].copy_from_slice(&MAX_PAGES.to_ne_bytes());
    true
}

fn change_u32(bytes: &mut [u8], at: usize, change: impl FnOnce(u32) -> u32) -> bool {
    let Some(value) = u32_at(bytes, at) else { return false };
    bytes[at..at + 4].copy_from_slice(&change(value).to_ne_bytes());
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_flags(header: usize, length: usize, flags: u32) -> Vec<u8> {
        let mut message = vec![0; header + length];
        message[header + FLAGS..header + FLAGS + 4].copy_from_slice(&flags.to_ne_bytes());
        message
    }

    #[test]
    fn hidden_flags_are_masked_and_others_kept() {
        let mut request = with_flags(IN_HEADER, 64, u32::MAX);
        assert!(mask_request(&mut request));
        assert_eq!(u32_at(&request, IN_HEADER + FLAGS), Some(!HIDDEN));
        assert!(!mask_request(&mut [0; IN_HEADER]));
    }

    #[test]
    fn resending_is_offered_among_the_further_flags() {
        let mut request = with_flags(IN_HEADER, 64, flag::INIT_EXT);
        assert!(!has_resend(&request));
        request[IN_HEADER + FLAGS2] = 0x80;
        assert!(has_resend(&request));
        request[IN_HEADER + FLAGS + 3] = 0;
        assert!(!has_resend(&request), "what is not announced is not there");
        assert!(!has_resend(&with_flags(IN_HEADER, 16, flag::INIT_EXT)));
    }

    #[test]
    fn only_what_the_kernel_offered_is_raised() {
        let request = with_flags(IN_HEADER, 64, flag::BIG_WRITES | flag::MAX_PAGES | 1 << 3);
        let mut reply = with_flags(OUT_HEADER, 64, 1 << 3 | flag::SPLICE_READ);
        assert!(raise_reply(&request, &mut reply));
        let flags = u32_at(&reply, OUT_HEADER + FLAGS);
        assert_eq!(flags, Some(1 << 3 | flag::BIG_WRITES | flag::MAX_PAGES));
        assert_eq!(u32_at(&reply, OUT_HEADER + 20), Some(MAX_WRITE as u32));
    }

    #[test]
    fn an_error_or_a_short_reply_is_left_alone() {
        let request = with_flags(IN_HEADER, 64, u32::MAX);
        let mut short = with_flags(OUT_HEADER, 24, 0);
        assert!(!raise_reply(&request, &mut short));
        let mut error = with_flags(OUT_HEADER, 64, 0);
        error[4..8].copy_from_slice(&(-libc::EPROTO).to_ne_bytes());
        assert!(!raise_reply(&request, &mut error));
    }
}
