//! SOCK_SEQPACKET sockets: they keep messages whole, and carry descriptors.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Makes the socket that others connect to, for root alone. A socket file that nobody listens on any more is replaced.
///
/// To be called while there is a single thread. Errors: EADDRINUSE if somebody listens there.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket()?;
    let address = address_of(path)?;
    let length = size_of_val(&address) as libc::socklen_t;
    let bind = || {
        // SAFETY: `address` is a sockaddr_un of that length.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })
    };
    // SAFETY: sets the mask of the only thread that there is.
    let mask = unsafe { libc::umask(0o177) };
    let bound = bind().or_else(|error| {
        if error.raw_os_error() != Some(libc::EADDRINUSE) || connect(path).is_ok() {
            return Err(error);
        }
        std::fs::remove_file(path)?;
        bind()
    });
    // SAFETY: as above.
    unsafe { libc::umask(mask) };
    bound?;
    // Long: who connects without waiting, as zswapd does, is refused where it is full.
    // SAFETY: plain system call on our socket.
    check(unsafe { libc::listen(socket.as_raw_fd(), libc::SOMAXCONN) })?;
    Ok(socket)
}

/// A socket connected to who listens at `path`.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let (socket, address) = (seqpacket()?, address_of(path)?);
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: `address` is a sockaddr_un of that length.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

/// Two sockets, connected with each other.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) })?;
    // SAFETY: just returned by the kernel, and nobody else has them.
    let [one, other] = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    Ok((one, other))
}

/// Room for the header of one descriptor, in u64 for alignment.
type Control = [u64; 8];

fn header(part: &mut libc::iovec, control: &mut Control) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message
}

/// Sends one message, with a descriptor or without. Never waits, and allocates nothing.
pub fn send_with_descriptor(socket: &OwnedFd, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control: Control = [0; 8];
    let mut message = header(&mut part, &mut control);
    if let Some(descriptor) = descriptor {
        let payload = size_of::<libc::c_int>() as u32;
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
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    check(sent.min(0) as libc::c_int)
}

/// Waits for a message: its length (0 at the end), and the descriptor that came with it. What does not fit is cut off.
pub fn receive_with_descriptor(socket: &OwnedFd, room: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    receive(socket, room, 0)
}

/// As [`receive_with_descriptor`], of a message that is there: else EAGAIN. The length is that of the whole message.
pub fn try_receive_with_descriptor(socket: &OwnedFd, room: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    receive(socket, room, libc::MSG_DONTWAIT | libc::MSG_TRUNC)
}

fn receive(socket: &OwnedFd, room: &mut [u8], flags: libc::c_int) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut part = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
    let mut control: Control = [0; 8];
    let mut message = header(&mut part, &mut control);
    message.msg_controllen = size_of::<Control>() as _;
    let length = loop {
        // SAFETY: all that `message` points to lives until the call returns.
        let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC | flags) };
        match usize::try_from(received) {
            Ok(length) => break length,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                // A peer that has died with messages of ours unread.
                error if error.raw_os_error() == Some(libc::ECONNRESET) => break 0,
                error => return Err(error),
            },
        }
    };
    // SAFETY: `message` is as recvmsg has left it; a descriptor in it is new, and nobody else has it.
    let descriptor = unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        (!header.is_null() && (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS)
            .then(|| OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<libc::c_int>().read_unaligned()))
    };
    Ok((length, descriptor))
}

/// The process that made a pair; 0 if that cannot be told.
pub fn peer(socket: &OwnedFd) -> u32 {
    // SAFETY: all-zero is a valid ucred.
    let mut credentials: libc::ucred = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&credentials) as libc::socklen_t;
    let (level, option) = (libc::SOL_SOCKET, libc::SO_PEERCRED);
    // SAFETY: room for `length` bytes.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut credentials).cast(), &mut length) };
    if result == 0 {
        credentials.pid as u32
    } else {
        0
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_replaced_only_if_nobody_listens() {
        let path = std::env::temp_dir().join(format!("zswapd-keeper-test-{}.sock", std::process::id()));
        let first = listen(&path).expect("free");
        assert_eq!(listen(&path).err().and_then(|error| error.raw_os_error()), Some(libc::EADDRINUSE));
        // Killed, a keeper leaves its file.
        drop(first);
        let second = listen(&path).expect("nobody listens");
        assert!(connect(&path).is_ok());
        drop(second);
        std::fs::remove_file(&path).expect("it is there");
    }
}
