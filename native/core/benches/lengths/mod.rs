//! Lengths as real pages have them.

use zswapd_core::page::PAGE_SIZE;
use zswapd_core::pool::LENGTHS;

/// Random numbers (Marsaglia's xorshift), the same each time.
pub struct Random(u64);

impl Random {
    pub fn new() -> Random {
        Random(1)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }

    /// A length in the shares of [`LENGTHS`].
    pub fn length(&mut self) -> usize {
        let mut nth = self.below(LENGTHS.iter().sum());
        let bucket = LENGTHS.iter().position(|&share| {
            let here = nth < share;
            nth = nth.saturating_sub(share);
            here
        });
        let start = bucket.unwrap_or(0) * 256;
        (start + self.below(256) as usize).clamp(32, PAGE_SIZE)
    }
}
