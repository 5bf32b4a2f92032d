//! What a caller asks for, as plain data. Strings that name files or go into an environment carry
//! one byte a character (latin-1), because Linux's are bytes and JSON's are not.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::interp::subinterp::Gil;

/// The walls that a worker can stand behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// A subinterpreter on a thread of this process.
    Subint,
    /// A process forked from the zygote.
    Forkserver,
    /// A subinterpreter in a process forked from the zygote.
    SubintForkserver,
    /// A process forked from the clean thread of this one.
    Fork,
    /// A process started afresh.
    Exec,
}

impl Backend {
    /// The public name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Subint => "subint",
            Self::Forkserver => "forkserver",
            Self::SubintForkserver => "subint_forkserver",
            Self::Fork => "fork",
            Self::Exec => "exec",
        }
    }

    /// Whether the worker is a process of its own.
    pub fn is_process(self) -> bool {
        self != Self::Subint
    }

    /// Whether the worker's code runs in a subinterpreter.
    pub fn is_subinterpreter(self) -> bool {
        matches!(self, Self::Subint | Self::SubintForkserver)
    }

    /// Whether it is a process with nothing of this one's memory.
    pub fn starts_afresh(self) -> bool {
        self.has_zygote() || self == Self::Exec
    }

    /// Whether it is forked from the zygote.
    pub fn has_zygote(self) -> bool {
        matches!(self, Self::Forkserver | Self::SubintForkserver)
    }
}

/// Which GIL a subinterpreter worker asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GilPolicy {
    /// The process's.
    Shared,
    /// Its own.
    Own,
    /// Its own, else the process's: started again when an extension module refuses.
    Auto,
}

impl GilPolicy {
    /// The one to start with, and the one to fall back on.
    pub fn plan(self) -> (Gil, Option<Gil>) {
        match self {
            Self::Shared => (Gil::Shared, None),
            Self::Own => (Gil::Own, None),
            Self::Auto => (Gil::Own, Some(Gil::Shared)),
        }
    }
}

/// Where a worker's stdout and stderr go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stdio {
    /// Where the host's go.
    Inherit,
    /// Nowhere.
    Null,
    /// To files in memory that the host reads.
    Pipe,
    /// To the end of this file.
    Path(String),
}

/// A request for one worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The worker's name; made up from the target and its id when there is none.
    pub name: Option<String>,
    /// The wall.
    pub backend: Backend,
    /// For a subinterpreter.
    pub gil: GilPolicy,
    /// Subinterpreters that name the same live in one process.
    pub process: Option<String>,
    /// The target in words, which is also the key under which `auto` and `promote` remember it.
    pub target: String,
    /// Where output goes.
    pub stdio: Stdio,
    /// The whole environment of a process worker; the host's when there is none.
    pub env: Option<Vec<(String, String)>>,
    /// How many blanks to keep ready of what the fork server forked for it; a small number by default.
    pub blanks: Option<usize>,
    /// The working directory of a process worker.
    pub cwd: Option<String>,
    /// Seconds after which the ladder is run.
    pub timeout: Option<f64>,
    /// Seconds that a worker gets to end by itself once it is asked to.
    pub cancel_timeout: f64,
    /// Seconds for all that follows.
    pub kill_timeout: f64,
    /// Its weight among those that compete with it.
    pub priority: f64,
    /// At most this part of a processor.
    pub cpu_quota: Option<f64>,
    /// Rungs and their seconds, in the place of these two.
    pub ladder: Option<Vec<(String, f64)>>,
    /// Whether a target that had to be abandoned once is run in a process from then on.
    pub promote: bool,
    /// The command that starts a fresh process, for `exec` and the zygote.
    pub command: Vec<String>,
    /// What the zygote imports, should there be none yet.
    pub preload: Vec<String>,
    /// What `tractor_host._child` needs to know.
    pub spec: serde_json::Value,
}

/// The longest bound that is told apart from none: a hundred years.
const LONGEST: f64 = 100.0 * 365.0 * 86400.0;

impl Request {
    /// Checks what serde can't.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<()> {
        if self.name.as_deref().is_some_and(|name| name.is_empty() || name.contains('\0')) {
            return Err(Error::invalid("a worker's name must not be empty or contain a NUL"));
        }
        seconds("timeout", self.timeout.unwrap_or(0.0))?;
        seconds("cancel_timeout", self.cancel_timeout)?;
        seconds("kill_timeout", self.kill_timeout)?;
        if let Some(process) = &self.process {
            if self.backend != Backend::SubintForkserver {
                return Err(Error::invalid(
                    "process= is for backend=\"subint_forkserver\": only subinterpreters can share a process",
                ));
            }
            if process.is_empty() || process.contains('\0') {
                return Err(Error::invalid("process= must not be empty or contain a NUL"));
            }
            if self.env.is_some() || self.cwd.is_some() {
                return Err(Error::invalid(
                    "env and cwd belong to a process; those that share one can't bring theirs",
                ));
            }
        }
        if !self.backend.is_process() && (self.env.is_some() || self.cwd.is_some()) {
            return Err(Error::invalid(
                "env and cwd belong to a process and all its interpreters share them; use backend=\"fork\" or \"exec\"",
            ));
        }
        if !PRIORITIES.contains(&self.priority) {
            return Err(Error::invalid(format!(
                "priority must be from {} to {}, not {}",
                PRIORITIES.start(),
                PRIORITIES.end(),
                self.priority
            )));
        }
        if let Some(quota) = self.cpu_quota {
            if !(quota > 0.0 && quota.is_finite()) {
                return Err(Error::invalid(format!(
                    "cpu_quota must be a part of one processor, above 0, not {quota}"
                )));
            }
            if self.backend.is_process() && self.process.is_none() {
                return Err(Error::invalid(
                    "cpu_quota is for subinterpreters (backend=\"subint\", or \"subint_forkserver\" with process=); \
                     limit a process with a control group (cpu.max) or a lower priority",
                ));
            }
        }
        if self.backend.starts_afresh() && self.command.is_empty() {
            return Err(Error::invalid("this backend needs the command that starts a fresh process"));
        }
        Ok(())
    }
}

/// What a worker's weight can be.
const PRIORITIES: std::ops::RangeInclusive<f64> = 0.01..=100.0;

/// A bound in seconds as a duration.
///
/// # Errors
/// When it is negative or not a number.
pub fn seconds(what: &str, value: f64) -> Result<Duration> {
    if value.is_nan() || value < 0.0 {
        return Err(Error::invalid(format!("{what} must be a number of seconds, at least 0, not {value}")));
    }
    Ok(Duration::from_secs_f64(value.min(LONGEST)))
}

/// `sys.path`, as `_child` is told it.
///
/// # Errors
/// When there is none in it.
pub fn path_of(spec: &serde_json::Value) -> Result<Vec<Vec<u8>>> {
    let path: Vec<String> = serde_json::from_value(spec["path"].clone())
        .map_err(|error| Error::protocol(format!("no sys.path in what a worker is told: {error}")))?;
    path.iter().map(|entry| bytes("sys.path", entry)).collect()
}

/// The bytes of a latin-1 string.
///
/// # Errors
/// When a character is beyond one byte, or NUL.
pub fn bytes(what: &str, text: &str) -> Result<Vec<u8>> {
    text.chars()
        .map(|char| match u8::try_from(char) {
            Ok(0) => Err(Error::invalid(format!("a NUL in {what}"))),
            Ok(byte) => Ok(byte),
            Err(_) => Err(Error::invalid(format!("{what} is not one byte a character"))),
        })
        .collect()
}
