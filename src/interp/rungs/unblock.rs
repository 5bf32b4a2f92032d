//! `unblock`: what the threads of the interpreter are blocked in returns an error.

use super::super::door::Door;
use crate::error::Result;
use crate::ffi::offsets::ThreadIds;
use crate::sys::kick::Kicker;
use crate::sys::lock::lock;

/// Ends the system calls and lock waits that the given threads are in.
///
/// The caller holds the GIL of their interpreter: a thread that Python knows needs it to leave, so
/// each of them is still there.
pub(super) fn kick_all(threads: &[ThreadIds], kicker: &mut Kicker) {
    for thread in threads {
        kicker.kick(thread.native);
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
