//! The zygote: a process of one thread that has imported what workers need and does nothing but fork.
//!
//! What it forks are children of its own parent, the host, which reaps and owns them. So the zygote can
//! die, or be replaced, without any worker noticing. Nothing of the host's memory is in it. This file is
//! the host's side; [`serve`] is the zygote's.

pub mod serve;

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::interp::subinterp::Gil;
use crate::sys::lock::lock;
use crate::sys::process::Child;
use crate::sys::{fd, log, memfile, process, procfs, thread};
use crate::wire::frame::{Decoder, Frame};
use crate::wire::message::{self, FromZygote, PreloadFailure, ToZygote};

/// How long the zygote may take to import what it preloads.
pub const START_BOUND: Duration = Duration::from_secs(120);
/// How long it may take to fork; a stopped one never does.
const FORK_BOUND: Duration = Duration::from_secs(10);
/// How many of its last children are remembered by number.
const REMEMBERED: usize = 1024;

/// What a new worker is given, besides what is sent to it over its channel.
#[derive(Debug)]
pub struct Fds {
    /// The worker's end of the channel, its fd 0 at first.
    pub channel: OwnedFd,
    /// Its stderr during the boot.
    pub boot_log: OwnedFd,
}

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
}

#[derive(Debug, Default)]
struct State {
    running: Option<Running>,
    /// The last pids that were handed on as workers, by this zygote and those before it.
    handed: VecDeque<i32>,
}

impl State {
    /// Ends the zygote, if there is one, and what it may have forked without our hearing of it.
    fn clean_up(&mut self) {
        let Some(Running { started, .. }) = self.running.take() else { return };
        let zygote = started.child.pid();
        started.child.destroy();
        drop(started.socket);
        // Such a child is ours, bears the zygote's name (a worker takes its own) and was never handed on.
        for pid in procfs::children().unwrap_or_default() {
            if pid != zygote && !self.handed.contains(&pid) && procfs::name_of(pid).as_deref() == Some(NAME) {
                match Child::adopt(pid) {
                    Ok(stray) => stray.destroy(),
                    Err(error) => log::line(format_args!("{error}")),
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
    decoder: Decoder,
    ready: bool,
    /// The names of its threads, if it has too many to fork.
    threads: Vec<String>,
    /// The second interpreters that it has.
    interpreters: Vec<Gil>,
    /// Its resource limits and its nice value, as far as we have a hand in them.
    limits: Vec<(u32, u64, u64)>,
    nice: i32,
    /// The user and group that it was started as.
    user: [u32; 4],
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
    /// Forks a worker, with a second interpreter that has such a GIL, if any. `start` starts a zygote, should
    /// there be none.
    ///
    /// # Errors
    /// See [`Refusal`]. Interrupted, when a signal arrived while the zygote was starting: it goes on, and
    /// the call can be repeated.
    pub fn fork(
        &self,
        fds: &Fds,
        interpreter: Option<Gil>,
        start: impl FnOnce() -> Result<Started>,
    ) -> Result<Child, Refusal> {
        let mut state = lock(&self.state);
        let made = self.ready(&mut state, start)?.fork(fds, interpreter);
        let made = made.map(|(child, failures)| {
            if !failures.is_empty() {
                *lock(&self.failures) = failures;
            }
            child
        });
        match &made {
            Ok(child) => state.hand_on(child),
            Err(Refusal::Lost(_)) => state.clean_up(),
            Err(Refusal::Fork(_)) => {}
        }
        made
    }

    /// Starts a zygote that is told `order` in the place of the one that may be there, and waits until it is
    /// ready.
    ///
    /// # Errors
    /// Those of starting it; interrupted as in [`Zygote::fork`].
    pub fn renew(&self, order: &[u8], start: impl FnOnce() -> Result<Started>) -> Result<()> {
        let mut state = lock(&self.state);
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
        if state.running.as_ref().is_some_and(Running::has_ended) {
            log::line(format_args!("the fork server has died; a new one is started"));
            state.clean_up();
        }
        if state.running.is_none() {
            state.running = Some(Running::new(start()?));
        }
        let outcome = match state.running.as_mut() {
            Some(zygote) if !zygote.ready => zygote.await_ready().map(Some),
            _ => Ok(None),
        };
        match outcome {
            Ok(Some(failures)) => *lock(&self.failures) = failures,
            Ok(None) => {}
            Err(error) => {
                if !error.is_interrupted() {
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

    /// What the zygote that was started last could not import; told once.
    pub fn take_failures(&self) -> Vec<PreloadFailure> {
        std::mem::take(&mut lock(&self.failures))
    }

    /// Ends it.
    pub fn stop(&self) {
        lock(&self.state).clean_up();
    }
}

impl Running {
    fn new(started: Started) -> Self {
        Self {
            started,
            decoder: Decoder::new(),
            ready: false,
            threads: Vec::new(),
            interpreters: Vec::new(),
            limits: process::limits(),
            nice: process::nice(),
            user: process::user(),
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
        let limits = process::limits();
        if limits != self.limits {
            self.started.child.set_limits(&limits)?;
            self.limits = limits;
        }
        if process::user() != self.user {
            return Err(Error::state("it belongs to another user than this process now does"));
        }
        let nice = process::nice();
        if nice != self.nice {
            self.started.child.set_nice(nice)?;
            self.nice = nice;
        }
        Ok(())
    }

    fn fork(&mut self, fds: &Fds, interpreter: Option<Gil>) -> Result<(Child, Vec<PreloadFailure>), Refusal> {
        self.keep_in_step().map_err(Refusal::Lost)?;
        let bytes = message::encode(&ToZygote::Fork { interpreter }, 0)?;
        // It makes each of them when it is asked for one for the first time, which takes imports.
        let made = interpreter.is_none_or(|gil| self.interpreters.contains(&gil));
        let bound = if made { FORK_BOUND } else { START_BOUND };
        let along = [&fds.channel, &fds.boot_log].map(AsFd::as_fd);
        // The socket is empty between two requests: it takes all of this one, or the zygote is gone.
        match fd::send_with_fds(&self.started.socket, &bytes, &along) {
            Ok(count) if count == bytes.len() => {}
            Ok(_) => return Err(Refusal::Lost(Error::state("the fork server takes no more orders"))),
            Err(errno) => return Err(Refusal::Lost(Error::os("reach the fork server", errno))),
        }
        let (frame, mut received) = self.receive(Instant::now() + bound, false).map_err(Refusal::Lost)?;
        let reply = message::decode(&frame, "the fork server's reply").map_err(Refusal::Lost)?;
        match (reply, received.pop()) {
            (FromZygote::Forked { pid, failures }, pidfd) => {
                self.interpreters.extend(interpreter.filter(|_| !made));
                let child = match pidfd {
                    Some(pidfd) => Child::from_parts(pid, pidfd)?,
                    // There was no number left for it here. A child that can't be held is ended.
                    None => Child::adopt(pid)?,
                };
                Ok((child, failures))
            }
            (FromZygote::Failed { errno }, _) => {
                let error = std::io::Error::from_raw_os_error(errno);
                Err(Refusal::Fork(Error::os("fork a worker", error)))
            }
            (FromZygote::Refused { reason }, _) => Err(Refusal::Fork(Error::state(reason))),
            (other, _) => Err(Refusal::Lost(Error::protocol(format!("the fork server replied {other:?}")))),
        }
    }

    /// The next message and what came beside it.
    fn receive(&mut self, deadline: Instant, interruptible: bool) -> Result<(Frame, Vec<OwnedFd>)> {
        let mut fds = Vec::new();
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok((frame, fds));
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
            match fd::receive_with_fds(&self.started.socket) {
                Ok((bytes, more)) => {
                    self.decoder.push(&bytes);
                    fds.extend(more);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(Error::os("hear from the fork server (it has ended)", error)),
            }
        }
    }
}

/// The zygote's name, which its children have until they are told their own.
pub const NAME: &str = "th-zygote";

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
