//! Which page may be like another one: an index of what was seen, by a hash of its contents.
//!
//! 8 bytes for each page: 32 bits of the hash, and its slot. An entry is a hint. What its slot holds may have changed since,
//! and other pages have the same bits: who finds it compares the pages. Nothing is taken out when a page goes; it is
//! overwritten in time. So the page path knows nothing of the index.
//!
//! **Whether it pays** is seen from what it finds: a page that is in the index takes 8 bytes there, and has to save twice that
//! in the mean. Where it does not, only one in [`SAMPLE`] of all hashes is looked at. Pages that are alike have the same one:
//! so of what all would save, the sample finds its share, and shows when it pays again.

use crate::page::Page;
use xxhash_rust::xxh3::xxh3_128;

/// Of the hashes, one in so many is in a sample.
const SAMPLE: u64 = 16;
/// Pages that are looked at before it is decided whether it pays.
const WINDOW: u64 = if cfg!(test) { 256 } else { 8192 };
/// How often what it takes it has to save.
const WORTH: u64 = 2;
/// Entries of a bucket: a cache line.
const WAYS: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    fingerprint: u32,
    slot: u32,
}

/// Not a slot that there is, but in the largest swap file of all.
const NONE: Entry = Entry { fingerprint: 0, slot: u32::MAX };

/// For one thread.
pub struct Duplicates {
    /// A power of two of them, or none: nothing is looked for.
    buckets: Vec<[Entry; WAYS]>,
    /// Not only a sample.
    all: bool,
    /// Pages since it was last decided: seen, of these looked for, and the bytes that this has saved.
    seen: u64,
    covered: u64,
    saved: u64,
}

impl Default for Duplicates {
    /// Nothing is looked for.
    fn default() -> Duplicates {
        Duplicates { buckets: Vec::new(), all: true, seen: 0, covered: 0, saved: 0 }
    }
}

impl Duplicates {
    /// Makes room for a pool of so many objects, and decides how much is looked for. Allocates.
    pub fn prepare(&mut self, on: bool, objects: u64) {
        if !on {
            *self = Duplicates::default();
            return;
        }
        if self.seen >= WINDOW {
            let pays = self.saved > WORTH * size_of::<Entry>() as u64 * self.covered;
            if self.all && !pays {
                // Of what it knows, little is in the sample.
                self.buckets = Vec::new();
            }
            (self.all, self.seen, self.covered, self.saved) = (pays, 0, 0, 0);
        }
        let entries = objects.max(WINDOW) / if self.all { 1 } else { SAMPLE };
        let wanted = (entries as usize).div_ceil(WAYS).next_power_of_two();
        if wanted > self.buckets.len() || wanted < self.buckets.len() / 4 {
            // Written once, and so resident.
            let before = std::mem::replace(&mut self.buckets, vec![[NONE; WAYS]; wanted]);
            let known = before.into_iter().flatten().filter(|&entry| entry != NONE);
            known.for_each(|entry| self.insert(entry.fingerprint, entry.slot));
        }
    }

    /// What pages that are alike have in common; None if this one is not looked for.
    pub fn fingerprint(&mut self, page: &Page) -> Option<u32> {
        if self.buckets.is_empty() {
            return None;
        }
        let hash = xxh3_128(page);
        self.seen += 1;
        let covered = self.all || (hash >> 64) as u64 % SAMPLE == 0;
        self.covered += u64::from(covered);
        covered.then_some(hash as u32)
    }

    fn bucket(&self, fingerprint: u32) -> usize {
        fingerprint as usize & (self.buckets.len() - 1)
    }

    /// A slot whose page may be alike.
    pub fn find(&self, fingerprint: u32) -> Option<u32> {
        let bucket = self.buckets.get(self.bucket(fingerprint))?;
        bucket.iter().find(|entry| entry.fingerprint == fingerprint && **entry != NONE).map(|entry| entry.slot)
    }

    /// Notes what a slot holds, in the place of an entry that has the same fingerprint, or of any.
    pub fn insert(&mut self, fingerprint: u32, slot: u32) {
        let (bucket, victim) = (self.bucket(fingerprint), self.covered as usize % WAYS);
        let bucket = &mut self.buckets[bucket];
        let same = bucket.iter().position(|entry| entry.fingerprint == fingerprint && *entry != NONE);
        let way = same.or_else(|| bucket.iter().position(|entry| *entry == NONE)).unwrap_or(victim);
        bucket[way] = Entry { fingerprint, slot };
    }

    /// A page was found to be alike, which has saved so many bytes.
    pub fn found(&mut self, bytes: usize) {
        self.saved += bytes as u64;
    }

    pub fn bytes(&self) -> u64 {
        size_of_val(&*self.buckets) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{fill, PAGE_SIZE};

    fn page(word: u32) -> Page {
        let mut page = [0; PAGE_SIZE];
        fill(&mut page, word);
        page
    }

    /// So many pages, each of which is found again at once and saves so much.
    fn look_at(index: &mut Duplicates, pages: u32, saved: usize) -> u32 {
        let looked_for = (0..pages).filter_map(|n| {
            let fingerprint = index.fingerprint(&page(n))?;
            index.insert(fingerprint, n);
            index.found(saved);
            Some((fingerprint, n))
        });
        let looked_for: Vec<_> = looked_for.collect();
        let found = looked_for.iter().filter(|&&(fingerprint, n)| index.find(fingerprint) == Some(n));
        // A bucket holds eight.
        assert!(found.count() >= looked_for.len() / 2);
        looked_for.len() as u32
    }

    #[test]
    fn it_looks_for_a_sample_where_it_does_not_pay_and_for_all_where_it_does() {
        let mut index = Duplicates::default();
        assert_eq!((index.fingerprint(&page(1)), index.bytes()), (None, 0));
        index.prepare(true, 10_000);
        let all = index.bytes();
        assert!(all >= 80_000);
        assert_eq!(look_at(&mut index, WINDOW as u32, 16), WINDOW as u32);
        index.prepare(true, 10_000);
        assert!(index.bytes() <= all / 8, "{} of {all} bytes", index.bytes());
        let sampled = look_at(&mut index, 4 * WINDOW as u32, 17);
        assert!((WINDOW as u32 / 16..WINDOW as u32).contains(&sampled), "{sampled}");
        index.prepare(true, 10_000);
        assert_eq!(look_at(&mut index, WINDOW as u32, 100), WINDOW as u32);
        index.prepare(false, 10_000);
        assert_eq!(index.bytes(), 0);
    }

    #[test]
    fn what_is_known_stays_as_the_index_grows() {
        let mut index = Duplicates::default();
        index.prepare(true, 0);
        for n in 0..50 {
            let fingerprint = index.fingerprint(&page(n)).expect("all are looked for");
            index.insert(fingerprint, n);
        }
        let before = index.bytes();
        index.prepare(true, 100_000);
        assert!(index.bytes() > before);
        for n in 0..50 {
            let fingerprint = index.fingerprint(&page(n)).expect("all are looked for");
            assert_eq!(index.find(fingerprint), Some(n));
        }
    }
}
