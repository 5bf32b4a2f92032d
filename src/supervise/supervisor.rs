//! The supervisor of this process: the registry, and what API calls do to it. Decisions are the
//! reactor's; here requests are checked, workers made, and orders passed on.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use super::exit::Kind;
use super::ladder::{Ladder, Reason};
use super::reactor::{Command, Link, Process, Reactor};
use super::worker::{Parts, State, Worker};
use crate::error::{Error, Kind as ErrorKind, Result};
use crate::interp::attach::Token;
use crate::interp::door::Door;
use crate::spawn::clean::CleanThread;
use crate::spawn::fork::{self, Luggage};
use crate::spawn::parcel::{Content, Parcel};
use crate::spawn::request::{Backend, GilPolicy, Request, Stdio, bytes, seconds};
use crate::spawn::stdio::Streams;
use crate::spawn::zygote::{self, Refusal, Zygote};
use crate::spawn::{Reports, exec, subint};
use crate::sys::event::Slot;
use crate::sys::fork_local::ForkLocal;
use crate::sys::kick::Kicker;
use crate::sys::lock::lock;
use crate::sys::process::{self, Child};
use crate::sys::{fd, log, memfile, oom, procfs, thread};
use crate::wire::message::{self, Contract, FromWorker, Role, ToWorker};

static SUPERVISOR: ForkLocal<Arc<Supervisor>> = ForkLocal::new();

/// How long a spawn may wait for the main interpreter's GIL, or for the reactor.
const SPAWN_BOUND: Duration = Duration::from_secs(30);

/// In the only thread of a fork's child: forgets the parent's workers.
pub fn forget_in_child() {
    SUPERVISOR.forget();
}

/// All that this process knows of its workers.
pub struct Supervisor {
    pub(super) queue: Mutex<VecDeque<Command>>,
    pub(super) wake: OwnedFd,
    workers: Mutex<HashMap<u64, Arc<Worker>>>,
    clean: CleanThread,
    zygote: Zygote,
    reactor: Mutex<Option<JoinHandle<()>>>,
    next_id: AtomicU64,
    closing: AtomicBool,
    memory: Mutex<Memory>,
    counts: Mutex<Counts>,
    pub(super) oom: Mutex<oom::Watch>,
    /// The doors of subinterpreters that could not be ended.
    quarantine: Mutex<BTreeMap<u64, Quarantined>>,
}

/// A subinterpreter worker that could not be ended, and the way to it.
pub type Quarantined = (Arc<Worker>, Arc<Door>);

/// What is remembered of targets.
#[derive(Default)]
struct Memory {
    /// They need modules that refuse a GIL of their own.
    needs_shared_gil: HashSet<String>,
    /// They could not be ended in a subinterpreter.
    needs_process: HashSet<String>,
}

#[derive(Default)]
struct Counts {
    spawned: u64,
    ended: BTreeMap<Kind, u64>,
    abandoned_now: u64,
    reclaimed: u64,
}

impl Supervisor {
    /// This process's supervisor, started by the first call.
    ///
    /// # Errors
    /// EMFILE, EAGAIN; in a process that was forked behind our back.
    pub fn get() -> Result<&'static Arc<Self>> {
        let supervisor = SUPERVISOR.get_or_make(|| {
            Ok(Arc::new(Self {
                queue: Mutex::default(),
                wake: fd::event_fd()?,
                workers: Mutex::default(),
                clean: CleanThread::default(),
                zygote: Zygote::default(),
                reactor: Mutex::default(),
                next_id: AtomicU64::new(1),
                closing: AtomicBool::new(false),
                memory: Mutex::default(),
                counts: Mutex::default(),
                oom: Mutex::default(),
                quarantine: Mutex::default(),
            }))
        })?;
        supervisor.start()?;
        Ok(supervisor)
    }

    /// This process's supervisor, if it has one.
    ///
    /// # Errors
    /// In a process that was forked behind our back.
    pub fn existing() -> Result<Option<&'static Arc<Self>>> {
        SUPERVISOR.get()
    }

    fn start(self: &Arc<Self>) -> Result<()> {
        let mut running = lock(&self.reactor);
        if running.is_none() && !self.closing.load(Ordering::Acquire) {
            let reactor = Reactor::new(Arc::clone(self))?;
            let handle = thread::spawn_deaf("th-supervisor", move || reactor.run())
                .map_err(|error| Error::os("start the supervisor's thread", error))?;
            *running = Some(handle);
        }
        Ok(())
    }

    pub(super) fn order(&self, command: Command) {
        lock(&self.queue).push_back(command);
        fd::raise(&self.wake);
    }

    /// A worker by its id.
    ///
    /// # Errors
    /// When nobody holds it any more and it has ended.
    pub fn worker(&self, id: u64) -> Result<Arc<Worker>> {
        let found = lock(&self.workers).get(&id).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no worker {id}")))
    }

    /// The workers that have not ended, oldest first.
    pub fn live(&self) -> Vec<Arc<Worker>> {
        let mut found: Vec<_> =
            lock(&self.workers).values().filter(|worker| worker.state() != State::Ended).cloned().collect();
        found.sort_by_key(|worker| worker.id);
        found
    }

    /// Numbers for `tractor_host.statistics()`.
    pub fn statistics(&self) -> serde_json::Value {
        let counts = lock(&self.counts);
        let ended = |kind: Kind| counts.ended.get(&kind).copied().unwrap_or(0);
        json!({
            "spawned": counts.spawned,
            "live": self.live().len(),
            "returned": ended(Kind::Returned),
            "raised": ended(Kind::Raised),
            "cancelled": ended(Kind::Cancelled),
            "killed": ended(Kind::Killed),
            "signalled": ended(Kind::Signalled),
            "exited": ended(Kind::Exited),
            "abandoned": ended(Kind::Abandoned),
            "quarantined": counts.abandoned_now,
            "reclaimed": counts.reclaimed,
        })
    }

    /// Gives a handle back; an ended worker without handles is forgotten.
    pub fn release(&self, id: u64) {
        if let Ok(worker) = self.worker(id)
            && worker.release()
        {
            lock(&self.workers).remove(&id);
        }
    }

    /// Asks a worker to stop.
    pub fn cancel(&self, worker: &Worker) {
        self.order(Command::Cancel(worker.id));
    }

    /// Begins to end a worker.
    pub fn kill(&self, worker: &Worker) {
        self.order(Command::Kill(worker.id, Reason::Killed));
    }

    /// Makes a worker and sets it to work.
    ///
    /// # Errors
    /// What is wrong with the request; what the operating system refuses; after shutdown. Nothing of
    /// the worker is left behind then.
    pub fn spawn(self: &Arc<Self>, owner: i64, mut request: Request, parcel: Parcel) -> Result<Arc<Worker>> {
        request.check()?;
        let mut ladder = match &request.ladder {
            Some(asked) => Ladder::custom(request.backend, asked)?,
            None => Ladder::new(
                request.backend,
                seconds("cancel_timeout", request.cancel_timeout)?,
                seconds("kill_timeout", request.kill_timeout)?,
            ),
        };
        if self.closing.load(Ordering::Acquire) {
            return Err(Error::state("tractor_host is shutting down: no worker can be spawned any more"));
        }
        if request.promote
            && !request.backend.is_process()
            && lock(&self.memory).needs_process.contains(&request.target)
        {
            request.backend = Backend::Fork;
            ladder = ladder.moved_to(Backend::Fork);
            // As if it had been asked for: `_child` must know, and a fork has its `__main__` already.
            if let Some(spec) = request.spec.as_object_mut() {
                spec.insert("wall".into(), json!(Backend::Fork.name()));
                spec.insert("main".into(), serde_json::Value::Null);
            }
        }
        if request.gil == GilPolicy::Auto && lock(&self.memory).needs_shared_gil.contains(&request.target) {
            request.gil = GilPolicy::Shared;
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let name = request.name.clone().unwrap_or_else(|| format!("{}-{id}", short(&request.target)));
        let mut streams = Streams::open(&request.stdio)?;
        let worker = Arc::new(Worker::new(Parts {
            id,
            name,
            target: request.target.clone(),
            backend: request.backend,
            owner,
            ladder,
            timeout: request.timeout,
            collected: streams.as_mut().and_then(|streams| streams.collected.take()),
        }));
        lock(&self.workers).insert(id, Arc::clone(&worker));
        if request.backend.is_process() {
            lock(&self.oom).look();
        }
        let made = match request.backend {
            Backend::Subint => self.spawn_subint(&worker, request, streams, parcel),
            Backend::Forkserver | Backend::SubintForkserver => {
                self.spawn_forkserver(&worker, &request, streams.as_ref(), &parcel)
            }
            Backend::Fork => self.spawn_fork(&worker, request, streams, parcel),
            Backend::Exec => self.spawn_exec(&worker, request, streams, &parcel),
        };
        match made {
            Ok(()) => {
                lock(&self.counts).spawned += 1;
                Ok(worker)
            }
            Err(error) => {
                lock(&self.workers).remove(&id);
                Err(error)
            }
        }
    }

    fn spawn_subint(
        self: &Arc<Self>,
        worker: &Arc<Worker>,
        request: Request,
        streams: Option<Streams>,
        parcel: Parcel,
    ) -> Result<()> {
        let door = Arc::new(Door::new());
        let sys_path =
            request.sys_path.iter().map(|entry| bytes("sys.path", entry)).collect::<Result<_>>()?;
        // Known to the reactor before the runner can say a word.
        self.order(Command::Watch(Arc::clone(worker), Link::Subint(Arc::clone(&door))));
        let job = subint::Job {
            name: worker.name.clone(),
            gils: request.gil.plan(),
            spec: request.spec,
            parcel: Arc::new(parcel),
            sys_path,
            stdio: streams.map(|streams| [streams.stdout, streams.stderr]),
            door,
            reports: Arc::new(RunnerReports { supervisor: Arc::clone(self), worker: Arc::clone(worker) }),
            drain: worker.ladder.bound(),
        };
        match subint::spawn(job) {
            Ok(runner) => self.order(Command::RunnerStarted(worker.id, runner)),
            Err(error) => {
                self.order(Command::Forget(worker.id));
                return Err(error);
            }
        }
        Ok(())
    }

    fn spawn_fork(
        &self,
        worker: &Arc<Worker>,
        request: Request,
        streams: Option<Streams>,
        parcel: Parcel,
    ) -> Result<()> {
        let (ours, theirs) = fd::channel_pair()?;
        let boot_log = memfile::create("th-boot")?;
        let kept_log = fd::duplicate(&boot_log)?;
        let cwd = request.cwd.as_deref().map(|cwd| bytes("cwd", cwd)).transpose()?;
        let (stdout, stderr) = match streams {
            Some(streams) => (Some(streams.stdout), streams.stderr),
            None => (None, host_stream(rustix::stdio::stderr())?),
        };
        let luggage = Luggage {
            contract: contract(worker, None),
            spec: request.spec,
            parcel,
            reading: fd::duplicate(&theirs)?,
            channel: fd::above_stdio(theirs)?,
            stdout: stdout.map(fd::above_stdio).transpose()?,
            stderr: fd::above_stdio(stderr)?,
            boot_log: fd::above_stdio(boot_log)?,
            null: fd::above_stdio(fd::open("/dev/null".as_ref(), rustix::fs::OFlags::RDWR)?)?,
            tomb: fd::above_stdio(fd::tomb()?)?,
            cwd: cwd.map(|cwd| std::ffi::OsString::from_vec(cwd).into()),
        };
        let child = fork::spawn(&self.clean, luggage, Instant::now() + SPAWN_BOUND)?;
        self.watch(worker, Process::new(child, ours, kept_log));
        Ok(())
    }

    fn spawn_exec(
        &self,
        worker: &Arc<Worker>,
        request: Request,
        streams: Option<Streams>,
        parcel: &Parcel,
    ) -> Result<()> {
        let Boot { ours, theirs, log, kept_log, head, along, payload } =
            Boot::new(worker, &request, streams.as_ref(), parcel)?;
        let child = self.start_process(move || {
            let Request { command, env, cwd, .. } = &request;
            exec::spawn(command, env.as_deref(), cwd.as_deref(), theirs, streams.as_ref(), log)
        })?;
        self.watch_fresh(worker, Process::new(child, ours, kept_log), head, along, payload);
        Ok(())
    }

    fn spawn_forkserver(
        &self,
        worker: &Arc<Worker>,
        request: &Request,
        streams: Option<&Streams>,
        parcel: &Parcel,
    ) -> Result<()> {
        let interpreter = request.backend.is_subinterpreter().then(|| request.gil.plan().0);
        let mut again = true;
        loop {
            let Boot { ours, theirs, log, kept_log, head, along, payload } =
                Boot::new(worker, request, streams, parcel)?;
            let fds = zygote::Fds { channel: theirs, boot_log: log };
            let start = || {
                let order = zygote_order(&request.spec, &request.preload)?;
                self.start_zygote(request.command.clone(), order)
            };
            match self.zygote.fork(&fds, interpreter, start) {
                Ok(child) => {
                    let process = Process::new(child, ours, kept_log);
                    self.watch_fresh(worker, process, head, along, payload);
                    return Ok(());
                }
                Err(Refusal::Lost(error)) if again => {
                    log::line(format_args!("the fork server was lost and is started again: {error}"));
                    again = false;
                }
                Err(Refusal::Lost(error) | Refusal::Fork(error)) => return Err(error),
            }
        }
    }

    /// Starts the zygote anew, so that it imports these modules, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not start; interrupted, when a signal arrived meanwhile.
    pub fn preload(&self, command: Vec<String>, spec: &serde_json::Value, modules: &[String]) -> Result<()> {
        if self.closing.load(Ordering::Acquire) {
            return Err(Error::state("tractor_host is shutting down: nothing can be preloaded any more"));
        }
        let order = zygote_order(spec, modules)?;
        self.zygote.renew(&order, || self.start_zygote(command, order.clone()))
    }

    /// The fork server.
    pub fn zygote(&self) -> &Zygote {
        &self.zygote
    }

    fn start_zygote(&self, command: Vec<String>, order: Vec<u8>) -> Result<zygote::Started> {
        let (ours, theirs) = fd::channel_pair()?;
        let boot_log = memfile::create("th-zygote")?;
        let kept_log = fd::duplicate(&boot_log)?;
        // It is nobody's worker: it has the environment and the directory of this process, and no output.
        let streams = Streams::open(&Stdio::Null)?;
        let child = self
            .start_process(move || exec::spawn(&command, None, None, theirs, streams.as_ref(), boot_log))?;
        zygote::Started::new(child, ours, kept_log, order)
    }

    /// Starts a process from the reactor's thread, which outlives it: its death signal follows that.
    fn start_process(&self, start: impl FnOnce() -> Result<Child> + Send + 'static) -> Result<Child> {
        let reply = Arc::new(Slot::<Result<Child>>::default());
        self.order(Command::Start(Box::new(start), Arc::clone(&reply)));
        reply.take(Some(Instant::now() + SPAWN_BOUND)).unwrap_or_else(|| {
            Err(Error::timed_out("the supervisor's thread did not start the process in time"))
        })
    }

    /// Watches a process that is told over its channel what to do.
    fn watch_fresh(
        &self,
        worker: &Arc<Worker>,
        mut process: Process,
        head: Vec<u8>,
        along: Vec<Arc<OwnedFd>>,
        payload: Arc<Vec<u8>>,
    ) {
        process.post_with_fds(head, along);
        process.post(payload);
        self.watch(worker, process);
    }

    fn watch(&self, worker: &Arc<Worker>, process: Process) {
        worker.set_pid(process.pid());
        self.order(Command::Watch(Arc::clone(worker), Link::Process(Box::new(process))));
    }

    /// Ends every worker, then the supervisor's own threads. No worker can be spawned afterwards.
    /// Returns how many workers had to be left behind.
    ///
    /// # Errors
    /// Interrupted, when a signal arrived: call it again to go on waiting.
    pub fn shut_down(&self) -> Result<u64> {
        self.closing.store(true, Ordering::Release);
        for worker in self.live() {
            self.order(Command::Kill(worker.id, Reason::Shutdown));
        }
        for worker in self.live() {
            // Bounded by the worker's ladder, whose last rung is to give it up.
            worker.wait(None)?;
        }
        self.order(Command::Stop);
        if let Some(handle) = lock(&self.reactor).take() {
            // Its panic has been printed; nothing is left to do about it.
            let _ = handle.join();
        }
        self.zygote.stop();
        self.clean.stop();
        Ok(lock(&self.counts).abandoned_now)
    }

    /// An extension module that this target needs refuses a GIL of its own.
    pub(super) fn needs_shared_gil(&self, target: &str) {
        lock(&self.memory).needs_shared_gil.insert(target.to_owned());
    }

    pub(super) fn counted(&self, kind: Kind, worker: &Worker, abandoned: bool) {
        let mut counts = lock(&self.counts);
        *counts.ended.entry(kind).or_default() += 1;
        if abandoned {
            counts.abandoned_now += 1;
            lock(&self.memory).needs_process.insert(worker.target.clone());
        }
    }

    pub(super) fn forget(&self, id: u64) {
        lock(&self.workers).remove(&id);
    }

    pub(super) fn quarantine(&self, worker: Arc<Worker>, door: Arc<Door>) {
        lock(&self.quarantine).insert(worker.id, (worker, door));
    }

    /// The subinterpreters that could not be ended and are still there, oldest first.
    pub fn quarantined(&self) -> Vec<Quarantined> {
        lock(&self.quarantine).values().cloned().collect()
    }

    /// At the end of the program, after [`Supervisor::shut_down`]: makes sure that subinterpreters that
    /// could not be ended do not keep Python from ending, or crash it.
    ///
    /// # Errors
    /// What is missing for that on this machine.
    pub fn leave_behind(&self, token: Token<'_>) -> Result<()> {
        let kicker = Kicker::for_parking().map_err(Error::unsupported)?;
        for (_, door) in self.quarantined() {
            door.leave_behind(token, &kicker)?;
        }
        kicker.keep();
        Ok(())
    }

    pub(super) fn reclaimed(&self, id: u64) {
        lock(&self.quarantine).remove(&id);
        let mut counts = lock(&self.counts);
        counts.abandoned_now -= 1;
        counts.reclaimed += 1;
    }
}

/// Carries what a runner thread says to the reactor.
struct RunnerReports {
    supervisor: Arc<Supervisor>,
    worker: Arc<Worker>,
}

impl Reports for RunnerReports {
    fn message(&self, message: FromWorker, content: Content) {
        self.supervisor.order(Command::Said(self.worker.id, message, content));
    }

    fn refused_own_gil(&self) {
        self.supervisor.needs_shared_gil(&self.worker.target);
    }

    fn over(&self) {
        self.supervisor.order(Command::CodeOver(self.worker.id));
    }

    fn stuck(&self, threads: usize) {
        self.supervisor.order(Command::Stuck(self.worker.id, threads));
    }

    fn ended(&self, interpreters: &[i64], error: Option<String>) {
        self.supervisor.order(Command::RunnerEnded(self.worker.id, interpreters.to_vec(), error));
    }
}

/// What a process is started with that is told over its channel what to do.
struct Boot {
    ours: OwnedFd,
    theirs: OwnedFd,
    log: OwnedFd,
    kept_log: OwnedFd,
    head: Vec<u8>,
    /// Goes beside the head.
    along: Vec<Arc<OwnedFd>>,
    /// Follows the head.
    payload: Arc<Vec<u8>>,
}

impl Boot {
    fn new(worker: &Worker, request: &Request, streams: Option<&Streams>, parcel: &Parcel) -> Result<Self> {
        let (ours, theirs) = fd::channel_pair()?;
        let log = memfile::create("th-boot")?;
        let kept_log = fd::duplicate(&log)?;
        let stderr = match streams {
            Some(streams) => fd::duplicate(streams.stderr.as_fd())?,
            None => host_stream(rustix::stdio::stderr())?,
        };
        let (mut roles, mut along, mut umask) = (vec![Role::Stderr], vec![Arc::new(stderr)], None);
        if request.backend.has_zygote() {
            // A process that was started by this one would have these from it.
            let stdout = match streams {
                Some(streams) => fd::duplicate(streams.stdout.as_fd())?,
                None => host_stream(rustix::stdio::stdout())?,
            };
            let cwd = match &request.cwd {
                Some(cwd) => std::ffi::OsString::from_vec(bytes("cwd", cwd)?),
                None => ".".into(),
            };
            roles.extend([Role::Stdout, Role::Directory]);
            along.extend([stdout, fd::directory(cwd.as_ref())?].map(Arc::new));
            umask = procfs::umask();
        }
        let content = parcel.content()?;
        let payload = content.bytes();
        if let Content::Memory(memory) = content {
            roles.push(Role::Payload);
            along.push(memory);
        }
        let passed = parcel.passed();
        roles.resize(roles.len() + passed.len(), Role::Passed);
        along.extend(passed);
        let spec = ToWorker::Spec { spec: request.spec.clone(), contract: contract(worker, umask), roles };
        let head = message::encode(&spec, payload.len())?;
        Ok(Self { ours, theirs, log, kept_log, head, along, payload })
    }
}

/// What a zygote is told.
fn zygote_order(spec: &serde_json::Value, modules: &[String]) -> Result<Vec<u8>> {
    let contract = Contract { name: zygote::NAME.into(), parent: process::id(), umask: None, apart: false };
    let (spec, preload) = (spec.clone(), modules.to_vec());
    message::encode(&ToWorker::Template { spec, preload, contract }, 0)
}

fn contract(worker: &Worker, umask: Option<u32>) -> Contract {
    Contract {
        name: format!("th:{}", worker.name),
        parent: process::id(),
        umask,
        apart: worker.backend.is_process() && worker.backend.is_subinterpreter(),
    }
}

/// A copy of this process's stdout or stderr; /dev/null where that is closed.
fn host_stream(stream: impl AsFd) -> Result<OwnedFd> {
    fd::duplicate(stream).or_else(|_| fd::open("/dev/null".as_ref(), rustix::fs::OFlags::WRONLY))
}

/// The last part of a target's name, which a thread's name has room for.
fn short(target: &str) -> &str {
    target.rsplit(['.', ':']).next().filter(|part| !part.is_empty()).unwrap_or("worker")
}
