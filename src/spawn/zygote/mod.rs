//! The zygote: a process of one thread that has imported what workers need and does nothing but fork.
//!
//! What it forks are children of its own parent, the host, which reaps and owns them. So the zygote can
//! die, or be replaced, without any worker noticing. Nothing of the host's memory is in it. This file is
//! the host's side; [`serve`] is the zygote's.
//!
//! Some children are ordered before anybody wants them (see [`pool`]): a spawn takes one that is ready, and
//! orders the next one when the task is on its way. The zygote's answer is taken in by the next spawn.

pub mod inbox;
pub mod pool;
pub mod serve;

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::events::fault;
use crate::interp::subinterp::Gil;
use crate::sys::lock::lock;
use crate::sys::process::{Child, Means};
use crate::sys::{fd, ledger, memfile, process, procfs, thread};
use crate::wire::message::{self, FromZygote, PreloadFailure, ToZygote};
use inbox::Inbox;
use pool::{Blank, Order, Pool};

/// How long the zygote may take to import what it preloads.
pub const START_BOUND: Duration = Duration::from_secs(120);
/// How long it may take to fork; a stopped one never does.
const FORK_BOUND: Duration = Duration::from_secs(10);
/// How many of its last children are remembered by number.
const REMEMBERED: usize = 1024;

/// A zygote that has just been started.
#[derive(Debug)]
pub struct Started {
    /// The process.
    pub child: Child,
    /// Our end of its socket.
    pub socket: OwnedFd,
    /// Where its stderr goes.
    pub boot_log: OwnedFd,
    /// What it was told.
    pub order: Vec<u8>,
}

/// The host's zygote, if it has one.
#[derive(Debug, Default)]
pub struct Zygote {
    state: Mutex<State>,
    /// What could not be preloaded by the last one that was started, until somebody asks.
    failures: Mutex<Vec<PreloadFailure>>,
    /// How many blanks there are, for who must not wait for the state.
    blanks: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    running: Option<Running>,
    /// The last pids that were handed on as workers, by this zygote and those before it.
    handed: VecDeque<i32>,
    /// There will be none any more.
    closed: bool,
}

/// The state, while it may change.
struct Guard<'a> {
    state: MutexGuard<'a, State>,
    blanks: &'a AtomicUsize,
}

impl Deref for Guard<'_> {
    type Target = State;
    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Guard<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        let blanks = self.state.running.as_ref().map_or(0, |zygote| zygote.pool.total());
        self.blanks.store(blanks, Ordering::Relaxed);
    }
}

impl State {
    /// Ends the zygote, if there is one, with its blanks and what it may have forked without our hearing of it.
    fn clean_up(&mut self) {
        let Some(Running { started, pool, .. }) = self.running.take() else { return };
        let zygote = started.child.pid();
        tracing::debug!(target: crate::events::ZYGOTE, kind = "zygote_end", pid = zygote);
        started.child.destroy();
        drop(started.socket);
        pool.end();
        // Such a child is ours, bears the zygote's name or a blank's (a worker takes its own) and was never
        // handed on.
        let is_unused = |pid| procfs::name_of(pid).is_some_and(|name| [NAME, BLANK_NAME].contains(&&*name));
        for pid in procfs::children().unwrap_or_default() {
            if pid != zygote && !self.handed.contains(&pid) && is_unused(pid) {
                match Child::adopt(pid) {
                    Ok(stray) => stray.destroy(),
                    Err(error) => fault!("{error}"),
                }
            }
        }
    }

    fn hand_on(&mut self, child: &Child) {
        if self.handed.len() == REMEMBERED {
            self.handed.pop_front();
        }
        self.handed.push_back(child.pid());
    }
}

#[derive(Debug)]
struct Running {
    started: Started,
    /// What it has said.
    inbox: Inbox,
    ready: bool,
    /// The names of its threads, if it has too many to fork.
    threads: Vec<String>,
    /// The second interpreters that it has.
    interpreters: Vec<Gil>,
    /// Its own, as far as we have a hand in them.
    means: Means,
    /// The user and group that it was started as.
    user: [u32; 4],
    pool: Pool,
}

/// Why there is no worker.
#[derive(Debug)]
pub enum Refusal {
    /// The zygote is there, and the fork failed: trying again would not help.
    Fork(Error),
    /// The zygote was lost; a new one will be started for the next attempt, which must use a new
    /// channel: a child that nobody heard of may hold this one.
    Lost(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Fork(error)
    }
}

impl Zygote {
    /// Hands out a child with a second interpreter that has such a GIL, if any: a blank that is ready, or else
    /// one that is forked now. `start` starts a zygote, should there be none.
    ///
    /// # Errors
    /// See [`Refusal`]. Interrupted, when a signal arrived while the zygote was starting: it goes on, and
    /// the call can be repeated.
    pub fn take(
        &self,
        interpreter: Option<Gil>,
        start: impl FnOnce() -> Result<Started>,
    ) -> Result<Blank, Refusal> {
        let mut state = self.lock();
        let taken = self.ready(&mut state, start)?.take(interpreter, &self.failures);
        match &taken {
            Ok(blank) => state.hand_on(&blank.child),
            Err(Refusal::Lost(_)) => state.clean_up(),
            Err(Refusal::Fork(_)) => {}
        }
        taken
    }

    /// Orders blanks of a kind until there are so many, without waiting for them.
    pub fn refill(&self, interpreter: Option<Gil>, wanted: usize) {
        if let Some(zygote) = &mut self.lock().running {
            // Nobody waits for these. What is in the way (no descriptor, no memory, a dead zygote) is told to
            // the next spawn that finds no blank, if it is still in the way then.
            while zygote.pool.count(interpreter) < wanted && zygote.order(interpreter, true).is_ok() {}
        }
    }

    /// Starts a zygote that is told `order` in the place of the one that may be there, and waits until it is
    /// ready.
    ///
    /// # Errors
    /// Those of starting it; interrupted as in [`Zygote::take`].
    pub fn renew(&self, order: &[u8], start: impl FnOnce() -> Result<Started>) -> Result<()> {
        let mut state = self.lock();
        // One that was starting when a signal interrupted this very call is gone on with.
        if state.running.as_ref().is_none_or(|zygote| zygote.ready || zygote.started.order != order) {
            state.clean_up();
        }
        let zygote = self.ready(&mut state, start).map_err(|refusal| match refusal {
            Refusal::Fork(error) | Refusal::Lost(error) => error,
        })?;
        if zygote.threads.is_empty() {
            return Ok(());
        }
        let threads = zygote.threads.join(", ");
        state.clean_up();
        Err(Error::state(format!(
            "what is to be preloaded starts threads (there are {threads} then), which a fork would not copy: have \
             it start none (numpy's OpenBLAS: OPENBLAS_NUM_THREADS=1 in the environment), or do not preload it"
        )))
    }

    fn ready<'a>(
        &self,
        state: &'a mut State,
        start: impl FnOnce() -> Result<Started>,
    ) -> Result<&'a mut Running, Refusal> {
        if state.closed {
            return Err(Refusal::Fork(Error::state(
                "tractor_host is shutting down: the fork server is gone",
            )));
        }
        if state.running.as_ref().is_some_and(Running::has_ended) {
            let pid = state.running.as_ref().map(|zygote| zygote.started.child.pid());
            tracing::warn!(
                target: crate::events::ZYGOTE,
                kind = "zygote_lost",
                pid,
                "the fork server has died; a new one is started"
            );
            state.clean_up();
        }
        if state.running.is_none() {
            let zygote = Running::new(start()?);
            let pid = zygote.started.child.pid();
            ledger::note(pid, ledger::FORK_SERVER, NAME);
            tracing::info!(target: crate::events::ZYGOTE, kind = "zygote_start", pid);
            state.running = Some(zygote);
        }
        let outcome = match state.running.as_mut() {
            Some(zygote) if !zygote.ready => zygote.await_ready().map(Some),
            _ => Ok(None),
        };
        match outcome {
            Ok(Some(failures)) => {
                let pid = state.running.as_ref().map(|zygote| zygote.started.child.pid());
                let not_imported = failures.len();
                tracing::info!(target: crate::events::ZYGOTE, kind = "zygote_ready", pid, not_imported);
                *lock(&self.failures) = failures;
            }
            Ok(None) => {}
            Err(error) => {
                if !error.is_interrupted() {
                    // Whoever wants it is told why.
                    tracing::info!(target: crate::events::ZYGOTE, kind = "zygote_lost", error = %error);
                    state.clean_up();
                }
                return Err(Refusal::Fork(error));
            }
        }
        state.running.as_mut().ok_or_else(|| Refusal::Fork(Error::state("there is no fork server")))
    }

    /// The zygote's pid, if there is one.
    pub fn pid(&self) -> Option<i32> {
        lock(&self.state).running.as_ref().map(|zygote| zygote.started.child.pid())
    }

    /// How many blanks are ready, or were ordered.
    pub fn blanks(&self) -> usize {
        self.blanks.load(Ordering::Relaxed)
    }

    fn lock(&self) -> Guard<'_> {
        Guard { state: lock(&self.state), blanks: &self.blanks }
    }

    /// What the zygote that was started last could not import; told once.
    pub fn take_failures(&self) -> Vec<PreloadFailure> {
        std::mem::take(&mut lock(&self.failures))
    }

    /// What there is for its sake: processes, and descriptors of this one. Waits until it has done what it was
    /// asked to do.
    pub fn belongings(&self) -> (Vec<i32>, Vec<RawFd>) {
        let mut state = self.lock();
        let Some(zygote) = &mut state.running else { return (Vec::new(), Vec::new()) };
        // An error: what is lost is found out, and told, by the next spawn.
        while zygote.pool.next().is_some() && zygote.hear(&self.failures).is_ok() {}
        let Started { child, socket, boot_log, .. } = &zygote.started;
        let own = [child.pidfd().as_raw_fd(), socket.as_raw_fd(), boot_log.as_raw_fd()];
        (
            std::iter::once(child.pid()).chain(zygote.pool.pids()).collect(),
            own.into_iter().chain(zygote.pool.fds()).collect(),
        )
    }

    /// Ends it, for good.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.clean_up();
    }
}

impl Running {
    fn new(started: Started) -> Self {
        Self {
            started,
            inbox: Inbox::default(),
            ready: false,
            threads: Vec::new(),
            interpreters: Vec::new(),
            means: Means::own(),
            user: process::user(),
            pool: Pool::default(),
        }
    }

    fn has_ended(&self) -> bool {
        self.started.child.wait_until(Instant::now())
    }

    /// Waits until all is imported.
    fn await_ready(&mut self) -> Result<Vec<PreloadFailure>> {
        let deadline = Instant::now() + START_BOUND;
        match self.receive(deadline, true) {
            Ok((frame, _)) => match message::decode(&frame, "the fork server's first word")? {
                FromZygote::Ready { failures, threads } => {
                    self.ready = true;
                    self.threads = threads;
                    Ok(failures)
                }
                other => Err(Error::protocol(format!("the fork server began with {other:?}"))),
            },
            Err(error) if error.is_interrupted() => Err(error),
            Err(error) => {
                // Its last words are complete once it has ended, which it does soon, or never.
                self.started.child.wait_until(Instant::now() + Duration::from_secs(1));
                let words = memfile::tail(&self.started.boot_log, 4 << 10).unwrap_or_default();
                let words = String::from_utf8_lossy(&words);
                Err(Error::state(format!("the fork server did not start: {error}\n{}", words.trim_end())))
            }
        }
    }

    /// What this process's own children would inherit, the zygote's are to.
    fn keep_in_step(&mut self) -> Result<()> {
        if process::user() != self.user {
            return Err(Error::state("it belongs to another user than this process now does"));
        }
        let means = Means::own();
        if means != self.means {
            self.started.child.give(&means, Some(&self.means))?;
            self.pool.fall_out_of_step();
            self.means = means;
        }
        Ok(())
    }

    fn take(
        &mut self,
        interpreter: Option<Gil>,
        failures: &Mutex<Vec<PreloadFailure>>,
    ) -> Result<Blank, Refusal> {
        self.keep_in_step().map_err(Refusal::Lost)?;
        while self.pool.next().is_some() && self.has_answered() {
            // One that could not be forked: nobody waits for it.
            let _ = self.hear(failures).map_err(Refusal::Lost)?;
        }
        let (mut ordered, mut hurried) = (false, false);
        loop {
            while let Some(blank) = self.pool.take(interpreter) {
                // One that was forked for this very call is its worker, whatever has become of it.
                if !ordered && !blank.wake()? {
                    blank.child.destroy();
                    continue;
                }
                if blank.is_out_of_step() {
                    // It can only be lost to another user of the machine, as the zygote itself would be.
                    blank.child.give(&self.means, None).map_err(Refusal::Lost)?;
                }
                return Ok(blank);
            }
            if self.pool.expected(interpreter) == 0 {
                self.order(interpreter, false)?;
                ordered = true;
            } else if !hurried {
                self.tell(&ToZygote::Hurry, &[]).map_err(Refusal::Lost)?;
                hurried = true;
            }
            let failed = self.hear(failures).map_err(Refusal::Lost)?;
            // One that was ordered earlier may have failed for what is over by now.
            if let Some(error) = failed
                && ordered
                && self.pool.count(interpreter) == 0
            {
                return Err(Refusal::Fork(error));
            }
        }
    }

    /// Asks for one more child.
    fn order(&mut self, interpreter: Option<Gil>, at_leisure: bool) -> Result<(), Refusal> {
        let (order, fds) = Order::new(interpreter)?;
        let along = [&fds.channel, &fds.boot_log].map(AsFd::as_fd);
        self.tell(&ToZygote::Fork { interpreter, at_leisure }, &along).map_err(Refusal::Lost)?;
        self.pool.expect(order);
        Ok(())
    }

    fn tell(&self, message: &ToZygote, along: &[BorrowedFd<'_>]) -> Result<()> {
        let bytes = message::encode(message, 0)?;
        // There is room in the socket for more than is ever said at a time, or the zygote is gone.
        match fd::send_with_fds(&self.started.socket, &bytes, along) {
            Ok(count) if count == bytes.len() => Ok(()),
            Ok(_) => Err(Error::state("the fork server takes no more orders")),
            Err(errno) => Err(Error::os("reach the fork server", errno)),
        }
    }

    /// Whether it has said something that nobody has heard.
    fn has_answered(&self) -> bool {
        if !self.inbox.is_empty() {
            return true;
        }
        let mut readable = [PollFd::new(&self.started.socket, PollFlags::IN)];
        rustix::event::poll(&mut readable, Some(&thread::timespec(Duration::ZERO))) == Ok(1)
    }

    /// Waits until the oldest order is answered. Why it could not be carried out, if that was so.
    ///
    /// # Errors
    /// The zygote is lost.
    fn hear(&mut self, failures: &Mutex<Vec<PreloadFailure>>) -> Result<Option<Error>> {
        let interpreter = self.pool.next().and_then(|order| order.interpreter);
        // It makes each of them when it is asked for one for the first time, which takes imports.
        let made = interpreter.is_none_or(|gil| self.interpreters.contains(&gil));
        let bound = if made { FORK_BOUND } else { START_BOUND };
        let (frame, mut received) = self.receive(Instant::now() + bound, false)?;
        let reply = message::decode(&frame, "the fork server's reply")?;
        let Some(order) = self.pool.answered() else {
            return Err(Error::protocol(format!("the fork server said {reply:?} unasked")));
        };
        match (reply, received.pop()) {
            (FromZygote::Forked { pid, failures: new }, pidfd) => {
                self.interpreters.extend(interpreter.filter(|_| !made));
                if !new.is_empty() {
                    *lock(failures) = new;
                }
                let child = match pidfd {
                    Some(pidfd) => Child::from_parts(pid, pidfd),
                    // There was no number left for it here. A child that can't be held is ended.
                    None => Child::adopt(pid),
                };
                match child {
                    Ok(child) => {
                        ledger::note(pid, ledger::BLANK, BLANK_NAME);
                        self.pool.keep(order.filled(child));
                        Ok(None)
                    }
                    Err(error) => Ok(Some(error)),
                }
            }
            (FromZygote::Failed { errno }, _) => {
                Ok(Some(Error::os("fork a worker", std::io::Error::from_raw_os_error(errno))))
            }
            (FromZygote::Refused { reason }, _) => Ok(Some(Error::state(reason))),
            (other, _) => Err(Error::protocol(format!("the fork server replied {other:?}"))),
        }
    }

    /// The next message and what came beside it.
    fn receive(&mut self, deadline: Instant, interruptible: bool) -> Result<inbox::Message> {
        loop {
            if let Some(said) = self.inbox.next_message()? {
                return Ok(said);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::timed_out("the fork server did not answer in time"));
            }
            let mut readable = [PollFd::new(&self.started.socket, PollFlags::IN)];
            match rustix::event::poll(&mut readable, Some(&thread::timespec(left))) {
                Err(Errno::INTR) if interruptible => return Err(Error::interrupted()),
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(errno) => return Err(Error::os("wait for the fork server", errno)),
            }
            match self.inbox.read(&self.started.socket) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(Error::os("hear from the fork server (it has ended)", error)),
            }
        }
    }
}

/// It has been lost in the middle of a spawn, and is started again.
pub fn tell_lost(error: &Error) {
    tracing::warn!(
        target: crate::events::ZYGOTE,
        kind = "zygote_lost",
        "the fork server was lost and is started again: {error}"
    );
}

/// The zygote's name, which its children have in their very first moments.
pub const NAME: &str = "th-zygote";
/// The name of its children until they are told their own.
pub const BLANK_NAME: &str = "th-blank";

impl Started {
    /// Takes hold of a zygote that was just started with the other end of `socket` as its fd 0, and tells
    /// it what to do.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn new(child: Child, socket: OwnedFd, boot_log: OwnedFd, order: Vec<u8>) -> Result<Self> {
        let deadline = Instant::now() + START_BOUND;
        let mut sent = fd::send_with_fds(&socket, &order, &[]);
        while let Ok(count) = sent
            && count < order.len()
        {
            // Longer than the socket's buffer: the zygote reads while it starts.
            let mut writable = [PollFd::new(&socket, PollFlags::OUT)];
            let left = deadline.saturating_duration_since(Instant::now());
            sent = match rustix::event::poll(&mut writable, Some(&thread::timespec(left))) {
                Err(Errno::INTR) => Ok(count),
                Err(errno) => Err(errno),
                Ok(0) => Err(Errno::TIMEDOUT),
                Ok(_) => {
                    match rustix::net::send(&socket, &order[count..], rustix::net::SendFlags::NOSIGNAL) {
                        Ok(more) => Ok(count + more),
                        Err(Errno::AGAIN) => Ok(count),
                        Err(errno) => Err(errno),
                    }
                }
            };
        }
        match sent {
            Ok(_) => Ok(Self { child, socket, boot_log, order }),
            Err(errno) => {
                child.destroy();
                Err(Error::os("tell the fork server what to do", errno))
            }
        }
    }
}
