//! Counts what a thread allocates or frees on the way of a page.

use super::record::{RECORD_HEADER, TAG};
use super::tests::{object, Fixture};
use super::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

struct Counted;

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTED: Counted = Counted;

/// How often this thread has allocated or freed.
pub(crate) fn count() -> usize {
    COUNT.get()
}

#[test]
fn nothing_allocates_on_the_way_of_a_page() {
    for encryption in [true, false] {
        let Fixture { backing, mut writer, mut buffer, .. } =
            Fixture::new(3, encryption, "write:3:eio,read:2:eio,read:3-4:flip");
        let (mut cleaner, object) = (CleanBuffer::new().expect("a buffer"), object(1, BLOCK - RECORD_HEADER - TAG));
        let before = COUNT.get();
        for _ in 0..2 {
            writer.begin(&backing, Purpose::Evict).expect("room");
            while writer.add(&backing, 1, 1, &object).is_some() {}
            writer.write(&backing).expect("written");
            writer.records()[1..].iter().for_each(|record| backing.free(record.location));
            writer.finish(&backing);
        }
        let victim = backing.victim().expect("two sparse ones");
        cleaner.read(&backing, &victim).expect("readable");
        let record = cleaner.next_record().expect("a record");
        assert!(cleaner.object(&backing).is_some());
        assert!(backing.read(record.location, 1, 1, &mut buffer).is_err());
        assert!(backing.read(record.location, 1, 1, &mut buffer).is_err());
        assert!(backing.read(record.location, 1, 1, &mut buffer).is_ok());
        writer.begin(&backing, Purpose::Clean).expect("a segment is kept back");
        writer.add(&backing, 1, 2, &object).expect("fits");
        assert!(writer.write(&backing).is_err());
        writer.finish(&backing);
        backing.release(victim);
        assert_eq!(COUNT.get(), before);
    }
}
