//! Opens the backing disk, which zswapd has checked and prepared.

use crate::args;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use zswapd_core::backing::{Disk, FileDisk};

/// The disk, and its size in bytes. Nobody else gets a block device as long as it is open (O_EXCL); a file is locked by
/// the descriptor that zswapd leaves to this process.
///
/// Errors: what was wrong, and what to do.
pub fn open(args: &args::Backing) -> Result<(Box<dyn Disk>, u64), String> {
    let path = args.path.display();
    let file = exclusive(&args.path).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => format!("the backing disk {path} is in use: free it, or name another"),
        Some(libc::EINVAL) => format!("{path} has no direct I/O: name a block device, or a file on ext4 or xfs"),
        _ => format!("cannot open the backing disk {path}: {error}"),
    })?;
    let disk = FileDisk::new(file.into());
    let bytes = disk.bytes().map_err(|error| format!("cannot tell the size of {path}: {error}"))?;
    #[cfg(debug_assertions)]
    let disk = crate::faults::FaultyDisk::new(disk, args.faults.clone());
    Ok((Box::new(disk), bytes))
}

fn exclusive(path: &Path) -> io::Result<File> {
    let is_block = std::fs::metadata(path)?.file_type().is_block_device();
    let flags = libc::O_DIRECT | if is_block { libc::O_EXCL } else { 0 };
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
}
