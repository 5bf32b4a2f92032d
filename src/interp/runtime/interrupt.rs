//! Ctrl-C for a program in a subinterpreter. CPython runs signal handlers in the main interpreter
//! alone, so SIGINT gets a handler of ours, and a thread that waits for it without the GIL.
//!
//! No signal is blocked anywhere, so the program's children inherit no mask. The bounds hold whatever
//! state Python is in; the thread needs nothing of it to keep them.

use std::ffi::{CStr, c_char, c_int, c_ulong};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::ending::flush_quietly;
use super::pending::{Pending, Result, done, new, string};
use crate::error::Error;
use crate::ffi::object::Owned;
use crate::ffi::offsets::Offsets;
use crate::ffi::py;
use crate::interp::attach::Token;
use crate::interp::door::Door;
use crate::sys::event::Event;
use crate::sys::kick::{self, Kicker};
use crate::sys::{lent, process, signal, thread};

/// How long KeyboardInterrupt may take to arrive in the program's main thread.
const TO_REACT: Duration = Duration::from_secs(1);
/// How long an event loop that was asked may take, before the exception is thrown at it.
const TO_ANSWER: Duration = Duration::from_millis(500);
/// How long the program may take to end, from the first Ctrl-C on.
const TO_END: Duration = Duration::from_secs(5);
/// How often a main thread that waits is looked at.
const PERIOD: Duration = Duration::from_millis(10);
/// How long a last flush may take.
const TO_FLUSH: Duration = Duration::from_millis(250);
/// The exit code of a program that was not waited for: what a shell makes of a death by SIGINT.
const KILLED: i32 = 128 + libc::SIGINT;

/// The program's main thread.
#[derive(Debug, Clone, Copy)]
struct MainThread {
    /// For Python.
    ident: c_ulong,
    /// For the kernel.
    native: i32,
}

static PRESSED_ONCE: AtomicBool = AtomicBool::new(false);
/// The next SIGINT is one of ours, which is only to interrupt a system call.
static NUDGING: AtomicBool = AtomicBool::new(false);
/// Set by the first SIGINT.
static PRESSED: Event = Event::new();
/// Set by the second SIGINT, or by the program's reaction to the first.
static STIRRED: Event = Event::new();
/// Set by the second SIGINT.
static PRESSED_AGAIN: Event = Event::new();

/// Who SIGINT is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// The program: it has to react, and to end, within bounds; or with the second SIGINT.
    Program,
    /// A worker, which may go on if it likes; the second SIGINT ends it.
    Worker,
}

/// From now on SIGINT is for the code behind `door`, whose main thread is the calling one. Where
/// SIGINT is ignored, it stays so.
///
/// # Errors
/// When no thread can be made.
pub fn watch(door: Arc<Door>, audience: Audience) -> crate::Result<()> {
    if !take_over_sigint() {
        return Ok(());
    }
    // SAFETY: a plain function.
    let main = MainThread { ident: unsafe { py::PyThread_get_thread_ident() }, native: thread::id() };
    let waiter = thread::spawn_deaf("th-interrupt", move || wait(&door, main, audience));
    waiter.map(drop).map_err(|error| Error::os("start the thread that waits for Ctrl-C", error))
}

/// Takes the pending exception, or in its stead a KeyboardInterrupt that has not arrived yet: the call
/// that was cut short for its sake may have failed, and what it raised has met no Python code on its
/// way out.
///
/// # Safety
/// The thread is attached, and an exception is pending.
pub(super) unsafe fn take_exception() -> Result<Owned> {
    // SAFETY: forwarded to the caller. The context takes over the reference to what it is.
    unsafe {
        let raised = new(py::PyErr_GetRaisedException())?;
        if !PRESSED.is_set() || STIRRED.is_set() {
            return Ok(raised);
        }
        let code =
            new(py::Py_CompileString(c"pass".as_ptr(), c"<tractor-host>".as_ptr(), py::Py_file_input))?;
        let globals = new(py::PyDict_New())?;
        if new(py::PyEval_EvalCode(code.as_ptr(), globals.as_ptr(), globals.as_ptr())).is_ok() {
            return Ok(raised);
        }
        let interrupt = new(py::PyErr_GetRaisedException())?;
        if let Ok(place) = new(py::PyException_GetTraceback(raised.as_ptr())) {
            py::PyException_SetTraceback(interrupt.as_ptr(), place.as_ptr());
        }
        py::PyException_SetContext(interrupt.as_ptr(), raised.into_ptr());
        Ok(interrupt)
    }
}

/// Makes the process die by SIGINT, so that a shell sees that it was interrupted.
pub(super) fn die() -> ! {
    // SAFETY: SIG_DFL installs no code; raise takes a number.
    unsafe {
        libc::signal(libc::SIGINT, libc::SIG_DFL);
        libc::raise(libc::SIGINT);
    }
    // Only where the program has blocked it.
    process::exit_now(KILLED)
}

/// Replaces Python's handler, if it has one: whether it had.
fn take_over_sigint() -> bool {
    // SAFETY: all zeros is a valid `sigaction`; the kernel only reads the new one and fills the old.
    // The handler is async-signal-safe, see there.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGINT, std::ptr::null(), &mut action);
        if matches!(action.sa_sigaction, libc::SIG_IGN | libc::SIG_DFL) {
            return false;
        }
        action.sa_sigaction = on_sigint as extern "C" fn(c_int) as libc::sighandler_t;
        libc::sigaction(libc::SIGINT, &action, std::ptr::null_mut()) == 0
    }
}

/// Sets events, that is, writes to atomics and calls futex: all a signal handler may do. rustix makes
/// its calls without libc, so `errno` is left alone.
extern "C" fn on_sigint(_: c_int) {
    if NUDGING.swap(false, Ordering::AcqRel) {
        // Should it be a real one, ours is still to come and counts in its place.
        return;
    }
    if PRESSED_ONCE.swap(true, Ordering::AcqRel) {
        PRESSED_AGAIN.set();
        STIRRED.set();
    }
    PRESSED.set();
}

fn wait(door: &Arc<Door>, main: MainThread, audience: Audience) {
    PRESSED.wait_through_signals(None);
    let pressed = Instant::now();
    let visited = Arc::clone(door);
    // On a thread of its own: it waits for the GIL, and this one must not. Where no thread can be made
    // the program does not react, and is treated so.
    let _ = thread::spawn_deaf("th-interrupt", move || interrupt(&visited, main, pressed));
    if audience == Audience::Worker {
        PRESSED_AGAIN.wait_through_signals(None);
    } else if STIRRED.wait_through_signals(Some(pressed + TO_REACT)) {
        PRESSED_AGAIN.wait_through_signals(Some(pressed + TO_END));
    }
    leave(door, KILLED)
}

/// Ends the process without waiting for the program. What that has written is flushed, if its interpreter,
/// which is behind `door`, lets anybody in for that.
pub fn leave(door: &Arc<Door>, code: i32) -> ! {
    let (visited, flushed) = (Arc::clone(door), Arc::new(Event::new()));
    let done = Arc::clone(&flushed);
    let flusher = thread::spawn_deaf("th-flush", move || {
        visited.visit(flush_quietly);
        done.set();
    });
    if flusher.is_ok() {
        flushed.wait_through_signals(Some(Instant::now() + TO_FLUSH));
    }
    lent::give_back();
    process::exit_now(code)
}

/// Makes KeyboardInterrupt rise in the program's main thread.
fn interrupt(door: &Door, main: MainThread, pressed: Instant) {
    let asked = door.visit(|token| {
        let (exception, asked) = prepare(token, main);
        if !asked {
            raise(token, main, &exception);
        }
        asked
    });
    if asked == Some(true) && !STIRRED.wait_through_signals(Some(pressed + TO_ANSWER)) {
        door.visit(|token| raise(token, main, &prepare(token, main).0));
    }
    end_waits(door, main, pressed + TO_REACT);
}

fn raise(_: Token<'_>, main: MainThread, exception: &Owned) {
    // SAFETY: the token proves that the thread is attached; CPython takes a reference of its own. An
    // ident that is no thread of this interpreter is not found.
    unsafe { py::PyThreadState_SetAsyncExc(main.ident.cast_signed(), exception.as_ptr()) };
}

/// Makes the main thread look up from what it waits for, until it has reacted: locks, Python's and
/// ours, sleeps, events. From other waits it can only be freed with an error that the program may not
/// expect.
fn end_waits(door: &Door, main: MainThread, deadline: Instant) {
    let Some(interpreter) = door.behind() else { return };
    let everything = [0..u64::MAX, 0..0];
    let internals =
        Offsets::if_checked().map_or(everything, |offsets| offsets.internals(interpreter.as_ptr()));
    let mut kicker = Kicker::new().ok();
    while Instant::now() < deadline && !STIRRED.wait_through_signals(Some(Instant::now() + PERIOD)) {
        let woken = kicker.as_mut().and_then(|kicker| kicker.wake(main.native, &internals));
        if woken.is_none() && kick::look(main.native).is_some_and(|blocked| blocked.number == libc::SYS_futex)
        {
            // The waits of `tractor_host._native` look at what is pending when a signal interrupts them.
            NUDGING.store(true, Ordering::Release);
            // The main thread is there as long as the process.
            let _ = signal::to_thread(main.native, libc::SIGINT);
        }
    }
}

/// Prepares for KeyboardInterrupt: the class to raise, and whether an event loop has been asked to
/// raise it itself.
fn prepare(token: Token<'_>, main: MainThread) -> (Owned, bool) {
    run_source(token, main).unwrap_or_else(|Pending| {
        // The plain class does as well; only nobody learns that it has arrived.
        // SAFETY: the token proves that the thread is attached; the class is immortal.
        unsafe {
            py::PyErr_Clear();
            (Owned::from_borrowed(py::PyExc_KeyboardInterrupt), false)
        }
    })
}

/// Calls `prepare` of `interrupt.py`, which has more.
fn run_source(_: Token<'_>, main: MainThread) -> Result<(Owned, bool)> {
    const SOURCE: &str = concat!(include_str!("interrupt.py"), "\0");
    let name: *const c_char = c"<tractor-host>".as_ptr();
    // SAFETY: the token proves that the thread is attached; the source ends with a NUL, and nobody
    // writes to the method's definition, which is a static. All objects are alive while they are used;
    // what is borrowed from a container is made ours, and the null ends the list of arguments.
    unsafe {
        let globals = new(py::PyDict_New())?;
        let set = |name: &CStr, value| done(py::PyDict_SetItemString(globals.as_ptr(), name.as_ptr(), value));
        set(c"__builtins__", py::PyEval_GetBuiltins())?;
        set(c"__name__", string(c"tractor_host._interrupt")?.as_ptr())?;
        let null = std::ptr::null_mut::<py::PyObject>();
        let code =
            py::Py_CompileStringExFlags(SOURCE.as_ptr().cast(), name, py::Py_file_input, null.cast(), -1);
        new(py::PyEval_EvalCode(new(code)?.as_ptr(), globals.as_ptr(), globals.as_ptr()))?;
        let prepare = py::PyDict_GetItemString(globals.as_ptr(), c"prepare".as_ptr());
        if prepare.is_null() {
            return Err(Pending);
        }
        let ident = new(py::PyLong_FromUnsignedLong(main.ident))?;
        let delivered = new(py::PyCFunction_NewEx((&raw const DELIVERED.0).cast_mut(), null, null))?;
        let answer = py::PyObject_CallFunctionObjArgs(prepare, ident.as_ptr(), delivered.as_ptr(), null);
        let answer = new(answer)?;
        let (exception, asked) =
            (py::PyTuple_GetItem(answer.as_ptr(), 0), py::PyTuple_GetItem(answer.as_ptr(), 1));
        if exception.is_null() || asked.is_null() {
            return Err(Pending);
        }
        Ok((Owned::from_borrowed(exception), asked == py::Py_True()))
    }
}

struct Method(py::PyMethodDef);

// SAFETY: nobody writes to a method's definition.
unsafe impl Sync for Method {}

static DELIVERED: Method = Method(py::PyMethodDef {
    ml_name: c"delivered".as_ptr(),
    ml_meth: py::PyMethodDefPointer { PyCFunction: on_delivered },
    ml_flags: py::METH_NOARGS,
    ml_doc: std::ptr::null(),
});

unsafe extern "C" fn on_delivered(_: *mut py::PyObject, _: *mut py::PyObject) -> *mut py::PyObject {
    STIRRED.set();
    // SAFETY: called by Python, attached; `None` is immortal.
    unsafe { py::Py_NewRef(py::Py_None()) }
}
