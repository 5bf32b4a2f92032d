//! The worker's side: who the calling interpreter's worker is, and how it talks to its supervisor.
//!
//! A process worker is its main interpreter (id 0) and talks over a socket; a subinterpreter worker
//! is found by its interpreter's id and talks to the supervisor in the same process.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::Reports;
use crate::error::{Error, Result};
use crate::interp::door::Door;
use crate::sys::fork_local::ForkLocal;
use crate::sys::lock::lock;
use crate::sys::{fd, process, thread, tree};
use crate::wire::frame::{Decoder, Frame};
use crate::wire::message::{self, Contract, FromWorker, ToWorker};

static CONTEXTS: ForkLocal<Mutex<HashMap<i64, Arc<Context>>>> = ForkLocal::new();

/// One worker, seen from inside.
pub struct Context {
    spec: serde_json::Value,
    payload: Mutex<Option<Arc<Vec<u8>>>>,
    link: Link,
}

enum Link {
    Process(ProcessLink),
    Thread(ThreadLink),
}

struct ProcessLink {
    channel: OwnedFd,
    /// Held while a frame is written, so that frames of two threads don't mix.
    sending: Mutex<()>,
    /// What becomes fd 2 once the boot is over.
    stderr: Mutex<Option<OwnedFd>>,
}

struct ThreadLink {
    reports: Arc<dyn Reports>,
    stdio: Option<[RawFd; 2]>,
    refused: Mutex<bool>,
    fall_back: bool,
}

/// The worker that the interpreter is.
///
/// # Errors
/// When it is none.
pub fn current(interpreter: i64) -> Result<Arc<Context>> {
    let found = match CONTEXTS.get()? {
        Some(contexts) => lock(contexts).get(&interpreter).cloned(),
        None => None,
    };
    found.ok_or_else(|| Error::state("this interpreter is not a worker of tractor_host"))
}

fn install(interpreter: i64, context: Arc<Context>) -> Result<()> {
    lock(CONTEXTS.get_or_make(|| Ok(Mutex::default()))?).insert(interpreter, context);
    Ok(())
}

/// In the only thread of a fork's child: forgets whose worker the parent was.
pub fn forget_all() {
    CONTEXTS.forget();
}

impl Context {
    /// What `_child` was asked to do.
    pub fn spec(&self) -> serde_json::Value {
        self.spec.clone()
    }

    /// The pickled target and arguments, once.
    ///
    /// # Errors
    /// When it has been taken.
    pub fn take_payload(&self) -> Result<Arc<Vec<u8>>> {
        lock(&self.payload)
            .take()
            .ok_or_else(|| Error::state("the worker's arguments have been taken already"))
    }

    /// The fds of stdout and stderr; they belong to the runner and outlive the interpreter. `None` where
    /// the worker writes to the process's.
    pub fn stdio(&self) -> Option<[RawFd; 2]> {
        match &self.link {
            Link::Process(_) => None,
            Link::Thread(link) => link.stdio,
        }
    }

    /// Says something to the supervisor. A process waits until all of it is written.
    ///
    /// # Errors
    /// EPIPE when the supervisor is gone; a message that is too long.
    pub fn send(&self, message: &FromWorker, payload: &[u8]) -> Result<()> {
        match &self.link {
            Link::Process(link) => {
                if *message == FromWorker::Started {
                    link.end_of_boot()?;
                }
                let head = message::encode(message, payload.len())?;
                let _sending = lock(&link.sending);
                fd::write_all(&link.channel, &head)
                    .and_then(|()| fd::write_all(&link.channel, payload))
                    .map_err(|error| Error::os("send to the supervisor", error))
            }
            Link::Thread(link) => {
                if link.fall_back && matches!(message, FromWorker::Raised { refused: true, .. }) {
                    *lock(&link.refused) = true;
                    return Ok(());
                }
                link.reports.message(message.clone(), Arc::new(payload.to_vec()));
                Ok(())
            }
        }
    }
}

impl ProcessLink {
    /// From now on stderr is the user's, no longer the supervisor's record of the boot.
    fn end_of_boot(&self) -> Result<()> {
        match lock(&self.stderr).take() {
            None => Ok(()),
            Some(stderr) => {
                // What the boot wrote (warnings, mostly) is passed on now.
                let written = crate::sys::memfile::tail(rustix::stdio::stderr(), 1 << 20).unwrap_or_default();
                fd::place(stderr.as_fd(), 2)?;
                let mut rest = &written[..];
                while let Ok(count @ 1..) = rustix::io::write(rustix::stdio::stderr(), rest) {
                    rest = &rest[count..];
                }
                Ok(())
            }
        }
    }
}

/// A subinterpreter's part of the work of [`super::subint`].
pub(super) struct ThreadWorker {
    pub(super) spec: serde_json::Value,
    pub(super) payload: Arc<Vec<u8>>,
    pub(super) stdio: Option<[RawFd; 2]>,
    pub(super) reports: Arc<dyn Reports>,
    pub(super) fall_back: bool,
}

impl ThreadWorker {
    pub(super) fn enter(self, interpreter: i64) -> Result<()> {
        let link = ThreadLink {
            reports: self.reports,
            stdio: self.stdio,
            refused: Mutex::new(false),
            fall_back: self.fall_back,
        };
        let payload = Mutex::new(Some(self.payload));
        install(interpreter, Arc::new(Context { spec: self.spec, payload, link: Link::Thread(link) }))
    }
}

/// Forgets a subinterpreter's worker. Whether it must be started again with the shared GIL.
pub(super) fn leave(interpreter: i64) -> bool {
    let Ok(Some(contexts)) = CONTEXTS.get() else { return false };
    let context = lock(contexts).remove(&interpreter);
    context.is_some_and(|context| match &context.link {
        Link::Process(_) => false,
        Link::Thread(link) => *lock(&link.refused),
    })
}

/// The first steps of a process that was started with a supervisor's channel as fd 0: reads what to be,
/// and keeps the promises of the contract. What `_zygote` needs, if it is to be that, else a worker.
///
/// # Errors
/// When fd 0 is not a supervisor's channel.
pub fn enter_fresh() -> Result<Option<serde_json::Value>> {
    let channel = fd::adopt_inherited(0)?;
    let null = fd::open("/dev/null".as_ref(), rustix::fs::OFlags::RDWR)?;
    fd::place(null.as_fd(), 0)?;
    let (first, fds) = fd::receive_with_fds(&channel).map_err(|error| {
        Error::os("read from the supervisor; --child is for tractor-host's own use", error)
    })?;
    let mut reader = Reader::new(fd::duplicate(&channel)?);
    reader.decoder.push(&first);
    let frame = reader.next()?.ok_or_else(|| Error::protocol("the supervisor closed the channel"))?;
    crate::sys::signal::stop_ignoring();
    crate::sys::signal::unblock_all();
    match message::decode(&frame, "what to be")? {
        ToWorker::Spec { spec, contract } => {
            let stderr =
                fds.into_iter().next().ok_or_else(|| Error::protocol("the supervisor sent no stderr"))?;
            enter_process(&contract, spec, frame.payload.into(), channel, stderr, reader)?;
            Ok(None)
        }
        ToWorker::Template { spec, preload, contract } => {
            keep(&contract)?;
            super::zygote::serve::keep_socket(channel);
            Ok(Some(serde_json::json!({ "spec": spec, "preload": preload })))
        }
        ToWorker::Cancel => Err(Error::protocol("told to stop before to begin")),
    }
}

/// Keeps the promises of the contract.
fn keep(contract: &Contract) -> Result<()> {
    process::die_with_parent(contract.parent);
    process::lead_own_group()?;
    thread::set_name(&contract.name);
    if let Some(mask) = contract.umask {
        process::set_umask(mask);
    }
    Ok(())
}

/// The first steps that every worker process has in common.
pub(super) fn enter_process(
    contract: &Contract,
    spec: serde_json::Value,
    payload: Arc<Vec<u8>>,
    channel: OwnedFd,
    stderr: OwnedFd,
    reader: Reader,
) -> Result<()> {
    keep(contract)?;
    process::be_subreaper()?;
    let parent = process::parent_fd(contract.parent)?;
    let link = ProcessLink { channel, sending: Mutex::new(()), stderr: Mutex::new(Some(stderr)) };
    let payload = Mutex::new(Some(payload));
    install(0, Arc::new(Context { spec, payload, link: Link::Process(link) }))?;
    let door = Arc::new(Door::to_main());
    thread::spawn_deaf("th-channel", move || listen(reader.watching(parent), &door))
        .map_err(|error| Error::os("start the thread that reads the channel", error))?;
    process::go_on_without_parent();
    Ok(())
}

/// Reads what the supervisor says, until it is gone; then the process leaves.
fn listen(mut reader: Reader, door: &Arc<Door>) {
    loop {
        match reader.next() {
            Ok(Some(frame)) => match message::decode(&frame, "a message to a worker") {
                Ok(ToWorker::Cancel) => {
                    // On a thread of its own: it waits for the GIL, and this one must go on seeing
                    // the end of the channel.
                    let door = Arc::clone(door);
                    let cancel = move || {
                        if let Err(error) = door.cancel() {
                            crate::sys::log::line(format_args!("a cancellation failed: {error}"));
                        }
                    };
                    if let Err(error) = thread::spawn_deaf("th-cancel", cancel) {
                        crate::sys::log::line(format_args!("cannot deliver a cancellation: {error}"));
                    }
                }
                Ok(ToWorker::Spec { .. } | ToWorker::Template { .. }) => {
                    give_up("a second order of what to be")
                }
                Err(error) => give_up(error),
            },
            Ok(None) => leave_process(process::ORPHANED),
            Err(error) => give_up(error),
        }
    }
}

fn give_up(reason: impl std::fmt::Display) -> ! {
    crate::sys::log::line(format_args!("worker {} leaves: {reason}", process::id()));
    leave_process(process::ORPHANED)
}

/// Ends this process, a worker, and everything below it.
pub fn leave_process(code: i32) -> ! {
    tree::end_own(Instant::now() + TREE_ENDS);
    process::exit_now(code)
}

/// How long a worker that leaves waits for the end of what is below it, which is killed.
const TREE_ENDS: Duration = Duration::from_millis(500);

/// The worker's end of the channel, for reading.
pub(super) struct Reader {
    channel: OwnedFd,
    decoder: Decoder,
    /// The end of the supervisor is that of the channel, also where somebody has a copy of its end.
    parent: Option<OwnedFd>,
}

impl Reader {
    pub(super) fn new(channel: OwnedFd) -> Self {
        Self { channel, decoder: Decoder::new(), parent: None }
    }

    fn watching(self, parent: OwnedFd) -> Self {
        Self { parent: Some(parent), ..self }
    }

    /// Waits until there is something to read. Whether that can be more than the end.
    fn wait(&self) -> Result<bool> {
        let Some(parent) = &self.parent else { return Ok(true) };
        let mut ready = [PollFd::new(&self.channel, PollFlags::IN), PollFd::new(parent, PollFlags::IN)];
        loop {
            match rustix::event::poll(&mut ready, None) {
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Error::os("wait for the supervisor", errno)),
                // What it said before its end is still read.
                Ok(_) => return Ok(!ready[0].revents().is_empty()),
            }
        }
    }

    /// The next frame; `None` at the end of the channel.
    fn next(&mut self) -> Result<Option<Frame>> {
        // On the stack: a worker's thread that has heard nothing yet needs no heap of its own.
        let mut chunk = [0; 1 << 14];
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            if !self.wait()? {
                return Ok(None);
            }
            match rustix::io::read(&self.channel, &mut chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.decoder.push(&chunk[..count]),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Err(errno) => return Err(Error::os("read from the supervisor", errno)),
            }
        }
    }
}
