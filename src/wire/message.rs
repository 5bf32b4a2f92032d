//! The closed set of messages in each direction.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::frame::{Frame, encode_head};
use crate::error::{Error, Result};
use crate::interp::rungs::Force;
use crate::interp::subinterp::Gil;

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
}

/// What a descriptor is for that a worker is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
    },
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

/// What a worker says to its supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
}

/// Encodes a message up to its payload, which follows as it is.
///
/// # Errors
/// When it is too long for a frame.
pub fn encode(message: &impl Serialize, payload_length: usize) -> Result<Vec<u8>> {
    let header = serde_json::to_vec(message)
        .map_err(|error| Error::invalid(format!("a message that is no JSON: {error}")))?;
    encode_head(&header, payload_length)
}

/// Decodes a frame; `what` names the expected message for the error's text.
///
/// # Errors
/// When the header is no such message.
pub fn decode<M: DeserializeOwned>(frame: &Frame, what: &str) -> Result<M> {
    serde_json::from_slice(&frame.header).map_err(|error| {
        let shown = String::from_utf8_lossy(&frame.header[..frame.header.len().min(80)]).into_owned();
        Error::protocol(format!("expected {what}, got {shown:?}: {error}"))
    })
}
