//! A segment as it is read back: any bytes are looked through to their end, and of a segment that was damaged on the
//! disk only records open that are as they were written.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use zswapd_core::backing::cluster::{first_of, set_generations, CLUSTER};
use zswapd_core::backing::{
    records_of, Backing, CleanBuffer, DiskLocation, MemoryDisk, Options, Purpose, ReadBuffer, Record, Writer,
    SEGMENT_BYTES,
};
use zswapd_core::metrics::SharedMetrics;
use zswapd_core::state::State;

/// The least that a disk may have.
const SEGMENTS: usize = 3;
/// Of the slot words that name what was written.
const GENERATION: u16 = 1;
/// Of an object.
const LONGEST: usize = 4106;

#[derive(Arbitrary, Debug)]
enum Segment<'a> {
    Any { start: u16, bytes: &'a [u8] },
    Damaged { encryption: bool, lengths: Vec<u16>, changes: Vec<(u32, u8)>, bits: u64 },
}

fuzz_target!(|segment: Segment| match segment {
    Segment::Any { start, bytes } => look_through(u64::from(start) * SEGMENT_BYTES as u64, bytes),
    Segment::Damaged { encryption, lengths, changes, bits } => damage(encryption, &lengths, &changes, bits),
});

/// Records lie one behind the other; the first that is none is the last that is told.
fn look_through(start: u64, bytes: &[u8]) {
    let mut at = start;
    for record in records_of(bytes, start) {
        let Ok(record) = record else {
            at = start + bytes.len() as u64;
            continue;
        };
        let bits = record.location.to_bits();
        let (first, length) = ((bits & ((1 << 36) - 1)) * 16, (bits >> 36) * 16);
        assert!(first == at && length > 32, "{record:?} at {at}");
        at += length;
    }
    assert_eq!(at, start + bytes.len() as u64);
}

fn damage(encryption: bool, lengths: &[u16], changes: &[(u32, u8)], bits: u64) {
    let state = Arc::new(State::create(1, 512, 0, None).expect("state"));
    let disk = Arc::new(MemoryDisk::new(SEGMENTS * SEGMENT_BYTES));
    let (bytes, metrics) = ((SEGMENTS * SEGMENT_BYTES) as u64, SharedMetrics::new(None).expect("metrics"));
    let backing = Backing::new(Box::new(disk.clone()), bytes, Options { encryption }, state, metrics).expect("a disk");
    let mut writer = Writer::new().expect("a writer");
    // Some are clusters, which are long enough for their generations.
    let owner = |slot: u32, length: u16| if length >> 15 == 0 { (slot, GENERATION) } else { (first_of(slot), CLUSTER) };
    let object = |slot: u32, length: u16| {
        let mut object = vec![slot as u8; usize::from(length) % LONGEST + 1];
        if owner(slot, length).1 == CLUSTER {
            object.resize(object.len() + 8, 0);
            set_generations(&mut object, [GENERATION; 4]);
        }
        object
    };

    // Two segments, so that there is one to be cleaned.
    let mut written: Vec<(Record, Vec<u8>)> = Vec::new();
    for purpose in [Purpose::Evict; SEGMENTS - 1] {
        writer.begin(&backing, purpose).expect("room");
        for (slot, &length) in (0..).zip(lengths) {
            let (first, generation) = owner(slot, length);
            writer.add(&backing, first, generation, &object(slot, length));
        }
        writer.write(&backing).expect("written");
        let objects = lengths.iter().zip(0..).map(|(&length, slot)| object(slot, length));
        written.extend(writer.records().iter().copied().zip(objects));
        writer.finish(&backing);
    }
    disk.with(|bytes| {
        for &(at, change) in changes {
            bytes[at as usize % (2 * SEGMENT_BYTES)] ^= change;
        }
    });

    let mut buffer = ReadBuffer::new().expect("a buffer");
    for (record, object) in &written {
        let read = backing.read(record.location, record.slot, GENERATION, &mut buffer);
        assert!(read.as_ref().map_or(!changes.is_empty(), |read| read == object), "{record:?}: {read:?}");
    }
    let location = DiskLocation::from_bits(bits);
    let read = backing.read(location, 1, 1, &mut buffer).is_ok();
    assert!(!read || written.iter().any(|(record, _)| record.location == location));

    let mut segment = CleanBuffer::new().expect("a buffer");
    while let Some(victim) = backing.victim() {
        if segment.read(&backing, &victim).is_ok() {
            while let Some(record) = segment.next_record() {
                let Some(opened) = segment.object(&backing) else { continue };
                assert!(written.iter().any(|(known, object)| *known == record && *object == opened), "{record:?}");
            }
        }
        backing.release(victim);
    }
    backing.free(location);
    let names = |record: &Record| if record.location.is_cluster() { 4 } else { 1 };
    written.iter().for_each(|(record, _)| (0..names(record)).for_each(|_| backing.free(record.location)));
}
