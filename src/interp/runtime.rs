//! Starting the embedded interpreter of the launcher, once, and running a program in it.

mod apart;
mod ending;
mod interrupt;
mod pending;
mod program;
mod script;

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::ffi::py;

pub use apart::{AtEnd, run_main_apart};
pub use interrupt::{Audience, leave, watch as watch_interrupts};

/// What to start with.
#[derive(Debug)]
pub struct Start<'a> {
    /// The python executable whose environment (prefix, pyvenv.cfg, site-packages) to take.
    pub executable: &'a Path,
    /// The arguments that `python3.14` would get, without its own name.
    pub arguments: &'a [std::ffi::OsString],
    /// Variables to set for the program, and for Python's own start.
    pub environment: &'a [(&'a str, &'a std::ffi::OsStr)],
}

/// Makes the built-in module known, before [`start`].
///
/// # Errors
/// When Python is up already or memory is short.
pub fn add_builtin(name: &'static CStr, init: unsafe extern "C" fn() -> *mut py::PyObject) -> Result<()> {
    // SAFETY: before initialisation, as the caller promises by the order of its calls; both live
    // for ever.
    let done = unsafe { py::PyImport_AppendInittab(name.as_ptr(), Some(init)) };
    if done == 0 { Ok(()) } else { Err(Error::python("failed to register the built-in module")) }
}

/// Starts Python as `python3.14 ARGUMENTS…` does, up to the point where it would run the program.
/// Leaves the process as that does when the arguments ask for it (`--version`) or are wrong.
///
/// # Errors
/// What CPython says, when it can't start.
pub fn start(start: &Start<'_>) -> Result<()> {
    for (name, value) in start.environment {
        // SAFETY: the launcher has no other thread before Python is up.
        unsafe { std::env::set_var(name, value) };
    }
    let executable = c_string(start.executable.as_os_str())?;
    let mut arguments = vec![executable.clone()];
    for argument in start.arguments {
        arguments.push(c_string(argument)?);
    }
    let mut pointers: Vec<_> = arguments.iter().map(|argument| argument.as_ptr().cast_mut()).collect();
    // SAFETY: the configuration is initialised before anything reads it and cleared on every path;
    // the strings live until CPython has copied them.
    unsafe {
        let mut config = std::mem::MaybeUninit::<py::PyConfig>::uninit();
        py::PyConfig_InitPythonConfig(config.as_mut_ptr());
        let config = config.assume_init_mut();
        let mut status =
            py::PyConfig_SetBytesArgv(config, pointers.len().cast_signed(), pointers.as_mut_ptr().cast());
        if py::PyStatus_Exception(status) == 0 {
            status = py::PyConfig_SetBytesString(config, &mut config.program_name, executable.as_ptr());
        }
        if py::PyStatus_Exception(status) == 0 {
            status = py::Py_InitializeFromConfig(config);
        }
        py::PyConfig_Clear(config);
        if py::PyStatus_Exception(status) != 0 {
            // Prints the reason and exits with 1, or exits as asked (`--help`, `--version`).
            py::Py_ExitStatusException(status);
        }
    }
    Ok(())
}

/// Runs the program that the arguments of [`start`] named, finalises Python and returns the exit
/// code that the process should leave with.
pub fn run_main() -> i32 {
    // SAFETY: after `start`, on the thread that started.
    unsafe { py::Py_RunMain() }
}

/// Proof that the starting thread is attached, between [`start`] and the end of the program.
pub fn starting_thread() -> super::attach::Token<'static> {
    // SAFETY: initialisation leaves its thread attached.
    unsafe { super::attach::Token::assume_attached() }
}

fn c_string(text: &std::ffi::OsStr) -> Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| Error::invalid("a NUL in an argument"))
}
