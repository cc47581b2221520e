use super::*;
use crate::memory::memory_file;
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const PAGES: usize = 24;
const SIZE: usize = PAGES * PAGE_SIZE;

fn engine(allocator: Allocator, algorithm: Algorithm, mem_limit_pages: u64) -> Engine {
    let compression = Compression::new(algorithm, 3).expect("level");
    let mem_limit = mem_limit_pages * PAGE_SIZE as u64;
    Engine::new(SIZE as u64, allocator, mem_limit, compression, Files::default()).expect("engine")
}

fn allocators() -> impl Strategy<Value = Allocator> {
    prop::sample::select(&Allocator::ALL)
}

fn discard(engine: &Engine, offset: u64, length: u64, scratch: &mut Scratch) -> Result<()> {
    let mut detached = Detached::with_capacity(7);
    let result = engine.discard(offset, length, &mut detached, scratch);
    engine.store().free_detached(&mut detached);
    result
}

/// Deterministic noise: incompressible, and different for every seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    (0..length).map(|_| next()).collect()
}

/// Bytes of the three kinds that are stored differently.
fn contents(kind: u8, seed: u64, length: usize) -> Vec<u8> {
    match kind {
        0 => vec![seed as u8; length],
        1 => noise(seed, 97).into_iter().cycle().take(length).collect(),
        _ => noise(seed, length),
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write { offset: usize, length: usize, kind: u8, seed: u64 },
    Read { offset: usize, length: usize },
    Discard { offset: usize, length: usize },
    SetAlgorithm(bool),
    SetLimit(u64),
    Compact,
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Whole pages as the kernel writes them, and odd ranges as mkswap and blkid do.
    let pages = (0..PAGES, 1..=8usize).prop_map(|(page, count)| (page * PAGE_SIZE, count * PAGE_SIZE));
    let odd = (0..SIZE, 0..3 * PAGE_SIZE);
    let range = prop_oneof![pages, odd].prop_map(|(offset, length)| (offset, length.min(SIZE - offset)));
    let step = prop_oneof![
        6 => (range.clone(), 0u8..3, any::<u64>())
            .prop_map(|((offset, length), kind, seed)| Step::Write { offset, length, kind, seed }),
        4 => range.clone().prop_map(|(offset, length)| Step::Read { offset, length }),
        2 => range.prop_map(|(offset, length)| Step::Discard { offset, length }),
        1 => any::<bool>().prop_map(Step::SetAlgorithm),
        1 => (0u64..40).prop_map(Step::SetLimit),
        1 => Just(Step::Compact),
        1 => Just(Step::Reset),
    ];
    prop::collection::vec(step, 1..120)
}

/// What each page must read: its bytes, or nothing while it is LOST.
struct Model(Vec<Option<Vec<u8>>>);

impl Model {
    fn pages(offset: usize, length: usize) -> std::ops::Range<usize> {
        if length == 0 {
            0..0
        } else {
            offset / PAGE_SIZE..(offset + length - 1) / PAGE_SIZE + 1
        }
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        for (n, &byte) in data.iter().enumerate() {
            if let Some(page) = &mut self.0[(offset + n) / PAGE_SIZE] {
                page[(offset + n) % PAGE_SIZE] = byte;
            }
        }
        for page in Self::pages(offset, data.len()) {
            let start = page * PAGE_SIZE;
            if offset <= start && start + PAGE_SIZE <= offset + data.len() {
                self.0[page] = Some(data[start - offset..start - offset + PAGE_SIZE].to_vec());
            }
        }
    }

    fn read(&self, offset: usize, length: usize) -> Option<Vec<u8>> {
        Self::pages(offset, length).all(|page| self.0[page].is_some()).then(|| {
            (offset..offset + length)
                .map(|at| self.0[at / PAGE_SIZE].as_ref().expect("checked")[at % PAGE_SIZE])
                .collect()
        })
    }
}

/// After a failed write, every page of its range holds the new bytes or is LOST: never the old ones.
fn adopt_failed_write(engine: &Engine, model: &mut Model, offset: usize, data: &[u8], scratch: &mut Scratch) {
    model.write(offset, data);
    for page in Model::pages(offset, data.len()) {
        let mut bytes = vec![0; PAGE_SIZE];
        match engine.read((page * PAGE_SIZE) as u64, &mut bytes, scratch) {
            Ok(_) => assert!(model.0[page].as_ref() == Some(&bytes), "page {page} reads what it held before"),
            Err(_) => model.0[page] = None,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 200 } else { 4000 }))]

    #[test]
    fn the_file_reads_as_it_was_written(allocator in allocators(), steps in steps(), limit in 0u64..40) {
        let engine = engine(allocator, Algorithm::Lz4, limit);
        let mut scratch = Scratch::new().expect("scratch");
        let mut model = Model(vec![Some(vec![0; PAGE_SIZE]); PAGES]);
        for step in steps {
            match step {
                Step::Write { offset, length, kind, seed } => {
                    let data = contents(kind, seed, length);
                    match engine.write(offset as u64, &data, &mut scratch) {
                        Ok(()) => {
                            model.write(offset, &data);
                            prop_assert!(model.read(offset, length).is_some());
                        }
                        Err(_) => adopt_failed_write(&engine, &mut model, offset, &data, &mut scratch),
                    }
                }
                Step::Read { offset, length } => {
                    let mut bytes = vec![0xee; length];
                    let read = engine.read(offset as u64, &mut bytes, &mut scratch);
                    match model.read(offset, length) {
                        Some(expected) => {
                            prop_assert_eq!(read.expect("readable"), length);
                            prop_assert!(bytes == expected);
                        }
                        None => prop_assert_eq!(read.expect_err("lost").errno(), libc::EIO),
                    }
                }
                Step::Discard { offset, length } => {
                    let zeros = vec![0; length];
                    match discard(&engine, offset as u64, length as u64, &mut scratch) {
                        Ok(()) => model.write(offset, &zeros),
                        Err(_) => adopt_failed_write(&engine, &mut model, offset, &zeros, &mut scratch),
                    }
                }
                Step::SetAlgorithm(zstd) => engine.set_compression(
                    Compression::new(if zstd { Algorithm::Zstd } else { Algorithm::Lz4 }, 5).expect("level")),
                Step::SetLimit(pages) => engine.store().pool().set_limit_bytes(pages * PAGE_SIZE as u64),
                Step::Compact => {
                    let before = engine.store().metrics().pool_bytes.get();
                    let freed = engine.store().compact() * PAGE_SIZE as u64;
                    prop_assert_eq!(engine.store().metrics().pool_bytes.get(), before - freed);
                }
                Step::Reset => {
                    engine.reset();
                    model.0.fill(Some(vec![0; PAGE_SIZE]));
                }
            }
            let metrics = engine.store().metrics();
            let lost = model.0.iter().filter(|page| page.is_none()).count() as u64;
            prop_assert_eq!(metrics.pages_lost.get(), lost);
        }
        engine.reset();
        prop_assert_eq!(engine.store().destroy(Duration::ZERO).expect("nobody is moving"), vec![]);
        let metrics = engine.store().metrics();
        let gauges = [&metrics.pages_lz4, &metrics.pages_zstd, &metrics.pages_same_filled, &metrics.pages_incompressible,
            &metrics.pages_lost, &metrics.compressed_bytes];
        prop_assert!(gauges.iter().all(|gauge| gauge.get() == 0));
        prop_assert_eq!(engine.store().metrics().pool_bytes.get(), 0);
    }

    #[test]
    fn a_flipped_bit_is_an_error_and_never_a_wrong_page(
        allocator in allocators(), kind in 1u8..3, zstd: bool, seed: u64, bit: usize,
    ) {
        let engine = engine(allocator, if zstd { Algorithm::Zstd } else { Algorithm::Lz4 }, 1000);
        let mut scratch = Scratch::new().expect("scratch");
        let (damaged, neighbour) = (contents(kind, seed, PAGE_SIZE), contents(kind, !seed, PAGE_SIZE));
        engine.write(0, &damaged, &mut scratch).expect("room");
        engine.write(PAGE_SIZE as u64, &neighbour, &mut scratch).expect("room");
        prop_assert!(engine.store().flip_bit(0, bit));

        let mut page = vec![0; PAGE_SIZE];
        for attempt in 0..2u64 {
            prop_assert_eq!(engine.read(0, &mut page, &mut scratch).expect_err("damaged").errno(), libc::EIO);
            let metrics = engine.store().metrics();
            prop_assert_eq!((metrics.errors_corrupt.get(), metrics.errors_lost.get()), (1, attempt));
        }
        engine.read(PAGE_SIZE as u64, &mut page, &mut scratch).expect("untouched");
        prop_assert!(page == neighbour);
        engine.write(0, &damaged, &mut scratch).expect("room");
        engine.read(0, &mut page, &mut scratch).expect("written again");
        prop_assert!(page == damaged);
    }
}

#[test]
fn a_full_pool_keeps_every_other_page() {
    // Pages of which two fit into one: noise would fill a long zspage at once.
    for engine in Allocator::ALL.map(|allocator| engine(allocator, Algorithm::Lz4, 8)) {
        let mut scratch = Scratch::new().expect("scratch");
        let page = |n: u64| [noise(n + 1, PAGE_SIZE / 2 - 60), vec![0; PAGE_SIZE / 2 + 60]].concat();
        let stored: Vec<u64> =
            (0..PAGES as u64).filter(|&n| engine.write(n * PAGE_SIZE as u64, &page(n), &mut scratch).is_ok()).collect();
        assert!(!stored.is_empty() && stored.len() < PAGES);
        let refused = engine.write((PAGES as u64 - 1) * PAGE_SIZE as u64, &page(99), &mut scratch).expect_err("full");
        assert_eq!(refused.errno(), libc::ENOSPC);
        // Overwriting goes on in a full pool: the old page makes room for the new one.
        for &n in &stored {
            engine.write(n * PAGE_SIZE as u64, &page(n + 50), &mut scratch).expect("its own room");
        }
        let mut bytes = vec![0; PAGE_SIZE];
        for &n in &stored {
            engine.read(n * PAGE_SIZE as u64, &mut bytes, &mut scratch).expect("stored");
            assert!(bytes == page(n + 50));
        }
    }
}

#[test]
fn a_punched_cluster_can_be_used_again_while_its_objects_wait_to_be_freed() {
    for engine in Allocator::ALL.map(|allocator| engine(allocator, Algorithm::Lz4, 1000)) {
        let mut scratch = Scratch::new().expect("scratch");
        let (old, new) = (contents(1, 1, SIZE), contents(2, 2, SIZE));
        engine.write(0, &old, &mut scratch).expect("room");
        let mut detached = Detached::with_capacity(PAGES);
        engine.discard(0, SIZE as u64, &mut detached, &mut scratch).expect("in range");
        assert!(!detached.is_empty());
        let mut bytes = vec![0xee; SIZE];
        engine.read(0, &mut bytes, &mut scratch).expect("empty");
        assert!(bytes.iter().all(|&byte| byte == 0), "a punched page still reads what it held");
        engine.write(0, &new, &mut scratch).expect("room");
        engine.store().free_detached(&mut detached);
        engine.read(0, &mut bytes, &mut scratch).expect("written");
        assert!(bytes == new);
        engine.reset();
        assert_eq!(engine.store().metrics().pool_bytes.get(), 0);
        assert_eq!(engine.store().metrics().compressed_bytes.get(), 0);
    }
}

/// A damaged slot word names an object, which is freed; what its slot stores next may come to lie in the same place.
#[test]
fn a_page_that_is_stored_where_a_damaged_word_pointed_stays() {
    for allocator in Allocator::ALL {
        let state: File = memory_file(c"state", 0).expect("memory file").into();
        let files = Files { state: Some(state.try_clone().expect("descriptor").into()), counters: None };
        let compression = Compression::new(Algorithm::Lz4, 3).expect("level");
        let engine = Engine::new(SIZE as u64, allocator, 1 << 20, compression, files).expect("engine");
        let mut scratch = Scratch::new().expect("scratch");
        let word_at = |slot: usize| (PAGE_SIZE + slot * 8) as u64;

        engine.write(0, &noise(1, PAGE_SIZE), &mut scratch).expect("room");
        let mut word = [0; 8];
        state.read_exact_at(&mut word, word_at(0)).expect("read");
        state.write_all_at(&word, word_at(1)).expect("written");
        for slot in 0..2 {
            engine.write((slot * PAGE_SIZE) as u64, &noise(2 + slot as u64, PAGE_SIZE), &mut scratch).expect("room");
        }
        for slot in 0..2 {
            let mut page = vec![0; PAGE_SIZE];
            engine.read((slot * PAGE_SIZE) as u64, &mut page, &mut scratch).expect("stored");
            assert!(page == noise(2 + slot as u64, PAGE_SIZE));
        }
    }
}

#[test]
fn ranges_outside_the_file_are_refused_and_counted() {
    let engine = engine(Allocator::Zsmalloc, Algorithm::Lz4, 100);
    let mut scratch = Scratch::new().expect("scratch");
    let end = SIZE as u64;
    for (offset, length) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 10, 100)] {
        let data = vec![1; length];
        assert_eq!(engine.write(offset, &data, &mut scratch).expect_err("outside").errno(), libc::EFBIG);
        assert_eq!(discard(&engine, offset, length as u64, &mut scratch).expect_err("outside").errno(), libc::EFBIG);
    }
    assert_eq!(engine.store().metrics().rejected_out_of_range.get(), 8);
    let mut bytes = [0xee; 10];
    assert_eq!(engine.read(end - 4, &mut bytes, &mut scratch).expect("short"), 4);
    assert_eq!(bytes, [0, 0, 0, 0, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee]);
    assert_eq!(engine.read(u64::MAX, &mut bytes, &mut scratch).expect("nothing"), 0);
}

#[test]
fn sizes_that_make_no_swap_file_are_refused() {
    for size in [0, 1, PAGE_SIZE as u64 + 1, MAX_SIZE_BYTES + PAGE_SIZE as u64, u64::MAX] {
        let compression = Compression::new(Algorithm::Lz4, 3).expect("level");
        assert!(
            matches!(
                Engine::new(size, Allocator::Zsmalloc, 1 << 20, compression, Files::default()),
                Err(Error::Invalid(_))
            ),
            "{size}"
        );
    }
}

/// Threads write whole pages that name themselves, read, and punch, all on the same few slots, while objects are moved
/// without a pause. A page that is torn, of another slot, or of a freed object would not fit its own stamp.
#[test]
fn concurrent_calls_never_tear_a_page() {
    Allocator::ALL.into_iter().for_each(concurrent_calls);
}

fn concurrent_calls(allocator: Allocator) {
    const SLOTS: u64 = 200;
    let compression = Compression::new(Algorithm::Lz4, 3).expect("level");
    // Too little for all of them, if they are noise.
    let limit = SLOTS * PAGE_SIZE as u64 * 2 / 3;
    let engine =
        Engine::new(SLOTS * PAGE_SIZE as u64, allocator, limit, compression, Files::default()).expect("engine");
    let stop = AtomicBool::new(false);
    let stamp = |slot: u64, round: u64, kind: u8| {
        let mut page = contents(kind, slot << 32 | round, PAGE_SIZE);
        page[..8].copy_from_slice(&slot.to_le_bytes());
        page[8..16].copy_from_slice(&round.to_le_bytes());
        page[16] = kind;
        page
    };
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let (engine, stop) = (&engine, &stop);
            scope.spawn(move || {
                let mut scratch = Scratch::new().expect("scratch");
                for round in 0..if cfg!(debug_assertions) { 8_000 } else { 40_000 } {
                    let slot = (round * 7 + thread * 31) % SLOTS;
                    let offset = slot * PAGE_SIZE as u64;
                    if round % 11 == 0 {
                        discard(engine, offset, PAGE_SIZE as u64, &mut scratch).expect("in range");
                    }
                    if round % 5001 == 0 {
                        engine.reset();
                    }
                    let data = stamp(slot, round * 4 + thread, 1 + (round / SLOTS % 2) as u8);
                    let _full_is_fine = engine.write(offset, &data, &mut scratch);
                }
                stop.store(true, Ordering::Relaxed);
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    engine.store().compact();
                }
                assert!(engine.store().metrics().pages_compacted.get() > 0, "nothing was moved");
            });
        }
        scope.spawn(|| {
            let mut scratch = Scratch::new().expect("scratch");
            let mut page = vec![0; PAGE_SIZE];
            let mut seen = 0;
            // Whole to the end, and at least until a page was seen: a busy machine may let the writers finish first.
            while !stop.load(Ordering::Relaxed) || seen == 0 {
                for slot in 0..SLOTS {
                    match engine.read(slot * PAGE_SIZE as u64, &mut page, &mut scratch) {
                        Ok(_) if page.iter().all(|&byte| byte == 0) => {}
                        Ok(_) => {
                            let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("8 bytes"));
                            assert_eq!(word(0), slot);
                            assert!(page == stamp(slot, word(8), page[16]), "slot {slot} is torn");
                            seen += 1;
                        }
                        Err(error) => assert!(matches!(error, Error::Lost { .. }), "{error}"),
                    }
                }
            }
        });
    });
    engine.reset();
    assert_eq!(engine.store().destroy(Duration::ZERO).expect("nobody is moving"), vec![]);
    assert_eq!(engine.store().metrics().pool_bytes.get(), 0);
}
