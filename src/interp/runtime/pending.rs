//! C-API calls whose failure is the pending exception itself, for code that must show it to the user
//! as Python does; elsewhere an exception becomes an [`Error`](crate::Error) at once.

use std::ffi::{CStr, c_int};

use crate::ffi::object::Owned;
use crate::ffi::py;

/// An exception is pending on this thread.
#[derive(Debug)]
pub(super) struct Pending;

pub(super) type Result<T> = std::result::Result<T, Pending>;

/// Takes over a new reference; null means that an exception is pending.
///
/// # Safety
/// The thread is attached, and `raw` is null or a new reference.
pub(super) unsafe fn new(raw: *mut py::PyObject) -> Result<Owned> {
    if raw.is_null() {
        return Err(Pending);
    }
    // SAFETY: forwarded to the caller; as `raw` is not null, no exception is touched.
    unsafe { Owned::from_new(raw) }.map_err(|_| Pending)
}

/// The outcome of a function that leaves an exception when it does not return 0.
pub(super) fn done(status: c_int) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(Pending) }
}

/// A new `str`.
///
/// # Safety
/// The thread is attached.
pub(super) unsafe fn string(text: &CStr) -> Result<Owned> {
    // SAFETY: forwarded to the caller; the text is copied.
    unsafe { new(py::PyUnicode_FromString(text.as_ptr())) }
}

/// An attribute of `sys` that is there and not `None`.
///
/// # Safety
/// The thread is attached.
pub(super) unsafe fn sys(name: &CStr) -> Option<Owned> {
    // SAFETY: forwarded to the caller. The reference is borrowed from `sys` and made ours before
    // anything else can run; `None` is immortal.
    unsafe {
        let found = py::PySys_GetObject(name.as_ptr());
        (!found.is_null() && found != py::Py_None()).then(|| Owned::from_borrowed(found))
    }
}

/// `object.name`.
///
/// # Safety
/// The thread is attached, and `object` is alive.
pub(super) unsafe fn attribute(object: &Owned, name: &CStr) -> Result<Owned> {
    // SAFETY: forwarded to the caller.
    unsafe { new(py::PyObject_GetAttrString(object.as_ptr(), name.as_ptr())) }
}

/// `import module; module.name`.
///
/// # Safety
/// The thread is attached.
pub(super) unsafe fn import(module: &CStr, name: &CStr) -> Result<Owned> {
    // SAFETY: forwarded to the caller; the module outlives the look-up.
    unsafe { attribute(&new(py::PyImport_ImportModule(module.as_ptr()))?, name) }
}

/// `object.name()`.
///
/// # Safety
/// The thread is attached, and `object` is alive.
pub(super) unsafe fn call_method(object: &Owned, name: &CStr) -> Result<Owned> {
    // SAFETY: forwarded to the caller; the method outlives the call.
    unsafe { new(py::PyObject_CallNoArgs(attribute(object, name)?.as_ptr())) }
}
