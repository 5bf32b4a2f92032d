//! A multi-phase extension module made of plain Rust functions.
//!
//! The module has no state and no object of its own, so any number of interpreters, with the shared
//! GIL or with their own, can load it: that is why it is not a PyO3 `#[pymodule]`, which refuses a
//! second interpreter. Arguments and results are [`Value`]s; a function that may wait runs detached.

use std::ffi::{CStr, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::time::Instant;

use super::value::{Arg, Value};
use super::{_PyRuntime, py};
use crate::error::{Error, Kind};

/// One function of the module.
pub trait Function {
    /// Its name.
    const NAME: &'static CStr;
    /// Its docstring, with the signature line that `inspect` reads.
    const DOC: &'static CStr;
    /// The number of arguments; they are positional.
    const ARITY: usize;
    /// Whether it may wait. It runs detached then, so that no interpreter waits with it, and is
    /// called again when a signal interrupted it and Python's handlers raised nothing.
    const WAITS: bool;

    /// The function itself.
    ///
    /// # Errors
    /// What `raise` makes a Python exception of.
    fn call(call: &Call, args: &[Arg<'_>]) -> Result<Value, Error>;
}

/// Where a call came from.
#[derive(Debug)]
pub struct Call {
    /// The calling interpreter's id; 0 is the main one.
    pub interpreter: i64,
    /// When the call was made: bounds count from here, also when a signal made it start again.
    pub started: Instant,
}

/// The functions of a module, for [`initialise`].
pub struct Table(Vec<py::PyMethodDef>);

impl Table {
    /// A table without functions.
    pub fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds a function.
    #[must_use]
    pub fn with<F: Function>(mut self) -> Self {
        self.0.push(py::PyMethodDef {
            ml_name: F::NAME.as_ptr(),
            ml_meth: py::PyMethodDefPointer { PyCFunctionFast: entry::<F> },
            ml_flags: py::METH_FASTCALL,
            ml_doc: F::DOC.as_ptr(),
        });
        self
    }
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

/// The module's definition, made once for the process and never freed, as CPython demands.
struct Definition(*mut py::PyModuleDef);

// SAFETY: CPython writes to the definition under the GIL or its own locks only; we never do again.
unsafe impl Send for Definition {}
// SAFETY: as above.
unsafe impl Sync for Definition {}

/// What `PyInit__native` returns: the definition, for the import machinery to make a module of.
///
/// # Safety
/// Called by an importing interpreter, which is attached.
pub unsafe fn initialise(name: &'static CStr, doc: &'static CStr, table: fn() -> Table) -> *mut py::PyObject {
    static DEFINITION: OnceLock<Definition> = OnceLock::new();
    let definition = DEFINITION.get_or_init(|| {
        let mut methods = table().0;
        methods.push(py::PyMethodDef::zeroed());
        let slots = vec![
            py::PyModuleDef_Slot { slot: py::Py_mod_exec, value: execute as *mut c_void },
            py::PyModuleDef_Slot {
                slot: py::Py_mod_multiple_interpreters,
                value: py::Py_MOD_PER_INTERPRETER_GIL_SUPPORTED,
            },
            py::PyModuleDef_Slot { slot: 0, value: std::ptr::null_mut() },
        ];
        Definition(Box::leak(Box::new(py::PyModuleDef {
            m_base: py::PyModuleDef_HEAD_INIT,
            m_name: name.as_ptr(),
            m_doc: doc.as_ptr(),
            m_size: 0,
            m_methods: Box::leak(methods.into_boxed_slice()).as_mut_ptr(),
            m_slots: Box::leak(slots.into_boxed_slice()).as_mut_ptr(),
            m_traverse: None,
            m_clear: None,
            m_free: None,
        })))
    });
    // SAFETY: the definition lives for ever, and the caller is attached.
    unsafe { py::PyModuleDef_Init(definition.0) }
}

/// Runs once for every interpreter that imports the module: refuses a Python that we don't know.
unsafe extern "C" fn execute(module: *mut py::PyObject) -> c_int {
    let refusal = refusal();
    if refusal.is_none() {
        // While this thread is attached: who looks at threads from outside is not. What it finds wrong is told
        // to whoever needs the layout.
        let _ = super::offsets::Offsets::get();
    }
    // SAFETY: the import machinery calls this attached, with the module that it is making.
    unsafe {
        if let Some(text) = refusal {
            set_exception(py::PyExc_ImportError, &text);
            return -1;
        }
        let version = concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr();
        py::PyModule_AddStringConstant(module, c"__version__".as_ptr(), version.cast())
    }
}

/// Why this Python can't be served, if it can't.
fn refusal() -> Option<String> {
    // SAFETY: Py_Version is a constant of libpython.
    let version = unsafe { py::Py_Version };
    let (major, minor) = (version >> 24, version >> 16 & 0xff);
    if (major, minor) != (3, 14) {
        return Some(format!(
            "tractor_host needs CPython 3.14, this is {major}.{minor}; install it for a python3.14"
        ));
    }
    // SAFETY: the cookie and the version word are at the head of a static that is far larger.
    let free_threaded = unsafe { (&raw const _PyRuntime).add(16).cast::<u64>().read_unaligned() };
    (free_threaded != 0)
        .then(|| "tractor_host needs the GIL build of CPython 3.14, this is the free-threaded one".into())
}

/// What CPython calls for `F`.
unsafe extern "C" fn entry<F: Function>(
    _module: *mut py::PyObject,
    args: *mut *mut py::PyObject,
    count: py::Py_ssize_t,
) -> *mut py::PyObject {
    // SAFETY: METH_FASTCALL: the caller is attached and `args` holds `count` live objects.
    unsafe {
        let outcome = catch_unwind(AssertUnwindSafe(|| call::<F>(args, count.unsigned_abs())));
        outcome.unwrap_or_else(|_| {
            let name = F::NAME.to_string_lossy();
            let text = format!("tractor_host panicked in {name}; the message is on stderr. Please report it");
            set_exception(py::PyExc_SystemError, &text)
        })
    }
}

unsafe fn call<F: Function>(args: *mut *mut py::PyObject, count: usize) -> *mut py::PyObject {
    // SAFETY: forwarded from `entry`: attached, and `args` holds `count` objects that the caller keeps
    // alive until this returns.
    unsafe {
        let name = F::NAME.to_string_lossy();
        if count != F::ARITY {
            let text = format!("{name}() takes {} arguments, got {count}", F::ARITY);
            return set_exception(py::PyExc_TypeError, &text);
        }
        let mut values = Vec::with_capacity(count);
        for index in 0..count {
            match Arg::from_object(*args.add(index)) {
                Ok(value) => values.push(value),
                Err(what) => {
                    let text =
                        format!("{name}(): argument {} holds {what}, which is not plain data", index + 1);
                    return set_exception(py::PyExc_TypeError, &text);
                }
            }
        }
        let call = Call {
            interpreter: py::PyInterpreterState_GetID(py::PyInterpreterState_Get()),
            started: Instant::now(),
        };
        loop {
            let outcome = if F::WAITS {
                let state = py::PyEval_SaveThread();
                let outcome = catch_unwind(AssertUnwindSafe(|| F::call(&call, &values)));
                py::PyEval_RestoreThread(state);
                outcome.unwrap_or_else(|payload| std::panic::resume_unwind(payload))
            } else {
                F::call(&call, &values)
            };
            match outcome {
                Ok(value) => return value.into_object(),
                Err(error) if error.kind() == Kind::Interrupted => {
                    // Handlers run in the main interpreter alone; elsewhere a signal tells of an exception
                    // that another thread has raised here, which rises in the next line of Python.
                    if py::PyErr_CheckSignals() != 0 || !run_a_line() {
                        return std::ptr::null_mut();
                    }
                }
                Err(error) => return raise(&error),
            }
        }
    }
}

/// Runs a line of Python that does nothing. False, and an exception is pending, when another thread has
/// raised one in this thread.
unsafe fn run_a_line() -> bool {
    // SAFETY: the caller is attached; both objects are dropped after their last use.
    unsafe {
        let globals = py::PyDict_New();
        if globals.is_null() {
            return false;
        }
        let run = py::PyRun_String(c"pass".as_ptr(), py::Py_file_input, globals, globals);
        py::Py_DECREF(globals);
        py::Py_XDECREF(run);
        !run.is_null()
    }
}

/// The one map from our errors to Python's exceptions.
unsafe fn raise(error: &Error) -> *mut py::PyObject {
    let text = error.to_string();
    // SAFETY: forwarded to the caller, which is attached; the classes are immortal.
    unsafe {
        let class = match error.kind() {
            Kind::Invalid => py::PyExc_ValueError,
            Kind::NotFound => py::PyExc_LookupError,
            Kind::TimedOut => py::PyExc_TimeoutError,
            Kind::Unsupported => py::PyExc_NotImplementedError,
            Kind::Os(errno) => return set_os_error(errno, &text),
            Kind::State | Kind::Protocol | Kind::Python | Kind::Interrupted => py::PyExc_RuntimeError,
        };
        set_exception(class, &text)
    }
}

/// `OSError(errno, text)`, which CPython turns into the fitting subclass.
unsafe fn set_os_error(errno: i32, text: &str) -> *mut py::PyObject {
    // SAFETY: the caller is attached; the tuple, if it could be made, is dropped after its last use.
    unsafe {
        let args = py::PyTuple_New(2);
        if args.is_null() {
            return args;
        }
        py::PyTuple_SetItem(args, 0, py::PyLong_FromLong(errno.into()));
        py::PyTuple_SetItem(
            args,
            1,
            py::PyUnicode_FromStringAndSize(text.as_ptr().cast(), text.len().cast_signed()),
        );
        py::PyErr_SetObject(py::PyExc_OSError, args);
        py::Py_DECREF(args);
        std::ptr::null_mut()
    }
}

unsafe fn set_exception(class: *mut py::PyObject, text: &str) -> *mut py::PyObject {
    // SAFETY: the caller is attached; the class is alive and the text is copied.
    unsafe {
        let text = py::PyUnicode_FromStringAndSize(text.as_ptr().cast(), text.len().cast_signed());
        if !text.is_null() {
            py::PyErr_SetObject(class, text);
            py::Py_DECREF(text);
        }
        std::ptr::null_mut()
    }
}
