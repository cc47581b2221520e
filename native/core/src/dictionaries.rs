//! The dictionaries that pages are compressed with: up to four versions, which outlive the process in the state.
//!
//! Each has a place, and a serial number: the newest is what pages are compressed with, the others are kept for those
//! that were. Slot words name the place, whether the page lies in the pool or on the disk, and so how many need it is
//! known at any time, and after a crash. It goes when that is none. The payload names the version too (the serial
//! number's last byte): with another dictionary it would decode to something else.
//!
//! A place lies in the state file: the dictionary, and behind it what decompresses with it, made anew by whoever opens the
//! state, where its memory is already. Serial number, length and checksum stand in the header of the state; the serial
//! number is written last, and goes first.

use crate::codec::dictionary::{Decoder, DECODER_BYTES, MAX_BYTES};
use crate::crash::crash_point;
use crate::error::{Error, Result};
use crate::page::PAGE_SIZE;
use crate::state::State;
use crate::sync::Ordering::{AcqRel, Acquire};
use crate::sync::{AtomicBool, AtomicU64 as Count};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64_with_seed;

pub const PLACES: usize = 4;
const DECODER_AT: usize = MAX_BYTES;
/// Of the state file.
pub const PLACE_BYTES: usize = DECODER_AT + DECODER_BYTES;
const _: () = assert!(MAX_BYTES % PAGE_SIZE == 0 && PLACE_BYTES % PAGE_SIZE == 0);

/// Where a dictionary is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(u8);

/// No place has this number.
#[derive(Debug)]
pub struct NoPlace;

impl Place {
    fn of_serial(serial: u64) -> Place {
        Place((serial % PLACES as u64) as u8)
    }

    fn index(self) -> usize {
        usize::from(self.0)
    }

    /// As slot words have it, in three bits.
    pub fn to_bits(place: Option<Place>) -> u64 {
        place.map_or(0, |Place(n)| u64::from(n) + 1)
    }

    pub fn from_bits(bits: u64) -> std::result::Result<Option<Place>, NoPlace> {
        match bits.checked_sub(1) {
            None => Ok(None),
            Some(n) if n < PLACES as u64 => Ok(Some(Place(n as u8))),
            Some(_) => Err(NoPlace),
        }
    }
}

/// What the header of the state says of a place.
#[derive(Default)]
#[repr(C)]
pub struct Header {
    /// 0: the place is free.
    serial: AtomicU64,
    length: AtomicU64,
    /// Of the serial number, and of the dictionary.
    checksum: AtomicU64,
}

/// See the module. What reads a page takes no lock.
pub struct Dictionaries {
    state: Arc<State>,
    /// Slots whose word names a place. Invariant: never less, whatever else happens; one that is about to be published is
    /// counted before, one that was replaced after.
    users: [Count; PLACES],
    /// What was found is made ready.
    ready: [AtomicBool; PLACES],
}

/// A dictionary, as of now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// 0: the place is free.
    pub serial: u64,
    pub bytes: u64,
    /// Pages that take it to be read.
    pub pages: u64,
}

impl Dictionaries {
    pub fn new(state: Arc<State>) -> Dictionaries {
        Dictionaries { state, users: Default::default(), ready: Default::default() }
    }

    fn places() -> impl Iterator<Item = Place> {
        (0..PLACES as u8).map(Place)
    }

    fn header(&self, place: Place) -> &Header {
        &self.state.dictionary_headers()[place.index()]
    }

    fn serial(&self, place: Place) -> u64 {
        self.header(place).serial.load(Ordering::Acquire)
    }

    /// The bytes of a dictionary.
    ///
    /// # Safety
    /// Nobody writes to the place, or gives it up, while they are used.
    unsafe fn bytes(&self, place: Place) -> &[u8] {
        let length = (self.header(place).length.load(Ordering::Relaxed) as usize).min(MAX_BYTES);
        // SAFETY: inside the place; the caller's promise.
        unsafe { std::slice::from_raw_parts(self.state.dictionary(place.index()).as_ptr(), length) }
    }

    fn decoder_memory(&self, place: Place) -> *mut u64 {
        // SAFETY: inside the place.
        unsafe { self.state.dictionary(place.index()).as_ptr().add(DECODER_AT).cast() }
    }

    /// What decompresses a page whose slot word names this place. None: the dictionary is no more.
    ///
    /// # Safety
    /// It may be used only while the word stays (its slot is locked), or while nobody calls [`Dictionaries::install`] or
    /// [`Dictionaries::retire`].
    pub unsafe fn decoder(&self, place: Option<Place>) -> Option<Decoder<'_>> {
        let place = place.filter(|place| self.ready[place.index()].load(Acquire))?;
        // SAFETY: it was made there when the place was made ready, and stays while a word names it: see `retire`.
        unsafe { Decoder::found(self.decoder_memory(place), self.serial(place) as u8) }
    }

    /// Whether pages that name this place can be read.
    pub fn is_ready(&self, place: Place) -> bool {
        self.ready[place.index()].load(Acquire)
    }

    pub fn count(&self, place: Option<Place>) {
        if let Some(place) = place {
            self.users[place.index()].fetch_add(1, AcqRel);
        }
    }

    /// Takes back what was counted. Release order: who finds none left finds nobody at the dictionary any more.
    pub fn discount(&self, place: Option<Place>) {
        if let Some(place) = place {
            let before = self.users[place.index()].fetch_sub(1, AcqRel);
            debug_assert!(before > 0, "a dictionary that nobody counted");
        }
    }

    /// What pages are to be compressed with: place, serial number and bytes.
    ///
    /// # Safety
    /// As of [`Dictionaries::decoder`].
    pub unsafe fn newest(&self) -> Option<(Place, u64, &[u8])> {
        let ready = Self::places().filter(|&place| self.is_ready(place));
        let place = ready.max_by_key(|&place| self.serial(place))?;
        // SAFETY: the caller's promise.
        Some((place, self.serial(place), unsafe { self.bytes(place) }))
    }

    pub fn is_newest(&self, place: Place) -> bool {
        Self::places().all(|other| self.serial(other) <= self.serial(place))
    }

    /// Whether a dictionary has to go before there can be another one.
    pub fn is_in_the_way(&self, place: Place) -> bool {
        Self::places().all(|other| self.serial(other) >= self.serial(place)) && self.serial(place) > 0
    }

    pub fn installed(&self) -> [Installed; PLACES] {
        std::array::from_fn(|n| {
            let place = Place(n as u8);
            match self.serial(place) {
                0 => Installed::default(),
                serial => Installed {
                    serial,
                    bytes: self.header(place).length.load(Ordering::Relaxed),
                    pages: self.users[n].load(Acquire),
                },
            }
        })
    }

    /// Makes a dictionary the newest, and returns its serial number. Takes memory, and may wait for it; one at a time, and
    /// never beside [`Dictionaries::retire`].
    ///
    /// Errors, with nothing changed: [`Error::Invalid`] if it is none; [`Error::System`] (EBUSY) if pages still need all
    /// that there are.
    pub fn install(&self, bytes: &[u8]) -> Result<u64> {
        if bytes.is_empty() || bytes.len() > MAX_BYTES {
            return Err(Error::Invalid(format!("a dictionary of {} bytes: use 1 to {MAX_BYTES}", bytes.len())));
        }
        let newest = Self::places().map(|place| self.serial(place)).max().unwrap_or(0);
        let next = (newest + 1..=newest + PLACES as u64).find(|&serial| self.serial(Place::of_serial(serial)) == 0);
        let serial = next.ok_or_else(|| Error::System {
            what: "pages still need all the dictionaries that there are",
            source: io::Error::from_raw_os_error(libc::EBUSY),
        })?;
        let place = Place::of_serial(serial);
        self.state.populate_dictionary(place.index(), 0..bytes.len())?;
        self.state.populate_dictionary(place.index(), DECODER_AT..PLACE_BYTES)?;
        let header = self.header(place);
        // SAFETY: the place is free, so that it is ours alone, and large enough.
        unsafe {
            self.state.dictionary(place.index()).as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
        header.length.store(bytes.len() as u64, Ordering::Relaxed);
        header.checksum.store(checksum(serial, bytes), Ordering::Relaxed);
        if !self.make_ready(place, serial) {
            return Err(Error::Invalid("zstd does not take it for a dictionary".into()));
        }
        crash_point("dictionary: before its serial number");
        header.serial.store(serial, Ordering::Release);
        self.ready[place.index()].store(true, crate::sync::Ordering::Release);
        crash_point("dictionary: after its serial number");
        Ok(serial)
    }

    /// Gives up those that are not the newest, and that no page needs. Returns how many. When none is newer, the newest
    /// stays. One at a time; nobody else may be at an object that no slot names but that takes a dictionary.
    pub fn retire(&self) -> usize {
        let unneeded = |&place: &Place| {
            self.serial(place) > 0 && !self.is_newest(place) && self.users[place.index()].load(Acquire) == 0
        };
        Self::places().filter(unneeded).map(|place| self.give_up(place)).count()
    }

    fn give_up(&self, place: Place) {
        self.ready[place.index()].store(false, crate::sync::Ordering::Release);
        self.header(place).serial.store(0, Ordering::Release);
        crash_point("dictionary: given up");
        self.state.forget_dictionary(place.index());
    }

    /// Makes what the process before has left ready; alone. What is damaged is given up. Returns how many were.
    pub fn recover(&self) -> u64 {
        let mut damaged = 0;
        for place in Self::places() {
            let serial = self.serial(place);
            if serial == 0 {
                continue;
            }
            let header = self.header(place);
            let length = header.length.load(Ordering::Relaxed);
            // SAFETY: nobody else is at work.
            let bytes = unsafe { self.bytes(place) };
            let whole = Place::of_serial(serial) == place
                && bytes.len() as u64 == length
                && header.checksum.load(Ordering::Relaxed) == checksum(serial, bytes);
            if whole && self.make_ready(place, serial) {
                self.ready[place.index()].store(true, crate::sync::Ordering::Release);
            } else {
                damaged += 1;
                self.give_up(place);
            }
        }
        damaged
    }

    fn make_ready(&self, place: Place, serial: u64) -> bool {
        // SAFETY: the place is not in use yet; its memory is large enough, and stays as it is while it is in use.
        unsafe { Decoder::digest(self.bytes(place), serial as u8, self.decoder_memory(place)) }.is_some()
    }

    /// Bytes of memory that all of them take.
    pub fn memory_bytes(&self) -> u64 {
        let bytes = |installed: &Installed| match installed.bytes.next_multiple_of(PAGE_SIZE as u64) {
            0 => 0,
            bytes => bytes + DECODER_BYTES as u64,
        };
        self.installed().iter().map(bytes).sum()
    }
}

fn checksum(serial: u64, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, serial)
}
