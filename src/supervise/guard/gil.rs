//! Finding who keeps a GIL.
//!
//! A thread that has had it for some time, without giving it to anybody else in between, is asked for a sign
//! of life: to call a function at its next check of the eval loop. Python code does that within microseconds,
//! however busy it is; C code that does not release the GIL never does. Nobody is made to wait for a GIL,
//! and nothing is asked while GILs come and go.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::diag::outlet;
use crate::diag::stacks::{self, Stack};
use crate::events::SUPERVISOR;
use crate::interp::attach::Interpreter;
use crate::interp::door::Door;
use crate::interp::gil::{self, Held, Pulse};
use crate::supervise::Supervisor;
use crate::supervise::ladder::Reason;
use crate::supervise::worker::Worker;
use crate::sys::event::Event;
use crate::sys::{lent, process, procfs};

/// The exit code of a process that is ended because its GIL can't be had.
pub const STARVED: i32 = 86;
/// If nobody looked for that long, the machine slept, or this process was stopped.
const GAP: Duration = Duration::from_secs(1);

/// What to do about one that keeps it for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Say so, and no more.
    Warn,
    /// And say what every thread does.
    Dump,
    /// And end the worker that does it.
    KillWorker,
    /// And end the process, with the exit code 86.
    Exit,
}

/// What is watched for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Watch {
    /// After how long it is said.
    pub warn: Duration,
    /// After how long something is done.
    pub act: Duration,
    /// What.
    pub policy: Policy,
    /// Also where no worker waits for it: the program's own, and those of workers that have one each.
    pub all: bool,
}

impl Default for Watch {
    fn default() -> Self {
        Self { warn: Duration::from_secs(1), act: Duration::from_secs(10), policy: Policy::Dump, all: false }
    }
}

/// What is known of one GIL.
struct Seen {
    held: Held,
    /// Since when its holder has given no sign of life.
    since: Instant,
    pulse: Option<Pulse>,
    warned: bool,
    acted: bool,
}

/// The GILs of this process, as they were last time.
pub(super) struct Gils {
    main: Door,
    seen: HashMap<u64, Seen>,
    looked: Instant,
}

impl Gils {
    pub(super) fn new() -> Self {
        Self { main: Door::to_main(), seen: HashMap::new(), looked: Instant::now() }
    }

    pub(super) fn look(&mut self, watch: &Watch, now: Instant) {
        let gap = now.duration_since(self.looked);
        self.looked = now;
        if gap > GAP {
            self.seen.clear();
        }
        if !watch.all && self.seen.is_empty() && gil::holder(Interpreter::main()).is_none() {
            return; // mostly, and it costs little
        }
        let workers = workers();
        let shared = gil::of(Interpreter::main());
        let interpreters: Vec<_> = workers.iter().filter_map(|(_, door)| door.behind()).collect();
        // Who has a GIL alone keeps nobody waiting. An interpreter that is not there yet waits for the shared
        // one.
        let is_awaited = interpreters.len() < workers.len()
            || interpreters.iter().any(|interpreter| gil::of(*interpreter) == shared);
        let is_watched = |gil: u64| watch.all || (shared == Some(gil) && is_awaited);
        let held: HashMap<u64, Held> = std::iter::once(Interpreter::main())
            .chain(interpreters.iter().copied())
            .filter_map(gil::holder)
            .filter(|held| is_watched(held.gil))
            .map(|held| (held.gil, held))
            .collect();
        self.seen.retain(|gil, seen| {
            let stays = held.get(gil).is_some_and(|held| *held == seen.held);
            if !stays && seen.warned {
                let waited = now.duration_since(seen.since).as_secs_f64();
                tracing::error!(target: SUPERVISOR, kind = "guard", "the GIL can be had again, after {waited:.1} s");
            }
            stays
        });
        for found in held.into_values() {
            let seen = self.seen.entry(found.gil).or_insert_with(|| Seen {
                held: found,
                since: now,
                pulse: None,
                warned: false,
                acted: false,
            });
            let holder = workers.iter().find(|(_, door)| {
                door.behind().is_some_and(|interpreter| interpreter.address() == found.interpreter)
            });
            match &seen.pulse {
                Some(pulse) if pulse.has_beaten() => {
                    *seen = Seen { held: found, since: now, pulse: None, warned: false, acted: false };
                }
                Some(_) => seen.judge(watch, now, holder.map(|(worker, _)| &**worker)),
                None => {
                    let door = match holder {
                        Some((_, door)) => Some(&**door),
                        // One that somebody else made can't be asked: it may end at any time.
                        None => (found.interpreter == Interpreter::main().address()).then_some(&self.main),
                    };
                    seen.pulse = door.and_then(Pulse::ask);
                }
            }
        }
    }
}

impl Seen {
    /// The holder has been asked, and has not answered.
    fn judge(&mut self, watch: &Watch, now: Instant, worker: Option<&Worker>) {
        let kept = now.duration_since(self.since);
        if kept >= watch.warn && !self.warned {
            self.warned = true;
            tracing::error!(target: SUPERVISOR, kind = "guard",
                "{} has kept the GIL for {:.1} s: nobody else can run Python meanwhile",
                self.describe(worker),
                kept.as_secs_f64()
            );
        }
        if kept < watch.act || self.acted {
            return;
        }
        self.acted = true;
        if watch.policy == Policy::Warn {
            return;
        }
        let written =
            dump(&format!("{} has kept the GIL for {:.1} s", self.describe(worker), kept.as_secs_f64()));
        match (watch.policy, worker, Supervisor::existing()) {
            (Policy::KillWorker, Some(worker), Ok(Some(supervisor))) => {
                supervisor.end(worker, Reason::HeldGil(watch.act.as_secs_f64()));
            }
            (Policy::KillWorker, None, _) => {
                tracing::error!(target: SUPERVISOR, kind = "guard", "it is the program itself: there is no worker to be ended");
            }
            (Policy::Exit, ..) => {
                written.wait_through_signals(Some(Instant::now() + outlet::BOUND));
                lent::give_back();
                process::exit_now(STARVED)
            }
            _ => {}
        }
    }

    /// Who has it, where.
    fn describe(&self, worker: Option<&Worker>) -> String {
        let who = match worker {
            Some(worker) => format!("worker {} ({})", worker.id, worker.name),
            None if self.held.interpreter == Interpreter::main().address() => "the program".to_owned(),
            None => "an interpreter that is none of tractor_host's".to_owned(),
        };
        let thread = self.held.thread;
        let name = procfs::thread_name(thread).map_or_else(String::new, |name| format!(" {name}"));
        let interpreter = match worker.and_then(|worker| worker.door.get()?.behind()) {
            Some(interpreter) => Some(interpreter),
            None => (self.held.interpreter == Interpreter::main().address()).then(Interpreter::main),
        };
        let stack = interpreter
            .and_then(|interpreter| stacks::of(interpreter).into_iter().find(|stack| stack.thread == thread));
        format!(
            "{who}, thread {thread}{name}, {}",
            stack.map_or_else(|| "in C code".to_owned(), |stack| at(&stack))
        )
    }
}

/// Where a thread is.
fn at(stack: &Stack) -> String {
    let call = stack.syscall.map_or_else(String::new, |number| format!(", in system call {number}"));
    match stack.frames.first() {
        Some(frame) => format!("at {frame}{call}"),
        None => format!("in C code{call}"),
    }
}

/// The live workers whose interpreter is in this process.
fn workers() -> Vec<(Arc<Worker>, Arc<Door>)> {
    let Ok(Some(supervisor)) = Supervisor::existing() else { return Vec::new() };
    let abandoned = supervisor.quarantined().into_iter();
    let live = supervisor.live().into_iter().filter_map(|worker| {
        let door = Arc::clone(worker.door.get()?);
        Some((worker, door))
    });
    abandoned.chain(live).collect()
}

/// Writes what every thread of this process and of those below it does, on a thread that can wait for that.
/// What is returned is set when it has been written.
pub(super) fn dump(why: &str) -> Arc<Event> {
    outlet::write_apart(&format!("{why}; this is what all threads do"))
}
