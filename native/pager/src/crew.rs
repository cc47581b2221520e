//! The crew: threads of which one leads at a time, and the others follow (D. C. Schmidt et al., "Leader/Followers",
//! 2000).
//!
//! Who leads has what only one may have: it takes requests in, and answers what it can from memory. When an answer needs
//! the disk it gives the lead away first, for whoever is free, answers on its own, and is free again. So requests are
//! served while the disk is waited for; and as long as no answer needs it, one thread does everything, and wakes nobody.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Room for the lead. None: somebody leads.
type Place<Lead> = Mutex<Option<Box<Lead>>>;

fn lock<Lead>(place: &Place<Lead>) -> MutexGuard<'_, Option<Box<Lead>>> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct Crew<Lead> {
    place: Place<Lead>,
    given: Condvar,
}

/// Where a worker keeps the lead while an answer may still need the disk, and from where it is given away then: once,
/// however often that happens.
pub struct Pocket<Lead>(Place<Lead>);

impl<Lead> Crew<Lead> {
    /// Nobody leads before the lead is given for the first time.
    pub fn new() -> Crew<Lead> {
        Crew { place: Mutex::new(None), given: Condvar::new() }
    }

    /// Waits for the lead, and takes it. Allocates nothing.
    pub fn take(&self) -> Box<Lead> {
        let mut place = lock(&self.place);
        loop {
            match place.take() {
                Some(lead) => return lead,
                None => place = self.given.wait(place).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Gives the lead to whoever waits for it, or else will next. Never blocks, and allocates nothing.
    pub fn give(&self, lead: Box<Lead>) {
        *lock(&self.place) = Some(lead);
        self.given.notify_one();
    }
}

impl<Lead> Pocket<Lead> {
    pub fn new() -> Pocket<Lead> {
        Pocket(Mutex::new(None))
    }

    pub fn put(&self, lead: Box<Lead>) {
        *lock(&self.0) = Some(lead);
    }

    pub fn take(&self) -> Option<Box<Lead>> {
        lock(&self.0).take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    #[test]
    fn one_leads_at_a_time_and_every_time_it_is_given_somebody_does() {
        const TURNS: usize = 10_000;
        let (crew, leaders) = (Crew::new(), AtomicUsize::new(0));
        crew.give(Box::new(0));
        let follow = || loop {
            let mut turns = crew.take();
            assert_eq!(leaders.fetch_add(1, SeqCst), 0);
            let last = *turns == TURNS;
            *turns += usize::from(!last);
            assert_eq!(leaders.fetch_sub(1, SeqCst), 1);
            crew.give(turns);
            if last {
                return;
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(follow);
            }
        });
        assert_eq!(*crew.take(), TURNS);
    }
}
