//! Pages that are alike, stored once: found by who recompresses them, who has each of them decompressed anyway.
//!
//! 1. A page that has been taken for recompression (its word is WRITEBACK, and ours) is looked up in the index
//!    ([`crate::duplicates`]), which names a slot whose page may be alike.
//! 2. If that is a shared one already, or names one, its page is compared under its lock, and a reference taken there.
//! 3. Else the other page is taken as ours was, and compared with no lock held. A shared slot that is free gets the smaller of
//!    the two objects, copied, with a first reference, which is ours, before it is published; and then a second one.
//! 4. Under the lock of each of the two slots: if the word is still the one that was published when it was taken, SHARED takes
//!    its place; else the reference is put. Either way its object is freed, by us.
//!
//! No page is compared by its hash alone, and nobody has two slots of the swap file locked. A process may end anywhere: a
//! shared slot that no word names is empty to a successor, and WRITEBACK is POOL.

use super::recompress::{Recompressor, Taken};
use super::{Released, Store};
use crate::codec::Codecs;
use crate::error::{Error, Result};
use crate::object::{self, HEADER_SIZE};
use crate::page::Page;
use crate::references::Reference;
use crate::scratch::Scratch;
use crate::slots::{Entry, Slot};
use std::time::Instant;

impl Store {
    /// Has a recompressor look for pages that are alike, as long as it pays, or no longer: to be called before
    /// [`Store::recompress`], from time to time, as the pool grows. Allocates 8 bytes for each object of the pool at most.
    pub fn prepare_duplicates(&self, recompressor: &mut Recompressor, on: bool) {
        let metrics = &self.metrics;
        let objects =
            [&metrics.pages_lz4, &metrics.pages_zstd, &metrics.pages_zstd_dictionary, &metrics.pages_incompressible];
        recompressor.duplicates.prepare(on, objects.map(|pages| pages.get()).iter().sum());
        metrics.duplicates_index_bytes.set(recompressor.duplicates.bytes());
    }

    /// Steps 1 to 3, for a page that was decompressed: the shared slot that has it too, and a reference to that, which the
    /// caller has now.
    pub(super) fn alike(&self, recompressor: &mut Recompressor, index: u32, taken: &Taken) -> Option<u32> {
        let fingerprint = recompressor.duplicates.fingerprint(&recompressor.page)?;
        let candidate = recompressor.duplicates.find(fingerprint).filter(|&slot| slot != index);
        // One that is shared stays as it is.
        let candidate = candidate.filter(|_| !self.slots.is_shared(index));
        let shared = candidate.and_then(|candidate| match self.slots.peek(candidate)?.entry() {
            Entry::Shared(reference) => self.take_reference(recompressor, reference.by(candidate)?),
            _ if self.slots.is_shared(candidate) => self.take_reference(recompressor, candidate),
            Entry::Pool(_) => self.make_shared(recompressor, (index, taken), candidate),
            _ => None,
        });
        if shared.is_some() {
            recompressor.duplicates.found(taken.bytes);
        }
        recompressor.duplicates.insert(fingerprint, shared.unwrap_or(index));
        shared
    }

    /// Step 2.
    fn take_reference(&self, recompressor: &mut Recompressor, shared: u32) -> Option<u32> {
        let Recompressor { codecs, page, other, .. } = recompressor;
        let slot = self.slots.is_shared(shared).then(|| self.slots.lock(shared))?;
        // What lies on the disk is not read for this.
        let (_, object) = self.pin(&slot);
        let same = object.is_some_and(|object| {
            // SAFETY: as in `load_slot`, both.
            let (bytes, dictionary) = unsafe { (object.bytes(), self.dictionaries.decoder(slot.word().dictionary())) };
            object::verify(bytes, shared)
                .is_some_and(|(codec, payload)| codecs.decompress(codec, payload, other, dictionary))
        });
        (same && page == other && self.references.take(shared)).then_some(shared)
    }

    /// Step 3, and 4 for the other page.
    fn make_shared(&self, recompressor: &mut Recompressor, ours: (u32, &Taken), candidate: u32) -> Option<u32> {
        let theirs = self.take_for_recompression(candidate)?;
        let Recompressor { codecs, page, other, .. } = &mut *recompressor;
        let same = self.is_taken_alike(codecs, page, other, candidate, &theirs);
        let smaller = if ours.1.bytes <= theirs.bytes { ours } else { (candidate, &theirs) };
        let shared = same.then(|| self.begin_shared(&mut recompressor.next_shared, smaller)).flatten();
        match shared {
            // The one that we have stays meanwhile.
            Some(shared) if self.references.take(shared) => {
                self.share(candidate, &theirs, shared);
            }
            _ => self.leave_taken(candidate, &theirs),
        }
        shared
    }

    fn is_taken_alike(&self, codecs: &mut Codecs, page: &Page, other: &mut Page, index: u32, taken: &Taken) -> bool {
        self.decode_taken(codecs, other, index, taken) && page == other
    }

    /// A free shared slot, with a copy of the object that was taken from a slot, and one reference. None: there is none, or no
    /// room.
    fn begin_shared(&self, next: &mut u64, (from, taken): (u32, &Taken)) -> Option<u32> {
        let all = self.slots.shared();
        let start = (*next).clamp(all.start, all.end);
        let is_free = |&index: &u64| {
            let word = self.slots.peek(index as u32);
            word.is_some_and(|word| word.entry() == Entry::Empty) && !self.references.is_named(index as u32)
        };
        let full = self.metrics.shared_pages.get() >= all.end - all.start;
        let index = if full { None } else { (start..all.end).chain(all.start..start).find(is_free) }?;
        *next = index + 1;
        let index = index as u32;
        // Nobody else makes one of it: it is our turn.
        let mut slot = self.slots.lock(index);
        let copy = |object: &[u8]| {
            let (codec, payload) = object::verify(object, from)?;
            let fill = |to: &mut [u8]| object::write(to, index, codec, payload);
            Some((self.pool.insert(HEADER_SIZE + payload.len(), fill).ok()?, codec, payload.len()))
        };
        // SAFETY: it is ours, and is not moved: its word says WRITEBACK, or nobody knows it any more.
        let (object, codec, length) = unsafe { self.pool.with_object(taken.object, copy) }.flatten()?;
        self.references.begin(index);
        self.publish_object(&mut slot, object, codec, length, taken.word.dictionary(), Instant::now());
        self.metrics.shared_pages.add(1);
        self.ages.copy(from, index);
        Some(index)
    }

    /// Step 4, for a page that was taken, with a reference that was taken for it. Returns whether it is shared now: else
    /// somebody has written or punched it.
    pub(super) fn share(&self, index: u32, taken: &Taken, shared: u32) -> bool {
        let mut slot = self.slots.lock(index);
        let still = slot.word() == taken.word;
        if still {
            // What the word named is ours already.
            self.publish(&mut slot, Entry::Shared(Reference::new(index, shared)), None);
        }
        drop(slot);
        self.free_object(taken.object);
        if !still {
            self.release(Released::Reference(shared));
        }
        still
    }

    /// Gives a page back that was taken, as it was.
    pub(super) fn leave_taken(&self, index: u32, taken: &Taken) {
        let mut slot = self.slots.lock(index);
        if slot.word() == taken.word {
            slot.publish(Entry::Pool(taken.object), taken.word.dictionary());
        } else {
            drop(slot);
            self.free_object(taken.object);
        }
    }

    /// Puts a reference that no word stands for any more. Never waits for a lock: somebody may be reading the page from the
    /// disk.
    pub(super) fn put_reference(&self, shared: u32) {
        if self.references.put(shared) {
            match self.slots.try_lock(shared) {
                Some(mut slot) => self.empty_unnamed(&mut slot),
                None => self.references.leave(),
            }
        }
    }

    /// Empties a shared slot, unless somebody names it, or it is empty.
    fn empty_unnamed(&self, slot: &mut Slot<'_>) {
        if !self.references.is_named(slot.index()) && slot.word().entry() != Entry::Empty {
            self.replace(slot, Entry::Empty);
            self.metrics.shared_pages.sub(1);
        }
    }

    /// Empties the shared slots that nobody names, and that were locked when they were to be emptied. Waits for who reads
    /// them.
    pub(super) fn empty_those_left(&self) {
        if self.references.were_left() {
            for index in self.slots.touched(self.slots.shared()) {
                if !self.references.is_named(index) {
                    self.empty_unnamed(&mut self.slots.lock(index));
                }
            }
        }
    }

    /// Reads the page of a slot that shares it. As `load_slot`.
    pub(super) fn load_shared(
        &self,
        slot: &mut Slot<'_>,
        reference: Reference,
        page: &mut Page,
        now: Option<Instant>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let index = slot.index();
        let found = match reference.by(index).filter(|&shared| self.slots.is_shared(shared)) {
            // A damaged word.
            None => None,
            Some(shared) => {
                // Nobody puts our reference, and so empties it.
                let mut shared = match self.lock(shared, scratch) {
                    // Who is about to write the rest of the page has nobody to leave it to, and comes again.
                    Err(Error::NotNow { .. }) if now.is_some() && scratch.may_wait() => self.slots.lock(shared),
                    locked => locked.map_err(|error| error.of_page(index))?,
                };
                may_be_shared(shared.word().entry()).then(|| self.load_slot(&mut shared, page, now, scratch))
            }
        };
        match found {
            Some(result) => result.map_err(|error| error.of_page(index)),
            None => Err(self.found_corrupt(slot)),
        }
    }

    /// For recovery: counts a word that names a shared slot. Returns whether there can be a page.
    pub(super) fn adopt_reference(&self, index: u32, reference: Reference) -> bool {
        let shared = reference.by(index).filter(|&shared| self.slots.is_shared(shared));
        let Some((shared, word)) = shared.and_then(|shared| Some((shared, self.slots.peek(shared)?))) else {
            return false;
        };
        let is_page = may_be_shared(word.entry());
        if is_page {
            self.references.found(shared);
        }
        is_page
    }

    /// For recovery, when all words that may name it are counted: empties a shared slot that nobody names. Returns whether one
    /// does.
    pub(super) fn adopt_shared(&self, slot: &mut Slot<'_>) -> bool {
        let named = self.references.is_named(slot.index());
        match named {
            true => self.metrics.shared_pages.add(1),
            // What it names is no more live than that of any word that was replaced.
            false if slot.word().entry() != Entry::Empty => drop(slot.publish(Entry::Empty, None)),
            false => {}
        }
        named
    }
}

/// Whether a shared slot that is named can hold this.
fn may_be_shared(entry: Entry) -> bool {
    !matches!(entry, Entry::Empty | Entry::SameFilled(_) | Entry::Shared(_))
}
