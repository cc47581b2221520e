//! What a thread needs to store and load pages: made once, so that neither allocates.

use crate::backing::ReadBuffer;
use crate::codec::Codecs;
use crate::error::Result;

/// Codec contexts and buffers of one worker: one thread uses it at a time.
pub struct Scratch {
    pub codecs: Codecs,
    /// For a record of the backing disk.
    pub(crate) disk: ReadBuffer,
    pub(crate) before_disk: Box<dyn FnMut() + Send>,
}

impl Scratch {
    /// Allocates about 400 KiB, and is the last to do so. Errors: [`crate::error::Error::Invalid`] if zstd refuses its
    /// setting; [`crate::error::Error::System`] without memory.
    pub fn new() -> Result<Scratch> {
        Scratch::with_hook(|| ())
    }

    /// As [`Scratch::new`]. `before_disk` is called before each read from the disk, which may take long: another thread
    /// can take over what else this one would have done meanwhile.
    ///
    /// A request may need several reads, and calls it for each. It is called with a slot locked, so that it must use
    /// nothing of the store, and may not wait for who does.
    pub fn with_hook(before_disk: impl FnMut() + Send + 'static) -> Result<Scratch> {
        Ok(Scratch { codecs: Codecs::new()?, disk: ReadBuffer::new()?, before_disk: Box::new(before_disk) })
    }
}
