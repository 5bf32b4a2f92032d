//! A time limit for what a worker does just now. A worker of a pool has another one for each task; the supervisor's
//! loop, which looks at it, is woken only where a limit is over before it would look anyway: with tasks of one and
//! the same limit, never.

use std::time::Duration;

/// The limit of one worker. Times are those of `sys::clock`.
#[derive(Debug, Default)]
pub(super) struct Limit {
    /// When it is over, and how many seconds there were.
    due: Option<(Duration, f64)>,
    /// When the loop looks next.
    look_at: Option<Duration>,
    /// The worker is being ended for it.
    struck: bool,
}

/// What there is to do about a limit that was set.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Set {
    /// Nothing.
    Noted,
    /// The loop must look sooner than it would.
    Sooner,
    /// Too late: the worker is being ended for the one before.
    Struck,
}

/// What there is to do when it was looked at.
#[derive(Debug, PartialEq)]
pub(super) enum Look {
    /// Nothing, until one is set.
    Idle,
    /// To look again after so long.
    After(Duration),
    /// To end the worker, which has had so many seconds.
    Strike(f64),
}

impl Limit {
    /// Sets it: so long from now on, as so many seconds; with `None`, there is none.
    pub(super) fn set(&mut self, now: Duration, limit: Option<(Duration, f64)>) -> Set {
        if self.struck {
            return Set::Struck;
        }
        // One that no clock reaches is none.
        self.due = limit.and_then(|(bound, seconds)| Some((now.checked_add(bound)?, seconds)));
        match (self.due, self.look_at) {
            (Some((due, _)), look_at) if look_at.is_none_or(|look_at| due < look_at) => {
                self.look_at = Some(due);
                Set::Sooner
            }
            _ => Set::Noted,
        }
    }

    /// Looks at it.
    pub(super) fn look(&mut self, now: Duration) -> Look {
        match self.due {
            Some((due, seconds)) if due <= now => {
                self.struck = true;
                Look::Strike(seconds)
            }
            Some((due, _)) => {
                self.look_at = Some(due);
                Look::After(due - now)
            }
            None => {
                self.look_at = None;
                Look::Idle
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn limit(seconds: u32) -> Option<(Duration, f64)> {
        Some((at(seconds.into()), seconds.into()))
    }

    #[test]
    fn it_strikes_when_it_is_over_and_then_holds() {
        let mut it = Limit::default();
        assert_eq!(it.set(at(100), limit(5)), Set::Sooner);
        assert_eq!(it.look(at(104)), Look::After(at(1)));
        assert_eq!(it.look(at(105)), Look::Strike(5.0));
        assert_eq!(it.set(at(105), None), Set::Struck);
        assert_eq!(it.set(at(105), limit(5)), Set::Struck);
    }

    #[test]
    fn the_loop_is_woken_only_for_what_is_over_before_it_looks() {
        let mut it = Limit::default();
        assert_eq!(it.set(at(100), limit(5)), Set::Sooner);
        for now in 100..105 {
            assert_eq!(it.set(at(now), None), Set::Noted);
            assert_eq!(it.set(at(now), limit(5)), Set::Noted);
        }
        // It looks when the first one would have been over, and goes by the one that there is.
        assert_eq!(it.look(at(105)), Look::After(at(4)));
        assert_eq!(it.set(at(106), limit(2)), Set::Sooner);
        assert_eq!(it.look(at(108)), Look::Strike(2.0));
    }

    #[test]
    fn without_one_nobody_looks() {
        let mut it = Limit::default();
        assert_eq!(it.set(at(100), None), Set::Noted);
        assert_eq!(it.set(at(100), limit(5)), Set::Sooner);
        assert_eq!(it.set(at(101), None), Set::Noted);
        assert_eq!(it.look(at(105)), Look::Idle);
        assert_eq!(it.set(at(106), limit(9)), Set::Sooner);
    }

    #[test]
    fn one_that_no_clock_reaches_is_none() {
        let mut it = Limit::default();
        assert_eq!(it.set(at(100), Some((Duration::MAX, f64::INFINITY))), Set::Noted);
        assert_eq!(it.look(at(200)), Look::Idle);
    }
}
