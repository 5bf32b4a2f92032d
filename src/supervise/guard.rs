//! The guard: a thread that needs no GIL and sees to it that Ctrl-C works and that nobody keeps a GIL.
//!
//! Python's own handler of SIGINT stays the first to hear it. What it can't do, because Python does not run,
//! is done from here ([`ctrl_c`]); who keeps Python from running is found out by looking ([`gil`]).

pub mod ctrl_c;
pub mod gil;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::events::fault;
use crate::ffi::offsets::Offsets;
use crate::interp::attach::Token;
use crate::interp::call;
use crate::sys::fork_local::ForkLocal;
use crate::sys::lock::lock;
use crate::sys::{presses, process, procfs, thread};

static GUARD: ForkLocal<Arc<Guard>> = ForkLocal::new();

/// How often it looks while nothing happens.
const PERIOD: Duration = Duration::from_millis(100);

/// How long a fork waits for the guard to step aside.
const TO_STEP_ASIDE: Duration = Duration::from_millis(20);

/// What is guarded.
#[derive(Debug, Default)]
struct Guard {
    ctrl_c: Mutex<Option<ctrl_c::Bounds>>,
    gil: Mutex<Option<gil::Watch>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    running: AtomicBool,
    /// It has gone for the time of a fork.
    aside: AtomicBool,
}

/// Signals that can be made to count as Ctrl-C; the last one asks for a dump.
const OTHERS: [(&str, i32); 3] =
    [("SIGTERM", libc::SIGTERM), ("SIGHUP", libc::SIGHUP), ("SIGQUIT", libc::SIGQUIT)];

/// As the environment says, for a program of the launcher's: `TRACTOR_HOST_CTRL_C`, `TRACTOR_HOST_SIGNALS`,
/// `TRACTOR_HOST_WATCHDOG`. Where the program is not in the main interpreter, `ctrl_c` is seen to elsewhere.
///
/// # Errors
/// When that makes no sense; as [`guard_ctrl_c`].
pub fn from_environment(token: Token<'_>, ctrl_c: bool) -> Result<()> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    if ctrl_c {
        match variable("TRACTOR_HOST_CTRL_C").as_deref() {
            None | Some("on") => {
                guard_ctrl_c(token, Some(ctrl_c::Bounds::default()))?;
                let names = variable("TRACTOR_HOST_SIGNALS").unwrap_or_default();
                for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
                    listen(name)?;
                }
            }
            Some("off") => {}
            Some(other) => {
                return Err(Error::invalid(format!("TRACTOR_HOST_CTRL_C is `on` or `off`, not `{other}`")));
            }
        }
    }
    match variable("TRACTOR_HOST_WATCHDOG").as_deref() {
        None => watch_gil(token, Some(gil::Watch::default())),
        Some("off") => Ok(()),
        Some(policy) => {
            let parsed = serde_json::from_value(policy.into()).map_err(|_| {
                Error::invalid(format!(
                    "TRACTOR_HOST_WATCHDOG is `off`, `warn`, `dump`, `kill-worker` or `exit`, not `{policy}`"
                ))
            })?;
            watch_gil(token, Some(gil::Watch { policy: parsed, ..gil::Watch::default() }))
        }
    }
}

/// Has SIGTERM or SIGHUP count as Ctrl-C, or SIGQUIT ask for a dump.
///
/// # Errors
/// When it is none of these, or the program has a handler for it or ignores it.
pub fn listen(name: &str) -> Result<()> {
    let Some((_, number)) = OTHERS.iter().find(|(known, _)| *known == name) else {
        let known: Vec<_> = OTHERS.iter().map(|(known, _)| *known).collect();
        return Err(Error::invalid(format!("{name} can't be guarded: only {} can", known.join(", "))));
    };
    if presses::listen(*number) {
        Ok(())
    } else {
        Err(Error::state(format!("{name} is ignored, or the program has a handler for it: it stays so")))
    }
}

/// Guards Ctrl-C, or leaves it to Python alone.
///
/// # Errors
/// EAGAIN, when no thread can be made; in a process that was forked behind our back; when this Python's layout
/// is not known.
pub fn guard_ctrl_c(token: Token<'_>, bounds: Option<ctrl_c::Bounds>) -> Result<()> {
    call::find_handlers(token)?;
    let guard = GUARD.get_or_make(|| Ok(Arc::default()))?;
    *lock(&guard.ctrl_c) = bounds;
    if bounds.is_some() {
        ctrl_c::stand_in_front();
    } else {
        presses::step_aside();
    }
    guard.run()
}

/// Watches the GILs, or leaves them alone.
///
/// # Errors
/// As [`guard_ctrl_c`].
pub fn watch_gil(_: Token<'_>, watch: Option<gil::Watch>) -> Result<()> {
    Offsets::get()?;
    let guard = GUARD.get_or_make(|| Ok(Arc::default()))?;
    *lock(&guard.gil) = watch;
    guard.run()
}

/// In the only thread of a fork's child: forgets the parent's guard.
pub fn forget_in_child() {
    GUARD.forget();
}

/// Before a fork: CPython warns who forks beside other threads, and the guard, which has nothing to do with
/// the program, must not be why. Where there are more threads than the program's and this one, it stays.
extern "C" fn step_aside() {
    let Ok(Some(guard)) = GUARD.get() else { return };
    let is_only_other = || procfs::threads().is_ok_and(|threads| threads.len() == 2);
    if !guard.running.load(Ordering::Acquire) || !is_only_other() {
        return;
    }
    guard.aside.store(true, Ordering::Release);
    presses::ring();
    if let Some(thread) = lock(&guard.thread).take() {
        // Its panic has been printed.
        let _ = thread.join();
    }
    // The kernel counts it a moment longer.
    let deadline = Instant::now() + TO_STEP_ASIDE;
    while is_only_other() && Instant::now() < deadline {
        std::thread::yield_now();
    }
}

/// After it. CPython counts threads before the program runs on.
extern "C" fn come_back_soon() {
    let is_aside =
        GUARD.get().is_ok_and(|guard| guard.is_some_and(|guard| guard.aside.load(Ordering::Acquire)));
    if is_aside && !call::soon(come_back) {
        come_back();
    }
}

fn come_back() {
    if let Ok(Some(guard)) = GUARD.get()
        && guard.aside.swap(false, Ordering::AcqRel)
        && let Err(error) = guard.run()
    {
        fault!("{error}");
    }
}

impl Guard {
    fn has_work(&self) -> bool {
        lock(&self.ctrl_c).is_some() || lock(&self.gil).is_some()
    }

    fn run(self: &Arc<Self>) -> Result<()> {
        static FORKS: OnceLock<()> = OnceLock::new();
        if !self.has_work() {
            presses::ring();
            return Ok(());
        }
        let mut thread = lock(&self.thread);
        if self.running.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let guard = Arc::clone(self);
        match thread::spawn_deaf("th-guard", move || guard.watch()) {
            Ok(started) => *thread = Some(started),
            Err(error) => {
                self.running.store(false, Ordering::Release);
                return Err(Error::os("start the thread that guards Ctrl-C and the GIL", error));
            }
        }
        if FORKS.set(()).is_ok() {
            process::around_fork(step_aside, come_back_soon)
                .map_err(|error| Error::os("be told of forks", error))?;
        }
        Ok(())
    }

    fn watch(&self) {
        let mut ctrl_c = ctrl_c::CtrlC::new();
        let mut gils = gil::Gils::new();
        let mut quits = presses::quits();
        while !self.aside.load(Ordering::Acquire) {
            let heard = presses::rings();
            let now = Instant::now();
            let mut next = now + PERIOD;
            if let Some(bounds) = *lock(&self.ctrl_c) {
                ctrl_c::stand_in_front();
                if let Some(sooner) = ctrl_c.look(&bounds, presses::count(), now) {
                    next = next.min(sooner);
                }
            }
            if quits != presses::quits() {
                quits = presses::quits();
                gil::dump("SIGQUIT");
            }
            let watch = *lock(&self.gil);
            if let Some(watch) = watch {
                gils.look(&watch, now);
            }
            if !self.has_work() {
                self.running.store(false, Ordering::Release);
                // Somebody may have given it work in this very moment, and have seen it run.
                if !self.has_work() || self.running.swap(true, Ordering::AcqRel) {
                    return;
                }
            }
            presses::wait_for_bell(heard, next);
        }
        self.running.store(false, Ordering::Release);
    }
}
