//! Pressing an interpreter through its own threads.
//!
//! Whoever comes from outside queues for the GIL behind every thread that wants it, 5 ms each. A thread
//! that has it takes note of a summons at its next check of the eval loop.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use super::super::attach::Token;
use super::super::door::Door;
use super::{Force, all_threads, condemn};
use crate::ffi::_PyEval_AddPendingCall;
use crate::ffi::offsets::Offsets;
use crate::sys::lock::lock;

impl Door {
    /// Has the interpreter behind the door pressed by whichever of its threads runs Python next. That is in
    /// vain for those that are blocked, which [`Door::press`] is for. Waits for no GIL.
    /// Works until the door is sealed.
    pub fn summon(self: &Arc<Self>, force: Force) {
        self.note(force);
        let Some((stay, _)) = self.enter_summons() else { return };
        // Checked when the first subinterpreter was made; where this Python's layout is not known, neither is
        // that of the function below.
        if Offsets::if_checked().is_none() || lock(&self.state).summons.replace(force).is_some() {
            return; // or one is on its way
        }
        let argument = Arc::into_raw(Arc::clone(self)).cast_mut().cast::<c_void>();
        // SAFETY: `stay` keeps the interpreter; the function takes the reference that goes with it, and has
        // the form that 3.14 calls.
        let refused = unsafe { _PyEval_AddPendingCall(stay.interpreter.as_ptr(), obey, argument, 0) } != 0;
        if refused {
            // SAFETY: nobody else will take the reference.
            drop(unsafe { Arc::from_raw(argument.cast::<Self>()) });
            lock(&self.state).summons = None;
        }
    }
}

/// What a thread of the interpreter calls: between two of its bytecodes, or when the interpreter ends.
unsafe extern "C" fn obey(door: *mut c_void) -> c_int {
    // SAFETY: the reference that `summon` has put by for this one call.
    let door = unsafe { Arc::from_raw(door.cast::<Door>()) };
    // SAFETY: CPython calls this attached.
    let token = unsafe { Token::assume_attached() };
    let force = lock(&door.state).summons.take();
    // Once the door is sealed there is nobody to be pressed.
    if let (Some(force), Some((_stay, spared))) = (force, door.enter_summons())
        && let Ok(mut threads) = all_threads(token)
    {
        threads.retain(|thread| Some(thread.native) != spared);
        condemn(token, &threads, force);
    }
    0
}
