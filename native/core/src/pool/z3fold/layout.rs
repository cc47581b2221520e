//! Where up to three objects lie on a page.

use crate::object::HEADER_SIZE;
use crate::page::PAGE_SIZE;
use crate::pool::class::UNIT;
use crate::pool::driver::Object;
use crate::sync::MODEL;

/// Bytes of a chunk: a whole number of a location's units.
pub const CHUNK: usize = if MODEL { PAGE_SIZE / 2 } else { 64 };
const _: () = assert!(CHUNK % UNIT == 0);
/// Chunks of a page.
pub const CHUNKS: usize = PAGE_SIZE / CHUNK;
/// Chunks of the largest object.
pub const MAX_CHUNKS: usize = (PAGE_SIZE + HEADER_SIZE).div_ceil(CHUNK);

const FIRST: usize = 0;
const MIDDLE: usize = 1;
const LAST: usize = 2;

/// Where the objects of a page lie, in chunks; one word, so that it can be read without a lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// How long the first, the middle and the last one are; 0: there is none.
    chunks: [u8; 3],
    /// Where the middle one begins.
    middle: u8,
}

impl Layout {
    pub fn from_word(word: u32) -> Layout {
        let [first, second, last, middle] = word.to_le_bytes();
        Layout { chunks: [first, second, last], middle }
    }

    pub fn to_word(self) -> u32 {
        let [first, second, last] = self.chunks;
        u32::from_le_bytes([first, second, last, self.middle])
    }

    /// Whether there is such an object.
    pub fn has(self, object: usize) -> bool {
        self.chunks[object] > 0
    }

    fn start(self, object: usize) -> usize {
        match object {
            FIRST => 0,
            MIDDLE => usize::from(self.middle),
            _ => CHUNKS - usize::from(self.chunks[LAST]),
        }
    }

    /// The largest object that finds room: which one it would be, and its chunks.
    pub fn room(self) -> (usize, usize) {
        let [first, middle, last] = self.chunks.map(usize::from);
        let (below, above) = match middle {
            0 => (CHUNKS - last, CHUNKS.saturating_sub(first)),
            _ => (self.start(MIDDLE), CHUNKS - self.start(MIDDLE) - middle),
        };
        // The last of equals is chosen: the middle is filled last, so that what is free lies together.
        let rooms = [(MIDDLE, CHUNKS.saturating_sub(first + last)), (LAST, above), (FIRST, below)];
        let free = rooms.into_iter().filter(|&(object, _)| !self.has(object));
        free.max_by_key(|&(_, chunks)| chunks).unwrap_or((FIRST, 0))
    }

    /// With another object, as [`Layout::room`] has said.
    pub fn with(mut self, object: usize, chunks: usize) -> Layout {
        self.chunks[object] = chunks as u8;
        if object == MIDDLE {
            self.middle = self.chunks[FIRST];
        }
        self
    }

    /// With an object that begins at this byte of the page, and which one it is. None if it can be none.
    pub fn with_at(self, offset: usize, chunks: usize) -> Option<(usize, Layout)> {
        let start = offset / CHUNK;
        let index = match start {
            0 => FIRST,
            _ if start + chunks == CHUNKS => LAST,
            _ => MIDDLE,
        };
        let apart =
            |other| start + chunks <= self.start(other) || self.start(other) + usize::from(self.chunks[other]) <= start;
        let others_apart = [FIRST, MIDDLE, LAST].into_iter().filter(|&other| self.has(other)).all(apart);
        let fits = start + chunks <= CHUNKS || self.is_empty() && start == 0 && chunks <= MAX_CHUNKS;
        if offset % CHUNK != 0 || chunks == 0 || self.has(index) || !others_apart || !fits {
            return None;
        }
        let mut with = self.with(index, chunks);
        if index == MIDDLE {
            with.middle = start as u8;
        }
        Some((index, with))
    }

    /// With an object less.
    pub fn without(self, object: usize) -> Layout {
        self.with(object, 0)
    }

    pub fn is_empty(self) -> bool {
        self.chunks == [0; 3]
    }

    /// The list that a page of this layout is on: None if it is empty or takes no more.
    pub fn list(self) -> Option<usize> {
        Some(self.room().1).filter(|&room| room > 0 && !self.is_empty())
    }

    /// Whether at least half of the page is free in one piece. Of any three such pages, one can be dissolved.
    pub fn is_half_free(self) -> bool {
        self.list().is_some_and(|room| room >= CHUNKS / 2)
    }

    /// Whether objects take at most half of a page that takes more. To dissolve it may be worth trying.
    pub fn is_sparse(self) -> bool {
        let used: usize = self.chunks.map(usize::from).iter().sum();
        self.list().is_some() && used <= CHUNKS / 2
    }
}

/// Pages for an object of so many chunks: those that fit into one may share it.
pub fn pages_for(chunks: usize) -> usize {
    chunks.div_ceil(CHUNKS)
}

/// The objects of a page.
pub fn objects(page: u32, layout: Layout) -> impl Iterator<Item = Object> {
    (FIRST..=LAST).filter(move |&index| layout.has(index)).map(move |index| object_of(page, index, layout))
}

/// One of them, which there must be.
pub fn object_of(page: u32, index: usize, layout: Layout) -> Object {
    let offset = page as usize * PAGE_SIZE + layout.start(index) * CHUNK;
    Object { first: page, index, offset, size: usize::from(layout.chunks[index]) * CHUNK }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Objects come and go: what lives stays where it is and never overlaps, and there is as much room as is said.
        #[test]
        fn objects_share_a_page(steps in prop::collection::vec((any::<bool>(), 1..=MAX_CHUNKS, FIRST..=LAST), 1..40)) {
            let mut layout = Layout::default();
            for (add, chunks, object) in steps {
                let before: Vec<Object> = objects(0, layout).collect();
                let (free, room) = layout.room();
                if add && (chunks <= room || layout.is_empty()) {
                    layout = layout.with(free, chunks);
                } else if !add {
                    layout = layout.without(object);
                }
                let mut now: Vec<Object> = objects(0, layout).collect();
                prop_assert!(now.iter().filter(|object| !before.contains(object)).count() <= 1, "an object has moved");
                prop_assert_eq!(layout.is_empty(), now.is_empty());
                now.sort_by_key(|object| object.offset);
                let end = |object: &Object| object.offset + object.size;
                prop_assert!(now.windows(2).all(|pair| end(&pair[0]) <= pair[1].offset), "{:?}", layout);
                let (free, room) = layout.room();
                if now.len() == 3 {
                    prop_assert_eq!(room, 0);
                } else if room > 0 {
                    let larger = layout.with(free, room);
                    prop_assert_eq!(objects(0, larger).count(), now.len() + 1);
                    prop_assert!(objects(0, larger).all(|object| now.contains(&object) || object.index == free));
                }
            }
        }
    }

    #[test]
    fn what_is_free_lies_together() {
        let (first, middle, last) = (CHUNKS / 8, CHUNKS / 16, CHUNKS / 4);
        let page = Layout::default().with(FIRST, first);
        assert_eq!(page.room(), (LAST, CHUNKS - first));
        let page = page.with(LAST, last);
        assert_eq!(page.room(), (MIDDLE, CHUNKS - first - last));
        let page = page.with(MIDDLE, middle);
        assert_eq!(page.list(), None);
        assert_eq!(page.without(LAST).list(), Some(CHUNKS - first - middle));
        assert_eq!(page.without(FIRST).list(), Some(first));
        assert_eq!(page.without(FIRST).without(LAST).room(), (LAST, CHUNKS - first - middle));
        assert_eq!(Layout::default().with(FIRST, MAX_CHUNKS).list(), None);
    }
}
