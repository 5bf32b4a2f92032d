//! What follows a Ctrl-C that Python does not heed.
//!
//! The first is Python's: its handler raises KeyboardInterrupt, or does what the program wants. If that
//! handler has not been called in time, or a second Ctrl-C follows, all workers are ended and what the main
//! thread is blocked in returns; if the program is there still when its time is up, or at a third, the process
//! ends.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::diag::stacks::{self, Frame};
use crate::events::SUPERVISOR;
use crate::ffi::offsets::{self, Offsets};
use crate::ffi::tripped;
use crate::interp::attach::Interpreter;
use crate::interp::door::Door;
use crate::interp::runtime;
use crate::supervise::Supervisor;
use crate::supervise::ladder::Reason;
use crate::sys::kick::Kicker;
use crate::sys::{presses, process};

/// How often a main thread that does not heed is made to look up.
const PERIOD: Duration = Duration::from_millis(10);
/// From when on.
const TO_LOOK_UP: Duration = Duration::from_millis(50);
/// What a program has at least, once its workers are being ended.
const TO_END: Duration = Duration::from_secs(1);
/// What the end of the process takes, with a last flush.
const TO_LEAVE: Duration = Duration::from_millis(400);

/// How long what may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Until Python's handler is called.
    pub react: Duration,
    /// From the first Ctrl-C until the end of a program that does not heed it, or was sent a second.
    pub end: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { react: Duration::from_secs(1), end: Duration::from_secs(5) }
    }
}

impl Bounds {
    /// When a program is not waited for any longer.
    fn deadline(&self, first: Instant, now: Instant) -> Instant {
        (first + self.end.saturating_sub(TO_LEAVE)).max(now + TO_END)
    }
}

/// Puts our handler in front of Python's.
pub(super) fn stand_in_front() {
    if let Some(image) = offsets::image() {
        presses::stand_in_front(&image);
    }
}

#[derive(Debug, Clone, Copy)]
enum Stage {
    /// No Ctrl-C, or all is forgotten.
    Calm,
    /// There was one.
    Pressed { first: Instant },
    /// It is being enforced.
    Enforced { deadline: Instant, by_user: bool },
}

/// What is to be done, as time passes and Ctrl-Cs come.
pub(super) struct CtrlC {
    stage: Stage,
    presses: u32,
    /// Since when one has been pending that every thread of Python's blocks.
    held_up: Option<Instant>,
    kicker: Option<Kicker>,
}

impl CtrlC {
    pub(super) fn new() -> Self {
        Self { stage: Stage::Calm, presses: presses::count(), held_up: None, kicker: None }
    }

    /// Looks at how things are; returns when to look again, if that is soon.
    pub(super) fn look(&mut self, bounds: &Bounds, presses: u32, now: Instant) -> Option<Instant> {
        for _ in 0..presses.wrapping_sub(self.presses).min(3) {
            self.press(bounds, now);
        }
        self.presses = presses;
        if !presses::is_held_up() {
            self.held_up = None;
        } else if now.duration_since(*self.held_up.get_or_insert(now)) >= bounds.react
            && matches!(self.stage, Stage::Calm)
        {
            // What the program blocks for a moment is its affair, not what it blocks for good.
            self.stage = Stage::Pressed { first: self.held_up.unwrap_or(now) };
        }
        let heeded = self.held_up.is_none() && is_heeded();
        match self.stage {
            Stage::Calm => return None,
            Stage::Pressed { first } => {
                let waiting = now.duration_since(first);
                if heeded {
                    if waiting >= bounds.end {
                        self.calm();
                        return None;
                    }
                } else if waiting >= bounds.react {
                    self.enforce(bounds.deadline(first, now), false);
                } else if waiting >= TO_LOOK_UP || presses::heard_by() != process::id() {
                    self.rouse(false);
                }
            }
            // It got its KeyboardInterrupt at last; what it makes of it is its own affair.
            Stage::Enforced { by_user: false, .. } if heeded => self.calm(),
            Stage::Enforced { deadline, .. } if now >= deadline => leave(bounds),
            Stage::Enforced { .. } if !heeded => self.rouse(true),
            Stage::Enforced { .. } => {}
        }
        Some(now + PERIOD)
    }

    fn press(&mut self, bounds: &Bounds, now: Instant) {
        match self.stage {
            Stage::Calm => self.stage = Stage::Pressed { first: now },
            Stage::Pressed { .. } if is_at_prompt() => self.stage = Stage::Pressed { first: now },
            Stage::Pressed { first } => self.enforce(bounds.deadline(first, now), true),
            Stage::Enforced { .. } => leave(bounds),
        }
    }

    fn calm(&mut self) {
        self.stage = Stage::Calm;
        self.kicker = None;
    }

    /// Ends the workers.
    fn enforce(&mut self, deadline: Instant, by_user: bool) {
        tracing::error!(target: SUPERVISOR, kind = "guard",
            "Ctrl-C {}: all workers are being ended, and the program has {:.1} s to end",
            if by_user { "for the second time" } else { "is not heeded" },
            (deadline + TO_LEAVE).saturating_duration_since(Instant::now()).as_secs_f64(),
        );
        if let Ok(Some(supervisor)) = Supervisor::existing() {
            supervisor.end_all(Reason::Interrupted);
        }
        self.stage = Stage::Enforced { deadline, by_user };
    }

    /// Makes the main thread look up from what it is blocked in; `hard`: that fails for its sake.
    fn rouse(&mut self, hard: bool) {
        if self.kicker.is_none() {
            self.kicker = Kicker::for_parking().ok();
        }
        let (Some(kicker), Some(offsets)) = (&mut self.kicker, Offsets::if_checked()) else { return };
        // The main thread is there as long as the process.
        let main = process::id();
        if hard {
            kicker.kick(main, &Interpreter::main().internals(offsets));
        } else {
            kicker.interrupt(main);
        }
    }
}

/// Whether Python has called its handler for all that came.
fn is_heeded() -> bool {
    presses::all_told() && tripped::is_sigint_waiting() == Some(false)
}

/// Whether the main thread is at a prompt, or runs what was typed there, where a Ctrl-C ends a line and not the
/// program.
fn is_at_prompt() -> bool {
    /// The files of prompts: modules, and packages.
    const MODULES: [&str; 4] = ["/pdb.py", "/bdb.py", "/code.py", "/pdbp.py"];
    const PACKAGES: [&str; 2] = ["/_pyrepl/", "/IPython/"];
    if !std::io::stdin().is_terminal() {
        return false;
    }
    let Some(frames) = main_frames() else { return true };
    // What the prompt that is written in C shows of a line that a Ctrl-C has ended. Of a program's own such line,
    // that is its end.
    let shows = frames.last().is_some_and(|outermost| outermost.file.ends_with("/traceback.py"));
    shows
        || frames.iter().any(|frame| {
            let file = frame.file.as_str();
            file == "<stdin>"
                || file.starts_with("<python-input-")
                || MODULES.iter().any(|module| file.ends_with(module))
                || PACKAGES.iter().any(|package| file.contains(package))
        })
}

/// What Python code the main thread runs; `None` if none, as when a line is being typed.
fn main_frames() -> Option<Vec<Frame>> {
    let main = stacks::of(Interpreter::main()).into_iter().find(|stack| stack.thread == process::id())?;
    Some(main.frames)
}

/// Ends the process without waiting for the program any longer. Who outlives it ends its workers.
fn leave(bounds: &Bounds) -> ! {
    // What a shell makes of a death by that signal.
    let code = 128 + presses::last();
    let frames = main_frames().unwrap_or_default();
    let place = frames.first().map_or_else(String::new, |frame| format!(" (its main thread is at {frame})"));
    tracing::error!(target: SUPERVISOR, kind = "guard",
        "the program has not ended{place}; leaving with exit code {code}. The time limit of {} s is a \
         parameter of tractor_host.guard_ctrl_c",
        bounds.end.as_secs_f64()
    );
    runtime::leave(&Arc::new(Door::to_main()), code)
}
