//! The end of a store: who is still at work is waited for, in order, each behind a gate of their own.

use super::disk::Writeback;
use super::Store;
use crate::backing::Backing;
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::object;
use std::time::Duration;

/// Who is at work on the store besides those who load and store pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// Shrinkers that are filling or writing a segment.
    pub writebacks: u32,
    pub cleanings: u32,
    /// Pages that are being recompressed.
    pub recompressions: u32,
    /// Who is moving objects of the pool.
    pub movers: u32,
}

/// An object that no slot named at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaked {
    /// Of its class, in bytes.
    pub size: usize,
    /// As its header says, which may be damaged.
    pub slot: Option<u32>,
}

impl Store {
    /// How many are at work now.
    pub fn in_flight(&self) -> InFlight {
        let inside = |gate: fn(&Writeback) -> &Gate| self.writeback.as_ref().map_or(0, |all| gate(all).inside());
        InFlight {
            writebacks: inside(|all| &all.writebacks),
            cleanings: inside(|all| &all.cleanings),
            recompressions: self.recompression.gate.inside(),
            movers: self.pool.movers(),
        }
    }

    /// Ends all recompressing, and all writing to the disk, for ever, and waits for who is at it: for the recompressor, for
    /// shrinkers, then for cleaners, `patience` each at most. Returns who is still at work; may be called again. Pages on the
    /// disk stay readable.
    ///
    /// Stores that wait for room find none from now on.
    pub fn stop_writeback(&self, patience: Duration) -> InFlight {
        self.recompression.gate.close();
        self.recompression.gate.wait(patience);
        if let Some(Writeback { writebacks, cleanings, .. }) = &self.writeback {
            writebacks.close();
            cleanings.close();
            writebacks.wait(patience);
            cleanings.wait(patience);
        }
        self.in_flight()
    }

    /// The end: waits for who is at work on the store (each for `patience` at most), and returns the objects that still
    /// live. There should be none.
    ///
    /// The key of the backing disk is wiped then: what lies there is noise.
    ///
    /// To be called when all slots have been emptied, no page operation is in flight, and none will come; nothing is
    /// written back, cleaned or moved any more. In this order: shrinkers and cleaners still free what they had under
    /// way, and the pool may only end after that. Errors: [`Error::Busy`] if somebody is still at it: it may be called
    /// again.
    pub fn destroy(&self, patience: Duration) -> Result<Vec<Leaked>> {
        let InFlight { writebacks, cleanings, recompressions, movers } = self.stop_writeback(patience);
        if writebacks + cleanings + recompressions > 0 {
            return Err(Error::Busy { writebacks, cleanings, recompressions, movers });
        }
        self.empty_those_left();
        let mut leaked = Vec::new();
        let moving = self.pool.destroy(patience, |size, object| {
            leaked.push(Leaked { size, slot: object::slot_of(object) });
        });
        match moving {
            0 => {
                // Here, since other threads hold on to the store as long as the process lives.
                self.backing().into_iter().for_each(Backing::wipe_key);
                Ok(leaked)
            }
            movers => Err(Error::Busy { writebacks, cleanings, recompressions, movers }),
        }
    }
}
