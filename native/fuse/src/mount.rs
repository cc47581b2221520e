//! Mounting by mount(2), without a helper program.

use crate::init::MAX_READ;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens /dev/fuse and mounts it at `mount_point`; the descriptor is non-blocking.
///
/// Errors: that of open(2) or mount(2); nothing is mounted then.
pub fn mount(mount_point: &Path) -> io::Result<File> {
    let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/fuse")?;
    let target = CString::new(mount_point.as_os_str().as_bytes())?;
    // rootmode: the root is a directory. Other users may read counters; the modes of the files say what they may do.
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={MAX_READ}",
        device.as_raw_fd()
    );
    let options = CString::new(options)?;
    // SAFETY: all strings are valid for the call.
    let result = unsafe {
        libc::mount(
            c"zswapd".as_ptr(),
            target.as_ptr(),
            c"fuse.zswapd".as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_NOATIME,
            options.as_ptr().cast(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(device)
}

/// Gives a descriptor of a mount's /dev/fuse a channel of its own (FUSE_DEV_IOC_CLONE), under the same number: when the
/// last descriptor of that is closed, the kernel ends with ECONNABORTED what was read from it and not answered.
///
/// Nobody else in the process may use it meanwhile. Errors: those of the system calls; it is as it was then.
pub fn separate(device: &File) -> io::Result<()> {
    /// _IOR(FUSE_DEV_IOC_MAGIC, 0, uint32_t)
    const FUSE_DEV_IOC_CLONE: libc::c_ulong = 0x8004_e500;
    let own = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/fuse")?;
    let shared = device.as_raw_fd();
    // SAFETY: reads the number that it is given; then one descriptor that we own takes the place of another.
    let result = unsafe {
        match libc::ioctl(own.as_raw_fd(), FUSE_DEV_IOC_CLONE as _, &raw const shared) {
            0 => libc::dup3(own.as_raw_fd(), shared, libc::O_CLOEXEC),
            _ => -1,
        }
    };
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The number of the device that stat(2) shows for files of the mount (st_dev). Asks the kernel alone, not the server.
pub fn device_number(mount_point: &Path) -> io::Result<u64> {
    let target = CString::new(mount_point.as_os_str().as_bytes())?;
    // SAFETY: all-zero is a valid statx.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_STATX_DONT_SYNC;
    // SAFETY: the string is valid for the call, and `status` is large enough.
    if unsafe { libc::statx(libc::AT_FDCWD, target.as_ptr(), flags, 0, &mut status) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(libc::makedev(status.stx_dev_major, status.stx_dev_minor))
}

/// Takes the mount away from the directory tree at once; who has a file open keeps it.
pub fn unmount(mount_point: &Path) -> io::Result<()> {
    let target = CString::new(mount_point.as_os_str().as_bytes())?;
    // SAFETY: the string is valid for the call.
    if unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
