//! The crew: threads of which one leads at a time, and the others follow (D. C. Schmidt et al., "Leader/Followers",
//! 2000).
//!
//! Who leads has what only one may have: it takes requests in, and answers what it can from memory. When an answer needs
//! the disk it gives the lead away first, to one that is free, answers on its own, and is free again. So requests are
//! served while the disk is waited for; and as long as no answer needs it, one thread does everything, and wakes nobody.
//!
//! The lead is given to nobody who is not free. With all others at the disk, what needs it too is left for the first of
//! them that comes back: one thread never waits for the disk, or what lies in memory would wait with it.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct Crew<Lead, Task> {
    state: Mutex<State<Lead, Task>>,
    given: Condvar,
}

struct State<Lead, Task> {
    /// None: somebody leads.
    lead: Option<Box<Lead>>,
    /// Who waits in [`Crew::next`]. Invariant: nobody, if there are tasks.
    free: usize,
    /// Never grows beyond the room that it was made with.
    tasks: VecDeque<Task>,
}

/// What a thread is to do.
pub enum Next<Lead, Task> {
    Lead(Box<Lead>),
    Task(Task),
}

/// Where a worker keeps the lead while an answer may still need the disk, and from where it is given away then: once,
/// however often that happens.
pub struct Pocket<Lead>(Mutex<Option<Box<Lead>>>);

impl<Lead, Task> Crew<Lead, Task> {
    /// Nobody leads before somebody resigns for the first time. Of `tasks` as many can be left as it has
    /// room for; it is empty, and its memory resident.
    pub fn new(tasks: VecDeque<Task>) -> Crew<Lead, Task> {
        let state = State { lead: None, free: 0, tasks };
        Crew { state: Mutex::new(state), given: Condvar::new() }
    }

    /// What was left to be done, else the lead, for which it waits. Allocates nothing.
    pub fn next(&self) -> Next<Lead, Task> {
        let mut state = lock(&self.state);
        if let Some(task) = state.tasks.pop_front() {
            return Next::Task(task);
        }
        loop {
            if let Some(lead) = state.lead.take() {
                return Next::Lead(lead);
            }
            state.free += 1;
            state = self.given.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.free -= 1;
        }
    }

    /// Gives the lead to one who is free; back, if nobody is. Never blocks, and allocates nothing.
    pub fn give(&self, lead: Box<Lead>) -> Result<(), Box<Lead>> {
        let mut state = lock(&self.state);
        if state.free == 0 {
            return Err(lead);
        }
        state.lead = Some(lead);
        self.given.notify_one();
        Ok(())
    }

    /// Gives the lead to whoever is free next, for good.
    pub fn resign(&self, lead: Box<Lead>) {
        lock(&self.state).lead = Some(lead);
        self.given.notify_one();
    }

    /// Who leads leaves a task to the first that comes back. Gives it back if somebody is free already, or there is no
    /// room. Never blocks, and allocates nothing.
    pub fn leave(&self, task: Task) -> Result<(), Task> {
        let mut state = lock(&self.state);
        if state.free > 0 || state.tasks.len() == state.tasks.capacity() {
            return Err(task);
        }
        state.tasks.push_back(task);
        Ok(())
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
    fn one_leads_at_a_time_and_every_task_that_is_left_is_done_once() {
        const TURNS: usize = 10_000;
        let (crew, leaders, done) = (Crew::new(VecDeque::with_capacity(2)), AtomicUsize::new(0), AtomicUsize::new(0));
        crew.resign(Box::new(0));
        let follow = || loop {
            let mut turns = match crew.next() {
                Next::Lead(turns) => turns,
                Next::Task(()) => {
                    done.fetch_add(1, SeqCst);
                    continue;
                }
            };
            assert_eq!(leaders.fetch_add(1, SeqCst), 0);
            let last = *turns == TURNS;
            // Somebody does it, or we do.
            if !last {
                *turns += 1;
                done.fetch_add(usize::from(crew.leave(()).is_err()), SeqCst);
            }
            assert_eq!(leaders.fetch_sub(1, SeqCst), 1);
            crew.resign(turns);
            if last {
                return;
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(follow);
            }
        });
        while let Next::Task(()) = crew.next() {
            done.fetch_add(1, SeqCst);
        }
        assert_eq!(done.load(SeqCst), TURNS);
    }

    #[test]
    fn the_lead_goes_to_who_is_free_and_a_task_to_who_is_not() {
        let crew = Crew::new(VecDeque::with_capacity(1));
        let lead = crew.give(Box::new(())).expect_err("nobody is there");
        assert_eq!(crew.leave(1), Ok(()));
        assert_eq!(crew.leave(2), Err(2), "there is no room");
        assert!(matches!(crew.next(), Next::Task(1)));
        std::thread::scope(|scope| {
            let other = scope.spawn(|| matches!(crew.next(), Next::Lead(_)));
            while lock(&crew.state).free == 0 {
                std::thread::yield_now();
            }
            assert_eq!(crew.leave(3), Err(3), "somebody is free");
            assert!(crew.give(lead).is_ok());
            assert!(other.join().expect("no panic"));
        });
    }
}
