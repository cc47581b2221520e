//! Requests as they come from /dev/fuse: a header, then arguments. All numbers and layouts: include/uapi/linux/fuse.h.

/// Bytes of `struct fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Bytes of `struct fuse_write_in`; the data follows it.
pub const WRITE_IN: usize = 40;
/// Bytes of `struct fuse_init_in` as far as we look: up to flags2, which older kernels do not send.
pub const INIT_IN_SHORT: usize = 16;

/// Opcodes (`enum fuse_opcode`) that the pager tells apart.
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const ACCESS: u32 = 34;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const LSEEK: u32 = 46;
}

/// FUSE_UNIQUE_RESEND: in the name of a request that the kernel has sent before, to a process that is gone.
pub const RESENT: u64 = 1 << 63;

/// A request: who wants what of which inode. `bytes` is the whole message, header included.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub opcode: u32,
    /// The kernel's name for this request; the reply repeats it.
    pub unique: u64,
    pub nodeid: u64,
    pub bytes: &'a [u8],
}

/// What makes a message no request. A `unique`, where there is one, wants an error reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    pub unique: Option<u64>,
}

impl<'a> Request<'a> {
    /// Reads the header, and checks that the message is as long as it says.
    pub fn parse(bytes: &'a [u8]) -> Result<Request<'a>, Malformed> {
        let unique = u64_at(bytes, 8);
        let header = || {
            Some(Request { opcode: u32_at(bytes, 4)?, unique: unique?, nodeid: u64_at(bytes, 16)?, bytes })
                .filter(|_| bytes.len() >= IN_HEADER && u32_at(bytes, 0) == Some(bytes.len() as u32))
        };
        header().ok_or(Malformed { unique })
    }

    /// Whether the kernel waits for a reply (`fuse_request` without FR_ISREPLY: FORGET, BATCH_FORGET; and INTERRUPT,
    /// whose reply only means "again").
    pub fn wants_reply(&self) -> bool {
        !matches!(self.opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT)
    }

    /// Whether it was sent before, to a process that is gone, and may be done already.
    pub fn is_resent(&self) -> bool {
        self.unique & RESENT != 0
    }

    /// Whether doing it twice is the same as doing it once. Of a file's openings one may be left over, which nobody
    /// uses.
    pub fn may_be_repeated(&self) -> bool {
        use opcode::*;
        matches!(
            self.opcode,
            LOOKUP
                | GETATTR
                | READLINK
                | OPEN
                | READ
                | STATFS
                | RELEASE
                | GETXATTR
                | LISTXATTR
                | FLUSH
                | OPENDIR
                | READDIR
                | RELEASEDIR
                | ACCESS
                | READDIRPLUS
        )
    }

    fn arguments(&self) -> &'a [u8] {
        &self.bytes[IN_HEADER..]
    }
}

/// What is asked of the swap file. None of these borrows more than the request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    Read {
        offset: u64,
        size: u32,
    },
    Write {
        offset: u64,
        data: &'a [u8],
    },
    Fallocate {
        offset: u64,
        length: u64,
        mode: u32,
    },
    Lseek {
        offset: u64,
        whence: u32,
    },
    /// `valid` is a set of FATTR_ bits: what to change.
    Setattr {
        valid: u32,
        size: u64,
    },
    Getattr,
    Statfs,
    /// `flags` are those of open(2).
    Open {
        flags: u32,
    },
    Release,
    Flush,
    Fsync,
    /// Anything else.
    Other,
}

impl<'a> Operation<'a> {
    /// Reads the arguments of a request. None if they are too short for its opcode, or contradict themselves.
    pub fn parse(request: &Request<'a>) -> Option<Operation<'a>> {
        let arguments = request.arguments();
        Some(match request.opcode {
            // struct fuse_read_in: fh, offset, size, ...
            opcode::READ => Operation::Read { offset: u64_at(arguments, 8)?, size: u32_at(arguments, 16)? },
            opcode::WRITE => {
                // struct fuse_write_in: fh, offset, size, ...; then exactly size bytes.
                let data = arguments.get(WRITE_IN..)?;
                let size = u32_at(arguments, 16)?;
                Operation::Write {
                    offset: u64_at(arguments, 8)?,
                    data: Some(data).filter(|data| data.len() == size as usize)?,
                }
            }
            // struct fuse_fallocate_in: fh, offset, length, mode.
            opcode::FALLOCATE => Operation::Fallocate {
                offset: u64_at(arguments, 8)?,
                length: u64_at(arguments, 16)?,
                mode: u32_at(arguments, 24)?,
            },
            // struct fuse_lseek_in: fh, offset, whence.
            opcode::LSEEK => Operation::Lseek { offset: u64_at(arguments, 8)?, whence: u32_at(arguments, 16)? },
            // struct fuse_setattr_in: valid, padding, fh, size, ...
            opcode::SETATTR => Operation::Setattr { valid: u32_at(arguments, 0)?, size: u64_at(arguments, 16)? },
            opcode::GETATTR => Operation::Getattr,
            opcode::STATFS => Operation::Statfs,
            // struct fuse_open_in: flags, open_flags.
            opcode::OPEN => Operation::Open { flags: u32_at(arguments, 0)? },
            opcode::RELEASE => Operation::Release,
            opcode::FLUSH => Operation::Flush,
            opcode::FSYNC => Operation::Fsync,
            _ => Operation::Other,
        })
    }
}

/// The u32 at a byte offset, in the machine's byte order, as the kernel writes it. None beyond the end.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// As [`u32_at`], of 8 bytes.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A message of an opcode with these arguments, whose header is right.
    pub fn message(opcode: u32, arguments: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; IN_HEADER];
        bytes[0..4].copy_from_slice(&((IN_HEADER + arguments.len()) as u32).to_ne_bytes());
        bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
        bytes[8..16].copy_from_slice(&7u64.to_ne_bytes());
        bytes[16..24].copy_from_slice(&2u64.to_ne_bytes());
        bytes.extend_from_slice(arguments);
        bytes
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(request) = Request::parse(&bytes) {
                let _ = Operation::parse(&request);
            }
        }

        #[test]
        fn any_arguments_parse_or_are_refused(opcode in 0u32..60, arguments in prop::collection::vec(any::<u8>(), 0..120)) {
            let bytes = message(opcode, &arguments);
            let request = Request::parse(&bytes).expect("the header is right");
            if let Some(Operation::Write { data, .. }) = Operation::parse(&request) {
                prop_assert_eq!(data.len() + WRITE_IN, arguments.len());
            }
        }
    }

    #[test]
    fn a_wrong_length_is_refused_with_its_unique() {
        let mut bytes = message(opcode::READ, &[0; 40]);
        bytes.push(0);
        assert_eq!(Request::parse(&bytes).err(), Some(Malformed { unique: Some(7) }));
        assert_eq!(Request::parse(&bytes[..12]).err(), Some(Malformed { unique: None }));
    }

    #[test]
    fn a_write_gives_exactly_its_data() {
        let mut arguments = vec![0; WRITE_IN];
        arguments[8..16].copy_from_slice(&4096u64.to_ne_bytes());
        arguments[16..20].copy_from_slice(&3u32.to_ne_bytes());
        arguments.extend_from_slice(b"abc");
        let bytes = message(opcode::WRITE, &arguments);
        let request = Request::parse(&bytes).expect("request");
        assert_eq!(Operation::parse(&request), Some(Operation::Write { offset: 4096, data: b"abc" }));
        arguments.push(b'd');
        let bytes = message(opcode::WRITE, &arguments);
        let request = Request::parse(&bytes).expect("request");
        assert_eq!(Operation::parse(&request), None, "more data than size says");
    }
}
