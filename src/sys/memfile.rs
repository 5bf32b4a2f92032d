//! Files in memory: where a worker's collected output and its last words go, and what is large and goes
//! from one interpreter to another.
//!
//! Not pipes: nobody has to read a file for its writer to go on, and a grandchild that keeps it open
//! keeps nobody waiting. The last holder of a descriptor or of a mapping frees it, however that ends.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, OFlags, SealFlags};
use rustix::io::Errno;

use super::fd::above_stdio;
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
    above_stdio(file)
}

/// A file in memory that can be sealed once it has been written.
///
/// # Errors
/// The operating system's (EMFILE, ENOMEM; EACCES or ENOSYS where there are no such files).
pub fn sealable(name: &str) -> Result<OwnedFd> {
    rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(|errno| Error::os("make a file in memory", errno))
}

/// What does not change any more, for anybody who holds or maps a file in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seals {
    /// Neither its size nor what is in it.
    Everything,
    /// Its size. Its owner writes to it again when whoever it was lent to has given it back.
    Size,
}

impl Seals {
    fn flags(self) -> SealFlags {
        let size = SealFlags::SHRINK.union(SealFlags::GROW);
        match self {
            Self::Everything => size.union(SealFlags::WRITE),
            Self::Size => size,
        }
    }
}

/// Seals a file of [`sealable`], for ever.
///
/// # Errors
/// EBUSY while somebody has it mapped for writing, which is not to change.
pub fn seal(file: impl AsFd, seals: Seals) -> Result<()> {
    rustix::fs::fcntl_add_seals(file, seals.flags() | SealFlags::SEAL)
        .map_err(|errno| Error::os("seal a file in memory", errno))
}

/// Refuses what is no file in memory with these seals. Whoever maps another one can be crashed by who made it:
/// what is mapped beyond the end of a file is a SIGBUS.
///
/// # Errors
/// A breach of the protocol.
pub fn check_sealed(file: impl AsFd, seals: Seals) -> Result<()> {
    match rustix::fs::fcntl_get_seals(file) {
        Ok(found) if found.contains(seals.flags()) => Ok(()),
        Ok(found) => {
            Err(Error::protocol(format!("a file in memory with the seals {:#x} only", found.bits())))
        }
        Err(errno) => Err(Error::protocol(format!("a descriptor that is no file in memory ({errno})"))),
    }
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
