//! zsmalloc: objects in size classes, each with its zspages, after the kernel's. Allocation takes the lock of the class,
//! and that of the arena when the class has to grow.

use super::class::{ClassTable, Geometry};
use super::driver::{Base, Commit, Driver, Object};
use super::guard;
use super::lock::ZspageLock;
use super::page_map;
use super::zspage::{is_used, objects_in_use, zspage_of, ClassLists, Descriptors, PageDesc};
use super::Location;
use crate::error::{Error, Result};
use crate::locks::{Rank, Ranked};
use crate::object::{self, HEADER_SIZE};
use crate::page::PAGE_SIZE;
use crate::state::Table;
use std::ops::Range;
use std::sync::Arc;

pub struct Zsmalloc {
    pub(super) base: Arc<Base>,
    pub(super) table: &'static ClassTable,
    pub(super) classes: Box<[Ranked<ClassLists>]>,
    pub(super) descriptors: Descriptors,
}

impl Zsmalloc {
    /// Errors: [`Error::System`] if its table cannot be mapped.
    pub fn new(base: Arc<Base>) -> Result<Zsmalloc> {
        let table = ClassTable::for_slots(base.state.slots());
        for (class, counters) in table.classes().iter().zip(&base.metrics.classes) {
            counters.size_bytes.set(class.size as u64);
            counters.pages_per_zspage.set(class.pages as u64);
            counters.objects_per_zspage.set(class.objects as u64);
        }
        Ok(Zsmalloc {
            classes: (0..table.classes().len())
                .map(|class| Ranked::new(Rank::Class, ClassLists::new(class, base.metrics.clone())))
                .collect(),
            descriptors: base.state.table(Table::Descriptors)?,
            table,
            base,
        })
    }

    /// Makes a zspage of pages from the arena, and takes an object of it. It has one, or it would not be a class.
    pub(super) fn grow(&self, lists: &mut ClassLists, class: usize, first: u32) -> Option<(u32, usize)> {
        let geometry = &self.table.classes()[class];
        page_map::note(&self.base.state, first, class, geometry.pages);
        self.insert_zspage(lists, class, first);
        lists.take_object(&self.descriptors, geometry, |zspage| zspage != first)
    }

    fn insert_zspage(&self, lists: &mut ClassLists, class: usize, first: u32) {
        lists.insert_zspage(&self.descriptors, first, &self.table.classes()[class]);
        self.base.metrics.classes[class].zspages.add(1);
    }

    /// Takes an object out of its zspage. Returns true if the zspage is no more: its pages are then the caller's.
    pub(super) fn put(&self, lists: &mut ClassLists, class: usize, first: u32, object: usize) -> bool {
        let empty = lists.put_object(&self.descriptors, &self.table.classes()[class], first, object);
        self.base.metrics.classes[class].zspages.sub(u64::from(empty));
        empty
    }
}

impl Driver for Zsmalloc {
    fn take(&self, length: usize) -> Result<Object> {
        let class = self.table.index_for(length);
        let geometry = &self.table.classes()[class];
        let mut lists = self.classes[class].lock();
        let (first, object) = match lists.take_object(&self.descriptors, geometry, |_| false) {
            Some(taken) => taken,
            None => {
                let first = self.base.arena.alloc(geometry.pages)?;
                self.grow(&mut lists, class, first).ok_or(Error::PoolFull)?
            }
        };
        self.base.metrics.classes[class].objects.add(1);
        // Pinned before anyone can see the object. There is no mover to wait for: it would hold the lock of the class.
        self.descriptors[first as usize].lock.read_unmoved();
        Ok(object_of(first, object, geometry))
    }

    fn size_for(&self, length: usize) -> usize {
        self.table.classes()[self.table.index_for(length)].size
    }

    fn find(&self, location: Location) -> Option<Object> {
        let offset = location.offset()?;
        let page = u32::try_from(offset / PAGE_SIZE).ok()?;
        let (first, class) = zspage_of(&self.descriptors, page)?;
        let geometry = self.table.classes().get(class)?;
        let within = offset - first as usize * PAGE_SIZE;
        let index = within / geometry.size;
        let exists =
            within % geometry.size == 0 && index < geometry.objects && is_used(&self.descriptors, first, index);
        exists.then(|| object_of(first, index, geometry))
    }

    fn lock(&self, first: u32) -> &ZspageLock {
        &self.descriptors[first as usize].lock
    }

    fn free(&self, object: &Object) {
        let class = self.table.index_for(object.size);
        let mut lists = self.classes[class].lock();
        let empty = self.put(&mut lists, class, object.first, object.index);
        self.base.metrics.classes[class].objects.sub(1);
        drop(lists);
        if empty {
            self.base.arena.free(object.first, self.table.classes()[class].pages);
        }
    }

    fn adopt(&self, location: Location, slot: u32) -> Option<Object> {
        let offset = location.offset()?;
        let page = u32::try_from(offset / PAGE_SIZE).ok()?;
        let there = zspage_of(&self.descriptors, page);
        let noted = || page_map::zspage_of(&self.base.state, self.table, page);
        // Looking into a region without memory would take some.
        let (first, class) = there.or_else(|| noted().filter(|_| self.base.arena.is_backed(page)))?;
        let geometry = &self.table.classes()[class];
        let within = offset - first as usize * PAGE_SIZE;
        let object = object_of(first, within / geometry.size, geometry);
        if within % geometry.size != 0 || object.index >= geometry.objects {
            return None;
        }
        // SAFETY: inside the arena, and nobody else is at work.
        let bytes = unsafe { &*self.base.state.bytes(object.offset, object.size) };
        let (_, length) = object::peek(bytes).filter(|_| object::belongs_to(bytes, slot))?;
        if self.table.index_for(HEADER_SIZE + length + guard::BYTES) != class {
            return None;
        }
        let mut lists = self.classes[class].lock();
        if there.is_none() {
            if !self.base.arena.claim(first, geometry.pages) {
                return None;
            }
            self.insert_zspage(&mut lists, class, first);
        }
        let adopted = lists.adopt_object(&self.descriptors, geometry, first, object.index);
        self.base.metrics.classes[class].objects.add(u64::from(adopted));
        adopted.then_some(object)
    }

    fn visit(&self, first: u32, see: &mut dyn FnMut(&Object)) {
        let Some((begin, class)) = zspage_of(&self.descriptors, first) else { return };
        if begin != first {
            return;
        }
        let geometry = &self.table.classes()[class];
        objects_in_use(&self.descriptors, first, geometry.objects).for_each(|n| see(&object_of(first, n, geometry)));
    }

    fn pages_to_spare(&self) -> u64 {
        (0..self.classes.len()).map(|n| self.zspages_to_spare(n) * self.table.classes()[n].pages as u64).sum()
    }

    fn compact(&self, commit: &Commit<'_>) -> u64 {
        (0..self.classes.len()).map(|class| self.compact_class(class, commit)).sum()
    }

    fn evacuate(&self, region: Range<u32>, commit: &Commit<'_>) {
        self.evacuate_region(region, commit);
    }

    fn prepare(&self, pages: Range<u32>) -> Result<()> {
        self.descriptors.populate(pages.start as usize..pages.end as usize)
    }

    fn metadata_bytes(&self, peak_pages: u64) -> u64 {
        peak_pages * size_of::<PageDesc>() as u64 + (self.classes.len() * size_of::<Ranked<ClassLists>>()) as u64
    }
}

/// An object of a zspage.
pub(super) fn object_of(first: u32, index: usize, geometry: &Geometry) -> Object {
    Object { first, index, offset: first as usize * PAGE_SIZE + index * geometry.size, size: geometry.size }
}
