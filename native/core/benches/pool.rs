//! Objects written, read and freed per second, by 1, 2 and 4 threads that run at once:
//! `cargo bench --manifest-path native/Cargo.toml --bench pool`.
//!
//! The pool (zsmalloc) is compared with z3fold, with itself behind one mutex, and with mimalloc, which neither moves what
//! it holds nor can tell an object that is gone: the least that keeping bytes costs. Each pool has a thread that keeps
//! its reserve filled. Lengths are those of real pages (`LENGTHS` in `src/pool/class.rs`), or 1 KiB. Reading is finding
//! and pinning the object and copying its bytes out, without checksum.

mod lengths;

use criterion::measurement::WallTime;
use criterion::{criterion_group, criterion_main, BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use lengths::Random;
use mimalloc::MiMalloc;
use std::alloc::{GlobalAlloc, Layout};
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use zswapd_core::error::Error;
use zswapd_core::metrics::SharedMetrics;
use zswapd_core::page::PAGE_SIZE;
use zswapd_core::pool::{Allocator, Location, Pool};
use zswapd_core::state::State;

const THREADS: [usize; 3] = [1, 2, 4];
/// Objects that are inserted, or freed, before the clock stops.
const BATCH: usize = 1 << 15;
/// Objects that are there before; half of them are freed again. There is room for a batch between those that stay: what
/// is timed takes no memory from the system, which in the pager is another thread's work.
const BASE: usize = 1 << 18;

trait Heap: Sync {
    const NAME: &'static str;
    type Key: Copy + Send + Sync;
    fn new() -> Self;
    fn insert(&self, bytes: &[u8]) -> Self::Key;
    /// Copies as many bytes out as `to` has.
    fn read(&self, key: Self::Key, to: &mut [u8]);
    fn free(&self, key: Self::Key, length: usize);
}

/// A pool with a thread that keeps its reserve filled, as in the pager.
struct Pooled {
    pool: Arc<Pool>,
    end: Arc<AtomicBool>,
    adjuster: Option<JoinHandle<()>>,
}

impl Pooled {
    fn new(allocator: Allocator) -> Pooled {
        let state = State::create(1, 1 << 20, 0, None).expect("address space");
        let metrics = SharedMetrics::new(None).expect("memory");
        let pool = Arc::new(Pool::new(Arc::new(state), allocator, 4 << 30, metrics).expect("memory"));
        let end = Arc::new(AtomicBool::new(false));
        let adjust = {
            let (pool, end) = (pool.clone(), end.clone());
            move || {
                pool.become_adjuster();
                while !end.load(Relaxed) {
                    while pool.adjust().expect("memory") {}
                    std::thread::park();
                }
            }
        };
        Pooled { pool, end, adjuster: Some(std::thread::spawn(adjust)) }
    }

    fn insert(&self, bytes: &[u8]) -> Location {
        loop {
            match self.pool.insert(bytes.len(), |object| object[..bytes.len()].copy_from_slice(bytes)) {
                Ok(object) => return object.location(),
                // The pager would fail the write.
                Err(Error::NoRegion) => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn read(&self, key: Location, to: &mut [u8]) {
        let object = self.pool.pin(key).expect("an object");
        // SAFETY: each object is used by one thread, which frees it later.
        to.copy_from_slice(&unsafe { object.bytes() }[..to.len()]);
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        self.end.store(true, Relaxed);
        if let Some(adjuster) = self.adjuster.take() {
            adjuster.thread().unpark();
            adjuster.join().expect("no panic");
        }
    }
}

/// With one of the two allocators.
struct Laid<const Z3FOLD: bool>(Pooled);

impl<const Z3FOLD: bool> Heap for Laid<Z3FOLD> {
    const NAME: &'static str = if Z3FOLD { "z3fold" } else { "pool" };
    type Key = Location;

    fn new() -> Self {
        Laid(Pooled::new(if Z3FOLD { Allocator::Z3fold } else { Allocator::Zsmalloc }))
    }

    fn insert(&self, bytes: &[u8]) -> Location {
        self.0.insert(bytes)
    }

    fn read(&self, key: Location, to: &mut [u8]) {
        self.0.read(key, to);
    }

    fn free(&self, key: Location, _: usize) {
        self.0.pool.free(key);
    }
}

type Zsmalloc = Laid<false>;
type Z3fold = Laid<true>;

struct Locked(Mutex<Zsmalloc>);

impl Heap for Locked {
    const NAME: &'static str = "pool behind a mutex";
    type Key = Location;

    fn new() -> Locked {
        Locked(Mutex::new(Zsmalloc::new()))
    }

    fn insert(&self, bytes: &[u8]) -> Location {
        Heap::insert(&*self.0.lock().expect("no panic"), bytes)
    }

    fn read(&self, key: Location, to: &mut [u8]) {
        self.0.lock().expect("no panic").read(key, to);
    }

    fn free(&self, key: Location, length: usize) {
        Heap::free(&*self.0.lock().expect("no panic"), key, length);
    }
}

impl Heap for MiMalloc {
    const NAME: &'static str = "mimalloc";
    type Key = usize;

    fn new() -> MiMalloc {
        MiMalloc
    }

    fn insert(&self, bytes: &[u8]) -> usize {
        // SAFETY: a layout of more than 0 bytes; what is written is what was allocated.
        unsafe {
            let object = self.alloc(layout(bytes.len()));
            assert!(!object.is_null());
            object.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            object as usize
        }
    }

    fn read(&self, key: usize, to: &mut [u8]) {
        // SAFETY: the object lives, and is at least that long.
        to.copy_from_slice(unsafe { std::slice::from_raw_parts(key as *const u8, to.len()) });
    }

    fn free(&self, key: usize, length: usize) {
        // SAFETY: allocated with this layout, and not used any more.
        unsafe { self.dealloc(key as *mut u8, layout(length)) }
    }
}

fn layout(length: usize) -> Layout {
    Layout::from_size_align(length, 8).expect("a valid layout")
}

fn shuffle<T>(random: &mut Random, items: &mut [T]) {
    for n in (1..items.len()).rev() {
        items.swap(n, random.below(n as u64 + 1) as usize);
    }
}

/// Each thread's work on its own part, all at once: from the first one's start to the last one's end.
fn at_once<T: Send>(parts: &mut [T], work: impl Fn(&mut T) + Sync) -> Duration {
    let barrier = Barrier::new(parts.len());
    let run = |part| {
        barrier.wait();
        let start = Instant::now();
        work(part);
        (start, Instant::now())
    };
    let spans: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
        let threads: Vec<_> = parts.iter_mut().map(|part| scope.spawn(|| run(part))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let start = spans.iter().map(|span| span.0).min();
    let end = spans.iter().map(|span| span.1).max();
    end.zip(start).map_or(Duration::ZERO, |(end, start)| end - start)
}

/// Reads objects of `length` bytes, `bytes` of them in all, each thread a part of them in random order.
fn reads<H: Heap>(group: &mut BenchmarkGroup<'_, WallTime>, length: usize, bytes: usize) {
    let (heap, mut random) = (H::new(), Random::new());
    let mut keys: Vec<H::Key> = (0..bytes / length).map(|_| heap.insert(&vec![7; length])).collect();
    shuffle(&mut random, &mut keys);
    for threads in THREADS {
        group.bench_function(BenchmarkId::new(H::NAME, threads), |bencher| {
            bencher.iter_custom(|reads| {
                let mut parts: Vec<_> = keys.chunks(keys.len().div_ceil(threads)).collect();
                at_once(&mut parts, |keys| {
                    let mut to = vec![0; length];
                    for &key in keys.iter().cycle().take(reads as usize / threads) {
                        heap.read(key, &mut to);
                        black_box(&to);
                    }
                })
            });
        });
    }
    keys.into_iter().for_each(|key| heap.free(key, length));
}

/// Inserts objects as long as real pages' and frees them, beside others that stay. One of both is timed.
fn churn<H: Heap>(group: &mut BenchmarkGroup<'_, WallTime>, time_inserts: bool) {
    let (heap, mut random) = (H::new(), Random::new());
    let page = [7; PAGE_SIZE];
    let mut base: Vec<(H::Key, usize)> = Vec::new();
    for length in (0..BASE).map(|_| random.length()) {
        base.push((heap.insert(&page[..length]), length));
    }
    shuffle(&mut random, &mut base);
    base.drain(..BASE / 2).for_each(|(key, length)| heap.free(key, length));
    for threads in THREADS {
        group.bench_function(BenchmarkId::new(H::NAME, threads), |bencher| {
            bencher.iter_custom(|operations| {
                let mut time = Duration::ZERO;
                let mut left = operations as usize;
                while left > 0 {
                    let batch = left.min(BATCH).div_ceil(threads);
                    left = left.saturating_sub(batch * threads);
                    // Keys are made room for before the clock runs.
                    let mut lengths = || (0..batch).map(|_| (None, random.length())).collect();
                    let mut parts: Vec<Vec<(Option<H::Key>, usize)>> = (0..threads).map(|_| lengths()).collect();
                    let inserts = at_once(&mut parts, |objects| {
                        objects.iter_mut().for_each(|(key, length)| *key = Some(heap.insert(&page[..*length])));
                    });
                    parts.iter_mut().for_each(|objects| shuffle(&mut random, objects));
                    let frees = at_once(&mut parts, |objects| {
                        objects.iter().for_each(|&(key, length)| heap.free(key.expect("inserted"), length));
                    });
                    time += if time_inserts { inserts } else { frees };
                }
                time
            });
        });
    }
    base.into_iter().for_each(|(key, length)| heap.free(key, length));
}

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(1)).sample_size(10);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group
}

fn benches(criterion: &mut Criterion) {
    for (name, bytes) in [("read 1 KiB of 4 MiB", 4 << 20), ("read 1 KiB of 256 MiB", 256 << 20)] {
        let mut group = group(criterion, name);
        reads::<Zsmalloc>(&mut group, 1024, bytes);
        reads::<Z3fold>(&mut group, 1024, bytes);
        reads::<Locked>(&mut group, 1024, bytes);
        reads::<MiMalloc>(&mut group, 1024, bytes);
    }
    for (name, time_inserts) in [("insert", true), ("free", false)] {
        let mut group = group(criterion, name);
        churn::<Zsmalloc>(&mut group, time_inserts);
        churn::<Z3fold>(&mut group, time_inserts);
        churn::<Locked>(&mut group, time_inserts);
        churn::<MiMalloc>(&mut group, time_inserts);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
