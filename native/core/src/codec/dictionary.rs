//! A dictionary of zstd, made ready for one of the two directions, in memory that others have taken for it.

use super::{zstd_result, Workspace};
use crate::page::PAGE_SIZE;
use std::marker::PhantomData;
use std::ptr::NonNull;
use zstd_safe::zstd_sys as zstd;

/// The longest: longer ones gain next to nothing for pages.
pub const MAX_BYTES: usize = 112 << 10;

/// Bytes that a [`Decoder`] takes, at most: tested.
pub const DECODER_BYTES: usize = 28 << 10;

/// A dictionary to decompress with.
#[derive(Clone, Copy)]
pub struct Decoder<'a> {
    digested: NonNull<zstd::ZSTD_DDict>,
    /// As the payloads name it that take it.
    version: u8,
    bytes: PhantomData<&'a [u8]>,
}

impl Decoder<'_> {
    /// Makes a dictionary ready in `memory`, at whose start it then lies, 8-aligned. None if it is none: what was trained
    /// has a header, which may be damaged; bytes without one are used as they are. Allocates nothing.
    ///
    /// # Safety
    /// `memory` is valid, for [`DECODER_BYTES`], and nobody else's; both stay as they are while the result is used.
    pub unsafe fn digest<'a>(bytes: &'a [u8], version: u8, memory: *mut u64) -> Option<Decoder<'a>> {
        // SAFETY: the caller's promise; the library checks what it reads.
        let digested = unsafe {
            zstd::ZSTD_initStaticDDict(
                memory.cast(),
                DECODER_BYTES,
                bytes.as_ptr().cast(),
                bytes.len(),
                zstd::ZSTD_dictLoadMethod_e::ZSTD_dlm_byRef,
                zstd::ZSTD_dictContentType_e::ZSTD_dct_auto,
            )
        };
        // SAFETY: as above.
        unsafe { Decoder::found(digested.cast_mut().cast(), version) }
    }

    /// One that [`Decoder::digest`] has made there.
    ///
    /// # Safety
    /// It has, and all that it was told still holds.
    pub unsafe fn found<'a>(memory: *mut u64, version: u8) -> Option<Decoder<'a>> {
        Some(Decoder { digested: NonNull::new(memory.cast())?, version, bytes: PhantomData })
    }

    pub(super) fn version(&self) -> u8 {
        self.version
    }

    pub(super) fn as_ptr(&self) -> *const zstd::ZSTD_DDict {
        self.digested.as_ptr()
    }
}

/// A dictionary to compress with, at one level.
pub struct Encoder {
    digested: NonNull<zstd::ZSTD_CDict>,
    version: u8,
    level: i32,
    /// With a copy of the dictionary.
    memory: Workspace,
}

// SAFETY: plain memory, which nothing changes any more.
unsafe impl Send for Encoder {}
// SAFETY: as above.
unsafe impl Sync for Encoder {}

impl Encoder {
    /// Takes some 100 KiB to 1 MiB, by level and length. None if it is no dictionary: see [`Decoder::digest`].
    pub fn digest(bytes: &[u8], version: u8, level: i32) -> Option<Encoder> {
        // SAFETY: takes nothing but numbers, and returns numbers.
        let (parameters, length) = unsafe {
            let parameters = zstd::ZSTD_getCParams(level, PAGE_SIZE as u64, bytes.len());
            let by_copy = zstd::ZSTD_dictLoadMethod_e::ZSTD_dlm_byCopy;
            (parameters, zstd::ZSTD_estimateCDictSize_advanced(bytes.len(), parameters, by_copy))
        };
        let mut memory: Workspace = vec![1; zstd_result(length)?.div_ceil(8)].into();
        // SAFETY: memory of the size asked for, 8-aligned, which lives as long as what lies in it.
        let digested = unsafe {
            zstd::ZSTD_initStaticCDict(
                memory.as_mut_ptr().cast(),
                size_of_val(&*memory),
                bytes.as_ptr().cast(),
                bytes.len(),
                zstd::ZSTD_dictLoadMethod_e::ZSTD_dlm_byCopy,
                zstd::ZSTD_dictContentType_e::ZSTD_dct_auto,
                parameters,
            )
        };
        Some(Encoder { digested: NonNull::new(digested.cast_mut())?, version, level, memory })
    }

    pub fn version(&self) -> u8 {
        self.version
    }

    pub fn level(&self) -> i32 {
        self.level
    }

    /// Of memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.memory)
    }

    pub(super) fn as_ptr(&self) -> *const zstd::ZSTD_CDict {
        self.digested.as_ptr()
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;
    use crate::codec::{Codec, Codecs, ZSTD_LEVELS};
    use crate::page::Page;

    /// Records that look alike, with numbers in them.
    fn page(seed: u64) -> Page {
        let mut x = seed | 1;
        let records = (0..).flat_map(|_| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            format!("{{\"name\": \"process-{}\", \"state\": \"sleeping\", \"id\": {}}}\n", x >> 60, x >> 40)
                .into_bytes()
        });
        let mut page = [0; PAGE_SIZE];
        page.iter_mut().zip(records).for_each(|(to, from)| *to = from);
        page
    }

    fn dictionary() -> Vec<u8> {
        (100..120).flat_map(page).collect()
    }

    fn room() -> Workspace {
        vec![0; DECODER_BYTES / 8].into()
    }

    #[test]
    fn every_level_finds_a_page_in_the_dictionary() {
        let (bytes, mut memory) = (dictionary(), room());
        // SAFETY: both are this test's.
        let decoder = unsafe { Decoder::digest(&bytes, 7, memory.as_mut_ptr()) }.expect("a dictionary");
        for level in ZSTD_LEVELS {
            // No more memory than it takes without one.
            let mut codecs = Codecs::up_to(level).expect("codecs");
            let encoder = Encoder::digest(&bytes, 7, level).expect("a dictionary");
            let page = page(119);
            let without = codecs.compress_zstd(&page, level).expect("compressible");
            let payload = codecs.compress_with(&page, &encoder).expect("compressible").to_vec();
            assert!(payload.len() * 2 < without, "level {level}: {} and {without} without", payload.len());
            let mut back = [0; PAGE_SIZE];
            assert!(codecs.decompress(Codec::ZstdDictionary, &payload, &mut back, Some(decoder)));
            assert_eq!(back, page);
            // The dictionary is forgotten again.
            assert_eq!(codecs.compress_zstd(&page, level), Some(without));
        }
    }

    #[test]
    fn a_page_that_does_not_get_smaller_does_not_keep_the_next_one_from_it() {
        let (bytes, mut codecs) = (dictionary(), Codecs::new().expect("codecs"));
        let encoder = Encoder::digest(&bytes, 7, 9).expect("a dictionary");
        let mut x = 1u64;
        let noise = std::array::from_fn(|_| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 56) as u8
        });
        for _ in 0..2 {
            assert_eq!(codecs.compress_with(&noise, &encoder), None);
            assert!(codecs.compress_with(&page(119), &encoder).is_some());
            assert_eq!(codecs.compress_with(&noise, &encoder), None);
            assert!(codecs.compress_zstd(&page(119), 9).is_some());
            assert_eq!(codecs.compress_zstd(&noise, 9), None);
            assert!(codecs.compress_with(&page(119), &encoder).is_some());
        }
    }

    #[test]
    fn without_its_dictionary_a_page_is_refused() {
        let (bytes, mut memory, mut codecs) = (dictionary(), room(), Codecs::new().expect("codecs"));
        let encoder = Encoder::digest(&bytes, 7, 9).expect("a dictionary");
        let payload = codecs.compress_with(&page(1), &encoder).expect("compressible").to_vec();
        let mut back = [0; PAGE_SIZE];
        assert!(!codecs.decompress(Codec::ZstdDictionary, &payload, &mut back, None));
        // SAFETY: both are this test's.
        let other = unsafe { Decoder::digest(&bytes, 8, memory.as_mut_ptr()) }.expect("a dictionary");
        assert!(!codecs.decompress(Codec::ZstdDictionary, &payload, &mut back, Some(other)));
        assert!(!codecs.decompress(Codec::ZstdDictionary, &[], &mut back, Some(other)));
    }

    #[test]
    fn the_longest_finds_its_memory() {
        let bytes: Vec<u8> = (0..).flat_map(page).take(MAX_BYTES).collect();
        let mut memory = room();
        // SAFETY: both are this test's.
        assert!(unsafe { Decoder::digest(&bytes, 7, memory.as_mut_ptr()) }.is_some());
        assert!(ZSTD_LEVELS.into_iter().all(|level| Encoder::digest(&bytes, 7, level).is_some()));
    }

    /// What says that it was trained, and was not.
    #[test]
    fn a_damaged_header_is_refused() {
        let mut bytes = zstd::ZSTD_MAGIC_DICTIONARY.to_le_bytes().to_vec();
        bytes.extend_from_slice(&dictionary());
        let mut memory = room();
        // SAFETY: both are this test's.
        assert!(unsafe { Decoder::digest(&bytes, 7, memory.as_mut_ptr()) }.is_none());
        assert!(Encoder::digest(&bytes, 7, 9).is_none());
    }
}
