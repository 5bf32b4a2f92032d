//! The supervisor's one thread: an epoll loop over pidfds, channels and orders, with timers. All
//! decisions about a worker's end are made here, one after the other. It never waits for Python, for
//! a worker or for a lock that is held across a wait.

mod debugging;
mod pausing;
mod process;
mod relations;
mod witness;

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::process::Signal;

use debugging::Debugging;
pub(super) use process::Process;
use relations::ask_for;
use witness::Witness;

use super::control::Control;
use super::exit::{Exit, Kind, Seen};
use super::ladder::{Climb, Reason, Rung};
use super::limit::Look;
use super::scheduler::policy::Terms;
use super::supervisor::{Answer, Supervisor};
use super::worker::{Owner, State, Worker};
use crate::error::{Error, Result};
use crate::events::fault;
use crate::interp::door::Door;
use crate::interp::rungs::pressure::Pressure;
use crate::spawn::context::Letter;
use crate::spawn::parcel::Content;
use crate::sys::event::Slot;
use crate::sys::kick;
use crate::sys::lock::lock;
use crate::sys::process::{Child, Status};
use crate::sys::{clock, fd, ledger, memfile, thread, tree};
use crate::wire::message::{self, FromWorker, News, Report, ToWorker, Wish};

/// An order to the reactor.
pub(super) enum Command {
    /// There is a new worker.
    Watch(Arc<Worker>, Link),
    /// There is none after all.
    Forget(u64),
    /// Run this here, because it forks.
    Start(Box<dyn FnOnce() -> Result<Child> + Send>, Arc<Slot<Result<Child>>>),
    /// The thread of a subinterpreter worker is there.
    RunnerStarted(u64, JoinHandle<()>),
    /// A subinterpreter worker said something.
    Said(u64, FromWorker, Content),
    /// All code of a subinterpreter worker is over.
    CodeOver(u64),
    /// A subinterpreter worker's target is over, but this many of its threads are not.
    Stuck(u64, usize),
    /// A runner's interpreters are gone.
    RunnerEnded(u64, Vec<i64>, Option<String>),
    /// A worker process cannot have the worker that it asked for: by its number here and the other's there.
    Refused((u64, u64), Error, bool),
    /// The supervisor of this process, a worker, has written about other workers.
    Letter(Letter),
    /// Ask it to stop.
    Cancel(u64),
    /// Have it stand still, or go on, and say when that is done.
    Pause(u64, bool, Arc<Slot<()>>),
    /// A thread of the program itself wants the terminal, by this ticket, or not any more.
    Terminal(u64, bool),
    /// End it.
    Kill(u64, Reason),
    /// Look at the time limit of what it does just now.
    Look(u64),
    /// Nobody looks after the control socket any more.
    Unattended,
    /// Leave.
    Stop,
}

/// How a worker is reached.
pub(super) enum Link {
    /// A process, by its channel and its pidfd.
    Process(Box<Process>),
    /// A subinterpreter, by the door to it.
    Subint(Arc<Door>),
    /// A process that the supervisor of this process owns. Who waits for it to be made is told here.
    Elsewhere(Option<Arc<Slot<Answer>>>),
    /// One that a worker process runs by itself.
    Kept,
    /// A subinterpreter in a process that others may live in too.
    Lodger {
        /// That process, a worker too.
        landlord: u64,
        /// What tells it of this one, until that is sent.
        introduction: Option<Box<Introduction>>,
    },
}

/// What tells a process of a worker that is to live there.
pub(super) struct Introduction {
    pub(super) head: Vec<u8>,
    /// Goes beside the head.
    pub(super) along: Vec<Arc<OwnedFd>>,
    pub(super) payload: Arc<Vec<u8>>,
}

/// A worker, as the reactor knows it.
struct Entry {
    worker: Arc<Worker>,
    link: Link,
    seen: Seen,
    climb: Option<Climb>,
    /// When somebody first asked for its end.
    asked: Option<Instant>,
    /// How hard a subinterpreter is pressed, for the thread that does so.
    pressure: Arc<Pressure>,
    /// The rung at which all code of a subinterpreter was over.
    over_at: Option<Rung>,
    /// The thread of a subinterpreter, once it is known, and whether it has said its last word. The
    /// two can come in either order.
    runner: Option<JoinHandle<()>>,
    runner_ended: bool,
    /// Its end has been published, but it is still there.
    abandoned: bool,
    /// It is gone, and what was started for it is not yet.
    over: bool,
    /// How it has ended, which is told once the process is gone that was its alone by then.
    verdict: Option<Exit>,
    /// It stands still.
    still: bool,
    /// It is to end: it does not stand still, whoever wants that.
    freed: bool,
    /// When to look at the time limit of what it does.
    look_at: Option<Instant>,
}

impl Entry {
    /// Whether it is no business of the supervisor that this process may be a worker of: that one is told of it.
    fn is_run_here(&self) -> bool {
        matches!(self.worker.owner, Owner::Interpreter(_) | Owner::Keeper { .. })
            && !matches!(self.link, Link::Elsewhere(_))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Alarm {
    Timeout,
    /// The time limit of what it does just now is to be looked at.
    Limit,
    Rung,
    /// The channel was closed some time ago.
    Silent,
    /// What is below it was stopped, and may go on.
    Thaw,
    /// The process that it lives in should have ended it by now.
    Unanswered,
}

/// How much longer than the ladder a process may take to tell what came of it.
const ANSWERING: Duration = Duration::from_millis(500);

/// How many descriptors may have come from a worker before the messages that say what for.
const MOST_UNASKED: usize = 256;

/// How long a process may live on after its channel was closed: it flushes its files, say.
const LEAVING: Duration = Duration::from_secs(1);

/// The loop and what it alone owns.
pub(super) struct Reactor {
    supervisor: Arc<Supervisor>,
    epoll: OwnedFd,
    entries: HashMap<u64, Entry>,
    alarms: BTreeSet<(Instant, u64, Alarm)>,
    /// What workers have asked for and is being made, by their number here and its number there; with the
    /// reason to end it at once, if there is one by now.
    asked: HashMap<(u64, u64), Option<Reason>>,
    control: Option<Arc<Control>>,
    debugging: Debugging,
    witness: Witness,
}

/// Event data: 0 is the order queue, 1 the control socket; a worker, whose number is at least 1, has two of its own.
const ORDERS: u64 = 0;
const VISITORS: u64 = 1;

fn pidfd_data(id: u64) -> u64 {
    id * 2
}

fn channel_data(id: u64) -> u64 {
    id * 2 + 1
}

impl Reactor {
    pub(super) fn new(supervisor: Arc<Supervisor>) -> Result<Self> {
        let failed = |errno: Errno| Error::os("make the supervisor's epoll", errno);
        let epoll = fd::above_stdio(epoll::create(CreateFlags::CLOEXEC).map_err(failed)?)?;
        tree::keep_room()?;
        epoll::add(&epoll, &supervisor.wake, EventData::new_u64(ORDERS), EventFlags::IN).map_err(failed)?;
        Ok(Self {
            supervisor,
            epoll,
            entries: HashMap::new(),
            alarms: BTreeSet::new(),
            asked: HashMap::new(),
            control: None,
            debugging: Debugging::default(),
            witness: Witness::default(),
        })
    }

    pub(super) fn run(mut self, control: Option<Vec<PathBuf>>) {
        if let Some(places) = control {
            self.control = self.supervisor.open_control(&places);
            self.look_at_control(|epoll, socket, data, flags| epoll::add(epoll, socket, data, flags));
        }
        let mut events = Vec::with_capacity(256);
        loop {
            let now = Instant::now();
            let look_at = self.supervisor.scheduler.look(now);
            let next = self.alarms.first().map(|(at, ..)| *at).into_iter().chain(look_at).min();
            let timeout = next.map(|at| thread::timespec(at.saturating_duration_since(now)));
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => fault!("epoll failed in the supervisor: {errno}"),
            }
            for event in &events {
                match event.data.u64() {
                    ORDERS => fd::lower(&self.supervisor.wake),
                    VISITORS => {
                        if let Some(control) = &self.control
                            && !control.attend(&self.supervisor)
                        {
                            self.look_at_control(|epoll, socket, data, flags| {
                                epoll::modify(epoll, socket, data, flags)
                            });
                        }
                    }
                    data if data % 2 == 0 => self.process_ended(data / 2),
                    data => self.channel_ready(data / 2, event.flags),
                }
            }
            if self.obey() {
                return;
            }
            self.ring(Instant::now());
        }
    }

    /// Carries out the orders that have come. Whether to leave.
    fn obey(&mut self) -> bool {
        loop {
            let Some(command) = lock(&self.supervisor.queue).pop_front() else { return false };
            match command {
                Command::Watch(worker, link) => self.watch(worker, link),
                Command::Forget(id) => {
                    self.supervisor.scheduler.leave(id);
                    self.entries.remove(&id);
                }
                Command::Start(job, reply) => {
                    if let Err(Ok(child)) = reply.fill(job()) {
                        child.destroy();
                    }
                }
                Command::Said(id, message, content) => self.said(id, message, content, Vec::new()),
                Command::Refused((asker, theirs), error, confined) => {
                    self.asked.remove(&(asker, theirs));
                    let news = News::Refused { error: error.into(), confined };
                    self.tell_asker(asker, theirs, news, None);
                }
                Command::Letter(letter) => self.read(letter),
                Command::CodeOver(id) => {
                    self.supervisor.scheduler.leave(id);
                    if let Some(entry) = self.entries.get_mut(&id) {
                        entry.over_at = entry.climb.map(Climb::rung);
                    }
                }
                Command::Stuck(id, threads) => self.stuck(id, threads),
                Command::RunnerStarted(id, runner) => {
                    if let Some(entry) = self.entries.get_mut(&id) {
                        entry.runner = Some(runner);
                        self.runner_gone(id);
                    }
                }
                Command::RunnerEnded(id, interpreters, error) => self.runner_ended(id, &interpreters, error),
                Command::Cancel(id) => self.cancel(id),
                Command::Pause(id, paused, done) => {
                    self.pause(id, paused);
                    // Failing: nobody waits for it any more.
                    let _ = done.fill(());
                }
                Command::Terminal(ticket, wanted) => self.wants_terminal(None, ticket, wanted),
                Command::Kill(id, reason) => {
                    // What it has said already (that it runs, say) decides where the ladder begins.
                    self.read_channel(id);
                    self.kill(id, reason);
                }
                Command::Look(id) => self.look(id),
                Command::Unattended => {
                    self.look_at_control(|epoll, socket, data, flags| {
                        epoll::modify(epoll, socket, data, flags)
                    });
                }
                Command::Stop => return true,
            }
        }
    }

    /// Has the next one who comes to the control socket seen, once.
    fn look_at_control(
        &self,
        with: impl FnOnce(&OwnedFd, BorrowedFd<'_>, EventData, EventFlags) -> rustix::io::Result<()>,
    ) {
        if let Some(control) = &self.control
            && let Err(errno) = with(
                &self.epoll,
                control.listener(),
                EventData::new_u64(VISITORS),
                EventFlags::IN | EventFlags::ONESHOT,
            )
        {
            fault!("epoll failed for the control socket: {errno}");
        }
    }

    fn watch(&mut self, worker: Arc<Worker>, mut link: Link) {
        let id = worker.id;
        let mut failure = None;
        if let Link::Process(process) = &mut link {
            let flushed = process.flush();
            let wants = if flushed == Ok(true) { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            let added = epoll::add(
                &self.epoll,
                process.child.pidfd(),
                EventData::new_u64(pidfd_data(id)),
                EventFlags::IN,
            );
            let added = added.and_then(|()| match &process.channel {
                Some(channel) => {
                    epoll::add(&self.epoll, channel, EventData::new_u64(channel_data(id)), wants)
                }
                None => Ok(()),
            });
            failure = flushed.and(added).err();
            // It is on its way by now, and waits for nothing.
            process.oom = Some(lock(&self.supervisor.oom).before(process.pid()));
        }
        if let Some(timeout) = worker.timeout
            && !matches!(link, Link::Elsewhere(_))
            && let Ok(timeout) = crate::spawn::request::seconds("timeout", timeout)
        {
            self.alarms.insert((worker.created + timeout, id, Alarm::Timeout));
        }
        let entry = Entry {
            worker,
            link,
            seen: Seen::default(),
            climb: None,
            asked: None,
            pressure: Arc::default(),
            over_at: None,
            runner: None,
            runner_ended: false,
            abandoned: false,
            over: false,
            verdict: None,
            still: false,
            freed: false,
            look_at: None,
        };
        if entry.is_run_here() {
            self.supervisor.report_made(&entry.worker);
        }
        if let Link::Subint(door) = &entry.link {
            self.supervisor.scheduler.enter(id, door, entry.worker.terms);
        }
        // One that is elsewhere is told of when it is there.
        if !matches!(entry.link, Link::Elsewhere(_)) {
            let home = match entry.link {
                Link::Lodger { landlord, .. } => self.entries.get(&landlord).map(|home| &home.worker),
                _ => Some(&entry.worker).filter(|worker| worker.owner == Owner::Lodgers),
            };
            tell_of(&entry.worker, home.map(|home| home.name.as_str()));
        }
        let owner = entry.worker.owner;
        // One that is elsewhere has none yet.
        let pid = entry.worker.pid();
        if let (Some(pid), Link::Process(_) | Link::Kept) = (pid, &entry.link) {
            ledger::note(pid, entry.worker.backend.name(), &entry.worker.name);
        }
        self.entries.insert(id, entry);
        if !self.move_in(id) {
            return;
        }
        if let Some(errno) = failure {
            // Its end would go unseen: end it now, while we hold it.
            self.fail(id, errno.to_string());
        }
        self.still(id);
        self.tell_of_hold(id);
        match owner {
            // The order to end all that there is has come before it.
            Owner::Interpreter(_) if self.supervisor.is_closing() => self.kill(id, Reason::Shutdown),
            Owner::Interpreter(_) | Owner::Patron(_) | Owner::Lodgers | Owner::Keeper { .. } => {}
            Owner::Worker { id: asker, theirs } => self.hand_over(id, asker, theirs, pid),
        }
    }

    /// Ends a process worker on the spot because the supervisor can't serve it.
    fn fail(&mut self, id: u64, failure: String) {
        let Some(mut entry) = self.entries.remove(&id) else { return };
        if let Link::Process(process) = &entry.link {
            if let Err(error) = process.child.signal(Signal::KILL) {
                fault!("{error}");
            }
            process.child.kill_group();
        }
        let worker = &entry.worker;
        // Its end says so too.
        tell!(INFO, SUPERVISOR, "fault", worker, "worker `{}` can't be watched: {failure}", worker.name);
        tell!(DEBUG, LADDER, "signal", worker, signal = libc::SIGKILL);
        entry.seen.failure = Some(failure);
        entry.seen.rung = Some((Rung::Sigkill, Reason::Unwatched));
        entry.seen.status = match entry.link {
            Link::Process(process) => {
                process.child.destroy();
                Some(Status::Signalled { signal: libc::SIGKILL, core: false })
            }
            Link::Subint(_) | Link::Elsewhere(_) | Link::Lodger { .. } | Link::Kept => None,
        };
        self.publish(&entry.worker, &entry.seen, entry.asked);
    }

    fn channel_ready(&mut self, id: u64, flags: EventFlags) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let Link::Process(process) = &mut entry.link else { return };
        if flags.contains(EventFlags::OUT) {
            match process.flush() {
                Ok(true) => {}
                Ok(false) => Self::want(&self.epoll, process, id, EventFlags::IN),
                Err(errno) => {
                    self.fail(id, format!("it could not be told what to do: {errno}"));
                    return;
                }
            }
        }
        if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            self.read_channel(id);
        }
    }

    fn want(epoll: &OwnedFd, process: &Process, id: u64, flags: EventFlags) {
        if let Some(channel) = &process.channel
            && let Err(errno) = epoll::modify(epoll, channel, EventData::new_u64(channel_data(id)), flags)
        {
            fault!("epoll failed for worker {id}: {errno}");
        }
    }

    /// Takes in all that the worker has written so far.
    fn read_channel(&mut self, id: u64) {
        /// At most this much in one go, so that one worker can't keep all others waiting.
        const FAIR_SHARE: usize = 4 << 20;
        let mut chunk = vec![0; 1 << 18];
        let mut taken = 0;
        let mut broken = None;
        let mut messages = Vec::new();
        let over;
        {
            let Some(entry) = self.entries.get_mut(&id) else { return };
            let Link::Process(process) = &mut entry.link else { return };
            let Some(channel) = &process.channel else { return };
            let mut closed = false;
            // A worker that has ended writes no more: then all of it is taken, and nothing of what somebody may
            // be writing who was left with a copy of its end.
            let share = match entry.seen.status {
                Some(_) => rustix::io::ioctl_fionread(channel).map_or(0, |queued| queued as usize),
                None => FAIR_SHARE,
            };
            while taken < share && process.arrived.len() <= MOST_UNASKED {
                let room = chunk.len().min(share - taken);
                match fd::receive(channel, &mut chunk[..room], &mut process.arrived) {
                    Ok(0) => closed = true,
                    Ok(count) => {
                        taken += count;
                        process.decoder.push(&chunk[..count]);
                        continue;
                    }
                    Err(Errno::INTR) => continue,
                    Err(Errno::AGAIN) => {}
                    Err(_) => closed = true,
                }
                break;
            }
            while broken.is_none() {
                match process.decoder.next_frame() {
                    Ok(Some(frame)) => match process.open(frame) {
                        Ok(opened) => messages.push(opened),
                        Err(error) => broken = Some(error),
                    },
                    Ok(None) => break,
                    Err(error) => broken = Some(error),
                }
            }
            // One that belongs to a message comes with its first byte.
            let unasked = if process.decoder.is_mid_frame() { MOST_UNASKED } else { 0 };
            if process.arrived.len() > unasked {
                broken.get_or_insert_with(|| {
                    Error::protocol("it sent more descriptors than it has told what for")
                });
            }
            if !process.decoder.is_mid_frame() {
                process.arrived.begin_anew();
            }
            // Asked before it can notice that the channel is closed, and leave for that.
            over = broken.is_some() && process.has_ended();
            if closed || broken.is_some() {
                process.hang_up();
            }
            let is_all = closed || entry.seen.status.is_some();
            if is_all && broken.is_none() && process.decoder.is_mid_frame() {
                // It died in the middle of a message, mostly; that it did is told with its end.
                entry.seen.failure = Some("it closed the channel in the middle of a message".into());
            }
        }
        for (message, content, along) in messages {
            self.said(id, message, content, along);
        }
        let Some(entry) = self.entries.get_mut(&id) else { return };
        match broken {
            Some(error) => {
                entry.seen.failure = Some(error.to_string());
                if !over {
                    self.climb(id, Reason::Protocol);
                }
            }
            None => {
                // A worker that closes its channel is dying, mostly, and its pidfd will say so in a
                // moment. If not, it can't be reached any more and will never tell us anything.
                let Link::Process(process) = &entry.link else { return };
                if process.channel.is_none() && entry.seen.status.is_none() {
                    self.alarms.insert((Instant::now() + LEAVING, id, Alarm::Silent));
                }
            }
        }
    }

    fn said(&mut self, id: u64, message: FromWorker, content: Content, along: Vec<OwnedFd>) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if let Some(outcome) = message.outcome() {
            tell!(DEBUG, WORKER, "told", entry.worker, outcome);
        }
        match message {
            FromWorker::Started => {
                entry.seen.started = true;
                self.supervisor.scheduler.started(id);
                entry.worker.advance(State::Running);
                tell!(
                    DEBUG,
                    WORKER,
                    "started",
                    entry.worker,
                    age = entry.worker.created.elapsed().as_secs_f64()
                );
                let owner = entry.worker.owner;
                if entry.is_run_here() {
                    self.supervisor.report(&entry.worker, Report::Started);
                }
                if entry.seen.cancelled && !matches!(entry.link, Link::Lodger { .. } | Link::Kept) {
                    // It was asked before it could listen.
                    self.ask_to_stop(id);
                }
                self.tell_owner(owner, News::Started, None);
            }
            FromWorker::Returned | FromWorker::Raised { .. } => {
                entry.worker.keep_outcome(content);
                entry.seen.report = Some(message);
            }
            FromWorker::ReturnedInMemory => {
                entry.worker.keep_outcome(content);
                entry.seen.report = Some(FromWorker::Returned);
            }
            FromWorker::Refused => self.supervisor.needs_shared_gil(&entry.worker.target),
            FromWorker::Exited { .. } | FromWorker::Cancelled => entry.seen.report = Some(message),
            FromWorker::Own { id: theirs, report } => self.reported(id, theirs, report),
            FromWorker::Lodger { id: lodger, news } => self.hear_of_lodger(id, lodger, news, content),
            FromWorker::Terminal { ticket, wanted } => self.wants_terminal(Some(id), ticket, wanted),
            FromWorker::About { id: theirs, wish } => self.wished(id, theirs, wish, along, content.bytes()),
        }
    }

    fn cancel(&mut self, id: u64) {
        if self.put_off_cancel(id) {
            return;
        }
        self.set_free(id);
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.seen.cancelled = true;
        entry.asked.get_or_insert_with(Instant::now);
        entry.worker.advance(State::Cancelling);
        tell!(INFO, LADDER, "cancel", entry.worker);
        // For the rest somebody else sees to that.
        if entry.seen.started
            || matches!(entry.link, Link::Elsewhere(None) | Link::Lodger { .. } | Link::Kept)
        {
            self.ask_to_stop(id);
        }
    }

    /// Says something to a process.
    fn tell(&mut self, id: u64, message: &ToWorker, content: Option<Content>) {
        let content = content.unwrap_or_else(Content::none);
        let along = content.memory().cloned();
        self.tell_with(id, message, content.bytes(), along);
    }

    /// As above, with a payload and a descriptor.
    fn tell_with(&mut self, id: u64, message: &ToWorker, payload: Arc<Vec<u8>>, along: Option<Arc<OwnedFd>>) {
        let Some(Entry { link: Link::Process(process), .. }) = self.entries.get_mut(&id) else { return };
        match message::encode(message, payload.len()) {
            Ok(head) => {
                process.post_with_fds(head, along.into_iter().collect());
                process.post(payload);
                self.flush(id);
            }
            Err(error) => fault!("{error}"),
        }
    }

    /// Writes what a process's channel takes now, and the rest when it takes more.
    fn flush(&mut self, id: u64) {
        let Some(Entry { link: Link::Process(process), .. }) = self.entries.get_mut(&id) else { return };
        match process.flush() {
            Ok(true) => Self::want(&self.epoll, process, id, EventFlags::IN | EventFlags::OUT),
            Ok(false) => {}
            Err(errno) => {
                self.fail(id, format!("it could not be told what it has to know: {errno}"));
            }
        }
    }

    /// The action of `cancel`.
    fn ask_to_stop(&mut self, id: u64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        match &mut entry.link {
            Link::Process(_) => self.tell(id, &ToWorker::Cancel, None),
            Link::Elsewhere(_) => ask_for(id, Wish::Cancel),
            Link::Kept => {
                let owner = entry.worker.owner;
                self.tell_keeper(owner, Wish::Cancel);
            }
            Link::Lodger { landlord, .. } => {
                let landlord = *landlord;
                self.tell(landlord, &ToWorker::Lodger { id, wish: Wish::Cancel }, None);
            }
            Link::Subint(door) => {
                let door = Arc::clone(door);
                helper("th-cancel", move || {
                    if let Err(error) = door.cancel() {
                        fault!("a cancellation failed in the worker: {error}");
                    }
                });
            }
        }
    }

    /// Begins to end a worker, unless it was first: then its end is its own, and will be seen in a moment.
    fn kill(&mut self, id: u64, reason: Reason) {
        if self.put_off_kill(id, reason) {
            return;
        }
        self.set_free(id);
        match self.entries.get(&id).map(|entry| &entry.link) {
            Some(Link::Process(process)) if process.has_ended() => {}
            Some(Link::Elsewhere(_)) => {
                if let Some(entry) = self.entries.get_mut(&id) {
                    entry.worker.advance(State::Killing);
                    tell!(INFO, LADDER, "kill", entry.worker, reason = %reason);
                    ask_for(id, Wish::Kill { why: reason.into() });
                }
            }
            Some(Link::Kept) => {
                if let Some(entry) = self.entries.get_mut(&id) {
                    entry.worker.advance(State::Killing);
                    tell!(INFO, LADDER, "kill", entry.worker, reason = %reason);
                    let owner = entry.worker.owner;
                    self.tell_keeper(owner, Wish::Kill { why: reason.into() });
                }
            }
            Some(Link::Lodger { landlord, .. }) => {
                let landlord = *landlord;
                self.kill_lodger(id, landlord, reason);
            }
            _ => self.climb(id, reason),
        }
    }

    /// Looks at the time limit of what it does just now, and says when to look again.
    fn look(&mut self, id: u64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if let Some(before) = entry.look_at.take() {
            self.alarms.remove(&(before, id, Alarm::Limit));
        }
        match entry.worker.limit(|limit| limit.look(clock::now())) {
            Look::Idle => {}
            Look::After(rest) => {
                let at = Instant::now() + rest;
                entry.look_at = Some(at);
                self.alarms.insert((at, id, Alarm::Limit));
            }
            Look::Strike(seconds) => {
                // What it has said already decides where the ladder begins.
                self.read_channel(id);
                self.kill(id, Reason::TimedOut(seconds));
            }
        }
    }

    /// Begins the ladder, once.
    fn climb(&mut self, id: u64, reason: Reason) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let hurried = matches!(reason, Reason::OwnerDied | Reason::Shared(_))
            && entry.climb.is_none_or(|climb| !matches!(climb.reason, Reason::OwnerDied | Reason::Shared(_)));
        if entry.climb.is_some() && !hurried || entry.abandoned {
            return;
        }
        let now = Instant::now();
        entry.asked.get_or_insert(now);
        entry.worker.advance(State::Killing);
        tell!(INFO, LADDER, "kill", entry.worker, reason = %reason);
        if let Link::Subint(door) = &entry.link {
            door.free(true);
            self.supervisor.scheduler.leave(id);
        }
        let climb = Climb::begin(&entry.worker.ladder, reason, entry.seen.started, now);
        self.step(id, climb, reason);
    }

    /// Takes the rung, or gives the worker up where there is none.
    fn step(&mut self, id: u64, climb: Option<Climb>, reason: Reason) {
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| !entry.over) else { return };
        let Some(climb) = climb else {
            self.abandon(id, reason);
            return;
        };
        let was_asked = entry.climb.is_some() && !matches!(reason, Reason::OwnerDied | Reason::Shared(_));
        if was_asked
            && climb.rung() >= Rung::Unblock
            && climb.rung() != Rung::Sigterm
            && entry.seen.stuck.is_empty()
        {
            entry.seen.stuck = self.witness.look(&entry.link);
        }
        entry.climb = Some(climb);
        entry.seen.rung = Some((climb.rung(), reason));
        self.alarms.insert((climb.until, id, Alarm::Rung));
        let rung = climb.rung();
        let budget = climb.until.saturating_duration_since(Instant::now()).as_secs_f64();
        tell!(INFO, LADDER, "rung", entry.worker, rung = %rung, budget);
        let pressed = rung.force().filter(|_| entry.worker.backend.is_subinterpreter());
        match &mut entry.link {
            Link::Subint(_) if rung == Rung::Cancel => self.ask_to_stop(id),
            Link::Process(process) if rung == Rung::Cancel => {
                // One that was stopped would hear of it together with the next rung.
                process.signal(Signal::CONT);
                self.ask_to_stop(id);
            }
            Link::Process(process) if let Some(force) = pressed => {
                process.signal(Signal::CONT);
                self.tell(id, &ToWorker::Press { force }, None);
            }
            Link::Process(process) => {
                if let Some(number) = rung.signal() {
                    tell!(DEBUG, LADDER, "signal", entry.worker, signal = number.as_raw());
                    if process.end(number) {
                        self.alarms.insert((Instant::now() + THAW, id, Alarm::Thaw));
                    }
                }
            }
            Link::Subint(door) => {
                if let Some(force) = pressed {
                    entry.pressure.raise(door, force);
                }
            }
            // Another supervisor climbs its ladder.
            Link::Elsewhere(_) | Link::Lodger { .. } | Link::Kept => {}
        }
    }

    /// Publishes that the worker could not be ended, and goes on watching it.
    fn abandon(&mut self, id: u64, reason: Reason) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if entry.abandoned {
            return;
        }
        entry.seen.abandoned = true;
        entry.seen.rung.get_or_insert((Rung::Interrupt, reason));
        entry.abandoned = true;
        if let Link::Subint(door) = &entry.link {
            self.supervisor.quarantine(Arc::clone(&entry.worker), Arc::clone(door));
            let terms = Terms { leftovers: true, ..entry.worker.terms };
            self.supervisor.scheduler.enter(id, door, terms);
            door.free(false);
        }
        let (worker, asked) = (Arc::clone(&entry.worker), entry.asked);
        let seen = std::mem::take(&mut entry.seen);
        self.end_those_of(id);
        let (name, backend) = (&worker.name, worker.backend.name());
        tell!(
            WARN,
            LADDER,
            "quarantine",
            worker,
            "worker `{name}` ({backend}) could not be ended and is abandoned"
        );
        self.publish(&worker, &seen, asked);
    }

    fn stuck(&mut self, id: u64, threads: usize) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if entry.abandoned {
            return;
        }
        let name = entry.worker.name.clone();
        if entry.seen.report == Some(FromWorker::Returned) {
            entry.seen.failure = Some(format!("{threads} of its threads will not end"));
        }
        fault!("worker `{name}`: {threads} threads that its target left will not end");
        self.abandon(id, Reason::Killed);
    }

    /// A worker's process is gone.
    fn process_ended(&mut self, id: u64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let Link::Process(process) = &mut entry.link else { return };
        if entry.over {
            return;
        }
        // What it started and left behind goes with it; until it is reaped its group's id is its own.
        process.child.kill_group();
        process.tree.kill_with_kin(Instant::now() + TREE_BOUND);
        let ours = matches!(entry.seen.rung, Some((Rung::Sigkill, _)));
        if let (false, Some(before), Ok(Some(Status::Signalled { signal: libc::SIGKILL, .. }))) =
            (ours, &process.oom, process.child.peek())
        {
            entry.seen.oom = lock(&self.supervisor.oom).compare(before, process.pid());
        }
        // Until it is reaped its number is its own.
        ledger::strike(process.pid());
        match process.child.try_wait() {
            Ok(Some(status)) => entry.seen.status = Some(status),
            Ok(None) => return,
            Err(error) => {
                entry.seen.failure = Some(error.to_string());
                entry.seen.status = Some(Status::Lost);
            }
        }
        // Its last words may still be in the channel.
        self.read_channel(id);
        if let Some(entry) = self.entries.get(&id) {
            let (code, signal) = match entry.seen.status {
                Some(Status::Exited(code)) => (Some(code), None),
                Some(Status::Signalled { signal, .. }) => (None, Some(signal)),
                Some(Status::Lost) | None => (None, None),
            };
            tell!(DEBUG, WORKER, "reap", entry.worker, code, signal);
        }
        self.gone(id);
    }

    fn runner_ended(&mut self, id: u64, interpreters: &[i64], error: Option<String>) {
        if let Some(entry) = self.entries.get_mut(&id) {
            if let Some(error) = error {
                entry.seen.failure.get_or_insert(error);
            }
            entry.runner_ended = true;
            self.runner_gone(id);
        }
        // Who was spawned by it has no owner any more.
        let orphans: Vec<u64> = self
            .entries
            .values()
            .filter(|entry| matches!(entry.worker.owner, Owner::Interpreter(owner) if interpreters.contains(&owner)))
            .map(|entry| entry.worker.id)
            .collect();
        for orphan in orphans {
            self.kill(orphan, Reason::OwnerGone);
        }
    }

    /// If a runner has said its last word: sees it leave, so that whoever hears of its end finds no
    /// thread of it any more.
    fn runner_gone(&mut self, id: u64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if entry.runner_ended
            && let Some(runner) = entry.runner.take()
        {
            // Past its last word it only returns. It catches its panics and reports them.
            let _ = runner.join();
            tell!(DEBUG, WORKER, "reap", entry.worker);
            self.gone(id);
        }
    }

    /// The worker is really gone: publishes its end, unless it had been given up before.
    fn gone(&mut self, id: u64) {
        self.forget_debugger(id);
        if self.end_those_of(id) {
            // Its own end is told when they have ended.
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.over = true;
                if let Link::Process(process) = &entry.link
                    && let Err(errno) = epoll::delete(&self.epoll, process.child.pidfd())
                {
                    fault!("epoll failed for worker {id}: {errno}");
                }
            }
            return;
        }
        let Some(mut entry) = self.entries.remove(&id) else { return };
        entry.pressure.end();
        self.supervisor.scheduler.leave(id);
        if let (Link::Subint(door), Some((rung, reason))) = (&entry.link, entry.seen.rung) {
            // What the ladder went on to while the interpreter was being ended is not what ended it;
            // and threads that leave while it is at `destroy` do so because that unblocks too.
            let strongest = if kick::support().is_ok() { Rung::Unblock } else { Rung::Unwind };
            let rung = match entry.over_at {
                _ if door.was_forced() => Rung::Destroy,
                Some(over) => over.min(strongest),
                None => rung,
            };
            entry.seen.rung = Some((rung, reason));
        }
        if entry.abandoned {
            let name = &entry.worker.name;
            tell!(WARN, LADDER, "reclaim", entry.worker, "worker `{name}` has ended after all");
            self.supervisor.reclaimed(id);
            return;
        }
        if let Link::Process(process) = &entry.link {
            let died = !matches!(entry.seen.status, Some(Status::Exited(0)));
            if entry.seen.report.is_none() && died {
                entry.seen.stderr = last_words(&entry.worker, &process.boot_log);
            }
        }
        let Entry { worker, seen, asked, link, .. } = entry;
        // Whoever hears of its end finds no descriptor of it any more.
        drop(link);
        self.publish(&worker, &seen, asked);
    }

    fn publish(&mut self, worker: &Arc<Worker>, seen: &Seen, asked: Option<Instant>) {
        if worker.owner == Owner::Lodgers {
            self.house_fell(worker.id, seen);
        }
        let mut exit = seen.judge();
        exit.elapsed = asked.map(|asked| asked.elapsed().as_secs_f64());
        exit.lifetime = worker.created.elapsed().as_secs_f64();
        if let (Kind::Returned, Some(failure)) = (exit.kind, &seen.failure) {
            exit.cause.push_str(&format!("; {failure}"));
        }
        self.settle(worker, exit, seen.abandoned);
    }

    /// Tells everybody how a worker has ended.
    fn settle(&mut self, worker: &Arc<Worker>, exit: Exit, abandoned: bool) {
        tell!(
            INFO,
            WORKER,
            "exit",
            worker,
            exit = exit.kind.word(),
            rung = exit.rung.map(tracing::field::display),
            code = exit.code,
            signal = exit.signal,
            lifetime = exit.lifetime,
            elapsed = exit.elapsed,
            cause = exit.cause.as_str()
        );
        if worker.owner == Owner::Lodgers {
            worker.finish(exit);
            return;
        }
        let kept = matches!(worker.owner, Owner::Keeper { .. });
        if !kept {
            // Counted before it is published, so that whoever waited sees it counted.
            self.supervisor.counted(exit.kind, worker, abandoned);
        }
        let told = serde_json::to_value(&exit);
        if kept || matches!(worker.owner, Owner::Interpreter(_)) {
            // Those that the supervisor of this process runs it does not know by that number.
            let exit = told.as_ref().map_or(serde_json::Value::Null, Clone::clone);
            self.supervisor.report(worker, Report::Ended { exit });
        }
        if worker.finish(exit) {
            self.supervisor.forget(worker.id);
        }
        let outcome = worker.outcome();
        match told {
            Ok(exit) => {
                let news = News::Ended { exit, outcome: Content::outcome(outcome.as_ref()) };
                self.tell_owner(worker.owner, news, outcome);
            }
            Err(error) => fault!("the end of worker `{}` is no JSON: {error}", worker.name),
        }
        if let Owner::Worker { id, .. } = worker.owner
            && self.entries.get(&id).is_some_and(|owner| owner.over)
        {
            self.gone(id);
        }
    }

    /// Acts on the alarms whose time has come.
    fn ring(&mut self, now: Instant) {
        while let Some(&(at, id, alarm)) = self.alarms.first() {
            if at > now {
                return;
            }
            self.alarms.pop_first();
            if self.put_off_alarm(at, id, alarm) {
                continue;
            }
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            match (alarm, entry.climb) {
                (Alarm::Timeout, _) => {
                    let seconds = entry.worker.timeout.unwrap_or(0.0);
                    self.kill(id, Reason::TimedOut(seconds));
                }
                (Alarm::Limit, _) => self.look(id),
                // An alarm of a rung that has been left behind has another time than the climb.
                (Alarm::Rung, Some(climb)) if climb.until == at => {
                    let next = climb.next(&entry.worker.ladder, now);
                    self.step(id, next, climb.reason);
                }
                (Alarm::Rung, _) => {}
                (Alarm::Unanswered, _) => {
                    if let Link::Lodger { landlord, .. } = &entry.link
                        && entry.verdict.is_none()
                    {
                        let landlord = *landlord;
                        self.kill(landlord, Reason::Shared(id));
                    }
                }
                (Alarm::Silent, _) => self.kill(id, Reason::Silent),
                (Alarm::Thaw, _) => {
                    if let Link::Process(process) = &entry.link {
                        process.tree.go_on();
                    }
                }
            }
        }
    }
}

/// There is a worker: in a process of that name, if others may live there too.
pub(super) fn tell_of(worker: &Worker, process: Option<&str>) {
    tell!(
        INFO,
        WORKER,
        "spawn",
        worker,
        target = worker.target.as_str(),
        parent = worker.parent,
        process,
        age = worker.created.elapsed().as_secs_f64()
    );
}

/// How long a tree that grows while it is being killed is followed.
const TREE_BOUND: Duration = Duration::from_millis(500);
/// How long what is below a process that was told to end stays stopped: if it ends at once, its tree does.
const THAW: Duration = Duration::from_millis(20);

/// Runs what has to wait for an interpreter's GIL on a thread that can be spared.
fn helper(name: &str, body: impl FnOnce() + Send + 'static) {
    if let Err(error) = thread::spawn_deaf(name, body) {
        fault!("no thread for a rung of the ladder: {error}");
    }
}

/// The end of what a dead worker wrote to stderr, as far as that was recorded.
fn last_words(worker: &Worker, boot_log: &OwnedFd) -> String {
    /// Enough for a traceback of the end of a deep stack.
    const LIMIT: usize = 8 << 10;
    let mut text = memfile::tail(boot_log, LIMIT).unwrap_or_default();
    if let Ok(collected) = worker.output(true) {
        text.extend_from_slice(&collected[collected.len().saturating_sub(LIMIT)..]);
    }
    String::from_utf8_lossy(&text).into_owned()
}
