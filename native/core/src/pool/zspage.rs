//! Zspages: their descriptors, and the fullness lists of one size class.
//!
//! A zspage is 1 to 32 neighbouring arena pages that hold objects of one class. Its descriptor is that of its first
//! page, in a table with one entry per arena page; it is known by that page's number, never by a pointer. Which
//! objects are in use stands in a bitmap here, not in links inside free objects: damage to the arena's bytes can then
//! spoil pages, but never the allocator.

use super::class::Geometry;
use super::lock::ZspageLock;
use crate::memory::{Zeroable, ZeroedTable};
use crate::metrics::{ClassMetrics, SharedMetrics, FULLNESS_GROUPS};
use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::sync::{AtomicU16, AtomicU32, AtomicU64, AtomicU8};

const NIL: u32 = u32::MAX;

const GROUPS: usize = FULLNESS_GROUPS;
const FULL: usize = GROUPS - 1;

/// Descriptor of one arena page. All but `used` and `back` mean something for the first page of a zspage only.
///
/// Relaxed atomics: the fields change under the lock of the class, which also orders them. `used`, `class` and `back`
/// are also read without it, and change with Release order: who reads with Acquire order that an object is no more also
/// finds where it was moved. They stay as they are while the zspage has an object in use; who has none there may find a
/// zspage that is being freed, or another one in its place, and looks again under a lock ([`zspage_of`]).
///
/// Invariant: a descriptor outlives every reader. The table is unmapped with the pool, never before, so that a zspage
/// is freed without a grace period, and without locking its pages.
#[derive(Default)]
pub struct PageDesc {
    /// The objects in use; page n of the zspage has the bits of objects 64·n to 64·n+63.
    used: AtomicU64,
    /// Neighbours in the fullness list.
    next: AtomicU32,
    previous: AtomicU32,
    pub lock: ZspageLock,
    in_use: AtomicU16,
    class: AtomicU8,
    /// 1 + how many pages before this one the zspage begins; 0: the page is in no zspage, or in one that is being
    /// freed. Set last when a zspage is made, cleared first when it is freed.
    back: AtomicU8,
}

// SAFETY: atomics of integers, valid when zero, no drop.
unsafe impl Zeroable for PageDesc {}

/// The descriptors of all arena pages.
pub type Descriptors = ZeroedTable<PageDesc>;

/// First page and class of the zspage that a page belongs to; None for a page in no zspage. Takes no lock.
///
/// The answer holds for who owns an object of the zspage, or has pinned one. Anyone else has found a zspage that may be
/// freed at any time: they take the lock of the class and ask again. The same answer then means that it is on its
/// class's list, and will stay there; another one, or none, that it was freed: leave it. (The kernel's
/// `get_zspage_lockless`, and its check for being on a list.)
pub fn zspage_of(descriptors: &Descriptors, page: u32) -> Option<(u32, usize)> {
    let back = u32::from(descriptors.get(page as usize)?.back.load(Acquire));
    let first = page.checked_sub(back.checked_sub(1)?)?;
    Some((first, usize::from(descriptors[first as usize].class.load(Acquire))))
}

/// Whether an object of a zspage is in use. Exact for who owns the object, else a hint.
pub fn is_used(descriptors: &Descriptors, first: u32, object: usize) -> bool {
    descriptors[first as usize + object / 64].used.load(Acquire) >> (object % 64) & 1 == 1
}

/// The zspages of one class by fullness. Protected by the lock of the class.
///
/// Invariant: a zspage is on the list of its group exactly while it has an object in use, or is being filled.
pub struct ClassLists {
    class: usize,
    heads: [u32; GROUPS],
    metrics: SharedMetrics,
}

impl ClassLists {
    pub fn new(class: usize, metrics: SharedMetrics) -> ClassLists {
        ClassLists { class, heads: [NIL; GROUPS], metrics }
    }

    fn counters(&self) -> &ClassMetrics {
        &self.metrics.classes[self.class]
    }

    /// Makes fresh pages into a zspage with nothing in use, on the list of the empty.
    pub fn insert_zspage(&mut self, descriptors: &Descriptors, first: u32, geometry: &Geometry) {
        let desc = &descriptors[first as usize];
        desc.in_use.store(0, Relaxed);
        desc.class.store(self.class as u8, Release);
        self.link(descriptors, first, 0);
        for n in 0..geometry.pages {
            let page = &descriptors[first as usize + n];
            page.used.store(0, Release);
            page.back.store(n as u8 + 1, Release);
        }
    }

    /// Takes an object from the fullest zspage that has one and is not to be avoided, and returns zspage and object.
    pub fn take_object(
        &mut self,
        descriptors: &Descriptors,
        geometry: &Geometry,
        avoid: impl Fn(u32) -> bool,
    ) -> Option<(u32, usize)> {
        let from_fullest = self.heads[..FULL].iter().rev();
        let first = from_fullest.flat_map(|&head| list(descriptors, head)).find(|&first| !avoid(first))?;
        let object = (0..geometry.pages).find_map(|n| {
            let free = descriptors[first as usize + n].used.load(Relaxed).trailing_ones() as usize;
            Some(n * 64 + free).filter(|&object| free < 64 && object < geometry.objects)
        })?;
        let word = &descriptors[first as usize + object / 64].used;
        word.store(word.load(Relaxed) | 1 << (object % 64), Release);
        self.change_in_use(descriptors, first, geometry, 1);
        Some((first, object))
    }

    /// Takes a certain object of a zspage. False if it is in use already.
    pub fn adopt_object(&mut self, descriptors: &Descriptors, geometry: &Geometry, first: u32, object: usize) -> bool {
        if is_used(descriptors, first, object) {
            return false;
        }
        let word = &descriptors[first as usize + object / 64].used;
        word.store(word.load(Relaxed) | 1 << (object % 64), Release);
        self.change_in_use(descriptors, first, geometry, 1);
        true
    }

    /// The emptiest zspage that has an object in use, is not full, and not to be avoided.
    pub fn emptiest(&self, descriptors: &Descriptors, avoid: impl Fn(u32) -> bool) -> Option<u32> {
        self.heads[1..FULL].iter().flat_map(|&head| list(descriptors, head)).find(|&first| !avoid(first))
    }

    /// Takes an object back. Returns true if that was the last one: the zspage is then off every list, its pages are
    /// in no zspage any more, and the caller owns them.
    pub fn put_object(&mut self, descriptors: &Descriptors, geometry: &Geometry, first: u32, object: usize) -> bool {
        assert!(is_used(descriptors, first, object), "object {object} of zspage {first} freed twice");
        let word = &descriptors[first as usize + object / 64].used;
        word.store(word.load(Relaxed) & !(1 << (object % 64)), Release);
        let empty = self.change_in_use(descriptors, first, geometry, -1) == 0;
        if empty {
            self.unlink(descriptors, first, 0);
            for n in 0..geometry.pages {
                descriptors[first as usize + n].back.store(0, Release);
            }
        }
        empty
    }

    /// Changes the count of objects in use, and the list if the group changes with it. Returns the new count.
    fn change_in_use(&mut self, descriptors: &Descriptors, first: u32, geometry: &Geometry, by: i16) -> u16 {
        let desc = &descriptors[first as usize];
        let before = desc.in_use.load(Relaxed);
        let after = before.wrapping_add_signed(by);
        desc.in_use.store(after, Relaxed);
        let (old, new) = (group(before, geometry.objects), group(after, geometry.objects));
        if old != new {
            self.unlink(descriptors, first, old);
            self.link(descriptors, first, new);
        }
        after
    }

    fn link(&mut self, descriptors: &Descriptors, first: u32, group: usize) {
        let head = std::mem::replace(&mut self.heads[group], first);
        let desc = &descriptors[first as usize];
        desc.previous.store(NIL, Relaxed);
        desc.next.store(head, Relaxed);
        if head != NIL {
            descriptors[head as usize].previous.store(first, Relaxed);
        }
        self.counters().groups[group].add(1);
    }

    fn unlink(&mut self, descriptors: &Descriptors, first: u32, group: usize) {
        let desc = &descriptors[first as usize];
        let (next, previous) = (desc.next.load(Relaxed), desc.previous.load(Relaxed));
        match previous {
            NIL => self.heads[group] = next,
            _ => descriptors[previous as usize].next.store(next, Relaxed),
        }
        if next != NIL {
            descriptors[next as usize].previous.store(previous, Relaxed);
        }
        self.counters().groups[group].sub(1);
    }
}

/// The zspages of a list from `head` on.
fn list(descriptors: &Descriptors, head: u32) -> impl Iterator<Item = u32> + '_ {
    let to_option = |first: u32| Some(first).filter(|&first| first != NIL);
    std::iter::successors(to_option(head), move |&first| to_option(descriptors[first as usize].next.load(Relaxed)))
}

/// Those of a zspage's `objects` that are in use, in order of address.
pub fn objects_in_use(descriptors: &Descriptors, first: u32, objects: usize) -> impl Iterator<Item = usize> + '_ {
    (0..objects).filter(move |&object| is_used(descriptors, first, object))
}

fn group(in_use: u16, objects: usize) -> usize {
    match usize::from(in_use) {
        0 => 0,
        n if n == objects => FULL,
        n => n * 10 / objects + 1,
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;

    #[test]
    fn groups_rise_with_use() {
        for objects in 1..=512 {
            let groups: Vec<usize> = (0..=objects as u16).map(|n| group(n, objects)).collect();
            assert_eq!((groups[0], groups[objects]), (0, FULL));
            assert!(groups.windows(2).all(|pair| pair[0] <= pair[1]));
            assert!(groups[1..objects].iter().all(|&group| group > 0 && group < FULL));
        }
    }

    fn lists(class: usize) -> ClassLists {
        ClassLists::new(class, SharedMetrics::new(None).expect("metrics"))
    }

    #[test]
    fn the_fullest_zspage_is_filled_first() {
        let geometry = Geometry { size: 1024, pages: 1, objects: 4 };
        let descriptors = Descriptors::new(8).expect("table");
        let mut lists = lists(0);
        for first in 0..3 {
            lists.insert_zspage(&descriptors, first, &geometry);
        }
        let (fullest, _) = lists.take_object(&descriptors, &geometry, |_| false).expect("object");
        for _ in 1..4 {
            assert_eq!(lists.take_object(&descriptors, &geometry, |_| false).expect("object").0, fullest);
        }
        assert_ne!(lists.take_object(&descriptors, &geometry, |_| false).expect("object").0, fullest);
    }

    #[test]
    fn an_emptied_zspage_is_given_up() {
        let geometry = Geometry { size: 4096, pages: 2, objects: 2 };
        let descriptors = Descriptors::new(8).expect("table");
        let mut lists = lists(7);
        lists.insert_zspage(&descriptors, 4, &geometry);
        let (a, b) = (
            lists.take_object(&descriptors, &geometry, |_| false),
            lists.take_object(&descriptors, &geometry, |_| false),
        );
        assert_eq!((a, b), (Some((4, 0)), Some((4, 1))));
        assert_eq!(lists.take_object(&descriptors, &geometry, |_| false), None);
        assert_eq!(zspage_of(&descriptors, 5), Some((4, 7)));
        assert!(!lists.put_object(&descriptors, &geometry, 4, 0));
        assert!(lists.put_object(&descriptors, &geometry, 4, 1));
        assert_eq!(zspage_of(&descriptors, 5), None);
    }
}
