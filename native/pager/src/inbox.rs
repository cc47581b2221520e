//! The requests that a worker has taken in and not yet answered: in order, one behind the other in a ring of memory.

use crate::process::touch;
use std::collections::VecDeque;
use std::ops::Range;
use zswapd_fuse::init::MAX_WRITE;

/// What the kernel wants to find for any request: room for the largest, with its header.
pub const ROOM: usize = MAX_WRITE + 4096;
/// A few WRITEs of the usual size. It is most of the pager's own memory, which is to stay below 8 MiB.
pub const FEW: usize = 9 * ROOM / 4;
/// Where WRITEs may wait for room in a full pool: with less, they keep READs out that come behind them.
pub const MANY: usize = 8 * ROOM;
const REQUESTS: usize = 128;

pub struct Inbox {
    memory: Vec<u8>,
    /// Where the requests lie in it, oldest first. Never grows.
    waiting: VecDeque<Range<usize>>,
}

impl Inbox {
    /// So many bytes of memory ([`FEW`] or [`MANY`]), resident from now on.
    pub fn new(bytes: usize) -> Inbox {
        let mut memory = vec![0; bytes];
        touch(&mut memory);
        // Written, and so resident, before it is empty.
        let mut waiting = VecDeque::from(vec![0..1; REQUESTS]);
        waiting.clear();
        Inbox { memory, waiting }
    }

    /// Where [`ROOM`] bytes are free for the next request. None: the oldest has to go first.
    pub fn room(&self) -> Option<usize> {
        let (Some(oldest), Some(newest)) = (self.waiting.front(), self.waiting.back()) else { return Some(0) };
        let next = newest.end.next_multiple_of(64);
        let (next, end) = match next > oldest.start {
            true if next + ROOM > self.memory.len() => (0, oldest.start),
            true => (next, self.memory.len()),
            false => (next, oldest.start),
        };
        Some(next).filter(|next| next + ROOM <= end && self.waiting.len() < REQUESTS)
    }

    /// The bytes of a request, or of the room for one.
    pub fn bytes(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut self.memory[range]
    }

    /// Keeps a request that was received into the room.
    pub fn push(&mut self, request: Range<usize>) {
        self.waiting.push_back(request);
    }

    /// Where the oldest request lies.
    pub fn oldest(&self) -> Option<Range<usize>> {
        self.waiting.front().cloned()
    }

    /// Forgets the oldest request.
    pub fn pop(&mut self) {
        self.waiting.pop_front();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_never_overlap_and_the_ring_is_used_up() {
        let mut inbox = Inbox::new(FEW);
        let (mut x, mut most, mut wrapped) = (1usize, 0, false);
        for _ in 0..10_000 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            match inbox.room() {
                Some(start) if x >> 62 != 0 => {
                    let room = start..start + ROOM;
                    assert!(room.end <= FEW);
                    assert!(inbox.waiting.iter().all(|other| other.end <= room.start || room.end <= other.start));
                    wrapped |= inbox.oldest().is_some_and(|oldest| start < oldest.start);
                    inbox.push(start..start + 40 + (x >> 32) % (ROOM - 40));
                }
                _ => inbox.pop(),
            }
            most = most.max(inbox.waiting.iter().map(Range::len).sum());
        }
        assert!(wrapped);
        assert!(most > FEW - 2 * ROOM, "{most} bytes at most");
    }

    #[test]
    fn it_takes_so_many_small_requests_and_no_more() {
        let mut inbox = Inbox::new(FEW);
        for _ in 0..REQUESTS {
            let start = inbox.room().expect("room");
            inbox.push(start..start + 40);
        }
        assert_eq!(inbox.room(), None);
        inbox.pop();
        assert!(inbox.room().is_some());
    }
}
