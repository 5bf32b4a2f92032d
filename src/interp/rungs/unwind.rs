//! `unwind`: no line of Python runs on in any thread of the interpreter.

use std::ffi::c_int;

use super::super::attach::Token;
use crate::ffi::py;

/// Makes every line of Python raise `SystemExit`, in all threads of the interpreter, this one too.
pub(super) fn trace_all(_: Token<'_>) {
    // SAFETY: attached; the function needs no object.
    unsafe {
        py::PyEval_SetTraceAllThreads(Some(raise_always), std::ptr::null_mut());
        py::PyErr_Clear();
    }
}

/// Lets this thread run on.
pub(super) fn untrace(_: Token<'_>) {
    // SAFETY: attached.
    unsafe {
        py::PyEval_SetTrace(None, std::ptr::null_mut());
        py::PyErr_Clear();
    }
}

/// A trace function that always raises: no line of Python gets past it.
extern "C" fn raise_always(
    _: *mut py::PyObject,
    _: *mut py::PyFrameObject,
    _: c_int,
    _: *mut py::PyObject,
) -> c_int {
    // SAFETY: CPython calls trace functions attached.
    unsafe { py::PyErr_SetNone(py::PyExc_SystemExit) };
    -1
}
