//! A subinterpreter on the thread that made it.

use std::ffi::CStr;
use std::marker::PhantomData;

use super::attach::Token;
use super::door::Door;
use crate::error::{Error, Result};
use crate::ffi::{Py_NewInterpreterFromConfig, py};
use crate::sys::fd;

/// Which GIL an interpreter has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gil {
    /// The main interpreter's: the legacy configuration, which every extension module accepts.
    Shared,
    /// Its own: runs in parallel; single-phase extension modules refuse to load there.
    Own,
}

impl Gil {
    fn config(self) -> py::PyInterpreterConfig {
        let own = self == Self::Own;
        py::PyInterpreterConfig {
            use_main_obmalloc: (!own).into(),
            // os.fork() in a subinterpreter kills the child; a RuntimeError is kinder.
            allow_fork: 0,
            allow_exec: (!own).into(),
            allow_threads: 1,
            // trio's worker threads are daemons, also with a GIL of one's own.
            allow_daemon_threads: 1,
            check_multi_interp_extensions: own.into(),
            gil: if own { py::PyInterpreterConfig_OWN_GIL } else { py::PyInterpreterConfig_SHARED_GIL },
        }
    }
}

/// A live subinterpreter; the thread that made it is attached to it.
#[derive(Debug)]
pub struct SubInterpreter {
    state: *mut py::PyThreadState,
    not_send: PhantomData<*mut ()>,
}

impl SubInterpreter {
    /// Makes one and attaches the calling thread, which must not be attached to any.
    ///
    /// # Errors
    /// What CPython says (out of memory, mostly).
    pub fn create(gil: Gil) -> Result<Self> {
        // Before there is one: whoever forks meanwhile does not wait until it is made.
        super::fork::guard_if_checked();
        let config = gil.config();
        let mut state = std::ptr::null_mut();
        // SAFETY: the runtime is up for as long as supervisor threads run; the configuration is
        // complete; without a current thread state CPython has none to put back.
        let status = unsafe { Py_NewInterpreterFromConfig(&mut state, &config) };
        // SAFETY: plain functions on a status that CPython just returned.
        if unsafe { py::PyStatus_Exception(status) } != 0 || state.is_null() {
            let reason = if status.err_msg.is_null() {
                "no reason given".into()
            } else {
                // SAFETY: CPython's messages are static C strings.
                unsafe { CStr::from_ptr(status.err_msg) }.to_string_lossy().into_owned()
            };
            // CPython does not pass on the reason that is by far the most frequent.
            let hint = fd::event_fd().err().map(|error| format!(" ({error})")).unwrap_or_default();
            return Err(Error::python(format!("failed to make a subinterpreter: {reason}{hint}")));
        }
        let made = Self { state, not_send: PhantomData };
        super::fork::guard(made.token());
        made.close_streams();
        Ok(made)
    }

    /// Has it know that a standard stream of the process is closed, whatever stands in its place.
    fn close_streams(&self) {
        const NAMES: [[&CStr; 2]; 3] =
            [[c"stdin", c"__stdin__"], [c"stdout", c"__stdout__"], [c"stderr", c"__stderr__"]];
        for (_, names) in (0..).zip(NAMES).filter(|(number, _)| fd::is_placeholder(*number)) {
            for name in names {
                // SAFETY: the thread is attached, with its state; the name is a C string, None immortal. For want
                // of memory it keeps a stream that goes nowhere.
                unsafe {
                    if py::PySys_SetObject(name.as_ptr(), py::Py_None()) != 0 {
                        py::PyErr_Clear();
                    }
                }
            }
        }
    }

    /// The proof of being attached.
    pub fn token(&self) -> Token<'_> {
        // SAFETY: attached since `create` until `end`; whoever detaches in between attaches again.
        unsafe { Token::assume_attached() }
    }

    /// Ends it. No other thread may have a state in it: the caller has seen to that, and the door
    /// is closed. What Python code the end runs (finalisers, mostly) can still be stopped through
    /// [`Door::doom`].
    ///
    /// Without the call the interpreter and this thread's state leak, on purpose: ending one that
    /// still has threads crashes now and then.
    pub fn end(self, door: &Door) {
        door.doom_of_runner().hang_over(self.token());
        self.drop_what_is_local();
        // SAFETY: the thread is attached with this very state, and it is the interpreter's last.
        unsafe { py::Py_EndInterpreter(self.state) };
    }

    /// Drops what is local to this thread: CPython does that only after the collector's last round. What refers
    /// to itself, as an event loop does that was stopped in the middle, would never be freed, nor closed.
    fn drop_what_is_local(&self) {
        // SAFETY: the thread is attached, with its state, of which the dictionary and the function are borrowed;
        // null is none. That function calls no Python code.
        unsafe {
            let locals = py::PyThreadState_GetDict();
            if !locals.is_null() {
                py::PyDict_Clear(locals);
            }
            let set_hooks = py::PySys_GetObject(c"set_asyncgen_hooks".as_ptr());
            if !set_hooks.is_null() {
                let none = py::Py_None();
                let end = std::ptr::null_mut::<py::PyObject>();
                py::Py_XDECREF(py::PyObject_CallFunctionObjArgs(set_hooks, none, none, end));
            }
            // Somebody has put something else in its place.
            py::PyErr_Clear();
        }
    }

    /// Leaves it as it is, without a thread state in it, for whoever attaches to it later.
    pub fn leave(self) -> super::attach::Interpreter {
        let interpreter = super::attach::Interpreter::current(self.token());
        // SAFETY: the thread is attached with this very state, which nobody else uses.
        unsafe {
            py::PyThreadState_Clear(self.state);
            py::PyThreadState_DeleteCurrent();
        }
        interpreter
    }
}
