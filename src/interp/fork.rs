//! Forking while Python is embedded, also while subinterpreters live; by us and by anybody else.

use std::sync::atomic::{AtomicBool, Ordering};

use super::attach::Token;
use super::template::Template;
use crate::error::{Error, Result};
use crate::events::fault;
use crate::ffi::offsets::Offsets;
use crate::ffi::py;
use crate::sys::{process, procfs};

/// Which process we are in after a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that asked, with the child's pid.
    Parent(i32),
    /// The new one. Its only thread is this one, attached to the main interpreter; all other
    /// interpreters are gone (their memory is left behind, copy-on-write).
    Child,
}

/// Sees to it that every fork of this process survives in the child, also one of the user's own
/// (`os.fork`, `multiprocessing`, `preexec_fn`): without it, the child of a process with
/// subinterpreters crashes in `PyOS_AfterFork_Child` (cpython#139759).
/// Where this Python's layout is not known nothing is done, and such a child ends as it does without us.
pub fn guard(_: Token<'_>) {
    // Checked now, while this thread is attached.
    if Offsets::get().is_ok() {
        guard_if_checked();
    }
}

/// As [`guard`], by a thread that may not be attached; nothing is done where nobody has looked at the layout yet.
pub fn guard_if_checked() {
    // Not a `Once`, which a fork by another thread would leave half done in its child. Two that come here at once
    // both have the handler entered: to run it again changes nothing.
    static GUARDED: AtomicBool = AtomicBool::new(false);
    if Offsets::if_checked().is_none() || GUARDED.load(Ordering::Acquire) {
        return;
    }
    match process::at_fork_in_child(leave_interpreters_behind) {
        Ok(()) => GUARDED.store(true, Ordering::Release),
        Err(error) => fault!("os.fork() beside subinterpreters will crash its child: {error}"),
    }
}

/// In a child that was just forked, before CPython (or anybody else) looks at it.
extern "C" fn leave_interpreters_behind() {
    // SAFETY: may be called without being attached: it returns null then.
    let state = unsafe { py::PyThreadState_GetUnchecked() };
    if state.is_null() {
        return; // not a fork of Python's: no Python will run in this child
    }
    let Ok(offsets) = Offsets::get() else { return };
    // Whoever had done that is not here.
    super::gate::shorten_interval(false);
    // SAFETY: this thread, the child's only one, is attached with `state`. CPython lets no other
    // interpreter than the main one fork; a child of those says so itself.
    unsafe {
        if py::PyThreadState_GetInterpreter(state) == py::PyInterpreterState_Main() {
            offsets.forget_other_interpreters();
        }
    }
}

/// Forks a child of this process's *parent*, in a process that has one thread. `None` in the child, which has
/// the main interpreter and, at most, the one that it adopts.
///
/// # Errors
/// When there are other threads; those of [`process::fork_as_sibling`].
pub fn fork_sibling(token: Token<'_>, adopts: Option<Template>) -> Result<process::Sibling> {
    if token.interpreter_id() != 0 {
        return Err(Error::state("only the main interpreter can fork"));
    }
    // Without /proc there is no telling.
    if let Ok(threads) = procfs::thread_names()
        && threads.len() > 1
    {
        return Err(Error::state(format!(
            "the fork server has {} threads ({}), which a fork would not copy: what it preloads must start none",
            threads.len(),
            threads.join(", ")
        )));
    }
    // Checked now: in the child, what CPython notes of the thread is the parent's at first. Where this Python's
    // layout is not known, the child has no ladder for subinterpreters, which it says itself.
    let _ = Offsets::get();
    // SAFETY: attached to the main interpreter, by the only thread: as was just seen, and none but this
    // one could start another.
    unsafe {
        py::PyOS_BeforeFork();
        let made = process::fork_as_sibling();
        match made {
            Ok(None) => {
                // No handler of `pthread_atfork` runs here.
                leave_interpreters_behind();
                py::PyOS_AfterFork_Child();
                if let Some(template) = adopts {
                    template.adopt();
                }
            }
            _ => py::PyOS_AfterFork_Parent(),
        }
        made.map_err(|error| Error::os("fork a worker", error))
    }
}

/// Forks the calling thread, which is attached to the MAIN interpreter and holds no lock of ours.
///
/// # Errors
/// EAGAIN, ENOMEM; or that this Python's layout is not known, while other interpreters live.
pub fn fork(token: Token<'_>) -> Result<Side> {
    if token.interpreter_id() != 0 {
        return Err(Error::state("only the main interpreter can fork"));
    }
    guard(token);
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
