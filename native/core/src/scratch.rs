//! What a thread needs to store and load pages: made once, so that neither allocates.

use crate::backing::ReadBuffer;
use crate::codec::Codecs;
use crate::error::Result;
use crate::store::LastCluster;

/// Codec contexts and buffers of one worker: one thread uses it at a time.
pub struct Scratch {
    pub codecs: Codecs,
    /// For a record of the backing disk.
    pub(crate) disk: ReadBuffer,
    /// For those of its records that have several pages.
    pub(crate) cluster: LastCluster,
    /// None: whoever uses it waits as long as it takes.
    pub(crate) may_wait: Option<Box<dyn FnMut() -> bool + Send>>,
}

impl Scratch {
    /// Allocates about 400 KiB, and is the last to do so. Errors: [`crate::error::Error::Invalid`] if zstd refuses its
    /// setting; [`crate::error::Error::System`] without memory.
    pub fn new() -> Result<Scratch> {
        Ok(Scratch { codecs: Codecs::new()?, disk: ReadBuffer::new()?, cluster: LastCluster::new(), may_wait: None })
    }

    /// As [`Scratch::new`], for a thread that has something else to do than to wait for the disk, or for who does.
    /// `may_wait` is called before a load waits for one of the two: another thread can take over what this one would have
    /// done meanwhile. False: it may not wait, and the load fails with [`crate::error::Error::NotNow`]. Stores and
    /// discards do not ask: they never wait for a slot's lock. (Those of a part of a page read the rest of it, and wait
    /// for the disk if it must be.)
    ///
    /// A load may call it three times, and a request that needs several loads for each. It may be called with a slot locked, so
    /// that it must use nothing of the store, and may not wait for who does.
    pub fn with_hook(may_wait: impl FnMut() -> bool + Send + 'static) -> Result<Scratch> {
        Ok(Scratch { may_wait: Some(Box::new(may_wait)), ..Scratch::new()? })
    }

    /// Forgets what was read from the disk for the last request.
    pub(crate) fn begin_request(&mut self) {
        self.disk.forget();
        self.cluster.forget();
    }

    /// Whether a load may wait for the disk.
    pub(crate) fn may_wait(&mut self) -> bool {
        self.may_wait.as_mut().is_none_or(|may_wait| may_wait())
    }
}
