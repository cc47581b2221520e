//! INIT and any reply to it: only the fields that are the pager's change, and no flag that the kernel has not offered
//! is added.

#![no_main]

use libfuzzer_sys::fuzz_target;
use zswapd_fuse::init;
use zswapd_fuse::reply::OUT_HEADER;
use zswapd_fuse::wire::{u32_at, IN_HEADER};

fuzz_target!(|input: (&[u8], &[u8])| {
    // In memory that ends where they do.
    let (request, reply): (Box<[u8]>, Box<[u8]>) = (input.0.into(), input.1.into());

    let mut masked = request.clone();
    let flags_at = IN_HEADER + 12;
    assert_eq!(init::mask_request(&mut masked), request.len() >= flags_at + 4);
    let offered = u32_at(&request, flags_at).unwrap_or(0);
    let shown = u32_at(&masked, flags_at).unwrap_or(0);
    assert_eq!(shown & !offered, 0);
    assert_unchanged(&request, &masked, &[flags_at..flags_at + 4]);

    let mut raised = reply.clone();
    if !init::raise_reply(&masked, &mut raised) {
        assert_eq!(reply, raised);
        return;
    }
    assert_eq!(u32_at(&reply, 4), Some(0), "an error is no agreement");
    // Flags, max_background, congestion_threshold and max_write, max_pages of struct fuse_init_out.
    let flags_at = OUT_HEADER + 12;
    assert_unchanged(&reply, &raised, &[flags_at..OUT_HEADER + 24, OUT_HEADER + 28..OUT_HEADER + 30]);
    let (answered, agreed) = (u32_at(&reply, flags_at).unwrap_or(0), u32_at(&raised, flags_at).unwrap_or(0));
    assert_eq!(agreed & !(answered | shown), 0);
});

fn assert_unchanged(before: &[u8], after: &[u8], but: &[std::ops::Range<usize>]) {
    assert_eq!(before.len(), after.len());
    for at in 0..before.len() {
        assert!(before[at] == after[at] || but.iter().any(|range| range.contains(&at)), "byte {at} changed");
    }
}
