//! The engine: the swap file as a range of bytes over the page store.

use crate::codec::{Algorithm, Compression};
use crate::error::{Error, Result};
use crate::page::{Page, PAGE_SIZE};
use crate::pool::Allocator;
use crate::scratch::Scratch;
use crate::store::{Detached, DiskOptions, Files, Store};
use crate::sync::{AtomicU32, Ordering::Relaxed};
use std::sync::atomic::Ordering::Relaxed as Plain;

/// The largest swap file: a slot index has 32 bits.
pub const MAX_SIZE_BYTES: u64 = 16 << 40;

/// A swap file of fixed size. All methods take `&self` and may be called from several threads, each with its own
/// [`Scratch`].
pub struct Engine {
    store: Store,
    /// zstd level in the low byte, algorithm above: what the next store uses.
    compression: AtomicU32,
}

impl Engine {
    /// An empty swap file of `size` bytes whose pool takes at most `mem_limit` bytes of memory.
    ///
    /// Errors: [`Error::Invalid`] for a size that is 0, not whole pages or above 16 TiB; [`Error::System`].
    pub fn new(
        size: u64,
        allocator: Allocator,
        mem_limit: u64,
        compression: Compression,
        files: Files,
    ) -> Result<Engine> {
        if size == 0 || size % PAGE_SIZE as u64 != 0 || size > MAX_SIZE_BYTES {
            return Err(Error::Invalid(format!(
                "the swap file cannot have {size} bytes: use whole pages of {PAGE_SIZE} bytes, from one page to 16 TiB"
            )));
        }
        let store = Store::new(size / PAGE_SIZE as u64, allocator, mem_limit, files)?;
        let engine = Engine { store, compression: AtomicU32::new(0) };
        engine.store.metrics().swap_size_bytes.set(size);
        engine.set_compression(compression);
        engine.store.refresh_gauges();
        Ok(engine)
    }

    /// A swap file that goes on with what another process has left in `files`: see [`Store::recover`], also for what it
    /// takes. Its size, its limit and its compression are those of the state.
    ///
    /// Errors: [`Error::Invalid`], with nothing changed; [`Error::System`]: it may be tried again.
    pub fn recover(allocator: Allocator, files: Files, disk: Option<DiskOptions>) -> Result<Engine> {
        let store = Store::recover(allocator, files, disk)?;
        let packed = store.settings().compression.load(Plain) as u32;
        let engine = Engine { store, compression: AtomicU32::new(0) };
        engine.store.metrics().swap_size_bytes.set(engine.size());
        // Whatever stands there, pages can be stored.
        let unpacked = unpack(packed);
        let compression = Compression::new(unpacked.algorithm, unpacked.zstd_level.clamp(1, 22))?;
        engine.set_compression(compression);
        engine.store.refresh_gauges();
        Ok(engine)
    }

    /// Gives a new swap file, to which nothing was written yet, a backing disk: see [`Store::with_disk`].
    pub fn with_disk(self, options: DiskOptions) -> Result<Engine> {
        let engine = Engine { store: self.store.with_disk(options)?, ..self };
        engine.store.refresh_gauges();
        Ok(engine)
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Bytes of the swap file.
    pub fn size(&self) -> u64 {
        self.store.slots() * PAGE_SIZE as u64
    }

    /// What new pages are compressed with.
    pub fn compression(&self) -> Compression {
        unpack(self.compression.load(Relaxed))
    }

    /// Changes what new pages are compressed with. Stored pages stay as they are, and readable.
    pub fn set_compression(&self, compression: Compression) {
        let algorithm = u32::from(compression.algorithm == Algorithm::Zstd);
        let packed = algorithm << 8 | compression.zstd_level as u32;
        self.compression.store(packed, Relaxed);
        self.store.settings().compression.store(packed.into(), Plain);
        self.store.metrics().algorithm.set(u64::from(algorithm));
        self.store.metrics().zstd_level.set(compression.zstd_level as u64);
    }

    /// Reads from `offset` and returns how many bytes: less than asked for only at the end of the file.
    ///
    /// Errors: EIO if any page of the range is lost or corrupt, or the backing disk cannot read it; `buffer` is then
    /// undefined.
    pub fn read(&self, offset: u64, buffer: &mut [u8], scratch: &mut Scratch) -> Result<usize> {
        let rest = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = buffer.len().min(rest);
        scratch.begin_request();
        for part in parts(offset, length) {
            scratch.disk.expect((length - part.from - part.length) / PAGE_SIZE);
            let to = &mut buffer[part.from..part.from + part.length];
            match <&mut Page>::try_from(&mut *to) {
                Ok(whole) => self.store.load(part.slot, whole, scratch)?,
                Err(_) => {
                    let mut page: Page = [0; PAGE_SIZE];
                    self.store.load(part.slot, &mut page, scratch)?;
                    to.copy_from_slice(&page[part.at..part.at + part.length]);
                }
            }
        }
        Ok(length)
    }

    /// Writes all of `data` at `offset`.
    ///
    /// Errors: [`Error::OutOfRange`] if any of it is outside the file, with nothing written. Else the first error of
    /// any page (ENOSPC, or EIO for the part of a lost page); every other page is written all the same, so that no page
    /// of the range reads what it held before. [`Error::NoRoomYet`] and [`Error::NotNow`] before all others: the pages
    /// before the one that is meant are written, that one and those after it are not. The same, or the rest of it, is to
    /// be written again.
    pub fn write(&self, offset: u64, data: &[u8], scratch: &mut Scratch) -> Result<()> {
        self.check_range(offset, data.len() as u64)?;
        let with = self.compression();
        let mut result = Ok(());
        for part in parts(offset, data.len()) {
            let from = &data[part.from..part.from + part.length];
            let stored = match <&Page>::try_from(from) {
                Ok(whole) => self.store.store(part.slot, whole, with, scratch),
                Err(_) => self.store.store_part(part.slot, part.at, from, with, scratch),
            };
            if matches!(stored, Err(Error::NoRoomYet | Error::NotNow { .. })) {
                return stored;
            }
            result = result.and(stored);
        }
        result
    }

    /// Punches a hole: the range reads zeros when this returns.
    ///
    /// What it held goes to `detached`: see [`Store::discard`]. Errors: [`Error::OutOfRange`]; for the parts of pages
    /// at its two ends, as [`Engine::write`]; on [`Error::NoRoomYet`] and [`Error::NotNow`] the same hole is to be punched again.
    pub fn discard(&self, offset: u64, length: u64, detached: &mut Detached, scratch: &mut Scratch) -> Result<()> {
        self.check_range(offset, length)?;
        let page_size = PAGE_SIZE as u64;
        let end = offset + length;
        let (first, last) = (offset.next_multiple_of(page_size), end / page_size * page_size);
        if first > last {
            return self.write(offset, &[0; PAGE_SIZE][..length as usize], scratch);
        }
        self.store.try_discard(first / page_size..last / page_size, detached, scratch)?;
        // Both ends, whatever becomes of the first: none may read what it held before.
        let head = self.write(offset, &[0; PAGE_SIZE][..(first - offset) as usize], scratch);
        let tail = self.write(last, &[0; PAGE_SIZE][..(end - last) as usize], scratch);
        match (head, tail) {
            (again @ Err(Error::NoRoomYet | Error::NotNow { .. }), _) => again,
            (_, again @ Err(Error::NoRoomYet | Error::NotNow { .. })) => again,
            (head, tail) => head.and(tail),
        }
    }

    /// Drops every page: the whole file reads zeros when this returns, and its objects are freed.
    pub fn reset(&self) {
        self.store.discard(0..self.store.slots(), &mut Detached::with_capacity(0));
    }

    /// Errors: [`Error::OutOfRange`], counted, if any of the range is outside the file.
    pub fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        let size = self.size();
        if offset.checked_add(length).is_some_and(|end| end <= size) {
            return Ok(());
        }
        self.store.metrics().rejected_out_of_range.add(1);
        Err(Error::OutOfRange { offset, length, size })
    }
}

fn unpack(packed: u32) -> Compression {
    let algorithm = if packed >> 8 == 0 { Algorithm::Lz4 } else { Algorithm::Zstd };
    Compression { algorithm, zstd_level: (packed & 0xff) as i32 }
}

/// The part of a byte range that lies in one page.
struct Part {
    slot: u32,
    /// Where in the page it begins.
    at: usize,
    /// Where in the caller's buffer it begins.
    from: usize,
    length: usize,
}

fn parts(offset: u64, length: usize) -> impl Iterator<Item = Part> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let position = offset + from as u64;
        let at = (position % PAGE_SIZE as u64) as usize;
        let part =
            Part { slot: (position / PAGE_SIZE as u64) as u32, at, from, length: (PAGE_SIZE - at).min(length - from) };
        from += part.length;
        (part.length > 0).then_some(part)
    })
}

#[cfg(all(test, not(feature = "model")))]
mod tests;
