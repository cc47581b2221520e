//! Clusters: cold pages of four neighbouring slots go to the disk in one record, and come back from there one by one.
//!
//! The four are compressed together, with more effort than pages are while they may still be wanted, and with the newest
//! dictionary, if there is one at hand. So only those are that somebody calls cold: by their age, or as idle. Under
//! pressure no processor time is spent, and objects go as they lie.
//!
//! 1. All four slots of an aligned group are to go. Each is taken as for recompression: under its lock, its word becomes
//!    WRITEBACK, and the object is ours.
//! 2. No lock of a page is held while they are decompressed and compressed. If that saves little, or one of the four is not
//!    there any more, they go one by one.
//! 3. The record and the words are written as all others (`writeback.rs`): each word is compared and published for itself,
//!    and of those that are not the record's share is free at once.

use super::disk::Writeback;
use super::recompress::{self, thread_time, LEVELS};
use super::writeback::{Full, Shrinker, Taken};
use super::Store;
use crate::backing::cluster::{first_of, member_of, set_generations, split, CLUSTER, GENERATIONS};
use crate::backing::{record_bytes, DiskLocation, MAX_CLUSTER};
use crate::codec::Codecs;
use crate::dictionaries::Place;
use crate::error::{Error, Result};
use crate::object::{self, HEADER_SIZE};
use crate::page::{Cluster, Page, CLUSTER_PAGES, PAGE_SIZE};
use crate::scratch::Scratch;
use crate::slots::Slot;

/// Of zstd, without a dictionary.
const LEVEL: i32 = 9;
/// A cluster has to be smaller than its pages' own records by one part of so many: it costs something to be read, and to
/// be taken apart.
const GAIN: usize = 16;

/// What a shrinker needs to make clusters: it allocates nothing afterwards.
pub(super) struct Packer {
    codecs: Codecs,
    pages: Box<Cluster>,
    object: Box<[u8]>,
}

impl Packer {
    /// Allocates about 600 KiB, touched. Errors: as [`Codecs::new`].
    pub fn new() -> Result<Packer> {
        Ok(Packer {
            codecs: Codecs::for_clusters(*LEVELS.end())?,
            pages: cluster(),
            object: vec![1; MAX_CLUSTER].into(),
        })
    }
}

/// Room for a cluster's pages: written once, and so resident.
pub(crate) fn cluster() -> Box<Cluster> {
    Box::new([[1; PAGE_SIZE]; CLUSTER_PAGES])
}

/// The pages of the last cluster that a worker has read, for those that the same request asks for next.
pub(crate) struct LastCluster {
    /// Where it lies, and how many segments had been written before it was read. Invariant: it is used only as long as no
    /// more have been, as [`crate::backing::ReadBuffer`] is.
    held: Option<(DiskLocation, u64)>,
    generations: [u16; CLUSTER_PAGES],
    pages: Box<Cluster>,
}

impl LastCluster {
    pub fn new() -> LastCluster {
        LastCluster { held: None, generations: [0; CLUSTER_PAGES], pages: cluster() }
    }

    pub fn forget(&mut self) {
        self.held = None;
    }
}

impl Store {
    /// Takes the pages of a group of slots, of which `first` is the first, into the segment: together, if that saves
    /// something, else one by one; those of them that are still there. Full: there is no room, and all stay.
    pub(super) fn take_cluster(
        &self,
        writeback: &Writeback,
        shrinker: &mut Shrinker,
        first: u32,
    ) -> std::result::Result<(), Full> {
        let Shrinker { writer, taken, packer: Some(packer) } = shrinker else { return Ok(()) };
        if taken.capacity() - taken.len() < CLUSTER_PAGES {
            return Err(Full);
        }
        let slots: [u32; CLUSTER_PAGES] = std::array::from_fn(|n| first + n as u32);
        let pages = slots.map(|slot| self.take_for_recompression(slot));
        let alone: usize = pages.iter().flatten().map(|page| record_bytes(HEADER_SIZE + page.length)).sum();
        if writer.room() < alone {
            slots
                .iter()
                .zip(&pages)
                .for_each(|(&slot, page)| page.iter().for_each(|page| self.leave_taken(slot, page)));
            return Err(Full);
        }
        let begun = thread_time();
        let packed = match &pages {
            [Some(a), Some(b), Some(c), Some(d)] => self.pack(packer, slots, [a, b, c, d], alone - alone / GAIN),
            _ => None,
        };
        self.metrics.cluster_ns.add(thread_time().saturating_sub(begun).as_nanos() as u64);
        // There is room: it is shorter than four records.
        let together = packed.and_then(|(length, place)| {
            Some((writer.add(&writeback.backing, first, CLUSTER, &packer.object[..length])?, place))
        });
        for (slot, page) in slots.into_iter().zip(pages) {
            let Some(page) = page else { continue };
            let (record, dictionary) = match together {
                Some(together) => together,
                None => {
                    let length = HEADER_SIZE + page.length;
                    let generation = page.word.generation_after(1);
                    let add = |object: &[u8]| writer.add(&writeback.backing, slot, generation, &object[..length]);
                    // SAFETY: it is ours, and is not moved: the word says WRITEBACK, or nobody knows it any more.
                    let Some(record) = unsafe { self.pool.with_object(page.object, add) }.flatten() else {
                        self.leave_taken(slot, &page);
                        continue;
                    };
                    (record, page.word.dictionary())
                }
            };
            taken.push(Taken {
                slot,
                word: page.word,
                object: page.object,
                bytes: page.bytes as u64,
                record,
                dictionary,
            });
        }
        Ok(())
    }

    /// Step 2: makes the packer's object, whose record is shorter than `most`. Returns how long the object is, and which
    /// dictionary it takes, which is counted for each page: until somebody publishes or gives up the page.
    fn pack(
        &self,
        packer: &mut Packer,
        slots: [u32; CLUSTER_PAGES],
        pages: [&recompress::Taken; CLUSTER_PAGES],
        most: usize,
    ) -> Option<(usize, Option<Place>)> {
        let Packer { codecs, pages: decoded, object } = packer;
        // Whoever has it installs no dictionary, and gives up none.
        let turn = self.recompression.turn.lock();
        for ((slot, taken), page) in slots.into_iter().zip(pages).zip(decoded.iter_mut()) {
            // SAFETY: it is our turn.
            let dictionary = unsafe { self.dictionaries.decoder(taken.word.dictionary()) };
            let decode = |object: &[u8]| {
                object::verify(object, slot)
                    .is_some_and(|(codec, payload)| codecs.decompress(codec, payload, page, dictionary))
            };
            // SAFETY: as in `take_cluster`.
            if unsafe { self.pool.with_object(taken.object, decode) } != Some(true) {
                // It was used meanwhile, or who reads it is told.
                return None;
            }
        }
        // SAFETY: it is our turn.
        let newest = unsafe { self.dictionaries.newest() }.map(|(place, serial, _)| (place, serial));
        let encoder = turn.as_deref().filter(|(place, serial, _)| newest == Some((*place, *serial)));
        let longest = object.len().min(most.checked_sub(record_bytes(0))?);
        let (head, payload) = object.get_mut(..longest)?.split_at_mut_checked(GENERATIONS)?;
        set_generations(head, pages.map(|page| page.word.generation_after(1)));
        let length = codecs.compress_cluster(decoded, LEVEL, encoder.map(|(.., encoder)| encoder), payload)?;
        let place = encoder.map(|(place, ..)| *place);
        pages.iter().for_each(|_| self.dictionaries.count(place));
        Some((GENERATIONS + length, place))
    }

    /// Reads the page of a slot out of its cluster, from the disk or from what was read of it last. The slot stays locked.
    ///
    /// Errors: as [`crate::backing::Backing::read`].
    pub(super) fn load_member(
        &self,
        writeback: &Writeback,
        slot: &Slot<'_>,
        at: DiskLocation,
        page: &mut Page,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Scratch { codecs, disk, cluster: LastCluster { held, generations, pages }, .. } = scratch;
        let (index, word) = (slot.index(), slot.word());
        let (member, written) = (member_of(index), writeback.backing.segments_written());
        if *held != Some((at, written)) || generations[member] != word.generation() {
            *held = None;
            let object = writeback.backing.read(at, index, word.generation(), disk)?;
            let corrupt = Error::Corrupt { slot: index };
            let Some((found, payload)) = split(object) else { return Err(corrupt) };
            // SAFETY: used while the slot is locked, whose word names it.
            let dictionary = unsafe { self.dictionaries.decoder(word.dictionary()) };
            if !codecs.decompress_cluster(payload, pages, word.dictionary().is_some(), dictionary) {
                return Err(corrupt);
            }
            (*held, *generations) = (Some((at, written)), found);
        }
        page.copy_from_slice(&pages[member]);
        Ok(())
    }
}

/// Whether a slot is the first of its group.
pub(super) fn is_first(slot: u32) -> bool {
    first_of(slot) == slot
}
