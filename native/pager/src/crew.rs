//! The crew: threads of which one leads at a time, and the others follow (D. C. Schmidt et al., "Leader/Followers",
//! 2000).
//!
//! Who leads has what only one may have: it takes requests in, and answers what it can from memory. When an answer needs
//! the disk it gives the lead away first, for whoever is free, answers on its own, and is free again. So requests are
//! served while the disk is waited for; and as long as no answer needs it, one thread does everything, and wakes nobody.

use std::sync::{Condvar, Mutex, PoisonError};

pub struct Crew<Lead> {
    /// None: somebody leads.
    lead: Mutex<Option<Box<Lead>>>,
    given: Condvar,
}

impl<Lead> Crew<Lead> {
    /// Nobody leads yet.
    pub fn new(lead: Lead) -> Crew<Lead> {
        Crew { lead: Mutex::new(Some(Box::new(lead))), given: Condvar::new() }
    }

    /// Waits for the lead, and takes it. Allocates nothing.
    pub fn take(&self) -> Box<Lead> {
        let mut lead = self.lead.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match lead.take() {
                Some(lead) => return lead,
                None => lead = self.given.wait(lead).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Gives the lead to whoever waits for it, or else will next. Never blocks, and allocates nothing.
    pub fn give(&self, lead: Box<Lead>) {
        *self.lead.lock().unwrap_or_else(PoisonError::into_inner) = Some(lead);
        self.given.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    #[test]
    fn one_leads_at_a_time_and_every_time_it_is_given_somebody_does() {
        const TURNS: usize = 10_000;
        let (crew, leaders) = (Crew::new(0), AtomicUsize::new(0));
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
