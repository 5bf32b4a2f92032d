//! The kill ladder as data: which rungs, and how long each may take.

use std::fmt;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::interp::rungs::Force;
use crate::spawn::request::{Backend, seconds};
use crate::wire::message::Why;

/// A step of a ladder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
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

impl Rung {
    /// The rungs that can stand in a ladder of this backend, in order.
    pub fn of(backend: Backend) -> &'static [Self] {
        match (backend.is_process(), backend.is_subinterpreter()) {
            (true, false) => &[Self::Cancel, Self::Interrupt, Self::Sigterm, Self::Sigkill],
            (true, true) => &[Self::Cancel, Self::Interrupt, Self::Unwind, Self::Unblock, Self::Sigkill],
            (false, _) => &[Self::Cancel, Self::Interrupt, Self::Unwind, Self::Unblock, Self::Destroy],
        }
    }

    /// What it does to a subinterpreter, where that is pressing it.
    pub fn force(self) -> Option<Force> {
        match self {
            Self::Interrupt => Some(Force::Interrupt),
            Self::Unwind => Some(Force::Unwind),
            Self::Unblock => Some(Force::Unblock),
            Self::Destroy => Some(Force::Destroy),
            Self::Cancel | Self::Sigterm | Self::Sigkill | Self::Abandoned => None,
        }
    }

    /// What it does to a process, where that is a signal.
    pub fn signal(self) -> Option<Signal> {
        match self {
            Self::Interrupt => Some(Signal::INT),
            Self::Sigterm => Some(Signal::TERM),
            Self::Sigkill => Some(Signal::KILL),
            Self::Cancel | Self::Unwind | Self::Unblock | Self::Destroy | Self::Abandoned => None,
        }
    }
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
    /// What it was doing was cancelled, and has not ended.
    Deaf,
    /// The worker's time limit, in seconds.
    TimedOut(f64),
    /// The supervisor is shutting down.
    Shutdown,
    /// The interpreter that spawned it is gone.
    OwnerGone,
    /// The process that spawned it is gone.
    OwnerDied,
    /// Another worker, by its number, that shares its process could not be ended otherwise.
    Shared(u64),
    /// It broke the wire protocol.
    Protocol,
    /// It closed its channel and lived on.
    Silent,
    /// The operating system refused what it takes to see its end.
    Unwatched,
    /// The program did not heed Ctrl-C, or was sent a second one.
    Interrupted,
    /// It held its GIL for longer than so many seconds.
    HeldGil(f64),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Killed => f.write_str("killed"),
            Self::Deaf => f.write_str("killed because what it was doing was cancelled and did not end"),
            Self::TimedOut(seconds) => write!(f, "ran longer than its timeout of {seconds} s"),
            Self::Shutdown => f.write_str("killed at shutdown"),
            Self::OwnerGone => f.write_str("killed because the worker that spawned it ended"),
            Self::OwnerDied => f.write_str("killed because the process that spawned it ended"),
            Self::Shared(id) => {
                write!(f, "killed with worker {id}, which shared its process and would not end")
            }
            Self::Protocol => f.write_str("killed because it broke the protocol of its channel"),
            Self::Silent => f.write_str("killed because it closed the channel to its supervisor"),
            Self::Unwatched => f.write_str("killed because the supervisor could not watch it"),
            Self::Interrupted => f.write_str("killed by Ctrl-C"),
            Self::HeldGil(seconds) => write!(f, "killed because it held the GIL for {seconds} s"),
        }
    }
}

impl From<Why> for Reason {
    fn from(why: Why) -> Self {
        match why {
            Why::Killed => Self::Killed,
            Why::Deaf => Self::Deaf,
            Why::Shutdown => Self::Shutdown,
            Why::OwnerGone => Self::OwnerGone,
            Why::OwnerDied => Self::OwnerDied,
            Why::TimedOut { seconds } => Self::TimedOut(seconds),
        }
    }
}

impl From<Reason> for Why {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::Deaf => Self::Deaf,
            Reason::Shutdown => Self::Shutdown,
            Reason::OwnerGone => Self::OwnerGone,
            Reason::OwnerDied => Self::OwnerDied,
            Reason::TimedOut(seconds) => Self::TimedOut { seconds },
            // The rest is what its supervisor finds out by itself.
            _ => Self::Killed,
        }
    }
}

/// The rungs of one worker and their budgets, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ladder(Vec<(Rung, Duration)>);

impl Serialize for Ladder {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|(rung, budget)| (rung, budget.as_secs_f64())))
    }
}

impl Ladder {
    /// The default: `cancel` for its own budget, then the rest of the backend's rungs in `rest`.
    pub fn new(backend: Backend, cancel: Duration, rest: Duration) -> Self {
        let mut rungs = vec![(Rung::Cancel, cancel)];
        if backend.is_process() && !backend.is_subinterpreter() {
            // SIGKILL needs no share of its own but for the kernel's work: it gets what is left.
            rungs.push((Rung::Interrupt, rest / 3));
            rungs.push((Rung::Sigterm, rest / 3));
            rungs.push((Rung::Sigkill, (rest / 3).max(Duration::from_secs(1))));
        } else {
            // Those that leave the code's own clean-up a chance are short: `cancel` was that.
            let share = |millis| Duration::from_millis(millis).min(rest / 4);
            // Where there is a process to be killed, that is left till late.
            let longest = if backend.is_process() { 500 } else { 20 };
            let [interrupt, unwind, unblock] = [share(10), share(10), share(longest)];
            rungs.push((Rung::Interrupt, interrupt));
            rungs.push((Rung::Unwind, unwind));
            rungs.push((Rung::Unblock, unblock));
            let left = rest.saturating_sub(interrupt + unwind + unblock);
            rungs.push(if backend.is_process() {
                (Rung::Sigkill, left.max(Duration::from_secs(1)))
            } else {
                (Rung::Destroy, left)
            });
        }
        Self(rungs)
    }

    /// The caller's own: names of rungs and seconds for each.
    ///
    /// # Errors
    /// A rung that the backend has not, or not there; a budget that can't be one; a ladder that ends
    /// nothing.
    pub fn custom(backend: Backend, asked: &[(String, f64)]) -> Result<Self> {
        let known = Rung::of(backend);
        let mut rungs: Vec<(Rung, Duration)> = Vec::with_capacity(asked.len());
        for (name, budget) in asked {
            let Some(&rung) = known.iter().find(|rung| rung.to_string() == *name) else {
                return Err(Error::invalid(format!(
                    "the ladder of backend \"{}\" has the rungs {}; not {name:?}",
                    backend.name(),
                    join(known)
                )));
            };
            if rungs.last().is_some_and(|(before, _)| *before >= rung) {
                return Err(Error::invalid(format!(
                    "the rungs of a ladder come in the order {}; `{rung}` is out of it",
                    join(known)
                )));
            }
            rungs.push((rung, seconds(&format!("the budget of `{rung}`"), *budget)?));
        }
        let last = rungs.last().filter(|(_, budget)| !budget.is_zero()).map(|(rung, _)| *rung);
        let (ends_it, rule) = if backend.is_process() {
            (
                last == Some(Rung::Sigkill),
                "the last rung of a process's ladder must be `sigkill`, with a budget above 0: nothing else ends every process",
            )
        } else {
            (
                last > Some(Rung::Cancel),
                "the last rung of a subinterpreter's ladder must be one after `cancel`, with a budget above 0: a worker that has not started yet can't be asked",
            )
        };
        if ends_it { Ok(Self(rungs)) } else { Err(Error::invalid(rule)) }
    }

    /// The ladder of the same worker behind another wall: its bounds stay.
    pub fn moved_to(&self, backend: Backend) -> Self {
        let cancel = self.0.iter().filter(|(rung, _)| *rung == Rung::Cancel).map(|(_, budget)| *budget).sum();
        Self::new(backend, cancel, self.bound() - cancel)
    }

    /// What the supervisor in the process of a subinterpreter is to do of it, before that process is killed.
    pub fn inside(&self) -> Vec<(String, f64)> {
        let inside = |rung| if rung == Rung::Sigkill { Rung::Destroy } else { rung };
        self.0.iter().map(|(rung, budget)| (inside(*rung).to_string(), budget.as_secs_f64())).collect()
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

fn join(rungs: &[Rung]) -> String {
    rungs.iter().map(|rung| format!("`{rung}`")).collect::<Vec<_>>().join(", ")
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
        // Whom the channel does not reach can't be asked; and who did not listen is not asked again.
        let polite = !matches!(reason, Reason::Protocol | Reason::Silent | Reason::Deaf);
        // Of whom there is nobody left to wait for, and who was told of that end by nobody.
        let from = if matches!(reason, Reason::OwnerDied | Reason::Shared(_)) {
            ladder.rungs().len().saturating_sub(1)
        } else {
            0
        };
        begin.first_from(from, ladder, now, |rung| (started && polite) || !matches!(rung, Rung::Cancel))
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
