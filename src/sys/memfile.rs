//! Files in memory: where a worker's collected output and its last words go.
//!
//! Not pipes: nobody has to read a file for its writer to go on, and a grandchild that keeps it open
//! keeps nobody waiting.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// An append-only file in memory. `name` shows in /proc/PID/fd.
///
/// # Errors
/// The operating system's (EMFILE, ENOMEM).
pub fn create(name: &str) -> Result<OwnedFd> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)
        .map_err(|errno| Error::os("make a file in memory", errno))?;
    rustix::fs::fcntl_setfl(&file, OFlags::APPEND)
        .map_err(|errno| Error::os("make a file in memory append-only", errno))?;
    Ok(file)
}

/// The last `limit` bytes of a file, whatever its read position is.
///
/// # Errors
/// The operating system's.
pub fn tail(file: impl AsFd, limit: usize) -> Result<Vec<u8>> {
    let failed = |errno: Errno| Error::os("read a file in memory", errno);
    let size = rustix::fs::fstat(&file).map_err(failed)?.st_size as u64;
    let mut offset = size.saturating_sub(limit as u64);
    let mut bytes = Vec::new();
    let mut chunk = vec![0; limit.min((size - offset) as usize).min(1 << 16)];
    while offset < size {
        let want = chunk.len().min((size - offset) as usize);
        match rustix::io::pread(&file, &mut chunk[..want], offset) {
            Ok(0) => break, // truncated meanwhile
            Ok(count) => {
                bytes.extend_from_slice(&chunk[..count]);
                offset += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    Ok(bytes)
}
