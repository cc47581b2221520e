//! Counters, gauges and latency histograms: relaxed atomics in one block of memory of fixed layout.
//!
//! The block can lie in a file that another process maps read-only: it is recorded on the page path and read at any
//! time, and neither waits for the other.

use crate::codec::Codec;
use crate::dictionaries::PLACES;
use crate::error::{Error, Result};
use crate::memory::{length_of, memory_file, Backing, Zeroable, ZeroedTable};
use std::ops::Deref;
use std::os::fd::{BorrowedFd, OwnedFd};
// Not those of `sync`: counting orders nothing.
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Arc;
use std::time::Instant;

/// A count that only grows, or a gauge that goes both ways.
#[derive(Default)]
#[repr(transparent)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Subtracts, stopping at zero: a length read from a corrupted object must not turn a gauge into 2^64.
    pub fn sub(&self, n: u64) {
        let _ = self.0.fetch_update(Relaxed, Relaxed, |value| Some(value.saturating_sub(n)));
    }

    pub fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// For who orders something by it.
    pub fn atomic(&self) -> &AtomicU64 {
        &self.0
    }
}

/// Upper bounds of the latency buckets in nanoseconds, inclusive; one more bucket takes the rest.
pub const LATENCY_BOUNDS_NS: [u64; 20] = [
    250,
    500,
    1_000,
    2_000,
    3_000,
    5_000,
    7_500,
    10_000,
    15_000,
    20_000,
    30_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    5_000_000,
    20_000_000,
    100_000_000,
    1_000_000_000,
];

/// Latencies by bucket, and their sum.
#[derive(Default)]
#[repr(C)]
pub struct Histogram {
    buckets: [AtomicU64; LATENCY_BOUNDS_NS.len() + 1],
    sum_ns: AtomicU64,
}

/// One reading of a [`Histogram`]: counts per bucket (not cumulative) and the sum in nanoseconds.
#[derive(Clone, Debug)]
pub struct HistogramSnapshot {
    pub counts: [u64; LATENCY_BOUNDS_NS.len() + 1],
    pub sum_ns: u64,
}

impl Histogram {
    pub fn record_since(&self, start: Instant) {
        let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let bucket = LATENCY_BOUNDS_NS.partition_point(|&bound| bound < ns);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum_ns.fetch_add(ns, Relaxed);
    }

    pub fn snapshot(&self) -> HistogramSnapshot {
        HistogramSnapshot {
            counts: std::array::from_fn(|i| self.buckets[i].load(Relaxed)),
            sum_ns: self.sum_ns.load(Relaxed),
        }
    }
}

/// Room for every size class that a pool may have.
pub const MAX_CLASSES: usize = 256;

/// Fullness groups of zspages, as in the kernel (`get_fullness_group`): empty, below 10 %, … below 100 %, full.
pub const FULLNESS_GROUPS: usize = 12;

/// Occupancy of one size class.
#[derive(Default)]
#[repr(C)]
pub struct ClassMetrics {
    /// Zero: there is no such class.
    pub size_bytes: Counter,
    pub pages_per_zspage: Counter,
    pub objects_per_zspage: Counter,
    pub zspages: Counter,
    pub objects: Counter,
    /// Zspages by fullness group.
    pub groups: [Counter; FULLNESS_GROUPS],
}

/// A dictionary.
#[derive(Default)]
#[repr(C)]
pub struct DictionaryMetrics {
    pub serial: Counter,
    pub bytes: Counter,
    pub pages: Counter,
}

/// What is counted. Pages and bytes are as of now, events since the start.
#[repr(C)]
pub struct Metrics {
    /// [`LAYOUT`].
    pub layout: Counter,
    pub swap_size_bytes: Counter,
    /// 0: zsmalloc, 1: z3fold.
    pub allocator: Counter,
    /// 0: lz4, 1: zstd.
    pub algorithm: Counter,
    pub zstd_level: Counter,

    pub pages_lz4: Counter,
    pub pages_zstd: Counter,
    /// Those that take a dictionary to be read.
    pub pages_zstd_dictionary: Counter,
    pub pages_same_filled: Counter,
    pub pages_incompressible: Counter,
    pub pages_lost: Counter,
    /// Slots of the swap file whose page is a shared one, and shared pages, which are counted by codec or on the disk as any
    /// other. And what finding them takes.
    pub pages_shared: Counter,
    pub shared_pages: Counter,
    pub duplicates_index_bytes: Counter,
    /// Pages whose object lies on the backing disk; those of the pool are counted by codec above.
    pub pages_on_disk: Counter,
    /// Those of them that lie in clusters.
    pub pages_in_clusters: Counter,
    /// Pages of the pool that nobody has read or written since they were last marked idle.
    pub idle_pages: Counter,
    /// Bytes of all objects of the pool without their headers; and by codec, but for incompressible ones.
    pub compressed_bytes: Counter,
    pub bytes_lz4: Counter,
    pub bytes_zstd: Counter,
    pub bytes_zstd_dictionary: Counter,
    /// Bytes of the pages that objects lie on, now and at most, and their limit.
    pub pool_bytes: Counter,
    pub pool_peak_bytes: Counter,
    pub pool_limit_bytes: Counter,
    /// Bytes of arena memory taken from the system, in use or not.
    pub backed_bytes: Counter,
    /// Who moves objects, and the end of the pool waits for.
    pub movers_awaited: Counter,
    /// Bytes of slot words, locks and descriptors, and of the arena's own bookkeeping.
    pub metadata_bytes: Counter,
    pub arena_metadata_bytes: Counter,

    /// Of each place for a dictionary: its serial number (0: none), its bytes, and pages that need it, in the pool or on the
    /// disk. Then the memory that all take, and what is at hand to compress with the newest.
    pub dictionaries: [DictionaryMetrics; PLACES],
    pub dictionary_bytes: Counter,
    pub encoder_bytes: Counter,
    /// Who recompresses pages.
    pub recompressions_in_flight: Counter,

    /// 0: there is no backing disk, 1: it serves, 2: it has failed, and nothing more is written to it.
    pub backing_state: Counter,
    /// Of the backing disk, and of its segments that hold nothing.
    pub backing_bytes: Counter,
    pub backing_free_bytes: Counter,
    /// Bytes of records on the disk that slots name, each with its header and padding.
    pub disk_live_bytes: Counter,
    /// Segments being written for evictions, and segments being cleaned.
    pub writebacks_in_flight: Counter,
    pub cleanings_in_flight: Counter,
    /// Bytes that may still be written; [`u64::MAX`]: no budget.
    pub writeback_budget_bytes: Counter,

    /// What a pager holds for a machine that is out of memory, and stuck: less while it is given.
    pub ballast_bytes: Counter,
    /// Requests on the swap file that workers of a pager are at: the end of paging waits for them. Among what the same
    /// worker counts for each page.
    pub page_operations: Counter,
    pub loads: Counter,
    pub stores: Counter,
    pub discards: Counter,
    pub rejected_pool_full: Counter,
    /// The reserve of memory was used up.
    pub rejected_no_memory: Counter,
    pub rejected_out_of_range: Counter,
    /// The pool was full, and nothing could be written back: no healthy disk with room, or the budget was used up.
    pub rejected_no_writeback: Counter,
    /// Stores that found no room, and were tried again until the shrinkers had made some.
    pub stores_waited_for_room: Counter,
    pub errors_lost: Counter,
    pub errors_corrupt: Counter,
    /// Pages of zspages that compaction has freed.
    pub pages_compacted: Counter,
    /// Pages that were recompressed, and the bytes of the pool that this has saved; those that would not have got smaller;
    /// and the processor time that it took, in nanoseconds.
    pub pages_recompressed: Counter,
    pub recompression_saved_bytes: Counter,
    pub pages_not_smaller: Counter,
    /// Pages that were found to be like another one, and share it since.
    pub pages_deduplicated: Counter,
    pub recompression_ns: Counter,
    /// Pages moved to the disk, and back to the pool when they were read.
    pub pages_written_back: Counter,
    pub pages_promoted: Counter,
    /// Processor time that making clusters has taken, in nanoseconds.
    pub cluster_ns: Counter,
    /// Whole blocks, written for evictions and for cleaning.
    pub writeback_bytes: Counter,
    pub cleaning_bytes: Counter,
    pub cleaned_segments: Counter,
    /// Reads of pages from the disk that went well, and the whole blocks that they took.
    pub disk_reads: Counter,
    pub disk_read_bytes: Counter,
    /// Objects that were looked at behind a recovery, and those of them that were bad.
    pub objects_verified: Counter,
    pub objects_found_bad: Counter,
    /// How often another process has taken over the swap file, and how long that took last, in nanoseconds. Not set by
    /// the core.
    pub takeovers: Counter,
    pub takeover_ns: Counter,
    /// Segments that could not be written, and loads of pages that could not be read.
    pub writeback_errors: Counter,
    pub disk_read_errors: Counter,
    pub load_latency: Histogram,
    pub store_latency: Histogram,
    /// How long loads have waited for an object that was being moved; those that have not waited are not in it.
    pub mover_waits: Histogram,
    /// Of pages read from the disk, and of segments written for evictions.
    pub disk_read_latency: Histogram,
    pub writeback_latency: Histogram,
    pub classes: [ClassMetrics; MAX_CLASSES],
}

/// Changes with every change of [`Metrics`], so that nobody reads one layout as another.
pub const LAYOUT: u64 = 11;

impl Metrics {
    /// Pages and bytes of the pool by codec: those of incompressible pages are known.
    pub fn of_codec(&self, codec: Codec) -> (&Counter, Option<&Counter>) {
        match codec {
            Codec::Raw => (&self.pages_incompressible, None),
            Codec::Lz4 => (&self.pages_lz4, Some(&self.bytes_lz4)),
            Codec::Zstd => (&self.pages_zstd, Some(&self.bytes_zstd)),
            Codec::ZstdDictionary => (&self.pages_zstd_dictionary, Some(&self.bytes_zstd_dictionary)),
        }
    }

    /// Sets to zero what is as of now. The peak of the pool stays, and settings are set by who has them.
    fn reset_gauges(&self) {
        let pages = [
            &self.pages_lz4,
            &self.pages_zstd,
            &self.pages_zstd_dictionary,
            &self.pages_same_filled,
            &self.pages_incompressible,
            &self.pages_lost,
            &self.pages_shared,
            &self.shared_pages,
            &self.pages_on_disk,
            &self.pages_in_clusters,
            &self.idle_pages,
        ];
        let bytes = [
            &self.compressed_bytes,
            &self.bytes_lz4,
            &self.bytes_zstd,
            &self.bytes_zstd_dictionary,
            &self.dictionary_bytes,
            &self.encoder_bytes,
            &self.duplicates_index_bytes,
            &self.pool_bytes,
            &self.backed_bytes,
            &self.backing_state,
            &self.backing_bytes,
            &self.backing_free_bytes,
            &self.disk_live_bytes,
            &self.ballast_bytes,
        ];
        let at_work = [
            &self.page_operations,
            &self.movers_awaited,
            &self.writebacks_in_flight,
            &self.cleanings_in_flight,
            &self.recompressions_in_flight,
        ];
        pages.iter().chain(&bytes).chain(&at_work).for_each(|gauge| gauge.set(0));
        for class in &self.classes {
            [&class.zspages, &class.objects].into_iter().chain(&class.groups).for_each(|gauge| gauge.set(0));
        }
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        // SAFETY: atomics of integers, valid when zero.
        unsafe { std::mem::zeroed() }
    }
}

// SAFETY: all zero as defined, and no drop.
unsafe impl Zeroable for Metrics {}

/// A [`Metrics`] block that several parts of a process, or several processes, share.
#[derive(Clone)]
pub struct SharedMetrics(Arc<ZeroedTable<Metrics>>);

impl SharedMetrics {
    /// A block that this process writes: in `file` (see [`SharedMetrics::file`]), else in private memory.
    pub fn new(file: Option<BorrowedFd<'_>>) -> Result<SharedMetrics> {
        let metrics = Self::over(file.map_or(Backing::Private, Backing::File))?;
        metrics.layout.set(LAYOUT);
        Ok(metrics)
    }

    /// The block in `file` that another process has written, and that this one goes on with: events are counted on, all
    /// else begins at zero. Without a file, a new block.
    ///
    /// Errors: [`Error::Invalid`], with nothing changed, if its size or layout is another one.
    pub fn resume(file: Option<BorrowedFd<'_>>) -> Result<SharedMetrics> {
        let Some(file) = file else { return Self::new(None) };
        SharedMetrics::open(file)?;
        let metrics = Self::over(Backing::File(file))?;
        metrics.reset_gauges();
        Ok(metrics)
    }

    /// A new memory file for a block.
    pub fn file() -> Result<OwnedFd> {
        memory_file(c"zswapd-counters", size_of::<Metrics>() as u64)
    }

    /// The block that another process writes to `file`.
    ///
    /// Errors: [`Error::Invalid`] if its size or layout is another one.
    pub fn open(file: BorrowedFd<'_>) -> Result<SharedMetrics> {
        let refused = |what| Error::Invalid(format!("not the counters of this version of zswapd: {what}"));
        if length_of(file)? != size_of::<Metrics>() as u64 {
            return Err(refused("other size".into()));
        }
        let metrics = Self::over(Backing::ReadOnly(file))?;
        match metrics.layout.get() {
            LAYOUT => Ok(metrics),
            other => Err(refused(format!("layout {other}, not {LAYOUT}"))),
        }
    }

    fn over(what: Backing<'_>) -> Result<SharedMetrics> {
        Ok(SharedMetrics(Arc::new(ZeroedTable::over(1, what)?)))
    }
}

impl Deref for SharedMetrics {
    type Target = Metrics;
    fn deref(&self) -> &Metrics {
        &self.0[0]
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn bounds_rise() {
        assert!(LATENCY_BOUNDS_NS.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn a_gauge_stops_at_zero() {
        let counter = Counter::default();
        counter.add(2);
        counter.sub(3);
        assert_eq!(counter.get(), 0);
    }

    #[test]
    fn every_latency_is_counted_once() {
        let histogram = Histogram::default();
        for _ in 0..10 {
            histogram.record_since(Instant::now());
        }
        assert_eq!(histogram.snapshot().counts.iter().sum::<u64>(), 10);
    }

    #[test]
    fn a_block_is_seen_through_its_file_and_another_layout_is_refused() {
        let file = SharedMetrics::file().expect("file");
        let writer = SharedMetrics::new(Some(file.as_fd())).expect("map");
        writer.loads.add(7);
        assert_eq!(SharedMetrics::open(file.as_fd()).expect("same layout").loads.get(), 7);
        writer.layout.set(LAYOUT + 1);
        assert!(SharedMetrics::open(file.as_fd()).is_err());
        let short = memory_file(c"short", 8).expect("file");
        assert!(SharedMetrics::open(short.as_fd()).is_err());
    }

    #[test]
    fn a_successor_counts_on_and_begins_with_nothing_under_way() {
        let file = SharedMetrics::file().expect("file");
        let killed = SharedMetrics::new(Some(file.as_fd())).expect("map");
        killed.loads.add(3);
        killed.page_operations.add(2);
        let successor = SharedMetrics::resume(Some(file.as_fd())).expect("same layout");
        assert_eq!((successor.loads.get(), successor.page_operations.get()), (3, 0));
    }
}
