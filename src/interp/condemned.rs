//! Reaching into an interpreter from outside, as long as it is there.
//!
//! A [`Door`] stands before each interpreter that the supervisor may have to act on. Whoever enters
//! gets a thread state of its own there; the interpreter's own thread closes the door, and waits
//! until everybody has left, before it ends the interpreter.

use std::cell::RefCell;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::attach::{Attached, Interpreter, Token};
use super::call;
use crate::error::{Error, Result};
use crate::ffi::offsets::{Offsets, ThreadIds};
use crate::ffi::py;
use crate::sys::event::Event;
use crate::sys::kick::Kicker;
use crate::sys::lock::lock;
use crate::sys::process::Orphans;

/// The way into one interpreter for threads that are not its own.
#[derive(Debug, Default)]
pub struct Door {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    interpreter: Option<Interpreter>,
    /// The same, also once the door is closed.
    behind: Option<Interpreter>,
    /// The thread that opened it, as long as it is there for sure.
    runner_native: Option<i32>,
    visitors: usize,
    /// Processes that its threads had started, killed and to be reaped.
    orphans: Orphans,
    /// What the interpreter's end asks before every line of Python.
    doom: Arc<Doom>,
}

/// How hard a condemned interpreter is pressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Force {
    /// `SystemExit` rises in each of its threads.
    Interrupt,
    /// And whatever line of Python comes next raises it again.
    Unwind,
    /// And system calls that its threads are blocked in return an error.
    Unblock,
}

impl Door {
    /// A door with nothing behind it yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A door to the main interpreter, which is never closed.
    pub fn to_main() -> Self {
        let door = Self::new();
        lock(&door.state).interpreter = Some(Interpreter::main());
        door
    }

    /// Opens the door to the interpreter that the calling thread is attached to. That thread must
    /// close it before it ends the interpreter.
    pub fn open(&self, token: Token<'_>) {
        let mut state = lock(&self.state);
        state.interpreter = Some(Interpreter::current(token));
        state.behind = state.interpreter;
        state.runner_native = Some(crate::sys::thread::id());
    }

    /// Lets nobody in any more, and waits until the last visitor has left. Visitors need the GIL to
    /// leave, so the caller is detached meanwhile.
    pub fn close(&self, token: Token<'_>) {
        token.detached(|| {
            let mut state = lock(&self.state);
            state.interpreter = None;
            while state.visitors > 0 {
                state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        });
    }

    /// Attaches to the interpreter, runs `body` there and leaves. `None` when the door is closed.
    ///
    /// It waits for the interpreter's GIL without a bound; see [`Attached::new`].
    pub fn visit<R>(&self, body: impl FnOnce(Token<'_>) -> R) -> Option<R> {
        struct Leave<'a>(&'a Door);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                lock(&self.0.state).visitors -= 1;
                self.0.left.notify_all();
            }
        }
        let interpreter = {
            let mut state = lock(&self.state);
            let interpreter = state.interpreter?;
            state.visitors += 1;
            interpreter
        };
        let _leave = Leave(self);
        // SAFETY: the interpreter's thread waits in `close` until the visitor count, which was
        // raised while the door was open, is back to zero; `_leave` is dropped after `attached`.
        // Visitors are threads of the supervisor, which are never attached.
        let attached = unsafe { Attached::new(interpreter) };
        Some(body(attached.token()))
    }
}

impl Door {
    /// Asks the worker behind the door to stop, in the way that it has prepared for that.
    ///
    /// # Errors
    /// What its Python side raised.
    pub fn cancel(&self) -> Result<()> {
        let asked = self.visit(|token| call::function_if_imported(token, c"tractor_host._child", c"cancel"));
        asked.unwrap_or(Ok(()))
    }
}

impl Door {
    /// Presses the interpreter behind the door once, on all its threads. Whether it was still open.
    ///
    /// # Errors
    /// When this Python's layout is not known, so that its threads can't be told.
    pub fn press(&self, force: Force, kicker: Option<&mut Kicker>) -> Result<bool> {
        let pressed = self.visit(|token| {
            let threads = other_threads(token)?;
            if force >= Force::Unblock {
                // Its threads wait for them, mostly.
                let mut state = lock(&self.state);
                for thread in &threads {
                    state.orphans.kill_children_of(thread.native)?;
                }
            }
            press(token, &threads, force, kicker);
            Ok(())
        });
        pressed.transpose().map(|visited| visited.is_some())
    }

    /// For an interpreter whose door is closed because its own thread is ending it: lets no further
    /// line of Python run in that, and ends the system call that the thread is blocked in.
    pub fn doom(&self, kicker: Option<&mut Kicker>) {
        let state = lock(&self.state);
        state.doom.sealed.store(true, Ordering::Release);
        if let (Some(thread), Some(kicker)) = (state.runner_native, kicker) {
            // Under the lock: the thread takes it too, before it leaves and its id can be reused.
            kicker.kick(thread);
        }
    }

    /// What the runner holds while it ends its interpreter.
    pub(super) fn doom_of_runner(&self) -> Arc<Doom> {
        Arc::clone(&lock(&self.state).doom)
    }

    /// Whether the end of the interpreter had to be forced.
    pub fn was_forced(&self) -> bool {
        lock(&self.state).doom.struck.load(Ordering::Acquire)
    }

    /// Ends the processes that the interpreter's threads have started and not waited for: the calling
    /// thread's, which is the runner, and those that had to be killed before.
    ///
    /// # Errors
    /// When /proc is not mounted, or EMFILE.
    pub fn end_children(&self, token: Token<'_>) -> Result<()> {
        let mut orphans = std::mem::take(&mut lock(&self.state).orphans);
        let killed = orphans.kill_children_of(crate::sys::thread::id());
        token.detached(|| orphans.reap(Instant::now() + CHILDREN_END));
        killed
    }

    /// Leaves the interpreter behind at the end of the program: its threads stop where they are, and
    /// the end of the runtime, which would wait for it or crash into it, passes it by.
    ///
    /// # Errors
    /// When this Python's layout is not known.
    pub fn leave_behind(&self, token: Token<'_>, kicker: &Kicker) -> Result<()> {
        if token.interpreter_id() != 0 {
            return Err(Error::state("only the main interpreter leaves others behind"));
        }
        let offsets = Offsets::get()?;
        // Visitors leave of themselves, unless they wait for a GIL that they will never get.
        let deadline = Instant::now() + VISITORS_LEAVE;
        token.detached(|| {
            let mut state = lock(&self.state);
            state.interpreter = None;
            while state.visitors > 0 {
                let Some(left) = deadline.checked_duration_since(Instant::now()) else { return };
                state = self.left.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        });
        let state = lock(&self.state);
        let (Some(runner), Some(interpreter)) = (state.runner_native, state.behind) else { return Ok(()) };
        kicker.park(runner);
        // SAFETY: its runner, which alone could end the interpreter, has been stopped just now or is
        // in code that does not return; whoever else has a state in it needs a GIL to get rid of that,
        // which this thread holds (shared) or the runner (its own).
        unsafe {
            let mut thread = py::PyInterpreterState_ThreadHead(interpreter.as_ptr());
            while !thread.is_null() {
                kicker.park(offsets.thread_ids(thread).native);
                thread = py::PyThreadState_Next(thread);
            }
            offsets.unlink(interpreter.as_ptr());
        }
        Ok(())
    }

    /// The interpreter, as long as it has not ended.
    pub fn behind(&self) -> Option<Interpreter> {
        lock(&self.state).behind
    }

    /// The runner's last word: from now on its thread is none of ours.
    pub fn runner_leaves(&self) {
        let mut state = lock(&self.state);
        state.runner_native = None;
        state.behind = None;
    }
}

/// How long killed children of an interpreter are waited for.
const CHILDREN_END: Duration = Duration::from_secs(1);
/// How long the end of a program waits for supervisor threads inside a condemned interpreter.
const VISITORS_LEAVE: Duration = Duration::from_millis(200);

/// Whether the end of an interpreter may still run Python.
#[derive(Debug, Default)]
pub struct Doom {
    sealed: AtomicBool,
    struck: AtomicBool,
}

impl Doom {
    /// From now on, every line of Python that the calling thread runs raises `SystemExit` if (and as
    /// soon as) the doom is sealed.
    pub(super) fn hang_over(self: Arc<Self>, _: Token<'_>) {
        OVER_THIS_THREAD.set(Some(self));
        // SAFETY: attached; the function asks a thread-local that is set for this thread.
        unsafe { py::PyEval_SetTrace(Some(raise_if_sealed), std::ptr::null_mut()) };
    }
}

thread_local! {
    static OVER_THIS_THREAD: RefCell<Option<Arc<Doom>>> = const { RefCell::new(None) };
}

/// A trace function that raises, once the thread's doom is sealed.
extern "C" fn raise_if_sealed(
    _: *mut py::PyObject,
    _: *mut py::PyFrameObject,
    _: c_int,
    _: *mut py::PyObject,
) -> c_int {
    OVER_THIS_THREAD.with_borrow(|doom| match doom {
        Some(doom) if doom.sealed.load(Ordering::Acquire) => {
            // SAFETY: CPython calls trace functions attached.
            let token = unsafe { Token::assume_attached() };
            if !doom.struck.swap(true, Ordering::AcqRel) {
                silence(token, Force::Unblock);
            }
            // SAFETY: attached, as said.
            unsafe { py::PyErr_SetNone(py::PyExc_SystemExit) };
            -1
        }
        _ => 0,
    })
}

/// A trace function that always raises: no line of Python gets past it.
extern "C" fn raise_always(
    _: *mut py::PyObject,
    _: *mut py::PyFrameObject,
    _: c_int,
    _: *mut py::PyObject,
) -> c_int {
    // SAFETY: CPython calls trace functions attached.
    unsafe { py::PyErr_SetNone(py::PyExc_SystemExit) };
    -1
}

/// Presses the given threads of the interpreter that this thread is attached to.
///
/// Holding its GIL all the while, so that each of them is still there: a thread that Python knows
/// needs the GIL to leave.
pub fn press(token: Token<'_>, threads: &[ThreadIds], force: Force, kicker: Option<&mut Kicker>) {
    silence(token, force);
    for thread in threads {
        // SAFETY: attached. An ident that is no thread of this interpreter (any more) is not found.
        unsafe { py::PyThreadState_SetAsyncExc(thread.ident.cast_signed(), py::PyExc_SystemExit) };
    }
    if force >= Force::Unwind && !threads.is_empty() {
        // SAFETY: attached; the function needs no object. It sets this thread's too, which is put
        // back: this thread is not condemned.
        unsafe {
            py::PyEval_SetTraceAllThreads(Some(raise_always), std::ptr::null_mut());
            py::PyErr_Clear();
            py::PyEval_SetTrace(None, std::ptr::null_mut());
            py::PyErr_Clear();
        }
    }
    if force >= Force::Unblock
        && let Some(kicker) = kicker
    {
        for thread in threads {
            kicker.kick(thread.native);
        }
    }
}

/// Keeps what a condemned interpreter would say of its own end off the user's stderr.
fn silence(_: Token<'_>, force: Force) {
    // SAFETY: attached; both objects are borrowed from immortal places and sys takes references of
    // its own. `id` takes what an unraisable hook is called with, and is no Python code.
    unsafe {
        let builtins = py::PyEval_GetBuiltins();
        let id = py::PyDict_GetItemString(builtins, c"id".as_ptr());
        if !id.is_null() {
            py::PySys_SetObject(c"unraisablehook".as_ptr(), id);
        }
        if force >= Force::Unwind {
            py::PySys_SetObject(c"stderr".as_ptr(), py::Py_None());
        }
        py::PyErr_Clear();
    }
}

/// The threads of the interpreter that this thread is attached to, but for this one.
///
/// # Errors
/// When this Python's layout is not known.
pub fn other_threads(_: Token<'_>) -> Result<Vec<ThreadIds>> {
    let offsets = Offsets::get()?;
    let mut found = Vec::new();
    // SAFETY: attached: this interpreter's thread states are made and deleted under its GIL (or,
    // for states of threads that are only just starting, added at the head of the list).
    unsafe {
        let own = py::PyThreadState_Get();
        let mut state = py::PyInterpreterState_ThreadHead(py::PyInterpreterState_Get());
        while !state.is_null() {
            if state != own {
                found.push(offsets.thread_ids(state));
            }
            state = py::PyThreadState_Next(state);
        }
    }
    Ok(found)
}

/// How often threads that must end are told so.
pub const PERIOD: Duration = Duration::from_millis(5);

/// Ends all other threads of the interpreter that this thread is attached to, trying every `period`
/// until `deadline`. How many are left: threads that outlive their interpreter take the process with
/// them, so it must not be ended before it is none.
///
/// # Errors
/// When this Python's layout is not known, so that the threads can't be told or counted.
pub fn evict_others(token: Token<'_>, period: Duration, deadline: Instant) -> Result<usize> {
    /// How often they are only told to end, before they are made to.
    const GENTLE_ROUNDS: usize = 3;
    let never = Event::new();
    let mut kicker = None;
    let mut round = 0;
    loop {
        let left = other_threads(token)?;
        if left.is_empty() || Instant::now() > deadline {
            return Ok(left.len());
        }
        let force = if round < GENTLE_ROUNDS { Force::Interrupt } else { Force::Unblock };
        if force == Force::Unblock && kicker.is_none() {
            // Where it can't be had, threads that are blocked are waited for.
            kicker = Kicker::new().ok();
        }
        press(token, &left, force, kicker.as_mut());
        round += 1;
        token.detached(|| never.wait_through_signals(Some(Instant::now() + period)));
    }
}

/// Makes an innocent of the calling thread again: no trace function, nothing raised that has not been
/// delivered yet.
pub fn pardon(token: Token<'_>) {
    // SAFETY: attached.
    unsafe {
        py::PyEval_SetTrace(None, std::ptr::null_mut());
        py::PyErr_Clear();
    }
    // Each run delivers at most one; a second can have been set while the first was on its way.
    for _ in 0..4 {
        if call::source(token, "pass").is_ok() {
            return;
        }
    }
}
