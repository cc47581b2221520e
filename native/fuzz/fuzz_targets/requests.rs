//! Sequences of requests on the swap file, well formed and not, against an array of bytes.
//!
//! What a worker of the pager does with a message: `Request::parse`, `Operation::parse`, `swapfile::answer`.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::cell::RefCell;
use std::ops::Range;
use std::task::Poll;
use zswapd_core::codec::{Algorithm, Compression};
use zswapd_core::engine::Engine;
use zswapd_core::page::PAGE_SIZE;
use zswapd_core::pool::Allocator;
use zswapd_core::scratch::Scratch;
use zswapd_core::store::{Detached, Files};
use zswapd_fuse::init::MAX_TRANSFER;
use zswapd_fuse::swapfile::{self, Tools};
use zswapd_fuse::wire::{opcode, Malformed, Operation, Request, IN_HEADER, WRITE_IN};
use zswapd_fuzz::Contents;

const PAGES: usize = 24;
const SIZE: usize = PAGES * PAGE_SIZE;
const UNLIMITED: u64 = 1 << 30;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// Any bytes.
    Message(&'a [u8]),
    /// A header, which may lie about the length, and any bytes as arguments.
    Arguments {
        opcode: u8,
        lie: i8,
        arguments: &'a [u8],
    },
    /// A request as the kernel makes it, but for `cut` bytes that are missing at its end.
    Request {
        what: What<'a>,
        cut: u8,
    },
    Limit {
        pages: u8,
    },
    Compression {
        zstd: bool,
        level: u8,
    },
}

#[derive(Arbitrary, Debug)]
enum What<'a> {
    Read {
        offset: Position,
        size: Position,
    },
    /// Page after page of these contents in turn.
    Write {
        offset: Position,
        pages: Vec<Contents<'a>>,
        length: u16,
    },
    Fallocate {
        offset: Position,
        length: Position,
        mode: Mode,
    },
    Lseek {
        offset: Position,
        whence: u8,
    },
    Setattr {
        valid: u32,
        size: Position,
    },
    Open {
        flags: u32,
    },
}

/// An offset or a length: those at which something changes, and all others.
#[derive(Arbitrary, Debug)]
enum Position {
    Page(u8),
    Byte(u32),
    Any(u64),
}

impl Position {
    fn value(&self) -> u64 {
        match *self {
            Position::Page(page) => u64::from(page) % (PAGES as u64 + 2) * PAGE_SIZE as u64,
            Position::Byte(byte) => u64::from(byte) % (SIZE + 2 * PAGE_SIZE) as u64,
            Position::Any(any) => any,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Mode {
    Punch,
    Zero,
    ZeroKeepSize,
    Any(u32),
}

impl Mode {
    fn value(&self) -> u32 {
        let mode = match *self {
            Mode::Punch => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Mode::Zero => libc::FALLOC_FL_ZERO_RANGE,
            Mode::ZeroKeepSize => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            Mode::Any(any) => return any,
        };
        mode as u32
    }
}

thread_local! {
    static FIXTURE: RefCell<Fixture> = RefCell::new(Fixture::new());
}

fuzz_target!(|steps: Vec<Step<'_>>| FIXTURE.with_borrow_mut(|fixture| {
    fixture.start();
    steps.into_iter().for_each(|step| fixture.take(step));
    fixture.check_page_by_page();
}));

/// The engine, and what it must hold.
struct Fixture {
    engine: Engine,
    tools: Tools,
    out: Vec<u8>,
    file: Vec<u8>,
    /// Pages whose last write was refused: EIO until they are written whole or punched.
    lost: [bool; PAGES],
    /// The pool may be full.
    limited: bool,
}

impl Fixture {
    fn new() -> Fixture {
        Fixture {
            engine: Engine::new(SIZE as u64, Allocator::Zsmalloc, UNLIMITED, lz4(), Files::default()).expect("engine"),
            tools: Tools::new(Scratch::new().expect("scratch"), Detached::with_capacity(3)),
            out: vec![0; MAX_TRANSFER + PAGE_SIZE],
            file: vec![0; SIZE],
            lost: [false; PAGES],
            limited: false,
        }
    }

    fn start(&mut self) {
        self.engine.reset();
        assert_eq!(self.engine.store().metrics().pool_bytes.get(), 0, "an object was not freed");
        self.engine.set_compression(lz4());
        self.engine.store().pool().set_limit_bytes(UNLIMITED);
        self.file.fill(0);
        self.lost.fill(false);
        self.limited = false;
    }

    fn take(&mut self, step: Step<'_>) {
        match step {
            Step::Message(bytes) => self.message(&Box::from(bytes)),
            Step::Arguments { opcode, lie, arguments } => {
                let mut bytes = message(u32::from(opcode) % 64, arguments);
                let length = (bytes.len() as u32).wrapping_add_signed(i32::from(lie));
                bytes[..4].copy_from_slice(&length.to_ne_bytes());
                self.message(&bytes);
            }
            Step::Request { what, cut } => self.request(&what, usize::from(cut)),
            Step::Limit { pages } => {
                self.engine.store().pool().set_limit_bytes(u64::from(pages) * PAGE_SIZE as u64);
                self.limited = true;
            }
            Step::Compression { zstd, level } => {
                let algorithm = if zstd { Algorithm::Zstd } else { Algorithm::Lz4 };
                let level = i32::from(level) % 22 + 1;
                self.engine.set_compression(Compression::new(algorithm, level).expect("in range"));
            }
        }
    }

    /// Any message: what is no request is refused under its own name.
    fn message(&mut self, bytes: &[u8]) {
        let right = bytes.len() >= IN_HEADER && bytes[..4] == (bytes.len() as u32).to_ne_bytes();
        let unique = bytes.get(8..16).map(|unique| u64::from_ne_bytes(unique.try_into().expect("8 bytes")));
        match Request::parse(bytes) {
            Ok(request) => {
                assert!(right && Some(request.unique) == unique);
                if let Some(operation) = Operation::parse(&request) {
                    self.operation(operation);
                }
            }
            Err(Malformed { unique: named }) => assert!(!right && named == unique),
        }
    }

    fn request(&mut self, what: &What<'_>, cut: usize) {
        let data = match what {
            What::Write { pages, length, .. } => {
                let pages = pages.iter().cycle().flat_map(|contents| contents.bytes(PAGE_SIZE));
                pages.take(usize::from(*length)).collect()
            }
            _ => Vec::new(),
        };
        let (opcode, arguments, operation) = encode(what, &data);
        let bytes = message(opcode, &arguments[..arguments.len().saturating_sub(cut)]);
        let request = Request::parse(&bytes).expect("the header is right");
        let parsed = Operation::parse(&request);
        let enough = cut == 0 || (parsed.is_some() && opcode != opcode::WRITE);
        assert_eq!(parsed, enough.then_some(operation));
        if let Some(operation) = parsed {
            self.operation(operation);
        }
    }

    /// Has an operation answered, and compares.
    fn operation(&mut self, operation: Operation<'_>) {
        match operation {
            Operation::Read { offset, size } => self.read(offset, size),
            Operation::Write { offset, data } => {
                let answer = self.answer(operation);
                if within(offset, data.len() as u64) {
                    let written = [&(data.len() as u32).to_ne_bytes()[..], &[0; 4]].concat();
                    self.changed(offset as usize, data, answer.map(|payload| assert_eq!(payload, written)));
                } else {
                    assert_eq!(answer, Err(libc::EFBIG));
                }
            }
            Operation::Fallocate { offset, length, mode } => {
                let answer = self.answer(operation).map(|payload| assert_eq!(payload, []));
                let modes = [Mode::Punch, Mode::Zero, Mode::ZeroKeepSize].map(|mode| mode.value());
                let grows = mode == Mode::Zero.value() && !within(offset, length);
                if !modes.contains(&mode) {
                    assert_eq!(answer, Err(libc::EOPNOTSUPP));
                } else if offset.checked_add(length).is_none() || grows {
                    assert_eq!(answer, Err(libc::EFBIG));
                } else {
                    let range = clipped(offset, length);
                    self.changed(range.start, &vec![0; range.len()], answer);
                }
            }
            Operation::Lseek { offset, whence } => {
                let inside = offset < SIZE as u64;
                let expected = match whence as i32 {
                    libc::SEEK_DATA if inside => Ok(offset.to_ne_bytes().to_vec()),
                    libc::SEEK_HOLE if inside => Ok((SIZE as u64).to_ne_bytes().to_vec()),
                    libc::SEEK_DATA | libc::SEEK_HOLE => Err(libc::ENXIO),
                    _ => Err(libc::EINVAL),
                };
                assert_eq!(self.answer(operation), expected);
            }
            Operation::Setattr { .. } | Operation::Open { .. } => {
                if let Err(errno) = self.answer(operation) {
                    assert_eq!(errno, libc::EPERM);
                }
            }
            Operation::Other => assert_eq!(self.answer(operation), Err(libc::ENOSYS)),
            _ => assert!(self.answer(operation).is_ok()),
        }
    }

    fn read(&mut self, offset: u64, size: u32) {
        let answer = self.answer(Operation::Read { offset, size });
        let range = clipped(offset, u64::from(size));
        let expected = match size as usize > MAX_TRANSFER {
            true => Err(libc::EINVAL),
            false if pages(&range).any(|page| self.lost[page]) => Err(libc::EIO),
            false => Ok(&self.file[range]),
        };
        assert!(answer.as_deref() == expected.as_deref(), "READ of {size} at {offset}: {:?}", answer.map(|_| ()));
    }

    /// `data` was to replace what was at `at`. Whatever the answer, nothing reads as it did before.
    fn changed(&mut self, at: usize, data: &[u8], answer: Result<(), i32>) {
        let range = at..at + data.len();
        let whole = |page: usize| range.start <= page * PAGE_SIZE && (page + 1) * PAGE_SIZE <= range.end;
        let part_of_lost = pages(&range).any(|page| self.lost[page] && !whole(page));
        match answer {
            Ok(()) => assert!(!part_of_lost, "written to a lost page"),
            Err(libc::ENOSPC) => assert!(self.limited),
            Err(errno) => assert!(errno == libc::EIO && part_of_lost, "errno {errno}"),
        }
        self.file[range.clone()].copy_from_slice(data);
        for page in pages(&range) {
            let was_lost = std::mem::replace(&mut self.lost[page], false);
            if answer.is_err() {
                let read = Operation::Read { offset: (page * PAGE_SIZE) as u64, size: PAGE_SIZE as u32 };
                self.lost[page] = self.answer(read).is_err();
                assert!(self.lost[page] || !was_lost || whole(page), "a lost page came back");
            }
        }
    }

    fn check_page_by_page(&mut self) {
        (0..PAGES).for_each(|page| self.read((page * PAGE_SIZE) as u64, PAGE_SIZE as u32));
    }

    /// As the worker does it: what is read goes into the large buffer, all else into a small one.
    fn answer(&mut self, operation: Operation<'_>) -> Result<Vec<u8>, i32> {
        let mut small = [0; 128];
        let answer = loop {
            let out = match operation {
                Operation::Read { .. } => &mut self.out[..],
                _ => &mut small,
            };
            match swapfile::answer(&self.engine, operation, out, &mut self.tools).map_ok(<[u8]>::to_vec) {
                Poll::Pending => assert!(matches!(operation, Operation::Write { .. })),
                Poll::Ready(answer) => break answer,
            }
        };
        self.engine.store().free_detached(&mut self.tools.detached);
        answer
    }
}

fn lz4() -> Compression {
    Compression::new(Algorithm::Lz4, 3).expect("in range")
}

/// A message whose header is right, in memory that ends where it does.
fn message(opcode: u32, arguments: &[u8]) -> Box<[u8]> {
    let length = (IN_HEADER + arguments.len()) as u32;
    let header = [length.to_ne_bytes(), opcode.to_ne_bytes()].concat();
    let ids = [7u64.to_ne_bytes(), swapfile::NODEID.to_ne_bytes(), [0; 8], [0; 8]].concat();
    [&header, &ids, arguments].concat().into_boxed_slice()
}

/// Opcode and arguments as the kernel lays them out, and what they mean.
fn encode<'a>(what: &What<'_>, data: &'a [u8]) -> (u32, Vec<u8>, Operation<'a>) {
    let layout = |length: usize, fields: &[(usize, &[u8])]| {
        let mut bytes = vec![0; length];
        fields.iter().for_each(|(at, field)| bytes[*at..*at + field.len()].copy_from_slice(field));
        bytes
    };
    match what {
        What::Read { offset, size } => {
            let (offset, size) = (offset.value(), size.value() as u32);
            let arguments = layout(40, &[(8, &offset.to_ne_bytes()), (16, &size.to_ne_bytes())]);
            (opcode::READ, arguments, Operation::Read { offset, size })
        }
        What::Write { offset, .. } => {
            let offset = offset.value();
            let size = data.len() as u32;
            let mut arguments = layout(WRITE_IN, &[(8, &offset.to_ne_bytes()), (16, &size.to_ne_bytes())]);
            arguments.extend_from_slice(data);
            (opcode::WRITE, arguments, Operation::Write { offset, data })
        }
        What::Fallocate { offset, length, mode } => {
            let (offset, length, mode) = (offset.value(), length.value(), mode.value());
            let fields: [(usize, &[u8]); 3] =
                [(8, &offset.to_ne_bytes()), (16, &length.to_ne_bytes()), (24, &mode.to_ne_bytes())];
            (opcode::FALLOCATE, layout(32, &fields), Operation::Fallocate { offset, length, mode })
        }
        What::Lseek { offset, whence } => {
            let (offset, whence) = (offset.value(), u32::from(*whence) % 8);
            let arguments = layout(24, &[(8, &offset.to_ne_bytes()), (16, &whence.to_ne_bytes())]);
            (opcode::LSEEK, arguments, Operation::Lseek { offset, whence })
        }
        What::Setattr { valid, size } => {
            let (valid, size) = (*valid, size.value());
            let arguments = layout(88, &[(0, &valid.to_ne_bytes()), (16, &size.to_ne_bytes())]);
            (opcode::SETATTR, arguments, Operation::Setattr { valid, size })
        }
        What::Open { flags } => {
            (opcode::OPEN, layout(8, &[(0, &flags.to_ne_bytes())]), Operation::Open { flags: *flags })
        }
    }
}

fn within(offset: u64, length: u64) -> bool {
    offset.checked_add(length).is_some_and(|end| end <= SIZE as u64)
}

/// The part of a range that lies in the file.
fn clipped(offset: u64, length: u64) -> Range<usize> {
    let clip = |at: u64| at.min(SIZE as u64) as usize;
    clip(offset)..clip(offset.saturating_add(length))
}

fn pages(range: &Range<usize>) -> Range<usize> {
    match range.is_empty() {
        true => 0..0,
        false => range.start / PAGE_SIZE..range.end.div_ceil(PAGE_SIZE),
    }
}
