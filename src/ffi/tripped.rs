//! Whether CPython has called its handler of SIGINT for the last one that came.
//!
//! The C handler sets a mark beside the Python handler in a table of the runtime; the mark is taken away when
//! that is called, in whatever loop or call of the main thread. It is in no table of offsets, so it is searched
//! for.

use std::ffi::c_int;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use super::object::{Owned, take_exception};
use super::offsets::Offsets;
use super::{_PyRuntime, py};
use crate::error::{Error, Result};

/// One entry of the table, as CPython 3.14 has it: the mark, and the handler.
#[repr(C)]
struct Entry {
    mark: c_int,
    handler: *mut py::PyObject,
}

/// The signals by which the table is told from all else; that of 0 is not used.
const COMPARED: std::ops::RangeInclusive<i32> = 1..=31;

static SIGINT: OnceLock<Option<usize>> = OnceLock::new();

/// Looks for the table, the first time.
///
/// # Errors
/// When it is not found, or the calling thread is not one of the main interpreter's.
///
/// # Safety
/// The thread is attached to the main interpreter.
pub unsafe fn find() -> Result<()> {
    if SIGINT.get().is_none() {
        // SAFETY: forwarded to the caller.
        let found = unsafe { search()? };
        let _ = SIGINT.set(found);
    }
    match SIGINT.get() {
        Some(Some(_)) => Ok(()),
        _ => Err(Error::unsupported("this Python keeps its signal handlers where they are not found")),
    }
}

/// Whether SIGINT has been noted and its handler not been called. `None` before [`find`].
pub fn is_sigint_waiting() -> Option<bool> {
    let offset = (*SIGINT.get()?)?;
    // SAFETY: the place was found to be an `int` of the runtime's, which is static memory; CPython writes to
    // it by atomics too.
    let mark = unsafe { &*(&raw const _PyRuntime).add(offset).cast::<AtomicI32>() };
    Some(mark.load(Ordering::Acquire) != 0)
}

/// The place of the mark, from the start of the runtime; `None` when there is not exactly one such table.
///
/// # Safety
/// As [`find`].
unsafe fn search() -> Result<Option<usize>> {
    let runtime_size = Offsets::get()?.runtime_size();
    let mut handlers = Vec::new();
    // SAFETY: forwarded to the caller; all objects are alive while they are used.
    unsafe {
        let module = Owned::from_new(py::PyImport_ImportModule(c"_signal".as_ptr()))?;
        for number in COMPARED {
            let name = c"getsignal".as_ptr();
            let handler = py::PyObject_CallMethod(module.as_ptr(), name, c"i".as_ptr(), number);
            if handler.is_null() {
                return Err(take_exception());
            }
            handlers.push(Owned::from_new(handler)?);
        }
    }
    let size = size_of::<Entry>();
    let Some(last) = runtime_size.checked_sub(size * (handlers.len() + 1)) else { return Ok(None) };
    let handler_at = |table: usize, number: usize| {
        let offset = table + size * number + std::mem::offset_of!(Entry, handler);
        // SAFETY: the whole table ends before `last` and a table's size, which is what the runtime says it has.
        unsafe { (&raw const _PyRuntime).add(offset).cast::<*mut py::PyObject>().read_unaligned() }
    };
    let mut found = (0..=last).step_by(align_of::<Entry>()).filter(|&table| {
        handlers.iter().zip(1..).all(|(handler, number)| handler_at(table, number) == handler.as_ptr())
    });
    Ok(match (found.next(), found.next()) {
        (Some(table), None) => Some(table + size * libc::SIGINT.unsigned_abs() as usize),
        _ => None,
    })
}
