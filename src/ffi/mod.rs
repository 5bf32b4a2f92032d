//! The raw C-API: what CPython exports and pyo3-ffi does not declare, CPython's private offsets, and
//! the border between Rust functions and the interpreter that calls them. No policy lives here.
#![allow(unsafe_code)] // this room is the border to C

pub mod module;
pub mod object;
pub mod offsets;
pub mod tripped;
pub mod value;
pub mod walk;

use std::ffi::{c_int, c_void};

pub use pyo3_ffi as py;

unsafe extern "C" {
    /// Creates an interpreter on the calling thread; the thread is attached to it afterwards.
    pub(crate) fn Py_NewInterpreterFromConfig(
        state: *mut *mut py::PyThreadState,
        config: *const py::PyInterpreterConfig,
    ) -> py::PyStatus;

    /// Has `function` called with `argument` by whichever thread of the interpreter runs Python next, at its
    /// next check of the eval loop. May be called by any thread, attached or not. Not 0: there is no room.
    /// Private; its form is that of 3.14, which [`offsets::Offsets::get`] vouches for.
    pub(crate) fn _PyEval_AddPendingCall(
        interpreter: *mut py::PyInterpreterState,
        function: unsafe extern "C" fn(*mut c_void) -> c_int,
        argument: *mut c_void,
        flags: c_int,
    ) -> c_int;

    /// The runtime's state. Only the table at its head is read (see `offsets`).
    pub(crate) static _PyRuntime: u8;
}

/// What the import system calls for `tractor_host._native`: in the `.so`, and in the launcher, which
/// has the module built in.
///
/// # Safety
/// Called by an importing interpreter, which is attached.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PyInit__native() -> *mut py::PyObject {
    crate::events::listen();
    // SAFETY: forwarded to the caller.
    unsafe { module::initialise(crate::py::NAME, crate::py::doc(), crate::py::table) }
}
