//! What the keeper keeps, made once: mount, state, counters, control socket. All of it is taken back when it is dropped.

use crate::state_file;
use crate::systemd::Store;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
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
    /// Takes what systemd's store has kept of an earlier keeper; else makes all of it, empty.
    ///
    /// Errors: what was wrong, and what to do; nothing is left then.
    pub fn new(mount_point: &Path, control: &Path, backing: Option<&Path>, store: &mut Store) -> Result<Kept, String> {
        let claim = backing.map_or(Ok(None), claim)?;
        let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        let control = match store.take("control") {
            Some(socket) => Ok(socket),
            None => socket::listen(control),
        }
        .map(|socket| Control { socket, path: control.to_owned() })
        .map_err(failed("control socket"))?;
        let state = store.take("state").map_or_else(state_file::create, Ok).map_err(failed("state file"))?;
        let counters = store.take("counters").map_or_else(counters_file, Ok).map_err(failed("counters"))?;
        let fuse = store.take("fuse").map_or_else(|| mount::mount(mount_point).map(OwnedFd::from), Ok);
        let mount = fuse.and_then(|fuse| {
            let device = mount::device_number(mount_point)?;
            Ok(Mount { fuse, device, point: mount_point.to_owned() })
        });
        Ok(Kept { mount: mount.map_err(failed("cannot mount"))?, control, state, counters, _claim: claim })
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
