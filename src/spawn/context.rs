//! The worker's side: who the calling interpreter's worker is, and how it talks to its supervisor.
//!
//! A process worker is its main interpreter (id 0) and talks over a socket; a subinterpreter worker
//! is found by its interpreter's id and talks to the supervisor in the same process.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::parcel::{self, Content, Parcel};
use super::zygote::{BLANK_NAME, serve};
use super::{Reports, held, terminal};
use crate::error::{Error, Result};
use crate::events::fault;
use crate::interp::attach::Token;
use crate::interp::door::Door;
use crate::interp::rungs::pressure::Pressure;
use crate::interp::turn;
use crate::sys::event::Slot;
use crate::sys::fd::Arrived;
use crate::sys::fork_local::ForkLocal;
use crate::sys::lock::lock;
use crate::sys::{clock, fd, lent, process, signal, thread, tree};
use crate::wire::frame::{Decoder, Frame};
use crate::wire::message::{self, Contract, FromWorker, Role, ToWorker, Wish};

static CONTEXTS: ForkLocal<Mutex<HashMap<i64, Arc<Context>>>> = ForkLocal::new();

/// One worker, seen from inside.
pub struct Context {
    spec: serde_json::Value,
    parcel: Arc<Parcel>,
    link: Link,
}

enum Link {
    Process(ProcessLink),
    Thread(ThreadLink),
}

struct ProcessLink {
    /// To the interpreter that the worker's code runs in.
    door: Arc<Door>,
    /// What came of its second interpreter, if it has one.
    apart: Mutex<Apart>,
    channel: OwnedFd,
    /// Held while a frame is written, so that frames of two threads don't mix.
    sending: Mutex<()>,
    /// What becomes fd 2 once the boot is over.
    stderr: Mutex<Option<OwnedFd>>,
    /// For whoever answers for other workers in this process.
    inbox: Mutex<Inbox>,
}

/// A message of the supervisor's that concerns other workers than the one that this process is.
#[derive(Debug)]
pub struct Letter {
    /// The message.
    pub message: ToWorker,
    /// What it carries.
    pub payload: Arc<Vec<u8>>,
    /// The descriptors that came beside it.
    pub fds: Vec<OwnedFd>,
}

/// Is called on the thread that reads the channel, and must not wait.
pub type Listener = Box<dyn Fn(Letter) + Send + Sync>;

enum Inbox {
    /// Nobody has asked for them yet.
    Waiting(Vec<Letter>),
    Open(Listener),
}

#[derive(Debug, Default)]
struct Apart {
    /// An extension module's refusal is not the end: it will be tried again with the shared GIL.
    falls_back: bool,
    refused: bool,
    code: Option<i32>,
}

struct ThreadLink {
    id: u64,
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

/// The worker that this process is, if it is one.
pub fn of_process() -> Option<Arc<Context>> {
    current(0).ok().filter(|context| context.is_process())
}

fn install(interpreter: i64, context: Arc<Context>) -> Result<()> {
    lock(CONTEXTS.get_or_make(|| Ok(Mutex::default()))?).insert(interpreter, context);
    Ok(())
}

/// In the only thread of a fork's child: forgets whose worker the parent was.
pub fn forget_all() {
    crate::events::forget_in_child();
    CONTEXTS.forget();
    held::forget_all();
    terminal::forget_all();
    clock::forget_in_child();
    turn::forget();
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
    pub fn take_content(&self) -> Result<Content> {
        self.parcel.take_content(self.falls_back())
    }

    /// A descriptor that the arguments refer to, once.
    ///
    /// # Errors
    /// When it has been taken, or there is none; EMFILE.
    pub fn take_passed(&self, index: usize) -> Result<OwnedFd> {
        self.parcel.take_passed(index, self.falls_back())
    }

    /// Whether all may have to begin once more, in another interpreter.
    fn falls_back(&self) -> bool {
        match &self.link {
            Link::Process(link) => lock(&link.apart).falls_back,
            Link::Thread(link) => link.fall_back,
        }
    }

    /// The fds of stdout and stderr; they belong to the runner and outlive the interpreter. `None` where
    /// the worker writes to the process's.
    pub fn stdio(&self) -> Option<[RawFd; 2]> {
        match &self.link {
            Link::Process(_) => None,
            Link::Thread(link) => link.stdio,
        }
    }

    /// Whether the worker has its process to itself.
    pub fn is_process(&self) -> bool {
        matches!(self.link, Link::Process(_))
    }

    /// To the interpreter that the code of a worker process runs in.
    pub(super) fn door(&self) -> Option<&Arc<Door>> {
        match &self.link {
            Link::Process(link) => Some(&link.door),
            Link::Thread(_) => None,
        }
    }

    /// The number of the worker in this process's supervisor, for one that is a thread of this process.
    pub fn id(&self) -> Option<u64> {
        match &self.link {
            Link::Process(_) => None,
            Link::Thread(link) => Some(link.id),
        }
    }

    /// Has `listener` told of other workers, also what has come by now; the first one stays.
    pub fn listen(&self, listener: impl FnOnce() -> Listener) {
        let Link::Process(link) = &self.link else { return };
        let mut inbox = lock(&link.inbox);
        if let Inbox::Waiting(letters) = &mut *inbox {
            let listener = listener();
            letters.drain(..).for_each(&listener);
            *inbox = Inbox::Open(listener);
        }
    }

    /// Tells a process's supervisor what is wanted of another worker, and passes on descriptors.
    ///
    /// # Errors
    /// As [`Context::send`]; where the worker is no process.
    pub fn wish(&self, id: u64, wish: Wish, payload: &[u8], along: &[BorrowedFd<'_>]) -> Result<()> {
        match &self.link {
            Link::Process(link) => link.write(&FromWorker::About { id, wish }, payload, along),
            Link::Thread(_) => Err(Error::state("a subinterpreter is in its supervisor's process")),
        }
    }

    /// Says something to the supervisor. A process waits until all of it is written.
    ///
    /// # Errors
    /// EPIPE when the supervisor is gone; a message that is too long.
    pub fn send(&self, message: &FromWorker, content: &Content) -> Result<()> {
        match &self.link {
            Link::Process(link) => {
                if *message == FromWorker::Started {
                    link.end_of_boot()?;
                }
                if matches!(message, FromWorker::Raised { refused: true, .. }) {
                    let mut apart = lock(&link.apart);
                    if apart.falls_back {
                        apart.refused = true;
                        return Ok(());
                    }
                }
                let memory: Vec<_> = content.memory().map(AsFd::as_fd).into_iter().collect();
                link.write(message, &content.bytes(), &memory)
            }
            Link::Thread(link) => {
                if link.fall_back && matches!(message, FromWorker::Raised { refused: true, .. }) {
                    *lock(&link.refused) = true;
                    return Ok(());
                }
                link.reports.message(message.clone(), content.clone());
                Ok(())
            }
        }
    }
}

/// Lives the worker's life in a second interpreter of its process, between [`Door::open`] and
/// [`Door::close`]; `body` is what it does there.
pub(super) struct SecondLife {
    /// The exit code that it named, if it came to that.
    pub(super) code: Option<i32>,
    /// An extension module refused the interpreter, before the target had started.
    pub(super) refused: bool,
    /// What the body returned.
    pub(super) outcome: Result<()>,
    /// It was told to end.
    pub(super) pressed: bool,
}

impl SecondLife {
    /// # Errors
    /// When the process is no worker.
    pub(super) fn live(
        token: Token<'_>,
        falls_back: bool,
        body: impl FnOnce(&Context) -> Result<()>,
    ) -> Result<Self> {
        let context = current(0)?;
        let Link::Process(link) = &context.link else {
            return Err(Error::state("the main interpreter is a worker of its own process"));
        };
        *lock(&link.apart) = Apart { falls_back, ..Apart::default() };
        install(token.interpreter_id(), Arc::clone(&context))?;
        link.door.open(token);
        let outcome = body(&context);
        link.door.close(token);
        link.door.seal(token);
        let apart = lock(&link.apart);
        let pressed = link.door.pressed().is_some();
        Ok(Self { code: apart.code, refused: apart.refused, outcome, pressed })
    }
}

/// Ends the process of a worker with this code; or has its second interpreter's life end with it.
///
/// # Errors
/// When the interpreter is no worker.
pub fn leave(interpreter: i64, code: i32) -> Result<()> {
    if interpreter == 0 {
        leave_process(code);
    }
    if let Link::Process(link) = &current(interpreter)?.link {
        lock(&link.apart).code = Some(code);
    }
    Ok(())
}

impl ProcessLink {
    fn write(&self, message: &FromWorker, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let head = message::encode(message, payload.len())?;
        let _sending = lock(&self.sending);
        fd::write_all_with_fds(&self.channel, &head, fds)
            .and_then(|()| fd::write_all(&self.channel, payload))
            .map_err(|error| Error::os("send to the supervisor", error))
    }

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
    pub(super) id: u64,
    pub(super) spec: serde_json::Value,
    pub(super) parcel: Arc<Parcel>,
    pub(super) stdio: Option<[RawFd; 2]>,
    pub(super) reports: Arc<dyn Reports>,
    pub(super) fall_back: bool,
}

impl ThreadWorker {
    pub(super) fn enter(self, interpreter: i64) -> Result<()> {
        let link = ThreadLink {
            id: self.id,
            reports: self.reports,
            stdio: self.stdio,
            refused: Mutex::new(false),
            fall_back: self.fall_back,
        };
        let (spec, parcel) = (self.spec, self.parcel);
        install(interpreter, Arc::new(Context { spec, parcel, link: Link::Thread(link) }))
    }
}

/// Forgets a subinterpreter's worker. Whether it must be started again with the shared GIL.
pub(super) fn forget(interpreter: i64) -> bool {
    let Ok(Some(contexts)) = CONTEXTS.get() else { return false };
    let context = lock(contexts).remove(&interpreter);
    context.is_some_and(|context| match &context.link {
        Link::Process(_) => false,
        Link::Thread(link) => *lock(&link.refused),
    })
}

/// What a process needs to live as a worker, whatever its task is.
struct Readiness {
    /// Readable once the supervisor has ended.
    parent: OwnedFd,
    /// A thread that waits for what it is to hear from, and for what it is to tell.
    listener: Arc<Slot<(Reader, Arc<Door>)>>,
}

impl Readiness {
    /// Makes this process die with its supervisor, whose pid is `parent`, and ready to be told what to do.
    fn make(parent: i32) -> Result<Self> {
        process::die_with_parent(parent);
        process::lead_own_group()?;
        process::be_subreaper()?;
        let parent = process::parent_fd(parent)?;
        let listener = Arc::<Slot<(Reader, Arc<Door>)>>::default();
        let slot = Arc::clone(&listener);
        thread::spawn_deaf("th-channel", move || {
            if let Some((reader, door)) = slot.take(None) {
                listen(reader, &door);
            }
        })
        .map_err(|error| Error::os("start the thread that reads the channel", error))?;
        Ok(Self { parent, listener })
    }
}

/// In a child of a zygote: what it begins with once it is told what to do.
static BLANK: Mutex<Option<(OwnedFd, Readiness)>> = Mutex::new(None);

/// The first steps of a zygote's child: all that does not depend on its task.
///
/// # Errors
/// EAGAIN, EMFILE.
pub(super) fn become_blank(channel: OwnedFd, parent: i32) -> Result<()> {
    let readiness = Readiness::make(parent)?;
    *lock(&BLANK) = Some((channel, readiness));
    Ok(())
}

/// In a blank: takes in a task as it will be taken in, of which nothing is kept but what `_child` would be asked
/// to do. What is written to then is this process's own memory by now, and what is run is mapped.
///
/// # Errors
/// EMFILE; when this process is none.
pub fn rehearse(spec: serde_json::Value) -> Result<serde_json::Value> {
    if lock(&BLANK).is_none() {
        return Err(Error::state("this process is not a fork server's idle child"));
    }
    let (supervisor, worker) = fd::channel_pair()?;
    let contract = Contract { name: BLANK_NAME.into(), parent: 0, umask: None, apart: false };
    let roles = vec![Role::Stdout, Role::Stderr, Role::Directory];
    let task = message::encode(&ToWorker::Spec { spec, contract, roles }, 1)?;
    let stdout = rustix::stdio::stdout();
    let failed = |error: std::io::Error| Error::os("rehearse", error);
    fd::send_with_fds(&supervisor, &task, &[stdout; 3]).map_err(|errno| failed(errno.into()))?;
    fd::write_all(&supervisor, b"x").map_err(failed)?;
    let (_, fds, frame) = first_message(&worker).map_err(failed)??;
    drop(fds);
    match message::decode(&frame, "what was sent")? {
        ToWorker::Spec { spec, .. } => Ok(spec),
        other => Err(Error::protocol(format!("a task has become {other:?}"))),
    }
}

/// The first message on a channel, what came beside it, and who reads on.
fn first_message(channel: &OwnedFd) -> std::io::Result<Result<(Reader, Vec<OwnedFd>, Frame)>> {
    let (first, fds) = fd::receive_with_fds(channel)?;
    Ok((|| {
        let mut reader = Reader::new(fd::duplicate(channel)?);
        reader.decoder.push(&first);
        let frame = reader.next()?.ok_or_else(|| Error::protocol("the supervisor closed the channel"))?;
        Ok((reader, fds, frame))
    })())
}

/// Reads what to be, as a zygote's child or as a process that was started with a supervisor's channel as fd 0,
/// and keeps the promises of the contract. Whether it is to be a zygote, and no worker.
///
/// # Errors
/// When fd 0 is not a supervisor's channel.
pub fn enter_fresh() -> Result<bool> {
    let blank = lock(&BLANK).take();
    let is_blank = blank.is_some();
    let (channel, readiness) = if let Some((channel, readiness)) = blank {
        (channel, Some(readiness))
    } else {
        let channel = fd::duplicate_number(0)?;
        let null = fd::open("/dev/null".as_ref(), rustix::fs::OFlags::RDWR)?;
        fd::place(null.as_fd(), 0)?;
        (channel, None)
    };
    // From here on a signal that is meant for it, or sent to it by mistake, ends a blank.
    signal::stop_ignoring();
    signal::unblock_all();
    let (reader, fds, frame) = match first_message(&channel) {
        Ok(received) => received?,
        // Nobody has use for it.
        Err(_) if is_blank => process::exit_now(process::ORPHANED),
        Err(error) => {
            let doing = "read from the supervisor; --child is for tractor-host's own use";
            return Err(Error::os(doing, error));
        }
    };
    match message::decode(&frame, "what to be")? {
        ToWorker::Spec { spec, contract, roles } => {
            let (stderr, parcel) = take_places(&roles, fds, frame.payload)?;
            let readiness = match readiness {
                Some(readiness) => readiness,
                None => Readiness::make(contract.parent)?,
            };
            enter_process(readiness, &contract, spec, parcel, channel, stderr, reader)?;
            Ok(false)
        }
        ToWorker::Template { spec, preload, contract } => {
            process::die_with_parent(contract.parent);
            process::lead_own_group()?;
            keep(&contract);
            let order = serde_json::json!({ "spec": spec, "preload": preload });
            serve::keep(channel, order, contract.parent);
            Ok(true)
        }
        _ => Err(Error::protocol("told something else before what to be")),
    }
}

/// Puts what came beside the specification where it belongs. Returns what is to be stderr later on, and the
/// arguments.
fn take_places(roles: &[Role], fds: Vec<OwnedFd>, payload: Vec<u8>) -> Result<(OwnedFd, Parcel)> {
    // First of all: one that has come as 1 or 2, where that was closed, is not to be replaced.
    let fds = fds.into_iter().map(fd::above_stdio).collect::<Result<Vec<_>>>()?;
    let (parcel, rest) = parcel::sort(roles, fds, payload.into())?;
    let mut stderr = None;
    for (role, fd) in rest {
        match role {
            Role::Stdout => fd::place(fd.as_fd(), 1)?,
            Role::Directory => rustix::process::fchdir(&fd)
                .map_err(|errno| Error::os("change to the working directory", errno))?,
            _ => stderr = Some(fd),
        }
    }
    let stderr = stderr.ok_or_else(|| Error::protocol("the supervisor sent no stderr"))?;
    Ok((stderr, parcel))
}

/// Keeps the promises of the contract that concern the task.
fn keep(contract: &Contract) {
    thread::set_name(&contract.name);
    if let Some(mask) = contract.umask {
        process::set_umask(mask);
    }
}

/// The first steps of a process that was forked from its supervisor's.
pub(super) fn enter_fork(
    contract: &Contract,
    spec: serde_json::Value,
    parcel: Parcel,
    channel: OwnedFd,
    stderr: OwnedFd,
    reader: Reader,
) -> Result<()> {
    let readiness = Readiness::make(contract.parent)?;
    enter_process(readiness, contract, spec, parcel, channel, stderr, reader)
}

/// The first steps that every worker process has in common.
fn enter_process(
    readiness: Readiness,
    contract: &Contract,
    spec: serde_json::Value,
    parcel: Parcel,
    channel: OwnedFd,
    stderr: OwnedFd,
    reader: Reader,
) -> Result<()> {
    keep(contract);
    let door = Arc::new(if contract.apart { Door::new() } else { Door::to_main() });
    let link = ProcessLink {
        door: Arc::clone(&door),
        apart: Mutex::default(),
        channel,
        sending: Mutex::new(()),
        stderr: Mutex::new(Some(stderr)),
        inbox: Mutex::new(Inbox::Waiting(Vec::new())),
    };
    install(0, Arc::new(Context { spec, parcel: Arc::new(parcel), link: Link::Process(link) }))?;
    let Readiness { parent, listener } = readiness;
    if listener.fill((reader.watching(parent), door)).is_err() {
        return Err(Error::state("the thread that reads the channel has ended"));
    }
    process::go_on_without_parent();
    Ok(())
}

/// Reads what the supervisor says, until it is gone; then the process leaves.
fn listen(mut reader: Reader, door: &Arc<Door>) {
    let pressure = Arc::<Pressure>::default();
    loop {
        match reader.next() {
            Ok(Some(frame)) => match message::decode(&frame, "a message to a worker") {
                Ok(ToWorker::Cancel) => {
                    // On a thread of its own: it waits for the GIL, and this one must go on seeing
                    // the end of the channel.
                    let door = Arc::clone(door);
                    let cancel = move || {
                        if let Err(error) = door.cancel() {
                            fault!("a cancellation failed: {error}");
                        }
                    };
                    if let Err(error) = thread::spawn_deaf("th-cancel", cancel) {
                        fault!("cannot deliver a cancellation: {error}");
                    }
                }
                Ok(ToWorker::Press { force }) => pressure.raise(door, force),
                Ok(
                    message @ (ToWorker::About { .. }
                    | ToWorker::Lodge { .. }
                    | ToWorker::Lodger { .. }
                    | ToWorker::Own { .. }
                    | ToWorker::Hold { .. }),
                ) => {
                    let fds = reader.arrived.take(message.descriptors());
                    hear(Letter { message, payload: frame.payload.into(), fds });
                }
                Ok(message @ ToWorker::Terminal { .. }) => {
                    let fds = reader.arrived.take(message.descriptors());
                    if let ToWorker::Terminal { ticket, refused } = message
                        && let Err(answer) = terminal::answer(ticket, terminal::answered(refused, fds))
                    {
                        // It is for a worker of this process, or for one that has gone.
                        hear(terminal::letter(ticket, answer));
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

/// Passes on what concerns other workers.
fn hear(letter: Letter) {
    if let Ok(context) = current(0)
        && let Link::Process(link) = &context.link
    {
        match &mut *lock(&link.inbox) {
            Inbox::Open(listener) => listener(letter),
            Inbox::Waiting(letters) => letters.push(letter),
        }
    }
}

fn give_up(reason: impl std::fmt::Display) -> ! {
    fault!("worker {} leaves: {reason}", process::id());
    leave_process(process::ORPHANED)
}

/// Ends this process, a worker, and everything below it.
pub fn leave_process(code: i32) -> ! {
    lent::give_back();
    tree::end_own(Instant::now() + TREE_ENDS);
    process::exit_now(code)
}

/// How long a worker that leaves waits for the end of what is below it, which is killed.
const TREE_ENDS: Duration = Duration::from_millis(500);

/// The worker's end of the channel, for reading.
pub(super) struct Reader {
    channel: OwnedFd,
    decoder: Decoder,
    arrived: Arrived,
    /// The end of the supervisor is that of the channel, also where somebody has a copy of its end.
    parent: Option<OwnedFd>,
}

impl Reader {
    pub(super) fn new(channel: OwnedFd) -> Self {
        Self { channel, decoder: Decoder::new(), arrived: Arrived::default(), parent: None }
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
                // The worker has lowered its limit of descriptors below two, the number that poll may be given.
                Err(rustix::io::Errno::INVAL) => return Ok(true),
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
            if !self.decoder.is_mid_frame() {
                self.arrived.begin_anew();
            }
            match fd::receive(&self.channel, &mut chunk, &mut self.arrived) {
                Ok(0) => return Ok(None),
                Ok(count) => self.decoder.push(&chunk[..count]),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Err(errno) => return Err(Error::os("read from the supervisor", errno)),
            }
        }
    }
}
