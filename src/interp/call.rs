//! Calling our Python package from Rust, and the few settings that must stand before it can be
//! imported. Exceptions come back as text.

use std::ffi::{CStr, CString, c_int, c_void};

use super::attach::Token;
use crate::error::{Error, Result};
use crate::ffi::_PyEval_AddPendingCall;
use crate::ffi::object::{Owned, take_exception};
use crate::ffi::{py, tripped};

/// Imports `module` and calls its `function` without arguments.
///
/// # Errors
/// The exception that either of them raised, as text. `SystemExit` is no exception to this.
pub fn function(_: Token<'_>, module: &CStr, function: &CStr) -> Result<()> {
    // SAFETY: the token proves that the thread is attached; both names are C strings.
    unsafe {
        let module = Owned::from_new(py::PyImport_ImportModule(module.as_ptr()))?;
        let callable = Owned::from_new(py::PyObject_GetAttrString(module.as_ptr(), function.as_ptr()))?;
        Owned::from_new(py::PyObject_CallNoArgs(callable.as_ptr()))?;
    }
    Ok(())
}

/// Sets `sys.path`, decoding each entry as the file system does.
///
/// # Errors
/// Out of memory.
pub fn set_sys_path(token: Token<'_>, entries: &[Vec<u8>]) -> Result<()> {
    let list = path_list(token, entries)?;
    // SAFETY: attached; `list` is alive and PySys_SetObject takes a reference of its own.
    let done = unsafe { py::PySys_SetObject(c"path".as_ptr(), list.as_ptr()) };
    if done == 0 {
        return Ok(());
    }
    // SAFETY: attached, and the failed call left an exception.
    Err(unsafe { take_exception() })
}

fn path_list(_: Token<'_>, entries: &[Vec<u8>]) -> Result<Owned> {
    // SAFETY: the token proves that the thread is attached; PyList_Append takes its own reference.
    unsafe {
        let list = Owned::from_new(py::PyList_New(0))?;
        for entry in entries {
            let item = py::PyUnicode_DecodeFSDefaultAndSize(entry.as_ptr().cast(), entry.len().cast_signed());
            let item = Owned::from_new(item)?;
            if py::PyList_Append(list.as_ptr(), item.as_ptr()) != 0 {
                return Err(take_exception());
            }
        }
        Ok(list)
    }
}

/// Runs `code` in a namespace of its own. For the few lines that must run before our package can be
/// imported.
///
/// # Errors
/// The exception that it raised, as text.
pub fn source(_: Token<'_>, code: &str) -> Result<()> {
    let code = CString::new(code).map_err(|_| Error::invalid("a NUL in source code"))?;
    // SAFETY: the token proves that the thread is attached; `globals` outlives the run.
    unsafe {
        let globals = Owned::from_new(py::PyDict_New())?;
        if py::PyDict_SetItemString(globals.as_ptr(), c"__builtins__".as_ptr(), py::PyEval_GetBuiltins()) != 0
        {
            return Err(take_exception());
        }
        let run = py::PyRun_String(code.as_ptr(), py::Py_file_input, globals.as_ptr(), globals.as_ptr());
        Owned::from_new(run)?;
    }
    Ok(())
}

/// Calls `function` of a module, if that has been imported here.
///
/// # Errors
/// The exception that the function raised, as text.
pub fn function_if_imported(token: Token<'_>, module: &CStr, function: &CStr) -> Result<()> {
    if let Some(callable) = attribute_if_imported(token, module, function)? {
        // SAFETY: the token proves that the thread is attached, and `callable` is alive.
        unsafe { Owned::from_new(py::PyObject_CallNoArgs(callable.as_ptr()))? };
    }
    Ok(())
}

/// Raises the exception class `name` of an imported module in the thread with the Python ident
/// `thread`, at its next instruction. Whether there is such a module and thread here.
///
/// # Errors
/// When the module has no such name.
pub fn raise_in(token: Token<'_>, thread: u64, module: &CStr, name: &CStr) -> Result<bool> {
    let Some(class) = attribute_if_imported(token, module, name)? else { return Ok(false) };
    // SAFETY: attached; the class is alive, and CPython takes a reference of its own.
    Ok(unsafe { py::PyThreadState_SetAsyncExc(thread.cast_signed(), class.as_ptr()) } > 0)
}

fn attribute_if_imported(_: Token<'_>, module: &CStr, name: &CStr) -> Result<Option<Owned>> {
    // SAFETY: the token proves that the thread is attached; names are C strings, and a null module
    // without an exception means that it is not imported.
    unsafe {
        let module_name = Owned::from_new(py::PyUnicode_FromString(module.as_ptr()))?;
        let module = py::PyImport_GetModule(module_name.as_ptr());
        if module.is_null() {
            py::PyErr_Clear();
            return Ok(None);
        }
        let module = Owned::from_new(module)?;
        Owned::from_new(py::PyObject_GetAttrString(module.as_ptr(), name.as_ptr())).map(Some)
    }
}

/// Has `what` called by whichever thread of the main interpreter runs Python next, attached. Whether there was
/// room for that.
pub fn soon(what: fn()) -> bool {
    extern "C" fn call(what: *mut c_void) -> c_int {
        // SAFETY: it is the function that was given below.
        let what: fn() = unsafe { std::mem::transmute(what) };
        what();
        0
    }
    // SAFETY: these may be called by any thread, attached or not; a function's address is never freed.
    unsafe {
        py::Py_IsInitialized() != 0
            && _PyEval_AddPendingCall(py::PyInterpreterState_Main(), call, what as *mut c_void, 0) == 0
    }
}

/// Finds what tells whether a signal handler has been called.
///
/// # Errors
/// When it is not there, or the thread is attached to another interpreter than the main one.
pub fn find_handlers(token: Token<'_>) -> Result<()> {
    if token.interpreter_id() != 0 {
        return Err(Error::state("only the main interpreter handles signals: call it there"));
    }
    // SAFETY: attached to the main interpreter, as was just seen.
    unsafe { tripped::find() }
}
