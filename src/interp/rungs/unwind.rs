//! `unwind`: no line of Python runs on in any thread of the interpreter.

use std::ffi::c_int;

use super::super::attach::Token;
use crate::ffi::py;

/// Makes every line of Python raise `SystemExit`, in all threads of the interpreter but this one.
pub(super) fn trace_all(_: Token<'_>) {
    // SAFETY: attached; the function needs no object. It sets this thread's too, which is put
    // back: this thread is not condemned.
    unsafe {
        py::PyEval_SetTraceAllThreads(Some(raise_always), std::ptr::null_mut());
        py::PyErr_Clear();
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
