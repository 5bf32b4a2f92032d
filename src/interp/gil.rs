//! Who has a GIL, seen from outside: no thread state, and nothing is waited for.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::attach::Interpreter;
use super::door::Door;
use crate::ffi::_PyEval_AddPendingCall;
use crate::ffi::offsets::Offsets;
use crate::ffi::walk::Walk;

/// A GIL that somebody has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Which GIL.
    pub gil: u64,
    /// The state of the thread that has it.
    pub holder: u64,
    /// How often it had gone from one thread to another.
    pub switches: u64,
    /// That thread, as the kernel calls it.
    pub thread: i32,
    /// The interpreter that this thread is attached to.
    pub interpreter: u64,
}

/// Who has the GIL of an interpreter; `None` when nobody has, or this Python's layout is not known.
pub fn holder(interpreter: Interpreter) -> Option<Held> {
    let walk = Walk::own()?;
    let gil = walk.gil_of(interpreter.address())?;
    let holder = walk.holder_of(gil)?;
    let (thread, interpreter) = walk.thread_of(holder)?;
    Some(Held { gil, holder, switches: walk.switches_of(gil)?, thread, interpreter })
}

/// Which GIL an interpreter has.
pub fn of(interpreter: Interpreter) -> Option<u64> {
    Walk::own()?.gil_of(interpreter.address())
}

/// Whether a thread of an interpreter has run Python since that was asked.
#[derive(Debug, Default)]
pub struct Pulse(Arc<AtomicBool>);

impl Pulse {
    /// Asks whichever thread of the interpreter behind `door` runs Python next. `None` when the door is
    /// closed, or there is no room for the question.
    pub fn ask(door: &Door) -> Option<Self> {
        let (stay, _) = door.enter_summons()?;
        Offsets::if_checked()?;
        let pulse = Self::default();
        let argument = Arc::into_raw(Arc::clone(&pulse.0)).cast_mut().cast::<c_void>();
        // SAFETY: `stay` keeps the interpreter; the function takes the reference that goes with it, and has
        // the form that 3.14 calls.
        let refused = unsafe { _PyEval_AddPendingCall(stay.interpreter.as_ptr(), beat, argument, 0) } != 0;
        if refused {
            // SAFETY: nobody else will take the reference.
            drop(unsafe { Arc::from_raw(argument.cast_const().cast::<AtomicBool>()) });
            return None;
        }
        Some(pulse)
    }

    /// Whether one has.
    pub fn has_beaten(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What a thread of the interpreter calls: between two of its bytecodes, or when the interpreter ends.
unsafe extern "C" fn beat(answer: *mut c_void) -> c_int {
    // SAFETY: the reference that `ask` has put by for this one call.
    unsafe { Arc::from_raw(answer.cast_const().cast::<AtomicBool>()) }.store(true, Ordering::Release);
    0
}
