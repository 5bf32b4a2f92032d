//! One interpreter after the other ends.
//!
//! The end of an interpreter is one long call into the collector and the destructors, which does not let go of
//! the GIL in between. Were all those that share the GIL to end at once, whoever else wants it, such as the
//! program's event loop, would be one of many for all that time; and they would be no sooner done.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::sys::fork_local::ForkLocal;
use crate::sys::lock::lock;

/// How long a turn is, at most: a finaliser may sleep, and whoever comes next then does not wait for it.
const TURN: Duration = Duration::from_millis(100);
/// How long to wait for one's turn, at most.
const PATIENCE: Duration = Duration::from_secs(1);

static TURNS: ForkLocal<Turns> = ForkLocal::new();

#[derive(Debug, Default)]
struct Turns {
    last: Mutex<Last>,
    over: Condvar,
}

/// The turn that was taken last, by its number, and since when, if it is not over.
#[derive(Debug, Default)]
struct Last {
    number: u64,
    since: Option<Instant>,
}

impl Last {
    /// Until when it is waited for; `None` if it is over.
    fn until(&self, turn: Duration, now: Instant) -> Option<Instant> {
        self.since.map(|since| since + turn).filter(|until| *until > now)
    }
}

/// A turn, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    turns: &'static Turns,
    number: u64,
}

impl Turn {
    /// Waits until it is this thread's turn, or it has waited for long enough. Must not be called with a GIL.
    ///
    /// In a process that was forked by somebody else's hand there are no turns: whom it would wait for is in the
    /// parent.
    pub fn wait() -> Option<Self> {
        TURNS.get_or_make(|| Ok(Turns::default())).map(|turns| Self::take(turns, TURN, PATIENCE)).ok()
    }

    fn take(turns: &'static Turns, turn: Duration, patience: Duration) -> Self {
        let mut last = lock(&turns.last);
        let mut now = Instant::now();
        let enough = now + patience;
        while now < enough
            && let Some(until) = last.until(turn, now)
        {
            let waited = turns.over.wait_timeout(last, until.min(enough) - now);
            last = waited.unwrap_or_else(PoisonError::into_inner).0;
            now = Instant::now();
        }
        last.number += 1;
        last.since = Some(Instant::now());
        Self { turns, number: last.number }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut last = lock(&self.turns.last);
        if last.number == self.number {
            last.since = None;
            self.turns.over.notify_one();
        }
    }
}

/// In the only thread of a fork's child: who has the turn, and waits for it, is in the parent.
pub fn forget() {
    TURNS.forget();
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn turns() -> &'static Turns {
        Box::leak(Box::default())
    }

    #[test]
    fn one_has_the_turn_at_a_time() {
        static TOGETHER: Mutex<(u32, u32)> = Mutex::new((0, 0));
        let turns = turns();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let turn = Turn::take(turns, LONG, LONG);
                    let mut now = lock(&TOGETHER);
                    now.0 += 1;
                    now.1 = now.1.max(now.0);
                    drop(now);
                    std::thread::yield_now();
                    lock(&TOGETHER).0 -= 1;
                    drop(turn);
                });
            }
        });
        assert_eq!(*lock(&TOGETHER), (0, 1));
    }

    #[test]
    fn who_does_not_end_is_not_waited_for() {
        let turns = turns();
        let (short, start) = (Duration::from_millis(20), Instant::now());
        let stuck = Turn::take(turns, short, LONG);
        let next = Turn::take(turns, short, LONG);
        assert!(start.elapsed() >= short);
        drop(stuck);
        assert!(lock(&turns.last).since.is_some(), "the turn is the next one's");
        drop(next);
        assert!(lock(&turns.last).since.is_none());
    }

    #[test]
    fn who_has_waited_for_long_enough_goes_on() {
        let turns = turns();
        let (short, start) = (Duration::from_millis(20), Instant::now());
        let _stuck = Turn::take(turns, LONG, short);
        drop(Turn::take(turns, LONG, short));
        assert!((short..LONG).contains(&start.elapsed()));
    }
}
