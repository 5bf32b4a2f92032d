//! A worker forked from this process by the clean thread.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Instant;

use super::clean::{Body, CleanThread, Gate, Never, Settle};
use super::context::{self, Reader};
use super::parcel::Parcel;
use crate::error::Result;
use crate::events::fault;
use crate::interp::attach::Token;
use crate::interp::call;
use crate::sys::process::Child;
use crate::sys::{fd, process, signal};
use crate::wire::message::Contract;

/// What a forked worker takes with it. All of it belongs to the child alone: nothing in here is
/// shared with, or locked by, a thread that the child does not have.
pub struct Luggage {
    /// The contract.
    pub contract: Contract,
    /// For `_child`.
    pub spec: serde_json::Value,
    /// The pickled target and arguments.
    pub parcel: Parcel,
    /// The worker's end of the channel.
    pub channel: OwnedFd,
    /// The same once more, for its reader.
    pub reading: OwnedFd,
    /// stdout; `None` for the host's.
    pub stdout: Option<OwnedFd>,
    /// stderr once the boot is over.
    pub stderr: OwnedFd,
    /// Where stderr goes until then.
    pub boot_log: OwnedFd,
    /// /dev/null, its stdin.
    pub null: OwnedFd,
    /// What takes the place of all that it inherits.
    pub tomb: OwnedFd,
    /// The working directory; `None` for the host's.
    pub cwd: Option<std::path::PathBuf>,
}

/// Forks the worker, waiting for the clean thread until `deadline`; it runs nothing before it is settled.
///
/// # Errors
/// Those of [`CleanThread::fork`].
pub fn spawn(clean: &CleanThread, luggage: Luggage, settle: Settle, deadline: Instant) -> Result<Child> {
    let body: Body = Box::new(move |token, gate| child(token, luggage, gate));
    clean.fork(body, settle, deadline)
}

/// All that the child does. It ends in `_exit`, so no destructor of the parent's values runs.
fn child(token: Token<'_>, luggage: Luggage, gate: Gate) -> Never {
    // First of all: nothing that other threads of the parent may have locked is touched again.
    crate::spawn::context::forget_all();
    crate::supervise::forget_in_child();
    signal::reset_for_new_process();
    process::die_with_parent(luggage.contract.parent);
    gate.pass();
    let outcome = enter(luggage).and_then(|()| call::function(token, c"tractor_host._child", c"main"));
    if let Err(error) = outcome {
        fault!("worker {} failed before it could say so: {error}", process::id());
    }
    // `main` leaves by itself; to come here is a failure.
    process::exit_now(BOOT_FAILED)
}

/// The exit code of a worker that failed where it could not tell its supervisor why.
pub const BOOT_FAILED: i32 = 0x70;

/// All fds were made by the parent, where a want of them is the caller's error; so none is made here
/// before some have been given back.
fn enter(luggage: Luggage) -> Result<()> {
    let Luggage { contract, spec, parcel, channel, reading, stdout, stderr, boot_log, null, tomb, cwd } =
        luggage;
    fd::place(boot_log.as_fd(), 2)?;
    fd::place(null.as_fd(), 0)?;
    match &stdout {
        Some(stdout) => fd::place(stdout.as_fd(), 1)?,
        None if fd::is_inheritable(rustix::stdio::stdout()) => {}
        None => fd::place(null.as_fd(), 1)?,
    }
    // No Python object has ever known these numbers: they can be used again.
    drop((boot_log, null));
    let mut keep: Vec<RawFd> = [&channel, &reading, &stderr, &tomb].map(AsRawFd::as_raw_fd).into();
    let (_, _, carried) = parcel.contents()?;
    keep.extend(carried.iter().map(|fd| fd.as_raw_fd()));
    fd::neutralise_inherited(tomb.as_fd(), &keep)?;
    drop(tomb);
    if let Some(cwd) = cwd {
        std::env::set_current_dir(&cwd).map_err(|error| {
            crate::Error::os(format_args!("change to the directory `{}`", cwd.display()), error)
        })?;
    }
    context::enter_fork(&contract, spec, parcel, channel, stderr, Reader::new(reading))
}
