//! Reaching into an interpreter from outside, as long as it is there.
//!
//! A [`Door`] stands before each interpreter that the supervisor may have to act on. Whoever enters
//! gets a thread state of its own there; the interpreter's own thread closes the door, and waits
//! until everybody has left, before it ends the interpreter. What is done behind it is in
//! [`super::rungs`].

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::attach::{Attached, Interpreter, Token};
use super::gate::Gate;
use super::rungs::Force;
use super::rungs::destroy::Doom;
use crate::sys::lock::lock;
use crate::sys::process::Orphans;

/// The way into one interpreter for threads that are not its own.
#[derive(Debug, Default)]
pub struct Door {
    pub(super) state: Mutex<State>,
    pub(super) left: Condvar,
    /// Where the interpreter's threads can be made to wait.
    pub gate: Arc<Gate>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) interpreter: Option<Interpreter>,
    /// The same, also once the door is closed.
    pub(super) behind: Option<Interpreter>,
    /// The thread that opened it, as long as it is there for sure.
    pub(super) runner_native: Option<i32>,
    /// Closed, and its own thread is seeing the others off; they can still be summoned.
    pub(super) evicting: bool,
    pub(super) visitors: usize,
    /// How hard the interpreter has been pressed so far.
    pub(super) pressed: Option<Force>,
    /// How hard the interpreter's own threads are to press it, once one of them gets to hear of that.
    pub(super) summons: Option<Force>,
    /// Processes that its threads had started, killed and to be reaped.
    pub(super) orphans: Orphans,
    /// What the interpreter's end asks before every line of Python.
    pub(super) doom: Arc<Doom>,
}

impl Door {
    /// A door with nothing behind it yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A door to the main interpreter, which is never closed.
    pub fn to_main() -> Self {
        let door = Self::new();
        lock(&door.state).interpreter = Some(Interpreter::main());
        door
    }

    /// Opens the door to the interpreter that the calling thread is attached to. That thread must
    /// close it before it ends the interpreter.
    pub fn open(&self, token: Token<'_>) {
        let mut state = lock(&self.state);
        state.interpreter = Some(Interpreter::current(token));
        state.behind = state.interpreter;
        state.evicting = false;
        state.runner_native = Some(crate::sys::thread::id());
        drop(state);
        self.gate_gone(false);
        self.call_to_gate();
    }

    /// Lets nobody in any more, and waits until the last visitor has left. Visitors need the GIL to
    /// leave, so the caller is detached meanwhile. Other threads of the interpreter can still be
    /// [summoned](Door::summon), until [`Door::seal`].
    pub fn close(&self, token: Token<'_>) {
        self.shut(token, true);
    }

    /// Has the interpreter left alone, for its end. The calling thread may be condemned still.
    pub fn seal(&self, token: Token<'_>) {
        self.shut(token, false);
    }

    fn shut(&self, token: Token<'_>, evicting: bool) {
        self.gate_gone(true);
        token.detached(|| {
            let mut state = lock(&self.state);
            state.interpreter = None;
            state.evicting = evicting;
            while state.visitors > 0 {
                state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        });
    }

    /// Attaches to the interpreter, runs `body` there and leaves. `None` when the door is closed.
    ///
    /// It waits for the interpreter's GIL without a bound; see [`Attached::new`].
    pub fn visit<R>(&self, body: impl FnOnce(Token<'_>) -> R) -> Option<R> {
        let stay = self.enter()?;
        // SAFETY: `stay` is dropped after `attached`, and keeps the interpreter. Visitors are threads of
        // the supervisor, which are never attached.
        let attached = unsafe { Attached::new(stay.interpreter) };
        let done = body(attached.token());
        drop(attached);
        // It may have taken a call that was not for it.
        self.call_to_gate();
        Some(done)
    }

    /// Keeps the interpreter, without attaching to it. `None` when the door is closed.
    pub(super) fn enter(&self) -> Option<Stay<'_>> {
        let mut state = lock(&self.state);
        let interpreter = state.interpreter?;
        state.visitors += 1;
        Some(Stay { door: self, interpreter })
    }

    /// As [`Door::enter`], until the door is sealed. The second is the thread that is none of the condemned:
    /// the interpreter's own, once the door is closed.
    pub(super) fn enter_summons(&self) -> Option<(Stay<'_>, Option<i32>)> {
        let mut state = lock(&self.state);
        let spared = if state.interpreter.is_none() { state.runner_native } else { None };
        let interpreter = state.interpreter.or(state.behind.filter(|_| state.evicting))?;
        state.visitors += 1;
        Some((Stay { door: self, interpreter }, spared))
    }

    /// The interpreter, as long as it has not ended.
    pub fn behind(&self) -> Option<Interpreter> {
        lock(&self.state).behind
    }

    /// The kernel's id of the thread that runs the interpreter, as long as that is there for sure.
    pub fn runner(&self) -> Option<i32> {
        lock(&self.state).runner_native
    }

    /// The runner's last word: from now on its thread is none of ours.
    pub fn runner_leaves(&self) {
        let mut state = lock(&self.state);
        state.runner_native = None;
        state.behind = None;
    }
}

/// The interpreter behind a door, which does not end while this is there: its own thread waits in
/// [`Door::close`] and [`Door::seal`] until the count of visitors, which was raised before, is back to zero.
pub(super) struct Stay<'a> {
    door: &'a Door,
    pub(super) interpreter: Interpreter,
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        lock(&self.door.state).visitors -= 1;
        self.door.left.notify_all();
    }
}
