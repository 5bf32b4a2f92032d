//! The supervisor of this process: the registry, and what API calls do to it. Decisions are the
//! reactor's; here workers are made ([`making`]) and orders passed on.

mod making;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use super::clerk::Clerk;
use super::control::{self, Control};
use super::exit::Kind;
use super::guard;
use super::house::Houses;
use super::ladder::Reason;
use super::limit::Set;
use super::reactor::{Command, Reactor};
use super::registry;
use super::scheduler::Scheduler;
use super::worker::{Owner, State, Told, Worker};
use crate::diag::{dump, hang, outlet};
use crate::error::{Error, Kind as ErrorKind, Result};
use crate::events::{self, fault};
use crate::interp::attach::Token;
use crate::interp::door::Door;
use crate::spawn::clean::CleanThread;
use crate::spawn::context;
use crate::spawn::parcel::Content;
use crate::spawn::zygote::Zygote;
use crate::sys::event::{Event, Slot};
use crate::sys::fork_local::ForkLocal;
use crate::sys::kick::Kicker;
use crate::sys::lock::{lock, lock_within};
use crate::sys::{clock, fd, ledger, oom, thread};
use crate::wire::message::{FromWorker, Parent, Report};

static SUPERVISOR: ForkLocal<Arc<Supervisor>> = ForkLocal::new();

/// In the only thread of a fork's child: forgets the parent's workers.
pub fn forget_in_child() {
    SUPERVISOR.forget();
    guard::forget_in_child();
    ledger::forget_in_child();
    hang::forget_in_child();
}

/// All that this process knows of its workers.
pub struct Supervisor {
    pub(super) queue: Mutex<VecDeque<Command>>,
    pub(super) wake: OwnedFd,
    workers: Mutex<HashMap<u64, Arc<Worker>>>,
    clean: CleanThread,
    zygote: Zygote,
    /// How many blanks are kept ready of a kind.
    blanks: AtomicUsize,
    reactor: Mutex<Option<JoinHandle<()>>>,
    control: OnceLock<Arc<Control>>,
    next_id: AtomicU64,
    closing: AtomicBool,
    clerk: Clerk,
    pub(super) houses: Houses,
    pub(super) scheduler: Arc<Scheduler>,
    /// This process, a worker, has a fork server that imports what it was told here.
    own_zygote: AtomicBool,
    /// Its supervisor starts no workers for this one.
    on_its_own: AtomicBool,
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
            dump::set_registry(registry::tell);
            outlet::prepare();
            // A worker's timeline is that of the program.
            if context::of_process().is_none() {
                events::open()?;
            }
            Ok(Arc::new(Self {
                queue: Mutex::default(),
                wake: fd::event_fd()?,
                workers: Mutex::default(),
                clean: CleanThread::default(),
                zygote: Zygote::default(),
                blanks: AtomicUsize::new(making::blanks(None)),
                reactor: Mutex::default(),
                control: OnceLock::new(),
                next_id: AtomicU64::new(1),
                closing: AtomicBool::new(false),
                clerk: Clerk::default(),
                houses: Houses::default(),
                scheduler: Arc::default(),
                own_zygote: AtomicBool::new(false),
                on_its_own: AtomicBool::new(false),
                memory: Mutex::default(),
                counts: Mutex::default(),
                oom: Mutex::default(),
                quarantine: Mutex::default(),
            }))
        })?;
        supervisor.start()?;
        if let Some(context) = context::of_process() {
            context.listen(|| Box::new(|letter| supervisor.order(Command::Letter(letter))));
        }
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
            let places = control::wanted();
            let handle = thread::spawn_deaf("th-supervisor", move || reactor.run(places))
                .map_err(|error| Error::os("start the supervisor's thread", error))?;
            *running = Some(handle);
            tracing::debug!(target: events::SUPERVISOR, kind = "supervisor_start");
        }
        Ok(())
    }

    /// Makes the control socket, before anything else there is to do. Nobody waits for that.
    pub(super) fn open_control(&self, places: &[PathBuf]) -> Option<Arc<Control>> {
        let made = control::open(places).map(Arc::new)?;
        Some(Arc::clone(self.control.get_or_init(|| made)))
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
            "live": self.live().iter().filter(|worker| !matches!(worker.owner, Owner::Keeper { .. })).count(),
            "returned": ended(Kind::Returned),
            "raised": ended(Kind::Raised),
            "cancelled": ended(Kind::Cancelled),
            "killed": ended(Kind::Killed),
            "signalled": ended(Kind::Signalled),
            "exited": ended(Kind::Exited),
            "abandoned": ended(Kind::Abandoned),
            "quarantined": counts.abandoned_now,
            "reclaimed": counts.reclaimed,
            "blanks": self.zygote.blanks(),
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

    /// Has a worker stand still, or go on, and waits until it was told to; a process has stopped then.
    ///
    /// # Errors
    /// When the supervisor's thread does not come round to it in time.
    pub fn pause(&self, worker: &Worker, paused: bool) -> Result<()> {
        let done = Arc::new(Slot::default());
        self.order(Command::Pause(worker.id, paused, Arc::clone(&done)));
        let late = || Error::timed_out("the supervisor's thread did not pause or resume the worker in time");
        match lock(&self.reactor).is_some() {
            true => done.take(Some(Instant::now() + PAUSE_BOUND)).ok_or_else(late),
            // After shutdown no worker is left.
            false => Ok(()),
        }
    }

    /// A thread of an interpreter that is no worker wants the program's terminal, by its ticket; or not any more.
    pub fn wants_terminal(&self, ticket: u64, wanted: bool) {
        self.order(Command::Terminal(ticket, wanted));
    }

    /// Begins to end a worker.
    pub fn kill(&self, worker: &Worker) {
        self.order(Command::Kill(worker.id, Reason::Killed));
    }

    /// Begins to end a worker that was asked to stop, in a way of the caller's own, and has not.
    pub fn kill_deaf(&self, worker: &Worker) {
        self.order(Command::Kill(worker.id, Reason::Deaf));
    }

    /// Gives what a worker does from now on so much time, and that in seconds, or all that it takes. Whether it is
    /// being ended because it has overrun what it was given before.
    pub fn limit(&self, worker: &Worker, bound: Option<(Duration, f64)>) -> bool {
        let set = worker.limit(|limit| limit.set(clock::now(), bound));
        if set == Set::Sooner {
            self.order(Command::Look(worker.id));
        }
        set == Set::Struck
    }

    /// Begins to end a worker for a reason of the supervisor's own.
    pub(super) fn end(&self, worker: &Worker, reason: Reason) {
        self.order(Command::Kill(worker.id, reason));
    }

    /// Begins to end all workers. A worker's own are ended by it, while it can; and with it in any case.
    pub(super) fn end_all(&self, reason: Reason) {
        for worker in self.live() {
            if matches!(worker.owner, Owner::Interpreter(_)) {
                self.end(&worker, reason);
            }
        }
    }

    /// Has this process, a worker, be home to others until it is ended.
    pub fn be_home(&self) -> ! {
        loop {
            Event::new().wait_through_signals(None);
        }
    }

    /// The fork server.
    pub fn zygote(&self) -> &Zygote {
        &self.zygote
    }

    /// Ends every worker, then the supervisor's own threads. No worker can be spawned afterwards.
    /// Returns how many workers had to be left behind.
    ///
    /// # Errors
    /// Interrupted, when a signal arrived: call it again to go on waiting.
    pub fn shut_down(&self, in_subinterpreter: bool) -> Result<u64> {
        self.closing.store(true, Ordering::Release);
        self.end_all(Reason::Shutdown);
        self.await_all(in_subinterpreter)?;
        self.clerk.stop();
        // What that has made meanwhile for one that has ended is ended too.
        self.await_all(in_subinterpreter)?;
        self.order(Command::Stop);
        if let Some(handle) = lock(&self.reactor).take() {
            // Its panic has been printed; nothing is left to do about it.
            let _ = handle.join();
        }
        self.scheduler.stop();
        self.zygote.stop();
        self.clean.stop();
        if let Some(control) = self.control.get() {
            control.close();
        }
        tracing::debug!(target: events::SUPERVISOR, kind = "supervisor_end");
        events::trace::close();
        Ok(lock(&self.counts).abandoned_now)
    }

    fn await_all(&self, in_subinterpreter: bool) -> Result<()> {
        for worker in self.live().into_iter().chain(self.houses.standing()) {
            // Bounded by the worker's ladder, whose last rung is to give it up.
            worker.wait(None, in_subinterpreter)?;
        }
        Ok(())
    }

    /// Enters a worker that another process runs by itself. Nobody here has a handle to it.
    ///
    /// # Errors
    /// When what is told of it can't be.
    pub(super) fn enter(&self, owner: Owner, parent: u64, told: Told) -> Result<Arc<Worker>> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let worker = Arc::new(Worker::told(id, owner, parent, told)?);
        lock(&self.workers).insert(id, Arc::clone(&worker));
        Ok(worker)
    }

    /// As [`Supervisor::report`], that there is one.
    pub(super) fn report_made(&self, worker: &Worker) {
        let report = Report::Made { info: worker.info(), parent: self.parent_of(worker) };
        self.report(worker, report);
    }

    /// Which worker wants this one, as the supervisor of this process knows it.
    fn parent_of(&self, worker: &Worker) -> Option<Parent> {
        let parent = worker.parent.and_then(|parent| self.worker(parent).ok())?;
        Some(match parent.owner {
            Owner::Patron(lodger) => Parent::Lodger(lodger),
            _ => Parent::Own(parent.id),
        })
    }

    /// Tells the supervisor that this process is a worker of, if it is one, of a worker that this one runs.
    pub(super) fn report(&self, worker: &Worker, report: Report) {
        if context::of_process().is_some() {
            self.tell_patron(FromWorker::Own { id: worker.id, report }, None);
        }
    }

    /// Says something to the supervisor that this process is a worker of, on a thread that can wait for that.
    pub(super) fn tell_patron(&self, message: FromWorker, content: Option<Content>) {
        let told = self.clerk.give(move || {
            let content = content.unwrap_or_else(Content::none);
            let sent = context::of_process().map_or(Ok(()), |patron| patron.send(&message, &content));
            if let Err(error) = sent {
                fault!("{error}");
            }
        });
        if let Err(error) = told {
            fault!("{error}");
        }
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

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    pub(super) fn forget(&self, id: u64) {
        lock(&self.workers).remove(&id);
    }

    pub(super) fn quarantine(&self, worker: Arc<Worker>, door: Arc<Door>) {
        lock(&self.quarantine).insert(worker.id, (worker, door));
    }

    /// All workers that are known, unless the registry is locked for longer than that.
    pub(super) fn workers_within(&self, bound: Duration) -> Option<Vec<Arc<Worker>>> {
        lock_within(&self.workers, bound).map(|workers| workers.values().cloned().collect())
    }

    /// The numbers of the subinterpreters that could not be ended, as above.
    pub(super) fn quarantined_within(&self, bound: Duration) -> Option<Vec<u64>> {
        lock_within(&self.quarantine, bound).map(|quarantine| quarantine.keys().copied().collect())
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

/// How long pausing a worker may wait for the reactor.
const PAUSE_BOUND: Duration = Duration::from_secs(30);

/// What came of asking somebody else to start a worker.
pub(super) enum Answer {
    /// There is one.
    Spawned,
    /// There is none.
    Refused {
        /// Why.
        error: Error,
        /// This process is to start it.
        confined: bool,
    },
}
