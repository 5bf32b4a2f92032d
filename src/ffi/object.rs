//! An owned reference to a Python object, and the pending exception as text.
//!
//! For code that is attached already: nothing here attaches or detaches.

use std::ffi::CStr;

use super::py;
use crate::error::{Error, Result};

/// An owned, non-null reference. Not `Send`: an object belongs to its interpreter.
#[derive(Debug)]
pub struct Owned(*mut py::PyObject);

impl Owned {
    /// Takes over a new reference; null means that an exception is pending.
    ///
    /// # Errors
    /// The pending exception, as text; it is cleared.
    ///
    /// # Safety
    /// The thread is attached, and `raw` is null or a new reference.
    pub unsafe fn from_new(raw: *mut py::PyObject) -> Result<Self> {
        if raw.is_null() {
            // SAFETY: forwarded to the caller.
            return Err(unsafe { take_exception() });
        }
        Ok(Self(raw))
    }

    /// Takes a reference to what is only borrowed.
    ///
    /// # Safety
    /// The thread is attached, and `raw` is a live object.
    pub unsafe fn from_borrowed(raw: *mut py::PyObject) -> Self {
        // SAFETY: forwarded to the caller.
        unsafe { py::Py_INCREF(raw) };
        Self(raw)
    }

    /// The reference, still owned by `self`.
    pub fn as_ptr(&self) -> *mut py::PyObject {
        self.0
    }

    /// Hands the reference over.
    pub fn into_ptr(self) -> *mut py::PyObject {
        std::mem::ManuallyDrop::new(self).0
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: the reference is ours, and an `Owned` never leaves the attached thread it was
        // made on.
        unsafe { py::Py_DECREF(self.0) };
    }
}

/// Takes the pending exception as an error whose text is `Type: message`.
///
/// # Safety
/// The thread is attached.
pub unsafe fn take_exception() -> Error {
    // SAFETY: forwarded to the caller; the call returns a new reference or null.
    let raised = unsafe { py::PyErr_GetRaisedException() };
    if raised.is_null() {
        return Error::python("a C-API call failed without an exception");
    }
    let raised = Owned(raised);
    // SAFETY: `raised` is alive, and so are its type and the strings made of it while `Owned`.
    let text = unsafe {
        let kind = CStr::from_ptr((*py::Py_TYPE(raised.as_ptr())).tp_name).to_string_lossy().into_owned();
        let message = py::PyObject_Str(raised.as_ptr());
        if message.is_null() {
            py::PyErr_Clear();
            kind
        } else {
            let message = Owned(message);
            match utf8(message.as_ptr()) {
                Some(message) if !message.is_empty() => format!("{kind}: {message}"),
                _ => kind,
            }
        }
    };
    Error::python(text)
}

/// The text of a `str`; `None` (and nothing pending) when it has surrogates or is no string.
///
/// # Safety
/// The thread is attached, and `raw` is a live object.
pub unsafe fn utf8(raw: *mut py::PyObject) -> Option<String> {
    let mut size = 0;
    // SAFETY: forwarded to the caller. The buffer lives as long as the object, which outlives this.
    unsafe {
        let data = py::PyUnicode_AsUTF8AndSize(raw, &mut size);
        if data.is_null() {
            py::PyErr_Clear();
            return None;
        }
        let bytes = std::slice::from_raw_parts(data.cast::<u8>(), size.unsigned_abs());
        Some(String::from_utf8_lossy(bytes).into_owned())
    }
}
