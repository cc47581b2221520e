//! How much memory the machine has left, against what the kernel keeps of it.

use std::io;
use zswapd_core::page::PAGE_SIZE;

/// What has to be free for the kernel to work undisturbed.
#[derive(Clone, Copy)]
pub struct Watermark {
    bytes: u64,
}

impl Watermark {
    /// Of this machine, as it is set now. Errors: /proc cannot be read, or looks like nothing that we know.
    pub fn read() -> io::Result<Watermark> {
        let zoneinfo = std::fs::read_to_string("/proc/zoneinfo")?;
        let pages = low_pages(&zoneinfo).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Watermark { bytes: pages * PAGE_SIZE as u64 })
    }

    /// Whether it would still be free if `bytes` were taken. One system call, which takes no memory.
    pub fn leaves(&self, bytes: u64) -> bool {
        // SAFETY: all-zero is a valid sysinfo.
        let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
        // SAFETY: writes to `info`, which is large enough. With a valid pointer it cannot fail.
        unsafe { libc::sysinfo(&mut info) };
        info.freeram * u64::from(info.mem_unit) >= self.bytes + bytes
    }
}

/// Pages below which the kernel begins to reclaim, of all zones: of each its low watermark, and what it keeps from those
/// who could be served by a higher zone (lowmem_reserve), which they leave free.
fn low_pages(zoneinfo: &str) -> Option<u64> {
    let mut sum = 0;
    let (mut low, mut managed) = (0, 0);
    for line in zoneinfo.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("low") => low = words.next()?.parse().ok()?,
            Some("managed") => managed = words.next()?.parse().ok()?,
            // One of each zone, behind the others.
            Some("protection:") => {
                let digits = |c: char| !c.is_ascii_digit();
                let protected = line.split(digits).filter_map(|number| number.parse::<u64>().ok()).max()?;
                sum += managed.min(low + protected);
            }
            _ => {}
        }
    }
    (sum > 0).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of 512 MiB: its DMA zone keeps 440 pages from all who could be served by DMA32.
    const ZONEINFO: &str = "\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 87772
  pages free     462
        boost    0
        min      22
        low      27
        high     32
        spanned  4095
        present  3998
        managed  3840
        cma      0
        protection: (0, 440, 440, 440, 440)
      nr_free_pages 462
Node 0, zone    DMA32
  pages free     582
        boost    0
        min      659
        low      823
        high     987
        spanned  126944
        present  126944
        managed  115091
        cma      0
        protection: (0, 0, 0, 0, 0)
Node 0, zone   Normal
  pages free     0
        boost    0
        min      0
        low      0
        high     0
        spanned  0
        present  0
        managed  0
        cma      0
        protection: (0, 0, 0, 0, 0)
";

    #[test]
    fn what_a_zone_keeps_from_others_counts() {
        assert_eq!(low_pages(ZONEINFO), Some(440 + 27 + 823));
        assert_eq!(low_pages(""), None);
    }

    #[test]
    fn a_zone_keeps_no_more_than_it_has() {
        let large = ZONEINFO.replace("(0, 440, 440", "(0, 99999, 99999");
        assert_eq!(low_pages(&large), Some(3840 + 823));
    }

    #[test]
    fn this_machine_has_one() {
        let watermark = Watermark::read().expect("/proc");
        assert!(watermark.bytes > 0);
        assert!(!watermark.leaves(1 << 50));
    }
}
