//! Which of the pages in the pool was used least recently: a list of slots, with a second chance.
//!
//! Every slot whose page is an object of the pool is on it, from the moment that it is published until it is something
//! else. It is a ring with a hand, as in a clock: the hand stands at the oldest page, and new ones are put in behind
//! it.
//!
//! **Rotate before unlock.** Who looks for a page to write back moves the hand on, and thereby the page to the ring's
//! end, before it gives up the lock; it takes nothing off the list and leaves with a bare slot index. As soon as the
//! lock is gone the page may be overwritten, punched, or written back by another shrinker. So the index is a hint: the
//! shrinker locks the slot and looks at its word before it believes anything. Only who changes the word takes the slot
//! off, with the slot locked; a shrinker that fails just leaves it, rotated. (After the kernel's `shrink_memcg_cb`.)
//!
//! A load only marks its page as used, without the lock; the hand passes over a marked page once, and clears the mark.

use crate::error::Result;
use crate::locks::{Rank, Ranked};
use crate::memory::{Zeroable, ZeroedTable};
use crate::metrics::SharedMetrics;
use crate::state::{State, Table};
// Not those of `sync`: marks order nothing, and decide nothing but whose turn it is.
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Entries that the hand passes at most before the lock is given up for a moment.
const BATCH: usize = 64;

/// What is noted of each slot: flags, and the second of its last use.
#[derive(Default)]
struct Note(AtomicU32);

// SAFETY: an atomic integer, valid when zero, no drop.
unsafe impl Zeroable for Note {}

/// It is on a list.
const LISTED: u32 = 1 << 31;
/// It has been read since the hand was here.
const USED: u32 = 1 << 30;
/// It has not been used since somebody marked what is idle.
const IDLE: u32 = 1 << 29;
/// Its page is incompressible.
const RAW: u32 = 1 << 28;
const SECONDS: u32 = RAW - 1;

/// Neighbours in the ring; they mean something for a slot that is on a list.
#[derive(Default)]
struct Link {
    next: u32,
    previous: u32,
}

// SAFETY: integers, valid when zero, no drop.
unsafe impl Zeroable for Link {}

#[derive(Clone, Copy, Default)]
struct Ring {
    /// Means something only while the ring is not empty.
    oldest: u32,
    length: u64,
}

struct Rings {
    links: ZeroedTable<Link>,
    /// Compressed and incompressible pages.
    rings: [Ring; 2],
}

/// What becomes of pages that do not get smaller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Incompressible {
    /// They stay in the pool, unless somebody asks for them to be written back.
    Keep,
    /// They are written back like any other.
    #[default]
    Writeback,
    /// They go before all others.
    First,
}

/// See the module. One lock, of rank `Lru`.
pub struct Lru {
    rings: Ranked<Rings>,
    /// The flags but LISTED and RAW change without the lock: see [`Lru::touch`].
    notes: ZeroedTable<Note>,
    incompressible: Incompressible,
    metrics: SharedMetrics,
}

/// How far a search for cold pages has come: it ends, even if all pages are used all the time.
pub struct Pass {
    /// Entries of each ring that are still to be seen, and with how few left marks count no more.
    left: [u64; 2],
    heeded: [u64; 2],
}

impl Lru {
    /// An empty list for the slots of a state. Takes address space, and memory as it is used.
    pub fn new(state: &State, incompressible: Incompressible, metrics: SharedMetrics) -> Result<Lru> {
        let rings = Rings { links: state.table(Table::Links)?, rings: [Ring::default(); 2] };
        let notes = state.table(Table::Notes)?;
        Ok(Lru { rings: Ranked::new(Rank::Lru, rings), notes, incompressible, metrics })
    }

    /// Takes memory for all slots, so that using the list faults no more. May wait for memory.
    pub fn populate(&self) -> Result<()> {
        let slots = 0..self.notes.len();
        self.notes.populate(slots.clone())?;
        self.rings.lock().links.populate(slots)
    }

    /// Bytes of links and notes.
    pub fn metadata_bytes(&self) -> u64 {
        (self.notes.len() * (size_of::<Link>() + size_of::<Note>())) as u64
    }

    /// Puts a slot at the end, as the youngest; from wherever it was. `now` in seconds, of any clock that goes on.
    ///
    /// To be called with the slot locked, as all that changes whether a slot is on the list.
    pub fn insert(&self, index: u32, raw: bool, now: u32) {
        let mut rings = self.rings.lock();
        self.unlink(&mut rings, index);
        let flags = LISTED | if raw { RAW } else { 0 };
        self.notes[index as usize].0.store(flags | now & SECONDS, Relaxed);
        rings.push(self.ring_of(flags), index);
    }

    /// The page of a slot on the list is not incompressible any more. It stays as old as it is; on another ring it is the
    /// oldest. To be called with the slot locked.
    pub fn compressed(&self, index: u32) {
        let mut rings = self.rings.lock();
        let note = self.notes[index as usize].0.fetch_and(!RAW, Relaxed);
        let [before, after] = [note, note & !RAW].map(|note| self.ring_of(note));
        if note & LISTED != 0 && before != after {
            rings.take(before, index);
            rings.push(after, index);
            rings.rings[after].oldest = index;
        }
    }

    /// Takes a slot off the list, if it is on it.
    pub fn remove(&self, index: u32) {
        self.unlink(&mut self.rings.lock(), index);
    }

    fn unlink(&self, rings: &mut Rings, index: u32) {
        let note = self.notes[index as usize].0.swap(0, Relaxed);
        if note & LISTED != 0 {
            rings.take(self.ring_of(note), index);
        }
        self.metrics.idle_pages.sub(u64::from(note & IDLE != 0));
    }

    fn ring_of(&self, note: u32) -> usize {
        usize::from(note & RAW != 0 && self.incompressible != Incompressible::Writeback)
    }

    /// Marks a slot on the list as used. To be called with the slot locked; takes no other lock.
    pub fn touch(&self, index: u32, now: u32) {
        let note = &self.notes[index as usize].0;
        let before = note.load(Relaxed);
        let after = before & (LISTED | RAW) | USED | now & SECONDS;
        if before != after && note.swap(after, Relaxed) & IDLE != 0 {
            self.metrics.idle_pages.sub(1);
        }
    }

    /// Marks as idle what has not been used for `age` seconds. Returns how many pages are idle now.
    pub fn mark_idle(&self, age: u32, now: u32) -> u64 {
        for notes in self.notes.chunks(BATCH) {
            // Nothing goes off the list meanwhile.
            let _rings = self.rings.lock();
            for Note(note) in notes {
                let seen = note.load(Relaxed);
                let old = (now & SECONDS).saturating_sub(seen & SECONDS) >= age;
                if seen & LISTED != 0 && old && note.fetch_or(IDLE, Relaxed) & IDLE == 0 {
                    self.metrics.idle_pages.add(1);
                }
            }
        }
        self.metrics.idle_pages.get()
    }

    /// Whether a slot is on the list, and was not used for `age` seconds. A hint, without the slot locked.
    pub fn is_unused(&self, index: u32, age: u32, now: u32) -> bool {
        let note = self.notes[index as usize].0.load(Relaxed);
        note & LISTED != 0 && (now & SECONDS).saturating_sub(note & SECONDS) >= age
    }

    /// Whether a slot is on the list, and marked as idle. A hint, without the slot locked.
    pub fn is_idle(&self, index: u32) -> bool {
        self.has(index, LISTED | IDLE)
    }

    /// Whether a slot is on the list, and its page incompressible. A hint, without the slot locked.
    pub fn is_raw(&self, index: u32) -> bool {
        self.has(index, LISTED | RAW)
    }

    /// Whether a slot is on the list. A hint, without the slot locked.
    pub fn is_listed(&self, index: u32) -> bool {
        self.has(index, LISTED)
    }

    fn has(&self, index: u32, flags: u32) -> bool {
        self.notes[index as usize].0.load(Relaxed) & flags == flags
    }

    /// Whether the policy lets a page be written back by itself.
    pub fn may_go(&self, raw: bool) -> bool {
        !(raw && self.incompressible == Incompressible::Keep)
    }

    /// Whether there is nothing that a [`Pass`] would find.
    pub fn is_empty(&self) -> bool {
        let rings = self.rings.lock();
        self.order().iter().all(|&ring| rings.rings[ring].length == 0)
    }

    /// The rings that are looked through, in order.
    fn order(&self) -> &'static [usize] {
        match self.incompressible {
            Incompressible::Keep | Incompressible::Writeback => &[0],
            Incompressible::First => &[1, 0],
        }
    }

    /// Begins a search for cold pages: one round on which used pages are passed over, and one that takes any.
    pub fn pass(&self) -> Pass {
        let lengths = self.rings.lock().rings.map(|ring| ring.length);
        Pass { left: lengths.map(|length| length * 2), heeded: lengths }
    }

    /// The next cold page, which is rotated to the end; None when the pass is over. See the module for what it is
    /// worth.
    pub fn next(&self, pass: &mut Pass) -> Option<u32> {
        for &ring in self.order() {
            while pass.left[ring] > 0 {
                let mut rings = self.rings.lock();
                for _ in 0..BATCH.min(pass.left[ring] as usize) {
                    let Some(index) = rings.rotate(ring) else {
                        pass.left[ring] = 0;
                        break;
                    };
                    pass.left[ring] -= 1;
                    let heed = pass.left[ring] >= pass.heeded[ring];
                    let used = self.notes[index as usize].0.fetch_and(!USED, Relaxed) & USED != 0;
                    if !(used && heed) {
                        return Some(index);
                    }
                }
            }
        }
        None
    }
}

impl Rings {
    /// Puts a slot behind the hand.
    fn push(&mut self, ring: usize, index: u32) {
        let ring = &mut self.rings[ring];
        ring.length += 1;
        if ring.length == 1 {
            ring.oldest = index;
            self.links[index as usize] = Link { next: index, previous: index };
            return;
        }
        let next = ring.oldest;
        let previous = std::mem::replace(&mut self.links[next as usize].previous, index);
        self.links[previous as usize].next = index;
        self.links[index as usize] = Link { next, previous };
    }

    fn take(&mut self, ring: usize, index: u32) {
        let Link { next, previous } = std::mem::take(&mut self.links[index as usize]);
        self.links[previous as usize].next = next;
        self.links[next as usize].previous = previous;
        let ring = &mut self.rings[ring];
        ring.length -= 1;
        if ring.oldest == index {
            ring.oldest = next;
        }
    }

    /// Moves the hand on, and returns where it was.
    fn rotate(&mut self, ring: usize) -> Option<u32> {
        let ring = &mut self.rings[ring];
        if ring.length == 0 {
            return None;
        }
        let index = ring.oldest;
        ring.oldest = self.links[index as usize].next;
        Some(index)
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests;
