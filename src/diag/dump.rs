//! A picture of a process and of those below it: what each thread is doing, who holds the GILs, which tasks
//! there are. Taken from outside, of this process too: nobody is asked, stopped or waited for, so it works
//! while everything is stuck.

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::python::{Obstacle, Runtime};
use super::stacks::{Frame, MAX_FRAMES};
use super::tasks::{self, Loop};
use super::waits::Context;
use crate::events::ring;
use crate::ffi::offsets::AsyncioOffsets;
use crate::sys::{look, process, procfs, thread};

/// The version of the form of [`Dump`] as JSON. Raised when something in it goes or changes its meaning, not
/// when something is added.
pub const SCHEMA: u32 = 1;

/// How long it may take. What there was no time for is said in [`Dump::unread`].
const BOUND: Duration = Duration::from_secs(2);
/// More processes than anybody reads of.
const MAX_PROCESSES: usize = 256;
/// As many events as tell what led to this.
const MAX_EVENTS: usize = 100;

/// All that can be seen at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct Dump {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Why it was taken.
    pub reason: String,
    /// When, in seconds since 1970.
    pub taken: f64,
    /// How many seconds it took.
    pub seconds: f64,
    /// The process that it is of.
    pub pid: i32,
    /// The workers that are not gone, with those of workers; `None` where there is no registry, or it can't be
    /// seen from here.
    pub workers: Option<Vec<WorkerLine>>,
    /// That process, and then those below it.
    pub processes: Vec<Process>,
    /// What has happened last, oldest first, as `tractor_host.events()` has it.
    pub events: Vec<Json>,
    /// What could not be read, and why.
    pub unread: Vec<String>,
}

/// A worker in the registry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "as in `tractor_host.Worker`")]
pub struct WorkerLine {
    pub id: u64,
    pub parent: Option<u64>,
    pub name: String,
    pub target: String,
    pub backend: String,
    /// `None` where a lock is held that this is behind.
    pub state: Option<String>,
    pub pid: Option<i32>,
    /// In seconds.
    pub age: f64,
    /// It could not be ended.
    pub quarantined: bool,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// What the kernel calls it.
    pub name: String,
    /// What it was started as.
    pub command: Vec<String>,
    /// As in `ps`.
    pub state: char,
    /// In seconds.
    pub age: Option<f64>,
    /// The version of its Python.
    pub python: Option<String>,
    /// Why nothing of Python's can be read.
    pub obstacle: Option<String>,
    /// Its GILs.
    pub gils: Vec<Gil>,
    /// Its interpreters, oldest first.
    pub interpreters: Vec<Interpreter>,
    /// The threads that no interpreter knows.
    pub threads: Vec<Thread>,
}

/// A GIL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gil {
    /// Whose it is.
    pub interpreters: Vec<i64>,
    /// The thread that has it; `None` when nobody has.
    pub holder: Option<i32>,
    /// The interpreter that this thread is in.
    pub held_in: Option<i64>,
    /// And where in Python.
    pub at: Option<Frame>,
}

/// An interpreter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Interpreter {
    /// 0 is the main one.
    pub id: i64,
    /// Its threads. A thread can be in several interpreters.
    pub threads: Vec<Thread>,
}

/// A thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Thread {
    /// The kernel's id.
    pub id: i32,
    /// What `threading` calls it.
    pub name: Option<String>,
    /// What the kernel calls it.
    pub kernel_name: String,
    /// As in `ps`.
    pub state: char,
    /// The system call that it is in: its name, or its number where that is a rare one.
    pub syscall: Option<String>,
    /// What that waits for.
    pub waits_for: Option<String>,
    /// The function of the kernel that it sleeps in.
    pub wait_channel: Option<String>,
    /// Whether it has the GIL of the interpreter that it is told of in.
    pub holds_gil: bool,
    /// Its Python frames there, innermost first.
    pub frames: Vec<Frame>,
    /// How many more there are.
    pub omitted: usize,
    /// The event loops that run in it.
    pub loops: Vec<Loop>,
}

/// Adds the registry's part to a dump of this process, within a bound.
pub type Registry = fn(&mut Dump);

static REGISTRY: OnceLock<Registry> = OnceLock::new();

/// Has dumps of this process tell of its workers.
pub fn set_registry(registry: Registry) {
    // It is the same each time.
    let _ = REGISTRY.set(registry);
}

/// What of a dump can't be read from outside: the process has to be asked.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Told {
    /// As [`Dump::workers`].
    pub workers: Option<Vec<WorkerLine>>,
    /// As [`Dump::events`].
    pub events: Vec<Json>,
    /// As [`Dump::unread`].
    pub unread: Vec<String>,
}

impl Told {
    /// Of this process.
    pub fn own() -> Self {
        let mut dump = Dump::begin("", process::id());
        dump.tell();
        Self { workers: dump.workers, events: dump.events, unread: dump.unread }
    }
}

impl Dump {
    /// Of this process; with `tree`, of those below it too. May be called by any thread, attached or not.
    pub fn own(reason: &str, tree: bool) -> Self {
        let started = Instant::now();
        let mut dump = Self::begin(reason, process::id());
        // First, because it changes fastest.
        dump.take(tree, started + BOUND);
        dump.tell();
        dump.seconds = started.elapsed().as_secs_f64();
        dump
    }

    /// Of another process.
    ///
    /// # Errors
    /// There is no Python in it that can be read.
    pub fn of(pid: i32, reason: &str, tree: bool) -> Result<Self, Obstacle> {
        let started = Instant::now();
        if look::process(pid).is_none() {
            return Err(Obstacle::Gone);
        }
        Runtime::find(pid)?;
        let mut dump = Self::begin(reason, pid);
        dump.take(tree, started + BOUND);
        if dump.processes.is_empty() {
            return Err(Obstacle::Gone);
        }
        dump.seconds = started.elapsed().as_secs_f64();
        Ok(dump)
    }

    /// Takes in what a process has told of itself.
    pub fn take_in(&mut self, told: Told) {
        self.workers = told.workers;
        self.events = told.events;
        self.unread.extend(told.unread);
    }

    fn tell(&mut self) {
        if let Some(registry) = REGISTRY.get() {
            registry(self);
        }
        let events = ring::recent();
        let last = &events[events.len().saturating_sub(MAX_EVENTS)..];
        self.events.extend(last.iter().filter_map(|event| serde_json::to_value(event).ok()));
    }

    fn begin(reason: &str, pid: i32) -> Self {
        let taken = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            schema: SCHEMA,
            reason: reason.to_owned(),
            taken: taken.as_secs_f64(),
            seconds: 0.0,
            pid,
            workers: None,
            processes: Vec::new(),
            events: Vec::new(),
            unread: Vec::new(),
        }
    }

    fn take(&mut self, tree: bool, deadline: Instant) {
        let mut open = VecDeque::from([self.pid]);
        while let Some(pid) = open.pop_front() {
            if self.processes.len() >= MAX_PROCESSES || Instant::now() > deadline {
                let left = open.len() + 1;
                self.unread
                    .push(format!("{left} more processes: there are too many, or it would take too long"));
                return;
            }
            let found = Process::look(pid, deadline, &mut self.unread);
            // One that has ended meanwhile is none any more.
            self.processes.extend(found);
            if tree {
                open.extend(procfs::children_of_process(pid));
            }
        }
    }
}

impl Process {
    fn look(pid: i32, deadline: Instant, unread: &mut Vec<String>) -> Option<Self> {
        let seen = look::process(pid)?;
        let (runtime, obstacle) = match Runtime::find(pid) {
            Ok(runtime) => (Some(runtime), None),
            Err(obstacle) => (None, Some(obstacle.to_string())),
        };
        let mut found = Self {
            pid,
            parent: seen.parent,
            name: seen.name,
            command: seen.command,
            state: seen.state,
            age: seen.age,
            python: runtime.as_ref().map(|runtime| runtime.version.clone()),
            obstacle: obstacle.filter(|_| !matches!(seen.state, 'Z' | 'X')),
            gils: Vec::new(),
            interpreters: Vec::new(),
            threads: Vec::new(),
        };
        found.fill(runtime.as_ref(), deadline, unread);
        Some(found)
    }

    fn fill(&mut self, runtime: Option<&Runtime>, deadline: Instant, unread: &mut Vec<String>) {
        let mut states = Vec::new();
        let (mut gils, mut idents) = (Vec::new(), Vec::new());
        if let Some(runtime) = runtime {
            let walk = runtime.reader.walk();
            for interpreter in runtime.interpreters() {
                let Some(id) = walk.id_of(interpreter) else { continue };
                let threads = walk.threads(interpreter);
                let ident = |(state, native): (u64, i32)| {
                    Some((runtime.reader.word(state, runtime.reader.at.thread_id)?, native))
                };
                idents.extend(threads.iter().copied().filter_map(ident));
                let gil = walk.gil_of(interpreter);
                gils.extend(gil.filter(|gil| !gils.contains(gil)));
                states.push((id, gil, threads));
            }
        }
        // Asked before anybody is looked at for longer.
        let holders: Vec<_> = gils
            .iter()
            .map(|gil| runtime.and_then(|runtime| runtime.reader.walk().holder_of(*gil)))
            .collect();
        let context = Context { pid: self.pid, runtime, gils: &gils, idents: &idents };
        let asyncio = runtime.and_then(Runtime::asyncio);
        let mut others = look::threads(self.pid);
        let mut left = 0;
        for (id, gil, threads) in &states {
            let holder = gil.and_then(|gil| holders[gils.iter().position(|known| *known == gil)?]);
            let mut shown = Vec::new();
            for &(state, native) in threads {
                others.retain(|other| *other != native);
                if Instant::now() > deadline {
                    left += 1;
                } else if let Some(runtime) = runtime {
                    let thread = Thread::look(&context, native);
                    let thread =
                        thread.map(|thread| thread.with_python(runtime, state, holder, asyncio.as_ref()));
                    shown.extend(thread);
                }
            }
            shown.reverse();
            self.interpreters.push(Interpreter { id: *id, threads: shown });
        }
        if left > 0 {
            unread.push(format!("{left} threads of process {}: it would take too long", self.pid));
        }
        self.threads = others.into_iter().filter_map(|native| Thread::look(&context, native)).collect();
        for (gil, holder) in gils.iter().zip(holders) {
            let of = states.iter().filter(|(_, its, _)| *its == Some(*gil)).map(|(id, ..)| *id).collect();
            let mut told = Gil { interpreters: of, holder: None, held_in: None, at: None };
            if let (Some(state), Some(runtime)) = (holder, runtime) {
                told.holder = runtime.reader.walk().thread_of(state).map(|(native, _)| native);
                let interpreter =
                    states.iter().find(|(_, _, threads)| threads.iter().any(|(its, _)| *its == state));
                told.held_in = interpreter.map(|(id, ..)| *id);
                let threads = self.interpreters.iter().flat_map(|it| &it.threads);
                told.at = threads
                    .filter(|it| it.holds_gil && Some(it.id) == told.holder)
                    .find_map(|it| it.frames.first().cloned());
            }
            self.gils.push(told);
        }
    }
}

impl Thread {
    fn look(context: &Context<'_>, native: i32) -> Option<Self> {
        let mut seen = look::at(context.pid, native)?;
        if native == thread::id() && context.pid == process::id() {
            // It was seen looking at itself.
            seen.call = None;
        }
        let named = |number| look::name(number).map_or_else(|| number.to_string(), str::to_owned);
        Some(Self {
            id: native,
            name: None,
            kernel_name: seen.name,
            state: seen.state,
            syscall: seen.call.map(|call| named(call.number)),
            waits_for: seen.call.and_then(|call| context.of(&call)),
            wait_channel: seen.wait_channel,
            holds_gil: false,
            frames: Vec::new(),
            omitted: 0,
            loops: Vec::new(),
        })
    }

    fn with_python(
        mut self,
        runtime: &Runtime,
        state: u64,
        holder: Option<u64>,
        asyncio: Option<&AsyncioOffsets>,
    ) -> Self {
        let reader = &runtime.reader;
        self.holds_gil = holder == Some(state);
        let frames = reader.frames(reader.pointer(state, reader.at.thread_current_frame), MAX_FRAMES);
        self.loops = tasks::of_thread(reader, &frames, state, asyncio);
        // The first call in a thread that `threading` has made is its `Thread`'s.
        let bootstrap =
            frames.bottom.iter().chain(&frames.shown).find(|(_, at)| at.function == "Thread._bootstrap");
        let object = bootstrap.and_then(|(frame, _)| reader.local(*frame, "self"));
        self.name = object.and_then(|object| reader.text(reader.attribute(object, "_name")?));
        if self.name.is_none() && self.id == runtime.pid {
            self.name = Some("MainThread".into());
        }
        self.omitted = frames.omitted;
        self.frames = frames.shown.into_iter().map(|(_, frame)| frame).collect();
        self
    }
}
