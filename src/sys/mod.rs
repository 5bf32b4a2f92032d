//! The only room that speaks to the operating system. It knows nothing of Python or of workers.
//!
//! Most of it is rustix; what rustix has no safe form of (fork's child side, signal dispositions,
//! `_exit`) is wrapped here once.
#![allow(unsafe_code)] // the syscalls that rustix has no safe wrapper for

pub mod event;
pub mod fd;
pub mod fork_local;
pub mod kick;
pub mod lock;
pub mod log;
pub mod memfile;
pub mod memory;
pub mod oom;
pub mod process;
pub mod procfs;
pub mod signal;
pub mod thread;
pub mod tree;
