//! How long a pager is waited for that is to get ready, or to take over.

use std::time::Duration;

/// Between two looks at a pager that is waited for.
pub const LOOK: Duration = Duration::from_secs(1);
/// So many looks in a row at which it has not run at all since the one before: stopped, or waiting for what does not come.
/// Looks, not time: a machine that stood still does not count.
const STILL: u32 = 10;
/// So many looks at one that is to get ready, which takes a fraction of a second: it does something else.
const MOST: u32 = 120;

#[derive(Default)]
pub struct Patience {
    looks: u32,
    still: u32,
    ran: u64,
}

impl Patience {
    /// Looks once more at a pager that has run for so many nanoseconds in all. True when it has been waited for long
    /// enough; then it starts over. `takes_long`: what it is at takes as long as there are pages.
    pub fn is_over(&mut self, ran: u64, takes_long: bool) -> bool {
        let still = if ran == self.ran { self.still + 1 } else { 0 };
        *self = Patience { looks: self.looks + 1, still, ran };
        let is_over = self.still >= STILL || self.looks >= MOST && !takes_long;
        if is_over {
            *self = Patience { ran, ..Patience::default() };
        }
        is_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(takes_long: bool, ran: impl Fn(u32) -> u64) -> Option<u32> {
        let mut patience = Patience::default();
        (1..1000).find(|&look| patience.is_over(ran(look), takes_long))
    }

    #[test]
    fn one_that_does_not_run_is_waited_for_until_it_is_plain() {
        assert_eq!(looks(true, |_| 5), Some(STILL + 1));
        assert_eq!(looks(false, |look| u64::from(look.min(50))), Some(50 + STILL));
        // From time to time is enough.
        assert_eq!(looks(true, |look| u64::from(look / STILL)), None);
    }

    #[test]
    fn one_that_runs_and_does_not_get_ready_is_waited_for_longer() {
        assert_eq!(looks(false, u64::from), Some(MOST));
        assert_eq!(looks(true, u64::from), None);
    }

    #[test]
    fn it_starts_over() {
        let mut patience = Patience::default();
        let over = (1..=(3 * STILL + 1)).filter(|_| patience.is_over(7, false)).count();
        assert_eq!(over, 3);
    }
}
