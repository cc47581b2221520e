//! Eviction: pages leave the pool for the backing disk, a segment at a time.
//!
//! 1. A victim comes from the list of pages ([`crate::lru`]), rotated, as a bare slot index; or from a walk over all
//!    slots.
//! 2. Under the lock of its slot, which alone makes the index mean something: if the slot names an object, that is
//!    pinned, verified, copied into the shrinker's segment (encrypted), and the word becomes WRITEBACK.
//! 3. The segment is written. No lock is held. The pages are read from the pool, overwritten and punched meanwhile.
//! 4. For each page, under the lock of its slot: if the word is still the one of step 2, it becomes DISK; else the
//!    record is dead. Either way the object is freed, by the shrinker: whoever took the WRITEBACK word away has left
//!    it.
//!
//! If the segment could not be written, the words of step 2 become POOL again.
//!
//! Pages that are cold go four at a time, if they can: see `cluster.rs`.

use super::cluster::{is_first, Packer};
use super::disk::Writeback;
use super::Store;
use crate::backing::{DiskLocation, Purpose, Writer, MAX_RECORDS};
use crate::dictionaries::Place;
use crate::error::{Error, Result};
use crate::object::{self, HEADER_SIZE};
use crate::page::CLUSTER_PAGES;
use crate::pool::Location;
use crate::slots::{Entry, Word};
use crate::sync::Ordering::Relaxed;
use std::time::Instant;

/// What a thread needs to write pages back, made once: it allocates nothing afterwards.
pub struct Shrinker {
    pub(super) writer: Writer,
    pub(super) taken: Vec<Taken>,
    /// Of who makes clusters.
    pub(super) packer: Option<Box<Packer>>,
}

/// A page in writeback. Its object is the shrinker's to free.
#[derive(Clone, Copy)]
pub(super) struct Taken {
    pub slot: u32,
    /// The slot's, as the shrinker has published it.
    pub word: Word,
    pub object: Location,
    /// Of the pool, that the object takes.
    pub bytes: u64,
    /// What the word is to name.
    pub record: DiskLocation,
    /// Which the record takes. Of a cluster, it is counted for this page until that is published, or not.
    pub dictionary: Option<Place>,
}

impl Shrinker {
    /// Allocates about 400 KiB, touched. Errors: [`Error::System`].
    pub fn new() -> Result<Shrinker> {
        // Written once, so that it is resident.
        let nothing = Taken {
            slot: u32::MAX,
            word: Word::default(),
            object: Location::from_units(u64::MAX),
            bytes: u64::MAX,
            record: DiskLocation::from_bits(0),
            dictionary: None,
        };
        let mut taken = vec![nothing; MAX_RECORDS];
        taken.clear();
        Ok(Shrinker { writer: Writer::new()?, taken, packer: None })
    }

    /// As [`Shrinker::new`], for one that makes clusters of pages that are cold. Allocates about 600 KiB more.
    pub fn with_clusters() -> Result<Shrinker> {
        Ok(Shrinker { packer: Some(Box::new(Packer::new()?)), ..Shrinker::new()? })
    }
}

/// Which pages are to be written back. The policy for incompressible pages holds for all but the last three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The coldest pages, until so many bytes of the pool are free.
    Coldest {
        bytes: u64,
    },
    All,
    /// Those marked as idle: see [`Store::mark_idle`].
    Idle,
    /// Those that nobody has used for so many seconds, marked or not.
    Unused {
        seconds: u32,
    },
    /// Those that are incompressible.
    Huge,
    /// Those that are incompressible, and marked as idle.
    HugeIdle,
    /// One slot's.
    Page(u32),
}

impl What {
    /// Whether these are pages that nobody is expected to want soon: then it is worth some effort to have them small.
    fn is_cold(self) -> bool {
        matches!(self, What::Idle | What::Unused { .. })
    }
}

/// Something to be written back, and how far that has come.
#[derive(Debug)]
pub struct Job {
    what: What,
    /// Where the walk over all slots goes on.
    next: u64,
    /// Pages that went to the disk.
    pub pages: u64,
    /// Bytes of the pool that were freed.
    pub bytes: u64,
}

impl Job {
    pub fn new(what: What) -> Job {
        Job { what, next: 0, pages: 0, bytes: 0 }
    }
}

impl Store {
    /// Writes pages back, one segment of them at most. Returns whether the job is to be gone on with.
    ///
    /// Waits for the disk; page operations go on meanwhile, and always win. Allocates nothing. Several shrinkers may be
    /// at work. Errors: [`Error::NoWriteback`] without a disk that works, or when it was stopped;
    /// [`Error::BackingFull`]: the cleaner was woken, and may make room; [`Error::BudgetUsedUp`]; [`Error::DiskWrite`].
    /// No page is lost, and the job may be gone on with another time.
    pub fn write_back(&self, shrinker: &mut Shrinker, job: &mut Job) -> Result<bool> {
        let writeback = self.writeback.as_ref().ok_or(Error::NoWriteback)?;
        // Given up last, when all that this one has taken is published and freed: see [`Store::destroy`].
        let Some(_pass) = writeback.writebacks.enter() else { return Err(Error::NoWriteback) };
        // Before it may take the last segment that is free: who finds none then finds this. See `can_make_room`.
        writeback.pressure.writing.fetch_add(1, Relaxed);
        let begun = shrinker.writer.begin(&writeback.backing, Purpose::Evict);
        if writeback.backing.wants_cleaning() {
            writeback.pressure.cleaners.wake();
        }
        if let Err(error) = begun {
            writeback.pressure.writing.fetch_sub(1, Relaxed);
            return Err(error);
        }
        self.metrics.writebacks_in_flight.add(1);
        let more = self.fill(writeback, shrinker, job);
        let result = match shrinker.taken.is_empty() {
            true => Ok(()),
            false => self.write_segment(writeback, shrinker, job),
        };
        shrinker.writer.finish(&writeback.backing);
        self.metrics.writebacks_in_flight.sub(1);
        writeback.pressure.writing.fetch_sub(1, Relaxed);
        result.map(|()| more)
    }

    /// Steps 1 and 2, until the segment is full or there are no more. Returns whether there may be more.
    fn fill(&self, writeback: &Writeback, shrinker: &mut Shrinker, job: &mut Job) -> bool {
        let lru = &writeback.lru;
        match job.what {
            What::Coldest { bytes } => {
                let (mut pass, mut taken) = (lru.pass(), job.bytes);
                while taken < bytes {
                    let Some(index) = lru.next(&mut pass) else { return false };
                    match self.take(writeback, shrinker, index) {
                        Ok(object) => taken += object,
                        Err(Full) => return true,
                    }
                }
                false
            }
            What::All | What::Idle | What::Unused { .. } | What::Huge | What::HugeIdle => {
                let now = writeback.seconds(Instant::now());
                let goes = |index| match job.what {
                    What::Idle => lru.is_idle(index) && lru.may_go(lru.is_raw(index)),
                    What::Unused { seconds } => lru.is_unused(index, seconds, now) && lru.may_go(lru.is_raw(index)),
                    What::Huge => lru.is_raw(index),
                    What::HugeIdle => lru.is_raw(index) && lru.is_idle(index),
                    _ => lru.is_listed(index) && lru.may_go(lru.is_raw(index)),
                };
                let makes_clusters = shrinker.packer.is_some() && job.what.is_cold();
                while job.next < self.slots.all().end {
                    let index = job.next as u32;
                    let mut group = job.next..job.next + CLUSTER_PAGES as u64;
                    let next = group.end;
                    let together = makes_clusters
                        && is_first(index)
                        && next <= self.slots()
                        && group.all(|slot| goes(slot as u32) && !lru.is_raw(slot as u32));
                    let taken = match together {
                        true => self.take_cluster(writeback, shrinker, index),
                        false if goes(index) => self.take(writeback, shrinker, index).map(|_| ()),
                        false => Ok(()),
                    };
                    if taken.is_err() {
                        return true;
                    }
                    job.next = if together { next } else { job.next + 1 };
                }
                false
            }
            What::Page(index) => u64::from(index) < self.slots() && self.take(writeback, shrinker, index).is_err(),
        }
    }

    /// Step 2: takes a page into the segment, if the slot still is what it was taken for. Returns how many bytes of the
    /// pool its object takes; 0 if there is none to take.
    fn take(&self, writeback: &Writeback, shrinker: &mut Shrinker, index: u32) -> std::result::Result<u64, Full> {
        if shrinker.taken.len() == shrinker.taken.capacity() {
            return Err(Full);
        }
        let mut slot = self.slots.lock(index);
        let (entry, pinned) = self.pin(&slot);
        let Entry::Pool(object) = entry else {
            if entry.object().is_none() {
                // It went before we had the lock, and is off the list already; but for a damaged word.
                writeback.lru.remove(index);
            }
            return Ok(0);
        };
        // SAFETY: as in `load_slot`.
        let bytes = pinned.as_ref().map_or(&[][..], |pinned| unsafe { pinned.bytes() });
        let (taken, length) = (bytes.len() as u64, object::verify(bytes, index).map(|(_, payload)| payload.len()));
        let Some(length) = length else {
            drop(pinned);
            let _a_reader_is_told = self.found_corrupt(&mut slot);
            return Ok(0);
        };
        let old = slot.word();
        // What the word of step 4 will be.
        let generation = old.generation_after(2);
        let record =
            shrinker.writer.add(&writeback.backing, index, generation, &bytes[..HEADER_SIZE + length]).ok_or(Full)?;
        // Nobody moves it: it is pinned, and then no longer POOL.
        let ours = slot.publish_over(old, Entry::Writeback(object));
        debug_assert!(ours, "slot {index} was changed while it was locked, and its object pinned");
        let (word, dictionary) = (slot.word(), old.dictionary());
        shrinker.taken.push(Taken { slot: index, word, object, bytes: taken, record, dictionary });
        Ok(taken)
    }

    /// Steps 3 and 4.
    fn write_segment(&self, writeback: &Writeback, shrinker: &mut Shrinker, job: &mut Job) -> Result<()> {
        let Shrinker { writer, taken, .. } = shrinker;
        let written = writer.write(&writeback.backing);
        for page in taken.drain(..) {
            let mut slot = self.slots.lock(page.slot);
            let ours = slot.word() == page.word;
            match (&written, ours) {
                (Ok(()), true) => {
                    self.publish(&mut slot, Entry::Disk(page.record), page.dictionary);
                    self.metrics.pages_written_back.add(1);
                    job.pages += 1;
                }
                (Ok(()), false) => writeback.backing.free(page.record),
                (Err(_), true) => {
                    slot.publish(Entry::Pool(page.object), page.word.dictionary());
                }
                (Err(_), false) => {}
            }
            drop(slot);
            if page.record.is_cluster() {
                self.dictionaries.discount(page.dictionary);
            }
            if written.is_ok() || !ours {
                self.free_object(page.object);
                job.bytes += page.bytes;
            }
        }
        written
    }
}

/// The segment has room for no more.
pub(super) struct Full;
