//! What a worker does while there is no request: it looks for the next one for a short while before it sleeps.
//!
//! Who finds the worker awake is spared a wake-up, which costs more than most answers. That is worth processor time
//! only while requests follow each other closely: after one that was longer in coming, the worker sleeps at once until
//! they do again (as the kernel's haltpoll governor does for idle virtual processors).

use std::time::{Duration, Instant};

pub struct Idle {
    /// How long to look, at most.
    spin: Duration,
    /// Whether the last request came within that time.
    spins: bool,
    /// When the requests ran out, if they have.
    since: Option<Instant>,
}

impl Idle {
    /// `spin`: how long to look for the next request at most.
    pub fn new(spin: Duration) -> Idle {
        Idle { spin, spins: true, since: None }
    }

    /// There is no request. Returns whether to sleep until there is one, rather than to look again.
    pub fn no_request(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        !self.spins || now - since >= self.spin
    }

    /// There is a request.
    pub fn request(&mut self, now: Instant) {
        if let Some(since) = self.since.take() {
            self.spins = now - since < self.spin;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_for_a_while_and_not_at_all_after_requests_far_apart() {
        let (spin, start) = (Duration::from_micros(100), Instant::now());
        let at = |us| start + Duration::from_micros(us);
        let mut idle = Idle::new(spin);
        assert!(!idle.no_request(at(0)));
        assert!(!idle.no_request(at(99)));
        assert!(idle.no_request(at(100)));
        // One that would have been found.
        idle.request(at(99));
        assert!(!idle.no_request(at(200)));
        // One that was not.
        idle.request(at(300));
        assert!(idle.no_request(at(400)));
        idle.request(at(450));
        assert!(!idle.no_request(at(500)));
    }

    #[test]
    fn without_a_spin_it_sleeps_at_once() {
        assert!(Idle::new(Duration::ZERO).no_request(Instant::now()));
    }
}
