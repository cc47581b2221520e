//! What is negotiated at mount: the reply to the kernel, and INIT as pyfuse3 is shown it.
//!
//! The pager answers INIT itself, at once: until somebody has, whoever looks at the mount point waits, and cannot be
//! killed. pyfuse3 needs an INIT to begin; what it replies is for nobody.

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
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const SPLICE_WRITE: u32 = 1 << 7;
    pub const SPLICE_MOVE: u32 = 1 << 8;
    pub const SPLICE_READ: u32 = 1 << 9;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
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

/// What is agreed on, as far as the kernel offers it: for the page path ASYNC_DIO and those for long requests; the others
/// are what libfuse would agree on for pyfuse3, which knows its requests by them.
const WANTED: u32 = flag::ASYNC_READ
    | flag::ATOMIC_O_TRUNC
    | flag::BIG_WRITES
    | flag::AUTO_INVAL_DATA
    | flag::DO_READDIRPLUS
    | flag::ASYNC_DIO
    | flag::MAX_PAGES;

/// The protocol that is spoken, 7.31: what libfuse 3.10 and later say.
const MAJOR: u32 = 7;
const MINOR: u32 = 31;
/// The first minor version whose reply has all that is said here.
const OLDEST_MINOR: u32 = 28;

/// Bytes of `struct fuse_init_out`.
pub const INIT_OUT: usize = 64;
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

/// The payload of the reply to `request`. None, if it is too short, or of a protocol that is not spoken.
///
/// Only flags that the kernel has offered are agreed on.
pub fn reply(request: &[u8]) -> Option<[u8; INIT_OUT]> {
    let field = |at| u32_at(request, IN_HEADER + at);
    let (major, minor, max_readahead, offered) = (field(0)?, field(4)?, field(8)?, field(FLAGS)?);
    if major != MAJOR || minor < OLDEST_MINOR {
        return None;
    }
    // struct fuse_init_out: major, minor, max_readahead, flags, max_background and congestion_threshold (u16),
    // max_write, time_gran (nanoseconds), max_pages (u16), ...
    let words = [MAJOR, minor.min(MINOR), max_readahead, offered & WANTED];
    let limits = [MAX_BACKGROUND.to_ne_bytes(), CONGESTION_THRESHOLD.to_ne_bytes()];
    let sizes = [MAX_WRITE as u32, 1].map(u32::to_ne_bytes);
    let mut payload = [0; INIT_OUT];
    payload[..16].copy_from_slice(words.map(u32::to_ne_bytes).as_flattened());
    payload[16..20].copy_from_slice(limits.as_flattened());
    payload[20..28].copy_from_slice(sizes.as_flattened());
    payload[28..30].copy_from_slice(&MAX_PAGES.to_ne_bytes());
    Some(payload)
}

fn change_u32(bytes: &mut [u8], at: usize, change: impl FnOnce(u32) -> u32) -> bool {
    let Some(value) = u32_at(bytes, at) else { return false };
    bytes[at..at + 4].copy_from_slice(&change(value).to_ne_bytes());
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(length: usize, flags: u32) -> Vec<u8> {
        let mut request = vec![0; IN_HEADER + 64];
        let words = [MAJOR, 45, 128 << 10, flags].map(u32::to_ne_bytes);
        request[IN_HEADER..IN_HEADER + 16].copy_from_slice(words.as_flattened());
        request.truncate(IN_HEADER + length);
        request
    }

    #[test]
    fn hidden_flags_are_masked_and_others_kept() {
        let mut request = asked(64, u32::MAX);
        assert!(mask_request(&mut request));
        assert_eq!(u32_at(&request, IN_HEADER + FLAGS), Some(!HIDDEN));
        assert!(!mask_request(&mut [0; IN_HEADER]));
    }

    #[test]
    fn resending_is_offered_among_the_further_flags() {
        let mut request = asked(64, flag::INIT_EXT);
        assert!(!has_resend(&request));
        request[IN_HEADER + FLAGS2] = 0x80;
        assert!(has_resend(&request));
        request[IN_HEADER + FLAGS + 3] = 0;
        assert!(!has_resend(&request), "what is not announced is not there");
        assert!(!has_resend(&asked(16, flag::INIT_EXT)));
    }

    #[test]
    fn only_what_the_kernel_offered_is_agreed_on() {
        let agreed = |offered| {
            let payload = reply(&asked(64, offered)).expect("answered");
            u32_at(&payload, FLAGS).expect("long enough")
        };
        assert_eq!(agreed(0), 0);
        assert_eq!(agreed(flag::BIG_WRITES | flag::MAX_PAGES | HIDDEN | 1 << 4), flag::BIG_WRITES | flag::MAX_PAGES);
        assert_eq!(agreed(u32::MAX), WANTED);
        assert_eq!(WANTED & HIDDEN, 0);
    }

    #[test]
    fn the_reply_says_how_much_a_request_may_carry() {
        let payload = reply(&asked(64, u32::MAX)).expect("answered");
        assert_eq!([0, 4, 8].map(|at| u32_at(&payload, at)), [Some(7), Some(31), Some(128 << 10)]);
        assert_eq!(u32_at(&payload, 16), Some(96 << 16 | 128), "congestion_threshold and max_background");
        assert_eq!([20, 24, 28].map(|at| u32_at(&payload, at)), [Some(1 << 20), Some(1), Some(256)]);
        assert!(payload[32..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn what_is_too_short_or_of_another_protocol_is_not_answered() {
        assert!(reply(&asked(16, u32::MAX)).is_some());
        assert!(reply(&asked(15, u32::MAX)).is_none());
        for (at, value) in [(0, 8u32), (0, 6), (4, OLDEST_MINOR - 1)] {
            let mut request = asked(64, u32::MAX);
            request[IN_HEADER + at..IN_HEADER + at + 4].copy_from_slice(&value.to_ne_bytes());
            assert!(reply(&request).is_none());
        }
    }
}
