//! Damage to the state file while it is in use, and when it is recovered: slot words, page map and arena bytes that the
//! engine has not written.
//!
//! What was not damaged reads as it was written. What was reads so too, or EIO; only a slot word that was replaced by
//! another one that checks may read something else, of its own slot alone.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::os::unix::fs::FileExt;
use zswapd_core::codec::{Algorithm, Compression};
use zswapd_core::engine::Engine;
use zswapd_core::memory::memory_file;
use zswapd_core::page::PAGE_SIZE;
use zswapd_core::pool::Allocator;
use zswapd_core::scratch::Scratch;
use zswapd_core::store::{Detached, Files};
use zswapd_fuzz::Contents;

const PAGES: usize = 16;
/// Where the state file has what: see `state.rs` of the core.
const WORDS_START: u64 = PAGE_SIZE as u64;
const MAP_START: u64 = 2 * WORDS_START;
const ARENA_START: u64 = 2 << 20;
/// Arena bytes that are damaged: more than the pages ever take.
const ARENA_BYTES: u64 = 1 << 20;
/// Bits that are flipped in the arena at most: so few do not make a false checksum.
const ARENA_FLIPS: usize = 8;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Write {
        page: u8,
        contents: Contents<'a>,
    },
    Read {
        page: u8,
    },
    Discard {
        page: u8,
    },
    /// Up to four neighbouring bits: the check sees every such run.
    FlipWord {
        page: u8,
        bit: u8,
        run: u8,
    },
    SetWord {
        page: u8,
        word: u64,
    },
    /// A word that checks, in another slot's place.
    CopyWord {
        from: u8,
        to: u8,
    },
    FlipArena {
        at: u32,
        bit: u8,
    },
    /// An entry of the page map, which only a successor looks at.
    SetMap {
        page: u8,
        entry: u16,
    },
    /// The process ends, and another goes on.
    Recover,
}

/// What a page must read.
#[derive(Clone, Debug)]
enum Expected {
    Bytes(Vec<u8>),
    BytesOrLost(Vec<u8>),
    Lost,
    Anything,
}

struct Fixture {
    allocator: Allocator,
    /// None in between.
    engine: Option<Engine>,
    scratch: Scratch,
    detached: Detached,
    state: File,
    expected: Vec<Expected>,
    words_replaced: bool,
    map_damaged: bool,
    arena_flips: usize,
}

fuzz_target!(|input: (bool, bool, Vec<Step<'_>>)| {
    let (z3fold, zstd, steps) = input;
    let allocator = if z3fold { Allocator::Z3fold } else { Allocator::Zsmalloc };
    let mut fixture = Fixture::new(allocator, if zstd { Algorithm::Zstd } else { Algorithm::Lz4 });
    steps.into_iter().for_each(|step| fixture.take(step));
    (0..PAGES).for_each(|page| fixture.read(page));
    // Whatever it was: written anew, a page is what was written.
    (0..PAGES).for_each(|page| fixture.write(page, vec![page as u8; PAGE_SIZE]));
    (0..PAGES).for_each(|page| fixture.read(page));
    fixture.recover();
    (0..PAGES).for_each(|page| fixture.read(page));
    fixture.engine().reset();
    fixture.expected.fill(Expected::Bytes(vec![0; PAGE_SIZE]));
    (0..PAGES).for_each(|page| fixture.read(page));
});

impl Fixture {
    fn new(allocator: Allocator, algorithm: Algorithm) -> Fixture {
        let state = memory_file(c"state", 0).expect("memory file");
        let compression = Compression::new(algorithm, 1).expect("in range");
        let files = Files { state: Some(state.try_clone().expect("descriptor")), counters: None };
        let engine = Engine::new((PAGES * PAGE_SIZE) as u64, allocator, 1 << 30, compression, files);
        Fixture {
            allocator,
            engine: Some(engine.expect("engine")),
            scratch: Scratch::new().expect("scratch"),
            detached: Detached::with_capacity(3),
            state: state.into(),
            expected: vec![Expected::Bytes(vec![0; PAGE_SIZE]); PAGES],
            words_replaced: false,
            map_damaged: false,
            arena_flips: 0,
        }
    }

    fn engine(&self) -> &Engine {
        self.engine.as_ref().expect("one that goes on")
    }

    fn recover(&mut self) {
        self.engine = None;
        let files = Files { state: Some(self.state.try_clone().expect("descriptor").into()), counters: None };
        self.engine = Some(Engine::recover(self.allocator, files, None).expect("its header is as it was"));
    }

    fn take(&mut self, step: Step<'_>) {
        let index = |page: u8| usize::from(page) % PAGES;
        match step {
            Step::Write { page, contents } => self.write(index(page), contents.bytes(PAGE_SIZE)),
            Step::Read { page } => self.read(index(page)),
            Step::Discard { page } => {
                let (offset, length) = ((index(page) * PAGE_SIZE) as u64, PAGE_SIZE as u64);
                let engine = self.engine.as_ref().expect("one that goes on");
                let discarded = engine.discard(offset, length, &mut self.detached, &mut self.scratch);
                discarded.expect("whole pages");
                engine.store().free_detached(&mut self.detached);
                self.expected[index(page)] = Expected::Bytes(vec![0; PAGE_SIZE]);
            }
            Step::FlipWord { page, bit, run } => {
                let page = index(page);
                let mask = ((1u64 << (run % 4 + 1)) - 1) << (bit % 64);
                self.set_word(page, self.word(page) ^ mask);
                match self.expected[page] {
                    Expected::Bytes(_) | Expected::BytesOrLost(_) => self.expected[page] = Expected::Lost,
                    // Flipped before: it may check again.
                    Expected::Lost | Expected::Anything => self.replaced(page),
                }
            }
            Step::SetWord { page, word } => self.replace_word(index(page), word),
            Step::CopyWord { from, to } if index(from) != index(to) => {
                self.replace_word(index(to), self.word(index(from)))
            }
            Step::FlipArena { at, bit } if self.arena_flips < ARENA_FLIPS => {
                let at = ARENA_START + u64::from(at) % ARENA_BYTES;
                let mut byte = [0];
                self.state.read_exact_at(&mut byte, at).expect("read");
                byte[0] ^= 1 << (bit % 8);
                self.state.write_all_at(&byte, at).expect("written");
                self.arena_flips += 1;
                self.may_be_lost();
            }
            Step::SetMap { page, entry } => {
                let entry = entry.to_ne_bytes();
                self.state.write_all_at(&entry, MAP_START + u64::from(page) * 2).expect("written");
                self.map_damaged = true;
                self.may_be_lost();
            }
            Step::Recover => self.recover(),
            Step::CopyWord { .. } | Step::FlipArena { .. } => {}
        }
    }

    fn may_be_lost(&mut self) {
        for expected in &mut self.expected {
            if let Expected::Bytes(bytes) = expected {
                *expected = Expected::BytesOrLost(std::mem::take(bytes));
            }
        }
    }

    fn write(&mut self, page: usize, bytes: Vec<u8>) {
        let engine = self.engine.as_ref().expect("one that goes on");
        engine.write((page * PAGE_SIZE) as u64, &bytes, &mut self.scratch).expect("room");
        // With an object's header and a word both forged, two slots may have named one object.
        let certain = !self.map_damaged && (!self.words_replaced || self.arena_flips == 0);
        self.expected[page] = if certain { Expected::Bytes(bytes) } else { Expected::BytesOrLost(bytes) };
    }

    fn read(&mut self, page: usize) {
        let mut bytes = vec![0; PAGE_SIZE];
        let engine = self.engine.as_ref().expect("one that goes on");
        let read = engine.read((page * PAGE_SIZE) as u64, &mut bytes, &mut self.scratch);
        let expected = &mut self.expected[page];
        match (read, &*expected) {
            (Ok(_), Expected::Bytes(right) | Expected::BytesOrLost(right)) => {
                assert!(bytes == *right, "page {page} is not what was written");
            }
            (Err(error), Expected::BytesOrLost(_) | Expected::Lost | Expected::Anything) => {
                assert_eq!(error.errno(), libc::EIO);
                *expected = Expected::Lost;
            }
            (Ok(_), Expected::Anything) => {}
            (Err(error), Expected::Bytes(_)) => panic!("page {page}: {error}"),
            (Ok(_), Expected::Lost) => panic!("page {page} came back"),
        }
    }

    fn word(&self, page: usize) -> u64 {
        let mut word = [0; 8];
        self.state.read_exact_at(&mut word, WORDS_START + page as u64 * 8).expect("read");
        u64::from_ne_bytes(word)
    }

    fn set_word(&mut self, page: usize, word: u64) {
        self.state.write_all_at(&word.to_ne_bytes(), WORDS_START + page as u64 * 8).expect("written");
    }

    fn replace_word(&mut self, page: usize, word: u64) {
        self.set_word(page, word);
        self.replaced(page);
    }

    fn replaced(&mut self, page: usize) {
        self.words_replaced = true;
        self.expected[page] = Expected::Anything;
    }
}
