//! What a store with a backing disk has besides, and how a page is read from there.

use super::pressure::{Pressure, ACCEPT_THRESHOLD_PERCENT};
use super::Store;
use crate::backing::{self, Backing, Disk};
use crate::codec::{Algorithm, Compression};
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::lru::{Incompressible, Lru};
use crate::object::{self, HEADER_SIZE};
use crate::page::Page;
use crate::scratch::Scratch;
use crate::slots::Slot;
use crate::sync::{AtomicBool, Ordering::Relaxed};
use std::sync::atomic::Ordering::Relaxed as Plain;
use std::time::{Duration, Instant};

/// Pages that come back from a cluster: whoever reads them waits.
const PROMOTED: Compression = Compression { algorithm: Algorithm::Lz4, zstd_level: 1 };

/// A backing disk, and how it is to be used.
pub struct DiskOptions {
    pub disk: Box<dyn Disk>,
    /// Of the disk, from its beginning, in bytes.
    pub bytes: u64,
    pub encryption: bool,
    pub incompressible: Incompressible,
}

/// The part of a store that exists with a backing disk.
pub(super) struct Writeback {
    pub backing: Backing,
    pub lru: Lru,
    pub pressure: Pressure,
    /// A shrinker is inside from its first page to the last one that it publishes, or frees.
    pub writebacks: Gate,
    /// As a cleaner is.
    pub cleanings: Gate,
    pub promoting: AtomicBool,
    epoch: Instant,
}

impl Writeback {
    /// With the settings and the key of the store's state. Takes memory for the table of segments, and address space.
    pub fn new(store: &Store, options: DiskOptions) -> Result<Writeback> {
        let DiskOptions { disk, bytes, encryption, incompressible } = options;
        let how = backing::Options { encryption };
        let settings = store.settings();
        let (percent, promoting) = (settings.accept_threshold_percent.load(Plain), settings.promoting.load(Plain));
        let budget = Some(settings.budget_bytes.load(Plain)).filter(|&bytes| bytes != u64::MAX);
        let backing = Backing::new(disk, bytes, how, store.state.clone(), store.metrics.clone())?;
        backing.set_budget(budget);
        Ok(Writeback {
            backing,
            lru: Lru::new(&store.state, incompressible, store.metrics.clone())?,
            pressure: Pressure::new(percent.min(100) as u32),
            writebacks: Gate::new(),
            cleanings: Gate::new(),
            promoting: AtomicBool::new(promoting != 0),
            epoch: Instant::now(),
        })
    }

    /// Seconds since the store was made.
    pub fn seconds(&self, now: Instant) -> u32 {
        now.duration_since(self.epoch).as_secs() as u32
    }
}

impl Store {
    /// Gives a new store, in which nothing was stored yet, a backing disk, all of which is free.
    ///
    /// Errors: those of [`Backing::new`], and [`Error::System`] without memory for its tables.
    pub fn with_disk(mut self, options: DiskOptions) -> Result<Store> {
        self.slots.expect_disk();
        let encrypted = u64::from(options.encryption);
        let bytes = Backing::usable_bytes(options.bytes);
        let settings = self.settings();
        settings.accept_threshold_percent.store(ACCEPT_THRESHOLD_PERCENT.into(), Plain);
        settings.promoting.store(1, Plain);
        settings.budget_bytes.store(u64::MAX, Plain);
        settings.disk_encrypted.store(encrypted, Plain);
        // Half of one, if somebody was killed while he made it.
        self.state.cipher().key.iter().for_each(|word| word.store(0, Relaxed));
        self.writeback = Some(Writeback::new(&self, options)?);
        // Only now that there is a key.
        self.settings().disk_bytes.store(bytes, std::sync::atomic::Ordering::Release);
        Ok(self)
    }

    /// The backing disk, if there is one: to be given a budget, for one.
    pub fn backing(&self) -> Option<&Backing> {
        self.writeback.as_ref().map(|writeback| &writeback.backing)
    }

    /// Whether pages that are read from the disk may move to the pool while it is below its accept threshold, as they
    /// may at first. Not during swapoff: the pool would grow when memory is needed most.
    pub fn set_promoting(&self, on: bool) {
        if let Some(writeback) = &self.writeback {
            writeback.promoting.store(on, Relaxed);
            self.settings().promoting.store(u64::from(on), Plain);
        }
    }

    /// Marks the pages of the pool as idle that nobody has used for `age`, in whole seconds. Returns how many pages are
    /// idle now: they are until they are read or written. Page operations go on meanwhile.
    pub fn mark_idle(&self, age: Duration) -> u64 {
        let Some(Writeback { lru, epoch, .. }) = &self.writeback else { return 0 };
        lru.mark_idle(u32::try_from(age.as_secs()).unwrap_or(u32::MAX), epoch.elapsed().as_secs() as u32)
    }

    /// Reads the page of a slot from the disk; the slot stays locked meanwhile, so that nobody frees the record. It may
    /// move to the pool: see `load_slot` for when not.
    pub(super) fn load_from_disk(
        &self,
        slot: &mut Slot<'_>,
        at: backing::DiskLocation,
        page: &mut Page,
        now: Option<Instant>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Some(writeback) = &self.writeback else { return Err(self.found_corrupt(slot)) };
        // Who is about to write the rest of the page has nobody to leave it to.
        if !scratch.may_wait() && now.is_some() {
            return Err(Error::NotNow { slot: slot.index() });
        }
        let promotes = || writeback.promoting.load(Relaxed) && self.is_below_accept_threshold();
        if at.is_cluster() {
            match self.load_member(writeback, slot, at, page, scratch) {
                Err(Error::Corrupt { .. }) => return Err(self.found_corrupt(slot)),
                loaded => loaded.inspect_err(|_| self.metrics.disk_read_errors.add(1))?,
            }
            if let Some(now) = now {
                self.ages.touch(slot.index());
                if promotes() {
                    self.promote_member(slot, page, now, scratch);
                }
            }
            return Ok(());
        }
        let object = match writeback.backing.read(at, slot.index(), slot.word().generation(), &mut scratch.disk) {
            Err(Error::Corrupt { .. }) => return Err(self.found_corrupt(slot)),
            object => object.inspect_err(|_| self.metrics.disk_read_errors.add(1))?,
        };
        let Some((codec, payload)) = object::verify(object, slot.index()) else { return Err(self.found_corrupt(slot)) };
        // SAFETY: used while the slot is locked, whose word names it.
        let dictionary = unsafe { self.dictionaries.decoder(slot.word().dictionary()) };
        if !scratch.codecs.decompress(codec, payload, page, dictionary) {
            return Err(self.found_corrupt(slot));
        }
        if now.is_some() {
            self.ages.touch(slot.index());
        }
        if let Some(now) = now.filter(|_| promotes()) {
            let object = &object[..HEADER_SIZE + payload.len()];
            if let Ok(copy) = self.pool.insert(object.len(), |copy| copy[..object.len()].copy_from_slice(object)) {
                let dictionary = slot.word().dictionary();
                self.publish_object(slot, copy, codec, payload.len(), dictionary, now);
                self.metrics.pages_promoted.add(1);
            }
        }
        Ok(())
    }

    /// Moves a page to the pool that was read from its cluster, if there is room: compressed by itself, as fast as can be.
    fn promote_member(&self, slot: &mut Slot<'_>, page: &Page, now: Instant, scratch: &mut Scratch) {
        let (codec, payload) = scratch.codecs.compress(page, PROMOTED);
        let fill = |object: &mut [u8]| object::write(object, slot.index(), codec, payload);
        if let Ok(copy) = self.pool.insert(HEADER_SIZE + payload.len(), fill) {
            self.publish_object(slot, copy, codec, payload.len(), None, now);
            self.metrics.pages_promoted.add(1);
        }
    }
}
