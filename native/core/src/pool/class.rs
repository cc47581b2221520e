//! Size classes: which object sizes exist, and how many pages a zspage of each takes.
//!
//! As in the kernel's zsmalloc (`calculate_zspage_chain_size`, `can_merge`), with two differences. Objects carry a
//! 12-byte header also when they hold a whole page, so that the largest class is larger than a page; and the pages of
//! a zspage are neighbours, so that an object that crosses a page boundary costs nothing.

use crate::object::HEADER_SIZE;
use crate::page::PAGE_SIZE;
use crate::sync::MODEL;

/// Step between size classes, and the unit of a location.
pub const UNIT: usize = 16;
/// Small enough for any real page; a zspage then has at most 64 objects per page, one bitmap word.
pub const MIN_SIZE: usize = if MODEL { 2048 } else { 64 };
pub const MAX_SIZE: usize = (PAGE_SIZE + HEADER_SIZE).next_multiple_of(UNIT);
/// The longest chain of pages that make up a zspage.
pub const MAX_CHAIN: usize = if MODEL { 2 } else { 8 };

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

/// All size classes, from small to large, and the way from a length to its class.
pub struct ClassTable {
    classes: Vec<Geometry>,
    of_size: [u8; SIZES],
}

impl ClassTable {
    pub fn new() -> ClassTable {
        let mut classes: Vec<Geometry> = Vec::new();
        let mut of_size = [0; SIZES];
        // From large to small: a size whose zspage holds no more objects than the next larger one's joins that class.
        for index in (0..SIZES).rev() {
            let next = geometry(MIN_SIZE + index * UNIT);
            match classes.last() {
                Some(last) if (last.pages, last.objects) == (next.pages, next.objects) => {}
                _ => classes.push(next),
            }
            of_size[index] = (classes.len() - 1) as u8;
        }
        classes.reverse();
        for class in &mut of_size {
            *class = (classes.len() - 1) as u8 - *class;
        }
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

/// The chain that wastes the smallest share of its pages; the shortest among equals.
fn geometry(size: usize) -> Geometry {
    // A whole page and its header need at least two pages; every size fits into MAX_CHAIN pages.
    let chains = (1..=MAX_CHAIN).filter(|pages| pages * PAGE_SIZE >= size);
    let waste = |pages: usize| pages * PAGE_SIZE % size;
    // waste(a) / a < waste(b) / b, in whole numbers.
    let pages = chains.min_by(|&a, &b| (waste(a) * b).cmp(&(waste(b) * a))).unwrap_or(MAX_CHAIN);
    Geometry { size, pages, objects: pages * PAGE_SIZE / size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_has_the_smallest_class_that_holds_it() {
        let table = ClassTable::new();
        for length in 1..=MAX_SIZE {
            let index = table.index_for(length);
            assert!(table.classes()[index].size >= length);
            // A smaller class that also held it could only exist if merging had lost a size.
            assert!(index == 0 || table.classes()[index - 1].size < length);
        }
    }

    #[test]
    fn zspages_fit_their_pages_and_their_bitmaps() {
        let table = ClassTable::new();
        assert!(table.classes().len() < 256);
        for class in table.classes() {
            assert!(class.objects >= 1 && class.size * class.objects <= class.pages * PAGE_SIZE);
            assert!(class.objects <= class.pages * 64);
            assert!(class.pages <= MAX_CHAIN && class.size % UNIT == 0);
        }
        assert!(table.classes().windows(2).all(|pair| pair[0].size < pair[1].size));
    }

    #[test]
    fn no_chain_wastes_less() {
        for class in ClassTable::new().classes() {
            let share = |pages: usize| (pages * PAGE_SIZE % class.size) as f64 / (pages * PAGE_SIZE) as f64;
            for pages in (1..=MAX_CHAIN).filter(|pages| pages * PAGE_SIZE >= class.size) {
                assert!(share(class.pages) <= share(pages), "{class:?} against a chain of {pages}");
            }
        }
    }

    #[test]
    fn equal_geometries_are_merged() {
        let table = ClassTable::new();
        assert!(table
            .classes()
            .windows(2)
            .all(|pair| (pair[0].pages, pair[0].objects) != (pair[1].pages, pair[1].objects)));
        assert!(table.classes().len() < SIZES);
    }
}
