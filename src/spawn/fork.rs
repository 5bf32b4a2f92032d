//! A worker forked from this process by the clean thread.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use super::clean::{Body, CleanThread, Never};
use super::context::{self, Reader};
use super::stdio::Streams;
use crate::error::Result;
use crate::interp::attach::Token;
use crate::interp::call;
use crate::sys::process::Child;
use crate::sys::{fd, log, process, signal};
use crate::wire::message::Contract;

/// What a forked worker takes with it. All of it belongs to the child alone: nothing in here is
/// shared with, or locked by, a thread that the child does not have.
pub struct Luggage {
    /// The contract.
    pub contract: Contract,
    /// For `_child`.
    pub spec: serde_json::Value,
    /// The pickled target and arguments.
    pub payload: Arc<Vec<u8>>,
    /// The worker's end of the channel.
    pub channel: OwnedFd,
    /// Its output; `None` for the host's.
    pub streams: Option<Streams>,
    /// Where stderr goes until the boot is over.
    pub boot_log: OwnedFd,
    /// The working directory; `None` for the host's.
    pub cwd: Option<std::path::PathBuf>,
}

/// Forks the worker, waiting for the clean thread until `deadline`.
///
/// # Errors
/// Those of [`CleanThread::fork`].
pub fn spawn(clean: &CleanThread, luggage: Luggage, deadline: Instant) -> Result<Child> {
    let body: Body = Box::new(move |token| child(token, luggage));
    clean.fork(body, deadline)
}

/// All that the child does. It ends in `_exit`, so no destructor of the parent's values runs.
fn child(token: Token<'_>, luggage: Luggage) -> Never {
    // First of all: nothing that other threads of the parent may have locked is touched again.
    crate::spawn::context::forget_all();
    crate::supervise::forget_in_child();
    signal::reset_for_new_process();
    let outcome = enter(luggage).and_then(|()| call::function(token, c"tractor_host._child", c"main"));
    if let Err(error) = outcome {
        log::line(format_args!("worker {} failed before it could say so: {error}", process::id()));
    }
    // `main` leaves by itself; to come here is a failure.
    process::exit_now(BOOT_FAILED)
}

/// The exit code of a worker that failed where it could not tell its supervisor why.
pub const BOOT_FAILED: i32 = 0x70;

fn enter(luggage: Luggage) -> Result<()> {
    let Luggage { contract, spec, payload, channel, streams, boot_log, cwd } = luggage;
    let stderr = match streams {
        None => fd::duplicate(rustix::stdio::stderr()).or_else(|_| {
            // The host has closed its stderr.
            fd::open("/dev/null".as_ref(), rustix::fs::OFlags::WRONLY)
        })?,
        Some(streams) => {
            fd::place(streams.stdout.as_fd(), 1)?;
            streams.stderr
        }
    };
    fd::place(boot_log.as_fd(), 2)?;
    let null = fd::open("/dev/null".as_ref(), rustix::fs::OFlags::RDWR)?;
    fd::place(null.as_fd(), 0)?;
    let reading = fd::duplicate(&channel)?;
    fd::neutralise_inherited(&[channel.as_raw_fd(), reading.as_raw_fd(), stderr.as_raw_fd()])?;
    if let Some(cwd) = cwd {
        std::env::set_current_dir(&cwd).map_err(|error| {
            crate::Error::os(format_args!("change to the directory `{}`", cwd.display()), error)
        })?;
    }
    // Closed numbers would be reused; what the parent's fds were stays a placeholder.
    std::mem::forget((null, boot_log));
    context::enter_process(&contract, spec, payload, channel, stderr, Reader::new(reading))
}
