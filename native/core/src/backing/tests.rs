//! Records: written and read back, refused when they are not what was written, and what a disk that goes wrong does.

use super::record::{record_bytes, Header, MAX_OBJECT, RECORD_HEADER, TAG};
use super::*;
use crate::sync::Ordering::Relaxed;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::io;
use std::sync::Mutex;

const BOTH: [bool; 2] = [true, false];

pub(super) struct Fixture {
    pub backing: Backing,
    pub disk: Arc<MemoryDisk>,
    pub state: Arc<State>,
    pub metrics: SharedMetrics,
    pub writer: Writer,
    pub buffer: ReadBuffer,
}

impl Fixture {
    pub fn new(segments: usize, encryption: bool, faults: &str) -> Fixture {
        Fixture::over(Arc::new(MemoryDisk::new(segments * SEGMENT_BYTES)), segments, encryption, faults, new_state())
    }

    fn over(disk: Arc<MemoryDisk>, segments: usize, encryption: bool, faults: &str, state: Arc<State>) -> Fixture {
        let under: Box<dyn Disk> = match faults {
            "" => Box::new(disk.clone()),
            rules => Box::new(Faults::new(disk.clone(), rules).expect("rules")),
        };
        Fixture::on(under, disk, segments, encryption, state)
    }

    fn on(
        under: Box<dyn Disk>,
        disk: Arc<MemoryDisk>,
        segments: usize,
        encryption: bool,
        state: Arc<State>,
    ) -> Fixture {
        let metrics = SharedMetrics::new(None).expect("metrics");
        let (bytes, options) = ((segments * SEGMENT_BYTES) as u64, Options { encryption });
        Fixture {
            backing: Backing::new(under, bytes, options, state.clone(), metrics.clone()).expect("a disk"),
            disk,
            state,
            metrics,
            writer: Writer::new().expect("a writer"),
            buffer: ReadBuffer::new().expect("a buffer"),
        }
    }

    /// Writes objects of slots 0 and up, generation 7, as one segment; leaves it to be published.
    fn write(&mut self, objects: &[Vec<u8>]) -> Result<Vec<Record>> {
        self.writer.begin(&self.backing, Purpose::Evict)?;
        for (slot, object) in objects.iter().enumerate() {
            self.writer.add(&self.backing, slot as u32, 7, object).expect("fits");
        }
        let written = self.writer.write(&self.backing).map(|()| self.writer.records().to_vec());
        self.writer.finish(&self.backing);
        written
    }

    pub fn read(&mut self, record: Record) -> Result<Vec<u8>> {
        self.backing.read(record.location, record.slot, record.generation, &mut self.buffer).map(<[u8]>::to_vec)
    }

    /// Whether the record is not what was written, and is refused as such.
    fn refuses(&mut self, record: Record) -> bool {
        matches!(self.read(record), Err(Error::Corrupt { slot }) if slot == record.slot)
    }

    pub fn live(&self) -> u64 {
        self.metrics.disk_live_bytes.get()
    }

    pub fn free_segments(&self) -> u64 {
        self.metrics.backing_free_bytes.get() / SEGMENT_BYTES as u64
    }
}

fn new_state() -> Arc<State> {
    Arc::new(State::create(1, 512, 0, None).expect("state"))
}

pub(super) fn object(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|n| ((n + 1) * (seed + 3) % 251) as u8).collect()
}

fn objects(lengths: &[usize]) -> Vec<Vec<u8>> {
    lengths.iter().enumerate().map(|(n, &length)| object(n, length)).collect()
}

proptest! {
    #[test]
    fn objects_come_back_as_they_were(
        encryption: bool, lengths in prop::collection::vec(1..=MAX_OBJECT, 1..50),
    ) {
        let (mut fixture, objects) = (Fixture::new(3, encryption, ""), objects(&lengths));
        let records = fixture.write(&objects).expect("written");
        let bytes: usize = lengths.iter().map(|&length| record_bytes(length)).sum();
        prop_assert_eq!(fixture.live(), bytes as u64);
        for (record, object) in records.iter().zip(&objects) {
            prop_assert_eq!(DiskLocation::from_bits(record.location.to_bits()), record.location);
            prop_assert_eq!(&fixture.read(*record).expect("readable"), object);
        }
        // Reads of no more than the blocks that the records touch.
        prop_assert!(fixture.metrics.disk_read_bytes.get() <= (bytes + 2 * BLOCK * lengths.len()) as u64);
        records.iter().for_each(|record| fixture.backing.free(record.location));
        prop_assert_eq!((fixture.live(), fixture.free_segments()), (0, 3));
    }

    #[test]
    fn a_flipped_bit_is_refused(encryption: bool, length in 1..=MAX_OBJECT, at: prop::sample::Index, bit in 0..8) {
        let mut fixture = Fixture::new(3, encryption, "");
        let record = fixture.write(&[object(1, length)]).expect("written")[0];
        let at = record.location.bytes().start as usize + at.index(RECORD_HEADER + length + TAG);
        fixture.disk.with(|bytes| bytes[at] ^= 1u8 << bit);
        // Without encryption there is no nonce, and its bytes are covered all the same.
        prop_assert!(fixture.refuses(record));
    }

    #[test]
    fn any_location_is_read_or_refused(encryption: bool, bits: u64) {
        let mut fixture = Fixture::new(3, encryption, "");
        let record = fixture.write(&objects(&[100; 20])).expect("written")[19];
        let location = DiskLocation::from_bits(bits & (0x1ff << 36 | 0xfff));
        for location in [location, DiskLocation::from_bits(bits)] {
            let elsewhere = Record { location, ..record };
            prop_assert!(elsewhere == record || fixture.refuses(elsewhere));
            fixture.backing.free(location);
        }
    }
}

#[test]
fn another_slot_generation_or_place_is_refused() {
    for encryption in BOTH {
        let mut fixture = Fixture::new(3, encryption, "");
        let records = fixture.write(&objects(&[500; 2])).expect("written");
        let right = records[0];
        assert!(fixture.refuses(Record { slot: 1, ..right }));
        assert!(fixture.refuses(Record { generation: 8, ..right }));
        assert!(fixture.refuses(Record { location: records[1].location, ..right }));
        // The record itself, where another one was.
        let (from, to) = (right.location.bytes(), records[1].location.bytes());
        fixture.disk.with(|disk| disk.copy_within(from.start as usize..from.end as usize, to.start as usize));
        assert!(fixture.refuses(Record { location: records[1].location, ..right }));
        assert_eq!(fixture.read(right).expect("still there"), object(0, 500));
    }
}

#[test]
fn nothing_of_memory_can_be_read_from_the_disk() {
    for encryption in BOTH {
        let mut fixture = Fixture::new(3, encryption, "");
        fixture.write(&[b"all of my passwords".repeat(100)]).expect("written");
        let readable = fixture.disk.with(|disk| disk.windows(19).any(|bytes| bytes == b"all of my passwords"));
        assert_eq!(readable, !encryption);
    }
}

#[test]
fn the_key_lives_until_it_is_wiped() {
    let mut first = Fixture::new(3, true, "");
    let record = first.write(&[object(1, 1000)]).expect("written")[0];
    let (disk, state) = (first.disk.clone(), first.state.clone());
    drop(first);
    let mut second = Fixture::over(disk.clone(), 3, true, "", state.clone());
    assert_eq!(second.read(record).expect("the same key"), object(1, 1000));
    second.backing.wipe_key();
    assert!(state.cipher().key.iter().all(|word| word.load(Relaxed) == 0), "the key was not wiped");
    let mut third = Fixture::over(disk, 3, true, "", state);
    assert!(third.refuses(record));
}

#[test]
fn what_the_disk_has_from_before_is_not_what_was_written() {
    for encryption in BOTH {
        let mut before = Fixture::new(3, encryption, "");
        let record = before.write(&[object(1, 1000)]).expect("written")[0];
        // The same slot, generation and location, and a write that the disk has lost.
        let mut now = Fixture::over(before.disk.clone(), 3, encryption, "", new_state());
        assert!(now.refuses(record), "encryption {encryption}");
    }
}

/// Notes all that it is given to write, and takes none of it.
struct Notes(Arc<Mutex<Vec<u8>>>);

impl Disk for Notes {
    fn read(&self, _offset: u64, _into: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write(&self, _offset: u64, from: &[u8]) -> io::Result<()> {
        self.0.lock().expect("no panic").extend_from_slice(from);
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
}

#[test]
fn no_nonce_is_used_twice() {
    const OBJECT: usize = 4096 - RECORD_HEADER - TAG;
    let (notes, state) = (Arc::default(), new_state());
    let (mut writer, mut keys) = (Writer::new().expect("a writer"), BTreeSet::new());
    for _ in 0..2 {
        let (disk, metrics) = (Box::new(Notes(Arc::clone(&notes))), SharedMetrics::new(None).expect("metrics"));
        let bytes = 8 * SEGMENT_BYTES as u64;
        let backing = Backing::new(disk, bytes, Options { encryption: true }, state.clone(), metrics).expect("a disk");
        keys.insert(state.cipher().key.each_ref().map(|word| word.load(Relaxed)));
        // The same pages again, after errors; and records that were never written.
        for n in 0..6 {
            backing.resume();
            writer.begin(&backing, Purpose::Evict).expect("room");
            for slot in 0..4 {
                writer.add(&backing, slot, 7, &[slot as u8; OBJECT]).expect("fits");
            }
            assert!(n % 3 == 2 || writer.write(&backing).is_err());
            writer.finish(&backing);
        }
        // The next one goes on with this state and its key.
    }
    assert_eq!(keys.len(), 1);
    let notes = notes.lock().expect("no panic");
    let nonces = notes.chunks(4096).map(|record| Header::of(record).expect("a record").nonce);
    assert_eq!((nonces.clone().count(), nonces.collect::<BTreeSet<_>>().len()), (32, 32));
}

#[test]
fn a_failed_write_leaves_nothing_and_three_in_a_row_are_the_end() {
    for fault in ["eio", "enospc", "short"] {
        let mut fixture = Fixture::new(8, true, &format!("write:1-2:{fault},write:4-6:{fault}"));
        let write = |fixture: &mut Fixture| fixture.write(&objects(&[4000; 5]));
        for _ in 0..2 {
            assert!(matches!(write(&mut fixture), Err(Error::DiskWrite(_))));
        }
        // A success between them: they count from the start.
        let record = write(&mut fixture).expect("written")[0];
        assert_eq!((fixture.live(), fixture.free_segments()), (5 * record_bytes(4000) as u64, 5));
        for _ in 0..3 {
            assert!(!fixture.backing.is_failed());
            assert!(matches!(write(&mut fixture), Err(Error::DiskWrite(_))));
        }
        assert!(fixture.backing.is_failed() && !fixture.backing.has_room());
        assert_eq!((fixture.metrics.backing_state.get(), fixture.metrics.writeback_errors.get()), (2, 5));
        assert!(matches!(write(&mut fixture), Err(Error::NoWriteback)));
        assert_eq!(fixture.read(record).expect("still there"), object(0, 4000));
        fixture.backing.resume();
        assert_eq!((fixture.metrics.backing_state.get(), fixture.free_segments()), (1, 7));
        write(&mut fixture).expect("written");
    }
}

#[test]
fn writes_that_fail_at_the_same_time_are_one_error() {
    let Fixture { backing, metrics, .. } = Fixture::new(16, true, "");
    let mut writers: Vec<_> = (0..4).map(|_| Writer::new().expect("a writer")).collect();
    let mut begun = [0; 4];
    for round in 1..=3 {
        for writer in &mut writers {
            assert!(!backing.is_failed(), "round {round}");
            writer.begin(&backing, Purpose::Evict).expect("room");
            writer.add(&backing, 1, 1, &[7; 100]).expect("fits");
        }
        // As `write` does, but all at once.
        begun.fill_with(|| backing.change(|table| table.writing(0)));
        for (writer, errors) in writers.iter_mut().zip(begun) {
            let (segment, _) = writer.segment.take().expect("begun");
            backing.change(|table| table.write_failed(segment, errors));
            writer.finish(&backing);
        }
    }
    assert!(backing.is_failed());
    backing.resume();
    assert_eq!(metrics.backing_free_bytes.get(), metrics.backing_bytes.get());
}

#[test]
fn a_disk_that_has_failed_is_tried_with_a_segment_and_goes_on() {
    let mut fixture = Fixture::new(8, true, "write:2-5:eio");
    let record = fixture.write(&[object(0, 4000)]).expect("written")[0];
    let probe = |fixture: &mut Fixture| fixture.writer.probe(&fixture.backing);
    // One that has not failed is not written for that.
    probe(&mut fixture).expect("nothing is done");
    assert_eq!(fixture.metrics.cleaning_bytes.get(), 0);
    (0..3).for_each(|_| assert!(fixture.write(&objects(&[4000])).is_err()));
    let free = fixture.free_segments();
    assert!(matches!(probe(&mut fixture), Err(Error::DiskWrite(_))));
    assert!(fixture.backing.is_failed());
    assert_eq!((fixture.free_segments(), fixture.metrics.writeback_errors.get()), (free, 4));
    fixture.backing.set_budget(Some(SEGMENT_BYTES as u64 - 1));
    probe(&mut fixture).expect("nothing is done");
    assert!(fixture.backing.is_failed());
    fixture.backing.set_budget(Some(SEGMENT_BYTES as u64));
    probe(&mut fixture).expect("written");
    assert!(!fixture.backing.is_failed());
    assert_eq!((fixture.free_segments(), fixture.metrics.writeback_budget_bytes.get()), (7, 0));
    assert_eq!(fixture.metrics.cleaning_bytes.get(), 2 * SEGMENT_BYTES as u64);
    assert_eq!(fixture.read(record).expect("still there"), object(0, 4000));
    fixture.backing.set_budget(None);
    fixture.write(&objects(&[4000])).expect("written");
}

#[test]
fn a_failed_write_does_not_succeed_when_asked_again() {
    let Fixture { backing, mut writer, metrics, .. } = Fixture::new(3, true, "write:1:eio");
    writer.begin(&backing, Purpose::Evict).expect("room");
    writer.add(&backing, 1, 1, &[7; 100]).expect("fits");
    assert!(writer.write(&backing).is_err() && writer.write(&backing).is_err());
    assert_eq!(writer.add(&backing, 1, 1, &[7; 100]), None);
    assert_eq!((writer.records().len(), metrics.disk_live_bytes.get()), (1, 0));
    writer.finish(&backing);
    writer.begin(&backing, Purpose::Evict).expect("room");
}

#[test]
fn a_request_for_several_pages_needs_one_transfer() {
    let mut fixture = Fixture::new(3, true, "");
    let objects = objects(&[1500; 60]);
    let records = fixture.write(&objects).expect("written");
    // The last ones too: no more is read than the segment has.
    for (part, objects) in records.chunks(15).zip(objects.chunks(15)) {
        fixture.buffer.forget();
        for (n, (record, object)) in part.iter().zip(objects).enumerate() {
            fixture.buffer.expect(part.len() - n - 1);
            assert_eq!(&fixture.read(*record).expect("readable"), object);
        }
    }
    assert_eq!(fixture.metrics.disk_reads.get(), 4);
}

/// What was read ahead may be out of date by then.
#[test]
fn what_was_read_ahead_is_not_what_was_written_since() {
    for encryption in BOTH {
        let mut fixture = Fixture::new(3, encryption, "");
        let first = fixture.write(&[object(0, 1500), object(1, 1500)]).expect("written");
        fixture.buffer.expect(1);
        fixture.read(first[0]).expect("readable");
        first.iter().for_each(|record| fixture.backing.free(record.location));
        // Of three segments two are handed out for this, in turn: the second time it is the first one again.
        let others = fixture.write(&[object(2, 1500), object(3, 1500)]).expect("written");
        others.iter().for_each(|record| fixture.backing.free(record.location));
        let mut again = fixture.write(&[object(4, 1500), object(5, 1500)]).expect("written");
        while again[1].location != first[1].location {
            again.iter().for_each(|record| fixture.backing.free(record.location));
            again = fixture.write(&[object(4, 1500), object(5, 1500)]).expect("written");
        }
        assert_eq!(fixture.read(again[1]).expect("readable"), object(5, 1500));
    }
}

#[test]
fn a_failed_read_costs_that_read() {
    for fault in ["eio", "short"] {
        let mut fixture = Fixture::new(3, true, &format!("read:2:{fault}"));
        let record = fixture.write(&[object(1, 4000)]).expect("written")[0];
        fixture.read(record).expect("readable");
        assert!(matches!(fixture.read(record), Err(Error::DiskRead { slot: 0, .. })));
        assert_eq!(fixture.read(record).expect("readable again"), object(1, 4000));
        assert_eq!(fixture.metrics.disk_reads.get(), 2, "one has not gone well");
    }
}

#[test]
fn what_was_read_wrong_is_read_again_and_refused_the_second_time() {
    for fault in ["flip", "torn"] {
        // One object that fills its blocks.
        let mut fixture = Fixture::new(3, true, &format!("read:2:{fault},read:5-6:{fault}"));
        let object = object(1, 4096 - RECORD_HEADER - TAG);
        let record = fixture.write(std::slice::from_ref(&object)).expect("written")[0];
        // The fault is the second reading's.
        for reads in [1, 3, 4] {
            assert_eq!(fixture.read(record).expect("readable"), object, "{fault}");
            assert_eq!(fixture.metrics.disk_reads.get(), reads);
        }
        assert!(fixture.refuses(record), "{fault}");
        assert_eq!(fixture.read(record).expect("readable another time"), object);
    }
}

#[test]
fn a_wrong_write_costs_the_pages_that_it_hit() {
    for (fault, at_most) in [("flip", 1), ("torn", 3)] {
        let mut fixture = Fixture::new(3, true, &format!("write:1:{fault}"));
        let objects = objects(&[4000; 20]);
        let records = fixture.write(&objects).expect("written");
        let mut refused = 0;
        for (record, object) in records.into_iter().zip(objects) {
            match fixture.read(record) {
                Ok(read) => assert_eq!(read, object),
                Err(error) => {
                    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
                    refused += 1;
                }
            }
        }
        assert!((1..=at_most).contains(&refused), "{fault}: {refused}");
    }
}

#[test]
fn a_slow_disk_is_waited_for() {
    let mut fixture = Fixture::new(3, true, "write:1:slow,read:1-:slow");
    let record = fixture.write(&[object(1, 4000)]).expect("written")[0];
    assert_eq!(fixture.read(record).expect("readable"), object(1, 4000));
}

#[test]
fn what_is_no_fault_is_refused() {
    let bad = [
        "",
        "write",
        "write:3",
        "read:0:eio",
        "read:5-3:eio",
        "write:3:eoi",
        "append:3:eio",
        "read:x:eio",
        "read:1:eio:2",
    ];
    for rules in bad {
        let refused = Faults::new(MemoryDisk::new(0), rules).err().map(|error| error.to_string());
        assert!(refused.is_some_and(|message| message.contains("not a fault")), "{rules}");
    }
}

#[test]
fn the_budget_is_kept_to_the_block() {
    let mut fixture = Fixture::new(8, true, "");
    let segment = SEGMENT_BYTES as u64;
    fixture.backing.set_budget(Some(segment + 3 * BLOCK as u64));
    // Two blocks and a bit.
    fixture.write(&objects(&[4096, 4096])).expect("within the budget");
    assert_eq!(fixture.metrics.writeback_budget_bytes.get(), segment);
    assert_eq!(fixture.metrics.writeback_bytes.get(), 3 * BLOCK as u64);
    // Another may not begin while this one might need it all.
    let mut other = Writer::new().expect("a writer");
    fixture.writer.begin(&fixture.backing, Purpose::Evict).expect("within the budget");
    assert!(!fixture.backing.has_room());
    assert!(matches!(other.begin(&fixture.backing, Purpose::Clean), Err(Error::BudgetUsedUp)));
    fixture.writer.finish(&fixture.backing);
    assert!(fixture.backing.has_room());
    fixture.write(&objects(&[1])).expect("within the budget");
    assert!(!fixture.backing.has_room());
    assert!(matches!(fixture.write(&objects(&[1])), Err(Error::BudgetUsedUp)));
    fixture.backing.set_budget(None);
    assert_eq!(fixture.metrics.writeback_budget_bytes.get(), u64::MAX);
    fixture.write(&objects(&[1])).expect("no budget");
}

#[test]
fn a_disk_too_small_is_refused() {
    let (state, metrics) = (State::create(1, 512, 0, None).expect("state"), SharedMetrics::new(None).expect("metrics"));
    let bytes = 3 * SEGMENT_BYTES as u64 - 1;
    let disk = Box::new(MemoryDisk::new(bytes as usize));
    assert!(Backing::new(disk, bytes, Options { encryption: true }, Arc::new(state), metrics).is_err());
}

/// With the buffers' alignment, where the file system knows direct I/O.
#[cfg(not(miri))]
#[test]
fn a_file_is_written_and_read_directly() {
    use std::os::unix::fs::OpenOptionsExt;
    let path = std::env::temp_dir().join(format!("zswapd-backing-{}", std::process::id()));
    let open = |flags| std::fs::OpenOptions::new().read(true).write(true).create(true).custom_flags(flags).open(&path);
    let file = open(libc::O_DIRECT).or_else(|_| open(0)).expect("a file");
    std::fs::remove_file(&path).expect("removed");
    file.set_len(3 * SEGMENT_BYTES as u64).expect("room");
    let disk = FileDisk::new(file.into());
    assert_eq!(disk.bytes().expect("a size"), 3 * SEGMENT_BYTES as u64);
    let mut fixture = Fixture::on(Box::new(disk), Arc::new(MemoryDisk::new(0)), 3, true, new_state());
    let objects = objects(&[4000, 100, 4106, 2000]);
    for (record, object) in fixture.write(&objects).expect("written").into_iter().zip(objects) {
        assert_eq!(fixture.read(record).expect("readable"), object);
    }
    let at = DiskLocation::new(2 * SEGMENT_BYTES as u64..2 * SEGMENT_BYTES as u64 + 4096);
    assert!(fixture.refuses(Record { slot: 1, generation: 1, location: at }), "a hole");
}

/// A quarter each, and for each its own generation.
#[test]
fn a_cluster_opens_for_its_members_and_is_freed_by_quarters() {
    for encryption in BOTH {
        let mut fixture = Fixture::new(3, encryption, "");
        let (mut object, generations) = (vec![5; 3001], [3, 500, 7, 7]);
        cluster::set_generations(&mut object, generations);
        fixture.writer.begin(&fixture.backing, Purpose::Evict).expect("room");
        let at = fixture.writer.add(&fixture.backing, 8, CLUSTER, &object).expect("fits");
        fixture.writer.write(&fixture.backing).expect("written");
        assert_eq!(fixture.writer.records(), [Record { slot: 8, generation: CLUSTER, location: at }]);
        fixture.writer.finish(&fixture.backing);
        let mut read = |at, slot, generation| {
            fixture.buffer.forget();
            fixture.backing.read(at, slot, generation, &mut fixture.buffer).map(<[u8]>::to_vec)
        };
        for (slot, generation) in (8..12).zip(generations) {
            assert_eq!(read(at, slot, generation).expect("readable"), object);
        }
        for (slot, generation) in [(8, 4), (9, 3), (10, 3), (12, 3), (7, 7)] {
            assert!(matches!(read(at, slot, generation), Err(Error::Corrupt { .. })), "slot {slot}, {generation}");
        }
        // A word that says that it is one page's.
        let alone = DiskLocation::from_bits(at.to_bits());
        assert!(matches!(read(alone, 8, 3), Err(Error::Corrupt { .. })));
        let record = record_bytes(object.len()) as u64;
        for freed in 0..4 {
            assert_eq!(fixture.live(), record - record / 4 * freed);
            assert!(fixture.metrics.backing_free_bytes.get() < fixture.metrics.backing_bytes.get());
            fixture.backing.free(at);
        }
        assert_eq!(fixture.live(), 0);
        assert_eq!(fixture.metrics.backing_free_bytes.get(), fixture.metrics.backing_bytes.get());
    }
}

/// As long as a slot word can say, and no longer.
#[test]
fn the_longest_cluster_is_read_back() {
    let mut fixture = Fixture::new(3, true, "");
    fixture.writer.begin(&fixture.backing, Purpose::Evict).expect("room");
    let object = vec![0; MAX_CLUSTER];
    // So that it lies over as many blocks as it can.
    fixture.writer.add(&fixture.backing, 0, 1, &[1; BLOCK - 48]).expect("fits");
    let at = fixture.writer.add(&fixture.backing, 0, CLUSTER, &object).expect("fits");
    fixture.writer.write(&fixture.backing).expect("written");
    assert_eq!(fixture.backing.read(at, 3, 0, &mut fixture.buffer).expect("readable"), object);
    fixture.writer.finish(&fixture.backing);
}
