//! z3fold: up to three objects a page, after the kernel's allocator of that name.
//!
//! In chunks of 64 bytes, the first object lies at the start of its page, the last one at the end, the middle one
//! between them. A page with room for another object is on a list, one for each length of the largest that it takes.
//! What is larger than a page has two for itself. All this stands in descriptors, not in the pages: damage to the
//! arena's bytes can then spoil pages, but never the allocator.
//!
//! References are counted: each object is a reference to its page, being on a list is one, and who moves the page's
//! objects has one. The rules are those of Dan Streetman's review of the kernel's counting (linux-mm, January 2017):
//!
//! - A page is taken off its list before the last reference is given up. To give pages back is then all that is left
//!   to do, and it looks at no list.
//! - A reference is only taken under the lock of the lists, to a page that is on one or holds an object: another
//!   reference keeps the page meanwhile.
//! - Who has given up a reference leaves the page alone.
//! - No mark tells that a page's objects are being moved. It may be freed from and change lists as ever; only new
//!   objects keep out, as they cannot have its lock.

mod layout;

use super::driver::{Base, Commit, Driver, Object};
use super::guard;
use super::lock::ZspageLock;
use super::{Location, REGION_PAGES};
use crate::error::{Error, Result};
use crate::locks::{hold, Rank, Ranked};
use crate::memory::{Zeroable, ZeroedTable};
use crate::metrics::ClassMetrics;
use crate::object::{self, HEADER_SIZE};
use crate::page::PAGE_SIZE;
use crate::state::Table;
use crate::sync::Ordering::{AcqRel, Acquire, Relaxed, Release};
use crate::sync::{AtomicU16, AtomicU32, AtomicU8};
pub use layout::CHUNK;
use layout::{object_of, objects, pages_for, Layout, CHUNKS, MAX_CHUNKS};
use std::ops::Range;
use std::sync::Arc;

const NIL: u32 = u32::MAX;

/// Descriptor of an arena page. Of the two that a large object takes, the second one's stays zero.
///
/// Relaxed atomics: `layout` and the links change under the lock of the lists, which also orders them. `layout` is also
/// read without it, and changes with Release order: who reads with Acquire order that an object is no more also finds
/// where it was moved. What it says of an object stays as it is while the object lives.
#[derive(Default)]
struct PageDesc {
    /// A [`Layout`].
    layout: AtomicU32,
    next: AtomicU32,
    previous: AtomicU32,
    lock: ZspageLock,
    references: AtomicU16,
    /// How many pages it stands for; set when they are taken from the arena.
    pages: AtomicU8,
}

// SAFETY: atomics of integers, valid when zero, no drop.
unsafe impl Zeroable for PageDesc {}

type Descriptors = ZeroedTable<PageDesc>;

impl PageDesc {
    fn layout(&self) -> Layout {
        Layout::from_word(self.layout.load(Acquire))
    }

    /// Takes a reference, under the lock of the lists.
    fn get(&self) {
        self.references.fetch_add(1, Relaxed);
    }
}

/// The pages that take more objects, by the largest that they take (the kernel's `unbuddied`).
struct Lists {
    heads: [u32; MAX_CHUNKS + 1],
    half_free: u64,
}

impl Lists {
    /// The page with the least room that will do, and that `fits`.
    fn find(&self, descriptors: &Descriptors, chunks: usize, fits: impl Fn(u32) -> bool) -> Option<u32> {
        let to_option = |page: u32| Some(page).filter(|&page| page != NIL);
        let next = |&page: &u32| to_option(descriptors[page as usize].next.load(Relaxed));
        let pages = |&head: &u32| std::iter::successors(to_option(head), next);
        self.heads[chunks..].iter().flat_map(pages).find(|&page| fits(page))
    }

    /// Changes where the objects of a page lie, and the list that it is on. The caller has a reference to it.
    fn change(&mut self, descriptors: &Descriptors, page: u32, new: Layout) {
        let desc = &descriptors[page as usize];
        let old = desc.layout();
        desc.layout.store(new.to_word(), Release);
        if let Some(list) = old.list() {
            self.unlink(descriptors, page, list);
        }
        if let Some(list) = new.list() {
            self.link(descriptors, page, list);
        }
        self.half_free += u64::from(new.is_half_free());
        self.half_free -= u64::from(old.is_half_free());
    }

    /// Puts a page on a list, which is a reference.
    fn link(&mut self, descriptors: &Descriptors, page: u32, list: usize) {
        let desc = &descriptors[page as usize];
        desc.get();
        let head = std::mem::replace(&mut self.heads[list], page);
        desc.previous.store(NIL, Relaxed);
        desc.next.store(head, Relaxed);
        if head != NIL {
            descriptors[head as usize].previous.store(page, Relaxed);
        }
    }

    fn unlink(&mut self, descriptors: &Descriptors, page: u32, list: usize) {
        let desc = &descriptors[page as usize];
        let (next, previous) = (desc.next.load(Relaxed), desc.previous.load(Relaxed));
        match previous {
            NIL => self.heads[list] = next,
            _ => descriptors[previous as usize].next.store(next, Relaxed),
        }
        if next != NIL {
            descriptors[next as usize].previous.store(previous, Relaxed);
        }
        let before = desc.references.fetch_sub(1, Relaxed);
        debug_assert!(before > 1, "page {page} was on a list without another reference");
    }
}

pub struct Z3fold {
    base: Arc<Base>,
    lists: Ranked<Lists>,
    descriptors: Descriptors,
}

impl Z3fold {
    /// Errors: [`Error::System`] if its table cannot be mapped.
    pub fn new(base: Arc<Base>) -> Result<Z3fold> {
        // Counted as two size classes: objects that may share a page, and those that take two.
        for (class, (chunks, objects)) in base.metrics.classes.iter().zip([(CHUNKS, 3), (MAX_CHUNKS, 1)]) {
            class.size_bytes.set((chunks * CHUNK) as u64);
            class.pages_per_zspage.set(pages_for(chunks) as u64);
            class.objects_per_zspage.set(objects);
        }
        Ok(Z3fold {
            lists: Ranked::new(Rank::Class, Lists { heads: [NIL; MAX_CHUNKS + 1], half_free: 0 }),
            descriptors: base.state.table(Table::Descriptors)?,
            base,
        })
    }

    /// As [`Driver::take`], on a page that is not to be avoided, or on pages that `more` gives.
    fn take_from(&self, length: usize, avoid: &Range<u32>, more: impl Fn(usize) -> Result<u32>) -> Result<Object> {
        let chunks = length.max(1).div_ceil(CHUNK);
        let mut lists = self.lists.lock();
        // A mover may have a page's lock, and wait for the one that we hold: it is not waited for.
        let fits = |page: u32| !avoid.contains(&page) && self.lock(page).try_read();
        let page = match lists.find(&self.descriptors, chunks, fits) {
            Some(page) => page,
            None => self.begin(chunks, more)?,
        };
        let desc = &self.descriptors[page as usize];
        let (index, _) = desc.layout().room();
        desc.get();
        lists.change(&self.descriptors, page, desc.layout().with(index, chunks));
        self.metrics(page).objects.add(1);
        Ok(object_of(page, index, desc.layout()))
    }

    /// Takes pages for an object, pinned.
    fn begin(&self, chunks: usize, more: impl Fn(usize) -> Result<u32>) -> Result<u32> {
        let pages = pages_for(chunks);
        let page = more(pages)?;
        let desc = &self.descriptors[page as usize];
        desc.pages.store(pages as u8, Relaxed);
        // Only readers that have come too late may have it: a mover had a reference.
        desc.lock.read_unmoved();
        self.metrics(page).zspages.add(1);
        Ok(page)
    }

    /// Gives up a reference, and leaves the page alone. Returns true if that was the last one: the page is back in the
    /// arena then.
    fn put(&self, page: u32) -> bool {
        let desc = &self.descriptors[page as usize];
        if desc.references.fetch_sub(1, AcqRel) != 1 {
            return false;
        }
        debug_assert!(desc.layout().is_empty(), "page {page} is given back with objects on it");
        self.metrics(page).zspages.sub(1);
        self.base.arena.free(page, usize::from(desc.pages.load(Relaxed)));
        true
    }

    /// Moves the objects of a page to others that are not to be avoided: as many as find room there, and as nobody is
    /// about to publish or free. Returns true if the page was given back.
    fn dissolve(
        &self,
        page: u32,
        avoid: &Range<u32>,
        more: impl Fn(usize) -> Result<u32>,
        commit: &Commit<'_>,
    ) -> bool {
        if self.base.movers.is_closed() {
            return false;
        }
        let lists = self.lists.lock();
        let desc = &self.descriptors[page as usize];
        let layout = desc.layout();
        if layout.is_empty() || !desc.lock.try_move() {
            return false;
        }
        desc.get();
        drop(lists);
        // Against the order of the locks it was only tried. From here on it is held, as if it had come first.
        let held = hold(Rank::Zspage);
        for from in objects(page, layout) {
            let Ok(to) = self.take_from(from.size, avoid, &more) else { break };
            // SAFETY: the source is locked by us. If it has been freed meanwhile, nothing else has taken its place, as
            // that would need the lock. The copy was free until now, and is pinned: nobody moves it on half written.
            let copy = unsafe { self.base.copy(&from, &to) };
            let moved = commit(copy, from.location(), to.location());
            self.lock(to.first).unlock_read();
            self.free(if moved { &from } else { &to });
        }
        drop(held);
        desc.lock.unlock_move();
        self.put(page)
    }

    fn metrics(&self, page: u32) -> &ClassMetrics {
        &self.base.metrics.classes[usize::from(self.descriptors[page as usize].pages.load(Relaxed)) - 1]
    }

    fn layout(&self, page: u32) -> Layout {
        self.descriptors[page as usize].layout()
    }
}

impl Driver for Z3fold {
    fn take(&self, length: usize) -> Result<Object> {
        self.take_from(length, &(0..0), |pages| self.base.arena.alloc(pages))
    }

    fn size_for(&self, length: usize) -> usize {
        length.max(1).div_ceil(CHUNK) * CHUNK
    }

    fn find(&self, location: Location) -> Option<Object> {
        let offset = location.offset()?;
        let page = u32::try_from(offset / PAGE_SIZE).ok()?;
        let layout = self.descriptors.get(page as usize)?.layout();
        objects(page, layout).find(|object| object.offset == offset)
    }

    fn lock(&self, first: u32) -> &ZspageLock {
        &self.descriptors[first as usize].lock
    }

    fn free(&self, object: &Object) {
        let page = object.first;
        self.metrics(page).objects.sub(1);
        let mut lists = self.lists.lock();
        let layout = self.layout(page);
        assert!(layout.has(object.index), "object {} of page {page} freed twice", object.index);
        lists.change(&self.descriptors, page, layout.without(object.index));
        drop(lists);
        self.put(page);
    }

    /// The page map says nothing of these: where an object ends is in its header, which is believed if the object's
    /// checksum is right. Two that are never overlap, as each begins where the other's bytes would go on.
    fn adopt(&self, location: Location, slot: u32) -> Option<Object> {
        let offset = location.offset()?;
        let page = u32::try_from(offset / PAGE_SIZE).ok().filter(|&page| self.base.arena.is_backed(page))?;
        // Only what begins a page may go on to the next one, of the same region.
        let crosses = offset % PAGE_SIZE == 0 && self.base.arena.is_backed(page + 1) && (page + 1) % REGION_PAGES != 0;
        let room = PAGE_SIZE - offset % PAGE_SIZE + if crosses { PAGE_SIZE } else { 0 };
        // SAFETY: inside the arena, and nobody else is at work.
        let bytes = unsafe { &*self.base.state.bytes(offset, room.min(MAX_CHUNKS * CHUNK)) };
        let (_, payload) = object::verify(bytes, slot)?;
        let chunks = (HEADER_SIZE + payload.len() + guard::BYTES).div_ceil(CHUNK);
        let desc = &self.descriptors[page as usize];
        let (index, layout) = desc.layout().with_at(offset % PAGE_SIZE, chunks)?;
        let mut lists = self.lists.lock();
        if desc.layout().is_empty() {
            if !self.base.arena.claim(page, pages_for(chunks)) {
                return None;
            }
            desc.pages.store(pages_for(chunks) as u8, Relaxed);
            self.metrics(page).zspages.add(1);
        }
        desc.get();
        lists.change(&self.descriptors, page, layout);
        self.metrics(page).objects.add(1);
        Some(object_of(page, index, layout))
    }

    fn visit(&self, first: u32, see: &mut dyn FnMut(&Object)) {
        objects(first, self.layout(first)).for_each(|object| see(&object));
    }

    fn pages_to_spare(&self) -> u64 {
        self.lists.lock().half_free / 2
    }

    fn compact(&self, commit: &Commit<'_>) -> u64 {
        let no_more = |_| Err(Error::NoRegion);
        let sparse = (0..self.base.arena.touched_pages()).rev().filter(|&page| self.layout(page).is_sparse());
        sparse.filter(|&page| self.dissolve(page, &(0..0), no_more, commit)).count() as u64
    }

    fn evacuate(&self, region: Range<u32>, commit: &Commit<'_>) {
        for page in region.clone() {
            self.dissolve(page, &region, |pages| self.base.arena.alloc_beside(pages), commit);
        }
    }

    fn prepare(&self, pages: Range<u32>) -> Result<()> {
        self.descriptors.populate(pages.start as usize..pages.end as usize)
    }

    fn metadata_bytes(&self, peak_pages: u64) -> u64 {
        peak_pages * size_of::<PageDesc>() as u64 + size_of::<Ranked<Lists>>() as u64
    }
}
