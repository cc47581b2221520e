//! Opens the backing disk, which zswapd has checked and prepared.

use crate::args;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
#[cfg(debug_assertions)]
use zswapd_core::backing::Faults;
use zswapd_core::backing::{Disk, FileDisk};
use zswapd_core::store::DiskOptions;

/// The disk, all of it. It is nobody else's: the keeper has a block device open with O_EXCL, and a file is locked by the
/// descriptor that zswapd leaves to all of us.
///
/// Errors: what was wrong, and what to do.
pub fn open(args: &args::Backing) -> Result<DiskOptions, String> {
    let path = args.path.display();
    let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&args.path);
    let file = direct.map_err(|error| match error.raw_os_error() {
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
