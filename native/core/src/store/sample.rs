//! Looking whether pages can be read back from the disk, before all of them are to be: swapoff gives up for ever what it
//! cannot read.

use super::Store;
use crate::backing::ReadBuffer;
use crate::error::{Error, Result};
use crate::object;
use crate::slots::Entry;

impl Store {
    /// Reads and verifies pages that lie on the disk, `most` of them at most, spread evenly over the swap file, until one
    /// cannot be read. Returns how many could. `start`, any number, says which ones, if there are more.
    ///
    /// Every page stays where it is, and as it is. Waits for the disk; page operations go on meanwhile, but for that on
    /// the page that is read. Allocates nothing. Looks at all slot words that were ever used. Ends early when writeback is
    /// stopped. Errors: [`Error::DiskRead`], [`Error::Corrupt`]: what a load of that page would find now.
    pub fn sample_disk(&self, buffer: &mut ReadBuffer, most: u64, start: u64) -> Result<u64> {
        let Some(writeback) = &self.writeback else { return Ok(0) };
        // The end of the store waits for us, as it would have to wait for the slot.
        let Some(_pass) = writeback.writebacks.enter() else { return Ok(0) };
        let step = self.metrics.pages_on_disk.get().div_ceil(most.max(1)).max(1);
        let on_disk = |index: &u32| {
            self.slots.peek(*index).is_some_and(|word| matches!(word.entry(), Entry::Disk(_)))
                && !writeback.writebacks.is_closed()
        };
        let all = self.slots.touched(self.slots.all()).filter(on_disk);
        let mut read = 0;
        for index in all.skip((start % step) as usize).step_by(step as usize).take(most as usize) {
            let slot = self.slots.lock(index);
            let Entry::Disk(at) = slot.word().entry() else { continue };
            buffer.forget();
            let object = writeback.backing.read(at, index, slot.word().generation(), buffer)?;
            // Of a cluster `read` has seen all that can be seen.
            if !at.is_cluster() {
                object::verify(object, index).ok_or(Error::Corrupt { slot: index })?;
            }
            read += 1;
        }
        Ok(read)
    }
}
