//! What a supervisor and its worker process say to each other: messages as values, frames as bytes.
//! Knows no fds and no Python.

pub mod frame;
pub mod message;
