//! `zswapd._native`: the Rust core as a Python module. Types and errors are mapped here, nothing is decided.

mod process;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::sync::{Mutex, PoisonError};
use zswapd_core::codec::{Algorithm, Compression, Scratch};
use zswapd_core::engine::Engine as CoreEngine;
use zswapd_core::error::Error;
use zswapd_core::metrics::{HistogramSnapshot, LATENCY_BOUNDS_NS};
use zswapd_core::page::{Page, PAGE_SIZE};
use zswapd_core::pool::ClassUsage;

/// The one place where an error of the core becomes a Python exception: ValueError for a bad argument, else OSError
/// with its errno.
fn to_python(error: Error) -> PyErr {
    match error {
        Error::Invalid(message) => PyValueError::new_err(message),
        error => PyOSError::new_err((error.errno(), error.to_string())),
    }
}

/// A swap file of fixed size over a compressed pool. Thread-safe.
#[pyclass(frozen, module = "zswapd._native")]
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
    #[pyo3(signature = (*, size_bytes, mem_limit, algorithm, zstd_level))]
    fn new(size_bytes: u64, mem_limit: u64, algorithm: &str, zstd_level: i32) -> PyResult<Self> {
        let compression = compression(algorithm, zstd_level)?;
        let core = CoreEngine::new(size_bytes, mem_limit, compression).map_err(to_python)?;
        Ok(Engine { core, scratches: Mutex::default() })
    }

    #[getter]
    fn size_bytes(&self) -> u64 {
        self.core.size()
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
        self.with_scratch(|scratch| py.detach(|| self.core.discard(offset, length, scratch)))
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.core.reset());
    }

    #[getter]
    fn algorithm(&self) -> &'static str {
        self.core.compression().algorithm.name()
    }

    #[getter]
    fn zstd_level(&self) -> i32 {
        self.core.compression().zstd_level
    }

    fn set_compression(&self, algorithm: &str, zstd_level: i32) -> PyResult<()> {
        self.core.set_compression(compression(algorithm, zstd_level)?);
        Ok(())
    }

    #[getter]
    fn mem_limit(&self) -> u64 {
        self.core.store().pool().limit_bytes()
    }

    #[setter]
    fn set_mem_limit(&self, bytes: u64) {
        self.core.store().pool().set_limit_bytes(bytes);
    }

    /// The native half of stats.json: see `zswapd/_native.pyi`.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let store = self.core.store();
        let (metrics, pool, usage) = (store.metrics(), store.pool(), store.pool().usage());
        let page = PAGE_SIZE as u64;
        let counts = |pairs: &[(&str, u64)]| -> PyResult<Bound<'py, PyDict>> {
            let dict = PyDict::new(py);
            pairs.iter().try_for_each(|(name, value)| dict.set_item(name, value))?;
            Ok(dict)
        };
        let pages = [
            ("lz4", metrics.pages_lz4.get()),
            ("zstd", metrics.pages_zstd.get()),
            ("same_filled", metrics.pages_same_filled.get()),
            ("incompressible", metrics.pages_incompressible.get()),
            ("lost", metrics.pages_lost.get()),
        ];
        let stored: u64 = pages.iter().filter(|(kind, _)| *kind != "lost").map(|(_, pages)| pages).sum();
        let class_counts = |class: &ClassUsage| {
            counts(&[
                ("size_bytes", class.size as u64),
                ("pages_per_zspage", class.pages_per_zspage as u64),
                ("objects_per_zspage", class.objects_per_zspage as u64),
                ("zspages", class.zspages),
                ("objects", class.objects),
            ])
        };
        let classes: Vec<_> = pool.class_usage().iter().map(class_counts).collect::<PyResult<_>>()?;
        let stats = counts(&[
            ("swap_size_bytes", self.core.size()),
            ("page_size_bytes", page),
            ("original_bytes", stored * page),
            ("compressed_bytes", metrics.compressed_bytes.get()),
            ("pool_bytes", usage.used * page),
            ("pool_peak_bytes", usage.peak * page),
            ("pool_reserve_bytes", usage.reserve * page),
            ("pool_limit_bytes", pool.limit_bytes()),
            ("metadata_bytes", store.metadata_bytes()),
            ("loads", metrics.loads.get()),
            ("stores", metrics.stores.get()),
            ("discards", metrics.discards.get()),
        ])?;
        stats.set_item("pages", counts(&pages)?)?;
        let rejected =
            [("pool_full", metrics.rejected_pool_full.get()), ("out_of_range", metrics.rejected_out_of_range.get())];
        stats.set_item("rejected_stores", counts(&rejected)?)?;
        let errors = [("lost", metrics.errors_lost.get()), ("corrupt", metrics.errors_corrupt.get())];
        stats.set_item("errors", counts(&errors)?)?;
        stats.set_item("load_latency", histogram(py, &metrics.load_latency.snapshot())?)?;
        stats.set_item("store_latency", histogram(py, &metrics.store_latency.snapshot())?)?;
        stats.set_item("classes", classes)?;
        Ok(stats)
    }
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
    let mut scratch = Scratch::new().map_err(to_python)?;
    let (codec, payload) = scratch.compress(page, compression(algorithm, zstd_level)?);
    Ok((codec.name(), PyBytes::new(py, payload)))
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Engine>()?;
    module.add_function(wrap_pyfunction!(compress_page, module)?)?;
    module.add_function(wrap_pyfunction!(process::lock_memory, module)?)?;
    module.add_function(wrap_pyfunction!(process::become_io_flusher, module)?)?;
    Ok(())
}
