//! The threads of this process that want the program's terminal, for a debugger.
//!
//! There is one terminal and a tree of processes, so the supervisor of the program lends it: to one at a time, in
//! the order in which they asked. What it lends is a descriptor of the terminal itself.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::context::{self, Letter};
use crate::error::{Error, Relayed, Result};
use crate::sys::event::{Slot, Wait};
use crate::sys::fork_local::ForkLocal;
use crate::sys::lent::{self, Before};
use crate::sys::lock::lock;
use crate::wire::message::ToWorker;

type Turn = Slot<Result<OwnedFd>>;

static TURNS: ForkLocal<Mutex<HashMap<u64, Arc<Turn>>>> = ForkLocal::new();
static LAST: AtomicU64 = AtomicU64::new(0);

/// How long a thread waits before it looks whether a signal, or somebody else, wants something of it.
const LOOK_UP: Duration = Duration::from_millis(100);

/// Lines up; the caller then asks for the terminal with this ticket.
///
/// # Errors
/// In a process that was forked behind our back.
pub fn line_up() -> Result<u64> {
    let ticket = new_ticket();
    lock(TURNS.get_or_make(|| Ok(Mutex::default()))?).insert(ticket, Arc::default());
    Ok(ticket)
}

/// One that this process has not had yet.
pub fn new_ticket() -> u64 {
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

/// Waits for the ticket's turn, once.
///
/// # Errors
/// Interrupted, now and then: call it again to go on waiting. Why there is no terminal to be had.
pub fn wait(ticket: u64) -> Result<OwnedFd> {
    let turn = turn(ticket).ok_or_else(|| Error::state("that turn at the terminal is over"))?;
    match turn.wait_until(Some(Instant::now() + LOOK_UP)) {
        Wait::Set => {}
        Wait::TimedOut | Wait::Interrupted => return Err(Error::interrupted()),
    }
    let terminal = turn
        .take(Some(Instant::now()))
        .ok_or_else(|| Error::state("that turn at the terminal was taken"))??;
    // The supervisor that has lent it may be gone before this process: killed, say.
    if context::of_process().is_some()
        && let Ok(before) = Before::of_loan(&terminal)
    {
        lent::note(ticket, before);
    }
    Ok(terminal)
}

/// Answers the ticket. Where nobody waits for that any more, the terminal comes back by being closed.
///
/// # Errors
/// No thread of this process has it. That is the answer.
pub fn answer(ticket: u64, answer: Result<OwnedFd>) -> Result<(), Result<OwnedFd>> {
    let Some(turn) = turn(ticket) else { return Err(answer) };
    // Failing: whoever waited has gone, and gives the ticket back.
    let _ = turn.fill(answer);
    Ok(())
}

/// What a message says that has these descriptors beside it.
///
/// # Errors
/// Those that it tells; that the descriptor got lost.
pub fn answered(refused: Option<Relayed>, mut fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    match refused {
        Some(refused) => Err(refused.into()),
        None => fds.pop().ok_or_else(|| Error::state("no descriptor is left here for the terminal")),
    }
}

/// An answer as the message that it came as.
pub(super) fn letter(ticket: u64, answer: Result<OwnedFd>) -> Letter {
    let (refused, fds) = match answer {
        Ok(terminal) => (None, vec![terminal]),
        Err(error) => (Some(error.into()), Vec::new()),
    };
    Letter { message: ToWorker::Terminal { ticket, refused }, payload: Arc::default(), fds }
}

/// Steps out of the line, or gives up the turn.
pub fn step_out(ticket: u64) {
    if let Ok(Some(turns)) = TURNS.get() {
        lock(turns).remove(&ticket);
    }
    if context::of_process().is_some() {
        lent::forget(ticket);
    }
}

/// In the only thread of a fork's child.
pub(super) fn forget_all() {
    TURNS.forget();
    lent::forget_all();
}

fn turn(ticket: u64) -> Option<Arc<Turn>> {
    TURNS.get().ok().flatten().and_then(|turns| lock(turns).get(&ticket).cloned())
}
