//! A disk that goes wrong when it is told to, for tests. Not in release builds.

use super::{Disk, BLOCK};
use crate::error::{Error, Result};
use crate::sync::AtomicU64;
use crate::sync::Ordering::Relaxed;
use std::io;
use std::ops::RangeInclusive;
use std::time::Duration;

/// What happens instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Nothing is transferred, and the error reported.
    Errno(i32),
    /// Half of the blocks are transferred, and EIO reported.
    Short,
    /// It takes [`SLOW`] longer.
    Slow,
    /// The block in the middle is not transferred (and reads zeros); success is reported.
    Torn,
    /// One bit, another one each time, is the wrong one; success is reported.
    Flip,
}

const SLOW: Duration = Duration::from_millis(300);

struct Rule {
    write: bool,
    operations: RangeInclusive<u64>,
    fault: Fault,
}

/// A disk whose n-th read or write goes wrong.
pub struct Faults<D> {
    disk: D,
    rules: Vec<Rule>,
    reads: AtomicU64,
    writes: AtomicU64,
}

impl<D: Disk> Faults<D> {
    /// Rules, separated by commas: `read` or `write`; which ones of these operations, counted from 1 (`3`, `5-9`, or
    /// `5-`: all from there on); and `eio`, `enospc`, `short`, `slow`, `torn` or `flip`. Such as
    /// `write:3:eio,read:5-9:flip`. The first rule that fits is followed.
    ///
    /// Errors: [`Error::Invalid`].
    pub fn new(disk: D, rules: &str) -> Result<Faults<D>> {
        let rules = rules.split(',').map(|rule| {
            Rule::parse(rule).ok_or_else(|| Error::Invalid(format!("not a fault: {rule:?}; such as: write:3:eio")))
        });
        Ok(Faults { disk, rules: rules.collect::<Result<_>>()?, reads: AtomicU64::new(0), writes: AtomicU64::new(0) })
    }

    /// What is to happen to the operation that is now counted, and its number.
    fn next(&self, write: bool) -> (Option<Fault>, u64) {
        let count = if write { &self.writes } else { &self.reads };
        let n = count.fetch_add(1, Relaxed) + 1;
        let rule = self.rules.iter().find(|rule| rule.write == write && rule.operations.contains(&n));
        (rule.map(|rule| rule.fault), n)
    }
}

impl Rule {
    fn parse(rule: &str) -> Option<Rule> {
        let mut parts = rule.split(':');
        let (direction, operations, fault) = (parts.next()?, parts.next()?, parts.next()?);
        let write = match direction {
            "read" => false,
            "write" => true,
            _ => return None,
        };
        let operations = match operations.split_once('-') {
            None => operations.parse().ok()?..=operations.parse().ok()?,
            Some((first, "")) => first.parse().ok()?..=u64::MAX,
            Some((first, last)) => first.parse().ok()?..=last.parse().ok()?,
        };
        let fault = match fault {
            "eio" => Fault::Errno(libc::EIO),
            "enospc" => Fault::Errno(libc::ENOSPC),
            "short" => Fault::Short,
            "slow" => Fault::Slow,
            "torn" => Fault::Torn,
            "flip" => Fault::Flip,
            _ => return None,
        };
        (parts.next().is_none() && *operations.start() > 0 && !operations.is_empty()).then_some(Rule {
            write,
            operations,
            fault,
        })
    }
}

impl<D: Disk> Disk for Faults<D> {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match self.next(false) {
            (None, _) => self.disk.read(offset, into),
            (Some(Fault::Errno(errno)), _) => Err(io::Error::from_raw_os_error(errno)),
            (Some(Fault::Short), _) => {
                let half = half_of(into.len());
                self.disk.read(offset, &mut into[..half])?;
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            (Some(Fault::Slow), _) => {
                std::thread::sleep(SLOW);
                self.disk.read(offset, into)
            }
            (Some(Fault::Torn), _) => {
                self.disk.read(offset, into)?;
                let torn = half_of(into.len());
                into[torn..torn + BLOCK].fill(0);
                Ok(())
            }
            (Some(Fault::Flip), n) => {
                self.disk.read(offset, into)?;
                let bit = some_bit(n, into.len());
                into[bit / 8] ^= 1 << (bit % 8);
                Ok(())
            }
        }
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        match self.next(true) {
            (None, _) => self.disk.write(offset, from),
            (Some(Fault::Errno(errno)), _) => Err(io::Error::from_raw_os_error(errno)),
            (Some(Fault::Short), _) => {
                self.disk.write(offset, &from[..half_of(from.len())])?;
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            (Some(Fault::Slow), _) => {
                std::thread::sleep(SLOW);
                self.disk.write(offset, from)
            }
            (Some(Fault::Torn), _) => {
                let torn = half_of(from.len());
                let behind = torn + BLOCK;
                self.disk.write(offset, &from[..torn])?;
                self.disk.write(offset + behind as u64, &from[behind..])
            }
            (Some(Fault::Flip), n) => {
                let bit = some_bit(n, from.len());
                let block = bit / 8 / BLOCK * BLOCK;
                // On the stack: it may not allocate.
                let mut flipped = Block([0; BLOCK]);
                flipped.0.copy_from_slice(&from[block..][..BLOCK]);
                flipped.0[bit / 8 % BLOCK] ^= 1 << (bit % 8);
                self.disk.write(offset, from)?;
                self.disk.write(offset + block as u64, &flipped.0)
            }
        }
    }
}

#[repr(align(4096))]
struct Block([u8; BLOCK]);

/// Half of so many bytes, in whole blocks.
fn half_of(length: usize) -> usize {
    length / 2 / BLOCK * BLOCK
}

/// Which bit of so many bytes is flipped in the n-th operation: the numbers are spread by the golden ratio.
fn some_bit(n: u64, length: usize) -> usize {
    (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16) as usize % (length * 8)
}
