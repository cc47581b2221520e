//! Opens the backing disk, which zswapd has checked and prepared.

use crate::args;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
#[cfg(debug_assertions)]
use zswapd_core::backing::Faults;
use zswapd_core::backing::{Disk, FileDisk};
use zswapd_core::store::DiskOptions;

/// The disk, all of it. Nobody else gets a block device as long as it is open (O_EXCL); a file is locked by
/// the descriptor that zswapd leaves to this process.
///
/// Errors: what was wrong, and what to do.
pub fn open(args: &args::Backing) -> Result<DiskOptions, String> {
    let path = args.path.display();
    let file = exclusive(&args.path).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => format!("the backing disk {path} is in use: free it, or name another"),
        Some(libc::EINVAL) => format!("{path} has no direct I/O: name a block device, or a file on ext4 or xfs"),
        _ => format!("cannot open the backing disk {path}: {error}"),
    })?;
    let disk = FileDisk::new(file.into());
    let bytes = disk.bytes().map_err(|error| format!("cannot tell the size of {path}: {error}"))?;
    let disk: Box<dyn Disk> = match args.faults.as_deref() {
        #[cfg(debug_assertions)]
        Some(rules) => Box::new(Faults::new(disk, rules).map_err(|error| format!("--faults: {error}"))?),
        _ => Box::new(disk),
    };
    Ok(DiskOptions { disk, bytes, encryption: args.encryption, incompressible: args.incompressible })
}

fn exclusive(path: &Path) -> io::Result<File> {
    let is_block = std::fs::metadata(path)?.file_type().is_block_device();
    let flags = libc::O_DIRECT | if is_block { libc::O_EXCL } else { 0 };
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
}
