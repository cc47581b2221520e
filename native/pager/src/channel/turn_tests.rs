//! In which order a worker answers what it has taken in, turn by turn.

use super::*;
use crate::socket::Listener;
use crate::testing::{self, DISK};
use std::os::fd::FromRawFd;
use zswapd_core::backing::MemoryDisk;
use zswapd_core::lru::Incompressible;
use zswapd_core::store::{DiskOptions, Job, Shrinker, What};
use zswapd_fuse::reply::OUT_HEADER;
use zswapd_fuse::wire::{opcode, u64_at};

const PAGE: usize = 4096;
/// Pages of a WRITE that takes more than one turn.
const MANY: usize = 32;

/// A crew of two workers that nobody starts, and the kernel's end of their device.
fn workers(disk: Option<DiskOptions>) -> ([Worker; 2], File) {
    let mut ends = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: `ends` has room for two descriptors.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) }, 0);
    // SAFETY: just made, and nobody else has them.
    let [device, kernel] = ends.map(|fd| unsafe { File::from_raw_fd(fd) });
    let path = std::env::temp_dir().join(format!("zswapd-test-{}-{}.sock", std::process::id(), ends[0]));
    let room = if disk.is_some() { inbox::MANY } else { inbox::FEW };
    let (device, listener) = (Arc::new(device), Listener::new(zswapd_keeper::socket::listen(&path).expect("socket")));
    std::fs::remove_file(&path).expect("it is there");
    let shared = Arc::new(testing::shared(&device, &listener, 64 << 20, disk).0);
    let crew = Arc::new(Crew::new(room_for_reads()));
    crew.resign(Box::new(Lead::new(shared.clone(), Duration::ZERO, Inbox::new(room))));
    let worker = || Worker { shared: shared.clone(), crew: crew.clone(), mine: Mine::new(&crew, 2).expect("worker") };
    ([worker(), worker()], kernel)
}

fn worker() -> (Worker, File) {
    let ([worker, _], kernel) = workers(None);
    (worker, kernel)
}

/// A step of the worker, which leads; it must have something to do, or it waits for ever.
fn step(worker: &mut Worker) {
    let lead = worker.next_lead();
    let lead = worker.step(lead).ok().expect("the device is there");
    worker.crew.resign(lead);
}

/// Steps, until nothing is left in the inbox.
fn finish(worker: &mut Worker) {
    loop {
        let lead = worker.next_lead();
        let waits = lead.inbox.oldest().is_some();
        worker.crew.resign(lead);
        if !waits {
            return;
        }
        step(worker);
    }
}

/// A request on the swap file.
fn send(kernel: &File, opcode: u32, unique: u64, arguments: &[u64], data: &[u8]) {
    send_to(kernel, swapfile::NODEID, opcode, unique, arguments, data);
}

fn send_to(kernel: &File, nodeid: u64, opcode: u32, unique: u64, arguments: &[u64], data: &[u8]) {
    let arguments: Vec<u8> = arguments.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let length = 40 + arguments.len() + data.len();
    let header = [(length as u64) | u64::from(opcode) << 32, unique, nodeid, 0, 0];
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
    step(&mut worker);
    assert_eq!(answered(&kernel), [0; 0], "it takes more than a turn");
    send_write(&kernel, 2, MANY, &[2; PAGE]);
    send_read(&kernel, 3, MANY + 1);
    step(&mut worker);
    assert_eq!(replies(&kernel), [(3, vec![0; PAGE])]);
    finish(&mut worker);
    assert_eq!(answered(&kernel), [1, 2]);
    send_read(&kernel, 4, MANY - 1);
    step(&mut worker);
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
        step(&mut worker);
        order.extend(answered(&kernel));
    }
    assert_eq!(order, [1, 2, 3, 4]);
    for (page, byte) in [(0, 0), (1, 4), (MANY - 1, 0)] {
        send_read(&kernel, 5, page);
        step(&mut worker);
        assert_eq!(replies(&kernel), [(5, vec![byte; PAGE])]);
    }
}

#[test]
fn many_reads_do_not_keep_a_write_waiting() {
    let (mut worker, kernel) = worker();
    send_write(&kernel, 1, 0, &[1; PAGE]);
    // Beyond the end of the file, so that the replies are short.
    for _ in 0..2 * AT_ONCE {
        send_read(&kernel, 2, 1 << 20);
    }
    for _ in 0..=AT_ONCE {
        step(&mut worker);
    }
    let answered = answered(&kernel);
    assert!(answered.contains(&1) && answered.len() <= AT_ONCE + 1, "{answered:?}");
}

#[test]
fn what_is_not_on_the_swap_file_waits_for_no_write() {
    let (mut worker, kernel) = worker();
    send_write(&kernel, 1, 0, &[1; MANY * PAGE]);
    step(&mut worker);
    // Nobody is connected to the relay.
    send_to(&kernel, swapfile::NODEID + 1, opcode::FSYNC, 2, &[0, 0], &[]);
    step(&mut worker);
    assert_eq!(answered(&kernel), [2]);
    finish(&mut worker);
    assert_eq!(answered(&kernel), [1]);
}

#[test]
fn a_device_that_cannot_be_read_now_is_read_again() {
    let (mut worker, kernel) = worker();
    let mut lead = worker.next_lead();
    // EISDIR, and EIO where there is no memory of one's own: neither is a device that is gone.
    for path in ["/", "/proc/self/mem"] {
        let device = std::mem::replace(&mut lead.device, Arc::new(File::open(path).expect("readable")));
        assert!(worker.take_in(&mut lead).expect("no end").is_none());
        assert!(lead.cannot_read, "it would try again at once");
        lead.wait();
        assert!(!lead.cannot_read);
        assert!(worker.shared.trouble.say());
        lead.device = device;
        send_read(&kernel, 1, 0);
        assert!(worker.take_in(&mut lead).expect("device").is_some());
    }
    assert_eq!([libc::ENODEV, libc::ECONNABORTED, libc::ENOMEM, libc::EIO].map(is_gone), [true, true, false, false]);
}

#[test]
fn another_worker_goes_on_with_a_write() {
    let ([mut first, mut second], kernel) = workers(None);
    send_write(&kernel, 1, 0, &[1; MANY * PAGE]);
    step(&mut first);
    step(&mut second);
    assert_eq!(answered(&kernel), [0; 0]);
    let stored = first.shared.engine.store().metrics().stores.get();
    finish(&mut first);
    assert_eq!(answered(&kernel), [1]);
    // No page was stored twice.
    assert!(stored > 0 && first.shared.engine.store().metrics().stores.get() == MANY as u64);
}

/// Each READ gives the lead away, and the next leader finds the next READ.
#[test]
fn many_reads_of_the_disk_do_not_keep_a_write_waiting() {
    let disk = DiskOptions {
        disk: Box::new(MemoryDisk::new(DISK)),
        bytes: DISK as u64,
        encryption: true,
        incompressible: Incompressible::Writeback,
    };
    let ([mut worker, _], kernel) = workers(Some(disk));
    let page: Vec<u8> = (0..PAGE).map(|n| (n / 9) as u8).collect();
    send_write(&kernel, 1, 0, &page);
    step(&mut worker);
    let store = worker.shared.engine.store();
    store.write_back(&mut Shrinker::new().expect("memory"), &mut Job::new(What::All)).expect("written back");
    store.set_promoting(false);
    assert_eq!((answered(&kernel), store.metrics().pages_on_disk.get()), (vec![1], 1));
    send_write(&kernel, 2, 1, &page);
    for _ in 0..2 * AT_ONCE {
        send_read(&kernel, 3, 0);
    }
    for _ in 0..=AT_ONCE {
        step(&mut worker);
    }
    let replies = replies(&kernel);
    assert!(replies.iter().any(|(unique, _)| *unique == 2) && replies.len() <= AT_ONCE + 1);
    assert!(replies.iter().all(|(unique, bytes)| *unique == 2 || *bytes == page));
    assert_eq!(worker.shared.engine.store().metrics().disk_reads.get(), AT_ONCE as u64);
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
