//! Looking at all objects of the pool, behind a recovery: nobody has read their bytes since.

use super::Store;
use crate::object;

/// Slots that a step looks at, at most.
const BATCH: usize = 64;

/// How far it has come.
#[derive(Debug, Default)]
pub struct Verifier {
    next: u64,
}

impl Store {
    /// Verifies the next few objects of the pool, each with its slot locked. What is bad becomes LOST, and is counted.
    /// Returns whether there are more: then it is to be called again, after as long a pause as one likes.
    ///
    /// Page operations go on meanwhile. Allocates nothing, touches no disk.
    pub fn verify(&self, verifier: &mut Verifier) -> bool {
        for index in self.slots.touched(verifier.next..self.slots.all().end).take(BATCH) {
            verifier.next = u64::from(index) + 1;
            let mut slot = self.slots.lock(index);
            let (entry, object) = self.pin(&slot);
            if entry.object().is_none() {
                continue;
            }
            // SAFETY: as in `load_slot`.
            let good = object.as_ref().is_some_and(|object| object::verify(unsafe { object.bytes() }, index).is_some());
            drop(object);
            self.metrics.objects_verified.add(1);
            if !good {
                self.metrics.objects_found_bad.add(1);
                let _a_reader_is_told = self.found_corrupt(&mut slot);
            }
        }
        self.slots.touched(verifier.next..self.slots.all().end).next().is_some()
    }
}
