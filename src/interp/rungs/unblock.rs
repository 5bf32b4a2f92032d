//! `unblock`: what the threads of the interpreter are blocked in returns an error.

use super::super::attach::{Interpreter, Token};
use super::super::door::Door;
use crate::error::Result;
use crate::ffi::offsets::{Offsets, ThreadIds};
use crate::sys::kick::Kicker;
use crate::sys::lock::lock;

/// Ends the system calls and lock waits that the given threads are in.
///
/// The caller holds the GIL of their interpreter: a thread that Python knows needs it to leave, so
/// each of them is still there.
pub(super) fn kick_all(token: Token<'_>, threads: &[ThreadIds], kicker: &mut Kicker) {
    // Known, or there would be no threads to kick.
    let Some(offsets) = Offsets::if_checked() else { return };
    let internals = offsets.internals(Interpreter::current(token).as_ptr());
    for thread in threads {
        kicker.kick(thread.native, &internals);
    }
}

impl Door {
    /// Kills the processes that the given threads have started: they wait for them, mostly.
    ///
    /// # Errors
    /// When /proc is not mounted.
    pub(super) fn kill_children_of(&self, threads: &[ThreadIds]) -> Result<()> {
        let mut state = lock(&self.state);
        for thread in threads {
            state.orphans.kill_children_of(thread.native)?;
        }
        Ok(())
    }
}
