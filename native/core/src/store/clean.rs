//! Cleaning: what still lives in sparse segments of the backing disk moves together into new ones, so that the old ones
//! can be written anew.
//!
//! An old segment is read as a whole, without a lock. Each object in it that a slot still names is decrypted and added
//! to the new segment. That is written; and then, under the lock of each slot, the new location takes the place of the
//! old one, if the slot's word is still the one that was seen. The old segment is not written anew before it is
//! released, so that the word cannot come back meanwhile; and who reads there has the slot locked. What cannot be read
//! or verified stays where it is, for a reader to find out.
//!
//! A cluster of whose pages all still live is moved as it is, with new generations. Of others those that live are taken out,
//! and become records of their own: dead ones are not moved round and round.
//!
//! What fits is moved, from as many old segments as it takes to fill the new one: so that none is written half empty,
//! and none for nothing.

use super::cluster::cluster;
use super::disk::Writeback;
use super::writeback::{Full, Shrinker};
use super::Store;
use crate::backing::cluster::{set_generations, split, CLUSTER};
use crate::backing::{CleanBuffer, DiskLocation, Purpose, Record, Victim, Writer, MAX_CLUSTER, MAX_RECORDS};
use crate::codec::{Algorithm, Codecs, Compression};
use crate::dictionaries::Place;
use crate::error::{Error, Result};
use crate::object::{self, HEADER_SIZE};
use crate::page::{Cluster, CLUSTER_PAGES};
use crate::slots::{Entry, Word};

/// Old segments that go into a new one at most: it is written then even if it is not full.
const MAX_VICTIMS: usize = 16;
/// Old segments that must go into a new one that does not get full: fewer would gain nothing.
const WORTH_VICTIMS: usize = 2;

/// What pages that leave their cluster are compressed with: it takes little time, and they may still be cold.
const ALONE: Compression = Compression { algorithm: Algorithm::Zstd, zstd_level: 3 };

/// What a thread needs to clean, made once: it allocates nothing afterwards.
pub struct Cleaner {
    writer: Writer,
    old: CleanBuffer,
    moved: Vec<Moved>,
    clusters: Clusters,
    /// Old segments that were gone through: they are free when the new one is published.
    done: Vec<Victim>,
}

/// A page whose record has a copy.
#[derive(Clone, Copy)]
struct Moved {
    slot: u32,
    /// That names the old record.
    word: Word,
    /// What the word is to name, and which dictionary that takes.
    record: DiskLocation,
    dictionary: Option<Place>,
}

/// What it takes to seal a cluster anew, or to take it apart.
struct Clusters {
    codecs: Codecs,
    pages: Box<Cluster>,
    object: Box<[u8]>,
}

impl Cleaner {
    /// Allocates about 700 KiB, touched. Errors: [`Error::System`]; as [`Codecs::new`].
    pub fn new() -> Result<Cleaner> {
        let nothing =
            Moved { slot: u32::MAX, word: Word::default(), record: DiskLocation::from_bits(0), dictionary: None };
        let mut moved = vec![nothing; MAX_RECORDS];
        moved.clear();
        Ok(Cleaner {
            writer: Writer::new()?,
            old: CleanBuffer::new()?,
            moved,
            clusters: Clusters {
                codecs: Codecs::up_to(ALONE.zstd_level)?,
                pages: cluster(),
                object: vec![1; MAX_CLUSTER].into(),
            },
            done: Vec::with_capacity(MAX_VICTIMS),
        })
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
        // Pages of clusters, taken apart, may take more room than they had, whatever was expected.
        let too_much = cleaner.done.is_empty() && unfinished.is_some();
        let worth_it = cleaner.done.len() >= WORTH_VICTIMS || unfinished.is_some();
        let result = match () {
            () if too_much => Ok(false),
            () if cleaner.moved.is_empty() => Ok(true),
            () if worth_it => self.publish_copies(writeback, cleaner).map(|()| true),
            () => Ok(false),
        };
        cleaner.moved.clear();
        cleaner.writer.finish(backing);
        for victim in cleaner.done.drain(..) {
            match result {
                Ok(true) => backing.release(victim),
                _ => backing.put_back(victim),
            }
        }
        match unfinished {
            // It is left alone for a while: else it would be found, and be too much, again and again.
            Some(victim) if too_much => backing.release(victim),
            // Less lives in it now.
            Some(victim) => backing.put_back(victim),
            None => {}
        }
        result
    }

    /// Adds what lives in an old segment to the new one.
    fn gather(&self, writeback: &Writeback, cleaner: &mut Cleaner, victim: &Victim) -> std::result::Result<(), Full> {
        if cleaner.old.read(&writeback.backing, victim).is_err() {
            return Ok(());
        }
        while let Some(record) = cleaner.old.next_record() {
            if record.location.is_cluster() {
                self.gather_cluster(writeback, cleaner, &record)?;
                continue;
            }
            // A hint: the slot is not locked.
            let names =
                |word: &Word| (word.entry(), word.generation()) == (Entry::Disk(record.location), record.generation);
            let Some(word) = self.slots.peek(record.slot).filter(names) else { continue };
            let Cleaner { writer, old, moved, .. } = &mut *cleaner;
            let Some(object) = old.object(&writeback.backing) else { continue };
            let (slot, dictionary) = (record.slot, word.dictionary());
            let record = writer.add(&writeback.backing, slot, word.generation_after(1), object).ok_or(Full)?;
            moved.push(Moved { slot, word, record, dictionary });
        }
        Ok(())
    }

    /// As [`Store::gather`], of a cluster that was just found.
    fn gather_cluster(
        &self,
        writeback: &Writeback,
        cleaner: &mut Cleaner,
        found: &Record,
    ) -> std::result::Result<(), Full> {
        let Cleaner { writer, old, moved, clusters, .. } = cleaner;
        if moved.capacity() - moved.len() < CLUSTER_PAGES {
            return Err(Full);
        }
        let slots: [u32; CLUSTER_PAGES] = std::array::from_fn(|n| found.slot.wrapping_add(n as u32));
        // Hints: the slots are not locked.
        let names = |word: &Word| word.entry() == Entry::Disk(found.location);
        let words = slots.map(|slot| self.slots.peek(slot).filter(names));
        if words == [None; CLUSTER_PAGES] {
            return Ok(());
        }
        let Some((generations, payload)) = old.object(&writeback.backing).and_then(split) else { return Ok(()) };
        let live: [Option<Word>; CLUSTER_PAGES] =
            std::array::from_fn(|n| words[n].filter(|word| word.generation() == generations[n]));
        if let [Some(a), Some(b), Some(c), Some(d)] = live {
            let words = [a, b, c, d];
            let object = &mut clusters.object[..size_of_val(&generations) + payload.len()];
            let (head, rest) = object.split_at_mut(size_of_val(&generations));
            set_generations(head, words.map(|word| word.generation_after(1)));
            rest.copy_from_slice(payload);
            let record = writer.add(&writeback.backing, found.slot, CLUSTER, object).ok_or(Full)?;
            let copies = slots.into_iter().zip(words);
            moved.extend(copies.map(|(slot, word)| Moved { slot, word, record, dictionary: word.dictionary() }));
            return Ok(());
        }
        if !self.decode(clusters, slots, live, payload) {
            return Ok(());
        }
        let Clusters { codecs, pages, object } = clusters;
        for ((slot, page), word) in slots.into_iter().zip(pages.iter()).zip(live) {
            let Some(word) = word else { continue };
            let (codec, payload) = codecs.compress(page, ALONE);
            let object = &mut object[..HEADER_SIZE + payload.len()];
            object::write(object, slot, codec, payload);
            let record = writer.add(&writeback.backing, slot, word.generation_after(1), object).ok_or(Full)?;
            moved.push(Moved { slot, word, record, dictionary: None });
        }
        Ok(())
    }

    /// Decodes a cluster, for which a slot is locked that still names it: its dictionary is not given up meanwhile. Returns
    /// whether that went well.
    fn decode(
        &self,
        clusters: &mut Clusters,
        slots: [u32; CLUSTER_PAGES],
        live: [Option<Word>; CLUSTER_PAGES],
        payload: &[u8],
    ) -> bool {
        slots.into_iter().zip(live).any(|(index, word)| {
            let slot = self.slots.lock(index);
            if word != Some(slot.word()) {
                return false;
            }
            let place = slot.word().dictionary();
            // SAFETY: used while the slot is locked, whose word names it.
            let dictionary = unsafe { self.dictionaries.decoder(place) };
            clusters.codecs.decompress_cluster(payload, &mut clusters.pages, place.is_some(), dictionary)
        })
    }

    /// Writes the new segment, and makes slots name it that still name what was copied.
    fn publish_copies(&self, writeback: &Writeback, cleaner: &mut Cleaner) -> Result<()> {
        let Cleaner { writer, moved, .. } = cleaner;
        writer.write(&writeback.backing)?;
        for copy in moved.iter() {
            let mut slot = self.slots.lock(copy.slot);
            if slot.word() == copy.word {
                // This frees the old record.
                self.publish(&mut slot, Entry::Disk(copy.record), copy.dictionary);
            } else {
                writeback.backing.free(copy.record);
            }
        }
        Ok(())
    }
}
