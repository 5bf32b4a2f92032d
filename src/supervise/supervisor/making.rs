//! How a worker is made: the request is checked, what it starts with is put together, and its backend's way is
//! taken; or another process is asked to.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::json;

use super::super::clerk::{Surroundings, host_stream, is_as_free};
use super::super::exit::Exit;
use super::super::ladder::{Ladder, Reason};
use super::super::reactor::{Command, Introduction, Link, Process};
use super::super::scheduler::policy::Terms;
use super::super::worker::{Owner, Parts, Worker};
use super::{Answer, Supervisor};
use crate::error::{Error, Result};
use crate::interp::subinterp::Gil;
use crate::spawn::context::{self, Context};
use crate::spawn::fork::{self, Luggage};
use crate::spawn::parcel::{self, Content, Parcel};
use crate::spawn::request::{Backend, GilPolicy, Request, Stdio, bytes, path_of, seconds};
use crate::spawn::stdio::Streams;
use crate::spawn::zygote::{self, Refusal};
use crate::spawn::{Reports, exec, subint};
use crate::sys::event::{Slot, Wait};
use crate::sys::lock::lock;
use crate::sys::process::{self, Child};
use crate::sys::{fd, memfile};
use crate::wire::message::{self, Contract, FromWorker, Role, ToWorker, Wish};

/// How long a spawn may wait for the main interpreter's GIL, or for the reactor.
const SPAWN_BOUND: Duration = Duration::from_secs(30);

impl Supervisor {
    /// Makes a worker and sets it to work, for code in the interpreter `owner` of this process.
    ///
    /// # Errors
    /// What is wrong with the request; what the operating system refuses; after shutdown. Nothing of
    /// the worker is left behind then. Interrupted, when a signal arrived while somebody else was starting it:
    /// then there is none, and the call can be repeated.
    pub fn spawn(self: &Arc<Self>, owner: i64, request: Request, parcel: Parcel) -> Result<Arc<Worker>> {
        let parent = context::current(owner).ok().and_then(|context| context.id());
        self.make(Owner::Interpreter(owner), parent, Given::Nothing, request, parcel)
    }

    /// The same for a worker process, which gets news of it under its own number.
    ///
    /// # Errors
    /// As for [`Supervisor::spawn`]; for a worker that is to be no process of its own.
    pub(in crate::supervise) fn spawn_for(
        self: &Arc<Self>,
        (id, theirs): (u64, u64),
        parent: u64,
        request: Request,
        surroundings: Surroundings,
        parcel: Parcel,
    ) -> Result<()> {
        if !request.backend.starts_afresh() {
            return Err(Error::protocol(format!(
                "a worker asked for a worker that it must start by itself ({})",
                request.backend.name()
            )));
        }
        let owner = Owner::Worker { id, theirs };
        let given = Given::Surroundings(Box::new(surroundings));
        // Nobody here has a handle to it.
        self.make(owner, Some(parent), given, request, parcel).map(|worker| self.release(worker.id))
    }

    /// A worker that is to live in this process, for the supervisor that this one is a worker of.
    ///
    /// # Errors
    /// As for [`Supervisor::spawn`].
    pub(in crate::supervise) fn lodge(
        self: &Arc<Self>,
        theirs: u64,
        request: serde_json::Value,
        roles: &[Role],
        fds: Vec<OwnedFd>,
        payload: Arc<Vec<u8>>,
    ) -> Result<()> {
        let request: Request = serde_json::from_value(request)
            .map_err(|error| Error::protocol(format!("a malformed request: {error}")))?;
        if request.backend != Backend::Subint {
            return Err(Error::protocol("only subinterpreters can live in a process"));
        }
        let (parcel, rest) = parcel::sort(roles, fds, payload)?;
        let given = Given::Streams(Streams::of_another(rest)?);
        let made = self.make(Owner::Patron(theirs), None, given, request, parcel);
        made.map(|worker| self.release(worker.id))
    }

    /// Makes a worker, and tells of it where there is none.
    fn make(
        self: &Arc<Self>,
        owner: Owner,
        parent: Option<u64>,
        given: Given,
        request: Request,
        parcel: Parcel,
    ) -> Result<Arc<Worker>> {
        let (target, backend) = (request.target.clone(), request.backend.name());
        let mut number = None;
        let made = self.make_numbered(owner, parent, given, request, parcel, &mut number);
        // An interrupted call is made again.
        if let Err(error) = &made
            && !error.is_interrupted()
        {
            tracing::info!(
                target: crate::events::WORKER,
                kind = "refusal",
                worker = number,
                backend,
                target = target.as_str(),
                "there is no worker for {target}: {error}"
            );
        }
        made
    }

    /// Makes a worker. It has the `number` then, also if it comes to nothing.
    fn make_numbered(
        self: &Arc<Self>,
        owner: Owner,
        parent: Option<u64>,
        given: Given,
        mut request: Request,
        parcel: Parcel,
        number: &mut Option<u64>,
    ) -> Result<Arc<Worker>> {
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
            set_wall(&mut request.spec, Backend::Fork.name());
            if let Some(spec) = request.spec.as_object_mut() {
                spec.insert("main".into(), serde_json::Value::Null);
            }
        }
        if request.gil == GilPolicy::Auto && lock(&self.memory).needs_shared_gil.contains(&request.target) {
            request.gil = GilPolicy::Shared;
        }
        let id = *number.insert(self.next_id.fetch_add(1, Ordering::Relaxed));
        let name = request.name.clone().unwrap_or_else(|| format!("{}-{id}", short(&request.target)));
        if let Some(spec) = request.spec.as_object_mut() {
            spec.insert("name".into(), json!(name));
        }
        let (mut streams, surroundings) = match given {
            Given::Nothing => (Streams::open(&request.stdio)?, None),
            Given::Streams(streams) => (Some(streams), None),
            Given::Surroundings(surroundings) => (None, Some(*surroundings)),
        };
        let worker = Arc::new(Worker::new(Parts {
            id,
            name,
            target: request.target.clone(),
            backend: request.backend,
            owner,
            parent,
            ladder,
            timeout: request.timeout,
            terms: Terms {
                weight: request.priority,
                quota: request.cpu_quota,
                shares_gil: request.gil.plan().0 == Gil::Shared,
                leftovers: false,
            },
            collected: streams.as_mut().and_then(|streams| streams.collected.take()),
        }));
        lock(&self.workers).insert(id, Arc::clone(&worker));
        if request.backend.is_process() {
            lock(&self.oom).look();
        }
        let made = match request.backend {
            Backend::Subint => self.spawn_subint(&worker, request, streams, parcel),
            Backend::Fork => self.spawn_fork(&worker, request, streams, parcel),
            Backend::Forkserver | Backend::SubintForkserver | Backend::Exec => surroundings
                .map_or_else(|| Surroundings::here(&request, streams), Ok)
                .and_then(|surroundings| self.spawn_afresh(&worker, request, &surroundings, &parcel)),
        };
        match made {
            Ok(()) => {
                lock(&self.counts).spawned += 1;
                Ok(worker)
            }
            Err(error) => {
                lock(&self.workers).remove(&id);
                // Somebody may have found it meanwhile, and wait for it.
                worker.finish(Exit::unknown(format!("it could not be made: {error}")));
                Err(error)
            }
        }
    }

    /// Makes a process that is not forked from this one: here, or by whom this process is a worker of.
    fn spawn_afresh(
        self: &Arc<Self>,
        worker: &Arc<Worker>,
        mut request: Request,
        surroundings: &Surroundings,
        parcel: &Parcel,
    ) -> Result<()> {
        if let Some(patron) = self.patron(request.backend)
            && self.spawn_elsewhere(&patron, worker, &mut request, surroundings, parcel)?
        {
            return Ok(());
        }
        if let Some(name) = request.process.take() {
            return self.spawn_lodger(worker, name, request, surroundings, parcel);
        }
        match request.backend {
            Backend::Exec => self.spawn_exec(worker, request, surroundings, parcel),
            _ => self.spawn_forkserver(worker, &request, surroundings, parcel),
        }
    }

    fn spawn_subint(
        self: &Arc<Self>,
        worker: &Arc<Worker>,
        request: Request,
        streams: Option<Streams>,
        parcel: Parcel,
    ) -> Result<()> {
        let door = Arc::clone(worker.door.get_or_init(Arc::default));
        let sys_path = path_of(&request.spec)?;
        // Known to the reactor before the runner can say a word.
        self.order(Command::Watch(Arc::clone(worker), Link::Subint(Arc::clone(&door))));
        let job = subint::Job {
            id: worker.id,
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
        let priority = request.priority;
        let settle = Box::new(move |child| favour(child, priority));
        let child = fork::spawn(&self.clean, luggage, settle, Instant::now() + SPAWN_BOUND)?;
        self.watch(worker, Process::new(child, ours, kept_log));
        Ok(())
    }

    fn spawn_exec(
        &self,
        worker: &Arc<Worker>,
        request: Request,
        surroundings: &Surroundings,
        parcel: &Parcel,
    ) -> Result<()> {
        let (ours, theirs) = fd::channel_pair()?;
        let log = memfile::create("th-boot")?;
        let kept_log = fd::duplicate(&log)?;
        let task = Task::new(worker, &request, surroundings, parcel)?;
        let stdout = fd::duplicate(&surroundings.stdout)?;
        let child = self.start_process(move || {
            exec::spawn(&request.command, request.env.as_deref(), theirs, stdout, log)
        })?;
        let child = favour(surroundings.apply_to(child)?, request.priority)?;
        let process = Process::new(child, ours, kept_log);
        self.watch_fresh(worker, process, task);
        Ok(())
    }

    fn spawn_forkserver(
        &self,
        worker: &Arc<Worker>,
        request: &Request,
        surroundings: &Surroundings,
        parcel: &Parcel,
    ) -> Result<()> {
        let interpreter = request.backend.is_subinterpreter().then(|| request.gil.plan().0);
        let task = Task::new(worker, request, surroundings, parcel)?;
        let mut again = true;
        let blank = loop {
            let start = || {
                let order = zygote_order(&request.spec, &request.preload)?;
                self.start_zygote(request.command.clone(), order)
            };
            match self.zygote.take(interpreter, start) {
                Ok(blank) => break blank,
                Err(Refusal::Lost(error)) if again => {
                    zygote::tell_lost(&error);
                    again = false;
                }
                Err(Refusal::Lost(error) | Refusal::Fork(error)) => return Err(error),
            }
        };
        let child = favour(surroundings.apply_to(blank.child)?, request.priority)?;
        let process = Process::new(child, blank.channel, blank.boot_log);
        self.watch_fresh(worker, process, task);
        // How many to keep is the program's affair, and not that of its workers.
        if !matches!(worker.owner, Owner::Worker { .. }) {
            self.blanks.store(blanks(request.blanks), Ordering::Relaxed);
        }
        self.zygote.refill(interpreter, self.blanks.load(Ordering::Relaxed));
        Ok(())
    }

    /// Makes a subinterpreter in a process that others may live in too.
    fn spawn_lodger(
        self: &Arc<Self>,
        worker: &Arc<Worker>,
        name: String,
        request: Request,
        surroundings: &Surroundings,
        parcel: &Parcel,
    ) -> Result<()> {
        let owner = if let Owner::Worker { id, .. } = worker.owner { id } else { 0 };
        let landlord =
            self.houses.move_in((owner, name), |name| self.build_house(name, &request, surroundings))?;
        let introduce = || {
            let mut inside = Request {
                backend: Backend::Subint,
                name: Some(worker.name.clone()),
                stdio: Stdio::Inherit,
                ladder: Some(worker.ladder.inside()),
                // Its time is kept here: who lives in a process that was stopped has no clock.
                timeout: None,
                promote: false,
                ..request
            };
            set_wall(&mut inside.spec, Backend::Subint.name());
            let request = serde_json::to_value(&inside)
                .map_err(|error| Error::invalid(format!("a request that is no JSON: {error}")))?;
            let (payload, roles, along) = surroundings.with(parcel)?;
            let head = message::encode(&ToWorker::Lodge { id: worker.id, request, roles }, payload.len())?;
            Ok(Introduction { head, along, payload })
        };
        match introduce() {
            Ok(introduction) => {
                if let Some(pid) = landlord.pid() {
                    worker.set_pid(pid);
                }
                let introduction = Some(Box::new(introduction));
                let link = Link::Lodger { landlord: landlord.id, introduction };
                self.order(Command::Watch(Arc::clone(worker), link));
                Ok(())
            }
            Err(error) => {
                if self.houses.move_out(landlord.id) {
                    self.order(Command::Kill(landlord.id, Reason::OwnerDied));
                }
                Err(error)
            }
        }
    }

    /// A process that does nothing by itself.
    fn build_house(&self, name: &str, request: &Request, surroundings: &Surroundings) -> Result<Arc<Worker>> {
        let landlord = Arc::new(Worker::new(Parts {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            name: name.to_owned(),
            target: "a process that others share".into(),
            backend: Backend::Forkserver,
            owner: Owner::Lodgers,
            parent: None,
            ladder: Ladder::new(Backend::Forkserver, Duration::ZERO, Duration::ZERO),
            timeout: None,
            terms: Terms::default(),
            collected: None,
        }));
        // Priorities count inside it.
        let mut request = Request { backend: Backend::Forkserver, priority: 1.0, ..request.clone() };
        set_wall(&mut request.spec, "house");
        self.spawn_forkserver(&landlord, &request, surroundings, &Parcel::new(Content::none(), Vec::new()))?;
        Ok(landlord)
    }

    /// Who starts such processes for this one: the supervisor of this process, should it be a worker.
    fn patron(&self, backend: Backend) -> Option<Arc<Context>> {
        let alone = self.on_its_own.load(Ordering::Relaxed)
            || backend.has_zygote() && self.own_zygote.load(Ordering::Relaxed);
        if alone { None } else { context::of_process() }
    }

    /// Has the worker started by `patron`. False when this process must do it by itself.
    fn spawn_elsewhere(
        &self,
        patron: &Context,
        worker: &Arc<Worker>,
        request: &mut Request,
        surroundings: &Surroundings,
        parcel: &Parcel,
    ) -> Result<bool> {
        request.name = Some(worker.name.clone());
        if request.backend == Backend::Exec && request.env.is_none() {
            request.env = Some(environment());
        }
        let told = serde_json::to_value(&*request)
            .map_err(|error| Error::invalid(format!("a request that is no JSON: {error}")))?;
        let reply = Arc::new(Slot::default());
        // Known to the reactor before there can be news of it.
        self.order(Command::Watch(Arc::clone(worker), Link::Elsewhere(Some(Arc::clone(&reply)))));
        let (payload, roles, along) = surroundings.with(parcel)?;
        let along: Vec<_> = along.iter().map(AsFd::as_fd).collect();
        let standing = surroundings.standing();
        let parent = self.parent_of(worker);
        let wish = Wish::Spawn { request: told, standing, roles, parent };
        let answer = match patron.wish(worker.id, wish, &payload, &along) {
            Ok(()) => self.await_answer(worker.id, &reply),
            Err(error) => Err(error),
        };
        match answer {
            Ok(Answer::Spawned) => Ok(true),
            Ok(Answer::Refused { error, confined }) => {
                self.order(Command::Forget(worker.id));
                if confined {
                    self.on_its_own.store(true, Ordering::Relaxed);
                    return Ok(false);
                }
                Err(error)
            }
            Err(error) => {
                self.order(Command::Forget(worker.id));
                Err(error)
            }
        }
    }

    /// Waits until the supervisor of this process has started a worker for it, or not.
    fn await_answer(&self, id: u64, reply: &Slot<Answer>) -> Result<Answer> {
        let deadline = Instant::now() + zygote::START_BOUND + SPAWN_BOUND;
        let waited = reply.wait_until(Some(deadline));
        reply.take(Some(Instant::now())).ok_or_else(|| {
            // If it is made after all, nobody wants it any more.
            self.order(Command::Kill(id, Reason::Killed));
            match waited {
                Wait::Interrupted => Error::interrupted(),
                _ => Error::timed_out("the supervisor of this worker did not start another one in time"),
            }
        })
    }

    /// Starts a worker for a worker process, on the thread for that, which says what came of it.
    pub(in crate::supervise) fn have_spawned(
        self: &Arc<Self>,
        asker: (u64, u64),
        pid: i32,
        parent: u64,
        order: impl FnOnce() -> Result<(Request, Surroundings, Parcel)> + Send + 'static,
    ) {
        let supervisor = Arc::clone(self);
        let made = self.clerk.give(move || {
            let made = match is_as_free(pid) {
                Ok(true) => order().and_then(|(request, surroundings, parcel)| {
                    supervisor.spawn_for(asker, parent, request, surroundings, parcel)
                }),
                Ok(false) => {
                    let error = Error::state("the supervisor starts no worker for one that is confined");
                    supervisor.order(Command::Refused(asker, error, true));
                    return;
                }
                Err(error) => Err(error),
            };
            if let Err(error) = made {
                supervisor.order(Command::Refused(asker, error, false));
            }
        });
        if let Err(error) = made {
            self.order(Command::Refused(asker, error, false));
        }
    }

    /// Starts the zygote anew, so that it imports these modules, and waits until it is ready. It makes its
    /// first blanks meanwhile.
    ///
    /// # Errors
    /// When it does not start; interrupted, when a signal arrived meanwhile.
    pub fn preload(
        &self,
        command: Vec<String>,
        spec: &serde_json::Value,
        modules: &[String],
        asked: Option<usize>,
    ) -> Result<()> {
        if self.closing.load(Ordering::Acquire) {
            return Err(Error::state("tractor_host is shutting down: nothing can be preloaded any more"));
        }
        let order = zygote_order(spec, modules)?;
        // A worker's supervisor has one too, for whom this must not change it.
        self.own_zygote.store(true, Ordering::Relaxed);
        self.zygote.renew(&order, || self.start_zygote(command, order.clone()))?;
        self.blanks.store(blanks(asked), Ordering::Relaxed);
        self.zygote.refill(None, blanks(asked));
        Ok(())
    }

    fn start_zygote(&self, command: Vec<String>, order: Vec<u8>) -> Result<zygote::Started> {
        let (ours, theirs) = fd::channel_pair()?;
        let boot_log = memfile::create("th-zygote")?;
        let kept_log = fd::duplicate(&boot_log)?;
        // It is nobody's worker: it has the environment and the directory of this process, and no output.
        let null = fd::open("/dev/null".as_ref(), rustix::fs::OFlags::WRONLY)?;
        let child = self.start_process(move || exec::spawn(&command, None, theirs, null, boot_log))?;
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
    fn watch_fresh(&self, worker: &Arc<Worker>, mut process: Process, task: Task) {
        let Task { head, along, payload } = task;
        // What the process takes in with one read wakes it once.
        if head.len() + payload.len() <= fd::AT_ONCE {
            process.post_with_fds([&head[..], &payload[..]].concat(), along);
        } else {
            process.post_with_fds(head, along);
            process.post(payload);
        }
        // What there is no room for yet is sent by the supervisor's thread, which need not be waited for now;
        // and that finds a failure again.
        let _ = process.flush();
        self.watch(worker, process);
    }

    fn watch(&self, worker: &Arc<Worker>, process: Process) {
        worker.set_pid(process.pid());
        self.order(Command::Watch(Arc::clone(worker), Link::Process(Box::new(process))));
    }
}

/// What a worker has that was not opened here.
enum Given {
    Nothing,
    Streams(Streams),
    Surroundings(Box<Surroundings>),
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
        self.supervisor.scheduler.shares_gil(self.worker.id);
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

/// What a process is told over its channel.
struct Task {
    head: Vec<u8>,
    /// Goes beside the head.
    along: Vec<Arc<OwnedFd>>,
    /// Follows the head.
    payload: Arc<Vec<u8>>,
}

impl Task {
    fn new(worker: &Worker, request: &Request, surroundings: &Surroundings, parcel: &Parcel) -> Result<Self> {
        let (payload, roles, along) = surroundings.with(parcel)?;
        let contract = contract(worker, surroundings.umask());
        let spec = ToWorker::Spec { spec: request.spec.clone(), contract, roles };
        let head = message::encode(&spec, payload.len())?;
        Ok(Self { head, along, payload })
    }
}

/// How many blanks are kept ready of a kind.
pub(super) fn blanks(asked: Option<usize>) -> usize {
    // A worker that has a fork server of its own does not spawn much, mostly, and there may be many of those.
    asked.unwrap_or(if context::of_process().is_some() { 0 } else { BLANKS })
}

/// The default: one after the other is what a single thread spawns.
const BLANKS: usize = 1;

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

/// Gives a new process the nice value that comes nearest to its priority: a step of that is a weight of 1.25 to 1.
///
/// # Errors
/// EPERM or EACCES, where that takes a right that this process lacks. The child is ended then.
fn favour(child: Child, priority: f64) -> Result<Child> {
    let steps = -(priority.ln() / 1.25_f64.ln()).round();
    if steps == 0.0 {
        return Ok(child);
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a priority is within bounds, which give some 20 steps"
    )]
    match child.be_nicer(steps as i32) {
        Ok(()) => Ok(child),
        Err(error) => {
            child.destroy();
            Err(error)
        }
    }
}

/// Tells `_child` another kind of worker than was asked for.
fn set_wall(spec: &mut serde_json::Value, wall: &str) {
    if let Some(spec) = spec.as_object_mut() {
        spec.insert("wall".into(), json!(wall));
    }
}

/// This process's environment, as a request has it.
fn environment() -> Vec<(String, String)> {
    let text = |text: std::ffi::OsString| text.into_vec().into_iter().map(char::from).collect();
    std::env::vars_os().map(|(key, value)| (text(key), text(value))).collect()
}

/// The last part of a target's name, which a thread's name has room for.
fn short(target: &str) -> &str {
    target.rsplit(['.', ':']).next().filter(|part| !part.is_empty()).unwrap_or("worker")
}
