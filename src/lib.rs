//! tractor-host: spawn Python workers that you can always kill.
//!
//! The rooms, from the floor up; an import may point down this list only:
//!
//! - [`sys`]: the operating system (fds, pidfds, futex events, /proc). Knows nothing of Python.
//! - [`events`]: what happens, as structured events: the ring, the log, the timeline.
//! - [`ffi`]: the C-API that pyo3-ffi lacks, CPython's private offsets, the raw extension module.
//! - [`interp`]: starting, attaching to, interrupting and ending interpreters; forking with one.
//! - [`wire`]: the messages between a supervisor and a worker, as bytes.
//! - [`spawn`]: how a worker comes to be, one file a backend, and its first steps.
//! - [`supervise`]: the registry, the kill ladder and the one thread that decides.
//! - [`diag`]: what a process owns just now (fds, threads, children).
//! - [`py`]: the functions of `tractor_host._native`.
//! - [`cli`]: the launcher's command line.

pub mod cli;
pub mod diag;
pub mod error;
pub mod events;
pub mod ffi;
pub mod interp;
pub mod py;
pub mod spawn;
pub mod supervise;
pub mod sys;
pub mod wire;

pub use error::{Error, Result};
