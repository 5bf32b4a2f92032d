//! The zygote's side: it waits for orders and forks.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::event::{PollFd, PollFlags};
use rustix::thread::Timespec;

use super::inbox::{Inbox, Message};
use crate::error::{Error, Result};
use crate::events::fault;
use crate::interp::attach::Token;
use crate::interp::call;
use crate::interp::fork::fork_sibling;
use crate::interp::subinterp::Gil;
use crate::interp::template::Template;
use crate::spawn::context;
use crate::spawn::fork::BOOT_FAILED;
use crate::spawn::request::path_of;
use crate::sys::lock::lock;
use crate::sys::{fd, process, procfs, signal, thread};
use crate::wire::message::{self, FromZygote, PreloadFailure, ToZygote};

/// The zygote's end of its socket, from its first steps until it serves.
static SOCKET: Mutex<Option<OwnedFd>> = Mutex::new(None);
/// What it was told to import, and what of that failed in the interpreter that was prepared last.
static ORDER: Mutex<(serde_json::Value, Vec<PreloadFailure>)> =
    Mutex::new((serde_json::Value::Null, Vec::new()));

/// The pid of the host.
static HOST: AtomicI32 = AtomicI32::new(0);

/// Keeps for [`serve`] what it needs: the socket, what `_zygote` is told, and the host's pid.
pub fn keep(socket: OwnedFd, order: serde_json::Value, host: i32) {
    *lock(&SOCKET) = Some(socket);
    lock(&ORDER).0 = order;
    HOST.store(host, Ordering::Relaxed);
}

/// What `_zygote` is told; null in a process that is no zygote.
pub fn order() -> serde_json::Value {
    lock(&ORDER).0.clone()
}

/// The calling interpreter has imported what it was told to, but for this.
pub fn prepared(failures: Vec<PreloadFailure>) {
    lock(&ORDER).1 = failures;
}

/// Says what could not be preloaded, then forks on order, for as long as the host is there. It returns
/// in children only, which are blanks from then on.
///
/// # Errors
/// When this process is no zygote, or the host breaks the protocol; EMFILE.
pub fn serve(token: Token<'_>) -> Result<()> {
    let socket = lock(&SOCKET).take().ok_or_else(|| Error::state("this process is no fork server"))?;
    // Its end is that of the socket; a child unblocks what it needs.
    signal::block_all();
    let tomb = fd::tomb()?;
    let mut inbox = Inbox::default();
    let mut templates: Vec<Template> = Vec::new();
    let mut threads = procfs::thread_names().unwrap_or_default();
    if threads.len() == 1 {
        threads.clear();
    }
    say(&socket, &FromZygote::Ready { failures: take_failures(), threads }, None)?;
    loop {
        let Some((frame, fds)) = next(&socket, &mut inbox)? else { process::exit_now(0) };
        let interpreter = match message::decode(&frame, "an order to fork")? {
            ToZygote::Hurry => continue,
            ToZygote::Fork { interpreter, at_leisure } => {
                if at_leisure {
                    wait_for_more(&socket, &inbox);
                }
                interpreter
            }
        };
        let forked = match interpreter {
            None => fork_sibling(token, None),
            Some(gil) => {
                template(token, &mut templates, gil).and_then(|template| fork_sibling(token, Some(template)))
            }
        };
        let (reply, pidfd) = match forked {
            Ok(None) => {
                drop(socket);
                become_blank(fds, tomb);
                return Ok(());
            }
            Ok(Some((pid, pidfd))) => (FromZygote::Forked { pid, failures: take_failures() }, Some(pidfd)),
            Err(error) => match error.raw_os_error() {
                Some(errno) => (FromZygote::Failed { errno }, None),
                None => (FromZygote::Refused { reason: error.to_string() }, None),
            },
        };
        say(&socket, &reply, pidfd.as_ref())?;
    }
}

/// The interpreter that children with such a GIL adopt. It is made when the first of them is asked for.
fn template(token: Token<'_>, templates: &mut Vec<Template>, gil: Gil) -> Result<Template> {
    if let Some(&found) = templates.iter().find(|template| template.gil() == gil) {
        return Ok(found);
    }
    let path = path_of(&order()["spec"])?;
    let made = Template::make(token, gil, |token| {
        call::set_sys_path(token, &path)?;
        call::function(token, c"tractor_host._zygote", c"prepare_apart")
    })?;
    templates.push(made);
    Ok(made)
}

fn take_failures() -> Vec<PreloadFailure> {
    std::mem::take(&mut lock(&ORDER).1)
}

/// In the child: only what it was given is left open, and all is done that can be without a task.
fn become_blank(fds: Vec<OwnedFd>, tomb: OwnedFd) {
    let host = HOST.load(Ordering::Relaxed);
    crate::events::forget_in_child();
    process::die_with_parent(host);
    thread::set_name(super::BLANK_NAME);
    let outcome = (|| {
        let Ok([channel, boot_log]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err(Error::protocol("other than two descriptors came with an order to fork"));
        };
        fd::place(boot_log.as_fd(), 2)?;
        // What modules that were preloaded hold open.
        let keep: Vec<RawFd> = [&channel, &boot_log, &tomb].map(AsRawFd::as_raw_fd).to_vec();
        fd::neutralise_inherited(tomb.as_fd(), &keep)?;
        drop((boot_log, tomb));
        context::become_blank(channel, host)
    })();
    if let Err(error) = outcome {
        fault!("worker {} failed before it could say so: {error}", process::id());
        process::exit_now(BOOT_FAILED);
    }
}

fn say(socket: &OwnedFd, message: &FromZygote, pidfd: Option<&OwnedFd>) -> Result<()> {
    let bytes = message::encode(message, 0)?;
    let fds: Vec<_> = pidfd.into_iter().map(AsFd::as_fd).collect();
    fd::write_all_with_fds(socket, &bytes, &fds).map_err(|error| Error::os("answer the host", error))
}

/// How long it waits with what nobody waits for: a worker that was just given its task needs the processors more.
const LEISURE: Timespec = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };

/// Waits for leisure, or until the host has something to say.
fn wait_for_more(socket: &OwnedFd, inbox: &Inbox) {
    if !inbox.is_empty() {
        return;
    }
    let mut readable = [PollFd::new(socket, PollFlags::IN)];
    // Whatever it says, or fails with: what was ordered is made now.
    let _ = rustix::event::poll(&mut readable, Some(&LEISURE));
}

/// The next order and what came beside it; `None` when the host is gone.
fn next(socket: &OwnedFd, inbox: &mut Inbox) -> Result<Option<Message>> {
    loop {
        if let Some(message) = inbox.next_message()? {
            return Ok(Some(message));
        }
        match inbox.read(socket) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(Error::os("read an order", error)),
        }
    }
}
