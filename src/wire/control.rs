//! What a tool says to a host over its control socket, and what that answers: one request a connection. The answer's
//! payload is a JSON document.

use serde::{Deserialize, Serialize};

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// The tree of workers, with what is known of each.
    Status,
    /// What of a dump can't be read from outside.
    Dump,
    /// What has happened lately.
    Events,
}

/// The answer's header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// The payload is what was asked for.
    Answer,
    /// There is no payload.
    Refused {
        /// Why.
        reason: String,
    },
}

/// The longest request, as a frame. A host reads no more than that.
pub const MAX_REQUEST: usize = 1 << 12;
