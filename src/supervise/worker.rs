//! One worker as everybody sees it: what it is, its state, its end.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::exit::{Exit, Kind};
use super::ladder::Ladder;
use super::limit::Limit;
use super::scheduler::policy::Terms;
use crate::error::{Error, Result};
use crate::interp::door::Door;
use crate::spawn::parcel::Content;
use crate::spawn::request::Backend;
use crate::sys::event::{Event, Wait};
use crate::sys::lock::{lock, lock_within};
use crate::sys::thread;

/// Where a worker is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Made, but its target has not begun.
    Booting,
    /// Its target runs.
    Running,
    /// It was asked to stop.
    Cancelling,
    /// The ladder is being climbed.
    Killing,
    /// It is over.
    Ended,
}

impl State {
    /// As Python calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Booting => "booting",
            Self::Running => "running",
            Self::Cancelling => "cancelling",
            Self::Killing => "killing",
            Self::Ended => "ended",
        }
    }
}

/// Whom a worker is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Code in this interpreter of this process.
    Interpreter(i64),
    /// A worker process.
    Worker {
        /// That worker's number here.
        id: u64,
        /// The number that the new worker has there.
        theirs: u64,
    },
    /// The supervisor of this process, a worker, for one that it knows by that number and that lives here.
    Patron(u64),
    /// Those that live in it, who come and go.
    Lodgers,
    /// A worker process that runs it by itself, and only tells of it.
    Keeper {
        /// That worker's number here.
        id: u64,
        /// The number that this one has there.
        theirs: u64,
    },
}

/// A worker. Shared between its handles and the reactor, which alone moves it on.
#[derive(Debug)]
pub struct Worker {
    /// Unique in this process, from 1.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Its target in words.
    pub target: String,
    /// Its wall.
    pub backend: Backend,
    /// Who asked for it.
    pub owner: Owner,
    /// The worker that asked for it, if one did.
    pub parent: Option<u64>,
    /// When it was asked for.
    pub created: Instant,
    /// How it is ended.
    pub ladder: Ladder,
    /// Its time limit, in seconds.
    pub timeout: Option<f64>,
    /// The way into its interpreter, if that is one of this process.
    pub door: OnceLock<Arc<Door>>,
    /// What a subinterpreter may have of its process's.
    pub(super) terms: Terms,
    ended: Event,
    shared: Mutex<Shared>,
    limit: Mutex<Limit>,
}

#[derive(Debug)]
struct Shared {
    state: State,
    pid: Option<i32>,
    exit: Option<Exit>,
    outcome: Option<Content>,
    collected: Option<(OwnedFd, OwnedFd)>,
    /// Readable once the worker has ended; made when somebody asks for it.
    notify: Option<OwnedFd>,
    handles: usize,
    /// Somebody wants it to stand still.
    paused: bool,
}

/// What a worker process tells of one that it runs by itself.
#[derive(Deserialize)]
pub(super) struct Told {
    name: String,
    target: String,
    backend: Backend,
    pid: Option<i32>,
    ladder: Vec<(String, f64)>,
}

/// What a worker is made of.
pub(super) struct Parts {
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) target: String,
    pub(super) backend: Backend,
    pub(super) owner: Owner,
    pub(super) parent: Option<u64>,
    pub(super) ladder: Ladder,
    pub(super) timeout: Option<f64>,
    pub(super) terms: Terms,
    pub(super) collected: Option<(OwnedFd, OwnedFd)>,
}

impl Worker {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { id, name, target, backend, owner, parent, ladder, timeout, terms, collected } = parts;
        let shared = Shared {
            state: State::Booting,
            pid: None,
            exit: None,
            outcome: None,
            collected,
            notify: None,
            handles: 1,
            paused: false,
        };
        Self {
            id,
            name,
            target,
            backend,
            owner,
            parent,
            created: Instant::now(),
            ladder,
            timeout,
            door: OnceLock::new(),
            terms,
            ended: Event::new(),
            shared: Mutex::new(shared),
            limit: Mutex::default(),
        }
    }

    /// One that another process runs.
    ///
    /// # Errors
    /// When it is told to have a ladder that it can't have.
    pub(super) fn told(id: u64, owner: Owner, parent: u64, told: Told) -> Result<Self> {
        let Told { name, target, backend, pid, ladder, .. } = told;
        let ladder = Ladder::custom(backend, &ladder)?;
        // Its terms and its time are kept there.
        let (parent, timeout, terms, collected) = (Some(parent), None, Terms::default(), None);
        let parts = Parts { id, name, target, backend, owner, parent, ladder, timeout, terms, collected };
        let worker = Self::new(parts);
        {
            let mut shared = lock(&worker.shared);
            shared.pid = pid;
            shared.handles = 0;
        }
        Ok(worker)
    }

    /// What `tractor_host.workers()` tells of it.
    pub fn info(&self) -> serde_json::Value {
        let shared = lock(&self.shared);
        json!({
            "id": self.id,
            "name": self.name,
            "target": self.target,
            "backend": self.backend.name(),
            "parent": self.parent,
            "pid": shared.pid,
            "state": shared.state,
            "paused": shared.paused && shared.state != State::Ended,
            "ladder": self.ladder,
            "age": self.created.elapsed().as_secs_f64(),
        })
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        lock(&self.shared).exit.clone()
    }

    /// Waits for its end. Whether it has ended by the deadline.
    ///
    /// # Errors
    /// Interrupted, when a signal arrived, or may have: one that comes in the moment before the wait, or to
    /// another thread, does not end it. So the main thread, which runs Python's handlers, looks up now and
    /// then. And so does one in a subinterpreter, where an exception that another thread has it raise is all
    /// that comes.
    pub fn wait(&self, deadline: Option<Instant>, in_subinterpreter: bool) -> Result<bool> {
        const LOOK_UP: Duration = Duration::from_millis(100);
        let look_up = (in_subinterpreter || thread::is_main()).then(|| Instant::now() + LOOK_UP);
        let until = match (deadline, look_up) {
            (Some(deadline), Some(look_up)) => Some(deadline.min(look_up)),
            (one, other) => one.or(other),
        };
        match self.ended.wait_until(until) {
            Wait::Set => Ok(true),
            Wait::TimedOut if until != deadline => Err(Error::interrupted()),
            Wait::TimedOut => Ok(false),
            Wait::Interrupted => Err(Error::interrupted()),
        }
    }

    /// The pickled value or exception that it ended with.
    pub fn outcome(&self) -> Option<Content> {
        lock(&self.shared).outcome.clone()
    }

    /// What it has written so far, where that is collected.
    ///
    /// # Errors
    /// When it is not collected.
    pub fn output(&self, stderr: bool) -> Result<Vec<u8>> {
        let shared = lock(&self.shared);
        let Some((out, err)) = &shared.collected else {
            return Err(Error::invalid(format!(
                "the output of worker `{}` is not collected; use stdio=\"pipe\"",
                self.name
            )));
        };
        crate::sys::memfile::tail(if stderr { err } else { out }, usize::MAX)
    }

    /// The number of an fd that is readable once it has ended. It belongs to the worker.
    ///
    /// # Errors
    /// EMFILE.
    pub fn fileno(&self) -> Result<i32> {
        use std::os::fd::AsRawFd;
        let mut shared = lock(&self.shared);
        if shared.notify.is_none() {
            let fd = crate::sys::fd::event_fd()?;
            if shared.state == State::Ended {
                crate::sys::fd::raise(&fd);
            }
            shared.notify = Some(fd);
        }
        Ok(shared.notify.as_ref().map_or(-1, AsRawFd::as_raw_fd))
    }

    /// Counts one more handle.
    pub fn hold(&self) {
        lock(&self.shared).handles += 1;
    }

    /// Counts one handle less. Whether nobody can ask about it any more and it has ended.
    pub fn release(&self) -> bool {
        let mut shared = lock(&self.shared);
        shared.handles = shared.handles.saturating_sub(1);
        shared.handles == 0 && shared.state == State::Ended
    }

    /// Looks at the time limit of what it does just now, or sets that.
    pub(super) fn limit<T>(&self, with: impl FnOnce(&mut Limit) -> T) -> T {
        with(&mut lock(&self.limit))
    }

    /// Its state.
    pub fn state(&self) -> State {
        lock(&self.shared).state
    }

    /// Whether somebody wants it to stand still.
    pub(super) fn is_paused(&self) -> bool {
        lock(&self.shared).paused
    }

    pub(super) fn set_paused(&self, paused: bool) {
        lock(&self.shared).paused = paused;
    }

    /// Its pid, for a process.
    pub fn pid(&self) -> Option<i32> {
        lock(&self.shared).pid
    }

    /// Its state and its pid, unless its record is locked for longer than that.
    pub(super) fn seen_within(&self, bound: Duration) -> Option<(State, Option<i32>)> {
        lock_within(&self.shared, bound).map(|shared| (shared.state, shared.pid))
    }

    pub(super) fn set_pid(&self, pid: i32) {
        lock(&self.shared).pid = Some(pid);
    }

    /// Moves on to a later state; never back.
    pub(super) fn advance(&self, to: State) {
        let mut shared = lock(&self.shared);
        if (to as u8) > (shared.state as u8) {
            shared.state = to;
        }
    }

    pub(super) fn keep_outcome(&self, content: Content) {
        lock(&self.shared).outcome = Some(content);
    }

    /// Publishes the end and wakes everyone. Whether no handle is left to ask about it.
    pub(super) fn finish(&self, exit: Exit) -> bool {
        let mut shared = lock(&self.shared);
        shared.state = State::Ended;
        if !matches!(exit.kind, Kind::Returned | Kind::Raised) {
            shared.outcome = None;
        }
        shared.exit = Some(exit);
        // Before the fd: who sees that readable may wait without a bound of its own.
        self.ended.set();
        if let Some(fd) = &shared.notify {
            crate::sys::fd::raise(fd);
        }
        shared.handles == 0
    }
}
