//! Payloads that no compressor made, and compressed pages that were damaged: refused or decoded, never written beyond
//! the page, and without effect on the next page.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::cell::RefCell;
use zswapd_core::codec::dictionary::{Decoder, Encoder, DECODER_BYTES, MAX_BYTES};
use zswapd_core::codec::{Algorithm, Codec, Codecs, Compression};
use zswapd_core::page::{Page, PAGE_SIZE};
use zswapd_fuzz::Contents;

#[derive(Arbitrary, Debug)]
enum Payload<'a> {
    Any { codec: u8, bytes: &'a [u8] },
    Damaged { zstd: bool, level: u8, page: Contents<'a>, changes: Vec<(u16, u8)>, cut: u16 },
    WithDictionary { level: u8, page: Contents<'a>, dictionary: &'a [u8], changes: Vec<(u16, u8)>, any: &'a [u8] },
}

thread_local! {
    static CODECS: RefCell<Codecs> = RefCell::new(Codecs::new().expect("codecs"));
}

fuzz_target!(|payload: Payload| CODECS.with_borrow_mut(|codecs| check(payload, codecs)));

fn check(payload: Payload<'_>, codecs: &mut Codecs) {
    match payload {
        Payload::Any { codec, bytes } => {
            let codec = Codec::from_number(u16::from(codec) % 4 + 1).expect("exists");
            decompress(codecs, codec, bytes, None);
        }
        Payload::Damaged { zstd, level, page, changes, cut } => {
            let page: Box<Page> = page.bytes(PAGE_SIZE).into_boxed_slice().try_into().expect("a page");
            let algorithm = if zstd { Algorithm::Zstd } else { Algorithm::Lz4 };
            let with = Compression::new(algorithm, i32::from(level) % 22 + 1).expect("in range");
            let (codec, intact) = codecs.compress(&page, with);
            let intact = intact.to_vec();
            let mut damaged = intact.clone();
            for (at, change) in changes {
                let at = usize::from(at) % damaged.len();
                damaged[at] ^= change;
            }
            damaged.truncate(intact.len() - usize::from(cut) % (intact.len() + 1));
            decompress(codecs, codec, &damaged, None);
            assert!(decompress(codecs, codec, &intact, None).as_deref() == Some(&page[..]), "{codec:?}: not the page");
        }
        Payload::WithDictionary { level, page, dictionary, changes, any } => {
            let dictionary = &dictionary[..dictionary.len().min(MAX_BYTES)];
            let mut memory = vec![0u64; DECODER_BYTES / 8];
            // SAFETY: both live until the end of this.
            let Some(decoder) = (unsafe { Decoder::digest(dictionary, 7, memory.as_mut_ptr()) }) else { return };
            decompress(codecs, Codec::ZstdDictionary, any, Some(decoder));
            // What one takes, the other does.
            let encoder = Encoder::digest(dictionary, 7, i32::from(level) % 22 + 1).expect("a dictionary");
            let page: Box<Page> = page.bytes(PAGE_SIZE).into_boxed_slice().try_into().expect("a page");
            let Some(intact) = codecs.compress_with(&page, &encoder).map(<[u8]>::to_vec) else { return };
            let mut damaged = intact.clone();
            for (at, change) in changes {
                let at = usize::from(at) % damaged.len();
                damaged[at] ^= change;
            }
            decompress(codecs, Codec::ZstdDictionary, &damaged, Some(decoder));
            let back = decompress(codecs, Codec::ZstdDictionary, &intact, Some(decoder));
            assert!(back.as_deref() == Some(&page[..]), "with a dictionary: not the page");
        }
    }
}

/// Decodes into a page between two others, which must not change.
fn decompress(codecs: &mut Codecs, codec: Codec, payload: &[u8], dictionary: Option<Decoder<'_>>) -> Option<Vec<u8>> {
    const FENCE: u8 = 0xfe;
    let mut memory = vec![FENCE; 3 * PAGE_SIZE];
    let page = <&mut Page>::try_from(&mut memory[PAGE_SIZE..2 * PAGE_SIZE]).expect("a page");
    let payload: Box<[u8]> = payload.into();
    let decoded = codecs.decompress(codec, &payload, page, dictionary);
    let fences = memory[..PAGE_SIZE].iter().chain(&memory[2 * PAGE_SIZE..]);
    assert!(fences.into_iter().all(|&byte| byte == FENCE), "{codec:?} wrote outside the page");
    decoded.then(|| memory[PAGE_SIZE..2 * PAGE_SIZE].to_vec())
}
