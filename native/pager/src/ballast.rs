//! The ballast: memory that the machine is given when its reclaim is stuck.
//!
//! To write to the swap device the loop device's thread takes memory, with no claim to what the kernel keeps for
//! reclaim. Below the minimum watermark it waits, for what only its own writes would free, and all who reclaim wait for
//! it. When memory is short and no page has moved for a while, some of the ballast goes back to the system; it is taken
//! anew when there is enough. A thread of its own does that: the refill thread may wait for memory just then.

use crate::watermark::Watermark;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;
use std::time::Duration;
use zswapd_core::error::Result;
use zswapd_core::memory::{memory_file, punch, Backing, Mapping};
use zswapd_core::metrics::Metrics;

/// Given at a time, and how often, before it was taken anew.
const PART: usize = 1 << 20;
const PARTS: usize = 4;
/// Reclaim is stuck when no page moves for so long.
const STUCK: Duration = Duration::from_millis(500);

/// Pressure stall information. The trigger: some process has waited for memory for half a second of two. (Less than
/// two seconds takes CAP_SYS_RESOURCE.)
const PRESSURE: &str = "/proc/pressure/memory";
const TRIGGER: &[u8] = b"some 500000 2000000\0";

pub struct Ballast {
    file: OwnedFd,
    mapping: Mapping,
    /// The first so many parts are taken.
    taken: usize,
    /// Some of it was given since all was taken.
    given: bool,
}

impl Ballast {
    /// None of it yet: a standby needs none.
    pub fn new() -> Result<Ballast> {
        let file = memory_file(c"zswapd-ballast", (PARTS * PART) as u64)?;
        let mapping = Mapping::new(PARTS * PART, Backing::File(file.as_fd()))?;
        Ok(Ballast { file, mapping, taken: 0, given: false })
    }

    /// Takes what it can, and gives when it is needed, for ever.
    pub fn run(&mut self, metrics: &Metrics, watermark: &Watermark) {
        let pressure = trigger();
        if let Err(error) = &pressure {
            eprintln!("zswapd-pager: {PRESSURE}: {error}; looks at the machine's memory every half second");
        }
        let moved = || metrics.stores.get() + metrics.loads.get();
        loop {
            if let (PARTS, Ok(pressure)) = (self.taken, &pressure) {
                wait(pressure);
            }
            let before = moved();
            thread::sleep(STUCK);
            if let Err(error) = self.step(moved() > before, |bytes| watermark.leaves(bytes)) {
                eprintln!("zswapd-pager: {error}; trying again");
            }
            metrics.ballast_bytes.set((self.taken * PART) as u64);
        }
    }

    /// Gives a part if no page moves and memory is short, or takes one if there is enough: `leaves` says whether, so many
    /// bytes taken.
    fn step(&mut self, moves: bool, leaves: impl Fn(u64) -> bool) -> Result<()> {
        if !moves && !leaves(0) && self.taken > 0 {
            punch(self.file.as_fd(), (self.taken - 1) * PART..self.taken * PART)?;
            self.taken -= 1;
            self.given = true;
        } else if self.taken < PARTS && leaves(PART as u64) {
            self.take()?;
            if self.taken == PARTS && std::mem::take(&mut self.given) {
                // Not before: to write it to the log takes memory.
                eprintln!("zswapd-pager: the machine was out of memory, and stuck, until it was given the ballast");
            }
        }
        Ok(())
    }

    fn take(&mut self) -> Result<()> {
        self.mapping.populate(self.taken * PART..(self.taken + 1) * PART)?;
        self.taken += 1;
        Ok(())
    }
}

fn trigger() -> io::Result<File> {
    let mut pressure = OpenOptions::new().read(true).write(true).open(PRESSURE)?;
    pressure.write_all(TRIGGER)?;
    Ok(pressure)
}

/// Until processes have waited for memory. Should the kernel stop telling, this returns at once.
fn wait(pressure: &File) {
    let mut poll = libc::pollfd { fd: pressure.as_raw_fd(), events: libc::POLLPRI, revents: 0 };
    // SAFETY: one pollfd, valid for the call.
    unsafe { libc::poll(&mut poll, 1, -1) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use zswapd_core::memory::status_of;

    #[test]
    fn it_is_given_while_the_machine_is_stuck_and_taken_when_there_is_enough() {
        let mut ballast = Ballast::new().expect("memory");
        for _ in 0..PARTS {
            ballast.step(true, |_| true).expect("taken");
        }
        let mut parts = |moves, free: u64| {
            ballast.step(moves, |bytes| free > bytes).expect("given or taken");
            status_of(ballast.file.as_fd()).expect("open").st_blocks as usize * 512 / PART
        };
        assert_eq!(parts(true, 0), 4);
        assert_eq!(parts(false, 1), 4);
        assert_eq!(parts(false, 0), 3);
        assert_eq!(parts(false, 0), 2);
        assert_eq!(parts(true, 1), 2);
        assert_eq!(parts(true, 2 << 20), 3);
        assert_eq!(parts(false, 2 << 20), 4);
        for _ in 0..=PARTS {
            parts(false, 0);
        }
        assert_eq!(parts(false, 0), 0);
    }
}
