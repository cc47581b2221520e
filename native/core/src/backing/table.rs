//! Which segments of the disk are free, and how much lives in the others. Knows no disk.
//!
//! ```text
//! FREE ── take ──> FILLING ── finish ──> SEALED ── victim ──> CLEANING ── release, put_back
//!   ^                 │ write failed        │ last record freed    │ not empty though all of it was looked at
//!   └── nothing live ─┴──> RETIRED          └──> FREE              └──> RETIRED
//! ```
//!
//! A RETIRED segment is not written and not cleaned. It is free again when its last record is; and from time to time all
//! of them are given another chance.
//!
//! **What cleaning may cost.** To move what is live in a segment that is `u` full costs `u` and gains `1 - u`. Cleaning
//! begins when few segments are free, with those that are at most 60 % live ([`SPARSE`]). When there is none left to
//! evict to, it goes up to 80 % ([`DENSE`]): never more than four bytes are written again for a byte of room. And it
//! only begins if what may be cleaned fills, moved together, at least one segment less than before. What decides is not
//! what lives in a segment but what that weighs: whole clusters are moved as they are, but the pages of others one by one,
//! and then take more room.

use super::record::{DiskLocation, MAX_RECORD, UNIT};
use super::{Purpose, SEGMENT_BYTES};
use crate::error::{Error, Result};
use std::ops::{Index, IndexMut, Range};

/// Segments kept back for cleaning: it fills one before it frees any.
const RESERVE: u32 = 1;
/// Two to write to, and the reserve: two sparse segments can be made one.
pub const MIN_SEGMENTS: u32 = 3;
/// Cleaning begins below this share of free segments, or this many.
const ENOUGH_SHARE: u32 = 16;
const ENOUGH: u32 = 4;
/// Groups of sealed segments by what is live in them: n holds those above `n - 1`, at most `n` of so many parts.
const GROUPS: usize = 20;
/// The fullest group that is cleaned ahead of need: 60 % live.
const SPARSE: usize = GROUPS * 60 / 100;
/// The fullest group that is cleaned when no segment is left: 80 % live.
const DENSE: usize = GROUPS * 80 / 100;
/// A segment takes at least this much before a record does not fit.
const FILLED: u64 = (SEGMENT_BYTES - MAX_RECORD + UNIT) as u64;
/// So many failed writes, one after the other, and the disk counts as failed. Those that were under way at the same time
/// count once: it is one trouble that has hit them.
const ERRORS: u32 = 3;

/// Of a segment. More only if damaged words name its records several times.
const MOST_WEIGHT: u32 = SEGMENT_BYTES as u32 / 2 * 3;

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Free,
    Filling,
    Sealed,
    Cleaning,
    Retired,
}

#[derive(Clone, Default)]
pub struct Segment {
    state: State,
    /// Bytes of records that slots name, or are about to. Invariant: whoever holds a record holds its bytes here.
    live: u32,
    /// What they weigh ([`DiskLocation::weight`]): about what they will take when the segment has been cleaned.
    weight: u32,
    /// Bytes of all records that it was written with.
    written: u32,
    /// Neighbours in the list of its state and group.
    next: u32,
    previous: u32,
}

impl Segment {
    /// The list it belongs to, if any.
    fn list(&self) -> Option<usize> {
        match self.state {
            State::Free => Some(FREE),
            State::Retired => Some(RETIRED),
            State::Sealed => Some((self.weight as usize * GROUPS).div_ceil(SEGMENT_BYTES).clamp(1, GROUPS)),
            State::Filling | State::Cleaning => None,
        }
    }
}

/// Lists of segments: those of the groups have the groups' numbers (1 and up), as a sealed segment is never empty.
const FREE: usize = 0;
const RETIRED: usize = GROUPS + 1;
const LISTS: usize = GROUPS + 2;

#[derive(Clone, Copy)]
struct List {
    first: u32,
    last: u32,
    count: u32,
    /// Of all its segments together.
    weight: u64,
}

/// Guarded by the lock `Backing`. Nothing here allocates but `new`, and nothing takes longer for a larger disk but
/// `new` and `give_another_chance`.
pub struct Table {
    segments: Box<[Segment]>,
    lists: [List; LISTS],
    live: u64,
    /// Segments that are CLEANING.
    cleaning: u32,
    errors_in_a_row: u32,
    failed: bool,
    /// Bytes that may still be written, and what those who are filling a segment may take of that.
    budget: Option<u64>,
    promised: u64,
}

impl Table {
    pub fn new(segments: u32) -> Table {
        let empty = List { first: NONE, last: NONE, count: 0, weight: 0 };
        let mut table = Table {
            segments: vec![Segment::default(); segments as usize].into(),
            lists: [empty; LISTS],
            live: 0,
            cleaning: 0,
            errors_in_a_row: 0,
            failed: false,
            budget: None,
            promised: 0,
        };
        (0..segments).for_each(|index| table.enlist(index));
        table
    }

    pub fn free_segments(&self) -> u32 {
        self.lists[FREE].count
    }

    pub fn live_bytes(&self) -> u64 {
        self.live
    }

    pub fn is_failed(&self) -> bool {
        self.failed
    }

    pub fn budget(&self) -> Option<u64> {
        self.budget
    }

    pub fn set_budget(&mut self, bytes: Option<u64>) {
        self.budget = bytes;
    }

    fn has_budget(&self) -> bool {
        self.budget.is_none_or(|bytes| bytes >= self.promised + SEGMENT_BYTES as u64)
    }

    /// A free segment, to be filled, with the promise of as much budget.
    pub fn take(&mut self, purpose: Purpose) -> Result<u32> {
        let kept_back = match purpose {
            Purpose::Evict => RESERVE,
            Purpose::Clean => 0,
        };
        if self.failed {
            return Err(Error::NoWriteback);
        }
        if !self.has_budget() {
            return Err(Error::BudgetUsedUp);
        }
        if self.free_segments() <= kept_back {
            return Err(Error::BackingFull);
        }
        let index = self.lists[FREE].first;
        self.set_state(index, State::Filling);
        self.promised += SEGMENT_BYTES as u64;
        Ok(index)
    }

    /// So many bytes are about to be written to a segment that was taken. Returns what [`Table::write_failed`] is to be
    /// told.
    pub fn writing(&mut self, bytes: u64) -> u32 {
        self.promised -= SEGMENT_BYTES as u64;
        self.budget = self.budget.map(|left| left.saturating_sub(bytes));
        self.errors_in_a_row
    }

    /// All records of the segment are live.
    pub fn written(&mut self, index: u32, records: u32, weight: u32) {
        self.errors_in_a_row = 0;
        let segment = &mut self[index];
        (segment.live, segment.written, segment.weight) = (records, records, weight);
        self.live += u64::from(records);
    }

    /// The segment is no longer the writer's. It is not tried again soon, unless the cleaner has no other. `errors` is
    /// what [`Table::writing`] has returned: if there was another error since then, this one is of the same trouble.
    pub fn write_failed(&mut self, index: u32, errors: u32) {
        if self.errors_in_a_row <= errors {
            self.errors_in_a_row += 1;
        }
        self.failed |= self.errors_in_a_row >= ERRORS;
        let spared = self.free_segments() < RESERVE + 1;
        self.set_state(index, if spared { State::Free } else { State::Retired });
    }

    /// The writer is through with the segment.
    pub fn finish(&mut self, index: u32) {
        self.set_state(index, State::Sealed);
    }

    /// A slot names this record, in a table in which all was free. Its segment was written at least up to its end. False,
    /// with nothing changed, if it does not lie in one segment.
    pub fn adopt(&mut self, at: DiskLocation) -> bool {
        let Range { start, end } = at.bytes();
        let (index, begin) = (start / SEGMENT_BYTES as u64, start / SEGMENT_BYTES as u64 * SEGMENT_BYTES as u64);
        if index >= self.segments.len() as u64 || start == end || end - begin > SEGMENT_BYTES as u64 {
            return false;
        }
        let index = index as u32;
        self.unlist(index);
        let segment = &mut self[index];
        let before = segment.live;
        segment.state = State::Sealed;
        segment.written = segment.written.max((end - begin) as u32);
        // Damaged words may name a record twice.
        segment.live = (before + at.share()).min(segment.written);
        segment.weight = segment.weight.saturating_add(at.weight()).min(MOST_WEIGHT);
        self.live += u64::from(self[index].live - before);
        self.enlist(index);
        true
    }

    /// A record is dead.
    ///
    /// A damaged slot word may name bytes that are no record, or another one's: then a segment may come to be free, and
    /// be written again, while a record in it lives. That one does not open any more, and costs its page, as the
    /// damaged word has cost its own; but it never reads as something else.
    pub fn free(&mut self, at: DiskLocation) {
        let index = at.bytes().start / SEGMENT_BYTES as u64;
        let Some(segment) = self.segments.get(index as usize) else { return };
        let (live, freed) = (segment.live, at.share().min(segment.live));
        if freed > 0 {
            self.live -= u64::from(freed);
            self.unlist(index as u32);
            let segment = &mut self[index as u32];
            segment.live = live - freed;
            segment.weight = if segment.live > 0 { segment.weight.saturating_sub(at.weight()) } else { 0 };
            if segment.live == 0 && matches!(segment.state, State::Sealed | State::Retired) {
                segment.state = State::Free;
            }
            self.enlist(index as u32);
        }
    }

    /// Whether records can be written, now or after cleaning.
    pub fn has_room(&self) -> bool {
        let room = self.free_segments() > RESERVE || self.may_clean(DENSE);
        room && !self.failed && self.has_budget()
    }

    /// A segment worth cleaning, which is then CLEANING, and its records' bytes.
    pub fn victim(&mut self) -> Option<u32> {
        let victim = self.next_victim()?;
        self.set_state(victim, State::Cleaning);
        self.cleaning += 1;
        Some(victim)
    }

    /// The one that [`Table::victim`] would give: of the emptiest group, the one that has been in it longest.
    pub fn next_victim(&self) -> Option<u32> {
        let enough = (self.segments.len() as u32 / ENOUGH_SHARE).max(ENOUGH);
        // The one that is being filled for it stood for room when cleaning began.
        let free = self.free_segments() + u32::from(self.cleaning > 0);
        let fullest = match free {
            _ if free <= RESERVE => DENSE,
            // A small disk is not kept half empty for that.
            _ if free < enough.min(self.segments.len() as u32 / 2) => SPARSE,
            _ => return None,
        };
        // Who is cleaning has been promised what it writes next.
        let has_budget = self.cleaning > 0 || self.has_budget();
        if self.failed || !has_budget || !self.may_clean(fullest) {
            return None;
        }
        self.lists[1..=fullest].iter().map(|list| list.first).find(|&first| first != NONE)
    }

    /// Whether cleaning is under way, which then goes on until there is as much room as was hoped for; or can begin,
    /// with a segment to fill, and would make at least one less of the segments of these groups.
    fn may_clean(&self, fullest: usize) -> bool {
        let groups = &self.lists[1..=fullest];
        let (count, weight) =
            groups.iter().fold((0, 0), |(count, weight), list| (count + u64::from(list.count), weight + list.weight));
        self.cleaning > 0 || self.free_segments() > 0 && weight + FILLED <= count * FILLED
    }

    /// Ends a cleaning; `done` if all of the segment was looked at. Returns whether it is free.
    pub fn end_cleaning(&mut self, index: u32, done: bool) -> bool {
        self.cleaning -= 1;
        let empty = self[index].live == 0;
        self.set_state(index, if done && !empty { State::Retired } else { State::Sealed });
        empty
    }

    /// Bytes of all records that the segment was written with.
    pub fn written_bytes(&self, index: u32) -> u32 {
        self[index].written
    }

    pub fn fail(&mut self) {
        self.failed = true;
    }

    /// A free segment of a disk that has failed, to be written and finished, to see whether it is well again. None
    /// without budget.
    pub fn probe(&mut self) -> Option<u32> {
        let index = Some(self.lists[FREE].first).filter(|&index| index != NONE && self.failed && self.has_budget())?;
        self.set_state(index, State::Filling);
        self.promised += SEGMENT_BYTES as u64;
        Some(index)
    }

    /// The disk is well again, and all of its segments are, as far as is known.
    pub fn resume(&mut self) {
        (self.failed, self.errors_in_a_row) = (false, 0);
        self.give_another_chance();
    }

    /// Segments that were left alone are written and cleaned again.
    pub fn give_another_chance(&mut self) {
        while self.lists[RETIRED].first != NONE {
            self.set_state(self.lists[RETIRED].first, State::Sealed);
        }
    }

    /// A sealed segment that holds nothing is free.
    fn set_state(&mut self, index: u32, state: State) {
        self.unlist(index);
        let segment = &mut self[index];
        segment.state = if state == State::Sealed && segment.live == 0 { State::Free } else { state };
        self.enlist(index);
    }

    /// That lists and sums are what the segments say.
    #[cfg(all(test, not(feature = "model")))]
    pub fn check(&self) {
        for (n, list) in self.lists.iter().enumerate() {
            let members: Vec<_> =
                (0u32..).zip(&self.segments).filter(|(_, segment)| segment.list() == Some(n)).collect();
            let weight: u64 = members.iter().map(|(_, segment)| u64::from(segment.weight)).sum();
            assert_eq!((list.count as usize, list.weight), (members.len(), weight), "list {n}");
            let listed = |at| Some(at).filter(|&at| at != NONE);
            let mut listed: Vec<u32> = std::iter::successors(listed(list.first), |&at| listed(self[at].next)).collect();
            listed.sort_unstable();
            assert_eq!(listed, members.iter().map(|(index, _)| *index).collect::<Vec<_>>(), "list {n}");
        }
        assert_eq!(self.live, self.segments.iter().map(|segment| u64::from(segment.live)).sum::<u64>());
        assert!(self.segments.iter().all(|segment| segment.live <= segment.written || segment.state == State::Free));
        assert!(self.segments.iter().all(|segment| (segment.live == 0) == (segment.weight == 0)));
        assert_eq!(self.cleaning as usize, self.segments.iter().filter(|s| s.state == State::Cleaning).count());
    }

    /// Puts a segment at the end of its list.
    fn enlist(&mut self, index: u32) {
        let Some(n) = self[index].list() else { return };
        let (last, weight) = (self.lists[n].last, self[index].weight);
        (self[index].previous, self[index].next) = (last, NONE);
        match last {
            NONE => self.lists[n].first = index,
            last => self[last].next = index,
        }
        let list = &mut self.lists[n];
        (list.last, list.count, list.weight) = (index, list.count + 1, list.weight + u64::from(weight));
    }

    fn unlist(&mut self, index: u32) {
        let Some(n) = self[index].list() else { return };
        let Segment { previous, next, weight, .. } = self[index];
        match previous {
            NONE => self.lists[n].first = next,
            previous => self[previous].next = next,
        }
        match next {
            NONE => self.lists[n].last = previous,
            next => self[next].previous = previous,
        }
        let list = &mut self.lists[n];
        (list.count, list.weight) = (list.count - 1, list.weight - u64::from(weight));
    }
}

impl Index<u32> for Table {
    type Output = Segment;
    fn index(&self, index: u32) -> &Segment {
        &self.segments[index as usize]
    }
}

impl IndexMut<u32> for Table {
    fn index_mut(&mut self, index: u32) -> &mut Segment {
        &mut self.segments[index as usize]
    }
}
