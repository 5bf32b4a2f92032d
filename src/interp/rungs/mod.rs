//! What the rungs of the kill ladder do to a subinterpreter: one file a rung, each from outside and
//! under that interpreter's GIL. Here they are put together.

pub mod abandoned;
mod cancel;
pub mod destroy;
mod interrupt;
pub mod pressure;
mod summons;
mod unblock;
mod unwind;

use std::sync::Once;
use std::time::{Duration, Instant};

use super::attach::Token;
use super::call;
use super::door::Door;
use crate::error::Result;
use crate::events::fault;
use crate::ffi::offsets::{Offsets, ThreadIds};
use crate::ffi::py;
use crate::sys::event::Event;
use crate::sys::kick::{self, Kicker};
use crate::sys::lock::lock;

/// How hard a condemned interpreter is pressed. Each takes in those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Force {
    /// `SystemExit` rises in each of its threads.
    Interrupt,
    /// And whatever line of Python comes next raises it again.
    Unwind,
    /// And system calls that its threads are blocked in return an error.
    Unblock,
    /// And its own end is cut short.
    Destroy,
}

/// Why this force can't be used in this process, if it can't.
pub fn missing(_: Token<'_>, force: Force) -> Option<String> {
    let layout = Offsets::get().map(drop).map_err(|error| error.to_string());
    let found = if force == Force::Unblock { layout.and_then(|()| kick::support()) } else { layout };
    found.err()
}

/// Says once, when the first subinterpreter is made, which rungs its ladder lacks here.
pub fn report_missing(token: Token<'_>) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let all = [Force::Interrupt, Force::Unwind, Force::Unblock, Force::Destroy];
        let lacking: Vec<_> =
            all.into_iter().filter_map(|force| missing(token, force).map(|why| (force, why))).collect();
        if let Some((_, why)) = lacking.first() {
            let names: Vec<_> =
                lacking.iter().map(|(force, _)| format!("`{force:?}`").to_lowercase()).collect();
            fault!("the kill ladder of subinterpreters lacks {} here: {why}", names.join(", "));
        }
    });
}

/// How often threads that must end are told so.
pub const PERIOD: Duration = Duration::from_millis(5);

impl Door {
    /// Presses the interpreter behind the door once, on all its threads. Whether it was still open.
    ///
    /// # Errors
    /// When this Python's layout is not known, so that its threads can't be told.
    pub fn press(&self, force: Force, kicker: Option<&mut Kicker>) -> Result<bool> {
        self.note(force);
        let pressed = self.visit(|token| {
            let threads = other_threads(token)?;
            if force >= Force::Unblock {
                self.kill_children_of(&threads)?;
            }
            press(token, &threads, force, kicker);
            Ok(())
        });
        pressed.transpose().map(|visited| visited.is_some())
    }

    fn note(&self, force: Force) {
        let mut state = lock(&self.state);
        let harder = state.pressed < Some(force);
        state.pressed = state.pressed.max(Some(force));
        drop(state);
        if harder {
            // Who waits there can't end.
            self.free(true);
        }
    }

    /// How hard the interpreter has been pressed so far, or would have been, had the door been open.
    pub fn pressed(&self) -> Option<Force> {
        lock(&self.state).pressed
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
}

/// How long killed children of an interpreter are waited for.
const CHILDREN_END: Duration = Duration::from_secs(1);

/// Presses the given threads of the interpreter that this thread is attached to.
///
/// Holding its GIL all the while, so that each of them is still there: a thread that Python knows
/// needs the GIL to leave.
pub fn press(token: Token<'_>, threads: &[ThreadIds], force: Force, kicker: Option<&mut Kicker>) {
    condemn(token, threads, force);
    if force >= Force::Unwind {
        unwind::untrace(token); // this thread is not one of them
    }
    if force >= Force::Unblock
        && let Some(kicker) = kicker
    {
        unblock::kick_all(token, threads, kicker);
    }
}

/// What of pressing is Python's own: the given threads can't run on.
fn condemn(token: Token<'_>, threads: &[ThreadIds], force: Force) {
    silence(token, force);
    interrupt::raise_in(token, threads);
    if force >= Force::Unwind && !threads.is_empty() {
        unwind::trace_all(token);
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
pub fn other_threads(token: Token<'_>) -> Result<Vec<ThreadIds>> {
    // SAFETY: attached.
    threads_but(token, unsafe { py::PyThreadState_Get() })
}

/// The threads of the interpreter that this thread is attached to.
///
/// # Errors
/// When this Python's layout is not known.
fn all_threads(token: Token<'_>) -> Result<Vec<ThreadIds>> {
    threads_but(token, std::ptr::null_mut())
}

fn threads_but(_: Token<'_>, spared: *mut py::PyThreadState) -> Result<Vec<ThreadIds>> {
    let offsets = Offsets::get()?;
    let mut found = Vec::new();
    // SAFETY: attached: this interpreter's thread states are made and deleted under its GIL (or,
    // for states of threads that are only just starting, added at the head of the list).
    unsafe {
        let mut state = py::PyInterpreterState_ThreadHead(py::PyInterpreterState_Get());
        while !state.is_null() {
            if state != spared {
                found.push(offsets.thread_ids(state));
            }
            state = py::PyThreadState_Next(state);
        }
    }
    Ok(found)
}

/// Ends all other threads of the interpreter that this thread is attached to, trying every `period`
/// until `deadline`, as hard as its door has been pressed on or harder. How many are left: threads that outlive their interpreter take the process with
/// them, so it must not be ended before it is none.
///
/// # Errors
/// When this Python's layout is not known, so that the threads can't be told or counted.
pub fn evict_others(token: Token<'_>, door: &Door, period: Duration, deadline: Instant) -> Result<usize> {
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
        let own = if round < GENTLE_ROUNDS { Force::Interrupt } else { Force::Unblock };
        let force = door.pressed().map_or(own, |pressed| pressed.max(own));
        if force >= Force::Unblock && kicker.is_none() {
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
