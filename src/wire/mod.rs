//! What a supervisor and its worker process say to each other, and what a tool and a host do: messages as values,
//! frames as bytes. Knows no fds and no Python.

pub mod control;
pub mod frame;
pub mod message;
