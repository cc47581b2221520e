//! Recompression: pages that nobody uses are made smaller, with more effort than there was time for when they came.
//!
//! 1. Whom it may concern shows without a lock: the age of the page ([`crate::ages`]), and that its slot names an object.
//! 2. Under the lock of the slot, the object is verified, and the word becomes WRITEBACK: from here on the object is ours
//!    to free, is read where it lies, and is neither moved nor freed by others.
//! 3. No lock is held while it is decompressed and compressed. The page is read, overwritten and punched meanwhile.
//! 4. Under the lock of the slot: if the word is still the one of step 2, and the new object would lie in a smaller size
//!    class, it is inserted and published, and the old one freed. If it would not, the old one is published again. Who has
//!    taken the word away has won, and left the old object to us.
//!
//! What did not get smaller is not tried again for the same tier. A page whose dictionary is not the newest need not get
//! smaller, and may get larger when all places for dictionaries are in use and its is the oldest: an old one goes when no
//! page needs it.

use super::Store;
use crate::codec::dictionary::Encoder;
use crate::codec::{Codec, Codecs, Compression};
use crate::dictionaries::Place;
use crate::duplicates::Duplicates;
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::locks::{Rank, Ranked};
use crate::object::{self, HEADER_SIZE};
use crate::page::{Page, PAGE_SIZE};
use crate::pool::Location;
use crate::slots::{Entry, Word};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Arc;
use std::time::Duration;

/// Of zstd, that pages are recompressed with: above, effort and memory double, and the gain is a percent.
pub const LEVELS: std::ops::RangeInclusive<i32> = 1..=12;
/// Slots that are looked at between two looks at the clock.
const LOOKS: u64 = 512;

/// What a store has for who recompresses its pages.
pub(super) struct Recompression {
    /// Who is at it is inside; but for the gate, one at a time.
    pub gate: Gate,
    /// With what compresses with the newest dictionary, if somebody has made it.
    pub turn: Ranked<Option<Arc<Newest>>>,
    /// What each tier was last, as a number that is never 0.
    tiers: [AtomicU64; crate::ages::MAX_TIER as usize],
}

impl Default for Recompression {
    fn default() -> Recompression {
        let turn = Ranked::new(Rank::Recompression, None);
        Recompression { gate: Gate::new(), turn, tiers: Default::default() }
    }
}

/// What pages are recompressed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tier {
    /// 1 to [`crate::ages::MAX_TIER`]: pages are recompressed to higher ones only.
    pub number: u8,
    pub with: Compression,
    /// With the newest dictionary, for which the algorithm has to be zstd.
    pub dictionary: bool,
}

/// What is to be done at most.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    pub tier: Tier,
    /// Of pages, in ticks: those that are as old.
    pub age: u8,
    pub pages: u64,
    /// Of the calling thread.
    pub processor_time: Duration,
}

/// Why it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All slots were looked at since it began at the first.
    Done,
    /// As many pages, or as much processor time, as was ordered. The next call goes on from there.
    Budget,
    /// There is no room for the smaller object.
    Full,
    /// The store ends.
    Stopped,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recompressed {
    pub looked_at: u64,
    pub recompressed: u64,
    /// They stay as they are.
    pub not_smaller: u64,
    /// They are like another one, and share it from now on.
    pub shared: u64,
    /// By size class.
    pub saved_bytes: u64,
    pub processor_time: Duration,
    pub outcome: Outcome,
}

/// A dictionary's place and serial number, and what compresses with it.
pub(super) type Newest = (Place, u64, Encoder);

/// What a thread needs to recompress pages: it allocates nothing, but in [`Store::prepare`].
pub struct Recompressor {
    pub(super) codecs: Codecs,
    pub(super) page: Box<Page>,
    /// One that may be like it.
    pub(super) other: Box<Page>,
    pub(super) duplicates: Duplicates,
    encoder: Option<Arc<Newest>>,
    /// The slot to go on with.
    next: u64,
    /// The slot for a shared page to go on with.
    pub(super) next_shared: u64,
}

impl Recompressor {
    /// Allocates about 200 KiB. Errors: as [`Codecs::new`].
    pub fn new() -> Result<Recompressor> {
        Ok(Recompressor {
            codecs: Codecs::up_to(*LEVELS.end())?,
            page: Box::new([1; PAGE_SIZE]),
            other: Box::new([1; PAGE_SIZE]),
            duplicates: Duplicates::default(),
            encoder: None,
            next: 0,
            next_shared: 0,
        })
    }

    /// Has the next call begin at the first slot.
    pub fn begin_anew(&mut self) {
        (self.next, self.next_shared) = (0, 0);
    }
}

/// A page whose word says WRITEBACK for us.
pub(super) struct Taken {
    pub word: Word,
    pub object: Location,
    /// That it takes in the pool.
    pub bytes: usize,
    /// Of its payload.
    pub length: usize,
}

/// What has become of a page.
pub(super) enum Tried {
    /// By so many bytes of the pool.
    Smaller(usize),
    /// It has no object of its own any more.
    Shared,
    NotSmaller,
    /// It was used, or went.
    Gone,
    NoRoom,
}

impl Store {
    /// Has all pages grow a tick older, unless they are used. Looks at all slots that were ever used: some nanoseconds each.
    pub fn tick(&self) {
        self.empty_those_left();
        self.ages.tick(self.slots.touched(self.slots.all()));
    }

    /// Makes what a tier takes: to be called before [`Store::recompress`], whenever there is a newer dictionary too.
    /// Allocates for a dictionary. What was tried for this tier is forgotten, if it was another one then.
    ///
    /// Errors: [`Error::Invalid`]; [`Error::System`] (ENOENT): there is no dictionary.
    pub fn prepare(&self, recompressor: &mut Recompressor, tier: Tier) -> Result<()> {
        let mut turn = self.recompression.turn.lock();
        // What the last pages gave up, perhaps.
        self.dictionaries.retire();
        // SAFETY: it is our turn.
        let newest = unsafe { self.dictionaries.newest() }.filter(|_| tier.dictionary);
        let serial = match newest {
            None if tier.dictionary => {
                let source = io::Error::from_raw_os_error(libc::ENOENT);
                return Err(Error::System { what: "there is no dictionary", source });
            }
            None => 0,
            Some((place, serial, bytes)) => {
                let level = tier.with.zstd_level;
                let as_before = |(_, before, encoder): &Newest| (*before, encoder.level()) == (serial, level);
                if !recompressor.encoder.as_deref().is_some_and(as_before) {
                    // The old one first: they are large.
                    (recompressor.encoder, *turn) = (None, None);
                    self.metrics.encoder_bytes.set(0);
                    let encoder = Encoder::digest(bytes, serial as u8, level)
                        .ok_or_else(|| Error::Invalid("zstd does not take the dictionary".into()))?;
                    self.metrics.encoder_bytes.set(encoder.bytes() as u64);
                    recompressor.encoder = Some(Arc::new((place, serial, encoder)));
                }
                *turn = recompressor.encoder.clone();
                serial
            }
        };
        if !LEVELS.contains(&tier.with.zstd_level) {
            return Err(Error::Invalid(format!("zstd level {}: use 1 to 12", tier.with.zstd_level)));
        }
        let Some(last) = usize::from(tier.number).checked_sub(1).and_then(|n| self.recompression.tiers.get(n)) else {
            return Err(Error::Invalid(format!("there is no tier {}", tier.number)));
        };
        let this = serial << 16 | (tier.with.algorithm as u64) << 8 | (tier.with.zstd_level as u64 & 0xff) | 1 << 15;
        let before = last.swap(this, Relaxed);
        if before != this && before != 0 {
            self.ages.forget(self.slots.touched(self.slots.all()), tier.number);
        }
        Ok(())
    }

    /// Recompresses pages that are old enough, from where the last call has ended. Page operations go on meanwhile, and
    /// always win. Allocates nothing, touches no disk, waits for no memory (but in a pool without an adjuster); waits
    /// for another one that recompresses.
    ///
    /// To be called after [`Store::prepare`] with the same tier.
    pub fn recompress(&self, recompressor: &mut Recompressor, order: &Order) -> Recompressed {
        let begun = thread_time();
        let mut done = Recompressed {
            looked_at: 0,
            recompressed: 0,
            not_smaller: 0,
            shared: 0,
            saved_bytes: 0,
            processor_time: Duration::ZERO,
            outcome: Outcome::Stopped,
        };
        // Given up last, when nothing is ours any more: see [`Store::destroy`].
        let Some(_pass) = self.recompression.gate.enter() else { return done };
        let _turn = self.recompression.turn.lock();
        self.metrics.recompressions_in_flight.add(1);
        done.outcome = self.recompress_all(recompressor, order, begun, &mut done);
        done.processor_time = thread_time().saturating_sub(begun);
        self.metrics.recompressions_in_flight.sub(1);
        self.metrics.pages_recompressed.add(done.recompressed);
        self.metrics.pages_not_smaller.add(done.not_smaller);
        self.metrics.pages_deduplicated.add(done.shared);
        self.metrics.recompression_saved_bytes.add(done.saved_bytes);
        self.metrics.recompression_ns.add(done.processor_time.as_nanos() as u64);
        self.refresh_dictionary_gauges();
        done
    }

    fn recompress_all(
        &self,
        recompressor: &mut Recompressor,
        order: &Order,
        begun: Duration,
        done: &mut Recompressed,
    ) -> Outcome {
        self.empty_those_left();
        for index in self.slots.touched(recompressor.next..self.slots.all().end) {
            if self.recompression.gate.is_closed() {
                return Outcome::Stopped;
            }
            if done.recompressed + done.not_smaller + done.shared >= order.pages {
                return Outcome::Budget;
            }
            recompressor.next = u64::from(index) + 1;
            done.looked_at += 1;
            let (age, tried) = self.ages.get(index);
            let may_concern = age >= order.age && tried < order.tier.number && self.names_object(index);
            if may_concern {
                match self.recompress_page(recompressor, &order.tier, index) {
                    Tried::Smaller(bytes) => {
                        done.recompressed += 1;
                        done.saved_bytes += bytes as u64;
                    }
                    Tried::Shared => done.shared += 1,
                    Tried::NotSmaller => done.not_smaller += 1,
                    Tried::Gone => {}
                    Tried::NoRoom => return Outcome::Full,
                }
            }
            let look = may_concern || done.looked_at % LOOKS == 0;
            if look && thread_time().saturating_sub(begun) >= order.processor_time {
                return Outcome::Budget;
            }
        }
        recompressor.next = 0;
        Outcome::Done
    }

    fn names_object(&self, index: u32) -> bool {
        self.slots.peek(index).is_some_and(|word| matches!(word.entry(), Entry::Pool(_)))
    }

    fn recompress_page(&self, recompressor: &mut Recompressor, tier: &Tier, index: u32) -> Tried {
        let Some(taken) = self.take_for_recompression(index) else { return Tried::Gone };
        let Recompressor { codecs, page, .. } = recompressor;
        let whole = self.decode_taken(codecs, page, index, &taken);
        if let Some(shared) = whole.then(|| self.alike(recompressor, index, &taken)).flatten() {
            return if self.share(index, &taken, shared) { Tried::Shared } else { Tried::Gone };
        }
        // Who reads one that is damaged is told.
        let new = if whole { self.encode_again(recompressor, tier, &taken) } else { None };
        let mut slot = self.slots.lock(index);
        if slot.word() != taken.word {
            drop(slot);
            self.free_object(taken.object);
            return Tried::Gone;
        }
        let dictionary = taken.word.dictionary();
        let Some((codec, payload, place)) = new else {
            slot.publish(Entry::Pool(taken.object), dictionary);
            self.ages.tried(index, tier.number);
            return Tried::NotSmaller;
        };
        let fill = |object: &mut [u8]| object::write(object, index, codec, payload);
        let Ok(copy) = self.pool.insert(HEADER_SIZE + payload.len(), fill) else {
            slot.publish(Entry::Pool(taken.object), dictionary);
            return Tried::NoRoom;
        };
        self.count_object(codec, payload.len());
        // SAFETY: pinned, and published by us alone.
        let bytes = unsafe { copy.bytes() }.len();
        // What the word named is ours already.
        self.publish(&mut slot, Entry::Pool(copy.location()), place);
        drop(copy);
        if let Some(writeback) = &self.writeback {
            writeback.lru.compressed(index);
        }
        self.ages.tried(index, tier.number);
        drop(slot);
        self.free_object(taken.object);
        Tried::Smaller(taken.bytes.saturating_sub(bytes))
    }

    /// Step 2.
    pub(super) fn take_for_recompression(&self, index: u32) -> Option<Taken> {
        let mut slot = self.slots.lock(index);
        let (entry, pinned) = self.pin(&slot);
        let (Entry::Pool(object), Some(pinned)) = (entry, pinned) else { return None };
        // SAFETY: as in `load_slot`.
        let bytes = unsafe { pinned.bytes() };
        let (taken, length) = (bytes.len(), object::verify(bytes, index).map(|(_, payload)| payload.len()));
        let Some(length) = length else {
            drop(pinned);
            let _a_reader_is_told = self.found_corrupt(&mut slot);
            return None;
        };
        let old = slot.word();
        // Nobody moves it: it is pinned, and then no longer POOL.
        let ours = slot.publish_over(old, Entry::Writeback(object));
        debug_assert!(ours, "slot {index} was changed while it was locked, and its object pinned");
        Some(Taken { word: slot.word(), object, bytes: taken, length })
    }

    /// Step 3. Returns whether the page is whole.
    pub(super) fn decode_taken(&self, codecs: &mut Codecs, page: &mut Page, index: u32, taken: &Taken) -> bool {
        // SAFETY: it is our turn.
        let dictionary = unsafe { self.dictionaries.decoder(taken.word.dictionary()) };
        let decode = |object: &[u8]| {
            object::verify(object, index)
                .is_some_and(|(codec, payload)| codecs.decompress(codec, payload, page, dictionary))
        };
        // SAFETY: it is ours, and is not moved: the word says WRITEBACK, or nobody knows it any more.
        unsafe { self.pool.with_object(taken.object, decode) == Some(true) }
    }

    /// The new codec, payload and dictionary; None if that is no gain.
    fn encode_again<'a>(
        &self,
        recompressor: &'a mut Recompressor,
        tier: &Tier,
        taken: &Taken,
    ) -> Option<(Codec, &'a [u8], Option<Place>)> {
        let Recompressor { codecs, page, encoder, .. } = recompressor;
        let (codec, payload, place) = match (encoder.as_deref(), tier.dictionary) {
            (Some((place, _, encoder)), true) => {
                (Codec::ZstdDictionary, codecs.compress_with(page, encoder)?, Some(*place))
            }
            _ => {
                let (codec, payload) = codecs.compress(page, tier.with);
                (codec, payload, None)
            }
        };
        let bytes = self.pool.size_for(HEADER_SIZE + payload.len());
        let most = match taken.word.dictionary() {
            Some(old) if self.dictionaries.is_in_the_way(old) => usize::MAX,
            Some(old) if !self.dictionaries.is_newest(old) => taken.bytes,
            _ => taken.bytes - 1,
        };
        (bytes <= most).then_some((codec, payload, place))
    }

    /// Makes a dictionary the newest: see [`crate::dictionaries::Dictionaries::install`]. Gives up those that nobody needs.
    pub fn install_dictionary(&self, bytes: &[u8]) -> Result<u64> {
        let _turn = self.recompression.turn.lock();
        self.dictionaries.retire();
        let serial = self.dictionaries.install(bytes)?;
        self.dictionaries.retire();
        self.refresh_dictionary_gauges();
        Ok(serial)
    }

    pub(super) fn refresh_dictionary_gauges(&self) {
        for (gauges, installed) in self.metrics.dictionaries.iter().zip(self.dictionaries.installed()) {
            gauges.serial.set(installed.serial);
            gauges.bytes.set(installed.bytes);
            gauges.pages.set(installed.pages);
        }
        self.metrics.dictionary_bytes.set(self.dictionaries.memory_bytes());
    }

    /// Shows the contents of `most` pages of the pool that are at least so old, spread evenly over the swap file; of less, all
    /// that there are. Returns how many. They do not get younger by that. `start`, any number, says which ones.
    ///
    /// No lock of a page is held while `see` looks at it. Allocates nothing. Ends early when the store does, or when `see`
    /// returns false.
    pub fn sample_cold(
        &self,
        recompressor: &mut Recompressor,
        age: u8,
        most: u64,
        start: u64,
        mut see: impl FnMut(&Page) -> bool,
    ) -> u64 {
        let Some(_pass) = self.recompression.gate.enter() else { return 0 };
        let _turn = self.recompression.turn.lock();
        let Recompressor { codecs, page, .. } = recompressor;
        let cold = || {
            let all = self.slots.touched(self.slots.all());
            all.filter(|&index| self.ages.get(index).0 >= age && self.names_object(index))
        };
        let step = (cold().count() as u64).div_ceil(most.max(1)).max(1);
        let mut seen = 0;
        for index in cold().skip((start % step) as usize).step_by(step as usize).take(most as usize) {
            if self.recompression.gate.is_closed() {
                break;
            }
            let slot = self.slots.lock(index);
            let (_, object) = self.pin(&slot);
            // SAFETY: as in `load_slot`, both.
            let whole = object.is_some_and(|object| unsafe {
                let dictionary = self.dictionaries.decoder(slot.word().dictionary());
                object::verify(object.bytes(), index)
                    .is_some_and(|(codec, payload)| codecs.decompress(codec, payload, page, dictionary))
            });
            drop(slot);
            if whole {
                if !see(page) {
                    break;
                }
                seen += 1;
            }
        }
        seen
    }
}

/// Processor time of this thread.
pub(super) fn thread_time() -> Duration {
    // SAFETY: all-zero is a valid timespec.
    let mut time: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: writes to `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
