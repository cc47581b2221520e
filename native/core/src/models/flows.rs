//! Everything at once, for a while.

use super::Kind::{self, Large, Small};
use super::{page, with_scratch, Swap, FOREVER};
use crate::backing::{Faults, MemoryDisk, SEGMENT_BYTES};
use crate::error::Error;
use crate::page::PAGE_SIZE;
use crate::pool::Allocator;
use crate::store::{Cleaner, Detached, Job, Shrinker, What};
use shuttle::rand::{thread_rng, Rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::thread::{spawn, JoinHandle};
use shuttle::{Config, Runner};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Arc;

const PAGES: u64 = 6;
/// Of each thread.
const STEPS: usize = 6;
/// Schedules of each scheduler.
const SCHEDULES: usize = 10_000;
/// The priorities of threads change so often in a schedule of [`PctScheduler`].
const CHANGES: usize = 3;

#[test]
fn pages_are_written_read_and_freed_while_objects_are_moved() {
    run(|| {
        let swap = Arc::new(Swap::new(Allocator::Zsmalloc, PAGES, 24));
        let threads = [go(&swap, write), go(&swap, write), go(&swap, read), go(&swap, free), go(&swap, compact)];
        threads.into_iter().for_each(join);
        swap.end();
    });
}

/// Nothing is moved into room that the limit does not give, and what does not fit is lost, never old.
#[test]
fn a_full_pool_is_compacted() {
    run(|| {
        let swap = Arc::new(Swap::new(Allocator::Zsmalloc, PAGES, 5));
        let threads = [go(&swap, write), go(&swap, write), go(&swap, read), go(&swap, compact), go(&swap, compact)];
        threads.into_iter().for_each(join);
        swap.end();
    });
}

#[test]
fn it_ends_while_objects_are_moved() {
    run(|| {
        let swap = Arc::new(Swap::new(Allocator::Zsmalloc, PAGES, 24));
        let movers = [go(&swap, compact), go(&swap, compact)];
        [go(&swap, write), go(&swap, write), go(&swap, free)].into_iter().for_each(join);
        swap.0.reset();
        assert_eq!(swap.destroy(FOREVER).expect("the movers come to their end"), vec![]);
        swap.assert_nothing_left();
        movers.into_iter().for_each(join);
        swap.assert_nothing_left();
    });
}

/// Pages go to the disk and come back, are overwritten and punched on the way, and are moved there and here.
#[test]
fn pages_are_written_back_and_cleaned() {
    run_on_disk(|| {
        let swap = Arc::new(Swap::with_disk(PAGES, 24, SEGMENTS, disk()));
        let threads = [go(&swap, write), go(&swap, read), go(&swap, free), go(&swap, evict), go(&swap, clean)];
        threads.into_iter().for_each(join);
        swap.end();
    });
}

/// The pool is always full, and the disk fails now and then: stores wait for room, or are refused.
#[test]
fn a_full_pool_is_written_back() {
    run_on_disk(|| {
        let faults = Faults::new(disk(), "write:2:eio,write:5-6:short,read:3:eio").expect("rules");
        let swap = Arc::new(Swap::with_disk(PAGES, 3, SEGMENTS, faults));
        let threads = [
            go(&swap, write),
            go(&swap, write),
            go(&swap, read),
            go(&swap, shrink),
            go(&swap, shrink),
            go(&swap, clean),
        ];
        threads.into_iter().for_each(join);
        swap.end();
    });
}

#[test]
fn it_ends_while_pages_are_written_back() {
    run_on_disk(|| {
        let swap = Arc::new(Swap::with_disk(PAGES, 24, SEGMENTS, disk()));
        let background = [go(&swap, evict), go(&swap, clean), go(&swap, compact)];
        [go(&swap, write), go(&swap, write), go(&swap, read)].into_iter().for_each(join);
        swap.0.reset();
        assert_eq!(swap.destroy(FOREVER).expect("all come to their end"), vec![]);
        swap.assert_nothing_left();
        background.into_iter().for_each(join);
        swap.assert_nothing_left();
    });
}

const SEGMENTS: usize = 4;

fn disk() -> MemoryDisk {
    MemoryDisk::new(SEGMENTS * SEGMENT_BYTES)
}

/// Pages that compaction has freed, in all schedules; pages written back; and segments cleaned.
static FREED: AtomicU64 = AtomicU64::new(0);
static EVICTED: AtomicU64 = AtomicU64::new(0);
static CLEANED: AtomicU64 = AtomicU64::new(0);

fn run_on_disk(flow: impl Fn() + Send + Sync + Copy + 'static) {
    run_under(RandomScheduler::new(SCHEDULES / 4), flow);
    run_under(PctScheduler::new(CHANGES, SCHEDULES / 4), flow);
    assert!(EVICTED.load(Relaxed) > 0, "nothing was written back");
    assert!(CLEANED.load(Relaxed) > 0, "nothing was cleaned");
}

fn run(flow: impl Fn() + Send + Sync + Copy + 'static) {
    run_under(RandomScheduler::new(SCHEDULES), flow);
    run_under(PctScheduler::new(CHANGES, SCHEDULES), flow);
    assert!(FREED.load(Relaxed) > 0, "nothing was moved");
}

fn run_under(scheduler: impl Scheduler + 'static, flow: impl Fn() + Send + Sync + 'static) {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    Runner::new(scheduler, config).run(flow);
}

fn go(swap: &Arc<Swap>, step: impl Fn(&Swap) + Send + 'static) -> JoinHandle<()> {
    let swap = swap.clone();
    spawn(move || (0..STEPS).for_each(|_| step(&swap)))
}

fn join(thread: JoinHandle<()>) {
    thread.join().expect("a thread that does not panic");
}

fn any_slot() -> u64 {
    thread_rng().gen_range(0..PAGES)
}

/// A page says whose it is: the stamps of slot n are above 16·n, and odd for pages that do not get smaller.
fn kind(stamp: u8) -> Kind {
    if stamp % 2 == 1 {
        Large
    } else {
        Small
    }
}

fn write(swap: &Swap) {
    let slot = any_slot();
    let stamp = slot as u8 * 16 + thread_rng().gen_range(1..16u8);
    let written = with_scratch(|scratch| swap.0.write(slot * PAGE_SIZE as u64, &page(kind(stamp), stamp), scratch));
    assert!(matches!(written, Ok(()) | Err(Error::PoolFull | Error::NoRegion | Error::NoRoomYet)), "{written:?}");
}

fn read(swap: &Swap) {
    let slot = any_slot();
    let mut bytes = [0xff; PAGE_SIZE];
    match with_scratch(|scratch| swap.0.read(slot * PAGE_SIZE as u64, &mut bytes, scratch)) {
        Err(error) => assert!(matches!(error, Error::Lost { .. } | Error::DiskRead { .. }), "slot {slot}: {error}"),
        Ok(_) if bytes == [0; PAGE_SIZE] => {}
        Ok(_) => {
            let stamp = bytes[0];
            assert_eq!(u64::from(stamp / 16), slot, "slot {slot} reads a page of another one");
            assert!(bytes == page(kind(stamp), stamp), "slot {slot} is torn");
        }
    }
}

/// Answers first, frees later, as the pager does; now and then everything at once.
fn free(swap: &Swap) {
    if any_slot() == 0 {
        return swap.0.reset();
    }
    let mut detached = Detached::with_capacity(2);
    let (first, page_size) = (any_slot(), PAGE_SIZE as u64);
    let length = (PAGES - first).min(3) * page_size;
    with_scratch(|scratch| swap.0.discard(first * page_size, length, &mut detached, scratch)).expect("in range");
    shuttle::thread::yield_now();
    swap.free_detached(&mut detached);
}

fn compact(swap: &Swap) {
    FREED.fetch_add(swap.compact(), Relaxed);
}

fn evict(swap: &Swap) {
    let mut job = Job::new(if any_slot() == 0 { What::All } else { What::Page(any_slot() as u32) });
    let result = swap.write_back(&mut Shrinker::new().expect("a shrinker"), &mut job);
    assert!(matches!(result, Ok(_) | Err(Error::BackingFull | Error::NoWriteback)), "{result:?}");
    EVICTED.fetch_add(job.pages, Relaxed);
}

fn shrink(swap: &Swap) {
    let before = swap.metrics().pages_written_back.get();
    let _on_a_bad_disk = swap.shrink(&mut Shrinker::new().expect("a shrinker"));
    EVICTED.fetch_add(swap.metrics().pages_written_back.get() - before, Relaxed);
}

fn clean(swap: &Swap) {
    let cleaned = swap.clean(&mut Cleaner::new().expect("a cleaner"));
    CLEANED.fetch_add(u64::from(cleaned.unwrap_or(false)), Relaxed);
}
