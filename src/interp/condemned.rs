//! Reaching into an interpreter from outside, as long as it is there.
//!
//! A [`Door`] stands before each interpreter that the supervisor may have to act on. Whoever enters
//! gets a thread state of its own there; the interpreter's own thread closes the door, and waits
//! until everybody has left, before it ends the interpreter.

use std::sync::{Condvar, Mutex, PoisonError};

use super::attach::{Attached, Interpreter, Token};
use super::call;
use crate::error::Result;
use crate::ffi::offsets::{Offsets, ThreadIds};
use crate::ffi::py;
use crate::sys::lock::lock;

/// The way into one interpreter for threads that are not its own.
#[derive(Debug, Default)]
pub struct Door {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    interpreter: Option<Interpreter>,
    /// The Python ident of the thread that opened it.
    runner: u64,
    visitors: usize,
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
        // SAFETY: pthread_self has no preconditions. It is what Python takes as a thread's ident.
        state.runner = unsafe { libc::pthread_self() };
    }

    /// Lets nobody in any more, and waits until the last visitor has left. Visitors need the GIL to
    /// leave, so the caller is detached meanwhile.
    pub fn close(&self, token: Token<'_>) {
        token.detached(|| {
            let mut state = lock(&self.state);
            state.interpreter = None;
            while state.visitors > 0 {
                state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        });
    }

    /// Attaches to the interpreter, runs `body` there and leaves. `None` when the door is closed.
    ///
    /// It waits for the interpreter's GIL without a bound; see [`Attached::new`].
    pub fn visit<R>(&self, body: impl FnOnce(Token<'_>) -> R) -> Option<R> {
        struct Leave<'a>(&'a Door);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                lock(&self.0.state).visitors -= 1;
                self.0.left.notify_all();
            }
        }
        let interpreter = {
            let mut state = lock(&self.state);
            let interpreter = state.interpreter?;
            state.visitors += 1;
            interpreter
        };
        let _leave = Leave(self);
        // SAFETY: the interpreter's thread waits in `close` until the visitor count, which was
        // raised while the door was open, is back to zero; `_leave` is dropped after `attached`.
        // Visitors are threads of the supervisor, which are never attached.
        let attached = unsafe { Attached::new(interpreter) };
        Some(body(attached.token()))
    }
}

impl Door {
    /// Asks the worker behind the door to stop: through its event loop where it has one, else by
    /// raising `Cancelled` in the thread that opened the door.
    ///
    /// # Errors
    /// What its Python side raised.
    pub fn cancel(&self) -> Result<()> {
        let runner = lock(&self.state).runner;
        let asked = self.visit(|token| {
            match call::predicate_if_imported(token, c"tractor_host._child", c"cancel")? {
                Some(false) => call::raise_in(token, runner, c"tractor_host._errors", c"Cancelled").map(drop),
                Some(true) | None => Ok(()),
            }
        });
        asked.unwrap_or(Ok(()))
    }
}

/// The threads of the interpreter that this thread is attached to, but for this one.
///
/// # Errors
/// When this Python's layout is not known.
pub fn other_threads(_: Token<'_>) -> Result<Vec<ThreadIds>> {
    let offsets = Offsets::get()?;
    let mut found = Vec::new();
    // SAFETY: attached: this interpreter's thread states are made and deleted under its GIL (or,
    // for states of threads that are only just starting, added at the head of the list).
    unsafe {
        let own = py::PyThreadState_Get();
        let mut state = py::PyInterpreterState_ThreadHead(py::PyInterpreterState_Get());
        while !state.is_null() {
            if state != own {
                found.push(offsets.thread_ids(state));
            }
            state = py::PyThreadState_Next(state);
        }
    }
    Ok(found)
}

/// Makes `SystemExit` rise in each of `threads`, at its next Python instruction. Returns how many of
/// them this interpreter still has.
pub fn raise_exit_in(_: Token<'_>, threads: &[ThreadIds]) -> usize {
    let mut hit = 0;
    for thread in threads {
        // SAFETY: attached. An ident that is no thread of this interpreter (any more) is not found.
        let found =
            unsafe { py::PyThreadState_SetAsyncExc(thread.ident.cast_signed(), py::PyExc_SystemExit) };
        hit += usize::from(found > 0);
    }
    hit
}

/// Drops what has been raised in this thread but not been delivered yet.
pub fn forget_pending(token: Token<'_>) {
    // Each run delivers at most one; a second can have been set while the first was on its way.
    for _ in 0..4 {
        if call::source(token, "pass").is_ok() {
            return;
        }
    }
}
