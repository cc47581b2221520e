//! Counters and latency histograms: relaxed atomics, recorded on the page path, read at any time without waiting.

use crate::sync::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// A count that only grows, or a gauge that goes both ways.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Subtracts, stopping at zero: a length read from a corrupted object must not turn a gauge into 2^64.
    pub fn sub(&self, n: u64) {
        let _ = self.0.fetch_update(Relaxed, Relaxed, |value| Some(value.saturating_sub(n)));
    }

    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
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

/// What the store counts. Pages are counted by what they are now, events since the start.
#[derive(Default)]
pub struct Metrics {
    pub pages_lz4: Counter,
    pub pages_zstd: Counter,
    pub pages_same_filled: Counter,
    pub pages_incompressible: Counter,
    pub pages_lost: Counter,
    /// Bytes of all stored objects without their headers.
    pub compressed_bytes: Counter,

    pub loads: Counter,
    pub stores: Counter,
    pub discards: Counter,
    pub rejected_pool_full: Counter,
    pub rejected_out_of_range: Counter,
    pub errors_lost: Counter,
    pub errors_corrupt: Counter,
    pub load_latency: Histogram,
    pub store_latency: Histogram,
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
