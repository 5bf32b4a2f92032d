//! Opening what a worker's stdout and stderr are, before there is a worker.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use rustix::fs::OFlags;

use super::request::{Stdio, bytes};
use crate::error::{Error, Result};
use crate::sys::{fd, memfile};
use crate::wire::message::Role;

/// A worker's output streams.
#[derive(Debug)]
pub struct Streams {
    /// fd 1 of the worker.
    pub stdout: OwnedFd,
    /// fd 2 of the worker, once it has booted.
    pub stderr: OwnedFd,
    /// The host's view of what is collected: stdout and stderr.
    pub collected: Option<(OwnedFd, OwnedFd)>,
}

impl Streams {
    /// Opens them. `None` where the worker takes over the host's.
    ///
    /// # Errors
    /// The operating system's; the file's path is in the message.
    pub fn open(policy: &Stdio) -> Result<Option<Self>> {
        let (stdout, collected) = match policy {
            Stdio::Inherit => return Ok(None),
            Stdio::Null => (fd::open("/dev/null".as_ref(), OFlags::WRONLY)?, None),
            Stdio::Path(path) => {
                let path =
                    std::path::PathBuf::from(std::ffi::OsString::from_vec(bytes("the stdio path", path)?));
                (fd::open(&path, OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND)?, None)
            }
            Stdio::Pipe => {
                let stdout = memfile::create("th-stdout")?;
                let stderr = memfile::create("th-stderr")?;
                let ours = (fd::duplicate(&stdout)?, fd::duplicate(&stderr)?);
                return Ok(Some(Self { stdout, stderr, collected: Some(ours) }));
            }
        };
        let stderr = fd::duplicate(stdout.as_fd())?;
        Ok(Some(Self { stdout, stderr, collected }))
    }

    /// Those that another process has opened.
    ///
    /// # Errors
    /// A protocol error, when there are none.
    pub fn of_another(fds: Vec<(Role, OwnedFd)>) -> Result<Self> {
        let (mut stdout, mut stderr) = (None, None);
        for (role, fd) in fds {
            match role {
                Role::Stdout => stdout = Some(fd),
                Role::Stderr => stderr = Some(fd),
                _ => {}
            }
        }
        match (stdout, stderr) {
            (Some(stdout), Some(stderr)) => Ok(Self { stdout, stderr, collected: None }),
            _ => Err(Error::protocol("a worker is to start without its output")),
        }
    }
}
