//! The store: one page in, one page out, by slot.
//!
//! Everything about a page happens under the lock of its slot, which is held from start to finish: pages of different
//! slots go in parallel. Only where its object lies may change meanwhile, unless it is pinned. What a reader finds is
//! always exactly what was last written, or an error.

mod clean;
mod cluster;
mod disk;
mod end;
mod pressure;
mod recompress;
mod recover;
mod sample;
mod share;
mod verify;
mod writeback;

pub use clean::Cleaner;
pub(crate) use cluster::LastCluster;
pub use disk::DiskOptions;
pub use end::{InFlight, Leaked};
pub use recompress::{Order, Outcome, Recompressed, Recompressor, Tier, LEVELS};
pub use verify::Verifier;
pub use writeback::{Job, Shrinker, What};

use crate::ages::Ages;
use crate::codec::{Codec, Compression};
use crate::crash::crash_point;
use crate::dictionaries::{Dictionaries, Place};
use crate::error::{Error, Result};
use crate::metrics::{Counter, Metrics, SharedMetrics};
use crate::object::{self, HEADER_SIZE};
use crate::page::{self, Page};
use crate::pool::{Allocator, Location, Pinned, Pool};
use crate::references::References;
use crate::scratch::Scratch;
use crate::session::{Session, Settings};
use crate::slots::{Entry, Slot, SlotTable};
use crate::state::State;
use disk::Writeback;
use recompress::Recompression;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

/// Slots, pool and counters. All methods take `&self` and may be called from several threads.
pub struct Store {
    state: Arc<State>,
    slots: SlotTable,
    pool: Pool,
    metrics: SharedMetrics,
    ages: Ages,
    dictionaries: Dictionaries,
    references: References,
    recompression: Recompression,
    /// None without a backing disk.
    writeback: Option<Writeback>,
}

/// What a store is made in, or recovered from: both are made anew where they are None.
#[derive(Default)]
pub struct Files {
    /// The state file: empty, or one to be recovered.
    pub state: Option<OwnedFd>,
    /// The block of counters (see [`SharedMetrics::file`]).
    pub counters: Option<OwnedFd>,
}

/// What a slot has named, and belongs now to who has replaced its word.
#[derive(Clone, Copy)]
enum Released {
    /// It is to be freed.
    Object(Location),
    /// To the shared page of this slot: it is to be put.
    Reference(u32),
}

/// Objects that no slot names any more, to be freed.
///
/// A discard empties the slots at once, and may answer before the objects are freed.
pub struct Detached {
    objects: Vec<Released>,
}

impl Detached {
    /// Allocates room for `capacity` objects, and never more.
    pub fn with_capacity(capacity: usize) -> Detached {
        // Written once, so that it is resident: pushing to it faults no more.
        let mut objects = vec![Released::Object(Location::from_units(u64::MAX)); capacity];
        objects.clear();
        Detached { objects }
    }

    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
}

impl Store {
    /// An empty store of `slots` pages whose pool takes at most `limit_bytes`.
    ///
    /// Errors: [`Error::System`] if the memory file or its mappings cannot be made.
    pub fn new(slots: u64, allocator: Allocator, limit_bytes: u64, files: Files) -> Result<Store> {
        let metrics = SharedMetrics::new(files.counters.as_ref().map(AsFd::as_fd))?;
        let geometry = allocator.geometry(slots);
        let state = State::create(slots, Pool::arena_pages_for(slots), geometry, files.state)?;
        Store::over(Arc::new(state), allocator, limit_bytes, metrics)
    }

    fn over(state: Arc<State>, allocator: Allocator, limit_bytes: u64, metrics: SharedMetrics) -> Result<Store> {
        Ok(Store {
            slots: SlotTable::new(state.clone())?,
            pool: Pool::new(state.clone(), allocator, limit_bytes, metrics.clone())?,
            ages: Ages::new(&state)?,
            dictionaries: Dictionaries::new(state.clone()),
            references: References::new(&state)?,
            recompression: Recompression::default(),
            state,
            metrics,
            writeback: None,
        })
    }

    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// What was agreed on with the kernel, for who serves the swap file next.
    pub fn session(&self) -> &Session {
        self.state.session()
    }

    pub(crate) fn settings(&self) -> &Settings {
        self.state.settings()
    }

    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    pub fn slots(&self) -> u64 {
        self.state.slots()
    }

    /// Takes memory for all slot words, so that using them faults no more. May wait for memory.
    pub fn populate_slots(&self) -> Result<()> {
        self.slots.populate()?;
        self.ages.populate()?;
        self.references.populate()?;
        self.writeback.as_ref().map_or(Ok(()), |writeback| writeback.lru.populate())
    }

    /// Brings the gauges up to date that are too dear to keep so on the page path.
    pub fn refresh_gauges(&self) {
        let lru = self.writeback.as_ref().map_or(0, |writeback| writeback.lru.metadata_bytes());
        let others = self.ages.metadata_bytes() + self.references.metadata_bytes();
        self.metrics.metadata_bytes.set(self.slots.metadata_bytes() + self.pool.metadata_bytes() + lru + others);
        self.refresh_dictionary_gauges();
    }

    /// Reads a page. An empty slot reads zeros.
    ///
    /// A page that lies on the backing disk is read from there, after a call of the scratch's hook, and this waits for
    /// it.
    ///
    /// Errors: [`Error::NotNow`] if the hook says so, with nothing changed; [`Error::Lost`]; [`Error::Corrupt`], after
    /// which the slot is LOST; [`Error::DiskRead`], after which it is as before. `page` is then undefined.
    pub fn load(&self, index: u32, page: &mut Page, scratch: &mut Scratch) -> Result<()> {
        let start = Instant::now();
        let mut slot = match self.lock(index, scratch) {
            Err(Error::NotNow { .. }) if scratch.may_wait() => self.slots.lock(index),
            slot => slot?,
        };
        self.load_slot(&mut slot, page, Some(start), scratch)?;
        self.metrics.loads.add(1);
        self.metrics.load_latency.record_since(start);
        Ok(())
    }

    /// Writes a page.
    ///
    /// Errors: [`Error::NoRoomYet`] if the shrinker is about to make room: nothing has changed, and the same is to be
    /// tried again. [`Error::NotNow`]: the same, for a scratch with a hook, if somebody has the slot locked.
    /// [`Error::PoolFull`] or [`Error::NoRegion`] if there cannot be room, after which the slot is LOST: its old page is
    /// not what was last written, and must not come back.
    pub fn store(&self, index: u32, page: &Page, with: Compression, scratch: &mut Scratch) -> Result<()> {
        let start = Instant::now();
        self.store_slot(&mut self.lock(index, scratch)?, page, with, start, scratch)?;
        self.metrics.stores.add(1);
        self.metrics.store_latency.record_since(start);
        Ok(())
    }

    /// Writes a part of a page, as one step for whoever else reads or writes it.
    ///
    /// Errors: as [`Store::load`] if the rest of the page cannot be read (the slot is LOST then, and stays so), and as
    /// [`Store::store`].
    pub fn store_part(
        &self,
        index: u32,
        at: usize,
        part: &[u8],
        with: Compression,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let start = Instant::now();
        let mut page = [0; page::PAGE_SIZE];
        let mut slot = self.lock(index, scratch)?;
        self.load_slot(&mut slot, &mut page, None, scratch)?;
        page[at..at + part.len()].copy_from_slice(part);
        self.store_slot(&mut slot, &page, with, start, scratch)?;
        self.metrics.stores.add(1);
        self.metrics.store_latency.record_since(start);
        Ok(())
    }

    /// Locks a slot; for a scratch with a hook ([`Scratch::with_hook`]), only if nobody has it locked.
    fn lock(&self, index: u32, scratch: &Scratch) -> Result<Slot<'_>> {
        match scratch.may_wait {
            None => Ok(self.slots.lock(index)),
            Some(_) => self.slots.try_lock(index).ok_or(Error::NotNow { slot: index }),
        }
    }

    /// Empties the slots of a range: they read zeros when this returns. Returns how many were not empty before.
    ///
    /// Their objects go to `detached`, for [`Store::free_detached`]; those that find no room there are freed now.
    pub fn discard(&self, range: Range<u64>, detached: &mut Detached) -> u64 {
        let touched = self.slots.touched(range);
        touched.map(|index| u64::from(self.empty(&mut self.slots.lock(index), detached))).sum()
    }

    /// As [`Store::discard`]; for a scratch with a hook, fails with [`Error::NotNow`] at the first slot that is locked.
    /// The same is to be tried again then. Counts what was emptied.
    pub fn try_discard(&self, range: Range<u64>, detached: &mut Detached, scratch: &Scratch) -> Result<()> {
        let mut emptied = 0;
        let result = self.slots.touched(range).try_for_each(|index| {
            emptied += u64::from(self.empty(&mut self.lock(index, scratch)?, detached));
            Ok(())
        });
        self.metrics.discards.add(emptied);
        result
    }

    /// Empties a slot. Returns whether it was not empty.
    fn empty(&self, slot: &mut Slot<'_>, detached: &mut Detached) -> bool {
        if slot.word().entry() == Entry::Empty {
            return false;
        }
        if let Some(released) = self.publish(slot, Entry::Empty, None) {
            match detached.objects.len() < detached.objects.capacity() {
                true => detached.objects.push(released),
                false => self.release(released),
            }
        }
        true
    }

    /// Moves stored objects together, and frees what they no longer need: see [`Pool::compact`]. Returns how many
    /// pages.
    pub fn compact(&self) -> u64 {
        self.pool.compact(&|copy: &[u8], from, to| {
            object::slot_of(copy).is_some_and(|index| self.slots.relocate(index, from, to))
        })
    }

    /// Frees what discards have detached.
    pub fn free_detached(&self, detached: &mut Detached) {
        detached.objects.drain(..).for_each(|released| self.release(released));
    }

    /// `now` is None for who is about to overwrite the page: that it was read says nothing then. Nor may it move to the
    /// pool, where it would take the room that the new one waits for.
    fn load_slot(
        &self,
        slot: &mut Slot<'_>,
        page: &mut Page,
        now: Option<Instant>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (entry, object) = self.pin(slot);
        match entry {
            Entry::Empty => page.fill(0),
            Entry::SameFilled(word) => page::fill(page, word),
            Entry::Lost => {
                self.metrics.errors_lost.add(1);
                return Err(Error::Lost { slot: slot.index() });
            }
            Entry::Damaged => return Err(self.found_corrupt(slot)),
            Entry::Disk(at) => return self.load_from_disk(slot, at, page, now, scratch),
            Entry::Shared(reference) => return self.load_shared(slot, reference, page, now, scratch),
            Entry::Pool(_) | Entry::Writeback(_) => {
                // SAFETY: we hold the lock of the slot, which names the object since it was pinned. Should the word be
                // damaged and name another slot's object, that one's bytes may change meanwhile: they do not verify
                // for this slot.
                let verified =
                    object.as_ref().and_then(|object| object::verify(unsafe { object.bytes() }, slot.index()));
                // SAFETY: used while the slot is locked, whose word names it.
                let dictionary = unsafe { self.dictionaries.decoder(slot.word().dictionary()) };
                let whole = verified
                    .is_some_and(|(codec, payload)| scratch.codecs.decompress(codec, payload, page, dictionary));
                drop(object);
                if !whole {
                    return Err(self.found_corrupt(slot));
                }
                if now.is_some() {
                    self.ages.touch(slot.index());
                }
                if let (Some(writeback), Some(now)) = (&self.writeback, now) {
                    writeback.lru.touch(slot.index(), writeback.seconds(now));
                }
            }
        }
        Ok(())
    }

    /// What a slot holds, with its object pinned. An object may be moved until it is pinned: then we look again.
    fn pin(&self, slot: &Slot<'_>) -> (Entry, Option<Pinned<'_>>) {
        loop {
            let word = slot.word();
            let Some(location) = word.entry().object() else { return (word.entry(), None) };
            let object = self.pool.pin(location);
            if slot.word() == word {
                return (word.entry(), object);
            }
        }
    }

    fn found_corrupt(&self, slot: &mut Slot<'_>) -> Error {
        self.replace(slot, Entry::Lost);
        self.metrics.errors_corrupt.add(1);
        Error::Corrupt { slot: slot.index() }
    }

    fn store_slot(
        &self,
        slot: &mut Slot<'_>,
        page: &Page,
        with: Compression,
        now: Instant,
        scratch: &mut Scratch,
    ) -> Result<()> {
        if let Some(word) = page::same_filled(page) {
            self.replace(slot, Entry::SameFilled(word));
            return Ok(());
        }
        let (codec, payload) = scratch.codecs.compress(page, with);
        let insert = |index| {
            self.pool.insert(HEADER_SIZE + payload.len(), |object| object::write(object, index, codec, payload))
        };
        let object = match insert(slot.index()) {
            Err(error) if self.waits_for_room(&error) => return Err(Error::NoRoomYet),
            // The old page is out of date, whether or not the new one finds room. Give it up: its room may do.
            Err(_) => {
                self.replace(slot, Entry::Lost);
                insert(slot.index()).inspect_err(|error| self.count_rejected(error))?
            }
            Ok(object) => object,
        };
        self.ages.begin(slot.index());
        self.publish_object(slot, object, codec, payload.len(), None, now);
        self.look_at_pressure();
        Ok(())
    }

    /// Publishes an object that has just been inserted, and frees what the slot held.
    fn publish_object(
        &self,
        slot: &mut Slot<'_>,
        object: Pinned<'_>,
        codec: Codec,
        length: usize,
        dictionary: Option<Place>,
        now: Instant,
    ) {
        self.count_object(codec, length);
        let old = self.publish(slot, Entry::Pool(object.location()), dictionary);
        // From here on it may be moved.
        drop(object);
        if let Some(writeback) = &self.writeback {
            writeback.lru.insert(slot.index(), codec == Codec::Raw, writeback.seconds(now));
        }
        if let Some(old) = old {
            self.release(old);
        }
    }

    fn count_rejected(&self, error: &Error) {
        if matches!(error, Error::PoolFull) {
            self.pool.was_full();
        }
        match error {
            Error::NoRegion => self.metrics.rejected_no_memory.add(1),
            _ if self.writeback.is_some() => self.metrics.rejected_no_writeback.add(1),
            _ => self.metrics.rejected_pool_full.add(1),
        }
    }

    /// Publishes `entry`, of no object, as what the slot holds, then frees what it held: in this order, so that no reader and no
    /// crash ever finds a slot that names a freed object.
    fn replace(&self, slot: &mut Slot<'_>, entry: Entry) {
        if let Some(released) = self.publish(slot, entry, None) {
            self.release(released);
        }
    }

    /// Publishes `entry`, which takes this dictionary to be read, and returns what the slot no longer names, if it belongs to
    /// the caller now, who has to [`Store::release`] it. A record on the disk is freed.
    fn publish(&self, slot: &mut Slot<'_>, entry: Entry, dictionary: Option<Place>) -> Option<Released> {
        self.dictionaries.count(dictionary);
        let word = slot.publish(entry, dictionary);
        let old = word.entry();
        if old != Entry::Damaged {
            self.dictionaries.discount(word.dictionary());
        }
        self.gauges_of(entry).for_each(|gauge| gauge.add(1));
        self.gauges_of(old).for_each(|gauge| gauge.sub(1));
        if let (Some(writeback), None) = (&self.writeback, entry.object()) {
            if old.object().is_some() || old == Entry::Damaged {
                writeback.lru.remove(slot.index());
            }
        }
        match (old, &self.writeback) {
            // A word may be damaged, and name an object of another slot: that one stays. Or it named a free one, and
            // the new object came to lie there.
            (Entry::Pool(location), _) if entry != Entry::Pool(location) => {
                let belongs = |object: &[u8]| object::belongs_to(object, slot.index());
                // SAFETY: the slot no longer names the object, and only we know it; a wrong one is only looked at.
                let is_ours = unsafe { self.pool.with_object(location, belongs) } == Some(true);
                is_ours.then_some(Released::Object(location))
            }
            (Entry::Shared(reference), _) => reference.by(slot.index()).map(Released::Reference),
            (Entry::Disk(at), Some(writeback)) => {
                writeback.backing.free(at);
                None
            }
            // An object in writeback is its shrinker's.
            _ => None,
        }
    }

    /// Counts the slots that hold this.
    fn gauges_of(&self, entry: Entry) -> impl Iterator<Item = &Counter> {
        let metrics = &self.metrics;
        let gauges = match entry {
            Entry::Lost => [Some(&metrics.pages_lost), None],
            Entry::SameFilled(_) => [Some(&metrics.pages_same_filled), None],
            Entry::Disk(at) => [Some(&metrics.pages_on_disk), at.is_cluster().then_some(&metrics.pages_in_clusters)],
            Entry::Shared(_) => [Some(&metrics.pages_shared), None],
            // Objects are counted by codec.
            Entry::Pool(_) | Entry::Writeback(_) | Entry::Empty | Entry::Damaged => [None, None],
        };
        gauges.into_iter().flatten()
    }

    fn release(&self, released: Released) {
        match released {
            Released::Object(location) => self.free_object(location),
            Released::Reference(shared) => self.put_reference(shared),
        }
    }

    /// Frees an object that belongs to the caller.
    fn free_object(&self, location: Location) {
        // SAFETY: no slot names the object, so that nobody but the caller frees it.
        if let Some((codec, length)) = unsafe { self.pool.with_object(location, object::peek) }.flatten() {
            self.discount_object(codec, length);
        }
        self.pool.free(location);
        crash_point("object freed");
    }

    fn count_object(&self, codec: Codec, length: usize) {
        let (pages, bytes) = self.metrics.of_codec(codec);
        pages.add(1);
        bytes.into_iter().chain([&self.metrics.compressed_bytes]).for_each(|bytes| bytes.add(length as u64));
    }

    fn discount_object(&self, codec: Codec, length: usize) {
        let (pages, bytes) = self.metrics.of_codec(codec);
        pages.sub(1);
        bytes.into_iter().chain([&self.metrics.compressed_bytes]).for_each(|bytes| bytes.sub(length as u64));
    }

    /// Flips one bit of the stored object of a slot, header included: the `n`-th, counted round and round. False if
    /// the slot has no object.
    #[cfg(test)]
    pub fn flip_bit(&self, index: u32, n: usize) -> bool {
        let slot = self.slots.lock(index);
        let Entry::Pool(location) = slot.word().entry() else { return false };
        // SAFETY: the slot is locked, and in tests that damage objects nobody moves them.
        let peeked = unsafe { self.pool.with_object(location, object::peek) }.flatten();
        let (Some((_, length)), Some(address)) = (peeked, self.pool.address(location)) else { return false };
        let bit = n % ((HEADER_SIZE + length) * 8);
        // SAFETY: inside the object, which nobody reads while the slot is locked.
        unsafe { *address.add(bit / 8) ^= 1 << (bit % 8) };
        true
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests;
