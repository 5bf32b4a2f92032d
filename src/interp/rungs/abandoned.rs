//! `abandoned`: what can't be ended is left where it is, also at the end of the program.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::super::attach::Token;
use super::super::door::Door;
use crate::error::{Error, Result};
use crate::ffi::offsets::Offsets;
use crate::ffi::py;
use crate::sys::kick::Kicker;
use crate::sys::lock::lock;

/// How long the end of a program waits for supervisor threads inside a condemned interpreter.
const VISITORS_LEAVE: Duration = Duration::from_millis(200);

impl Door {
    /// Leaves the interpreter behind at the end of the program: its threads stop where they are, and
    /// the end of the runtime, which would wait for it or crash into it, passes it by.
    ///
    /// # Errors
    /// When this Python's layout is not known.
    pub fn leave_behind(&self, token: Token<'_>, kicker: &Kicker) -> Result<()> {
        if token.interpreter_id() != 0 {
            return Err(Error::state("only the main interpreter leaves others behind"));
        }
        let offsets = Offsets::get()?;
        // Visitors leave of themselves, unless they wait for a GIL that they will never get.
        let deadline = Instant::now() + VISITORS_LEAVE;
        token.detached(|| {
            let mut state = lock(&self.state);
            state.interpreter = None;
            while state.visitors > 0 {
                let Some(left) = deadline.checked_duration_since(Instant::now()) else { return };
                state = self.left.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        });
        let state = lock(&self.state);
        let (Some(runner), Some(interpreter)) = (state.runner_native, state.behind) else { return Ok(()) };
        kicker.park(runner);
        // SAFETY: its runner, which alone could end the interpreter, has been stopped just now or is
        // in code that does not return; whoever else has a state in it needs a GIL to get rid of that,
        // which this thread holds (shared) or the runner (its own).
        unsafe {
            let mut thread = py::PyInterpreterState_ThreadHead(interpreter.as_ptr());
            while !thread.is_null() {
                kicker.park(offsets.thread_ids(thread).native);
                thread = py::PyThreadState_Next(thread);
            }
            offsets.unlink(interpreter.as_ptr());
        }
        Ok(())
    }
}
