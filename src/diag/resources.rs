//! A snapshot of what can leak: fds, threads, children, memory.

use serde::Serialize;

use crate::error::Result;
use crate::sys::procfs;

/// What this process owned at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Open fds.
    pub fds: Vec<i32>,
    /// The names of its threads.
    pub threads: Vec<String>,
    /// Its direct children, zombies included.
    pub children: Vec<i32>,
    /// Resident memory in bytes.
    pub resident: u64,
}

impl Snapshot {
    /// Looks.
    ///
    /// # Errors
    /// When /proc is not mounted.
    pub fn take() -> Result<Self> {
        let mut threads = procfs::thread_names()?;
        threads.sort();
        Ok(Self {
            fds: procfs::open_fds()?.into_iter().filter(|fd| procfs::is_open(*fd)).collect(),
            threads,
            children: procfs::children()?,
            resident: procfs::resident_bytes()?,
        })
    }
}
