//! A store over the state that another process has left behind, at whatever instruction it ended.
//!
//! The slot words say what there is; all else is made anew. What no word names is free: the copy of a page that was
//! being written, moved or promoted, the record of one that was being written back, the object of one that was being
//! freed. A word that names what cannot be its page costs that page (it is LOST), and no other.

use super::disk::Writeback;
use super::{DiskOptions, Files, Store};
use crate::backing::Backing;
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::metrics::SharedMetrics;
use crate::pool::Allocator;
use crate::slots::Entry;
use crate::state::State;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

impl Store {
    /// Goes on with the state in `files`, with its settings, its counters, and the disk that it was used with. Nobody
    /// else may be at work on them any more: the process that was is gone, and so is what it had under way with the disk.
    ///
    /// The large tables (descriptors, list of cold pages) lie in memory that the process before has taken for them. What
    /// is taken besides: page tables for what is stored (0.2 %), a mark of one byte for 512 slots, 72 bytes for 2 MiB of
    /// the pool, 20 bytes for a segment of the disk. Does not touch the disk. Goes through all slot words, and the
    /// header of each object. May itself be ended at any instruction, and be begun anew. Errors: [`Error::Invalid`],
    /// with nothing changed: those of [`State::open`], counters of another layout, another disk than it was used with;
    /// [`Error::System`].
    pub fn recover(allocator: Allocator, files: Files, disk: Option<DiskOptions>) -> Result<Store> {
        let file = files.state.ok_or_else(|| Error::Invalid("there is no state file to recover".into()))?;
        let state = Arc::new(State::open(file, |slots| allocator.geometry(slots))?);
        check_disk(&state, disk.as_ref())?;
        let metrics = SharedMetrics::resume(files.counters.as_ref().map(AsFd::as_fd))?;
        let limit_bytes = state.settings().limit_bytes.load(Relaxed);
        let mut store = Store::over(state, allocator, limit_bytes, metrics)?;
        let had_disk = store.settings().disk_bytes.load(Relaxed) > 0;
        if let Some(options) = disk {
            // One that ended at its very start has not set all of it up.
            store = if had_disk { store.with_the_same_disk(options)? } else { store.with_disk(options)? };
        }
        store.dictionaries.recover();
        store.pool.begin_recovery()?;
        store.slots.mark_touched();
        // Those of the swap file first: they tell which shared ones are named.
        for index in store.slots.touched(store.slots.all()) {
            store.adopt(index);
        }
        store.pool.end_recovery()?;
        store.dictionaries.retire();
        Ok(store)
    }

    fn with_the_same_disk(mut self, options: DiskOptions) -> Result<Store> {
        self.writeback = Some(Writeback::new(&self, options)?);
        Ok(self)
    }

    /// Makes live what a slot names.
    fn adopt(&self, index: u32) {
        let mut slot = self.slots.lock(index);
        let word = slot.word();
        let entry = word.entry();
        if self.slots.is_shared(index) && !self.adopt_shared(&mut slot) {
            return;
        }
        // Without its dictionary a page cannot be read.
        let readable = word.dictionary().is_none_or(|place| self.dictionaries.is_ready(place));
        let is_right = match entry {
            Entry::Pool(_) | Entry::Writeback(_) | Entry::Disk(_) if !readable => false,
            Entry::Pool(location) | Entry::Writeback(location) => match self.pool.adopt(location, index) {
                Some((codec, length)) => {
                    self.count_object(codec, length);
                    if let Some(writeback) = &self.writeback {
                        writeback.lru.insert(index, codec == Codec::Raw, 0);
                    }
                    if entry == Entry::Writeback(location) {
                        // Whoever was writing it back is no more.
                        slot.publish(Entry::Pool(location), word.dictionary());
                    }
                    true
                }
                None => false,
            },
            Entry::Disk(at) => self.writeback.as_ref().is_some_and(|writeback| writeback.backing.adopt(at)),
            Entry::Shared(reference) => self.adopt_reference(index, reference),
            // A reader is told.
            Entry::Damaged => return,
            Entry::Empty | Entry::Lost | Entry::SameFilled(_) => true,
        };
        let entry = if is_right { entry } else { Entry::Lost };
        if is_right {
            self.dictionaries.count(word.dictionary());
        } else {
            slot.publish(Entry::Lost, None);
            self.metrics.errors_corrupt.add(1);
        }
        self.gauges_of(entry).for_each(|gauge| gauge.add(1));
    }
}

/// That a state goes on with the disk that has its pages.
fn check_disk(state: &State, disk: Option<&DiskOptions>) -> Result<()> {
    let settings = state.settings();
    let (bytes, encrypted) = (settings.disk_bytes.load(Relaxed), settings.disk_encrypted.load(Relaxed) != 0);
    let refused = |what: String| Err(Error::Invalid(format!("the state file cannot be recovered: {what}")));
    match disk {
        _ if bytes == 0 => Ok(()),
        None => refused("some of its pages may lie on a backing disk, and none was named".into()),
        Some(disk) if Backing::usable_bytes(disk.bytes) != bytes => {
            refused(format!("its backing disk has {bytes} usable bytes, and this one {}", disk.bytes))
        }
        Some(disk) if disk.encryption != encrypted => {
            refused("its backing disk is encrypted, or not, as this one is not to be".into())
        }
        Some(_) => Ok(()),
    }
}
