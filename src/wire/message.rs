//! The closed set of messages in each direction.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::frame::{Frame, encode_head};
use crate::error::{Error, Relayed, Result};
use crate::interp::rungs::Force;
use crate::interp::subinterp::Gil;
use crate::sys::process::Means;

/// What a supervisor says to a worker process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToWorker {
    /// What to do; the first message. Payload: the pickled target and its arguments.
    Spec {
        /// Read by `tractor_host._child` alone.
        spec: serde_json::Value,
        /// The rest of the process's contract, for its first steps in Rust.
        contract: Contract,
        /// What the descriptors beside it are for, in their order.
        roles: Vec<Role>,
    },
    /// Be a zygote; the first and last message.
    Template {
        /// That of a worker; read by `tractor_host._zygote` alone.
        spec: serde_json::Value,
        /// The modules to import.
        preload: Vec<String>,
        /// As for a worker.
        contract: Contract,
    },
    /// Please stop.
    Cancel,
    /// Press the worker's interpreter, which is not the process's main one, from now on.
    Press {
        /// So hard.
        force: Force,
    },
    /// Have a worker live in a subinterpreter of this process. Payload: its pickled target and arguments.
    Lodge {
        /// Its number.
        id: u64,
        /// A `Request`.
        request: serde_json::Value,
        /// What the descriptors beside it are for.
        roles: Vec<Role>,
    },
    /// Of one that lives in it.
    Lodger {
        /// Its number.
        id: u64,
        /// What is to be done about it.
        wish: Wish,
    },
    /// Of one that it runs by itself, by the number that it has there.
    Own {
        /// That.
        id: u64,
        /// What is to be done about it.
        wish: Wish,
    },
    /// Of a worker that it has asked for.
    About {
        /// The number by which it asked.
        id: u64,
        /// What there is to tell. Payload: what the worker ended with, if that is it.
        news: News,
    },
    /// The terminal that it has asked for comes beside this.
    Terminal {
        /// The number by which it asked.
        ticket: u64,
        /// Why it does not.
        refused: Option<Relayed>,
    },
    /// Somebody debugs: end nobody, until he does not any more.
    Hold {
        /// That somebody does.
        on: bool,
    },
}

/// What is told of a worker to whoever asked for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum News {
    /// It is there.
    Spawned {
        /// Its process.
        pid: i32,
    },
    /// There is none.
    Refused {
        /// Why.
        error: Relayed,
        /// Whoever asks is to start it by itself.
        confined: bool,
    },
    /// Its boot is over.
    Started,
    /// It is over.
    Ended {
        /// How; read by `supervise` alone.
        exit: serde_json::Value,
        /// Where the value or the exception is.
        outcome: Outcome,
    },
}

/// Where what a worker has ended with is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// There is none.
    None,
    /// It is the payload.
    Payload,
    /// In the sealed file in memory that comes beside the message.
    Memory,
    /// It was there, and there was no descriptor left to take it over.
    Lost,
}

impl News {
    fn descriptors(&self) -> usize {
        usize::from(matches!(self, Self::Ended { outcome: Outcome::Memory, .. }))
    }
}

impl ToWorker {
    /// How many descriptors come beside it.
    pub fn descriptors(&self) -> usize {
        match self {
            Self::Spec { roles, .. } | Self::Lodge { roles, .. } => roles.len(),
            Self::About { news, .. } => news.descriptors(),
            Self::Terminal { refused, .. } => usize::from(refused.is_none()),
            Self::Template { .. }
            | Self::Cancel
            | Self::Press { .. }
            | Self::Lodger { .. }
            | Self::Own { .. }
            | Self::Hold { .. } => 0,
        }
    }
}

impl FromWorker {
    /// How many descriptors come beside it.
    pub fn descriptors(&self) -> usize {
        match self {
            Self::ReturnedInMemory => 1,
            Self::Lodger { news, .. } => news.descriptors(),
            Self::About { wish: Wish::Spawn { roles, .. }, .. } => roles.len(),
            _ => 0,
        }
    }
}

/// What a descriptor is for that a worker is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// To be its stdout.
    Stdout,
    /// To be its stderr, once it has booted.
    Stderr,
    /// The directory that it is to work in.
    Directory,
    /// The file in memory that holds what the message's payload would.
    Payload,
    /// Something that its arguments refer to, by its place among those with this role.
    Passed,
}

/// What the host says to its zygote.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToZygote {
    /// Fork a worker. Beside it come its channel and its stderr during the boot.
    Fork {
        /// It is to have a second interpreter with such a GIL, as prepared as the main one.
        interpreter: Option<Gil>,
        /// Nobody waits for it, yet.
        at_leisure: bool,
    },
    /// Somebody waits for what was ordered before. It is not answered.
    Hurry,
}

/// What a zygote says to its host.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum FromZygote {
    /// It has imported what it was to.
    Ready {
        /// But for these.
        failures: Vec<PreloadFailure>,
        /// The names of its threads, where that started any: it can't fork then.
        threads: Vec<String>,
    },
    /// There is a worker. Beside it comes its pidfd.
    Forked {
        /// Its pid.
        pid: i32,
        /// What could not be preloaded in its second interpreter, where that was made for it.
        failures: Vec<PreloadFailure>,
    },
    /// The operating system refused.
    Failed {
        /// Its reason.
        errno: i32,
    },
    /// It cannot fork.
    Refused {
        /// Why.
        reason: String,
    },
}

/// A module that could not be preloaded.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreloadFailure {
    /// Its name.
    pub module: String,
    /// The traceback of the failure.
    pub traceback: String,
}

/// What a worker process does to itself before it runs anything.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contract {
    /// The worker's name.
    pub name: String,
    /// The supervisor's pid, to notice that it was gone before the death signal was armed.
    pub parent: i32,
    /// The file mode creation mask, where that is not inherited.
    pub umask: Option<u32>,
    /// Its code runs in a second interpreter.
    pub apart: bool,
}

/// What a process passes on to those that it starts, where another one starts them for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standing {
    /// Its file mode creation mask, where that can be told.
    pub umask: Option<u32>,
    /// What it may use of the machine.
    pub means: Means,
}

/// A worker that runs in the process that tells of it, by a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Parent {
    /// One that it runs by itself: its own number.
    Own(u64),
    /// One that lives there: the number that it has with the supervisor of that process.
    Lodger(u64),
}

/// What whoever asked for a worker wants of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Wish {
    /// That it be made. Payload: the pickled target and its arguments.
    Spawn {
        /// A `Request`.
        request: serde_json::Value,
        /// What it is to start with.
        standing: Standing,
        /// What the descriptors beside it are for, in their order.
        roles: Vec<Role>,
        /// Which worker of the asking process wants it, if one does.
        parent: Option<Parent>,
    },
    /// That it be asked to stop.
    Cancel,
    /// That it stand still, with all that it has started.
    Pause,
    /// That it go on.
    Resume,
    /// That it be ended.
    Kill {
        /// For this reason.
        why: Why,
    },
}

/// Why a worker is to end.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// It was told to.
    Killed,
    /// What it was doing was cancelled, and has not ended.
    Deaf,
    /// It is coming to its own end.
    Shutdown,
    /// The interpreter that wanted it has ended.
    OwnerGone,
    /// The process that wanted it has ended.
    OwnerDied,
    /// It has run for longer than it may.
    TimedOut {
        /// Its limit.
        seconds: f64,
    },
}

/// What a worker process tells of a worker that it runs by itself, which is not asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Report {
    /// There is one.
    Made {
        /// What `tractor_host.workers()` tells of it there.
        info: serde_json::Value,
        /// Which worker of that process has it, if one does.
        parent: Option<Parent>,
    },
    /// Its boot is over.
    Started,
    /// It is over.
    Ended {
        /// How; read by `supervise` alone.
        exit: serde_json::Value,
    },
}

/// What a worker says to its supervisor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum FromWorker {
    /// The target is known and its arguments are there: the boot is over.
    Started,
    /// The target returned. Payload: the pickled value.
    Returned,
    /// The same; the value is in the file in memory that comes beside the message.
    ReturnedInMemory,
    /// It raised. Payload: the pickled exception with its causes, as `_remote` packs it.
    Raised {
        /// `Type: message`.
        summary: String,
        /// Before [`FromWorker::Started`].
        boot: bool,
        /// An extension module refused to load in an interpreter with its own GIL.
        refused: bool,
    },
    /// An extension module refused its second interpreter's own GIL; it starts again with the shared one.
    Refused,
    /// It raised `SystemExit`, which asks for this exit code.
    Exited {
        /// As a process would leave with.
        code: i32,
    },
    /// It was cancelled, and let itself be.
    Cancelled,
    /// Of a worker that lives in its process. Payload: what that ended with, if that is it.
    Lodger {
        /// Its number.
        id: u64,
        /// What there is to tell.
        news: News,
    },
    /// Of a worker that it runs by itself, by the number that it has there.
    Own {
        /// That.
        id: u64,
        /// What there is to tell.
        report: Report,
    },
    /// Of another worker, which is to be its own.
    About {
        /// The number by which it knows that one.
        id: u64,
        /// What it wants.
        wish: Wish,
    },
    /// For a debugger.
    Terminal {
        /// A number of its own for this.
        ticket: u64,
        /// It wants the program's terminal; or not any more.
        wanted: bool,
    },
}

impl FromWorker {
    /// What the target came to, in a word, if that is what it says.
    pub fn outcome(&self) -> Option<&'static str> {
        match self {
            Self::Returned | Self::ReturnedInMemory => Some("returned"),
            Self::Raised { .. } => Some("raised"),
            Self::Exited { .. } => Some("exited"),
            Self::Cancelled => Some("cancelled"),
            Self::Started
            | Self::Refused
            | Self::Lodger { .. }
            | Self::Own { .. }
            | Self::About { .. }
            | Self::Terminal { .. } => None,
        }
    }
}

/// So many values a header may have: a list of the smallest ones takes a hundred times its text when it is decoded.
pub const MAX_VALUES: usize = 1 << 16;

/// At least as many as there are values in a text that is JSON, whatever it is: each but the first stands behind one
/// of these marks.
fn values(header: &[u8]) -> usize {
    let (mut count, mut quoted, mut escaped) = (1, false, false);
    for byte in header {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b',' | b':' | b'[' | b'{' if !quoted => count += 1,
            _ => {}
        }
    }
    count
}

/// Encodes a message up to its payload, which follows as it is.
///
/// # Errors
/// When it is too long for a frame, or has too many values.
pub fn encode(message: &impl Serialize, payload_length: usize) -> Result<Vec<u8>> {
    let header = serde_json::to_vec(message)
        .map_err(|error| Error::invalid(format!("a message that is no JSON: {error}")))?;
    if values(&header) > MAX_VALUES {
        return Err(Error::invalid(format!("a message of more than {MAX_VALUES} values")));
    }
    encode_head(&header, payload_length)
}

/// Decodes a frame; `what` names the expected message for the error's text.
///
/// # Errors
/// When the header is no such message.
pub fn decode<M: DeserializeOwned>(frame: &Frame, what: &str) -> Result<M> {
    // Before anything is made of it.
    if values(&frame.header) > MAX_VALUES {
        return Err(Error::protocol(format!("expected {what}, got one of more than {MAX_VALUES} values")));
    }
    serde_json::from_slice(&frame.header).map_err(|error| {
        let shown = String::from_utf8_lossy(&frame.header[..frame.header.len().min(80)]).into_owned();
        Error::protocol(format!("expected {what}, got {shown:?}: {error}"))
    })
}
