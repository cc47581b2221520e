//! The command line. zswapd writes it, from a configuration that it has checked.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use zswapd_core::codec::Algorithm;
use zswapd_core::pool::Allocator;

pub struct Args {
    pub mount_point: PathBuf,
    pub control: PathBuf,
    pub size: u64,
    pub mem_limit: u64,
    pub allocator: Allocator,
    pub algorithm: Algorithm,
    pub zstd_level: i32,
    /// Threads that read requests.
    pub workers: usize,
    /// How long a worker looks for the next request before it sleeps, at most.
    pub spin: Duration,
    /// What is stored of the swap file: all of it, but for measuring what the rest costs.
    pub stored: u64,
}

/// With `--store none`: enough for the swap header.
const HEADER: u64 = 2 << 20;

/// Takes `--name value` pairs; all but `--workers`, `--spin-us` and `--store` are required.
pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut values = std::collections::BTreeMap::new();
    while let Some(name) = words.next() {
        let value = words.next().ok_or_else(|| format!("{name} has no value"))?;
        values.insert(name, value);
    }
    let mut text = |name: &str| values.remove(name);
    let stored = match text("--store").as_deref() {
        None | Some("compressed") => u64::MAX,
        Some("none") => HEADER,
        Some(other) => return Err(format!("--store: {other:?} is not valid")),
    };
    let args = Args {
        stored,
        mount_point: required("--mount-point", text("--mount-point"))?,
        control: required("--control", text("--control"))?,
        size: required("--size", text("--size"))?,
        mem_limit: required("--mem-limit", text("--mem-limit"))?,
        allocator: required("--allocator", text("--allocator"))?,
        algorithm: required("--algorithm", text("--algorithm"))?,
        zstd_level: required("--zstd-level", text("--zstd-level"))?,
        workers: required("--workers", text("--workers").or(Some("1".into())))?,
        spin: Duration::from_micros(required("--spin-us", text("--spin-us").or(Some("100".into())))?),
    };
    match values.keys().next() {
        Some(name) => Err(format!("unknown argument {name}")),
        None => Ok(args),
    }
}

fn required<T: FromStr>(name: &str, value: Option<String>) -> Result<T, String> {
    let value = value.ok_or_else(|| format!("{name} is missing"))?;
    value.parse().map_err(|_| format!("{name}: {value:?} is not valid"))
}
