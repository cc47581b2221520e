//! What a backing disk is to the rest: blocks that are read and written.

#[cfg(any(test, debug_assertions, feature = "testing"))]
use crate::sync::{Mutex, PoisonError};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// A disk, or a file, read and written in whole blocks of 4 KiB, to and from memory that begins at such a block's
/// border. A transfer is whole, or an error, after which some of it may have been done.
pub trait Disk: Send + Sync {
    /// Waits for the disk. Allocates nothing.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// Waits for the disk. Allocates nothing.
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()>;
}

impl<D: Disk + ?Sized> Disk for std::sync::Arc<D> {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        (**self).read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        (**self).write(offset, from)
    }
}

/// A block device or file opened with O_DIRECT, for reading and writing.
pub struct FileDisk(OwnedFd);

impl FileDisk {
    pub fn new(file: OwnedFd) -> FileDisk {
        FileDisk(file)
    }

    /// The size of the file, or of the block device, which fstat(2) does not say.
    pub fn bytes(&self) -> io::Result<u64> {
        // SAFETY: plain system call; the file offset is used for nothing else.
        let end = unsafe { libc::lseek(self.0.as_raw_fd(), 0, libc::SEEK_END) };
        u64::try_from(end).map_err(|_| io::Error::last_os_error())
    }
}

impl Disk for FileDisk {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let fd = self.0.as_raw_fd();
        transfer(into.len(), |done| {
            let rest = &mut into[done..];
            // SAFETY: `rest` is valid for as many bytes.
            unsafe { libc::pread(fd, rest.as_mut_ptr().cast(), rest.len(), (offset + done as u64) as libc::off_t) }
        })
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let fd = self.0.as_raw_fd();
        transfer(from.len(), |done| {
            let rest = &from[done..];
            // SAFETY: `rest` is valid for as many bytes.
            unsafe { libc::pwrite(fd, rest.as_ptr().cast(), rest.len(), (offset + done as u64) as libc::off_t) }
        })
    }
}

/// Makes system calls, each for what those before it have not done, until all of `length` bytes is. Interrupted ones are
/// made again. A call that does nothing is the end of the file.
fn transfer(length: usize, mut call: impl FnMut(usize) -> isize) -> io::Result<()> {
    let mut done = 0;
    while done < length {
        match usize::try_from(call(done)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// Stands in for a disk in tests and models: what was never written is zero.
#[cfg(any(test, debug_assertions, feature = "testing"))]
pub struct MemoryDisk(Mutex<Box<[u8]>>);

#[cfg(any(test, debug_assertions, feature = "testing"))]
impl MemoryDisk {
    pub fn new(bytes: usize) -> MemoryDisk {
        MemoryDisk(Mutex::new(vec![0; bytes].into()))
    }

    /// Gives its bytes to `change`, as another would find or damage them.
    pub fn with<R>(&self, change: impl FnOnce(&mut [u8]) -> R) -> R {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(any(test, debug_assertions, feature = "testing"))]
impl Disk for MemoryDisk {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.with(|bytes| into.copy_from_slice(&bytes[offset as usize..][..into.len()]));
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.with(|bytes| bytes[offset as usize..][..from.len()].copy_from_slice(from));
        Ok(())
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;

    /// What the system calls of a test answer, one after the other: bytes, or errno below zero.
    fn answers(length: usize, answers: &[isize]) -> (io::Result<()>, Vec<usize>) {
        let (mut answers, mut asked) = (answers.iter(), Vec::new());
        let result = transfer(length, |done| {
            asked.push(done);
            let answer = *answers.next().expect("no more calls");
            if answer < 0 {
                // SAFETY: errno of this thread.
                unsafe { *libc::__errno_location() = -answer as i32 };
                return -1;
            }
            answer
        });
        (result, asked)
    }

    #[test]
    fn a_short_or_interrupted_transfer_goes_on() {
        let (result, asked) = answers(8192, &[512, -libc::EINTR as isize, 7168, 512]);
        assert!(result.is_ok());
        assert_eq!(asked, [0, 512, 512, 7680]);
    }

    #[test]
    fn an_error_and_the_end_of_the_file_are_reported() {
        for errno in [libc::EIO, libc::ENOSPC] {
            let (result, _) = answers(4096, &[512, -errno as isize]);
            assert_eq!(result.expect_err("reported").raw_os_error(), Some(errno));
        }
        let (result, _) = answers(4096, &[512, 0]);
        assert_eq!(result.expect_err("reported").kind(), io::ErrorKind::UnexpectedEof);
    }
}
