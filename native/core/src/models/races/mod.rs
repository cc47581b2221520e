//! One file for each subject, one test for each race.

mod cleaning;
mod clusters;
mod gate;
mod moving;
mod recompress;
mod sharing;
mod writeback;
mod z3fold;
mod zspage_lock;

use super::Swap;
use crate::store::{Cleaner, Job, Shrinker, What};
use crate::sync::AtomicU32;
use loom::thread::{Builder, JoinHandle};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Arc;

/// Of a thread of a model, in words: the checker's own choice is too little for a page and a codec.
const STACK: usize = 1 << 15;

/// LOOM_MAX_PREEMPTIONS asks for more. With 3 the models take seconds, with 5 minutes.
const PREEMPTIONS: usize = 3;

impl Swap {
    /// Writes pages back, all in one segment if they fit.
    fn evict(&self, what: What) {
        let (mut shrinker, mut job) = (Shrinker::new().expect("a shrinker"), Job::new(what));
        while let Ok(true) = self.write_back(&mut shrinker, &mut job) {}
    }

    /// As `evict`, of cold pages: four neighbours together.
    fn evict_cold(&self) {
        let shrinker = Shrinker::with_clusters().expect("a shrinker");
        let (mut shrinker, mut job) = (shrinker, Job::new(What::Unused { seconds: 0 }));
        while let Ok(true) = self.write_back(&mut shrinker, &mut job) {}
    }

    fn clean_up(&self) {
        let mut cleaner = Cleaner::new().expect("a cleaner");
        while let Ok(true) = self.clean(&mut cleaner) {}
    }
}

/// Runs a model through all schedules with at most so many preemptions, and says how many they were.
fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(PREEMPTIONS);
    builder.max_branches = 100_000;
    let schedules: &AtomicU64 = Box::leak(Box::default());
    let model = Arc::new(model);
    builder.check(move || {
        schedules.fetch_add(1, Relaxed);
        let model = model.clone();
        join(spawn(move || model()));
    });
    let name = std::thread::current().name().unwrap_or("a model").to_string();
    println!("{name}: {} schedules", schedules.load(Relaxed));
}

/// Both threads touch something at their beginning, in no order, so that either may run first. The checker looks for
/// other schedules where an access conflicts with the last one to the same atomic, and with no earlier one: a thread
/// that loads before it stores would hide from it that another one has loaded too.
fn spawn<T: Send + 'static>(thread: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let touched = Arc::new(AtomicU32::new(0));
    let by_it = touched.clone();
    let spawned = move || {
        by_it.fetch_add(1, Relaxed);
        thread()
    };
    let handle = Builder::new().stack_size(STACK).spawn(spawned).expect("a thread");
    touched.fetch_add(1, Relaxed);
    handle
}

fn join<T>(thread: JoinHandle<T>) -> T {
    thread.join().expect("a thread that does not panic")
}
