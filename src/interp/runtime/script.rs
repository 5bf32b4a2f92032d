//! Running a file as `__main__`: a script, byte code, or stdin, as CPython's `pymain_run_file` and
//! `_PyRun_SimpleFileObject` do.

use std::ffi::{CStr, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::ending::{Ended, flush_quietly, report_exception};
use super::pending::{Pending, Result, done, import, new, string};
use super::program::{is_set, main_dict, path_bytes, setting};
use crate::ffi::object::Owned;
use crate::ffi::py;
use crate::interp::attach::Token;

unsafe extern "C" {
    // Not in pyo3-ffi 0.30.
    fn Py_fopen(path: *mut py::PyObject, mode: *const c_char) -> *mut libc::FILE;
    // Not in libc 0.2.
    static mut stdin: *mut libc::FILE;
}

/// CPython's exit code for a script that cannot be opened.
const NO_SCRIPT: i32 = 2;
/// What stands before the code in a `.pyc`.
const PYC_HEAD: usize = 16;

/// Runs the script that the command line names.
pub(super) fn run_path(token: Token<'_>, path: &Owned) -> Result<Ended> {
    let bytes = path_bytes(token, path)?;
    // SAFETY: the token proves that the thread is attached. The formats fit their arguments, which are
    // alive; the file is open until `run_file` closes it.
    unsafe {
        let file = Py_fopen(path.as_ptr(), c"rb".as_ptr());
        if file.is_null() {
            let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
            py::PyErr_Clear();
            let program = program_name(token)?;
            let format = c"%S: can't open file %R: [Errno %d] %s\n";
            let reason = libc::strerror(errno);
            py::PySys_FormatStderr(format.as_ptr(), program.as_ptr(), path.as_ptr(), errno, reason);
            return Ok(Ended::with(NO_SCRIPT));
        }
        if Path::new(OsStr::from_bytes(bytes.as_bytes())).is_dir() {
            let program = program_name(token)?;
            let format = c"%S: %R is a directory, cannot continue\n";
            py::PySys_FormatStderr(format.as_ptr(), program.as_ptr(), path.as_ptr());
            libc::fclose(file);
            return Ok(Ended::with(1));
        }
        if is_set(token, c"skip_source_first_line") {
            skip_line(file);
        }
        run_file(token, path, &bytes, Source::Script(file))
    }
}

/// Runs what stdin has.
pub(super) fn run_stdin(token: Token<'_>) -> Result<Ended> {
    // SAFETY: the token proves that the thread is attached; the C library's own stream is never closed.
    unsafe { run_file(token, &string(c"<stdin>")?, c"<stdin>", Source::Stdin(stdin)) }
}

fn program_name(token: Token<'_>) -> Result<Owned> {
    match setting(token, c"program_name") {
        Some(name) => Ok(name),
        // SAFETY: the token proves that the thread is attached.
        None => unsafe { string(c"python3.14") },
    }
}

/// Reads up to the end of the first line. The newline stays, so that line numbers are right.
///
/// # Safety
/// The file is open for reading.
unsafe fn skip_line(file: *mut libc::FILE) {
    // SAFETY: forwarded to the caller; one character can always be put back.
    unsafe {
        loop {
            match libc::fgetc(file) {
                libc::EOF => return,
                character if character == i32::from(b'\n') => {
                    libc::ungetc(character, file);
                    return;
                }
                _ => {}
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Source {
    /// Closed when it has been read.
    Script(*mut libc::FILE),
    Stdin(*mut libc::FILE),
}

/// Runs a file in `__main__`, which has `__file__` meanwhile.
///
/// # Safety
/// The source is open for reading.
unsafe fn run_file(token: Token<'_>, name: &Owned, path: &CStr, source: Source) -> Result<Ended> {
    let main = main_dict(token)?;
    let main = main.as_ptr();
    // SAFETY: the token proves that the thread is attached; `main` is a dict that is alive, and takes
    // references of its own. Forwarded to the caller for the source.
    unsafe {
        let file_is_ours = py::PyDict_ContainsString(main, c"__file__".as_ptr()) == 0;
        if file_is_ours {
            done(py::PyDict_SetItemString(main, c"__file__".as_ptr(), name.as_ptr()))?;
            done(py::PyDict_SetItemString(main, c"__cached__".as_ptr(), py::Py_None()))?;
        }
        let outcome = evaluate(name, path, source, main);
        flush_quietly(token);
        let ended = match outcome {
            Ok(()) => Ended::with(0),
            Err(Pending) => report_exception(),
        };
        if file_is_ours {
            for name in [c"__file__", c"__cached__"] {
                if py::PyDict_PopString(main, name.as_ptr(), std::ptr::null_mut()) < 0 {
                    py::PyErr_Clear();
                }
            }
        }
        Ok(ended)
    }
}

/// # Safety
/// The thread is attached, `main` is a live dict, the source is open for reading.
unsafe fn evaluate(name: &Owned, path: &CStr, source: Source, main: *mut py::PyObject) -> Result<()> {
    // SAFETY: forwarded to the caller. A script is closed by the one branch or the other.
    unsafe {
        let (file, close) = match source {
            Source::Script(file) if is_byte_code(file, path) => {
                libc::fclose(file);
                set_loader(c"SourcelessFileLoader", name, main)?;
                let code = read_byte_code(path)?;
                return new(py::PyEval_EvalCode(code.as_ptr(), main, main)).map(drop);
            }
            Source::Script(file) => {
                if let Err(pending) = set_loader(c"SourceFileLoader", name, main) {
                    libc::fclose(file);
                    return Err(pending);
                }
                (file, 1)
            }
            Source::Stdin(file) => (file, 0),
        };
        let flags = std::ptr::null_mut();
        new(py::PyRun_FileExFlags(file, path.as_ptr(), py::Py_file_input, main, main, close, flags)).map(drop)
    }
}

/// # Safety
/// The file is open for reading.
unsafe fn is_byte_code(file: *mut libc::FILE, path: &CStr) -> bool {
    if path.to_bytes().ends_with(b".pyc") {
        return true;
    }
    let mut head = [0_u8; 2];
    // SAFETY: forwarded to the caller; the buffer has the two bytes that are asked for.
    unsafe {
        // Not at the start: `-x` has skipped a line.
        if libc::ftell(file) != 0 {
            return false;
        }
        let read = libc::fread(head.as_mut_ptr().cast(), 1, 2, file);
        libc::rewind(file);
        read == 2 && i64::from(u16::from_le_bytes(head)) == py::PyImport_GetMagicNumber() & 0xffff
    }
}

/// # Safety
/// The thread is attached.
unsafe fn read_byte_code(path: &CStr) -> Result<Owned> {
    let data = std::fs::read(OsStr::from_bytes(path.to_bytes())).unwrap_or_default();
    let magic = data.first_chunk::<4>().map(|magic| i64::from(u32::from_le_bytes(*magic)));
    // SAFETY: forwarded to the caller; the buffer outlives the call that reads it.
    unsafe {
        let refuse = |text: &CStr| {
            py::PyErr_SetString(py::PyExc_RuntimeError, text.as_ptr());
            Err(Pending)
        };
        if magic != Some(py::PyImport_GetMagicNumber()) || data.len() < PYC_HEAD {
            return refuse(c"Bad magic number in .pyc file");
        }
        let code = &data[PYC_HEAD..];
        match new(py::PyMarshal_ReadObjectFromString(code.as_ptr().cast(), code.len().cast_signed())) {
            Ok(code) if py::PyCode_Check(code.as_ptr()) != 0 => Ok(code),
            _ => refuse(c"Bad code object in .pyc file"),
        }
    }
}

/// # Safety
/// The thread is attached, `main` is a live dict.
unsafe fn set_loader(class: &CStr, name: &Owned, main: *mut py::PyObject) -> Result<()> {
    // SAFETY: forwarded to the caller; the null ends the list of arguments.
    unsafe {
        let class = import(c"_frozen_importlib_external", class)?;
        let (module, end) = (string(c"__main__")?, std::ptr::null_mut::<py::PyObject>());
        let loader = py::PyObject_CallFunctionObjArgs(class.as_ptr(), module.as_ptr(), name.as_ptr(), end);
        done(py::PyDict_SetItemString(main, c"__loader__".as_ptr(), new(loader)?.as_ptr()))
    }
}
