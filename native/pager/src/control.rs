//! The control socket: a connection carries one command and its reply, each a message (SOCK_SEQPACKET) of text.
//!
//! | command | reply |
//! | --- | --- |
//! | `status` | `ok pid=N opens=N protected=N forgets=N footprint=N`: see `status` below |
//! | `counters` | `ok`, with the descriptor of the counters |
//! | `relay` | `ok`, with the descriptor that pyfuse3 is to serve; EBUSY while another one has it |
//! | `mem-limit BYTES` | `ok` |
//! | `compression NAME LEVEL` | `ok` |
//! | `compact` | `ok`: it has begun |
//! | `reset` | `ok`, or EBUSY while the swap file is open |
//! | `stop` | `ok`, or EBUSY while the swap file is open; then the pager unmounts and ends |
//!
//! A failure is `error ERRNO TEXT`.

use crate::Shared;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use zswapd_core::codec::{Algorithm, Compression};
use zswapd_core::error::Error;
use zswapd_core::page::PAGE_SIZE;

const MESSAGE: usize = 512;

/// The socket that zswapd and zswapctl connect to. Removed when dropped.
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

/// What becomes of the connection, or the pager, after a command.
enum Reply {
    Text(String),
    Descriptor(OwnedFd),
    Stop,
}

impl Listener {
    /// Makes the socket, for root alone. A socket file that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> io::Result<Listener> {
        let socket = seqpacket()?;
        let address = address_of(path)?;
        let length = size_of_val(&address) as libc::socklen_t;
        let bind = || {
            // SAFETY: `address` is a sockaddr_un of that length.
            check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })
        };
        // SAFETY: sets the mask of the only thread that there is yet.
        let mask = unsafe { libc::umask(0o177) };
        let bound = bind().or_else(|error| {
            let probe = seqpacket()?;
            // SAFETY: as for bind.
            let alive = unsafe { libc::connect(probe.as_raw_fd(), (&raw const address).cast(), length) } == 0;
            if error.raw_os_error() != Some(libc::EADDRINUSE) || alive {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            bind()
        });
        // SAFETY: as above.
        unsafe { libc::umask(mask) };
        bound?;
        // SAFETY: plain system call on our socket.
        check(unsafe { libc::listen(socket.as_raw_fd(), 8) })?;
        Ok(Listener { socket, path: path.to_owned() })
    }

    pub fn closer(&self) -> io::Result<Closer> {
        Ok(Closer(self.socket.try_clone()?))
    }

    /// Answers commands until one of them is `stop`, or until it is closed.
    pub fn serve(&self, shared: &Shared) -> io::Result<()> {
        loop {
            let (socket, flags) = (self.socket.as_raw_fd(), libc::SOCK_CLOEXEC);
            // SAFETY: plain system call; the result is checked.
            let accepted = unsafe { libc::accept4(socket, std::ptr::null_mut(), std::ptr::null_mut(), flags) };
            if accepted < 0 {
                match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    // Shut down by `Closer`: the file system is gone.
                    error if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
                    error => return Err(error),
                }
            }
            // SAFETY: just returned by the kernel, and nobody else has it.
            let connection = unsafe { OwnedFd::from_raw_fd(accepted) };
            if answer(&connection, shared) {
                return Ok(());
            }
        }
    }
}

/// Ends [`Listener::serve`] from another thread.
pub struct Closer(OwnedFd);

impl Closer {
    pub fn close(&self) {
        // SAFETY: plain system call on a descriptor that we own.
        unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Answers the command of one connection. True if the pager is to stop.
fn answer(connection: &OwnedFd, shared: &Shared) -> bool {
    // Whoever connects and says nothing does not keep others waiting for long.
    let patience = libc::timeval { tv_sec: 1, tv_usec: 0 };
    let length = size_of_val(&patience) as libc::socklen_t;
    let (value, fd) = (&raw const patience, connection.as_raw_fd());
    // SAFETY: `value` points to `length` bytes.
    unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, value.cast(), length) };
    let mut buffer = [0; MESSAGE];
    // SAFETY: the buffer is valid for its length.
    let received = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_TRUNC) };
    let Ok(length @ 1..) = usize::try_from(received) else { return false };
    let result = match buffer.get(..length) {
        Some(command) => execute(&String::from_utf8_lossy(command).split_whitespace().collect::<Vec<_>>(), shared),
        // What there is of it might be another command.
        None => Err(Error::Invalid(format!("a command of {length} bytes is too long"))),
    };
    let (text, descriptor, stop) = match result {
        Ok(Reply::Text(text)) => (format!("ok {text}"), None, false),
        Ok(Reply::Descriptor(descriptor)) => ("ok".into(), Some(descriptor), false),
        Ok(Reply::Stop) => ("ok".into(), None, true),
        Err(error) => (format!("error {} {error}", error.errno()), None, false),
    };
    // Who asked may be gone: what was done stays done.
    let _ = send(connection, text.as_bytes(), descriptor.as_ref());
    stop
}

fn execute(words: &[&str], shared: &Shared) -> Result<Reply, Error> {
    let done = || Ok(Reply::Text(String::new()));
    let system = |what| move |source| Error::System { what, source };
    match words {
        ["status"] => {
            shared.engine.store().refresh_gauges();
            Ok(Reply::Text(status(shared)))
        }
        ["counters"] => {
            // A description of its own, that cannot write.
            let path = format!("/proc/self/fd/{}", shared.counters.as_raw_fd());
            let file = OpenOptions::new().read(true).open(path).map_err(system("cannot open the counters"))?;
            Ok(Reply::Descriptor(file.into()))
        }
        ["relay"] => shared.relay.connect().map(Reply::Descriptor).map_err(system("another zswapd is connected")),
        ["compact"] => {
            shared.engine.store().pool().ask_for_compaction();
            done()
        }
        ["mem-limit", bytes] => {
            let bytes = bytes.parse().map_err(|_| Error::Invalid(format!("not a size: {bytes}")))?;
            shared.engine.store().pool().set_limit_bytes(bytes);
            done()
        }
        ["compression", name, level] => {
            let algorithm: Algorithm = name.parse()?;
            let level = level.parse().map_err(|_| Error::Invalid(format!("not a level: {level}")))?;
            shared.engine.set_compression(Compression::new(algorithm, level)?);
            done()
        }
        ["reset"] => {
            refuse_open(shared)?;
            shared.engine.reset();
            done()
        }
        ["stop"] => {
            refuse_open(shared)?;
            Ok(Reply::Stop)
        }
        _ => Err(Error::Invalid(format!("unknown command: {}", words.join(" ")))),
    }
}

fn refuse_open(shared: &Shared) -> Result<(), Error> {
    match shared.opens.count() {
        0 => Ok(()),
        _ => Err(Error::System { what: "the swap file is open", source: io::Error::from_raw_os_error(libc::EBUSY) }),
    }
}

/// How often the swap file is open; whether this process is protected (see `process::protect`); whether it forgets
/// what is written (`--store none`); bytes of its memory beside pool, slot words and descriptors.
fn status(shared: &Shared) -> String {
    let metrics = shared.engine.store().metrics();
    let fields = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bytes = |name: &str| -> u64 {
        let field = fields.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
        field.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    // Descriptors are anonymous memory; slot words are in the state file, like the pool.
    let tables = metrics.metadata_bytes.get() + metrics.arena_metadata_bytes.get();
    let descriptors = tables.saturating_sub(shared.engine.size() / PAGE_SIZE as u64 * 8);
    let footprint = (bytes("RssAnon:") + bytes("RssFile:")).saturating_sub(descriptors);
    let (pid, opens, protected) = (std::process::id(), shared.opens.count(), u8::from(shared.protected));
    let forgets = u8::from(shared.stored < shared.engine.size());
    format!("pid={pid} opens={opens} protected={protected} forgets={forgets} footprint={footprint}")
}

fn seqpacket() -> io::Result<OwnedFd> {
    // SAFETY: plain system call; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) };
    check(fd.min(0))?;
    // SAFETY: just returned by the kernel, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address_of(path: &Path) -> io::Result<libc::sockaddr_un> {
    // SAFETY: all-zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is too long for a socket", path.display()),
        ));
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(address)
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends one message, with a descriptor or without.
fn send(connection: &OwnedFd, text: &[u8], descriptor: Option<&OwnedFd>) -> io::Result<()> {
    let mut part = libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    // u64 for alignment: more than enough for the header and one descriptor.
    let mut control = [0u64; 8];
    if let Some(descriptor) = descriptor {
        let payload = size_of::<libc::c_int>() as u32;
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: takes a number, returns a number.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(payload) } as _;
        // SAFETY: `control` has room for one header and one descriptor, and is aligned.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(payload) as _;
            libc::CMSG_DATA(header).cast::<libc::c_int>().write_unaligned(descriptor.as_raw_fd());
        }
    }
    // SAFETY: all that `message` points to lives until the call returns.
    let sent = unsafe { libc::sendmsg(connection.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
    if sent >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests;
