//! What a page costs in the engine, beside the bare codec and checksum on the same pages: callgrind counts the
//! instructions of the four functions.
//!
//! ```text
//! cargo build --release --package zswapd-core --example page_cost
//! valgrind --tool=callgrind --callgrind-out-file=out target/release/examples/page_cost lz4 FILE
//! callgrind_annotate --inclusive=yes --threshold=100 out | grep page_cost::
//! ```
//!
//! FILE has the pages; each of its pages that repeats one word is left out.

use std::hint::black_box;
use xxhash_rust::xxh3::xxh3_64_with_seed;
use zswapd_core::codec::{Codec, Compression};
use zswapd_core::engine::Engine;
use zswapd_core::page::{same_filled, Page, PAGE_SIZE};
use zswapd_core::pool::Allocator;
use zswapd_core::scratch::Scratch;
use zswapd_core::store::Files;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1);
    let (algorithm, path) = words.next().zip(words.next()).ok_or("name an algorithm and a file of pages")?;
    let with = Compression::new(algorithm.parse()?, 3)?;
    let bytes = std::fs::read(path)?;
    let pages = bytes.chunks_exact(PAGE_SIZE).filter_map(|page| <&Page>::try_from(page).ok());
    let pages: Vec<&Page> = pages.filter(|page| same_filled(page).is_none()).collect();
    let (mut scratch, mut back) = (Scratch::new()?, [0; PAGE_SIZE]);
    for &page in &pages {
        let (codec, payload) = bare_store(page, with, &mut scratch);
        let payload = payload.to_vec();
        bare_load(codec, &payload, &mut back, &mut scratch);
    }

    let size = (pages.len() * PAGE_SIZE) as u64;
    let engine = Engine::new(size, Allocator::Zsmalloc, 2 * size, with, Files::default())?;
    for (slot, &page) in pages.iter().enumerate() {
        engine_store(&engine, slot, page, &mut scratch);
    }
    for slot in 0..pages.len() {
        engine_load(&engine, slot, &mut back, &mut scratch);
    }
    println!("{} pages", pages.len());
    Ok(())
}

#[inline(never)]
fn bare_store<'a>(page: &'a Page, with: Compression, scratch: &'a mut Scratch) -> (Codec, &'a [u8]) {
    black_box(same_filled(page));
    let (codec, payload) = scratch.codecs.compress(page, with);
    black_box(xxh3_64_with_seed(payload, 1));
    (codec, payload)
}

#[inline(never)]
fn bare_load(codec: Codec, payload: &[u8], page: &mut Page, scratch: &mut Scratch) {
    black_box(xxh3_64_with_seed(payload, 1));
    assert!(scratch.codecs.decompress(codec, payload, page, None));
}

#[inline(never)]
fn engine_store(engine: &Engine, slot: usize, page: &Page, scratch: &mut Scratch) {
    engine.write((slot * PAGE_SIZE) as u64, page, scratch).expect("room");
}

#[inline(never)]
fn engine_load(engine: &Engine, slot: usize, page: &mut Page, scratch: &mut Scratch) {
    engine.read((slot * PAGE_SIZE) as u64, page, scratch).expect("stored");
}
