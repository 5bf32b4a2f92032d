//! A gate that the threads of an interpreter wait at, between two bytecodes, without its GIL.
//!
//! It is closed from outside, without a GIL: whichever of the interpreter's threads runs Python next handles a
//! pending call, in which it waits. Before that it has the same asked of the others. A thread in C code is not
//! stopped, and meets the gate when it is back. Nothing is raised there: that would collide with an exception
//! that another thread has set.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::thread::futex;

use super::attach::{self, Interpreter, Token};
use super::door::Door;
use crate::ffi::offsets::{GilView, Offsets};
use crate::ffi::{_PyEval_AddPendingCall, py};

/// The gate of one interpreter. Open at first.
#[derive(Debug, Default)]
pub struct Gate {
    state: AtomicU32,
    waiting: AtomicU32,
    /// A pending call is on its way.
    posted: AtomicBool,
}

/// Why a gate is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Closed {
    /// Somebody wants the worker to stand still.
    Paused = 1,
    /// It is not its turn.
    NotItsTurn = 2,
}

/// It is being ended: open, whatever else is said.
const FREE: u32 = 4;
/// There is no interpreter behind it, or that is about to end.
const GONE: u32 = 8;

impl Gate {
    fn shuts(state: u32) -> bool {
        state & (FREE | GONE) == 0 && state != 0
    }

    /// Whether threads that come to it wait.
    pub fn is_closed(&self) -> bool {
        Self::shuts(self.state.load(Ordering::SeqCst))
    }

    /// Whether a thread waits at it.
    pub fn is_waited_at(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Whether it is closed for this reason.
    pub fn is(&self, reason: Closed) -> bool {
        self.state.load(Ordering::SeqCst) & reason as u32 != 0
    }

    fn set(&self, bit: u32, on: bool) {
        let before = if on {
            self.state.fetch_or(bit, Ordering::SeqCst)
        } else {
            self.state.fetch_and(!bit, Ordering::SeqCst)
        };
        let after = if on { before | bit } else { before & !bit };
        if Self::shuts(before) && !Self::shuts(after) {
            // It cannot fail: the word is ours and private.
            let _ = futex::wake(&self.state, futex::Flags::PRIVATE, u32::MAX >> 1);
        }
    }

    fn wait(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        loop {
            let state = self.state.load(Ordering::SeqCst);
            if !Self::shuts(state) {
                break;
            }
            // Woken, changed before it slept or interrupted by a signal: the loop's head decides.
            let _ = futex::wait(&self.state, futex::Flags::PRIVATE, state, None);
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// Has the threads of the interpreter, which does not end meanwhile, come to the gate.
    fn post(self: &Arc<Self>, interpreter: *mut py::PyInterpreterState) {
        // Where this Python's layout is not known, neither is that of the function below.
        if Offsets::if_checked().is_none() || self.posted.swap(true, Ordering::SeqCst) {
            return; // or one is on its way, and looks at the state when it arrives
        }
        let argument = Arc::into_raw(Arc::clone(self)).cast_mut().cast::<c_void>();
        // SAFETY: forwarded to the caller; the function takes the reference that goes with it, and has the form
        // that 3.14 calls.
        if unsafe { _PyEval_AddPendingCall(interpreter, pass, argument, 0) } != 0 {
            // SAFETY: nobody else will take the reference.
            drop(unsafe { Arc::from_raw(argument.cast::<Self>()) });
            self.posted.store(false, Ordering::SeqCst);
        }
    }
}

/// What a thread of the interpreter calls: between two of its bytecodes, or when the interpreter ends.
unsafe extern "C" fn pass(gate: *mut c_void) -> c_int {
    // SAFETY: the reference that `post` has put by for this one call.
    let gate = unsafe { Arc::from_raw(gate.cast::<Gate>()) };
    gate.posted.store(false, Ordering::SeqCst);
    // Whoever visits asks anew when it leaves.
    if !gate.is_closed() || attach::is_visitor() {
        return 0;
    }
    // SAFETY: CPython calls this attached.
    let token = unsafe { Token::assume_attached() };
    let interpreter = Interpreter::current(token).as_ptr();
    if let Some(offsets) = Offsets::if_checked() {
        // SAFETY: in a pending call of this interpreter, attached to it.
        unsafe { offsets.share_pending_calls(interpreter) };
    }
    gate.post(interpreter);
    token.detached(|| gate.wait());
    0
}

impl Door {
    /// Closes the gate for this reason, or takes that back. Waits for no GIL.
    pub fn hold(&self, reason: Closed, on: bool) {
        self.gate.set(reason as u32, on);
        self.call_to_gate();
    }

    /// Has the interpreter's threads come to the gate, if that is closed.
    pub(super) fn call_to_gate(&self) {
        if self.gate.is_closed()
            && let Some(stay) = self.enter()
        {
            self.gate.post(stay.interpreter.as_ptr());
        }
    }

    /// Opens the gate for good, because the worker is to end; or as it was, because it can't be ended.
    pub fn free(&self, on: bool) {
        self.gate.set(FREE, on);
        self.call_to_gate();
    }

    /// There is an interpreter behind the gate, or there is none any more: nobody may wait at it on the way to its
    /// end.
    pub(super) fn gate_gone(&self, on: bool) {
        self.gate.set(GONE, on);
    }
}

/// CPython's own switch interval, and the one while workers take turns, in microseconds.
const INTERVAL: u64 = 5000;
const SHORT: u64 = 1000;
static SHORTENED: AtomicBool = AtomicBool::new(false);

/// Has the threads of the main interpreter get their GIL sooner, or as before. An interval that somebody has chosen
/// stays.
pub fn shorten_interval(on: bool) {
    let Some(gil) = main_gil() else { return };
    if on {
        SHORTENED.store(gil.replace_interval(INTERVAL, SHORT), Ordering::SeqCst);
    } else if SHORTENED.swap(false, Ordering::SeqCst) {
        gil.replace_interval(SHORT, INTERVAL);
    }
}

/// The main interpreter's GIL, where this Python's layout is known.
pub fn main_gil() -> Option<GilView> {
    Offsets::if_checked()?.main_gil()
}
