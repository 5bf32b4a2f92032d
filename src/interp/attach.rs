//! Being attached to an interpreter, as a value: a guard attaches and detaches, a token proves it.
//!
//! Our own guards and not `PyGILState_*`: those know the main interpreter only.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use crate::ffi::offsets::Offsets;
use crate::ffi::py;
use crate::ffi::walk::Walk;

/// Proof that the current thread is attached to some interpreter. Borrowed from a guard.
#[derive(Debug, Clone, Copy)]
pub struct Token<'a>(PhantomData<(&'a (), *mut ())>);

impl Token<'_> {
    /// # Safety
    /// The thread is attached for as long as the token lives.
    pub(super) unsafe fn assume_attached() -> Self {
        Self(PhantomData)
    }

    /// The id of the interpreter that this thread is attached to; 0 is the main one.
    pub fn interpreter_id(self) -> i64 {
        // SAFETY: the token proves that the thread is attached.
        unsafe { py::PyInterpreterState_GetID(py::PyInterpreterState_Get()) }
    }

    /// Runs `body` detached, so that other threads can have this interpreter, and attaches again.
    pub fn detached<R>(self, body: impl FnOnce() -> R) -> R {
        struct Reattach(*mut py::PyThreadState);
        impl Drop for Reattach {
            fn drop(&mut self) {
                // SAFETY: the state was saved on this thread and nobody else may use it.
                unsafe { py::PyEval_RestoreThread(self.0) };
            }
        }
        // SAFETY: the token proves that the thread is attached.
        let _reattach = Reattach(unsafe { py::PyEval_SaveThread() });
        body()
    }
}

/// An interpreter that is alive for as long as whoever handed this out says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interpreter(*mut py::PyInterpreterState);

// SAFETY: the pointer is only ever used to attach to it, by the thread that does so.
unsafe impl Send for Interpreter {}
// SAFETY: as above.
unsafe impl Sync for Interpreter {}

impl Interpreter {
    /// The main interpreter; it lives until the runtime is finalised.
    pub fn main() -> Self {
        // SAFETY: a field of the runtime that is set at start-up and never changes.
        Self(unsafe { py::PyInterpreterState_Main() })
    }

    /// The interpreter that the thread is attached to.
    pub fn current(_: Token<'_>) -> Self {
        // SAFETY: the token proves that the thread is attached.
        Self(unsafe { py::PyInterpreterState_Get() })
    }

    /// Where it is, for who reads it from outside.
    pub fn address(self) -> u64 {
        self.0 as u64
    }

    /// The kernel's ids of its threads, seen from outside. None where this Python's layout is not known.
    pub fn threads(self) -> Vec<i32> {
        let found = Walk::own().map(|walk| walk.threads(self.address())).unwrap_or_default();
        found.into_iter().map(|(_, native)| native).collect()
    }

    /// Where CPython keeps what is its own and no object, for this interpreter and for all.
    pub fn internals(self, offsets: &Offsets) -> [Range<u64>; 2] {
        offsets.internals(self.0)
    }

    pub(super) fn as_ptr(self) -> *mut py::PyInterpreterState {
        self.0
    }
}

thread_local! {
    static VISITS: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is a visitor in the interpreter that it is attached to.
pub(super) fn is_visitor() -> bool {
    VISITS.get()
}

/// A thread state of its own for a thread that Python did not make; attached while it lives.
#[derive(Debug)]
pub struct Attached(PhantomData<*mut ()>);

impl Attached {
    /// Waits for the interpreter's GIL and attaches. The wait has no bound: an interpreter whose
    /// GIL is never given up never lets anyone in, so call this on a thread that can be spared.
    ///
    /// # Safety
    /// The interpreter is alive until the guard is dropped, and this thread is not attached.
    pub unsafe fn new(interpreter: Interpreter) -> Self {
        // SAFETY: forwarded to the caller. The new state is this thread's until it is deleted.
        unsafe {
            let state = py::PyThreadState_New(interpreter.as_ptr());
            py::PyEval_RestoreThread(state);
        }
        VISITS.set(true);
        Self(PhantomData)
    }

    /// The proof.
    pub fn token(&self) -> Token<'_> {
        // SAFETY: attached since `new`, until `drop`, which can't run while the token is borrowed.
        unsafe { Token::assume_attached() }
    }
}

/// Runs `body` with the proof, if the calling thread is attached already.
pub fn with_current<R>(body: impl FnOnce(Token<'_>) -> R) -> Option<R> {
    // SAFETY: may be called whether attached or not: it returns null then.
    if unsafe { py::PyThreadState_GetUnchecked() }.is_null() {
        return None;
    }
    // SAFETY: attached, as was just seen, and nothing that `body` can do safely changes that for longer
    // than a call.
    Some(body(unsafe { Token::assume_attached() }))
}

/// Attaches the calling thread, which must belong to the supervisor, to the main interpreter while
/// `body` runs.
///
/// The supervisor's threads are stopped before the main interpreter ends, and are never attached
/// outside a guard of this module.
pub fn with_main<R>(body: impl FnOnce(Token<'_>) -> R) -> R {
    // SAFETY: as said above: the main interpreter is alive and this thread is not attached.
    let attached = unsafe { Attached::new(Interpreter::main()) };
    body(attached.token())
}

impl Drop for Attached {
    fn drop(&mut self) {
        VISITS.set(false);
        // SAFETY: this thread is attached with the state that `new` made: the guard is not Send,
        // and everything that swaps states below it swaps back.
        unsafe {
            py::PyThreadState_Clear(py::PyThreadState_Get());
            py::PyThreadState_DeleteCurrent();
        }
    }
}
