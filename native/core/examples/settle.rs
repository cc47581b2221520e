//! What recompression makes of real pages: memory in full and time, as pages settle from tier to tier.
//!
//! ```text
//! cargo run --release --package zswapd-core --example settle PAGES lz4 [DICTIONARY]
//! ```
//!
//! PAGES has the pages. Shown for each step: pages over all that they take (pool, slot words, tables, dictionaries), the
//! median time of a load, and the processor time for a page that was tried.

use std::time::{Duration, Instant};
use zswapd_core::codec::{Algorithm, Compression};
use zswapd_core::engine::Engine;
use zswapd_core::page::{Page, PAGE_SIZE};
use zswapd_core::pool::Allocator;
use zswapd_core::scratch::Scratch;
use zswapd_core::store::{Files, Order, Recompressor, Tier};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1);
    let (path, algorithm) = words.next().zip(words.next()).ok_or("name a file of pages, and an algorithm")?;
    let fresh = Compression::new(algorithm.parse()?, 1)?;
    let mut bytes = std::fs::read(path)?;
    let mut dictionary = words.next().map(std::fs::read).transpose()?;
    bytes.truncate(bytes.len() / PAGE_SIZE * PAGE_SIZE);
    let pages: Vec<&Page> = bytes.chunks_exact(PAGE_SIZE).filter_map(|page| <&Page>::try_from(page).ok()).collect();
    let (mut scratch, mut recompressor) = (Scratch::new()?, Recompressor::new()?);

    for (name, steps) in [
        ("zstd 1", &[(1, 1, false)][..]),
        ("zstd 3", &[(1, 3, false)]),
        ("zstd 9", &[(1, 9, false)]),
        ("zstd 12", &[(1, 12, false)]),
        ("zstd 3, then 9", &[(1, 3, false), (2, 9, false)]),
        ("dictionary 3", &[(1, 3, true)]),
        ("dictionary 9", &[(1, 9, true)]),
        ("dictionary 12", &[(1, 12, true)]),
        ("zstd 3, then dictionary 9", &[(1, 3, false), (2, 9, true)]),
    ] {
        let engine =
            Engine::new(bytes.len() as u64, Allocator::Zsmalloc, 2 * bytes.len() as u64, fresh, Files::default())?;
        let begun = Instant::now();
        for (slot, page) in pages.iter().enumerate() {
            engine.write((slot * PAGE_SIZE) as u64, &page[..], &mut scratch)?;
        }
        let per_page = begun.elapsed() / pages.len() as u32;
        let (ratio, load) = (effective(&engine), median_load(&engine, &pages, &mut scratch)?);
        println!("{algorithm} 1: {ratio}, load {load:?}, store {per_page:?}");
        for &(number, level, with_dictionary) in steps {
            if with_dictionary {
                let Some(dictionary) = &mut dictionary else { continue };
                engine.store().install_dictionary(dictionary)?;
            }
            let with = Compression::new(Algorithm::Zstd, level)?;
            let tier = Tier { number, with, dictionary: with_dictionary };
            engine.store().prepare(&mut recompressor, tier)?;
            let order = Order { tier, age: 0, pages: u64::MAX, processor_time: Duration::MAX };
            recompressor.begin_anew();
            let done = engine.store().recompress(&mut recompressor, &order);
            engine.store().compact();
            let tried = (done.recompressed + done.not_smaller).max(1);
            let (ratio, load) = (effective(&engine), median_load(&engine, &pages, &mut scratch)?);
            println!(
                "  {name}, tier {number}: {ratio}, load {load:?}, {:?} a page, {} smaller, {} not; encoder {} KiB",
                done.processor_time / tried as u32,
                done.recompressed,
                done.not_smaller,
                engine.store().metrics().encoder_bytes.get() >> 10,
            );
        }
    }
    Ok(())
}

/// Pages over their payload, over the pool, and over all that they take.
fn effective(engine: &Engine) -> String {
    let (store, metrics) = (engine.store(), engine.store().metrics());
    store.refresh_gauges();
    let tables = metrics.metadata_bytes.get() + metrics.arena_metadata_bytes.get();
    let dictionaries = metrics.dictionary_bytes.get() + metrics.encoder_bytes.get();
    let over = |bytes: u64| engine.size() as f64 / bytes as f64;
    let payload = over(metrics.compressed_bytes.get());
    let pool = over(metrics.pool_bytes.get());
    let all = over(metrics.backed_bytes.get() + tables + dictionaries);
    format!("{payload:.3} payload, {pool:.3} pool, {all:.3} in full")
}

fn median_load(
    engine: &Engine,
    pages: &[&Page],
    scratch: &mut Scratch,
) -> Result<Duration, Box<dyn std::error::Error>> {
    let (mut times, mut back) = (Vec::new(), [0; PAGE_SIZE]);
    for slot in (0..pages.len()).map(|n| n * 7919 % pages.len()) {
        let begun = Instant::now();
        engine.read((slot * PAGE_SIZE) as u64, &mut back, scratch)?;
        times.push(begun.elapsed());
        assert!(&back == pages[slot], "page {slot} is another one");
    }
    times.sort();
    Ok(times[times.len() / 2])
}
