//! The program in a subinterpreter of its own, on the process's main thread: `--main subint`.
//!
//! The main thread, so that `threading` and everything that asks it find what they expect. The main
//! interpreter stays as its start left it, detached, until the subinterpreter has ended.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ending::{self, Ended};
use super::interrupt::Audience;
use super::{interrupt, program};
use crate::error::{Error, Result};
use crate::ffi::py;
use crate::interp::attach::Token;
use crate::interp::door::Door;
use crate::interp::rungs::{Force, other_threads, press};
use crate::interp::subinterp::{Gil, SubInterpreter};
use crate::sys::event::Event;
use crate::sys::kick::Kicker;
use crate::sys::process;

/// How long the daemon threads that the program left may take to end.
const TO_DRAIN: Duration = Duration::from_secs(1);
/// How often they are pressed to.
const PERIOD: Duration = Duration::from_millis(5);
/// How long the C library's own buffers may take to be written.
const TO_FLUSH: Duration = Duration::from_millis(100);

/// What the launcher has to do at the end of a program in a subinterpreter, beside ending that.
#[derive(Debug)]
pub struct AtEnd {
    /// Called detached, when the program is over but for its daemon threads.
    pub stop: fn(),
    /// Called in the main interpreter, before that is finalised.
    pub leave: fn(Token<'_>),
}

/// As [`super::run_main`], in a subinterpreter with the shared GIL.
///
/// # Errors
/// When the program would be a prompt; when there can be no subinterpreter.
pub fn run_main_apart(at_end: &AtEnd) -> Result<i32> {
    // SAFETY: after `start`, on the thread that started and is still attached.
    let main = unsafe { py::PyEval_SaveThread() };
    let ended = run(at_end);
    // SAFETY: saved by this thread above; `run` has detached from whatever it attached to.
    unsafe { py::PyEval_RestoreThread(main) };
    (at_end.leave)(super::starting_thread());
    // SAFETY: the thread that started, attached to the main interpreter.
    let finalised = unsafe { py::Py_FinalizeEx() } == 0;
    let ended = ended?;
    if ended.interrupted {
        interrupt::die();
    }
    Ok(if finalised { ended.code } else { ending::NOT_FLUSHED })
}

fn run(at_end: &AtEnd) -> Result<Ended> {
    let interpreter = SubInterpreter::create(Gil::Shared)?;
    let token = interpreter.token();
    let door = Arc::new(Door::new());
    door.open(token);
    let ended = run_in(token, &door);
    token.detached(at_end.stop);
    door.close(token);
    door.seal(token);
    if let Ok(ended) = ended
        && !is_last_thread(token)
    {
        leave(token, ended);
    }
    interpreter.end(&door);
    door.runner_leaves();
    ended
}

fn run_in(token: Token<'_>, door: &Arc<Door>) -> Result<Ended> {
    if program::is_interactive(token) {
        let what = "there is no prompt in a subinterpreter: --main subint needs a program, and no -i";
        return Err(Error::invalid(what));
    }
    interrupt::watch(Arc::clone(door), Audience::Program)?;
    Ok(ending::wind_up(token, program::run(token)))
}

/// Stops the daemon threads that the program left, whose states the interpreter's end would fall
/// over; whether that worked within its bound. They run no further line of Python, as at the end of
/// the main interpreter; that leaves them where they are, which can't be had here.
fn is_last_thread(token: Token<'_>) -> bool {
    // An error: without the layout they can't be counted.
    let remaining = || other_threads(token).map_or(usize::MAX, |others| others.len());
    if remaining() == 0 {
        return true;
    }
    let (never, deadline) = (Event::new(), Instant::now() + TO_DRAIN);
    let voice = ending::Voice::keep(token);
    // Where there can be none, threads that are blocked are left in the end.
    let mut kicker = Kicker::new().ok();
    while let Ok(others) = other_threads(token)
        && !others.is_empty()
        && Instant::now() < deadline
    {
        press(token, &others, Force::Unblock, kicker.as_mut());
        token.detached(|| never.wait_through_signals(Some(Instant::now() + PERIOD)));
    }
    voice.restore(token);
    remaining() == 0
}

/// Ends the process under threads that cannot be ended: an interpreter that is taken down while it
/// has some crashes now and then. What they wrote last is flushed.
fn leave(token: Token<'_>, ended: Ended) -> ! {
    ending::flush_quietly(token);
    let flushed = Arc::new(Event::new());
    let done = Arc::clone(&flushed);
    // On a thread of its own: a stream of the C library may be locked by one of them for ever.
    let flusher = crate::sys::thread::spawn_deaf("th-flush", move || {
        // SAFETY: null means all streams.
        unsafe { libc::fflush(std::ptr::null_mut()) };
        done.set();
    });
    if flusher.is_ok() {
        flushed.wait_through_signals(Some(Instant::now() + TO_FLUSH));
    }
    if ended.interrupted {
        interrupt::die();
    }
    process::exit_now(ended.code)
}
