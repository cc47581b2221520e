//! Cleaning: what still lives in sparse segments of the backing disk moves together into new ones, so that the old ones
//! can be written anew.
//!
//! An old segment is read as a whole, without a lock. Each object in it that a slot still names is decrypted and added
//! to the new segment. That is written; and then, under the lock of each slot, the new location takes the place of the
//! old one, if the slot's word is still the one that was seen. The old segment is not written anew before it is
//! released, so that the word cannot come back meanwhile; and who reads there has the slot locked. What cannot be read
//! or verified stays where it is, for a reader to find out.
//!
//! What fits is moved, from as many old segments as it takes to fill the new one: so that none is written half empty,
//! and none for nothing.

use super::disk::Writeback;
use super::writeback::Shrinker;
use super::Store;
use crate::backing::{CleanBuffer, Purpose, Victim, Writer, MAX_RECORDS};
use crate::error::{Error, Result};
use crate::slots::{Entry, Word};

/// Old segments that go into a new one at most: it is written then even if it is not full.
const MAX_VICTIMS: usize = 16;
/// Old segments that must go into a new one that does not get full: fewer would gain nothing.
const WORTH_VICTIMS: usize = 2;

/// What a thread needs to clean, made once: it allocates nothing afterwards.
pub struct Cleaner {
    writer: Writer,
    old: CleanBuffer,
    /// The words that name the old records: as many as the writer has new ones, and in their order.
    words: Vec<Word>,
    /// Old segments that were gone through: they are free when the new one is published.
    done: Vec<Victim>,
}

impl Cleaner {
    /// Allocates about half a MiB, touched. Errors: [`Error::System`].
    pub fn new() -> Result<Cleaner> {
        let mut words = vec![Word::default(); MAX_RECORDS];
        words.clear();
        Ok(Cleaner { writer: Writer::new()?, old: CleanBuffer::new()?, words, done: Vec::with_capacity(MAX_VICTIMS) })
    }
}

impl Store {
    /// Fills one new segment with what lives in sparse ones. Returns whether it gained something: then there may be
    /// more.
    ///
    /// Waits for the disk; page operations go on meanwhile, and always win. Allocates nothing. Errors: as
    /// [`Store::write_back`]; every page is still where its slot says.
    pub fn clean(&self, cleaner: &mut Cleaner) -> Result<bool> {
        let Some(writeback) = &self.writeback else { return Ok(false) };
        // Given up last, when all that this one has written is published: see [`Store::destroy`].
        let Some(_pass) = writeback.cleanings.enter() else { return Ok(false) };
        self.metrics.cleanings_in_flight.add(1);
        let result = self.fill_one(writeback, cleaner);
        self.metrics.cleanings_in_flight.sub(1);
        // Those who found the disk full.
        writeback.pressure.shrinkers.wake();
        result
    }

    /// Another chance for the disk, from time to time: for one that has failed, if it takes a segment of zeros, and for
    /// the segments that were left alone because they could not be written or read. Returns whether the disk has failed
    /// and is written to again.
    ///
    /// Waits for the disk. Allocates nothing. Errors: [`Error::DiskWrite`]: it cannot be written yet.
    pub fn try_disk_again(&self, cleaner: &mut Cleaner) -> Result<bool> {
        self.try_again(&mut cleaner.writer)
    }

    /// The same when somebody asks for it.
    ///
    /// Errors: [`Error::DiskWrite`], [`Error::BudgetUsedUp`]: the disk has failed, and is not written to. Also
    /// [`Error::NoWriteback`] without a disk, or at the end.
    pub fn resume_writeback(&self, shrinker: &mut Shrinker) -> Result<()> {
        self.try_again(&mut shrinker.writer)?;
        match &self.writeback {
            Some(all) if all.cleanings.is_closed() => Err(Error::NoWriteback),
            // Not tried at all.
            Some(all) if all.backing.is_failed() => Err(Error::BudgetUsedUp),
            all => all.as_ref().map(|_| ()).ok_or(Error::NoWriteback),
        }
    }

    fn try_again(&self, writer: &mut Writer) -> Result<bool> {
        let Some(writeback) = &self.writeback else { return Ok(false) };
        let Some(_pass) = writeback.cleanings.enter() else { return Ok(false) };
        if !writeback.backing.is_failed() {
            writeback.backing.give_segments_another_chance();
            return Ok(false);
        }
        writer.probe(&writeback.backing)?;
        self.look_at_pressure();
        Ok(!writeback.backing.is_failed())
    }

    fn fill_one(&self, writeback: &Writeback, cleaner: &mut Cleaner) -> Result<bool> {
        let backing = &writeback.backing;
        let Some(first) = backing.victim() else { return Ok(false) };
        if let Err(error) = cleaner.writer.begin(backing, Purpose::Clean) {
            backing.put_back(first);
            return Err(error);
        }
        let (mut next, mut unfinished) = (Some(first), None);
        while let Some(victim) = next {
            match self.gather(writeback, cleaner, &victim) {
                Ok(()) => cleaner.done.push(victim),
                Err(Full) => {
                    unfinished = Some(victim);
                    break;
                }
            }
            next = if cleaner.done.len() < MAX_VICTIMS { backing.victim() } else { None };
        }
        let worth_it = cleaner.done.len() >= WORTH_VICTIMS || unfinished.is_some();
        let result = match () {
            () if cleaner.words.is_empty() => Ok(true),
            () if worth_it => self.publish_copies(writeback, cleaner).map(|()| true),
            () => Ok(false),
        };
        cleaner.words.clear();
        cleaner.writer.finish(backing);
        for victim in cleaner.done.drain(..) {
            match result {
                Ok(true) => backing.release(victim),
                _ => backing.put_back(victim),
            }
        }
        // Less lives in it now.
        unfinished.into_iter().for_each(|victim| backing.put_back(victim));
        result
    }

    /// Adds what lives in an old segment to the new one.
    fn gather(&self, writeback: &Writeback, cleaner: &mut Cleaner, victim: &Victim) -> std::result::Result<(), Full> {
        let Cleaner { writer, old, words, .. } = cleaner;
        if old.read(&writeback.backing, victim).is_err() {
            return Ok(());
        }
        while let Some(record) = old.next_record() {
            // A hint: the slot is not locked.
            let names =
                |word: &Word| (word.entry(), word.generation()) == (Entry::Disk(record.location), record.generation);
            let Some(word) = self.slots.peek(record.slot).filter(names) else { continue };
            let Some(object) = old.object(&writeback.backing) else { continue };
            writer.add(&writeback.backing, record.slot, word.generation_after(1), object).ok_or(Full)?;
            words.push(word);
        }
        Ok(())
    }

    /// Writes the new segment, and makes slots name it that still name what was copied.
    fn publish_copies(&self, writeback: &Writeback, cleaner: &mut Cleaner) -> Result<()> {
        let Cleaner { writer, words, .. } = cleaner;
        writer.write(&writeback.backing)?;
        for (record, &word) in writer.records().iter().zip(words.iter()) {
            let mut slot = self.slots.lock(record.slot);
            if slot.word() == word {
                // This frees the old record.
                self.publish(&mut slot, Entry::Disk(record.location), word.dictionary());
            } else {
                writeback.backing.free(record.location);
            }
        }
        Ok(())
    }
}

/// The new segment has room for no more.
struct Full;
