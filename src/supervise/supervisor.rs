//! The supervisor of this process: the registry, and what API calls do to it. Decisions are the
//! reactor's; here workers are made ([`making`]) and orders passed on.

mod making;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::json;

use super::clerk::Clerk;
use super::exit::Kind;
use super::house::Houses;
use super::ladder::Reason;
use super::reactor::{Command, Reactor};
use super::worker::{Owner, State, Told, Worker};
use crate::error::{Error, Kind as ErrorKind, Result};
use crate::interp::attach::Token;
use crate::interp::door::Door;
use crate::spawn::clean::CleanThread;
use crate::spawn::context;
use crate::spawn::parcel::Content;
use crate::spawn::zygote::Zygote;
use crate::sys::event::Event;
use crate::sys::fork_local::ForkLocal;
use crate::sys::kick::Kicker;
use crate::sys::lock::lock;
use crate::sys::{fd, log, oom, thread};
use crate::wire::message::{FromWorker, Parent, Report};

static SUPERVISOR: ForkLocal<Arc<Supervisor>> = ForkLocal::new();

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
    /// How many blanks are kept ready of a kind.
    blanks: AtomicUsize,
    reactor: Mutex<Option<JoinHandle<()>>>,
    next_id: AtomicU64,
    closing: AtomicBool,
    clerk: Clerk,
    pub(super) houses: Houses,
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
            Ok(Arc::new(Self {
                queue: Mutex::default(),
                wake: fd::event_fd()?,
                workers: Mutex::default(),
                clean: CleanThread::default(),
                zygote: Zygote::default(),
                blanks: AtomicUsize::new(making::blanks(None)),
                reactor: Mutex::default(),
                next_id: AtomicU64::new(1),
                closing: AtomicBool::new(false),
                clerk: Clerk::default(),
                houses: Houses::default(),
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

    /// Begins to end a worker.
    pub fn kill(&self, worker: &Worker) {
        self.order(Command::Kill(worker.id, Reason::Killed));
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
        for worker in self.live() {
            // A worker's own are ended by it, while it can; and with it in any case.
            if matches!(worker.owner, Owner::Interpreter(_)) {
                self.order(Command::Kill(worker.id, Reason::Shutdown));
            }
        }
        self.await_all(in_subinterpreter)?;
        self.clerk.stop();
        // What that has made meanwhile for one that has ended is ended too.
        self.await_all(in_subinterpreter)?;
        self.order(Command::Stop);
        if let Some(handle) = lock(&self.reactor).take() {
            // Its panic has been printed; nothing is left to do about it.
            let _ = handle.join();
        }
        self.zygote.stop();
        self.clean.stop();
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
                log::line(format_args!("{error}"));
            }
        });
        if let Err(error) = told {
            log::line(format_args!("{error}"));
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
