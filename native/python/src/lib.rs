//! `zswapd._native`: the Rust core as a Python module. Types and errors are mapped here, nothing is decided.

mod process;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use zswapd_core::codec::{Algorithm, Codecs, Compression};
use zswapd_core::engine::Engine as CoreEngine;
use zswapd_core::error::Error;
use zswapd_core::metrics::{ClassMetrics, Counter, HistogramSnapshot, Metrics, SharedMetrics, LATENCY_BOUNDS_NS};
use zswapd_core::page::{Page, PAGE_SIZE};
use zswapd_core::pool::Allocator;
use zswapd_core::scratch::Scratch;
use zswapd_core::store::{Detached, Files};

/// The one place where an error of the core becomes a Python exception: ValueError for a bad argument, else OSError
/// with its errno.
fn to_python(error: Error) -> PyErr {
    match error {
        Error::Invalid(message) => PyValueError::new_err(message),
        error => PyOSError::new_err((error.errno(), error.to_string())),
    }
}

/// A swap file of fixed size over a compressed pool. Thread-safe.
#[pyclass(frozen, subclass, module = "zswapd._native")]
struct Engine {
    core: CoreEngine,
    /// One scratch per thread that has ever been inside at the same time as others.
    scratches: Mutex<Vec<Scratch>>,
}

impl Engine {
    fn with_scratch<R>(&self, work: impl FnOnce(&mut Scratch) -> Result<R, Error>) -> PyResult<R> {
        let idle = || self.scratches.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = idle().pop();
        let mut scratch = match taken {
            Some(scratch) => scratch,
            None => Scratch::new().map_err(to_python)?,
        };
        let result = work(&mut scratch);
        idle().push(scratch);
        result.map_err(to_python)
    }
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (*, size_bytes, allocator, mem_limit, algorithm, zstd_level))]
    fn new(size_bytes: u64, allocator: &str, mem_limit: u64, algorithm: &str, zstd_level: i32) -> PyResult<Self> {
        let allocator = allocator.parse().map_err(to_python)?;
        let compression = compression(algorithm, zstd_level)?;
        let core =
            CoreEngine::new(size_bytes, allocator, mem_limit, compression, Files::default()).map_err(to_python)?;
        Ok(Engine { core, scratches: Mutex::default() })
    }

    fn read<'py>(&self, py: Python<'py>, offset: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        let rest = usize::try_from(self.core.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        PyBytes::new_with(py, length.min(rest), |buffer| {
            self.with_scratch(|scratch| py.detach(|| self.core.read(offset, buffer, scratch))).map(drop)
        })
    }

    fn write(&self, py: Python<'_>, offset: u64, data: &[u8]) -> PyResult<()> {
        self.with_scratch(|scratch| py.detach(|| self.core.write(offset, data, scratch)))
    }

    fn discard(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        // No room: whatever is discarded is freed before we return.
        let mut detached = Detached::with_capacity(0);
        self.with_scratch(|scratch| py.detach(|| self.core.discard(offset, length, &mut detached, scratch)))
    }

    fn compact(&self, py: Python<'_>) {
        py.detach(|| self.core.store().compact());
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.core.reset());
    }

    fn set_compression(&self, algorithm: &str, zstd_level: i32) -> PyResult<()> {
        self.core.set_compression(compression(algorithm, zstd_level)?);
        Ok(())
    }

    fn set_mem_limit(&self, size_bytes: u64) {
        self.core.store().pool().set_limit_bytes(size_bytes);
    }

    /// The native half of stats.json: see `zswapd/_native.pyi`.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.core.store().refresh_gauges();
        stats(py, self.core.store().metrics())
    }
}

/// The counters that a pager publishes, mapped read-only.
#[pyclass(frozen, module = "zswapd._native")]
struct Counters {
    metrics: SharedMetrics,
}

#[pymethods]
impl Counters {
    /// Takes over the descriptor.
    #[new]
    fn new(fd: i32) -> PyResult<Self> {
        // SAFETY: the caller gives the descriptor away.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Counters { metrics: SharedMetrics::open(file.as_fd()).map_err(to_python)? })
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        stats(py, &self.metrics)
    }
}

fn counts<'py>(py: Python<'py>, pairs: &[(&str, u64)]) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    pairs.iter().try_for_each(|(name, value)| dict.set_item(name, value))?;
    Ok(dict)
}

fn stats<'py>(py: Python<'py>, metrics: &Metrics) -> PyResult<Bound<'py, PyDict>> {
    let pages = [
        ("lz4", metrics.pages_lz4.get()),
        ("zstd", metrics.pages_zstd.get()),
        ("zstd_dictionary", metrics.pages_zstd_dictionary.get()),
        ("same_filled", metrics.pages_same_filled.get()),
        ("incompressible", metrics.pages_incompressible.get()),
        ("duplicate", duplicates(metrics)),
        ("on_disk", metrics.pages_on_disk.get()),
        ("lost", metrics.pages_lost.get()),
    ];
    let stored: u64 = pages.iter().filter(|(kind, _)| *kind != "lost").map(|(_, pages)| pages).sum();
    let pool = metrics.pool_bytes.get();
    let stats = counts(
        py,
        &[
            ("swap_size_bytes", metrics.swap_size_bytes.get()),
            ("page_size_bytes", PAGE_SIZE as u64),
            ("zstd_level", metrics.zstd_level.get()),
            ("original_bytes", stored * PAGE_SIZE as u64),
            ("compressed_bytes", metrics.compressed_bytes.get()),
            ("pool_bytes", pool),
            ("pool_peak_bytes", metrics.pool_peak_bytes.get()),
            ("pool_reserve_bytes", metrics.backed_bytes.get().saturating_sub(pool)),
            ("pool_limit_bytes", metrics.pool_limit_bytes.get()),
            ("metadata_bytes", metrics.metadata_bytes.get() + metrics.arena_metadata_bytes.get()),
            ("loads", metrics.loads.get()),
            ("stores", metrics.stores.get()),
            ("discards", metrics.discards.get()),
            ("pages_compacted", metrics.pages_compacted.get()),
            ("ballast_bytes", metrics.ballast_bytes.get()),
            ("page_operations", metrics.page_operations.get()),
            ("movers_awaited", metrics.movers_awaited.get()),
            ("takeovers", metrics.takeovers.get()),
            ("objects_verified", metrics.objects_verified.get()),
            ("objects_found_bad", metrics.objects_found_bad.get()),
        ],
    )?;
    stats.set_item("takeover_seconds", Duration::from_nanos(metrics.takeover_ns.get()).as_secs_f64())?;
    let algorithm = if metrics.algorithm.get() == 0 { Algorithm::Lz4 } else { Algorithm::Zstd };
    stats.set_item("algorithm", algorithm.name())?;
    let allocator = if metrics.allocator.get() == 0 { Allocator::Zsmalloc } else { Allocator::Z3fold };
    stats.set_item("allocator", allocator.name())?;
    stats.set_item("pages", counts(py, &pages)?)?;
    let rejected = [
        ("pool_full", metrics.rejected_pool_full.get()),
        ("no_memory", metrics.rejected_no_memory.get()),
        ("out_of_range", metrics.rejected_out_of_range.get()),
        ("no_writeback", metrics.rejected_no_writeback.get()),
    ];
    stats.set_item("rejected_stores", counts(py, &rejected)?)?;
    let errors = [
        ("lost", metrics.errors_lost.get()),
        ("corrupt", metrics.errors_corrupt.get()),
        ("disk", metrics.disk_read_errors.get()),
    ];
    stats.set_item("errors", counts(py, &errors)?)?;
    stats.set_item("load_latency", histogram(py, &metrics.load_latency.snapshot())?)?;
    stats.set_item("store_latency", histogram(py, &metrics.store_latency.snapshot())?)?;
    stats.set_item("mover_waits", histogram(py, &metrics.mover_waits.snapshot())?)?;
    // z3fold has none: what it counts there is pages of up to three objects of any length, and pairs of pages.
    let is_class = |class: &&ClassMetrics| allocator == Allocator::Zsmalloc && class.size_bytes.get() > 0;
    let classes = metrics.classes.iter().filter(is_class).map(|class| {
        let zspage_bytes = class.pages_per_zspage.get() * PAGE_SIZE as u64;
        let in_use = class.objects.get() * class.size_bytes.get();
        let fields = [
            ("size_bytes", class.size_bytes.get()),
            ("pages_per_zspage", class.pages_per_zspage.get()),
            ("objects_per_zspage", class.objects_per_zspage.get()),
            ("zspages", class.zspages.get()),
            ("objects", class.objects.get()),
            ("waste_bytes", (class.zspages.get() * zspage_bytes).saturating_sub(in_use)),
        ];
        let entry = counts(py, &fields)?;
        entry.set_item("zspages_by_fullness", class.groups.each_ref().map(Counter::get).to_vec())?;
        Ok(entry)
    });
    stats.set_item("classes", classes.collect::<PyResult<Vec<_>>>()?)?;
    stats.set_item("recompression", recompression(py, metrics)?)?;
    stats.set_item("writeback", writeback(py, metrics)?)?;
    Ok(stats)
}

/// Pages that need no object of their own, since others that are alike have one.
fn duplicates(metrics: &Metrics) -> u64 {
    metrics.pages_shared.get().saturating_sub(metrics.shared_pages.get())
}

fn recompression<'py>(py: Python<'py>, metrics: &Metrics) -> PyResult<Bound<'py, PyDict>> {
    let dict = counts(
        py,
        &[
            ("pages_recompressed", metrics.pages_recompressed.get()),
            ("pages_not_smaller", metrics.pages_not_smaller.get()),
            ("saved_bytes", metrics.recompression_saved_bytes.get()),
            ("in_flight", metrics.recompressions_in_flight.get()),
            ("dictionary_bytes", metrics.dictionary_bytes.get()),
            ("encoder_bytes", metrics.encoder_bytes.get()),
            ("pages_deduplicated", metrics.pages_deduplicated.get()),
            ("pages_shared", metrics.pages_shared.get()),
            ("shared_pages", metrics.shared_pages.get()),
            ("index_bytes", metrics.duplicates_index_bytes.get()),
        ],
    )?;
    dict.set_item("processor_seconds", Duration::from_nanos(metrics.recompression_ns.get()).as_secs_f64())?;
    let bytes = [
        ("lz4", metrics.bytes_lz4.get()),
        ("zstd", metrics.bytes_zstd.get()),
        ("zstd_dictionary", metrics.bytes_zstd_dictionary.get()),
        ("incompressible", metrics.pages_incompressible.get() * PAGE_SIZE as u64),
    ];
    dict.set_item("bytes", counts(py, &bytes)?)?;
    let installed = metrics.dictionaries.iter().filter(|dictionary| dictionary.serial.get() > 0);
    let installed = installed.map(|dictionary| {
        let (serial, bytes, pages) = (dictionary.serial.get(), dictionary.bytes.get(), dictionary.pages.get());
        counts(py, &[("serial", serial), ("bytes", bytes), ("pages", pages)])
    });
    dict.set_item("dictionaries", installed.collect::<PyResult<Vec<_>>>()?)?;
    Ok(dict)
}

fn writeback<'py>(py: Python<'py>, metrics: &Metrics) -> PyResult<Bound<'py, PyDict>> {
    let dict = counts(
        py,
        &[
            ("backing_bytes", metrics.backing_bytes.get()),
            ("backing_free_bytes", metrics.backing_free_bytes.get()),
            ("live_bytes", metrics.disk_live_bytes.get()),
            ("pages_in_clusters", metrics.pages_in_clusters.get()),
            ("idle_pages", metrics.idle_pages.get()),
            ("writebacks_in_flight", metrics.writebacks_in_flight.get()),
            ("cleanings_in_flight", metrics.cleanings_in_flight.get()),
            ("pages_written", metrics.pages_written_back.get()),
            ("pages_promoted", metrics.pages_promoted.get()),
            ("written_bytes", metrics.writeback_bytes.get()),
            ("cleaning_bytes", metrics.cleaning_bytes.get()),
            ("cleaned_segments", metrics.cleaned_segments.get()),
            ("reads", metrics.disk_reads.get()),
            ("read_bytes", metrics.disk_read_bytes.get()),
            ("write_errors", metrics.writeback_errors.get()),
            ("stores_waited", metrics.stores_waited_for_room.get()),
        ],
    )?;
    let state = match metrics.backing_state.get() {
        0 => "none",
        1 => "ok",
        _ => "failed",
    };
    dict.set_item("state", state)?;
    dict.set_item("cluster_seconds", Duration::from_nanos(metrics.cluster_ns.get()).as_secs_f64())?;
    let budget = Some(metrics.writeback_budget_bytes.get()).filter(|&bytes| bytes != u64::MAX && state != "none");
    dict.set_item("budget_bytes", budget)?;
    dict.set_item("read_latency", histogram(py, &metrics.disk_read_latency.snapshot())?)?;
    dict.set_item("write_latency", histogram(py, &metrics.writeback_latency.snapshot())?)?;
    Ok(dict)
}

fn histogram<'py>(py: Python<'py>, snapshot: &HistogramSnapshot) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let seconds = |ns: u64| ns as f64 / 1e9;
    dict.set_item("bounds_seconds", LATENCY_BOUNDS_NS.map(seconds).to_vec())?;
    dict.set_item("counts", snapshot.counts.to_vec())?;
    dict.set_item("sum_seconds", seconds(snapshot.sum_ns))?;
    Ok(dict)
}

fn compression(algorithm: &str, zstd_level: i32) -> PyResult<Compression> {
    algorithm.parse().and_then(|algorithm: Algorithm| Compression::new(algorithm, zstd_level)).map_err(to_python)
}

/// Encodes one page as the store would: (codec name, payload). For tests against independent decoders.
#[pyfunction]
fn compress_page<'py>(
    py: Python<'py>,
    page: &[u8],
    algorithm: &str,
    zstd_level: i32,
) -> PyResult<(&'static str, Bound<'py, PyBytes>)> {
    let page: &Page = page.try_into().map_err(|_| PyValueError::new_err(format!("a page has {PAGE_SIZE} bytes")))?;
    let mut codecs = Codecs::new().map_err(to_python)?;
    let (codec, payload) = codecs.compress(page, compression(algorithm, zstd_level)?);
    Ok((codec.name(), PyBytes::new(py, payload)))
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Counters>()?;
    module.add_class::<Engine>()?;
    module.add_function(wrap_pyfunction!(compress_page, module)?)?;
    module.add_function(wrap_pyfunction!(process::lock_memory, module)?)?;
    module.add_function(wrap_pyfunction!(process::become_io_flusher, module)?)?;
    Ok(())
}
