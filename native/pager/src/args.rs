//! The command line. zswapd writes it, from a configuration that it has checked.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use zswapd_core::codec::Algorithm;
use zswapd_core::lru::Incompressible;
use zswapd_core::pool::Allocator;
use zswapd_keeper::descriptors::Descriptors;

pub struct Args {
    /// What the keeper that has started us keeps.
    pub keeper: Descriptors,
    /// The keeper's, and ours when it is gone.
    pub mount_point: PathBuf,
    pub control: PathBuf,
    pub size: u64,
    pub mem_limit: u64,
    pub allocator: Allocator,
    pub algorithm: Algorithm,
    pub zstd_level: i32,
    pub backing: Option<Backing>,
    /// Threads that answer requests while others wait for the backing disk. Without one, a single thread does it all.
    pub workers: usize,
    /// How long a worker looks for the next request before it sleeps, at most.
    pub spin: Duration,
    /// Whether to ask the kernel for what was not answered; debug builds can do as where it is not able to.
    pub resend: bool,
    /// What is stored of the swap file: all of it, but for measuring what the rest costs.
    pub stored: u64,
}

/// Where cold pages go.
pub struct Backing {
    /// A block device, or a file that is written in full.
    pub path: PathBuf,
    pub encryption: bool,
    pub incompressible: Incompressible,
    /// Of the pool's limit: writing back ends when the pool has shrunk to this.
    pub accept_threshold_percent: u32,
    /// Threads that write back.
    pub shrinkers: usize,
    /// How the disk fails, for tests; debug builds only.
    pub faults: Option<String>,
}

/// With `--store none`: enough for the swap header.
const HEADER: u64 = 2 << 20;

/// Takes `--name value` pairs. Required are those without a default here, but for `--backing`: without it nothing is
/// written back.
///
/// Errors: what was wrong, and what is right.
pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut values = Values::default();
    while let Some(name) = words.next() {
        let value = words.next().ok_or_else(|| format!("{name} has no value: give one after it"))?;
        if values.0.insert(name.clone(), value).is_some() {
            return Err(format!("{name} is given twice: give it once"));
        }
    }
    let one_of = |names: &'static [&'static str]| move |value: &str| names.iter().position(|name| *name == value);
    let within = |range: std::ops::RangeInclusive<u64>| {
        move |value: &str| text::<u64>(value).filter(|number| range.contains(number))
    };
    let path = values.0.remove("--backing").map(PathBuf::from);
    let backing = Backing {
        path: path.clone().unwrap_or_default(),
        encryption: values.take("--encryption", Some("on"), "on or off", one_of(&["off", "on"]))? == 1,
        incompressible: values.take(
            "--incompressible",
            Some("writeback"),
            "keep, writeback or first",
            incompressible,
        )?,
        accept_threshold_percent: values.take(
            "--accept-threshold",
            Some("90"),
            "a percentage of --mem-limit from 1 to 100",
            within(1..=100),
        )? as u32,
        shrinkers: values.take("--shrinkers", Some("2"), "a number from 1 to 8", within(1..=8))? as usize,
        faults: if cfg!(debug_assertions) { values.0.remove("--faults") } else { None },
    };
    let stored = values.take("--store", Some("compressed"), "compressed or none", one_of(&["none", "compressed"]))?;
    let args = Args {
        keeper: values.take("--keeper", None, "descriptors, from zswapd-keeper, which starts pagers", text)?,
        mount_point: values.take("--mount-point", None, "a directory", text)?,
        control: values.take("--control", None, "the path of a socket", text)?,
        size: values.take("--size", None, "bytes", text)?,
        mem_limit: values.take("--mem-limit", None, "bytes", text)?,
        allocator: values.take("--allocator", None, "zsmalloc or z3fold", text)?,
        algorithm: values.take("--algorithm", None, "lz4 or zstd", text)?,
        zstd_level: values.take("--zstd-level", None, "a number from 1 to 22", text)?,
        backing: path.map(|_| backing),
        workers: values.take("--workers", Some("8"), "a number from 1 to 16", within(1..=16))? as usize,
        spin: Duration::from_micros(values.take("--spin-us", Some("100"), "microseconds", text)?),
        resend: !cfg!(debug_assertions) || values.0.remove("--resend").is_none_or(|value| value != "off"),
        stored: if stored == 0 { HEADER } else { u64::MAX },
    };
    match values.0.keys().next() {
        Some(name) => Err(format!("{name} is unknown: is it of another version?")),
        None => Ok(args),
    }
}

/// What is not taken yet, by name.
#[derive(Default)]
struct Values(BTreeMap<String, String>);

impl Values {
    /// The value of an argument, or its default. `takes` says what it may be.
    fn take<T>(
        &mut self,
        name: &str,
        default: Option<&str>,
        takes: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, String> {
        let given = self.0.remove(name);
        let value = given.as_deref().or(default).ok_or_else(|| format!("{name} is missing: it takes {takes}"))?;
        parse(value).ok_or_else(|| format!("{name} {value:?} is not valid: it takes {takes}"))
    }
}

fn text<T: FromStr>(value: &str) -> Option<T> {
    value.parse().ok()
}

fn incompressible(value: &str) -> Option<Incompressible> {
    match value {
        "keep" => Some(Incompressible::Keep),
        "writeback" => Some(Incompressible::Writeback),
        "first" => Some(Incompressible::First),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUIRED: &str = "--mount-point /m --control /m.sock --size 4096 --mem-limit 8192 --allocator zsmalloc \
                            --algorithm lz4 --zstd-level 3 --keeper fd=3,fuse=4,state=5,counters=6,control=7,device=8";

    fn parsed(more: &str) -> Result<Args, String> {
        parse(format!("{REQUIRED} {more}").split_whitespace().map(String::from))
    }

    #[test]
    fn a_backing_disk_has_defaults() {
        assert!(parsed("--shrinkers 3").expect("valid").backing.is_none());
        let backing = parsed("--backing /dev/sdz").expect("valid").backing.expect("a disk");
        assert_eq!(backing.path, PathBuf::from("/dev/sdz"));
        assert!(backing.encryption && backing.incompressible == Incompressible::Writeback);
        assert_eq!((backing.accept_threshold_percent, backing.shrinkers), (90, 2));
        let backing = parsed("--encryption off --incompressible first --backing b --accept-threshold 50 --shrinkers 8");
        let backing = backing.expect("valid").backing.expect("a disk");
        assert!(!backing.encryption && backing.incompressible == Incompressible::First);
        assert_eq!((backing.accept_threshold_percent, backing.shrinkers), (50, 8));
    }

    #[test]
    fn what_is_wrong_is_named_and_what_is_right() {
        for (wrong, name, right) in [
            ("--encryption maybe", "--encryption \"maybe\"", "on or off"),
            ("--incompressible never", "--incompressible", "keep, writeback or first"),
            ("--accept-threshold 0", "--accept-threshold", "1 to 100"),
            ("--accept-threshold 101", "--accept-threshold", "1 to 100"),
            ("--shrinkers 9", "--shrinkers", "1 to 8"),
            ("--shrinkers -1", "--shrinkers", "1 to 8"),
            ("--workers 17", "--workers", "1 to 16"),
            ("--store all", "--store", "compressed or none"),
            ("--backing", "--backing", "after it"),
            ("--size 8192", "--size", "once"),
            ("--frobnicate 1", "--frobnicate", "another version"),
        ] {
            let message = parsed(wrong).err().expect(wrong);
            assert!(message.contains(name) && message.contains(right), "{message}");
        }
        let message = parse(["--size", "4096"].into_iter().map(String::from)).err().expect("not enough");
        assert!(message.contains("is missing"), "{message}");
    }
}
