//! How long loads wait for objects that are being moved: `cargo bench --manifest-path native/Cargo.toml --bench pauses`.
//!
//! Two threads load and store pages that compress like real ones, one store for nine loads. First nobody moves
//! anything, then a third thread compacts without a pause. Printed is which share of all loads took longer than so long, and which waited longer for a mover.

mod lengths;

use lengths::Random;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use zswapd_core::codec::{Algorithm, Compression};
use zswapd_core::metrics::{Histogram, LATENCY_BOUNDS_NS};
use zswapd_core::page::{Page, PAGE_SIZE};
use zswapd_core::pool::Allocator;
use zswapd_core::scratch::Scratch;
use zswapd_core::store::{Files, Store};

const SLOTS: u64 = 1 << 16;
const THREADS: u64 = 2;
const SECONDS: u64 = 10;

fn main() {
    for movers in [false, true] {
        let store = Store::new(SLOTS, Allocator::Zsmalloc, 1 << 30, Files::default()).expect("memory");
        let end = AtomicBool::new(false);
        let pages = pages();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (store, pages, end) = (&store, &pages, &end);
                scope.spawn(move || work(store, pages, thread, end));
            }
            if movers {
                scope.spawn(|| {
                    while !end.load(Relaxed) {
                        store.compact();
                    }
                });
            }
            std::thread::sleep(Duration::from_secs(SECONDS));
            end.store(true, Relaxed);
        });
        report(&store, if movers { "compaction without a pause" } else { "no compaction" });
    }
}

/// Pages of noise and zeros that compress to lengths of real ones.
fn pages() -> Vec<Page> {
    let mut random = Random::new();
    let page = |_| {
        let mut page = [0; PAGE_SIZE];
        let length = random.length();
        page[..length].iter_mut().for_each(|byte| *byte = random.below(256) as u8);
        page
    };
    (0..4096).map(page).collect()
}

/// Loads and stores slots whose number is `thread` modulo [`THREADS`].
fn work(store: &Store, pages: &[Page], thread: u64, end: &AtomicBool) {
    let with = Compression::new(Algorithm::Lz4, 3).expect("in range");
    let mut scratch = Scratch::new().expect("memory");
    let (mut random, mut page) = (Random::new(), [0; PAGE_SIZE]);
    let slot = |random: &mut Random| (random.below(SLOTS / THREADS) * THREADS + thread) as u32;
    while !end.load(Relaxed) {
        if random.below(10) == 0 {
            let page = &pages[random.below(pages.len() as u64) as usize];
            store.store(slot(&mut random), page, with, &mut scratch).expect("room");
        } else {
            store.load(slot(&mut random), &mut page, &mut scratch).expect("as it was stored");
        }
    }
}

fn report(store: &Store, what: &str) {
    let metrics = store.metrics();
    let loads = metrics.loads.get();
    println!("{what}: {loads} loads, {} stores, {} pages freed", metrics.stores.get(), metrics.pages_compacted.get());
    for (what, histogram) in [("took", &metrics.load_latency), ("waited", &metrics.mover_waits)] {
        println!("  loads that {what} longer than");
        for bound in [0, 1_000, 10_000, 50_000, 100_000, 1_000_000] {
            println!("    {:>5} µs: {:.5} %", bound / 1000, 100.0 * above(histogram, bound) as f64 / loads as f64);
        }
    }
}

fn above(histogram: &Histogram, bound_ns: u64) -> u64 {
    let first = LATENCY_BOUNDS_NS.partition_point(|&bound| bound <= bound_ns);
    histogram.snapshot().counts[first..].iter().sum()
}
