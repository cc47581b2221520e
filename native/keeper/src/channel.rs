//! The channel between the keeper and a pager: messages of one fixed form over a SOCK_SEQPACKET pair.

use crate::socket::{self, receive_with_descriptor, send_with_descriptor};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// What a message is about. The keeper may be of another version than its pager: no number ever means something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A pager: all is set, and it waits for `Go`.
    Ready = 1,
    /// A pager: it serves.
    Serving,
    /// A pager: the descriptor is its end of the pair to the pyfuse3 of now; without one there is none any more.
    Relay,
    /// The active pager: it is to hand over to what the program's file has become.
    Upgrade,
    /// A pager that ends before it is ready: why.
    Failed,
    /// The keeper: serve, with the relay if there is one. The number: nanoseconds since the last pager was gone; 0 for
    /// the first.
    Go,
    /// The keeper: the number is the pid of the standby, 0 for none.
    Standby,
    /// The keeper: the successor waits; end with [`HAND_OVER`](crate::process::HAND_OVER).
    HandOver,
    /// The keeper: there is no successor to hand over to, and why.
    Refused,
    /// The keeper, before `Go`: the number says which program it runs. The first is 1; one that an upgrade has put in its
    /// place has a higher one. From what is about to become a pager in an upgrade: the descriptor is the program's file.
    Program,
}

impl Kind {
    const ALL: [Kind; 10] = [
        Kind::Ready,
        Kind::Serving,
        Kind::Relay,
        Kind::Upgrade,
        Kind::Failed,
        Kind::Go,
        Kind::Standby,
        Kind::HandOver,
        Kind::Refused,
        Kind::Program,
    ];
}

/// Bytes of the longest message: kind, number, text.
pub const ROOM: usize = 512;
const HEADER: usize = 9;

#[derive(Debug)]
pub struct Message<'a> {
    pub kind: Kind,
    pub number: u64,
    pub text: &'a str,
    pub descriptor: Option<OwnedFd>,
}

pub struct Channel(OwnedFd);

impl Channel {
    pub fn new(socket: OwnedFd) -> Channel {
        Channel(socket)
    }

    /// Sends a message; of the text as much as there is room for. Never waits, and allocates nothing.
    ///
    /// Errors: that of sendmsg(2). The other side is gone, or does not listen.
    pub fn send(&self, kind: Kind, number: u64, text: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut room = [0; ROOM];
        let text = prefix(text, ROOM - HEADER).as_bytes();
        room[0] = kind as u8;
        room[1..HEADER].copy_from_slice(&number.to_ne_bytes());
        room[HEADER..HEADER + text.len()].copy_from_slice(text);
        send_with_descriptor(&self.0, &room[..HEADER + text.len()], descriptor)
    }

    /// Waits for a message. None when the other side has hung up; what is no message is passed over.
    pub fn receive<'a>(&self, room: &'a mut [u8; ROOM]) -> io::Result<Option<Message<'a>>> {
        loop {
            let (length, descriptor) = receive_with_descriptor(&self.0, room)?;
            let kind = Kind::ALL.into_iter().find(|kind| *kind as u8 == room[0]);
            match (length, kind) {
                (0, _) => return Ok(None),
                (HEADER.., Some(kind)) => {
                    let mut number = [0; 8];
                    number.copy_from_slice(&room[1..HEADER]);
                    let text = std::str::from_utf8(&room[HEADER..length]).unwrap_or_default();
                    return Ok(Some(Message { kind, number: u64::from_ne_bytes(number), text, descriptor }));
                }
                _ => {}
            }
        }
    }

    /// The process at the other end; 0 if that cannot be told.
    pub fn peer(&self) -> u32 {
        socket::peer(&self.0)
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// As much of a text as fits into so many bytes.
fn prefix(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_message_arrives_as_it_was_sent_and_the_end_is_seen() {
        let (one, other) = socket::pair().expect("sockets");
        let (one, other) = (Channel::new(one), Channel::new(other));
        let (passed, _) = socket::pair().expect("sockets");
        for (n, kind) in Kind::ALL.into_iter().enumerate() {
            let descriptor = (n % 2 == 0).then(|| passed.as_fd());
            one.send(kind, n as u64, "why", descriptor).expect("sent");
            let mut room = [0; ROOM];
            let message = other.receive(&mut room).expect("received").expect("a message");
            assert_eq!((message.kind, message.number, message.text), (kind, n as u64, "why"));
            assert_eq!(message.descriptor.is_some(), n % 2 == 0);
        }
        let long = "ü".repeat(ROOM);
        one.send(Kind::Failed, 0, &long, None).expect("sent");
        let mut room = [0; ROOM];
        let message = other.receive(&mut room).expect("received").expect("a message");
        assert!(long.starts_with(message.text) && message.text.len() > ROOM - HEADER - 2);
        assert_eq!(other.peer(), std::process::id());
        drop(one);
        assert!(other.receive(&mut [0; ROOM]).expect("the end").is_none());
    }
}
