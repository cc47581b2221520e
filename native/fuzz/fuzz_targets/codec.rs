//! Payloads that no compressor made, and compressed pages that were damaged: refused or decoded, never written beyond
//! the page, and without effect on the next page.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::cell::RefCell;
use zswapd_core::codec::{Algorithm, Codec, Compression, Scratch};
use zswapd_core::page::{Page, PAGE_SIZE};
use zswapd_fuzz::Contents;

#[derive(Arbitrary, Debug)]
enum Payload<'a> {
    Any { codec: u8, bytes: &'a [u8] },
    Damaged { zstd: bool, level: u8, page: Contents<'a>, changes: Vec<(u16, u8)>, cut: u16 },
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new().expect("scratch"));
}

fuzz_target!(|payload: Payload| SCRATCH.with_borrow_mut(|scratch| check(payload, scratch)));

fn check(payload: Payload<'_>, scratch: &mut Scratch) {
    match payload {
        Payload::Any { codec, bytes } => {
            let codec = Codec::from_number(u16::from(codec) % 3 + 1).expect("exists");
            decompress(scratch, codec, bytes);
        }
        Payload::Damaged { zstd, level, page, changes, cut } => {
            let page: Box<Page> = page.bytes(PAGE_SIZE).into_boxed_slice().try_into().expect("a page");
            let algorithm = if zstd { Algorithm::Zstd } else { Algorithm::Lz4 };
            let with = Compression::new(algorithm, i32::from(level) % 22 + 1).expect("in range");
            let (codec, intact) = scratch.compress(&page, with);
            let intact = intact.to_vec();
            let mut damaged = intact.clone();
            for (at, change) in changes {
                let at = usize::from(at) % damaged.len();
                damaged[at] ^= change;
            }
            damaged.truncate(intact.len() - usize::from(cut) % (intact.len() + 1));
            decompress(scratch, codec, &damaged);
            assert!(decompress(scratch, codec, &intact).as_deref() == Some(&page[..]), "{codec:?}: not the page");
        }
    }
}

/// Decodes into a page between two others, which must not change.
fn decompress(scratch: &mut Scratch, codec: Codec, payload: &[u8]) -> Option<Vec<u8>> {
    const FENCE: u8 = 0xfe;
    let mut memory = vec![FENCE; 3 * PAGE_SIZE];
    let page = <&mut Page>::try_from(&mut memory[PAGE_SIZE..2 * PAGE_SIZE]).expect("a page");
    let payload: Box<[u8]> = payload.into();
    let decoded = scratch.decompress(codec, &payload, page);
    let fences = memory[..PAGE_SIZE].iter().chain(&memory[2 * PAGE_SIZE..]);
    assert!(fences.into_iter().all(|&byte| byte == FENCE), "{codec:?} wrote outside the page");
    decoded.then(|| memory[PAGE_SIZE..2 * PAGE_SIZE].to_vec())
}
