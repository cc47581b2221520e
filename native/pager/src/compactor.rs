//! The compactor: moves objects together when it is worth it, or asked for; and verifies, a few at a time, those that
//! were taken over.

use crate::Shared;
use std::thread;
use std::time::Duration;
use zswapd_core::store::Verifier;

/// Between two steps of verifying, of 64 objects each: some percent of a processor.
const PACE: Duration = Duration::from_millis(5);

/// Looks whether there is something to do, at once and whenever it is woken, for ever.
pub fn run(shared: &Shared) {
    let store = shared.engine.store();
    store.pool().become_compactor();
    shared.trouble.become_teller();
    shared.disk_trouble.become_teller();
    let mut verifier = shared.verify.then(Verifier::default);
    loop {
        shared.trouble.say();
        shared.disk_trouble.say();
        // Again after a run that has freed something: meanwhile there may have come more than wakes us.
        while store.pool().wants_compaction() && store.compact() > 0 {}
        match verifier.take() {
            Some(mut unfinished) => {
                verifier = store.verify(&mut unfinished).then_some(unfinished);
                thread::park_timeout(PACE);
            }
            None => thread::park(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, Kernel, SIZE};
    use std::time::Instant;
    use zswapd_core::page::PAGE_SIZE;
    use zswapd_core::scratch::Scratch;
    use zswapd_core::store::Detached;

    #[test]
    fn what_was_fragmented_before_it_began_is_compacted() {
        let shared = Kernel::new().shared.clone();
        let (mut scratch, mut detached) = (Scratch::new().expect("memory"), Detached::with_capacity(0));
        shared.engine.write(0, &noise(1, SIZE as usize / PAGE_SIZE), &mut scratch).expect("room");
        for n in (0..SIZE).step_by(4 * PAGE_SIZE) {
            let three = 3 * PAGE_SIZE as u64;
            shared.engine.discard(n, three, &mut detached, &mut scratch).expect("in range");
        }
        std::thread::spawn({
            let shared = shared.clone();
            move || run(&shared)
        });
        let deadline = Instant::now() + Duration::from_secs(60);
        // All of it, though nobody frees anything any more.
        while shared.engine.store().metrics().pages_compacted.get() < 512 {
            assert!(Instant::now() < deadline, "it waits for somebody to wake it");
            std::thread::yield_now();
        }
    }
}
