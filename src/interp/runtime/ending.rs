//! How a program ends: the exception that it ended with, its threads, its exit functions, what is
//! still in its buffers. All of it as CPython does at the end of the main interpreter
//! (`_PyErr_PrintEx`, `_Py_Finalize`).

use std::ffi::{CStr, c_char};

use super::interrupt;
use super::pending::{Pending, Result, attribute, call_method, done, import, new, sys};
use crate::ffi::object::Owned;
use crate::ffi::py;
use crate::interp::attach::Token;

unsafe extern "C" {
    // Not in pyo3-ffi 0.30.
    fn PyErr_FormatUnraisable(format: *const c_char, ...);
}

/// CPython's exit code when the last words could not be written.
pub(super) const NOT_FLUSHED: i32 = 120;

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended {
    /// The exit code.
    pub(super) code: i32,
    /// By a KeyboardInterrupt that nobody caught: the process is to die by SIGINT.
    pub(super) interrupted: bool,
}

impl Ended {
    pub(super) fn with(code: i32) -> Self {
        Self { code, interrupted: false }
    }
}

/// Takes the pending exception: a `SystemExit` for its code, any other to be shown by
/// `sys.excepthook`.
///
/// # Safety
/// The thread is attached, and an exception is pending.
pub(super) unsafe fn report_exception() -> Ended {
    // SAFETY: forwarded to the caller; the classes are immortal, and the exception is ours once taken.
    unsafe {
        let Ok(raised) = interrupt::take_exception() else { return Ended::with(1) };
        let interrupted = is_a(&raised, py::PyExc_KeyboardInterrupt);
        let code = if is_a(&raised, py::PyExc_SystemExit) { exit_code(raised) } else { show(&raised) };
        Ended { code, interrupted }
    }
}

/// # Safety
/// The thread is attached, and `class` is a live exception class.
unsafe fn is_a(raised: &Owned, class: *mut py::PyObject) -> bool {
    // SAFETY: forwarded to the caller.
    unsafe { py::PyErr_GivenExceptionMatches(raised.as_ptr(), class) != 0 }
}

/// The exit code of a `SystemExit`; one that is no number is a text for stderr.
///
/// # Safety
/// The thread is attached.
unsafe fn exit_code(raised: Owned) -> i32 {
    // SAFETY: forwarded to the caller; all objects are alive while they are used.
    unsafe {
        let said = attribute(&raised, c"code").unwrap_or_else(|Pending| {
            py::PyErr_Clear();
            raised
        });
        if said.as_ptr() == py::Py_None() {
            return 0;
        }
        if py::PyLong_Check(said.as_ptr()) != 0 {
            let code = py::PyLong_AsLongLong(said.as_ptr());
            if !py::PyErr_Occurred().is_null() {
                py::PyErr_Clear();
                return -1;
            }
            // Cut to an int as CPython does; the kernel keeps 8 bits of it.
            return code as i32;
        }
        match sys(c"stderr") {
            Some(stderr) => {
                if py::PyFile_WriteObject(said.as_ptr(), stderr.as_ptr(), py::Py_PRINT_RAW) < 0 {
                    py::PyErr_Clear();
                }
            }
            // This falls back on the C library's stream.
            None => py::PySys_FormatStderr(c"%S".as_ptr(), said.as_ptr()),
        }
        py::PySys_WriteStderr(c"\n".as_ptr());
        1
    }
}

/// Shows an exception by `sys.excepthook`, which may end the program in its own way.
///
/// # Safety
/// The thread is attached.
unsafe fn show(raised: &Owned) -> i32 {
    // SAFETY: forwarded to the caller; all objects are alive while they are used, PySys_SetObject
    // takes a reference of its own, and the null ends the list of arguments.
    unsafe {
        let kind = Owned::from_borrowed(py::Py_TYPE(raised.as_ptr()).cast());
        let traceback = match new(py::PyException_GetTraceback(raised.as_ptr())) {
            Ok(traceback) => traceback,
            Err(Pending) => Owned::from_borrowed(py::Py_None()),
        };
        let raised = raised.as_ptr();
        let last = [
            (c"last_exc", raised),
            (c"last_type", kind.as_ptr()),
            (c"last_value", raised),
            (c"last_traceback", traceback.as_ptr()),
        ];
        for (name, value) in last {
            if py::PySys_SetObject(name.as_ptr(), value) < 0 {
                py::PyErr_Clear();
            }
        }
        let Some(hook) = sys(c"excepthook") else {
            py::PySys_WriteStderr(c"sys.excepthook is missing\n".as_ptr());
            py::PyErr_DisplayException(raised);
            return 1;
        };
        let end = std::ptr::null_mut::<py::PyObject>();
        let arguments = (kind.as_ptr(), raised, traceback.as_ptr());
        let called =
            py::PyObject_CallFunctionObjArgs(hook.as_ptr(), arguments.0, arguments.1, arguments.2, end);
        if new(called).is_ok() {
            return 1;
        }
        let Ok(second) = new(py::PyErr_GetRaisedException()) else { return 1 };
        if is_a(&second, py::PyExc_SystemExit) {
            return exit_code(second);
        }
        py::PySys_WriteStderr(c"Error in sys.excepthook:\n".as_ptr());
        py::PyErr_DisplayException(second.as_ptr());
        py::PySys_WriteStderr(c"\nOriginal exception was:\n".as_ptr());
        py::PyErr_DisplayException(raised);
        1
    }
}

/// Waits for the program's threads, runs its exit functions and flushes its streams; returns how it
/// has ended then.
pub(super) fn wind_up(token: Token<'_>, ended: Ended) -> Ended {
    // SAFETY: the token proves that the thread is attached; the formats take no arguments.
    unsafe {
        if let Some(threading) = imported(c"threading")
            && end_threads(&threading).is_err()
        {
            PyErr_FormatUnraisable(c"Exception ignored on threading shutdown".as_ptr());
        }
        let run = import(c"atexit", c"_run_exitfuncs");
        if run.and_then(|run| new(py::PyObject_CallNoArgs(run.as_ptr()))).is_err() {
            PyErr_FormatUnraisable(c"Exception ignored in atexit".as_ptr());
        }
    }
    let code = if flush(token) { ended.code } else { NOT_FLUSHED };
    Ended { code, ..ended }
}

/// `threading._shutdown()`. In a subinterpreter that neither tells those who wait for the main thread,
/// nor remembers that it was called, so that the interpreter's end would call its functions again.
///
/// # Safety
/// The thread is attached, and `threading` is that module.
unsafe fn end_threads(threading: &Owned) -> Result<()> {
    // SAFETY: forwarded to the caller; lists take references of their own, and null deletes a slice.
    unsafe {
        let functions = attribute(threading, c"_threading_atexits")?;
        let main_thread = attribute(&attribute(threading, c"_main_thread")?, c"_os_thread_handle")?;
        // The first registered is the last called.
        let main_is_over = attribute(&main_thread, c"_set_done")?;
        done(py::PyList_Insert(functions.as_ptr(), 0, main_is_over.as_ptr()))?;
        let outcome = call_method(threading, c"_shutdown");
        let raised = py::PyErr_GetRaisedException();
        let all = py::PyList_Size(functions.as_ptr());
        if py::PyList_SetSlice(functions.as_ptr(), 0, all, std::ptr::null_mut()) != 0 {
            py::PyErr_Clear();
        }
        py::PyErr_SetRaisedException(raised);
        outcome.map(drop)
    }
}

/// A module, if the program has imported it.
///
/// # Safety
/// The thread is attached.
unsafe fn imported(name: &CStr) -> Option<Owned> {
    // SAFETY: forwarded to the caller; null without an exception means that it is not imported.
    unsafe {
        let name = super::pending::string(name).ok()?;
        new(py::PyImport_GetModule(name.as_ptr())).ok()
    }
}

/// Flushes stdout and stderr; whether that worked. A failure of stdout is reported.
pub(super) fn flush(_: Token<'_>) -> bool {
    let mut flushed = true;
    for name in [c"stdout", c"stderr"] {
        // SAFETY: the token proves that the thread is attached; the format takes no arguments.
        unsafe {
            let Some(stream) = sys(name).filter(|stream| !is_closed(stream)) else { continue };
            if call_method(&stream, c"flush").is_err() {
                flushed = false;
                if name == c"stdout" {
                    PyErr_FormatUnraisable(c"Exception ignored while flushing sys.stdout".as_ptr());
                } else {
                    py::PyErr_Clear();
                }
            }
        }
    }
    flushed
}

/// # Safety
/// The thread is attached.
unsafe fn is_closed(stream: &Owned) -> bool {
    // SAFETY: forwarded to the caller; the answer is alive while it is looked at.
    unsafe {
        let closed = attribute(stream, c"closed").map(|closed| py::PyObject_IsTrue(closed.as_ptr()));
        if !py::PyErr_Occurred().is_null() {
            py::PyErr_Clear();
        }
        matches!(closed, Ok(1))
    }
}

/// Flushes stderr and stdout, keeping a pending exception and adding none.
pub(super) fn flush_quietly(_: Token<'_>) {
    // SAFETY: the token proves that the thread is attached; the exception is taken and put back.
    unsafe {
        let raised = py::PyErr_GetRaisedException();
        for name in [c"stderr", c"stdout"] {
            if let Some(stream) = sys(name)
                && call_method(&stream, c"flush").is_err()
            {
                py::PyErr_Clear();
            }
        }
        py::PyErr_SetRaisedException(raised);
    }
}

/// What an interpreter says by itself: pressing its threads takes that from it.
pub(super) struct Voice([(&'static CStr, Option<Owned>); 2]);

impl Voice {
    /// Remembers it.
    pub(super) fn keep(_: Token<'_>) -> Self {
        // SAFETY: the token proves that the thread is attached.
        Self([c"stderr", c"unraisablehook"].map(|name| (name, unsafe { sys(name) })))
    }

    /// Gives it back.
    pub(super) fn restore(&self, _: Token<'_>) {
        for (name, value) in &self.0 {
            if let Some(value) = value {
                // SAFETY: the token proves that the thread is attached; sys takes its own reference.
                unsafe { py::PySys_SetObject(name.as_ptr(), value.as_ptr()) };
            }
        }
    }
}
