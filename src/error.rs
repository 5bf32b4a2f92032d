//! The one public error type: opaque, with predicates. Knows nothing of Python; `py::errors` maps it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What went wrong, in words for a person, with predicates for a program.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose fault it was, which is what a caller acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// The caller passed something that can never work.
    Invalid,
    /// There is no such worker (any more).
    NotFound,
    /// Not in this state: after shutdown, in a foreign fork, inside a worker that is ending.
    State,
    /// Not on this Python, kernel or machine.
    Unsupported,
    /// The operating system said no; the number is the errno.
    Os(i32),
    /// A bound ran out.
    TimedOut,
    /// A signal arrived while waiting; look at it, then wait again.
    Interrupted,
    /// The other side broke the wire protocol.
    Protocol,
    /// The interpreter could not do what it must be able to do.
    Python,
}

impl Error {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    pub(crate) fn state(message: impl Into<String>) -> Self {
        Self::new(Kind::State, message)
    }

    pub(crate) fn protocol(message: impl Into<String>) -> Self {
        Self::new(Kind::Protocol, message)
    }

    pub(crate) fn python(message: impl Into<String>) -> Self {
        Self::new(Kind::Python, message)
    }

    pub(crate) fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, message)
    }

    pub(crate) fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted by a signal")
    }

    pub(crate) fn timed_out(message: impl Into<String>) -> Self {
        Self::new(Kind::TimedOut, message)
    }

    /// An error of the operating system, with what was tried.
    pub(crate) fn os(doing: impl fmt::Display, source: impl Into<std::io::Error>) -> Self {
        let source = source.into();
        Self {
            kind: Kind::Os(source.raw_os_error().unwrap_or(0)),
            message: format!("failed to {doing}"),
            source: Some(Box::new(source)),
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The caller passed something that can never work.
    pub fn is_invalid_input(&self) -> bool {
        self.kind == Kind::Invalid
    }

    /// A signal arrived while waiting: the call can be made again.
    pub fn is_interrupted(&self) -> bool {
        self.kind == Kind::Interrupted
    }

    /// The other side broke the wire protocol.
    pub fn is_protocol(&self) -> bool {
        self.kind == Kind::Protocol
    }

    /// The errno, where the operating system refused.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self.kind {
            Kind::Os(errno) => Some(errno),
            _ => None,
        }
    }
}

/// An error that is told to another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relayed {
    kind: Kind,
    message: String,
}

impl From<Error> for Relayed {
    fn from(error: Error) -> Self {
        Self { kind: error.kind, message: error.to_string() }
    }
}

impl From<Relayed> for Error {
    fn from(told: Relayed) -> Self {
        Self::new(told.kind, told.message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
