//! Who debugs: one thread of all the program's processes at a time has the terminal, and nobody is ended for being
//! late meanwhile, or because somebody wants that. The supervisor of the program lends the terminal, and tells
//! those of its workers' processes to hold.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::process::Pid;

use super::super::ladder::Reason;
use super::{Alarm, Link, Reactor};
use crate::error::{Error, Result};
use crate::events::fault;
use crate::spawn::{context, terminal};
use crate::sys::lent::{self, Before};
use crate::sys::{clock, fd};
use crate::wire::message::{FromWorker, ToWorker};

/// So many threads of one worker, those of its own workers included, may stand in the line. A person goes through
/// them one by one; a worker that runs wild must not fill the supervisor's memory.
const MOST_OF_ONE: usize = 64;
/// And so many of all together.
const MOST: usize = 1024;

/// Whoever wants the terminal, or has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Caller {
    /// The worker, by its number here; `None` for the program itself.
    worker: Option<u64>,
    ticket: u64,
}

/// The line at the terminal, and what waits for its end.
#[derive(Default)]
pub(super) struct Debugging {
    line: VecDeque<Caller>,
    /// By the tickets that they have with the supervisor of this process, a worker: its own workers' processes, whose
    /// tickets are their own.
    relayed: HashMap<u64, Caller>,
    lent: Option<(Caller, Lent)>,
    /// Since when nobody is ended.
    held: Option<Instant>,
    /// What has fallen due meanwhile.
    overdue: Vec<(Instant, u64, Alarm)>,
    put_off: Vec<PutOff>,
}

impl Debugging {
    fn knows(&self, caller: Caller) -> bool {
        self.line.contains(&caller) || self.lent.as_ref().is_some_and(|(has, _)| *has == caller)
    }

    /// Why this one can't line up.
    fn obstacle(&self, caller: Caller) -> Option<Error> {
        let its = self.line.iter().filter(|other| other.worker == caller.worker).count();
        if caller.worker.is_some() && its >= MOST_OF_ONE {
            return Some(Error::state(format!(
                "breakpoint(): {MOST_OF_ONE} threads of this worker, or of its workers, are in the line for the \
                 terminal already; no more may be"
            )));
        }
        (self.line.len() >= MOST).then(|| {
            Error::state(format!(
                "breakpoint(): {MOST} threads are in the line for the terminal already; no more may be"
            ))
        })
    }
}

enum PutOff {
    Cancel(u64),
    Kill(u64, Reason),
}

/// The terminal, while it is lent; it is as it was before when this is dropped.
struct Lent {
    ticket: u64,
    before: Before,
}

impl Lent {
    /// # Errors
    /// Why nobody can be asked anything there.
    fn to(process: Option<i32>, ticket: u64) -> Result<Self> {
        let terminal = fd::open("/dev/tty".as_ref(), rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY)
            .map_err(|_| {
            Error::state(
                "breakpoint() needs a terminal, and this program has none; PYTHONBREAKPOINT=0 passes over \
                     it, and `tractor-host dump` shows what a worker is doing",
            )
        })?;
        let mut before = Before::of(terminal).map_err(|errno| Error::os("use the terminal", errno))?;
        if before.owner() != rustix::process::getpgrp() {
            return Err(Error::state(
                "breakpoint() needs the terminal, and this program runs in its background: bring it to the \
                 foreground first (`fg`)",
            ));
        }
        if let Some(group) = process.and_then(Pid::from_raw) {
            before.move_to(group);
        }
        lent::note(ticket, before.clone());
        Ok(Self { ticket, before })
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.before.restore();
        lent::forget(self.ticket);
    }
}

impl Reactor {
    /// Somebody wants the terminal, or does not want it any more.
    pub(super) fn wants_terminal(&mut self, worker: Option<u64>, ticket: u64, wanted: bool) {
        let caller = Caller { worker, ticket };
        if wanted {
            if self.debugging.knows(caller) {
                return;
            }
            if let Some(obstacle) = self.debugging.obstacle(caller) {
                self.answer(caller, Err(obstacle));
                return;
            }
        }
        if context::of_process().is_some() {
            // The supervisor that this process is a worker of lends it.
            let ticket = self.relay(caller, wanted);
            self.supervisor.tell_patron(FromWorker::Terminal { ticket, wanted }, None);
            return;
        }
        if wanted {
            self.debugging.line.push_back(caller);
        } else {
            self.leave_terminal(|other| other == caller);
        }
        self.lend();
    }

    /// Notes what the supervisor of this process is about to be told; the ticket that it knows.
    fn relay(&mut self, caller: Caller, wanted: bool) -> u64 {
        let debugging = &mut self.debugging;
        if !wanted {
            debugging.line.retain(|other| *other != caller);
            let relayed = debugging.relayed.extract_if(|_, other| *other == caller).next();
            return relayed.map_or(caller.ticket, |(ticket, _)| ticket);
        }
        debugging.line.push_back(caller);
        if self.process_of(caller).is_none() {
            return caller.ticket;
        }
        let ticket = terminal::new_ticket();
        self.debugging.relayed.insert(ticket, caller);
        ticket
    }

    /// The supervisor of this process has answered one of its workers.
    pub(super) fn relay_answer(&mut self, ticket: u64, answer: Result<OwnedFd>) {
        // Who has gone meanwhile has given the ticket back.
        let Some(&caller) = self.debugging.relayed.get(&ticket) else { return };
        if let (Ok(terminal), Some(group)) = (&answer, self.process_of(caller).and_then(Pid::from_raw)) {
            // Failing: one of another session reads all the same. Who has lent it takes the foreground back.
            let _ = rustix::termios::tcsetpgrp(terminal, group);
        }
        self.answer(caller, answer);
    }

    /// A worker is gone: it wants nothing, and has nothing.
    pub(super) fn forget_debugger(&mut self, worker: u64) {
        let its = |caller: Caller| caller.worker == Some(worker);
        if context::of_process().is_some() {
            let tickets: Vec<u64> = self
                .debugging
                .line
                .iter()
                .filter(|caller| its(**caller))
                .map(|caller| caller.ticket)
                .collect();
            for ticket in tickets {
                terminal::step_out(ticket);
                self.wants_terminal(Some(worker), ticket, false);
            }
        } else {
            self.leave_terminal(its);
            self.lend();
        }
    }

    fn leave_terminal(&mut self, its: impl Fn(Caller) -> bool) {
        self.debugging.line.retain(|caller| !its(*caller));
        if let Some((caller, lent)) = self.debugging.lent.take_if(|(caller, _)| its(*caller)) {
            drop(lent);
            self.tell_of_debugger(caller, false);
        }
    }

    fn tell_of_debugger(&self, caller: Caller, on: bool) {
        if let Some(entry) = caller.worker.and_then(|id| self.entries.get(&id)) {
            tell!(INFO, WORKER, "debug", entry.worker, on);
        }
    }

    /// Lends the terminal to the next in the line, if it is there.
    fn lend(&mut self) {
        while self.debugging.lent.is_none()
            && let Some(caller) = self.debugging.line.pop_front()
        {
            let process = match caller.worker.map(|id| self.entries.get(&id).map(|entry| &entry.link)) {
                None | Some(Some(Link::Subint(_))) => None,
                Some(Some(Link::Process(process))) => Some(process.pid()),
                // It has gone meanwhile.
                Some(_) => continue,
            };
            let lent = Lent::to(process, caller.ticket)
                .and_then(|lent| Ok((fd::duplicate(lent.before.terminal())?, lent)));
            let copy = lent.map(|(copy, lent)| {
                self.tell_of_debugger(caller, true);
                self.debugging.lent = Some((caller, lent));
                copy
            });
            self.answer(caller, copy);
        }
        let held = self.debugging.lent.is_some();
        if held != self.debugging.held.is_some() {
            self.hold_all(held);
        }
    }

    /// Here, and in the processes of workers.
    fn hold_all(&mut self, on: bool) {
        let processes: Vec<u64> = self
            .entries
            .values()
            .filter(|entry| matches!(entry.link, Link::Process(_)) && !entry.over)
            .map(|entry| entry.worker.id)
            .collect();
        for id in processes {
            self.tell(id, &ToWorker::Hold { on }, None);
        }
        self.hold(on);
    }

    /// The process of a worker's own.
    fn process_of(&self, caller: Caller) -> Option<i32> {
        match &self.entries.get(&caller.worker?)?.link {
            Link::Process(process) => Some(process.pid()),
            _ => None,
        }
    }

    fn answer(&mut self, caller: Caller, answer: Result<OwnedFd>) {
        match caller.worker {
            Some(worker) if self.process_of(caller).is_some() => {
                self.answer_process(worker, caller.ticket, answer);
            }
            // Failing: whoever waited has gone, and gives the ticket back.
            _ => drop(terminal::answer(caller.ticket, answer)),
        }
    }

    fn answer_process(&mut self, worker: u64, ticket: u64, answer: Result<OwnedFd>) {
        let (refused, terminal) = match answer {
            Ok(terminal) => (None, Some(terminal)),
            Err(error) => (Some(error.into()), None),
        };
        self.tell_with(
            worker,
            &ToWorker::Terminal { ticket, refused },
            Arc::default(),
            terminal.map(Arc::new),
        );
    }

    /// Nobody is ended from now on for being late, or because somebody wants that; or all that is made up for.
    pub(super) fn hold(&mut self, on: bool) {
        clock::hold(on);
        if on {
            self.debugging.held.get_or_insert_with(Instant::now);
            return;
        }
        let Some(since) = self.debugging.held.take() else { return };
        let lost = since.elapsed();
        let overdue = std::mem::take(&mut self.debugging.overdue);
        let (thaws, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.alarms)
            .into_iter()
            .chain(overdue)
            .filter(|(.., alarm)| *alarm != Alarm::Limit)
            .partition(|(.., alarm)| *alarm == Alarm::Thaw);
        self.alarms.extend(thaws);
        self.alarms.extend(later.into_iter().map(|(at, id, alarm)| (at + lost, id, alarm)));
        for climb in self.entries.values_mut().filter_map(|entry| entry.climb.as_mut()) {
            climb.until += lost;
        }
        // By the clock, which has stood still: one can have been set meanwhile.
        let limited = self.entries.values().filter(|entry| entry.look_at.is_some());
        for id in limited.map(|entry| entry.worker.id).collect::<Vec<_>>() {
            self.look(id);
        }
        for order in std::mem::take(&mut self.debugging.put_off) {
            match order {
                PutOff::Cancel(id) => self.cancel(id),
                PutOff::Kill(id, reason) => self.kill(id, reason),
            }
        }
    }

    pub(super) fn is_held(&self) -> bool {
        self.debugging.held.is_some()
    }

    /// Whether an alarm that is due must wait; then it does.
    pub(super) fn put_off_alarm(&mut self, at: Instant, id: u64, alarm: Alarm) -> bool {
        let waits = self.is_held() && alarm != Alarm::Thaw;
        if waits {
            self.debugging.overdue.push((at, id, alarm));
        }
        waits
    }

    /// Whether a request to stop must wait; then it does.
    pub(super) fn put_off_cancel(&mut self, id: u64) -> bool {
        let waits = self.must_wait(id);
        if waits {
            self.debugging.put_off.push(PutOff::Cancel(id));
        }
        waits
    }

    /// Whether an order to end must wait; then it does.
    pub(super) fn put_off_kill(&mut self, id: u64, reason: Reason) -> bool {
        // The first ones follow from an end that has come already. Who breaks the protocol debugs nothing.
        let follows =
            matches!(reason, Reason::OwnerDied | Reason::OwnerGone | Reason::Shared(_) | Reason::Protocol);
        // It was pressed at the program, not at the debugger; or the GIL of everybody is held.
        let pressing = matches!(reason, Reason::Interrupted | Reason::HeldGil(_));
        let waits = !follows && !pressing && self.must_wait(id);
        if waits {
            self.debugging.put_off.push(PutOff::Kill(id, reason));
        }
        waits
    }

    /// Whether somebody debugs to whom the end of this one could matter: what the debugged one has started is its
    /// own to end.
    fn must_wait(&self, id: u64) -> bool {
        if self.entries.get(&id).is_some_and(|entry| matches!(entry.link, Link::Elsewhere(_))) {
            // The other supervisor knows.
            return false;
        }
        let debugged = self.debugging.lent.as_ref().and_then(|(caller, _)| caller.worker);
        let mut above = self.entries.get(&id).and_then(|entry| entry.worker.parent);
        while let Some(parent) = above {
            if Some(parent) == debugged {
                return false;
            }
            above = self.entries.get(&parent).and_then(|entry| entry.worker.parent);
        }
        self.is_held()
    }

    /// Tells a process that is new.
    pub(super) fn tell_of_hold(&mut self, id: u64) {
        if self.is_held() {
            self.tell(id, &ToWorker::Hold { on: true }, None);
        }
    }

    /// The letters of the supervisor of this process, a worker.
    pub(super) fn heard_of_hold(&mut self, on: bool) {
        if context::of_process().is_none() {
            fault!("told to hold by nobody");
            return;
        }
        self.hold_all(on);
    }
}
