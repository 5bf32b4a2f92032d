//! The terminal, as it was before a debugger had it: so that a process which is forced out leaves it like that.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::Result;
use rustix::process::Pid;
use rustix::termios::{OptionalActions, Termios};

use super::event::Event;
use super::fork_local::ForkLocal;
use super::lock::{lock, lock_within};
use super::{fd, thread};

/// What a terminal was like.
#[derive(Debug, Clone)]
pub struct Before {
    terminal: Arc<OwnedFd>,
    modes: Termios,
    /// The process group that was in the foreground.
    owner: Pid,
    /// The one that is meanwhile.
    holder: Pid,
}

/// The terminal that somebody debugs at just now, by the ticket.
static NOTED: ForkLocal<Mutex<Option<(u64, Before)>>> = ForkLocal::new();

/// How long a process that is forced out spends on it, and how long it waits for who notes something.
const BOUND: Duration = Duration::from_millis(250);
const TO_NOTE: Duration = Duration::from_millis(50);

impl Before {
    /// What it is like now.
    ///
    /// # Errors
    /// ENOTTY. It is not this session's, or gone.
    pub fn of(terminal: OwnedFd) -> Result<Self> {
        let modes = rustix::termios::tcgetattr(&terminal)?;
        let owner = rustix::termios::tcgetpgrp(&terminal)?;
        Ok(Self { terminal: Arc::new(terminal), modes, owner, holder: owner })
    }

    /// The same, in a worker that was lent it by its parent.
    ///
    /// # Errors
    /// As for `of`; EMFILE; the parent has gone.
    pub fn of_loan(terminal: impl AsFd) -> Result<Self> {
        let before = Self::of(fd::duplicate(terminal).map_err(|_| rustix::io::Errno::MFILE)?)?;
        Ok(Self { owner: rustix::process::getpgid(rustix::process::getppid())?, ..before })
    }

    /// The terminal.
    pub fn terminal(&self) -> &OwnedFd {
        &self.terminal
    }

    /// Who was in the foreground.
    pub fn owner(&self) -> Pid {
        self.owner
    }

    /// Gives the foreground to a process group. One of another session has no foreground to be in.
    pub fn move_to(&mut self, group: Pid) {
        if rustix::termios::tcsetpgrp(&*self.terminal, group).is_ok() {
            self.holder = group;
        }
    }

    /// Has it be like that again, for a thread that no signal stops.
    pub fn restore(&self) {
        // A terminal that is gone needs nothing given back.
        if self.holder != self.owner {
            let _ = rustix::termios::tcsetpgrp(&*self.terminal, self.owner);
        }
        let _ = rustix::termios::tcsetattr(&*self.terminal, OptionalActions::Now, &self.modes);
    }

    /// Whether nobody else has taken it meanwhile: a shell, say, that has seen the end of the program.
    fn is_held(&self) -> bool {
        rustix::termios::tcgetpgrp(&*self.terminal) == Ok(self.holder)
    }
}

/// Somebody debugs there from now on.
pub fn note(ticket: u64, before: Before) {
    // In a process that was forked behind our back nobody has it to give back.
    if let Ok(noted) = NOTED.get_or_make(|| Ok(Mutex::default())) {
        *lock(noted) = Some((ticket, before));
    }
}

/// Not any more.
pub fn forget(ticket: u64) {
    if let Ok(Some(noted)) = NOTED.get() {
        lock(noted).take_if(|(other, _)| *other == ticket);
    }
}

/// For a process that ends at once: leaves the terminal as it was, if somebody debugs there, within a bound.
pub fn give_back() {
    let Ok(Some(noted)) = NOTED.get() else { return };
    let Some((_, before)) = lock_within(noted, TO_NOTE).and_then(|mut noted| noted.take()) else { return };
    let done = Arc::new(Event::new());
    let over = Arc::clone(&done);
    // On a thread of its own, which no signal stops, and which may stay in the kernel for as long as it likes.
    let restorer = thread::spawn_deaf("th-terminal", move || {
        if before.is_held() {
            before.restore();
        }
        over.set();
    });
    if restorer.is_ok() {
        done.wait_through_signals(Some(Instant::now() + BOUND));
    }
}

/// In the only thread of a fork's child.
pub fn forget_all() {
    NOTED.forget();
}
