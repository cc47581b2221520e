//! What the keeper keeps, made once: mount, state, counters, control socket. All of it is taken back when it is dropped.

use crate::state_file;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use zswapd_fuse::mount;
use zswapd_keeper::descriptors::Descriptors;
use zswapd_keeper::socket;

pub struct Kept {
    // In the order in which it is taken back.
    pub mount: Mount,
    pub control: Control,
    pub state: OwnedFd,
    pub counters: OwnedFd,
    /// A block device that pages are written to is nobody else's (O_EXCL) as long as this is open.
    _claim: Option<File>,
}

pub struct Mount {
    pub fuse: OwnedFd,
    device: u64,
    point: PathBuf,
}

pub struct Control {
    pub socket: OwnedFd,
    path: PathBuf,
}

impl Kept {
    /// Of what an earlier keeper has left in systemd's store; else all of it is made, empty.
    ///
    /// Errors: what was wrong, and what to do; nothing is left then.
    pub fn new(
        point: PathBuf,
        path: PathBuf,
        backing: Option<&Path>,
        stored: Option<[OwnedFd; 4]>,
    ) -> Result<Kept, String> {
        let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        let claim = backing.map_or(Ok(None), claim)?;
        if let Some([fuse, state, counters, socket]) = stored {
            let device = mount::device_number(&point).map_err(failed("cannot find the mount"))?;
            let (mount, control) = (Mount { fuse, device, point }, Control { socket, path });
            return Ok(Kept { mount, control, state, counters, _claim: claim });
        }
        let socket = socket::listen(&path).map_err(failed("control socket"))?;
        let control = Control { socket, path };
        let state = state_file::create().map_err(failed("state file"))?;
        let counters = counters_file().map_err(failed("counters"))?;
        let fuse = mount::mount(&point).map_err(failed("cannot mount"))?.into();
        let device = mount::device_number(&point).map_err(failed("cannot mount"))?;
        Ok(Kept { mount: Mount { fuse, device, point }, control, state, counters, _claim: claim })
    }

    /// What is put into systemd's store, in its order.
    pub fn to_store(&self) -> [BorrowedFd<'_>; 4] {
        [self.mount.fuse.as_fd(), self.state.as_fd(), self.counters.as_fd(), self.control.socket.as_fd()]
    }

    /// The numbers of all this, for a pager whose channel is `channel`.
    pub fn descriptors(&self, channel: RawFd) -> Descriptors {
        Descriptors {
            channel,
            fuse: self.mount.fuse.as_raw_fd(),
            state: self.state.as_raw_fd(),
            counters: self.counters.as_raw_fd(),
            control: self.control.socket.as_raw_fd(),
            device: self.mount.device,
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Somebody else may have unmounted it, and mounted something else there.
        if mount::device_number(&self.point).is_ok_and(|now| now == self.device) {
            let _gone_already = mount::unmount(&self.point);
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _gone_already = std::fs::remove_file(&self.path);
    }
}

/// An empty file for the counters, whose length the first pager sets.
fn counters_file() -> io::Result<OwnedFd> {
    // SAFETY: a valid C string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"zswapd-counters".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just returned by the kernel, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has a block device for us alone; a file is locked by the descriptor that zswapd leaves to us.
fn claim(backing: &Path) -> Result<Option<File>, String> {
    let path = backing.display();
    let failed = |error: io::Error| format!("cannot open the backing disk {path}: {error}");
    if !std::fs::metadata(backing).map_err(failed)?.file_type().is_block_device() {
        return Ok(None);
    }
    let claimed = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(backing);
    claimed.map(Some).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => format!("the backing disk {path} is in use: free it, or name another"),
        _ => failed(error),
    })
}
