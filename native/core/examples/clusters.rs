//! What clusters make of real pages on a disk: bytes of records, processor time, and what a read costs.
//!
//! ```text
//! cargo run --release --package zswapd-core --example clusters PAGES DISK [DICTIONARY]
//! ```
//!
//! PAGES has the pages, neighbours next to each other; DISK is a file, as large as the pages, that is overwritten. The pages
//! have settled before: zstd 3, then 9, with the dictionary if there is one.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};
use zswapd_core::backing::FileDisk;
use zswapd_core::codec::{Algorithm, Compression};
use zswapd_core::engine::Engine;
use zswapd_core::lru::Incompressible;
use zswapd_core::page::PAGE_SIZE;
use zswapd_core::pool::Allocator;
use zswapd_core::scratch::Scratch;
use zswapd_core::store::{DiskOptions, Files, Job, Order, Recompressor, Shrinker, Tier, What};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1);
    let (pages, path) = words.next().zip(words.next()).ok_or("name a file of pages, and one that is to be a disk")?;
    let mut bytes = std::fs::read(pages)?;
    bytes.truncate(bytes.len() / PAGE_SIZE * PAGE_SIZE);
    let dictionary = words.next().map(std::fs::read).transpose()?;
    let mut scratch = Scratch::new()?;

    for (name, what) in [("one by one", What::All), ("in clusters", What::Unused { seconds: 0 })] {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path)?;
        file.set_len(bytes.len() as u64)?;
        let options = DiskOptions {
            disk: Box::new(FileDisk::new(file.into())),
            bytes: bytes.len() as u64,
            encryption: true,
            incompressible: Incompressible::Writeback,
        };
        let fresh = Compression::new(Algorithm::Lz4, 1)?;
        let limit = 2 * bytes.len() as u64;
        let engine = Engine::new(bytes.len() as u64, Allocator::Zsmalloc, limit, fresh, Files::default())?;
        let engine = engine.with_disk(options)?;
        let (store, mut recompressor) = (engine.store(), Recompressor::new()?);
        store.set_promoting(false);
        engine.write(0, &bytes, &mut scratch)?;
        for (number, level, dictionary) in [(1, 3, None), (2, 9, dictionary.as_ref())] {
            if let Some(dictionary) = dictionary {
                store.install_dictionary(dictionary)?;
            }
            let with = Compression::new(Algorithm::Zstd, level)?;
            let tier = Tier { number, with, dictionary: dictionary.is_some() };
            store.prepare(&mut recompressor, tier)?;
            recompressor.begin_anew();
            store
                .recompress(&mut recompressor, &Order { tier, age: 0, pages: u64::MAX, processor_time: Duration::MAX });
        }
        let (mut shrinker, mut job) = (Shrinker::with_clusters()?, Job::new(what));
        while store.write_back(&mut shrinker, &mut job)? {}

        let (metrics, mut back, mut times) = (store.metrics(), vec![0; 8 * PAGE_SIZE], Vec::new());
        let all = bytes.len() / PAGE_SIZE;
        let mut median = |length: usize| -> Result<Duration, Box<dyn std::error::Error>> {
            times.clear();
            for n in 0..4000 {
                let at = n * 7919 % (all - length) * PAGE_SIZE;
                let begun = Instant::now();
                engine.read(at as u64, &mut back[..length * PAGE_SIZE], &mut scratch)?;
                times.push(begun.elapsed());
                assert!(back[..length * PAGE_SIZE] == bytes[at..at + length * PAGE_SIZE], "another page");
            }
            times.sort();
            Ok(times[times.len() / 2])
        };
        let (one, eight) = (median(1)?, median(8)?);
        println!(
            "{name}: {} pages, {} of them in clusters, {:.1} bytes each; {:.1} µs of processor time for a page of a \
             cluster; a read of one page {one:?}, of eight {eight:?}",
            job.pages,
            metrics.pages_in_clusters.get(),
            metrics.disk_live_bytes.get() as f64 / job.pages as f64,
            metrics.cluster_ns.get() as f64 / 1e3 / metrics.pages_in_clusters.get().max(1) as f64,
        );
    }
    std::fs::remove_file(path)?;
    Ok(())
}
