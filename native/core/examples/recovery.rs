//! How long a successor needs to go on with what is stored, by the size of the pool.
//!
//! ```text
//! cargo run --release --package zswapd-core --example recovery [ALLOCATOR [MIB...]]
//! ```
//!
//! The pages are noise of lengths as in [`LENGTHS`], and zeros. Each size is recovered five times; the fastest counts.
//! In processor time (the machine may have other things to do).

use std::os::fd::OwnedFd;
use std::time::Duration;
use zswapd_core::backing::FileDisk;
use zswapd_core::codec::{Algorithm, Compression};
use zswapd_core::engine::Engine;
use zswapd_core::lru::Incompressible;
use zswapd_core::memory::memory_file;
use zswapd_core::page::{Page, PAGE_SIZE};
use zswapd_core::pool::{Allocator, LENGTHS};
use zswapd_core::scratch::Scratch;
use zswapd_core::store::{DiskOptions, Files, Verifier};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1);
    let allocator: Allocator = words.next().as_deref().unwrap_or("zsmalloc").parse()?;
    let sizes: Vec<u64> = words.map(|word| word.parse()).collect::<Result<_, _>>()?;
    println!("pool MiB, pages, recovered ms, populated ms, verified ms");
    for mib in if sizes.is_empty() { vec![64, 256, 1024, 2048] } else { sizes } {
        let state: OwnedFd = memory_file(c"state", 0)?;
        let pages = fill(allocator, mib << 20, state.try_clone()?)?;
        let mut times = [Duration::MAX; 3];
        for _ in 0..5 {
            let start = processor_time();
            let engine = Engine::recover(allocator, files(&state)?, Some(disk()?))?;
            let recovered = processor_time() - start;
            engine.store().populate_slots()?;
            let populated = processor_time() - start - recovered;
            let mut verifier = Verifier::default();
            while engine.store().verify(&mut verifier) {}
            let verified = processor_time() - start - recovered - populated;
            assert_eq!(engine.store().metrics().objects_found_bad.get(), 0);
            times = std::array::from_fn(|n| times[n].min([recovered, populated, verified][n]));
        }
        let [recovered, populated, verified] = times.map(|time| time.as_secs_f64() * 1e3);
        println!("{mib}, {pages}, {recovered:.1}, {populated:.1}, {verified:.1}");
    }
    Ok(())
}

/// Of this thread.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn files(state: &OwnedFd) -> std::io::Result<Files> {
    Ok(Files { state: Some(state.try_clone()?), counters: None })
}

/// Nothing is ever written to it: but with a disk there is a list of cold pages.
fn disk() -> Result<DiskOptions, Box<dyn std::error::Error>> {
    let disk = Box::new(FileDisk::new(memory_file(c"disk", 0)?));
    Ok(DiskOptions { disk, bytes: 1 << 30, encryption: true, incompressible: Incompressible::Keep })
}

/// Fills a pool up to so many bytes. Returns how many pages that are.
fn fill(allocator: Allocator, pool_bytes: u64, state: OwnedFd) -> Result<u64, Box<dyn std::error::Error>> {
    let with = Compression::new(Algorithm::Lz4, 1)?;
    let slots = pool_bytes / 1024;
    let files = Files { state: Some(state), counters: None };
    let engine = Engine::new(slots * PAGE_SIZE as u64, allocator, pool_bytes * 2, with, files)?.with_disk(disk()?)?;
    engine.store().populate_slots()?;
    let mut scratch = Scratch::new()?;
    let mut x = 1u64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    for slot in 0..slots {
        if engine.store().metrics().pool_bytes.get() >= pool_bytes {
            return Ok(slot);
        }
        let mut which = next() % LENGTHS.iter().sum::<u64>();
        let band = LENGTHS.iter().position(|&share| {
            let here = which < share;
            which = which.saturating_sub(share);
            here
        });
        let length = (band.unwrap_or(0) * 256 + (next() % 256) as usize).min(PAGE_SIZE);
        let mut page: Page = [0; PAGE_SIZE];
        page[..length].chunks_mut(8).for_each(|bytes| bytes.copy_from_slice(&next().to_ne_bytes()[..bytes.len()]));
        engine.write(slot * PAGE_SIZE as u64, &page, &mut scratch)?;
    }
    Ok(slots)
}
