//! What the pool asks of an allocator (the kernel's `zpool_driver`), and what an allocator stands on.

use super::arena::Arena;
use super::class::UNIT;
use super::guard;
use super::lock::ZspageLock;
use super::Location;
use crate::error::Result;
use crate::gate::Gate;
use crate::metrics::SharedMetrics;
use crate::state::State;
use std::ops::Range;
use std::sync::Arc;

/// An object, as its allocator knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// The first page of its zspage: the neighbouring pages that it lies on, perhaps with others.
    pub first: u32,
    /// Which one of the zspage's it is.
    pub index: usize,
    /// In bytes from the arena's start.
    pub offset: usize,
    /// In bytes; as many as were asked for, or some more.
    pub size: usize,
}

impl Object {
    pub fn location(&self) -> Location {
        Location::from_units((self.offset / UNIT) as u64)
    }
}

/// Makes the slot that names the object at the first location name its copy at the second one; false if no slot does.
/// The bytes are the copy's.
pub type Commit<'a> = dyn Fn(&[u8], Location, Location) -> bool + 'a;

/// What an allocator stands on.
pub struct Base {
    pub state: Arc<State>,
    pub arena: Arena,
    pub metrics: SharedMetrics,
    /// Who moves objects is inside. Closed when the pool is destroyed: then they finish the step that they are at.
    pub movers: Gate,
}

impl Base {
    /// The bytes of an object, to be read.
    ///
    /// # Safety
    /// It must live, and nobody may write to it, move or free it while they are used.
    pub unsafe fn bytes(&self, object: &Object) -> &[u8] {
        // SAFETY: a live object lies inside the arena; the rest is the caller's promise.
        unsafe {
            guard::check(&self.state, object);
            &*self.state.bytes(object.offset, object.size - guard::BYTES)
        }
    }

    /// The bytes of an object that has just been taken, to be written: see [`State::bytes_mut`].
    ///
    /// # Safety
    /// Nobody may know the object yet.
    pub unsafe fn fresh_bytes(&self, object: &Object) -> *mut [u8] {
        // SAFETY: the caller's promise.
        unsafe { guard::set(&self.state, object) };
        self.state.bytes_mut(object.offset, object.size - guard::BYTES)
    }

    /// Copies the bytes of an object to another one of its size, and returns the copy's.
    ///
    /// # Safety
    /// They must be two. Nobody may write to the first one: its zspage is locked by the caller, and objects are written
    /// only while pinned. Nobody may know the copy: it has just been taken.
    pub unsafe fn copy(&self, from: &Object, to: &Object) -> &[u8] {
        // SAFETY: the caller's promise.
        let (from, to) = unsafe { (self.bytes(from), &mut *self.fresh_bytes(to)) };
        to.copy_from_slice(from);
        to
    }
}

/// An allocator: lays out objects on pages of the arena, in zspages of one lock each.
///
/// None of this waits for memory, but where a table is touched for the first time.
pub trait Driver: Send + Sync {
    /// Allocates `length` bytes, pinned: the caller unlocks the zspage.
    ///
    /// Errors: as [`Arena::alloc`], with nothing changed.
    fn take(&self, length: usize) -> Result<Object>;

    /// What an object of `length` bytes takes: less is not saved by what is as large.
    fn size_for(&self, length: usize) -> usize;

    /// The object at a location; None if there is none. Takes no lock: a hint, but for who owns the object or has
    /// pinned it.
    fn find(&self, location: Location) -> Option<Object>;

    /// The lock of the zspage that begins at a page. It is there for ever: a table outlives all who look into it.
    fn lock(&self, first: u32) -> &ZspageLock;

    /// Frees an object, which must live, and gives pages back to the arena that it was the last one on.
    fn free(&self, object: &Object);

    /// Makes the object at a location live that a slot names, if there can be one: for who recovers the pool, alone.
    /// None, with nothing changed, if not. Takes no memory where [`Driver::prepare`] was before.
    fn adopt(&self, location: Location, slot: u32) -> Option<Object>;

    /// Shows the objects of the zspage that begins at a page, if one does. Nobody else may be at work.
    fn visit(&self, first: u32, see: &mut dyn FnMut(&Object));

    /// About how many pages [`Driver::compact`] would free.
    fn pages_to_spare(&self) -> u64;

    /// Moves objects together, and returns how many pages that has freed. Takes locks for short steps only, and begins
    /// none when the gate is closed.
    fn compact(&self, commit: &Commit<'_>) -> u64;

    /// Moves the objects of a region that the arena has isolated to other regions in use, as [`Driver::compact`] does.
    /// Some may stay.
    fn evacuate(&self, region: Range<u32>, commit: &Commit<'_>);

    /// Takes memory for the descriptors of pages, so that using them faults no more. May wait for memory.
    fn prepare(&self, pages: Range<u32>) -> Result<()>;

    /// Bytes of descriptors and locks, if at most so many pages were ever in use.
    fn metadata_bytes(&self, peak_pages: u64) -> u64;
}
