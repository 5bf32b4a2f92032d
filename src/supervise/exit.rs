//! How a worker ended, as it was: one pure function from what was seen to what is said.

use serde::{Deserialize, Serialize};

use super::ladder::{Reason, Rung};
use crate::diag::stacks::Stack;
use crate::sys::oom::Evidence;
use crate::sys::process::Status;
use crate::sys::signal;
use crate::wire::message::FromWorker;

/// In a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The target returned; its value is there.
    Returned,
    /// The target raised; the exception is there.
    Raised,
    /// It was asked to stop, and did so cleanly.
    Cancelled,
    /// A rung of the ladder after `cancel` ended it.
    Killed,
    /// A signal that the supervisor did not send ended it.
    Signalled,
    /// It left with an exit code, and without a value.
    Exited,
    /// It could not be ended.
    Abandoned,
}

impl Kind {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Returned => "returned",
            Self::Raised => "raised",
            Self::Cancelled => "cancelled",
            Self::Killed => "killed",
            Self::Signalled => "signalled",
            Self::Exited => "exited",
            Self::Abandoned => "abandoned",
        }
    }
}

/// The end of a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exit {
    /// In a word.
    pub kind: Kind,
    /// The rung that ended it, where one did.
    pub rung: Option<Rung>,
    /// The exit code, where there was one.
    pub code: Option<i32>,
    /// The number of the signal that ended its process.
    pub signal: Option<i32>,
    /// What happened, for people.
    pub cause: String,
    /// The end of what it wrote to stderr, and where it crashed, if it died.
    pub stderr: String,
    /// What its threads were in when a late rung came to it.
    #[serde(default)]
    pub stuck: Vec<Stack>,
    /// Seconds from the request to end it until its end; `None` when nobody asked.
    pub elapsed: Option<f64>,
    /// Seconds from its start to its end.
    pub lifetime: f64,
}

impl Exit {
    /// Of one of which nothing is known but that it has ended.
    pub(super) fn unknown(cause: String) -> Self {
        Self { cause, ..Seen::default().judge() }
    }

    /// Of one of which more was told, in a way that can't be read.
    pub(super) fn unreadable(error: serde_json::Error) -> Self {
        Self::unknown(format!("it has ended, and how was told in words that are none: {error}"))
    }
}

/// What was seen of a worker by the time it was gone (or given up).
#[derive(Debug, Default)]
pub struct Seen {
    /// It said that its boot was over.
    pub started: bool,
    /// The last thing that it said of its end.
    pub report: Option<FromWorker>,
    /// How its process ended; `None` for a subinterpreter.
    pub status: Option<Status>,
    /// What the kernel tells of a SIGKILL that the supervisor did not send.
    pub oom: Evidence,
    /// A failure that was not the target's: no interpreter, a broken channel.
    pub failure: Option<String>,
    /// The rung that was reached, and who asked for the ladder.
    pub rung: Option<(Rung, Reason)>,
    /// `cancel()` was called.
    pub cancelled: bool,
    /// The last of what it wrote to stderr, where that was recorded.
    pub stderr: String,
    /// The ladder ran out before the worker did.
    pub abandoned: bool,
    /// What its threads were in when the ladder came to `unblock`, or to SIGKILL.
    pub stuck: Vec<Stack>,
}

impl Seen {
    /// The verdict, but for the times.
    pub fn judge(&self) -> Exit {
        let (code, signal) = match self.status {
            Some(Status::Exited(code)) => (Some(code), None),
            Some(Status::Signalled { signal, .. }) => (None, Some(signal)),
            Some(Status::Lost) | None => (None, None),
        };
        let mut exit = Exit {
            kind: Kind::Exited,
            rung: None,
            code,
            signal,
            cause: String::new(),
            stderr: self.stderr.clone(),
            stuck: self.stuck.clone(),
            elapsed: None,
            lifetime: 0.0,
        };
        let asked_only = self.cancelled || matches!(self.rung, Some((Rung::Cancel, _)));
        let forced = self.rung.filter(|(rung, _)| *rung != Rung::Cancel);
        match (&self.report, forced) {
            (Some(FromWorker::Returned | FromWorker::ReturnedInMemory), _) => {
                exit.kind = Kind::Returned;
                exit.cause = "returned".into();
                match self.status {
                    Some(Status::Exited(0)) | None => {}
                    Some(status) => {
                        exit.cause =
                            format!("returned, then its process {}{}", words(status), self.by_kernel());
                    }
                }
            }
            _ if self.abandoned => {
                exit.kind = Kind::Abandoned;
                exit.rung = Some(Rung::Abandoned);
                let (rung, reason) = self.rung.unwrap_or((Rung::Interrupt, Reason::Killed));
                exit.cause = format!("{reason}, and still there after `{rung}`");
            }
            (report, Some((rung, reason))) => {
                exit.kind = Kind::Killed;
                exit.rung = Some(rung);
                exit.cause = format!("{reason}, ended at `{rung}`{}", self.by_kernel());
                if let Some(failure) = &self.failure {
                    exit.cause.push_str(&format!(" ({failure})"));
                }
                if let Some(FromWorker::Raised { summary, .. }) = report {
                    exit.cause.push_str(&format!(" with {summary}"));
                }
            }
            (Some(FromWorker::Cancelled), None) if asked_only => {
                exit.kind = Kind::Cancelled;
                exit.rung = Some(Rung::Cancel);
                exit.cause = match self.rung {
                    Some((_, reason)) => format!("{reason}, stopped when cancelled"),
                    None => "cancelled".into(),
                };
            }
            (Some(FromWorker::Raised { summary, boot, .. }), None) => {
                exit.kind = Kind::Raised;
                exit.cause =
                    if *boot { format!("failed to start: {summary}") } else { format!("raised {summary}") };
            }
            (Some(FromWorker::Exited { code: asked }), None) => {
                exit.code = exit.code.or(Some(*asked));
                exit.cause = format!("raised SystemExit, exit code {asked}");
            }
            // Nothing else is kept as a report.
            (Some(_) | None, None) => self.judge_silent(&mut exit),
        }
        exit
    }

    /// What speaks for a SIGKILL of the kernel's where nobody would look for one.
    fn by_kernel(&self) -> String {
        match self.oom {
            Evidence::None | Evidence::Nobody => String::new(),
            Evidence::Cgroup(_) | Evidence::Machine(_) => format!(" ({})", sender(self.oom)),
        }
    }

    /// It ended without saying how.
    fn judge_silent(&self, exit: &mut Exit) {
        let when = if self.started { "" } else { " before it had started its target" };
        exit.cause = match self.status {
            Some(status @ Status::Signalled { signal, .. }) => {
                exit.kind = Kind::Signalled;
                let hint = if signal == libc::SIGKILL {
                    format!("; the supervisor did not send it ({})", sender(self.oom))
                } else {
                    String::new()
                };
                format!("its process {}{when}{hint}", words(status))
            }
            Some(status) => format!("its process {}{when}, without a result", words(status)),
            None => format!("its thread ended{when}, without a result"),
        };
        if let Some(failure) = &self.failure {
            exit.cause.push_str(&format!(": {failure}"));
        }
    }
}

/// Who sent a SIGKILL that the supervisor did not send.
fn sender(evidence: Evidence) -> String {
    let kernel = "the kernel's out-of-memory killer";
    match evidence {
        Evidence::None => format!("{kernel}, or somebody's kill -9"),
        Evidence::Cgroup(more) => format!(
            "probably {kernel}: the worker's cgroup has counted {more} more oom_kill since the worker was made"
        ),
        Evidence::Machine(more) => format!(
            "possibly {kernel}: this machine has counted {more} more oom_kill since the worker was made; or \
             somebody's kill -9"
        ),
        Evidence::Nobody => {
            format!("not {kernel}, which has ended nobody on this machine since the worker was made")
        }
    }
}

fn words(status: Status) -> String {
    match status {
        Status::Exited(code) => format!("left with exit code {code}"),
        Status::Signalled { signal: number, core } => {
            format!("was ended by {}{}", signal::describe(number), if core { ", core dumped" } else { "" })
        }
        Status::Lost => "ended, and somebody else took its exit status".into(),
    }
}
