//! Which pages of a region are in use, and where so many neighbours are free.

use super::REGION_PAGES;
use crate::pool::class::MAX_CHAIN;

const WORDS: usize = REGION_PAGES.div_ceil(64) as usize;
/// The bits of a word that stand for pages.
const PAGE_BITS: u64 = if REGION_PAGES < 64 { (1 << REGION_PAGES) - 1 } else { u64::MAX };
/// Bit n is set while page n is in use.
pub type Bitmap = [u64; WORDS];

/// Per length from 1 on, where runs of so many free pages begin: the bits that are set. Ends before there are none.
fn free_runs(used: &Bitmap) -> impl Iterator<Item = Bitmap> {
    let some = |runs: Bitmap| Some(runs).filter(|runs| runs.iter().any(|&word| word != 0));
    std::iter::successors(some(used.map(|word| !word & PAGE_BITS)), move |shorter| {
        some(std::array::from_fn(|i| {
            let above = shorter.get(i + 1).map_or(0, |word| word << 63);
            shorter[i] & (shorter[i] >> 1 | above)
        }))
    })
}

/// Where the first run of so many free pages begins.
pub fn first_free_run(used: &Bitmap, length: usize) -> Option<usize> {
    let runs = free_runs(used).nth(length - 1)?;
    let word = runs.iter().position(|&word| word != 0)?;
    Some(word * 64 + runs[word].trailing_zeros() as usize)
}

/// How long the longest run of free pages is, [`MAX_CHAIN`] at most.
pub fn longest_free_run(used: &Bitmap) -> u8 {
    free_runs(used).take(MAX_CHAIN).count() as u8
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_first_free_run_is_found(used in prop::array::UniformArrayStrategy::<_, Bitmap>::new(any::<u64>()), length in 1..=MAX_CHAIN) {
            let is_free = |page: usize| used[page / 64] >> (page % 64) & 1 == 0;
            let slow = (0..=REGION_PAGES as usize - length).find(|&at| (at..at + length).all(is_free));
            prop_assert_eq!(first_free_run(&used, length), slow);
            prop_assert_eq!(usize::from(longest_free_run(&used)) >= length, slow.is_some());
        }
    }
}
