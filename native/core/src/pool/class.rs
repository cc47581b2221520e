//! Size classes: which object sizes exist, and how many pages a zspage of each takes.
//!
//! In the kernel's zsmalloc a class takes the chain that wastes least of its pages (`calculate_zspage_chain_size`), and
//! classes of like zspages are merged (`can_merge`). Here the classes are chosen together, so that the pool takes the
//! fewest bytes for a typical set of pages ([`LENGTHS`], [`STEPS`]): more classes waste less in the padding of objects, a
//! longer chain less at the end of a zspage; but each class has a zspage that is only partly filled, and the longer its
//! chain, the more that is. So a small swap file has fewer classes. Chains may be longer than the kernel's, as the pages
//! of a zspage are neighbours: an object that crosses a page boundary costs nothing.

use crate::object::HEADER_SIZE;
use crate::page::PAGE_SIZE;
use crate::sync::MODEL;
use std::sync::OnceLock;

/// Step between sizes, and the unit of a location.
pub const UNIT: usize = 8;
/// Small enough for any real page; a zspage then has at most 64 objects per page, one bitmap word.
pub const MIN_SIZE: usize = if MODEL { 2048 } else { 64 };
/// A whole page and its header.
pub const MAX_SIZE: usize = (PAGE_SIZE + HEADER_SIZE).next_multiple_of(UNIT);
/// The longest chain of pages that make up a zspage: of whole pages, 31 fit into 32.
pub const MAX_CHAIN: usize = if MODEL { 2 } else { 32 };

/// How many of 1000 pages compress to less than 256 bytes, to less than 512, and so on; the last number are those that
/// do not compress. From two corpora of `zswapctl bench` (1 GiB each of memory of Python, Perl, Java, Node and g++,
/// sources and compiled code), each compressed by lz4 and by zstd at level 3.
pub const LENGTHS: [u64; 17] = [38, 74, 178, 178, 146, 149, 81, 52, 34, 25, 17, 8, 6, 3, 2, 4, 5];
/// How many pages the pool holds that the classes are chosen for: 96 to 768 MiB. The more there are, the more classes pay;
/// above, hardly anything changes.
const STEPS: [u64; 4] = [3 << 13, 3 << 14, 3 << 15, 3 << 16];

const SIZES: usize = (MAX_SIZE - MIN_SIZE) / UNIT + 1;

/// One size class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of one object; a multiple of [`UNIT`].
    pub size: usize,
    /// Pages of one zspage.
    pub pages: usize,
    /// Objects of one zspage.
    pub objects: usize,
}

impl Geometry {
    fn new(size: usize, pages: usize) -> Geometry {
        Geometry { size, pages, objects: pages * PAGE_SIZE / size }
    }

    /// Bytes of zspages for so many thousandths of an object: the last zspage is half full on average.
    fn bytes_for(&self, milli_objects: u64) -> u64 {
        let zspage = (self.pages * PAGE_SIZE) as u64;
        milli_objects * zspage / self.objects as u64 / 1000 + zspage / 2
    }
}

/// All size classes, from small to large, and the way from a length to its class.
pub struct ClassTable {
    classes: Vec<Geometry>,
    of_size: [u8; SIZES],
}

impl ClassTable {
    /// The table for a swap file of so many slots: three quarters of a small one's are expected to hold objects.
    pub fn for_slots(slots: u64) -> &'static ClassTable {
        let steps_above = STEPS[1..].partition_point(|&pages| pages <= slots / 4 * 3);
        Self::of_step(if MODEL { STEPS.len() - 1 } else { steps_above })
    }

    /// Always the same; made when it is first asked for.
    fn of_step(step: usize) -> &'static ClassTable {
        static TABLES: [OnceLock<ClassTable>; STEPS.len()] = [const { OnceLock::new() }; STEPS.len()];
        TABLES[step].get_or_init(|| ClassTable::new(STEPS[step]))
    }

    fn new(pages: u64) -> ClassTable {
        let classes = choose(pages);
        let of_size = std::array::from_fn(|nth| classes.partition_point(|class| class.size < size_of_nth(nth)) as u8);
        ClassTable { classes, of_size }
    }

    pub fn classes(&self) -> &[Geometry] {
        &self.classes
    }

    /// Index of the class for an object of `length` bytes, header included. Panics above [`MAX_SIZE`].
    pub fn index_for(&self, length: usize) -> usize {
        usize::from(self.of_size[length.max(MIN_SIZE).div_ceil(UNIT) - MIN_SIZE / UNIT])
    }
}

fn size_of_nth(nth: usize) -> usize {
    MIN_SIZE + nth * UNIT
}

/// The classes that take the fewest bytes: shortest paths over the sizes, where a class is a step that takes all sizes
/// up to its own.
fn choose(pages: u64) -> Vec<Geometry> {
    // Per number of sizes, from the smallest: the least bytes for objects of these, the largest's class and its sizes.
    let mut best: Vec<(u64, Option<(Geometry, usize)>)> = vec![(0, None)];
    for sizes in 1..=SIZES {
        let candidates = candidates(size_of_nth(sizes - 1));
        let (mut least, mut objects) = ((u64::MAX, None), 0);
        for below in (0..sizes).rev() {
            objects += milli_objects(below, pages);
            for class in &candidates {
                let bytes = best[below].0 + class.bytes_for(objects);
                if bytes < least.0 {
                    least = (bytes, Some((*class, sizes - below)));
                }
            }
        }
        best.push(least);
    }
    let (mut classes, mut sizes) = (Vec::new(), SIZES);
    while let Some((class, its_sizes)) = best[sizes].1 {
        classes.push(class);
        sizes -= its_sizes;
    }
    classes.reverse();
    classes
}

/// Chains for objects of a size, each with less waste than all that are shorter.
fn candidates(size: usize) -> Vec<Geometry> {
    let mut candidates: Vec<Geometry> = Vec::new();
    for class in (size.div_ceil(PAGE_SIZE)..=MAX_CHAIN).map(|pages| Geometry::new(size, pages)) {
        // Fewer pages per object, in whole numbers.
        if candidates.last().is_none_or(|last| class.pages * last.objects < last.pages * class.objects) {
            candidates.push(class);
        }
    }
    candidates
}

/// How many thousandths of an object are of the nth size in a pool of so many pages.
fn milli_objects(nth: usize, pages: u64) -> u64 {
    let payload = size_of_nth(nth) - HEADER_SIZE;
    let steps = if payload < PAGE_SIZE { 256 / UNIT } else { 1 };
    pages * LENGTHS[payload / 256] / steps as u64
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;

    fn tables() -> impl Iterator<Item = &'static ClassTable> {
        (0..STEPS.len()).map(ClassTable::of_step)
    }

    #[test]
    fn every_length_has_the_smallest_class_that_holds_it() {
        for (table, length) in tables().flat_map(|table| (1..=MAX_SIZE).map(move |length| (table, length))) {
            let index = table.index_for(length);
            assert!(table.classes()[index].size >= length);
            assert!(index == 0 || table.classes()[index - 1].size < length);
        }
    }

    #[test]
    fn zspages_fit_their_pages_and_their_bitmaps() {
        for table in tables() {
            assert!(table.classes().len() < 256);
            for class in table.classes() {
                assert!(class.objects >= 1 && class.size * class.objects <= class.pages * PAGE_SIZE);
                assert!(class.objects <= class.pages * 64);
                assert!(class.pages <= MAX_CHAIN && class.size % UNIT == 0);
            }
            assert!(table.classes().windows(2).all(|pair| pair[0].size < pair[1].size));
        }
    }

    /// Whatever the pages are like, in full zspages.
    #[test]
    fn no_length_takes_much_more_than_itself() {
        for (table, most) in tables().zip([1.15, 1.13, 1.10, 1.07]) {
            for length in 256..=PAGE_SIZE + HEADER_SIZE {
                let class = table.classes()[table.index_for(length)];
                let share = (class.pages * PAGE_SIZE) as f64 / (class.objects * length) as f64;
                assert!(share < most, "{share:.3} times {length} bytes, in {class:?}");
            }
        }
    }

    /// Header, padding, ends of zspages and zspages that are not full.
    #[test]
    fn typical_pages_take_three_percent_more_than_their_payload() {
        for (slots, most) in [(1 << 15, 1.05), (1 << 16, 1.045), (1 << 17, 1.035), (1 << 18, 1.03), (1 << 32, 1.03)] {
            let (table, pages) = (ClassTable::for_slots(slots), slots.min(1 << 18) * 3 / 4);
            let mut milli = vec![0; table.classes().len()];
            let mut payload = 0;
            for nth in 0..SIZES {
                milli[table.index_for(size_of_nth(nth))] += milli_objects(nth, pages);
                // The lengths of a size end at it: the middle one.
                payload += milli_objects(nth, pages) * (size_of_nth(nth) - HEADER_SIZE - UNIT / 2) as u64 / 1000;
            }
            let bytes: u64 = table.classes().iter().zip(milli).map(|(class, milli)| class.bytes_for(milli)).sum();
            let share = bytes as f64 / payload as f64;
            assert!(share < most, "{share:.4} times the payload of {pages} pages");
        }
    }
}
