//! Running the program that Python's configuration names, in the interpreter that this thread is
//! attached to, step by step as CPython's `pymain_run_python` does (Modules/main.c).
//!
//! CPython's own is of no use for a subinterpreter: at a `SystemExit` it ends the process from within,
//! before anybody could end the interpreter. No Python frame of ours is below the program's, so that
//! tracebacks and frame depths are what they must be.

use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::OsStrExt;

use super::ending::{Ended, report_exception};
use super::pending::{Pending, Result, done, import, new, string, sys};
use super::script;
use crate::ffi::object::{Owned, utf8};
use crate::ffi::py;
use crate::interp::attach::Token;

unsafe extern "C" {
    // Not in pyo3-ffi 0.30.
    fn PyConfig_Get(name: *const std::ffi::c_char) -> *mut py::PyObject;
}

/// Compile the text as it is, without looking for a coding cookie (not in pyo3-ffi 0.30).
const PYCF_IGNORE_COOKIE: i32 = 0x0800;

/// Whether the configuration asks for a prompt, after the program or in its stead.
pub(super) fn is_interactive(token: Token<'_>) -> bool {
    let named =
        [c"run_command", c"run_module", c"run_filename"].iter().any(|name| setting(token, name).is_some());
    let prompt = || rustix::termios::isatty(rustix::stdio::stdin());
    is_set(token, c"inspect") || is_set(token, c"interactive") || (!named && prompt())
}

/// Runs the program to its end, and reports the exception that it ended with.
pub(super) fn run(token: Token<'_>) -> Ended {
    start(token).unwrap_or_else(|Pending| {
        // SAFETY: the token proves that the thread is attached, and an exception is pending.
        unsafe { report_exception() }
    })
}

fn start(token: Token<'_>) -> Result<Ended> {
    let filename = setting(token, c"run_filename");
    let package = match &filename {
        Some(filename) if is_importable(token, filename)? => Some(filename),
        _ => None,
    };
    insert_first_path(token, package)?;
    if let Some(command) = setting(token, c"run_command") {
        run_command(token, &command)
    } else if let Some(module) = setting(token, c"run_module") {
        run_module(token, &module, true)
    } else if package.is_some() {
        // SAFETY: the token proves that the thread is attached.
        let main = unsafe { string(c"__main__") }?;
        run_module(token, &main, false)
    } else if let Some(filename) = &filename {
        script::run_path(token, filename)
    } else {
        script::run_stdin(token)
    }
}

/// A setting of the interpreter's configuration, unless it is `None`.
pub(super) fn setting(_: Token<'_>, name: &CStr) -> Option<Owned> {
    // SAFETY: the token proves that the thread is attached; `None` is immortal.
    unsafe {
        let value = new(PyConfig_Get(name.as_ptr()));
        if value.is_err() {
            py::PyErr_Clear();
        }
        value.ok().filter(|value| value.as_ptr() != py::Py_None())
    }
}

/// Whether a setting that is a bool or a number is set.
pub(super) fn is_set(token: Token<'_>, name: &CStr) -> bool {
    // SAFETY: the token proves that the thread is attached; neither kind runs Python code here.
    setting(token, name).is_some_and(|value| unsafe { py::PyObject_IsTrue(value.as_ptr()) } == 1)
}

/// The content of `__main__`.
pub(super) fn main_dict(_: Token<'_>) -> Result<Owned> {
    // SAFETY: the token proves that the thread is attached; the dict is borrowed from a module that
    // is alive.
    unsafe {
        let main = new(py::PyImport_AddModuleRef(c"__main__".as_ptr()))?;
        Ok(Owned::from_borrowed(py::PyModule_GetDict(main.as_ptr())))
    }
}

/// A path as the file system has it.
pub(super) fn path_bytes(_: Token<'_>, path: &Owned) -> Result<CString> {
    // SAFETY: the token proves that the thread is attached; the buffer is copied while its owner is
    // alive, up to its first NUL, which no path of a command line has.
    unsafe {
        let bytes = new(py::PyUnicode_EncodeFSDefault(path.as_ptr()))?;
        Ok(CStr::from_ptr(py::PyBytes_AsString(bytes.as_ptr())).to_owned())
    }
}

/// Whether the path is a directory or an archive, which is run by its `__main__` module.
fn is_importable(_: Token<'_>, path: &Owned) -> Result<bool> {
    // SAFETY: the token proves that the thread is attached; `path` is alive, `None` is immortal.
    unsafe {
        match new(py::PyImport_GetImporter(path.as_ptr())) {
            Ok(importer) => Ok(importer.as_ptr() != py::Py_None()),
            Err(Pending) => {
                py::PySys_WriteStderr(c"Failed checking if argv[0] is an import path entry\n".as_ptr());
                Err(Pending)
            }
        }
    }
}

/// Puts where the program is at the head of `sys.path`, unless Python's options forbid that.
fn insert_first_path(token: Token<'_>, package: Option<&Owned>) -> Result<()> {
    // SAFETY: the token proves that the thread is attached; PyList_Insert takes its own reference.
    unsafe {
        let computed;
        let entry = match package {
            Some(package) => package,
            None if is_set(token, c"safe_path") => return Ok(()),
            None => {
                let Some(argv0) = first_argument(token) else { return Ok(()) };
                let Some(entry) = first_path(path_bytes(token, &argv0)?.as_bytes()) else { return Ok(()) };
                let raw =
                    py::PyUnicode_DecodeFSDefaultAndSize(entry.as_ptr().cast(), entry.len().cast_signed());
                computed = new(raw)?;
                &computed
            }
        };
        match sys(c"path") {
            Some(path) => done(py::PyList_Insert(path.as_ptr(), 0, entry.as_ptr())),
            None => {
                py::PyErr_SetString(py::PyExc_RuntimeError, c"unable to get sys.path".as_ptr());
                Err(Pending)
            }
        }
    }
}

/// `sys.argv[0]`.
fn first_argument(_: Token<'_>) -> Option<Owned> {
    // SAFETY: the token proves that the thread is attached; the item is borrowed from a list that is
    // alive, and made ours at once.
    unsafe {
        let argv = sys(c"argv").filter(|argv| py::PyList_Check(argv.as_ptr()) != 0)?;
        (py::PyList_Size(argv.as_ptr()) > 0)
            .then(|| Owned::from_borrowed(py::PyList_GetItem(argv.as_ptr(), 0)))
    }
}

/// The script's directory with links resolved; the current one for `-m`; empty for `-c` and stdin.
fn first_path(argv0: &[u8]) -> Option<Vec<u8>> {
    let bytes = |path: std::path::PathBuf| path.into_os_string().into_encoded_bytes();
    match argv0 {
        b"-c" => return Some(Vec::new()),
        b"-m" => return std::env::current_dir().ok().map(bytes),
        _ => {}
    }
    let mut path = std::fs::canonicalize(OsStr::from_bytes(argv0)).map_or_else(|_| argv0.to_vec(), bytes);
    match path.iter().rposition(|byte| *byte == b'/') {
        None => path.clear(),
        Some(slash) => path.truncate(slash.max(1)),
    }
    Some(path)
}

fn run_command(token: Token<'_>, command: &Owned) -> Result<Ended> {
    // SAFETY: the token proves that the thread is attached; all objects are alive while they are used,
    // and the null ends the list of arguments.
    unsafe {
        let Some(source) = utf8(command.as_ptr()) else {
            py::PySys_WriteStderr(c"Unable to decode the command from the command line:\n".as_ptr());
            // It fails as `utf8` did, and leaves the exception that says why.
            new(py::PyUnicode_AsUTF8String(command.as_ptr()))?;
            return Ok(Ended::with(1));
        };
        // A NUL cannot come from a command line.
        let source = CString::new(dedent(&source)).unwrap_or_default();
        let name = string(c"<string>")?;
        let mut flags = py::PyCompilerFlags { cf_flags: PYCF_IGNORE_COOKIE, cf_feature_version: 14 };
        let start = py::Py_file_input;
        let code = new(py::Py_CompileStringObject(source.as_ptr(), name.as_ptr(), start, &mut flags, -1))?;
        // So that tracebacks show the lines.
        let register = import(c"linecache", c"_register_code")?;
        let (text, end) = (string(&source)?, std::ptr::null_mut::<py::PyObject>());
        let arguments = (code.as_ptr(), text.as_ptr(), name.as_ptr());
        new(py::PyObject_CallFunctionObjArgs(register.as_ptr(), arguments.0, arguments.1, arguments.2, end))?;
        let main = main_dict(token)?;
        new(py::PyEval_EvalCode(code.as_ptr(), main.as_ptr(), main.as_ptr()))?;
    }
    Ok(Ended::with(0))
}

/// `textwrap.dedent`, which CPython applies to `-c`.
fn dedent(source: &str) -> String {
    let is_blank = |line: &str| line.bytes().all(|byte| matches!(byte, b' ' | b'\t'));
    let indent = |line: &str| line.len() - line.trim_start_matches([' ', '\t']).len();
    let common =
        |margin: &str, line: &str| margin.bytes().zip(line.bytes()).take_while(|(a, b)| a == b).count();
    let mut lines = source.split('\n').filter(|line| !is_blank(line));
    let first = lines.next().unwrap_or_default();
    let margin = lines.fold(&first[..indent(first)], |margin, line| &margin[..common(margin, line)]).len();
    if margin == 0 {
        return source.to_owned();
    }
    let lines = source.split('\n').map(|line| if is_blank(line) { "" } else { &line[margin..] });
    lines.collect::<Vec<_>>().join("\n")
}

fn run_module(_: Token<'_>, name: &Owned, alter_argv: bool) -> Result<Ended> {
    // SAFETY: the token proves that the thread is attached; all objects are alive while they are used,
    // and the null ends the list of arguments.
    unsafe {
        let run = import(c"runpy", c"_run_module_as_main")?;
        let alter = if alter_argv { py::Py_True() } else { py::Py_False() };
        let end = std::ptr::null_mut::<py::PyObject>();
        new(py::PyObject_CallFunctionObjArgs(run.as_ptr(), name.as_ptr(), alter, end))?;
    }
    Ok(Ended::with(0))
}
