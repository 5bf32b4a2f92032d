//! The only room that speaks to the operating system. It knows nothing of Python or of workers.
//!
//! Most of it is rustix; what rustix has no safe form of (fork's child side, signal dispositions,
//! `_exit`) is wrapped here once.
#![allow(unsafe_code)] // the syscalls that rustix has no safe wrapper for

pub mod clock;
pub mod cpu;
pub mod event;
pub mod fd;
pub mod fork_local;
pub mod kick;
pub mod ledger;
pub mod lent;
pub mod lock;
pub mod look;
pub mod memfile;
pub mod memory;
pub mod oom;
pub mod presses;
pub mod process;
pub mod procfs;
pub mod ready;
pub mod runtime_folder;
pub mod signal;
pub mod terminal;
pub mod thread;
pub mod tree;
pub mod unix_socket;
pub mod words;
