//! `destroy`: the interpreter's own end, with its finalisers, is cut short.

use std::cell::RefCell;
use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::super::attach::Token;
use super::super::door::Door;
use super::{Force, silence};
use crate::ffi::offsets::Offsets;
use crate::ffi::py;
use crate::sys::kick::Kicker;
use crate::sys::lock::lock;

impl Door {
    /// For an interpreter whose door is closed because its own thread is ending it: lets no further
    /// line of Python run in that, and ends the system call that the thread is blocked in.
    pub fn doom(&self, kicker: Option<&mut Kicker>) {
        let state = lock(&self.state);
        state.doom.sealed.store(true, Ordering::Release);
        if let (Some(thread), Some(interpreter), Some(kicker)) = (state.runner_native, state.behind, kicker)
            && let Some(offsets) = Offsets::if_checked()
        {
            // Under the lock: the thread takes it too, before it leaves and its id can be reused.
            kicker.kick(thread, &offsets.internals(interpreter.as_ptr()));
        }
    }

    /// What the runner holds while it ends its interpreter.
    pub(in super::super) fn doom_of_runner(&self) -> Arc<Doom> {
        Arc::clone(&lock(&self.state).doom)
    }

    /// Whether the end of the interpreter had to be forced.
    pub fn was_forced(&self) -> bool {
        lock(&self.state).doom.struck.load(Ordering::Acquire)
    }
}

/// Whether the end of an interpreter may still run Python.
#[derive(Debug, Default)]
pub struct Doom {
    sealed: AtomicBool,
    struck: AtomicBool,
}

impl Doom {
    /// From now on, every line of Python that the calling thread runs raises `SystemExit` if (and as
    /// soon as) the doom is sealed.
    pub(in super::super) fn hang_over(self: Arc<Self>, _: Token<'_>) {
        OVER_THIS_THREAD.set(Some(self));
        // SAFETY: attached; the function asks a thread-local that is set for this thread.
        unsafe { py::PyEval_SetTrace(Some(raise_if_sealed), std::ptr::null_mut()) };
    }
}

thread_local! {
    static OVER_THIS_THREAD: RefCell<Option<Arc<Doom>>> = const { RefCell::new(None) };
}

/// A trace function that raises, once the thread's doom is sealed.
extern "C" fn raise_if_sealed(
    _: *mut py::PyObject,
    _: *mut py::PyFrameObject,
    _: c_int,
    _: *mut py::PyObject,
) -> c_int {
    OVER_THIS_THREAD.with_borrow(|doom| match doom {
        Some(doom) if doom.sealed.load(Ordering::Acquire) => {
            // SAFETY: CPython calls trace functions attached.
            let token = unsafe { Token::assume_attached() };
            if !doom.struck.swap(true, Ordering::AcqRel) {
                silence(token, Force::Unblock);
            }
            // SAFETY: attached, as said.
            unsafe { py::PyErr_SetNone(py::PyExc_SystemExit) };
            -1
        }
        _ => 0,
    })
}
