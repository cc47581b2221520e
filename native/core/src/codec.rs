//! The codecs: lz4 and zstd from their C libraries, working in memory that is made once per worker: neither allocates.

pub mod dictionary;

use crate::error::{Error, Result};
use crate::object;
use crate::page::{Cluster, Page, CLUSTER_PAGES, PAGE_SIZE};
use dictionary::{Decoder, Encoder};
use lz4_sys::{c_char, c_int, LZ4_decompress_safe};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::str::FromStr;
use zstd_safe::zstd_sys as zstd;

extern "C" {
    // In the library, but not in lz4-sys's bindings.
    fn LZ4_sizeofState() -> c_int;
    fn LZ4_compress_fast_extState(
        state: *mut c_void,
        source: *const c_char,
        destination: *mut c_char,
        source_size: c_int,
        destination_size: c_int,
        acceleration: c_int,
    ) -> c_int;
}

/// How the payload of an object is encoded, as its header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Codec {
    /// The page as it is: incompressible.
    Raw = 1,
    /// One lz4 block.
    Lz4 = 2,
    /// One zstd frame without magic number, content size, checksum or dictionary id.
    Zstd = 3,
    /// One byte that names the version of a dictionary, then a frame as above that takes it.
    ZstdDictionary = 4,
}

impl Codec {
    pub fn name(self) -> &'static str {
        match self {
            Codec::Raw => "incompressible",
            Codec::Lz4 => "lz4",
            Codec::Zstd => "zstd",
            Codec::ZstdDictionary => "zstd_dictionary",
        }
    }

    pub fn from_number(number: u16) -> Option<Codec> {
        [Codec::Raw, Codec::Lz4, Codec::Zstd, Codec::ZstdDictionary].into_iter().find(|&codec| codec as u16 == number)
    }
}

/// What new pages are compressed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    Lz4,
    Zstd,
}

impl Algorithm {
    pub fn name(self) -> &'static str {
        match self {
            Algorithm::Lz4 => "lz4",
            Algorithm::Zstd => "zstd",
        }
    }
}

impl FromStr for Algorithm {
    type Err = Error;
    fn from_str(name: &str) -> Result<Algorithm> {
        [Algorithm::Lz4, Algorithm::Zstd]
            .into_iter()
            .find(|algorithm| algorithm.name() == name)
            .ok_or_else(|| Error::Invalid(format!("unknown compression algorithm {name:?}: use lz4 or zstd")))
    }
}

pub const ZSTD_LEVELS: std::ops::RangeInclusive<i32> = 1..=22;

/// An algorithm and the zstd level that goes with it, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    pub algorithm: Algorithm,
    pub zstd_level: i32,
}

impl Compression {
    /// Errors: [`Error::Invalid`] for a level outside 1..=22.
    pub fn new(algorithm: Algorithm, zstd_level: i32) -> Result<Compression> {
        if !ZSTD_LEVELS.contains(&zstd_level) {
            return Err(Error::Invalid(format!("zstd level {zstd_level} is out of range: use 1 to 22")));
        }
        Ok(Compression { algorithm, zstd_level })
    }
}

/// A page whose header and payload would not fit into one page is kept as it is.
const MAX_COMPRESSED: usize = PAGE_SIZE - object::HEADER_SIZE;

/// Codec contexts of one worker, and the buffer that they compress to: one thread uses it at a time.
pub struct Codecs {
    lz4: Workspace,
    /// Lies in `_zstd`.
    compressor: NonNull<zstd::ZSTD_CCtx>,
    /// Lies in `_zstd` too.
    decompressor: NonNull<zstd::ZSTD_DCtx>,
    /// The level that `compressor` is set to.
    level: Option<i32>,
    compressed: Box<Page>,
    _zstd: [Workspace; 2],
}

/// Memory for a context of a C library, which wants it 8-aligned.
type Workspace = Box<[u64]>;

// SAFETY: the contexts lie in memory that the scratch owns, and are bound to no thread.
unsafe impl Send for Codecs {}

impl Codecs {
    /// Allocates about 400 KiB, and is the last to do so. Errors: [`Error::Invalid`] if zstd refuses its setting.
    pub fn new() -> Result<Codecs> {
        Self::up_to(*ZSTD_LEVELS.end())
    }

    /// As [`Codecs::new`], for zstd's levels up to one: with a higher one no page gets smaller. Up to 12 it takes about half.
    pub fn up_to(level: i32) -> Result<Codecs> {
        Self::for_pages(1, level)
    }

    /// As [`Codecs::up_to`], for [`Codecs::compress_cluster`] too.
    pub fn for_clusters(level: i32) -> Result<Codecs> {
        Self::for_pages(CLUSTER_PAGES, level)
    }

    fn for_pages(pages: usize, level: i32) -> Result<Codecs> {
        let compressor_bytes = |level| {
            // SAFETY: takes nothing but numbers, returns a number.
            unsafe {
                let parameters = zstd::ZSTD_getCParams(level, (pages * PAGE_SIZE) as u64, 0);
                zstd::ZSTD_estimateCCtxSize_usingCParams(parameters)
            }
        };
        // SAFETY: as above.
        let (lz4_bytes, decompressor_bytes) = unsafe { (LZ4_sizeofState() as usize, zstd::ZSTD_estimateDCtxSize()) };
        // Not zero: memory that is written here is resident, and faults no more.
        let workspace = |bytes: usize| -> Workspace { vec![1; bytes.div_ceil(8)].into() };
        let mut memory =
            [workspace((1..=level).map(compressor_bytes).max().unwrap_or(0)), workspace(decompressor_bytes)];
        let [for_compressor, for_decompressor] = &mut memory;
        // SAFETY: each context gets memory of its own of the size asked for, 8-aligned, which lives as long as it.
        let (compressor, decompressor) = unsafe {
            (
                zstd::ZSTD_initStaticCCtx(for_compressor.as_mut_ptr().cast(), size_of_val(&**for_compressor)),
                zstd::ZSTD_initStaticDCtx(for_decompressor.as_mut_ptr().cast(), size_of_val(&**for_decompressor)),
            )
        };
        let refused = || Error::Invalid("the zstd library refused its memory or a parameter".into());
        let compressor = NonNull::new(compressor).ok_or_else(refused)?;
        let decompressor = NonNull::new(decompressor).ok_or_else(refused)?;
        let magicless = zstd::ZSTD_format_e::ZSTD_f_zstd1_magicless as c_int;
        let for_compressor = [
            (zstd::ZSTD_cParameter::ZSTD_c_experimentalParam2, magicless), // ZSTD_c_format
            (zstd::ZSTD_cParameter::ZSTD_c_contentSizeFlag, 0),
            (zstd::ZSTD_cParameter::ZSTD_c_checksumFlag, 0),
            (zstd::ZSTD_cParameter::ZSTD_c_dictIDFlag, 0),
        ];
        for (parameter, value) in for_compressor {
            // SAFETY: the context is alive.
            zstd_result(unsafe { zstd::ZSTD_CCtx_setParameter(compressor.as_ptr(), parameter, value) })
                .ok_or_else(refused)?;
        }
        let format = zstd::ZSTD_dParameter::ZSTD_d_experimentalParam1; // ZSTD_d_format
                                                                       // SAFETY: the context is alive.
        zstd_result(unsafe { zstd::ZSTD_DCtx_setParameter(decompressor.as_ptr(), format, magicless) })
            .ok_or_else(refused)?;
        Ok(Codecs {
            lz4: workspace(lz4_bytes),
            compressor,
            decompressor,
            level: None,
            compressed: Box::new([0; PAGE_SIZE]),
            _zstd: memory,
        })
    }

    /// Encodes a page: returns the codec and the payload, which is the page itself if it does not get smaller.
    ///
    /// A codec that fails for a reason of its own makes the page incompressible, never lost.
    pub fn compress<'a>(&'a mut self, page: &'a Page, with: Compression) -> (Codec, &'a [u8]) {
        let (codec, length) = match with.algorithm {
            Algorithm::Lz4 => (Codec::Lz4, self.compress_lz4(page)),
            Algorithm::Zstd => (Codec::Zstd, self.compress_zstd(page, with.zstd_level)),
        };
        match length {
            Some(length) => (codec, &self.compressed[..length]),
            None => (Codec::Raw, page),
        }
    }

    fn compress_lz4(&mut self, page: &Page) -> Option<usize> {
        // SAFETY: the state has the size that the library asked for and is 8-aligned; source and destination are
        // valid for the lengths given, and do not overlap.
        let written = unsafe {
            LZ4_compress_fast_extState(
                self.lz4.as_mut_ptr().cast(),
                page.as_ptr().cast(),
                self.compressed.as_mut_ptr().cast(),
                PAGE_SIZE as c_int,
                MAX_COMPRESSED as c_int,
                1,
            )
        };
        // 0: does not fit.
        usize::try_from(written).ok().filter(|&length| length > 0)
    }

    fn compress_zstd(&mut self, page: &Page, level: i32) -> Option<usize> {
        self.set_level(level)?;
        Self::frame(self.compressor, page, &mut self.compressed[..MAX_COMPRESSED])
    }

    fn set_level(&mut self, level: i32) -> Option<()> {
        if self.level != Some(level) {
            let (compressor, parameter) = (self.compressor.as_ptr(), zstd::ZSTD_cParameter::ZSTD_c_compressionLevel);
            // SAFETY: the context is alive, and this scratch is borrowed exclusively.
            zstd_result(unsafe { zstd::ZSTD_CCtx_setParameter(compressor, parameter, level) })?;
            self.level = Some(level);
        }
        Some(())
    }

    /// Encodes a page with a dictionary: returns its payload, None if it does not get smaller.
    pub fn compress_with(&mut self, page: &Page, encoder: &Encoder) -> Option<&[u8]> {
        let length = Self::frame_with(self.compressor, page, encoder, &mut self.compressed[..MAX_COMPRESSED])?;
        Some(&self.compressed[..length])
    }

    /// Encodes pages together, with a dictionary or without, which then takes zstd's level. Returns how long it is; None if
    /// there is not as much room. To be read by [`Codecs::decompress_cluster`]. For codecs that were made for clusters up to
    /// this level, or the encoder's.
    pub fn compress_cluster(
        &mut self,
        pages: &Cluster,
        level: i32,
        dictionary: Option<&Encoder>,
        into: &mut [u8],
    ) -> Option<usize> {
        match dictionary {
            Some(encoder) => Self::frame_with(self.compressor, pages.as_flattened(), encoder, into),
            None => {
                self.set_level(level)?;
                Self::frame(self.compressor, pages.as_flattened(), into)
            }
        }
    }

    /// Makes the version of a dictionary, and a frame that takes it, and returns the length of both.
    fn frame_with(context: NonNull<zstd::ZSTD_CCtx>, from: &[u8], encoder: &Encoder, into: &mut [u8]) -> Option<usize> {
        let compressor = context.as_ptr();
        let (version, rest) = into.split_first_mut()?;
        // SAFETY: the context is alive and its owner borrowed exclusively; it forgets the dictionary before that may end.
        let frame = unsafe {
            let refer_to = |dictionary| {
                // A page that did not fit has left it in the middle of a frame, where it takes no other dictionary.
                zstd::ZSTD_CCtx_reset(compressor, zstd::ZSTD_ResetDirective::ZSTD_reset_session_only);
                zstd_result(zstd::ZSTD_CCtx_refCDict(compressor, dictionary))
            };
            refer_to(encoder.as_ptr())?;
            let frame = Self::frame(context, from, rest);
            refer_to(std::ptr::null()).and(frame)
        };
        *version = encoder.version();
        Some(1 + frame?)
    }

    /// Makes a frame, and returns its length. For who has the context's owner borrowed exclusively.
    fn frame(context: NonNull<zstd::ZSTD_CCtx>, from: &[u8], into: &mut [u8]) -> Option<usize> {
        // SAFETY: the context is alive, and nobody else's; source and destination are valid for the lengths given, and do
        // not overlap.
        zstd_result(unsafe {
            zstd::ZSTD_compress2(
                context.as_ptr(),
                into.as_mut_ptr().cast(),
                into.len(),
                from.as_ptr().cast(),
                from.len(),
            )
        })
    }

    /// Decodes a payload into `page`. Returns false, with `page` undefined, if it is not the encoding of a page, or takes
    /// another dictionary than this one.
    #[must_use]
    pub fn decompress(
        &mut self,
        codec: Codec,
        payload: &[u8],
        page: &mut Page,
        dictionary: Option<Decoder<'_>>,
    ) -> bool {
        match codec {
            Codec::Raw => {
                let whole = payload.len() == PAGE_SIZE;
                if whole {
                    page.copy_from_slice(payload);
                }
                whole
            }
            Codec::Lz4 => {
                // SAFETY: source and destination are valid for the lengths given, and do not overlap; the library
                // checks every length that it reads from the source.
                let written = unsafe {
                    LZ4_decompress_safe(
                        payload.as_ptr().cast(),
                        page.as_mut_ptr().cast(),
                        payload.len() as c_int,
                        PAGE_SIZE as c_int,
                    )
                };
                written == PAGE_SIZE as c_int
            }
            Codec::Zstd => self.decompress_frame(payload, page),
            Codec::ZstdDictionary => self.decompress_frame_with(payload, page, dictionary),
        }
    }

    /// Decodes what [`Codecs::compress_cluster`] has made. `takes_one`: with a dictionary. Returns false, with `pages`
    /// undefined, if it is not that, or takes another dictionary than this one.
    #[must_use]
    pub fn decompress_cluster(
        &mut self,
        payload: &[u8],
        pages: &mut Cluster,
        takes_one: bool,
        dictionary: Option<Decoder<'_>>,
    ) -> bool {
        match takes_one {
            true => self.decompress_frame_with(payload, pages.as_flattened_mut(), dictionary),
            false => self.decompress_frame(payload, pages.as_flattened_mut()),
        }
    }

    fn decompress_frame(&mut self, frame: &[u8], into: &mut [u8]) -> bool {
        // SAFETY: the context is alive and borrowed exclusively; source and destination are valid for the lengths given,
        // and do not overlap; the library checks every length that it reads from the source.
        let written = unsafe {
            zstd::ZSTD_decompressDCtx(
                self.decompressor.as_ptr(),
                into.as_mut_ptr().cast(),
                into.len(),
                frame.as_ptr().cast(),
                frame.len(),
            )
        };
        zstd_result(written) == Some(into.len())
    }

    fn decompress_frame_with(&mut self, payload: &[u8], into: &mut [u8], dictionary: Option<Decoder<'_>>) -> bool {
        let (Some(dictionary), Some((version, frame))) = (dictionary, payload.split_first()) else { return false };
        if *version != dictionary.version() {
            return false;
        }
        // SAFETY: as above; who has made the dictionary answers for it.
        let written = unsafe {
            zstd::ZSTD_decompress_usingDDict(
                self.decompressor.as_ptr(),
                into.as_mut_ptr().cast(),
                into.len(),
                frame.as_ptr().cast(),
                frame.len(),
                dictionary.as_ptr(),
            )
        };
        zstd_result(written) == Some(into.len())
    }
}

/// What a function of zstd returned, unless it is an error code.
fn zstd_result(code: usize) -> Option<usize> {
    // SAFETY: takes a number, returns a number.
    (unsafe { zstd::ZSTD_isError(code) } == 0).then_some(code)
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Pages from all zeros to noise: a random prefix, then a repeated pattern.
    fn pages() -> impl Strategy<Value = Box<Page>> {
        (prop::collection::vec(any::<u8>(), 0..=PAGE_SIZE), prop::collection::vec(any::<u8>(), 1..64)).prop_map(
            |(noise, pattern)| {
                let mut page = Box::new([0; PAGE_SIZE]);
                page.iter_mut().zip(noise.iter().chain(pattern.iter().cycle())).for_each(|(to, from)| *to = *from);
                page
            },
        )
    }

    fn compressions() -> impl Strategy<Value = Compression> {
        (prop_oneof![Just(Algorithm::Lz4), Just(Algorithm::Zstd)], 1..=22)
            .prop_map(|(algorithm, level)| Compression::new(algorithm, level).expect("in range"))
    }

    proptest! {
        #[test]
        fn every_page_comes_back(page in pages(), with in compressions()) {
            let mut scratch = Codecs::new().expect("scratch");
            let (codec, payload) = scratch.compress(&page, with);
            let payload = payload.to_vec();
            prop_assert!(codec == Codec::Raw || payload.len() <= MAX_COMPRESSED);
            let mut back = Box::new([0xff; PAGE_SIZE]);
            prop_assert!(scratch.decompress(codec, &payload, &mut back, None));
            prop_assert!(back == page);
        }

        #[test]
        fn any_bytes_are_refused_or_decoded_but_never_overrun(
            number in 1u16..=4, payload in prop::collection::vec(any::<u8>(), 0..=PAGE_SIZE),
        ) {
            let mut scratch = Codecs::new().expect("scratch");
            let codec = Codec::from_number(number).expect("exists");
            let _ = scratch.decompress(codec, &payload, &mut [0; PAGE_SIZE], None);
        }
    }

    #[test]
    fn noise_is_incompressible() {
        let mut page = [0; PAGE_SIZE];
        let mut x = 1u64;
        page.iter_mut().for_each(|byte| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *byte = (x >> 56) as u8;
        });
        let mut scratch = Codecs::new().expect("scratch");
        for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
            let with = Compression::new(algorithm, 3).expect("in range");
            assert_eq!(scratch.compress(&page, with), (Codec::Raw, &page[..]));
        }
    }

    #[test]
    fn every_level_finds_its_memory() {
        let mut page = [0; PAGE_SIZE];
        page.iter_mut().enumerate().for_each(|(n, byte)| *byte = (n / 7 % 50) as u8);
        let mut scratch = Codecs::new().expect("scratch");
        for level in ZSTD_LEVELS.chain(ZSTD_LEVELS.rev()) {
            let with = Compression::new(Algorithm::Zstd, level).expect("in range");
            assert_eq!(scratch.compress(&page, with).0, Codec::Zstd, "level {level}");
        }
    }

    #[test]
    fn unknown_names_and_levels_are_refused() {
        assert!("lzo".parse::<Algorithm>().is_err());
        assert!(Compression::new(Algorithm::Zstd, 0).is_err());
        assert!(Compression::new(Algorithm::Zstd, 23).is_err());
    }
}
