//! INIT: only the flags of what pyfuse3 is shown are changed, and no flag that the kernel has not offered is agreed on.

#![no_main]

use libfuzzer_sys::fuzz_target;
use zswapd_fuse::init;
use zswapd_fuse::wire::{u32_at, IN_HEADER};

fuzz_target!(|input: &[u8]| {
    // In memory that ends where it does.
    let request: Box<[u8]> = input.into();
    let _ = init::has_resend(&request);

    let mut masked = request.clone();
    let flags_at = IN_HEADER + 12;
    assert_eq!(init::mask_request(&mut masked), request.len() >= flags_at + 4);
    let offered = u32_at(&request, flags_at).unwrap_or(0);
    let shown = u32_at(&masked, flags_at).unwrap_or(0);
    assert_eq!(shown & !offered, 0);
    assert_eq!(masked.len(), request.len());
    let changed = (0..masked.len()).filter(|&at| masked[at] != request[at]);
    assert!(changed.into_iter().all(|at| (flags_at..flags_at + 4).contains(&at)));

    if let Some(reply) = init::reply(&request) {
        assert_eq!(u32_at(&reply, 0), u32_at(&request, IN_HEADER), "the kernel's major version");
        assert!(u32_at(&reply, 4) <= u32_at(&request, IN_HEADER + 4), "the kernel's minor version");
        assert_eq!(u32_at(&reply, 12).map(|agreed| agreed & !shown), Some(0));
    }
});
