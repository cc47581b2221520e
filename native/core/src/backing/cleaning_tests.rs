//! Space: what is counted, what is cleaned, and when a disk is full.

use super::record::record_bytes;
use super::tests::{object, Fixture};
use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const SEGMENT: u64 = SEGMENT_BYTES as u64;

/// A disk with what is on it, as the slots would name it.
struct Log {
    disk: Fixture,
    named: BTreeMap<u32, (Record, usize)>,
    next_slot: u32,
    cleaner: (Writer, CleanBuffer),
}

#[derive(Debug, PartialEq)]
enum Cleaned {
    /// There was nothing to do, or no more.
    Done,
    Unreadable,
    NotWritten,
}

impl Log {
    fn new(segments: usize, faults: &str) -> Log {
        let cleaner = (Writer::new().expect("a writer"), CleanBuffer::new().expect("a buffer"));
        Log { disk: Fixture::new(segments, true, faults), named: BTreeMap::new(), next_slot: 0, cleaner }
    }

    /// Writes new objects of this length, at most so many, into one segment. Returns how many.
    fn put(&mut self, length: usize, count: usize) -> Result<usize> {
        let Fixture { backing, writer, .. } = &mut self.disk;
        writer.begin(backing, Purpose::Evict)?;
        for slot in (self.next_slot..).take(count) {
            if writer.add(backing, slot, 0, &object(slot as usize, length)).is_none() {
                break;
            }
        }
        let written = writer.write(backing);
        let records = writer.records().to_vec();
        writer.finish(backing);
        written?;
        self.next_slot += count as u32;
        self.named.extend(records.iter().map(|&record| (record.slot, (record, length))));
        Ok(records.len())
    }

    fn free(&mut self, slot: u32) {
        let (record, _) = self.named.remove(&slot).expect("named");
        self.disk.backing.free(record.location);
    }

    /// Leaves every n-th of the slots.
    fn keep_every(&mut self, n: usize) {
        let slots: Vec<u32> = self.named.keys().copied().collect();
        slots.iter().enumerate().filter(|(i, _)| i % n > 0).for_each(|(_, &slot)| self.free(slot));
    }

    /// Cleans until there is nothing more to do.
    fn clean(&mut self) -> Cleaned {
        let mut moved = Vec::new();
        let mut victims: Vec<Victim> = Vec::new();
        loop {
            let backing = &self.disk.backing;
            let (writer, buffer) = (&mut self.cleaner.0, &mut self.cleaner.1);
            let Some(victim) = backing.victim() else {
                return self.publish(&mut moved, &mut victims);
            };
            if buffer.read(backing, &victim).is_err() {
                backing.release(victim);
                self.publish(&mut moved, &mut victims);
                return Cleaned::Unreadable;
            }
            while let Some(record) = buffer.next_record() {
                if self.named.get(&record.slot).is_none_or(|(named, _)| *named != record) {
                    continue;
                }
                let object = buffer.object(backing).expect("whole");
                loop {
                    if moved.is_empty() {
                        writer.begin(backing, Purpose::Clean).expect("a segment is kept back");
                    }
                    if writer.add(backing, record.slot, record.generation + 1, object).is_some() {
                        break moved.push(record);
                    }
                    // Full: as `publish`, which cannot borrow all of us now.
                    let Ok(()) = writer.write(backing) else {
                        backing.put_back(victim);
                        self.publish(&mut moved, &mut victims);
                        return Cleaned::NotWritten;
                    };
                    name(backing, &mut self.named, writer, &mut moved);
                    victims.drain(..).for_each(|victim| backing.release(victim));
                }
            }
            victims.push(victim);
        }
    }

    fn publish(&mut self, moved: &mut Vec<Record>, victims: &mut Vec<Victim>) -> Cleaned {
        let (backing, writer) = (&self.disk.backing, &mut self.cleaner.0);
        let written = writer.write(backing);
        match written {
            Ok(()) => {
                name(backing, &mut self.named, writer, moved);
                victims.drain(..).for_each(|victim| backing.release(victim));
                Cleaned::Done
            }
            Err(_) => {
                writer.finish(backing);
                moved.clear();
                victims.drain(..).for_each(|victim| backing.put_back(victim));
                Cleaned::NotWritten
            }
        }
    }

    /// That what is counted is what is there, and all of it can be read.
    fn check(&mut self) {
        let live: usize = self.named.values().map(|(_, length)| record_bytes(*length)).sum();
        assert_eq!(self.disk.live(), live as u64);
        self.disk.backing.table.lock().check();
        for (slot, (record, length)) in self.named.clone() {
            assert!(self.disk.read(record).expect("readable") == object(slot as usize, length));
        }
    }
}

/// Names the records that the writer has written instead of those that were moved.
fn name(backing: &Backing, named: &mut BTreeMap<u32, (Record, usize)>, writer: &mut Writer, moved: &mut Vec<Record>) {
    for (old, new) in moved.drain(..).zip(writer.records()) {
        named.get_mut(&old.slot).expect("named").0 = *new;
        backing.free(old.location);
    }
    writer.finish(backing);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against a list of what is named: nothing is lost, all is counted, and who cleans gains.
    #[test]
    fn what_is_named_stays_while_segments_are_freed_and_cleaned(
        segments in 3..12usize,
        steps in prop::collection::vec((0..8, 64..4106usize, any::<prop::sample::Index>()), 1..120),
    ) {
        let mut log = Log::new(segments, "");
        for (step, length, which) in steps {
            match step {
                0..4 => match log.put(length, 1 << which.index(9)) {
                    Ok(_) => {}
                    Err(error) => {
                        prop_assert!(matches!(error, Error::BackingFull));
                        prop_assert_eq!(log.disk.backing.has_room(), log.disk.backing.wants_cleaning());
                        prop_assert_eq!(log.disk.free_segments(), 1);
                    }
                },
                4..7 if !log.named.is_empty() => {
                    // A run of slots: what was written together often ends together.
                    let slots: Vec<u32> = log.named.keys().copied().collect();
                    let from = which.index(slots.len());
                    slots[from..].iter().take(length / 16).for_each(|&slot| log.free(slot));
                }
                _ => {
                    let (before, wanted) = (log.disk.free_segments(), log.disk.backing.wants_cleaning());
                    prop_assert_eq!(log.clean(), Cleaned::Done);
                    prop_assert_eq!(log.disk.free_segments() > before, wanted);
                }
            }
            let live: usize = log.named.values().map(|(_, length)| record_bytes(*length)).sum();
            prop_assert_eq!(log.disk.live(), live as u64);
            log.disk.backing.table.lock().check();
        }
        log.check();
    }

    /// The promise of `table.rs`: a disk is only full when at least 80 % of it lives, but for the reserve and what one
    /// more segment would hold.
    #[test]
    fn a_disk_is_full_when_it_is(segments in 3..20usize, length in 300..4106usize, dies in 2..6usize) {
        let mut log = Log::new(segments, "");
        for n in 0.. {
            if !log.disk.backing.has_room() {
                break;
            }
            prop_assert!(n < 10_000, "there is no end of room");
            let first = log.next_slot;
            match log.put(length, 1000) {
                // One in so many of them dies at once.
                Ok(count) => (first..).take(count).step_by(dies).for_each(|slot| log.free(slot)),
                Err(error) => {
                    prop_assert!(matches!(error, Error::BackingFull), "{error}");
                    prop_assert_eq!(log.clean(), Cleaned::Done);
                }
            }
        }
        prop_assert!(log.disk.live() >= SEGMENT * (segments as u64 - 2) * 8 / 10);
        prop_assert!(!log.disk.backing.wants_cleaning());
        log.check();
    }
}

#[test]
fn the_smallest_disk_is_cleaned() {
    let mut log = Log::new(3, "");
    for _ in 0..2 {
        log.put(4000, 1000).expect("room");
    }
    assert!(!log.disk.backing.has_room());
    log.keep_every(3);
    assert!(log.disk.backing.has_room(), "two segments of a third each can be made one");
    assert!(matches!(log.put(4000, 1), Err(Error::BackingFull)));
    assert_eq!(log.clean(), Cleaned::Done);
    assert_eq!((log.disk.free_segments(), log.disk.metrics.cleaned_segments.get()), (2, 2));
    log.put(4000, 1000).expect("room");
    log.check();
}

#[test]
fn nothing_is_cleaned_while_much_is_free_or_when_little_is_gained() {
    let mut log = Log::new(8, "");
    for _ in 0..4 {
        log.put(4000, 1000).expect("room");
    }
    log.keep_every(2);
    assert!(!log.disk.backing.wants_cleaning());
    // Now few are free: but one sparse segment alone is no segment less.
    let mut log = Log::new(3, "");
    log.put(4000, 1000).expect("room");
    log.keep_every(2);
    log.put(4000, 1000).expect("room");
    assert!(!log.disk.backing.wants_cleaning() && !log.disk.backing.has_room());
}

#[test]
fn dense_segments_are_cleaned_only_when_nothing_else_makes_room() {
    let mut log = Log::new(8, "");
    let mut put = |one_dies_of: u32| {
        let first = log.next_slot;
        let count = log.put(4000, 1000).expect("room") as u32;
        (first..first + count).filter(|slot| slot % 4 < one_dies_of).for_each(|slot| log.free(slot));
    };
    // Of four segments a quarter is dead, of two three quarters.
    [1, 1, 1, 1, 3, 3].into_iter().for_each(&mut put);
    assert_eq!(log.disk.free_segments(), 2);
    assert_eq!(log.clean(), Cleaned::Done);
    assert_eq!(log.disk.metrics.cleaned_segments.get(), 2);
    // Now they have to go.
    for _ in 0..2 {
        log.put(4000, 1000).expect("room");
    }
    assert_eq!(log.clean(), Cleaned::Done);
    assert_eq!((log.disk.free_segments(), log.disk.metrics.cleaned_segments.get()), (2, 6));
    log.check();
}

#[test]
fn a_segment_that_cannot_be_read_is_left_alone_and_the_others_are_cleaned() {
    let mut log = Log::new(6, "read:1:eio");
    for _ in 0..5 {
        log.put(4000, 1000).expect("room");
    }
    log.keep_every(4);
    assert_eq!(log.clean(), Cleaned::Unreadable);
    assert_eq!(log.disk.free_segments(), 1);
    assert_eq!(log.clean(), Cleaned::Done);
    assert_eq!(log.disk.metrics.cleaned_segments.get(), 4);
    log.check();
    // The one that was left is free when its last record is.
    let before = log.disk.free_segments();
    log.keep_every(usize::MAX);
    log.free(*log.named.keys().next().expect("the first is kept"));
    assert!(log.disk.free_segments() > before);
    assert_eq!(log.disk.free_segments(), 6);
}

#[test]
fn a_segment_with_a_damaged_header_is_left_as_it_is() {
    let mut log = Log::new(3, "");
    for _ in 0..2 {
        log.put(4000, 1000).expect("room");
    }
    log.keep_every(3);
    // The length of the second record.
    log.disk.disk.with(|bytes| bytes[record_bytes(4000) + 5] = 0xff);
    assert_eq!(log.clean(), Cleaned::Unreadable);
    assert!(!log.disk.backing.has_room(), "nobody may wait for the other one alone");
    log.check();
}

#[test]
fn a_cleaner_that_cannot_write_loses_nothing_and_keeps_its_reserve() {
    let mut log = Log::new(3, "write:3-5:eio");
    for _ in 0..2 {
        log.put(4000, 1000).expect("room");
    }
    log.keep_every(3);
    for _ in 0..3 {
        assert!(log.disk.backing.has_room() && !log.disk.backing.is_failed());
        assert_eq!(log.clean(), Cleaned::NotWritten);
        assert_eq!(log.disk.free_segments(), 1);
        log.check();
    }
    assert!(log.disk.backing.is_failed() && !log.disk.backing.has_room() && !log.disk.backing.wants_cleaning());
    log.disk.backing.resume();
    assert_eq!(log.clean(), Cleaned::Done);
    assert_eq!(log.disk.free_segments(), 2);
    log.check();
}

#[test]
fn cleaning_waits_for_its_budget() {
    let mut log = Log::new(3, "");
    for _ in 0..2 {
        log.put(4000, 1000).expect("room");
    }
    log.keep_every(3);
    log.disk.backing.set_budget(Some(SEGMENT - 1));
    assert!(!log.disk.backing.wants_cleaning() && !log.disk.backing.has_room());
    log.disk.backing.set_budget(Some(SEGMENT));
    assert_eq!(log.clean(), Cleaned::Done);
    assert_eq!(log.disk.free_segments(), 2);
    assert_eq!(log.disk.metrics.writeback_budget_bytes.get(), SEGMENT - log.disk.metrics.cleaning_bytes.get());
}

/// A record may die between its writing and the end of its writer's work.
#[test]
fn what_dies_before_it_is_published_is_not_counted() {
    let Fixture { backing, mut writer, metrics, .. } = Fixture::new(3, true, "");
    writer.begin(&backing, Purpose::Evict).expect("room");
    let at = writer.add(&backing, 1, 1, &[7; 100]).expect("fits");
    writer.write(&backing).expect("written");
    backing.free(at);
    assert_eq!(metrics.disk_live_bytes.get(), 0);
    assert_eq!(metrics.backing_free_bytes.get(), 2 * SEGMENT, "still the writer's");
    writer.finish(&backing);
    assert_eq!(metrics.backing_free_bytes.get(), 3 * SEGMENT);
}
