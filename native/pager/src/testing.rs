//! A pager without a mount, for tests, which take the kernel's side of its device: a pair of sockets that keep messages
//! whole, as /dev/fuse does.

use crate::keeper::Keeper;
use crate::process::Start;
use crate::{args, channel, recompressor, relay, shrinker, socket, trouble, Shared};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use zswapd_core::backing::{Disk, MemoryDisk};
use zswapd_core::codec::{Algorithm, Compression};
use zswapd_core::engine::Engine;
use zswapd_core::lru::Incompressible;
use zswapd_core::metrics::SharedMetrics;
use zswapd_core::page::PAGE_SIZE;
use zswapd_core::pool::Allocator;
use zswapd_core::store::{DiskOptions, Files};
use zswapd_fuse::swapfile;
use zswapd_fuse::wire::{opcode, u32_at, u64_at};

/// Bytes of the swap file: more than one request can carry.
pub const SIZE: u64 = 4 << 20;

/// Bytes of the backing disk, where there is one, and workers that may wait for it.
pub const DISK: usize = 16 << 20;
pub const WORKERS: usize = 3;
/// For what is to happen soon.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a pager's threads share, of one that serves `device`; and what its sweeper and its recompressor are to be
/// given.
pub fn shared(
    device: &Arc<File>,
    listener: &socket::Listener,
    mem_limit: u64,
    disk: Option<DiskOptions>,
) -> (Shared, shrinker::Orders, recompressor::Orders) {
    let compression = Compression::new(Algorithm::Lz4, 1).expect("in range");
    let mut engine = Engine::new(SIZE, Allocator::Zsmalloc, mem_limit, compression, Files::default()).expect("engine");
    if let Some(disk) = disk {
        engine = engine.with_disk(disk).expect("disk");
    }
    let (sweeper, orders) = shrinker::Sweeper::new();
    let (recompressor, recompressions) = recompressor::Recompressor::new();
    // Nobody listens.
    let keeper = Arc::new(Keeper::new(zswapd_keeper::socket::pair().expect("sockets").0));
    let shared = Shared {
        engine,
        relay: relay::Relay::new(device.clone(), keeper.clone()),
        keeper,
        device: device.clone(),
        counters: SharedMetrics::file().expect("counters").into(),
        trouble: trouble::Trouble::new("the device"),
        disk_trouble: trouble::Trouble::new("the disk"),
        sweeper,
        recompressor,
        closer: listener.closer().expect("descriptor"),
        device_number: 0,
        protected: false,
        stored: u64::MAX,
        verify: false,
        program: 1,
    };
    (shared, orders, recompressions)
}

/// The kernel's side. A thread waits for requests as long as the process lives, and with it all that it uses.
pub struct Kernel {
    pub shared: Arc<Shared>,
    pub listener: socket::Listener,
    /// Of the control socket; removed with this.
    pub path: PathBuf,
    pub socket: OwnedFd,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A disk on which reads, or writes, wait as long as they are held.
pub struct Held {
    disk: MemoryDisk,
    /// Held reads and writes, and how many of both wait.
    state: Mutex<([bool; 2], [usize; 2])>,
    changed: Condvar,
}

pub const READS: usize = 0;
pub const WRITES: usize = 1;

impl Held {
    pub fn new() -> Arc<Held> {
        Arc::new(Held { disk: MemoryDisk::new(DISK), state: Mutex::default(), changed: Condvar::new() })
    }

    pub fn hold(&self, which: usize, held: bool) {
        self.state.lock().expect("no panic").0[which] = held;
        self.changed.notify_all();
    }

    /// Waits until so many wait.
    pub fn wait_for(&self, which: usize, waiting: usize) {
        let state = self.state.lock().expect("no panic");
        let result = self.changed.wait_timeout_while(state, PATIENCE, |state| state.1[which] != waiting);
        assert!(!result.expect("no panic").1.timed_out(), "not {waiting} that wait for the disk");
    }

    fn pass(&self, which: usize) {
        let mut state = self.state.lock().expect("no panic");
        state.1[which] += 1;
        self.changed.notify_all();
        while state.0[which] {
            state = self.changed.wait(state).expect("no panic");
        }
        state.1[which] -= 1;
        self.changed.notify_all();
    }
}

impl Disk for Held {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.pass(READS);
        self.disk.read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.pass(WRITES);
        self.disk.write(offset, from)
    }
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
        Kernel::start(mem_limit, stored, None)
    }

    /// A pager with a backing disk of `DISK` bytes.
    pub fn with_disk(mem_limit: u64, disk: impl Disk + 'static) -> Kernel {
        let (bytes, encryption, incompressible) = (DISK as u64, true, Incompressible::Writeback);
        Kernel::start(
            mem_limit,
            u64::MAX,
            Some(DiskOptions { disk: Box::new(disk), bytes, encryption, incompressible }),
        )
    }

    fn start(mem_limit: u64, stored: u64, disk: Option<DiskOptions>) -> Kernel {
        let (socket, device) = relay::socket_pair().expect("sockets");
        // SAFETY: sets a flag of a descriptor that we own.
        assert_eq!(unsafe { libc::fcntl(device.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }, 0);
        // Never closed: a worker that found it closed would end, as no test wants it to.
        std::mem::forget(socket.try_clone().expect("descriptor"));
        let device = Arc::new(File::from(device));
        let path = socket_path();
        let listener = socket::Listener::new(zswapd_keeper::socket::listen(&path).expect("control socket"));
        let backing = if disk.is_some() { "--backing /dev/null" } else { "" };
        let (shared, orders, recompressions) = shared(&device, &listener, mem_limit, disk);
        let shared = Arc::new(Shared { stored, ..shared });
        let words = format!(
            "--mount-point / --control / --size {SIZE} --allocator zsmalloc --mem-limit {mem_limit} --algorithm lz4 \
             --zstd-level 1 --spin-us 0 --workers {WORKERS} --keeper fd=0,fuse=0,state=0,counters=0,control=0,device=0 \
             {backing}"
        );
        let args = args::parse(words.split_whitespace().map(String::from)).expect("arguments");
        let start = Arc::new(Start::default());
        relay::spawn(&start).expect("threads");
        recompressor::spawn(&start, recompressions).expect("threads");
        if let Some(backing) = &args.backing {
            shrinker::spawn(&start, orders, backing).expect("threads");
        }
        channel::spawn(&start, &args).expect("threads");
        start.begin(shared.clone());
        set_patience(&socket);
        Kernel { shared, listener, path, socket }
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
