//! `run`, `pytest` and `--child`: Python, started with what was typed.

use std::ffi::{OsStr, OsString};

use super::args::{Place, Program};
use super::{USAGE, complain, python};
use crate::diag::outlet;
use crate::error::Result;
use crate::events::{self, trace};
use crate::ffi::PyInit__native;
use crate::interp::attach::Token;
use crate::interp::runtime::{self, AtEnd, Start};
use crate::supervise::{Supervisor, guard};

/// The exit code when Python cannot be started.
const FAILED: i32 = 1;

/// Runs a program; the exit code to leave with.
pub(super) fn program(program: &Program) -> i32 {
    let backend = program.backend.as_deref().map(|backend| ("TRACTOR_HOST_BACKEND", backend));
    note_outlet();
    let trace = program.trace.as_deref().map(|file| (trace::VARIABLE, file));
    let environment: Vec<_> = backend.into_iter().chain(trace).collect();
    let code = embed(&program.words, &environment, program.place, true);
    // The supervisor has done so, if there was one.
    trace::close();
    code
}

/// Becomes a worker process, whose supervisor's channel is fd 0.
pub(super) fn child(directory: OsString, mut options: Vec<OsString>) -> i32 {
    // The directory takes the place of the current one, which `-c` puts first: the package, and what
    // it imports until it has set the worker's own path, must not come from wherever we are.
    const CODE: &str = "import sys\n\
        sys.path[:not sys.flags.safe_path] = [sys.argv.pop()]\n\
        from tractor_host._child import exec_main\n\
        exec_main()\n";
    // What the host has marked inheritable is none of a fresh worker's business.
    crate::sys::fd::close_inherited();
    options.extend(["-c".into(), CODE.into(), directory]);
    // Its supervisor sees to a worker's Ctrl-C and timeline.
    embed(&options, &[], Place::Plain, false)
}

/// Notes where dumps go before the program can change that.
fn note_outlet() {
    outlet::prepare();
    outlet::remember_stderr();
}

fn embed(words: &[OsString], environment: &[(&str, &OsStr)], place: Place, is_program: bool) -> i32 {
    let executable = match python::executable() {
        Ok(executable) => executable,
        Err(reason) => {
            complain(reason);
            return FAILED;
        }
    };
    let start = Start { executable: &executable, arguments: words, environment };
    match started(&start, place, is_program) {
        Ok(code) => code,
        Err(error) => {
            let code = if error.is_invalid_input() { USAGE } else { FAILED };
            complain(error);
            code
        }
    }
}

fn started(start: &Start<'_>, place: Place, is_program: bool) -> Result<i32> {
    // What happens before anybody imports the package is told too.
    events::listen();
    // One supervisor a process: `tractor_host._native` is this binary's own copy, not the `.so`.
    runtime::add_builtin(crate::py::NAME, PyInit__native)?;
    runtime::start(start)?;
    if is_program {
        // So that there is one of a program that spawns nothing, too.
        trace::open_asked()?;
        guard::from_environment(runtime::starting_thread(), place == Place::Plain)?;
    }
    match place {
        Place::Plain => Ok(runtime::run_main()),
        Place::Subint => runtime::run_main_apart(&AtEnd { stop: end_workers, leave: leave_behind }),
    }
}

/// Ends the program's workers, within the bounds of their ladders. In the main interpreter the package
/// itself does that at exit; it leaves a subinterpreter's to whoever ends that.
fn end_workers() {
    let Ok(Some(supervisor)) = Supervisor::existing() else { return };
    while let Err(error) = supervisor.shut_down(false) {
        // It looks up now and then; Python's handlers, for which it does, have had their time.
        if !error.is_interrupted() {
            complain(error);
            return;
        }
    }
}

/// Keeps workers that could not be ended from disturbing the end of Python.
fn leave_behind(token: Token<'_>) {
    if let Ok(Some(supervisor)) = Supervisor::existing()
        && let Err(error) = supervisor.leave_behind(token)
    {
        complain(error);
    }
}
