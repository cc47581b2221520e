//! In which order a worker answers what it has taken in, turn by turn.

use super::*;
use crate::gate::Gate;
use crate::relay::Relay;
use crate::socket::Listener;
use crate::trouble::Trouble;
use std::fs::File;
use std::os::fd::FromRawFd;
use zswapd_core::codec::{Algorithm, Compression};
use zswapd_core::engine::Engine;
use zswapd_core::pool::Allocator;
use zswapd_core::store::Files;
use zswapd_fuse::reply::OUT_HEADER;
use zswapd_fuse::wire::u64_at;

const PAGE: usize = 4096;
/// Pages of a WRITE that takes more than one turn.
const MANY: usize = 32;

/// A worker, and the kernel's end of its device.
fn worker() -> (Worker, File) {
    let mut ends = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: `ends` has room for two descriptors.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) }, 0);
    // SAFETY: just made, and nobody else has them.
    let [device, kernel] = ends.map(|fd| unsafe { File::from_raw_fd(fd) });
    let path = std::env::temp_dir().join(format!("zswapd-test-{}-{}.sock", std::process::id(), ends[0]));
    let compression = Compression::new(Algorithm::Lz4, 3).expect("level");
    let shared = Shared {
        engine: Engine::new(1 << 20, Allocator::Zsmalloc, 64 << 20, compression, Files::default()).expect("engine"),
        relay: Relay::new(Arc::new(device.try_clone().expect("device"))),
        counters: File::open("/dev/null").expect("null"),
        gate: Gate::default(),
        trouble: Trouble::default(),
        closer: Listener::bind(&path).and_then(|listener| listener.closer()).expect("socket"),
        device_number: 0,
        protected: false,
        stored: u64::MAX,
    };
    (Worker::new(Arc::new(shared), device.into(), Duration::ZERO).expect("worker"), kernel)
}

/// A request on the swap file.
fn send(kernel: &File, opcode: u32, unique: u64, arguments: &[u64], data: &[u8]) {
    let arguments: Vec<u8> = arguments.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let length = 40 + arguments.len() + data.len();
    let header = [(length as u64) | u64::from(opcode) << 32, unique, swapfile::NODEID, 0, 0];
    let header: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let message = [&header, &arguments, data].concat();
    assert_eq!(io::Write::write(&mut &*kernel, &message).expect("room in the socket"), length);
}

fn send_write(kernel: &File, unique: u64, page: usize, data: &[u8]) {
    send(kernel, opcode::WRITE, unique, &[0, (page * PAGE) as u64, data.len() as u64, 0, 0], data);
}

fn send_read(kernel: &File, unique: u64, page: usize) {
    send(kernel, opcode::READ, unique, &[0, (page * PAGE) as u64, PAGE as u64, 0, 0], &[]);
}

/// The replies that there are: whose, and the payload of each.
fn replies(kernel: &File) -> Vec<(u64, Vec<u8>)> {
    let mut reply = vec![0; 1 << 20];
    let received = std::iter::from_fn(|| io::Read::read(&mut &*kernel, &mut reply).ok().map(|n| reply[..n].to_vec()));
    received.map(|reply| (u64_at(&reply, 8).expect("header"), reply[OUT_HEADER..].to_vec())).collect()
}

fn answered(kernel: &File) -> Vec<u64> {
    replies(kernel).into_iter().map(|(unique, _)| unique).collect()
}

#[test]
fn a_read_goes_before_writes_and_waits_for_a_part_of_one_at_most() {
    let (mut worker, kernel) = worker();
    send_write(&kernel, 1, 0, &[1; MANY * PAGE]);
    worker.turn().expect("device");
    assert_eq!(answered(&kernel), [0; 0], "it takes more than a turn");
    send_write(&kernel, 2, MANY, &[2; PAGE]);
    send_read(&kernel, 3, MANY + 1);
    worker.turn().expect("device");
    assert_eq!(replies(&kernel), [(3, vec![0; PAGE])]);
    while worker.inbox.oldest().is_some() {
        worker.turn().expect("device");
    }
    assert_eq!(answered(&kernel), [1, 2]);
    send_read(&kernel, 4, MANY - 1);
    worker.turn().expect("device");
    assert_eq!(replies(&kernel), [(4, vec![1; PAGE])]);
}

#[test]
fn all_but_reads_keep_their_order() {
    let (mut worker, kernel) = worker();
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;
    send_write(&kernel, 1, 0, &[1; MANY * PAGE]);
    send(&kernel, opcode::FSYNC, 2, &[0, 0], &[]);
    send(&kernel, opcode::FALLOCATE, 3, &[0, 0, (MANY * PAGE) as u64, punch], &[]);
    send_write(&kernel, 4, 1, &[4; PAGE]);
    let mut order = vec![];
    while order.len() < 4 {
        worker.turn().expect("device");
        order.extend(answered(&kernel));
    }
    assert_eq!(order, [1, 2, 3, 4]);
    for (page, byte) in [(0, 0), (1, 4), (MANY - 1, 0)] {
        send_read(&kernel, 5, page);
        worker.turn().expect("device");
        assert_eq!(replies(&kernel), [(5, vec![byte; PAGE])]);
    }
}

#[test]
fn many_reads_do_not_keep_a_write_waiting() {
    let (mut worker, kernel) = worker();
    send_write(&kernel, 1, 0, &[1; PAGE]);
    // Beyond the end of the file, so that the replies are short.
    for _ in 0..2 * READS {
        send_read(&kernel, 2, 1 << 20);
    }
    worker.turn().expect("device");
    let answered = answered(&kernel);
    assert!(answered.contains(&1) && answered.len() <= READS + 1, "{answered:?}");
}

#[test]
fn a_device_that_cannot_be_read_now_is_read_again() {
    let (mut worker, kernel) = worker();
    // EISDIR, and EIO where there is no memory of one's own: neither is a device that is gone.
    for path in ["/", "/proc/self/mem"] {
        let device = std::mem::replace(&mut worker.device, File::open(path).expect("readable").into());
        assert!(!worker.turn().expect("no end"));
        assert!(worker.cannot_read, "it would try again at once");
        worker.wait();
        assert!(!worker.cannot_read);
        assert!(worker.shared.trouble.say());
        worker.device = device;
        send_read(&kernel, 1, 0);
        assert!(worker.turn().expect("device"));
        assert_eq!(answered(&kernel), [1]);
    }
    assert_eq!([libc::ENODEV, libc::ECONNABORTED, libc::ENOMEM, libc::EIO].map(is_gone), [true, true, false, false]);
}

/// In a thread of its own, which no other test runs in.
#[test]
fn on_the_only_processor_nobody_looks_before_sleeping() {
    let on_one = std::thread::spawn(|| {
        // SAFETY: all-zero is an empty set, which fits what the two calls are told; they concern this thread alone.
        let spin = unsafe {
            let mut processors: libc::cpu_set_t = std::mem::zeroed();
            let mut one = processors;
            assert_eq!(libc::sched_getaffinity(0, size_of_val(&processors), &mut processors), 0);
            let first = (0..libc::CPU_SETSIZE as usize).find(|&n| libc::CPU_ISSET(n, &processors));
            libc::CPU_SET(first.expect("the processor that we run on"), &mut one);
            assert_eq!(libc::sched_setaffinity(0, size_of_val(&one), &one), 0);
            spin_here(Duration::from_micros(100))
        };
        assert!(Idle::new(spin).no_request(Instant::now()), "it spins for {spin:?}");
    });
    on_one.join().expect("no panic");
}
