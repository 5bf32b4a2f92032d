//! A worker process that is started afresh: nothing of the host's memory comes along.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use super::request::bytes;
use crate::error::{Error, Result};
use crate::sys::process::Child;

/// Starts `command` in this environment (this process's where there is none), with the channel as its fd 0
/// and stderr into the boot log. To be called from a thread that never ends: the
/// child's death signal follows it.
///
/// # Errors
/// The operating system's: no such program, EAGAIN at the process limit, EMFILE.
pub fn spawn(
    command: &[String],
    env: Option<&[(String, String)]>,
    channel: OwnedFd,
    stdout: OwnedFd,
    boot_log: OwnedFd,
) -> Result<Child> {
    let text = |text: &String| bytes("the command", text).map(OsString::from_vec);
    let mut words = command.iter().map(text);
    let program = words.next().ok_or_else(|| Error::invalid("an empty command"))??;
    let mut command = Command::new(&program);
    for word in words {
        command.arg(word?);
    }
    if let Some(pairs) = env {
        command.env_clear();
        for (key, value) in pairs {
            let (key, value) = (bytes("env", key)?, bytes("env", value)?);
            command.env(OsString::from_vec(key), OsString::from_vec(value));
        }
    }
    command.stdin(Stdio::from(channel)).stdout(Stdio::from(stdout)).stderr(Stdio::from(boot_log));
    let child = command
        .process_group(0)
        .spawn()
        .map_err(|error| Error::os(format_args!("start `{}`", program.display()), error))?;
    Child::adopt(i32::try_from(child.id()).unwrap_or(0))
}
