//! The kill ladder as data: which rungs, and how long each may take.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::spawn::request::Backend;

/// A step of a ladder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rung {
    /// The worker is asked to stop, and can clean up.
    Cancel,
    /// An exception rises in it: in every thread of a subinterpreter, in the main thread of a process.
    Interrupt,
    /// No line of Python can run on in any thread of a subinterpreter.
    Unwind,
    /// System calls that threads of a subinterpreter are blocked in return an error.
    Unblock,
    /// The end of a subinterpreter is cut short: none of its finalisers runs on.
    Destroy,
    /// SIGTERM to its process.
    Sigterm,
    /// SIGKILL to its process and process group.
    Sigkill,
    /// It is given up: kept, counted, and reclaimed should it end after all.
    Abandoned,
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cancel => "cancel",
            Self::Interrupt => "interrupt",
            Self::Unwind => "unwind",
            Self::Unblock => "unblock",
            Self::Destroy => "destroy",
            Self::Sigterm => "sigterm",
            Self::Sigkill => "sigkill",
            Self::Abandoned => "abandoned",
        })
    }
}

/// Why a ladder was begun.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reason {
    /// `kill()`.
    Killed,
    /// The worker's time limit, in seconds.
    TimedOut(f64),
    /// The supervisor is shutting down.
    Shutdown,
    /// The interpreter that spawned it is gone.
    OwnerGone,
    /// It broke the wire protocol.
    Protocol,
    /// It closed its channel and lived on.
    Silent,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Killed => f.write_str("killed"),
            Self::TimedOut(seconds) => write!(f, "ran longer than its timeout of {seconds} s"),
            Self::Shutdown => f.write_str("killed at shutdown"),
            Self::OwnerGone => f.write_str("killed because the worker that spawned it ended"),
            Self::Protocol => f.write_str("killed because it broke the protocol of its channel"),
            Self::Silent => f.write_str("killed because it closed the channel to its supervisor"),
        }
    }
}

/// The rungs of one worker and their budgets, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ladder(Vec<(Rung, Duration)>);

impl Ladder {
    /// The default: `cancel` for its own budget, then the rest of the backend's rungs in `rest`.
    pub fn new(backend: Backend, cancel: Duration, rest: Duration) -> Self {
        let mut rungs = vec![(Rung::Cancel, cancel)];
        if backend.is_process() {
            // SIGKILL needs no share of its own but for the kernel's work: it gets what is left.
            rungs.push((Rung::Interrupt, rest / 3));
            rungs.push((Rung::Sigterm, rest / 3));
            rungs.push((Rung::Sigkill, (rest / 3).max(Duration::from_secs(1))));
        } else {
            // The two that leave the code's own clean-up a chance are short: `cancel` was that.
            let gentle = Duration::from_millis(10).min(rest / 4);
            rungs.push((Rung::Interrupt, gentle));
            rungs.push((Rung::Unwind, gentle));
            rungs.push((Rung::Unblock, rest.saturating_sub(gentle * 2)));
        }
        Self(rungs)
    }

    /// The bound on the whole.
    pub fn bound(&self) -> Duration {
        self.0.iter().map(|(_, budget)| *budget).sum()
    }

    /// The rungs and their budgets.
    pub fn rungs(&self) -> &[(Rung, Duration)] {
        &self.0
    }
}

/// A ladder that is being climbed.
#[derive(Debug, Clone, Copy)]
pub struct Climb {
    /// Why.
    pub reason: Reason,
    /// When the current rung's budget is over.
    pub until: Instant,
    at: usize,
    rung: Rung,
}

impl Climb {
    /// The first rung of `ladder` that makes sense: one without a budget is left out, and so is
    /// asking a worker that has not started yet.
    pub fn begin(ladder: &Ladder, reason: Reason, started: bool, now: Instant) -> Option<Self> {
        let begin = Self { reason, until: now, at: 0, rung: Rung::Abandoned };
        // Whom the channel does not reach can't be asked.
        let polite = !matches!(reason, Reason::Protocol | Reason::Silent);
        begin.first_from(0, ladder, now, |rung| (started && polite) || !matches!(rung, Rung::Cancel))
    }

    /// The next rung; `None` at the end of the ladder.
    pub fn next(self, ladder: &Ladder, now: Instant) -> Option<Self> {
        self.first_from(self.at + 1, ladder, now, |_| true)
    }

    /// The rung that it is at.
    pub fn rung(self) -> Rung {
        self.rung
    }

    fn first_from(
        self,
        from: usize,
        ladder: &Ladder,
        now: Instant,
        takes: impl Fn(Rung) -> bool,
    ) -> Option<Self> {
        let (at, (rung, budget)) = ladder
            .rungs()
            .iter()
            .enumerate()
            .skip(from)
            .find(|(_, (rung, budget))| !budget.is_zero() && takes(*rung))?;
        Some(Self { at, rung: *rung, until: now + *budget, ..self })
    }
}
