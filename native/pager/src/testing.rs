//! A pager without a mount, for tests, which take the kernel's side of its device: a pair of sockets that keep messages
//! whole, as /dev/fuse does.

use crate::{args, channel, gate, relay, socket, trouble, Shared};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use zswapd_core::codec::{Algorithm, Compression};
use zswapd_core::engine::Engine;
use zswapd_core::metrics::SharedMetrics;
use zswapd_core::page::PAGE_SIZE;
use zswapd_core::pool::Allocator;
use zswapd_core::store::Files;
use zswapd_fuse::swapfile;
use zswapd_fuse::wire::{opcode, u32_at, u64_at};

/// Bytes of the swap file: more than one request can carry.
pub const SIZE: u64 = 4 << 20;

/// The kernel's side. A thread waits for requests as long as the process lives, and with it all that it uses.
pub struct Kernel {
    pub shared: Arc<Shared>,
    pub listener: socket::Listener,
    pub socket: OwnedFd,
}

/// A reply of the pager: to which request, an errno (positive, 0 for none), and what follows the header.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    pub unique: u64,
    pub errno: i32,
    pub payload: Vec<u8>,
}

impl Kernel {
    pub fn new() -> Kernel {
        Kernel::with(1 << 30, u64::MAX)
    }

    /// A pager whose pool may have `mem_limit` bytes, and which forgets what is written at `stored` and beyond.
    pub fn with(mem_limit: u64, stored: u64) -> Kernel {
        let (socket, device) = relay::socket_pair().expect("sockets");
        // SAFETY: sets a flag of a descriptor that we own.
        assert_eq!(unsafe { libc::fcntl(device.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }, 0);
        // Never closed: a worker that found it closed would end, as no test wants it to.
        std::mem::forget(socket.try_clone().expect("descriptor"));
        let device = Arc::new(File::from(device));
        let compression = Compression::new(Algorithm::Lz4, 1).expect("in range");
        let listener = socket::Listener::bind(&socket_path()).expect("control socket");
        let shared = Arc::new(Shared {
            engine: Engine::new(SIZE, Allocator::Zsmalloc, mem_limit, compression, Files::default()).expect("engine"),
            relay: relay::Relay::new(device.clone()),
            counters: SharedMetrics::file().expect("counters").into(),
            gate: gate::Gate::default(),
            trouble: trouble::Trouble::default(),
            closer: listener.closer().expect("descriptor"),
            device_number: 0,
            protected: false,
            stored,
        });
        let words = format!(
            "--mount-point / --control / --size {SIZE} --allocator zsmalloc --mem-limit {mem_limit} --algorithm lz4 --zstd-level 1 --spin-us 0"
        );
        let args = args::parse(words.split(' ').map(String::from)).expect("arguments");
        relay::spawn(&shared).expect("threads");
        channel::spawn(&shared, device.as_fd(), &args).expect("threads");
        set_patience(&socket);
        Kernel { shared, listener, socket }
    }

    pub fn send(&self, message: &[u8]) {
        send(&self.socket, message);
    }

    pub fn reply(&self) -> Reply {
        let message = receive(&self.socket).expect("a reply in time");
        assert_eq!(u32_at(&message, 0), Some(message.len() as u32), "the length that the header says");
        Reply {
            unique: u64_at(&message, 8).expect("a header"),
            errno: -(u32_at(&message, 4).expect("a header") as i32),
            payload: message[16..].to_vec(),
        }
    }

    /// What a request on the swap file is answered.
    pub fn ask(&self, opcode: u32, arguments: &[u8]) -> Result<Vec<u8>, i32> {
        let unique = next_unique();
        self.send(&request(opcode, unique, swapfile::NODEID, arguments));
        let reply = self.reply();
        assert_eq!(reply.unique, unique);
        match reply.errno {
            0 => Ok(reply.payload),
            errno => {
                assert_eq!(reply.payload, [], "an error with a payload");
                Err(errno)
            }
        }
    }

    pub fn read(&self, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        self.ask(opcode::READ, &arguments(40, &[(8, &offset.to_ne_bytes()), (16, &size.to_ne_bytes())]))
    }

    /// Returns how many bytes were written.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let written = self.ask(opcode::WRITE, &write_arguments(offset, data.len() as u32, data))?;
        assert_eq!((written.len(), u32_at(&written, 4)), (8, Some(0)), "struct fuse_write_out");
        Ok(u32_at(&written, 0).expect("8 bytes"))
    }

    /// Nothing has been answered that was not received, and the next request is served.
    #[track_caller]
    pub fn expect_quiet(&self) {
        self.ask(opcode::GETATTR, &[0; 16]).expect("attributes");
        let waiting = receive_now(&self.socket);
        assert_eq!(waiting, None, "a reply that nobody waits for");
    }
}

pub fn next_unique() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(1000);
    // The kernel's are even.
    LAST.fetch_add(2, Ordering::Relaxed)
}

/// A message with a header that is right.
pub fn request(opcode: u32, unique: u64, nodeid: u64, arguments: &[u8]) -> Vec<u8> {
    let length = (40 + arguments.len()) as u32;
    let fields: [(usize, &[u8]); 4] = [
        (0, &length.to_ne_bytes()),
        (4, &opcode.to_ne_bytes()),
        (8, &unique.to_ne_bytes()),
        (16, &nodeid.to_ne_bytes()),
    ];
    [&self::arguments(40, &fields)[..], arguments].concat()
}

/// A structure of so many bytes, zero but for these fields.
pub fn arguments(length: usize, fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fields.iter().for_each(|(at, field)| bytes[*at..*at + field.len()].copy_from_slice(field));
    bytes
}

/// `struct fuse_write_in`, and the data.
pub fn write_arguments(offset: u64, size: u32, data: &[u8]) -> Vec<u8> {
    [&arguments(40, &[(8, &offset.to_ne_bytes()), (16, &size.to_ne_bytes())])[..], data].concat()
}

/// Pages that cannot be compressed, different for every seed.
pub fn noise(seed: u64, pages: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_ne_bytes()
    };
    (0..pages * PAGE_SIZE / 8).flat_map(|_| next()).collect()
}

/// Whoever waits on this socket gives up after 10 s, which is a failure.
pub fn set_patience(socket: &OwnedFd) {
    let patience = libc::timeval { tv_sec: 10, tv_usec: 0 };
    let (value, length) = (&raw const patience, size_of_val(&patience) as libc::socklen_t);
    // SAFETY: `value` points to `length` bytes.
    unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, value.cast(), length) };
}

#[track_caller]
pub fn send(socket: &OwnedFd, message: &[u8]) {
    let (fd, flags) = (socket.as_raw_fd(), libc::MSG_NOSIGNAL);
    // SAFETY: the message is valid for its length.
    let sent = unsafe { libc::send(fd, message.as_ptr().cast(), message.len(), flags) };
    assert_eq!(sent, message.len() as isize, "{}", std::io::Error::last_os_error());
}

/// Waits for a message. Empty at the end; None if there is none in time.
pub fn receive(socket: &OwnedFd) -> Option<Vec<u8>> {
    receive_with(socket, 0)
}

pub fn receive_now(socket: &OwnedFd) -> Option<Vec<u8>> {
    receive_with(socket, libc::MSG_DONTWAIT)
}

fn receive_with(socket: &OwnedFd, flags: libc::c_int) -> Option<Vec<u8>> {
    let mut message = vec![0; 2 << 20];
    // SAFETY: the buffer is valid for its length.
    let received = unsafe { libc::recv(socket.as_raw_fd(), message.as_mut_ptr().cast(), message.len(), flags) };
    message.truncate(usize::try_from(received).ok()?);
    Some(message)
}

fn socket_path() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("zswapd-pager-test-{}-{n}.sock", std::process::id()))
}
