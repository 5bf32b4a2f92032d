//! Forking while Python is embedded, also while subinterpreters live.

use super::attach::Token;
use crate::error::{Error, Result};
use crate::ffi::offsets::Offsets;
use crate::ffi::py;
use crate::sys::process;

/// Which process we are in after a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that asked, with the child's pid.
    Parent(i32),
    /// The new one. Its only thread is this one, attached to the main interpreter; all other
    /// interpreters are gone (their memory is left behind, copy-on-write).
    Child,
}

/// Forks the calling thread, which is attached to the MAIN interpreter and holds no lock of ours.
///
/// # Errors
/// EAGAIN, ENOMEM; or that this Python's layout is not known, while other interpreters live.
pub fn fork(token: Token<'_>) -> Result<Side> {
    if token.interpreter_id() != 0 {
        return Err(Error::state("only the main interpreter can fork"));
    }
    let offsets = Offsets::get().copied();
    // SAFETY: attached; walking two elements of the list of interpreters under the main GIL. One
    // with its own GIL may come or go meanwhile; that only changes whether we insist on the offsets.
    let alone = unsafe { py::PyInterpreterState_Next(py::PyInterpreterState_Head()).is_null() };
    if !alone && let Err(error) = offsets {
        return Err(error);
    }
    // SAFETY: attached to the main interpreter. BeforeFork takes the import lock, AfterFork_Parent
    // and AfterFork_Child give it back in their process. The child runs on with state that this
    // thread owns: the rooms above keep theirs in values that they hand to the clean thread.
    unsafe {
        let slot = offsets.as_ref().ok().and_then(|offsets| offsets.main_state_slot());
        py::PyOS_BeforeFork();
        match process::fork() {
            Ok(0) => {
                if let Ok(offsets) = offsets {
                    offsets.forget_other_interpreters();
                }
                py::PyOS_AfterFork_Child();
                if let (Ok(offsets), Some(slot)) = (offsets, slot) {
                    offsets.receive_signals(slot);
                }
                Ok(Side::Child)
            }
            outcome => {
                py::PyOS_AfterFork_Parent();
                match outcome {
                    Ok(pid) => Ok(Side::Parent(pid)),
                    Err(error) => Err(Error::os("fork a worker", error)),
                }
            }
        }
    }
}
