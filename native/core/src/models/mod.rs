//! The core under model checkers: its own code, whose atomics and locks are the checker's (`standin/`).
//!
//! loom runs each of the `races` through every schedule with at most so many preemptions, and through every value that
//! a load may return under the memory model of C11. shuttle runs whole `flows` through many random schedules.
//! `tests/mutants` holds the proof that they see something: each mutant brings a bug back, and its model fails.

#[cfg(feature = "shuttle")]
mod flows;
#[cfg(feature = "loom")]
mod races;

use crate::backing::{Disk, SEGMENT_BYTES};
use crate::codec::{Algorithm, Compression};
use crate::engine::Engine;
use crate::lru::Incompressible;
use crate::page::{Page, PAGE_SIZE};
use crate::pool::Allocator;
use crate::scratch::Scratch;
use crate::store::{Detached, DiskOptions, Files, Store};
use std::cell::RefCell;
use std::ops::Deref;
use std::time::Duration;

/// The checkers' clocks stand still: who waits so long waits until it is woken.
const FOREVER: Duration = Duration::from_secs(1 << 30);

/// The size of what a page becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Two objects share a zspage of one page.
    Small,
    /// One object takes a zspage of two pages: noise, which does not get smaller.
    Large,
    /// As large, to lz4; zstd makes it `Small`.
    Loose,
}

/// A page that can be told from every other one.
fn page(kind: Kind, stamp: u8) -> Page {
    let mut noise = u32::from(stamp) + 1;
    let mut next = || {
        noise ^= noise << 13;
        noise ^= noise >> 17;
        noise ^= noise << 5;
        noise as u8
    };
    let pattern: [u8; 8] = std::array::from_fn(|_| next());
    let mut page: Page = std::array::from_fn(|n| match kind {
        Kind::Small => pattern[n % 8],
        Kind::Large => next(),
        Kind::Loose => next() & 7,
    });
    page[0] = stamp;
    page
}

/// A swap file of a few pages, with what a model does to it.
struct Swap(Engine);

impl Deref for Swap {
    type Target = Store;
    fn deref(&self) -> &Store {
        self.0.store()
    }
}

impl Swap {
    fn new(allocator: Allocator, pages: u64, limit_pages: u64) -> Swap {
        let with = Compression { algorithm: Algorithm::Lz4, zstd_level: 1 };
        let [size, limit] = [pages, limit_pages].map(|pages| pages * PAGE_SIZE as u64);
        Swap(Engine::new(size, allocator, limit, with, Files::default()).expect("an engine"))
    }

    /// As `new`, with a backing disk of so many segments. A segment has room for one large page, or for many small ones.
    fn with_disk(pages: u64, limit_pages: u64, segments: usize, disk: impl Disk + 'static) -> Swap {
        let bytes = (segments * SEGMENT_BYTES) as u64;
        let incompressible = Incompressible::Writeback;
        let options = DiskOptions { disk: Box::new(disk), bytes, encryption: false, incompressible };
        Swap(Swap::new(Allocator::Zsmalloc, pages, limit_pages).0.with_disk(options).expect("a disk"))
    }

    /// Empties and ends the store, and checks that nothing was lost, left or counted twice.
    fn end(&self) {
        self.discard(0..self.slots(), &mut Detached::with_capacity(0));
        assert_eq!(self.destroy(FOREVER).expect("who is moving comes to an end"), vec![]);
        self.assert_nothing_left();
    }

    fn assert_nothing_left(&self) {
        let metrics = self.metrics();
        let pages = [
            &metrics.pages_lz4,
            &metrics.pages_zstd,
            &metrics.pages_incompressible,
            &metrics.pages_lost,
            &metrics.pages_shared,
            &metrics.shared_pages,
            &metrics.pages_on_disk,
            &metrics.compressed_bytes,
        ];
        assert!(pages.iter().all(|gauge| gauge.get() == 0), "pages are counted that are no more");
        assert_eq!(metrics.disk_live_bytes.get(), 0, "records on the disk were not freed");
        // A segment that could not be written may not be used again.
        let spoilt = metrics.writeback_errors.get() * SEGMENT_BYTES as u64;
        let free = metrics.backing_free_bytes.get();
        assert!(free + spoilt >= metrics.backing_bytes.get(), "segments were not given back");
        assert_eq!(metrics.pool_bytes.get(), 0, "pages of the arena were not given back");
        assert!(metrics.classes.iter().all(|class| (class.objects.get(), class.zspages.get()) == (0, 0)));
    }
}

/// Lends a scratch that no other thread of the model has now: one is too dear to be made for every schedule.
fn with_scratch<R>(use_it: impl FnOnce(&mut Scratch) -> R) -> R {
    thread_local! {
        static IDLE: RefCell<Vec<Scratch>> = const { RefCell::new(Vec::new()) };
    }
    let idle = IDLE.with(|idle| idle.borrow_mut().pop());
    let mut scratch = idle.unwrap_or_else(|| Scratch::new().expect("a scratch"));
    let result = use_it(&mut scratch);
    IDLE.with(|idle| idle.borrow_mut().push(scratch));
    result
}
