//! What there is to show: hosts by their own word, or else by their records and what /proc says. This is also the
//! document that `--json` prints.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use serde_json::Value;

use crate::diag::hosts::{self, Host};
use crate::diag::stacks;
use crate::sys::ledger::{BLANK, FORK_SERVER, Head, Life, Made};
use crate::sys::procfs::{self, Stat};
use crate::wire::control::Request;

/// The document's layout.
const VERSION: u32 = 1;
/// How long hosts have to answer, all of them together.
const PATIENCE: Duration = Duration::from_secs(1);

/// Everything at one moment.
#[derive(Debug, Serialize)]
pub(super) struct View {
    version: u32,
    /// Seconds since 1970.
    time: f64,
    pub(super) hosts: Vec<HostView>,
    /// What could not be read, and why.
    pub(super) problems: Vec<String>,
}

/// One host.
#[derive(Debug, Serialize)]
pub(super) struct HostView {
    pub(super) pid: i32,
    pub(super) argv: Vec<String>,
    executable: String,
    /// `up`, `silent` (it does not answer), `stopped` or `dead`.
    pub(super) state: &'static str,
    /// Why it is not `up`.
    pub(super) problem: Option<String>,
    pub(super) process: Option<Use>,
    #[serde(flatten)]
    pub(super) doing: Doing,
    /// As `tractor_host.statistics()`; null when it does not answer.
    statistics: Value,
    pub(super) workers: Vec<WorkerView>,
}

/// One worker. What only its host knows is null where that does not answer.
#[derive(Debug, Serialize)]
pub(super) struct WorkerView {
    pub(super) id: Option<u64>,
    pub(super) parent: Option<u64>,
    pub(super) name: String,
    target: Option<String>,
    pub(super) backend: String,
    pub(super) pid: Option<i32>,
    /// The kernel's id of its thread, where it runs in its host's process.
    pub(super) thread: Option<i32>,
    pub(super) state: Option<String>,
    /// Seconds since it was asked for, or else since its process began.
    pub(super) age: Option<f64>,
    pub(super) process: Option<Use>,
    #[serde(flatten)]
    pub(super) doing: Doing,
}

/// What a process, or a thread, takes of the machine.
#[derive(Debug, Serialize)]
pub(super) struct Use {
    /// The kernel's word: `R`, `S`, `D`, `T`, …
    pub(super) state: char,
    /// Seconds since it began.
    pub(super) age: f64,
    /// Bytes of memory; null for a thread, which shares its process's.
    pub(super) rss: Option<u64>,
    /// Percent of one processor: since the last look, or since it began.
    pub(super) cpu: f64,
}

/// What it is doing.
#[derive(Debug, Default, Serialize)]
pub(super) struct Doing {
    /// Its innermost Python call: `file`, `line`, `function`.
    pub(super) call: Option<Value>,
    /// Where in the kernel its main thread waits.
    pub(super) wait: Option<String>,
}

impl View {
    pub(super) fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|error| format!("{{\"error\": \"{error}\"}}"))
    }

    pub(super) fn workers(&self) -> usize {
        let all = self.hosts.iter().flat_map(|host| &host.workers);
        all.filter(|worker| !matches!(worker.backend.as_str(), FORK_SERVER | BLANK)).count()
    }
}

/// Who looks, and remembers the processor time that was used up the last time.
#[derive(Debug, Default)]
pub(super) struct Viewer {
    before: HashMap<(i32, u64), (u64, Instant)>,
    now: HashMap<(i32, u64), (u64, Instant)>,
    /// Until when stacks of other processes are looked at.
    looking: Option<Instant>,
}

/// How long is spent on that. What comes after it is shown without.
const LOOKING: Duration = Duration::from_millis(300);

impl Viewer {
    /// Looks at everything. It takes a bounded time.
    pub(super) fn look(&mut self) -> View {
        let (found, problems) = hosts::find();
        let alive: Vec<&Host> = found.iter().filter(|host| host.life == Life::Alive).collect();
        // One that is stopped can't answer, and need not be waited for.
        let (asked, stopped): (Vec<&Host>, Vec<&Host>) =
            alive.into_iter().partition(|host| !is_stopped(host));
        let answers = hosts::ask(&asked, Request::Status, Instant::now() + PATIENCE);
        self.before = std::mem::take(&mut self.now);
        self.looking = Instant::now().checked_add(LOOKING);
        let mut hosts = Vec::new();
        for (host, answer) in asked.into_iter().zip(answers) {
            let told = answer.and_then(|bytes| {
                serde_json::from_slice::<Value>(&bytes)
                    .map_err(|error| crate::Error::protocol(format!("its answer is no JSON: {error}")))
            });
            match told {
                Ok(told) => hosts.push(self.told(host, &told)),
                // It has ended meanwhile, as it should.
                Err(_) if !host.record_is_there() => {}
                Err(error) => hosts.push(self.untold(host, "silent", Some(error.to_string()))),
            }
        }
        for host in stopped {
            hosts.push(self.untold(host, "stopped", Some("its process is stopped".into())));
        }
        for host in found.iter().filter(|host| host.life != Life::Alive) {
            hosts.push(self.untold(
                host,
                "dead",
                Some("it has left this behind; see `tractor-host reap`".into()),
            ));
        }
        hosts.sort_by_key(|host| host.pid);
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let time = since_1970.map_or(0.0, |time| time.as_secs_f64());
        View { version: VERSION, time, hosts, problems }
    }

    /// A host that has answered.
    fn told(&mut self, host: &Host, told: &Value) -> HostView {
        let workers = told["workers"].as_array().map_or(&[][..], Vec::as_slice);
        let pid = host.record.head.pid;
        let workers = workers.iter().map(|worker| self.worker(pid, worker)).collect();
        let doing = Doing { call: some(&told["call"]), wait: procfs::wait_channel(pid, pid) };
        let process = self.process(pid, None);
        view_of(&host.record.head, "up", None, process, doing, told["statistics"].clone(), workers)
    }

    fn worker(&mut self, host: i32, told: &Value) -> WorkerView {
        let text = |key: &str| told[key].as_str().map(str::to_owned);
        let number = |key: &str| told[key].as_i64().and_then(|number| i32::try_from(number).ok());
        let (pid, thread) = (number("pid"), number("thread"));
        let process = match (pid, thread) {
            (Some(pid), _) => self.process(pid, None),
            (None, Some(thread)) => self.process(host, Some(thread)),
            (None, None) => None,
        };
        let call = match pid {
            Some(pid) => self.call(pid),
            None => some(&told["call"]),
        };
        let wait = match (pid, thread) {
            (Some(pid), _) => procfs::wait_channel(pid, pid),
            (None, Some(thread)) => procfs::wait_channel(host, thread),
            (None, None) => None,
        };
        WorkerView {
            id: told["id"].as_u64(),
            parent: told["parent"].as_u64(),
            name: text("name").unwrap_or_default(),
            target: text("target"),
            backend: text("backend").unwrap_or_default(),
            pid,
            thread,
            state: text("state"),
            age: told["age"].as_f64(),
            process,
            doing: Doing { call, wait },
        }
    }

    /// The innermost Python call of a process's main thread.
    fn call(&self, pid: i32) -> Option<Value> {
        if self.looking.is_none_or(|until| Instant::now() > until) {
            return None;
        }
        let stack = stacks::of_process(pid).into_iter().find(|stack| stack.thread == pid)?;
        serde_json::to_value(stack.frames.first()?).ok()
    }

    /// A host that has not: what it has written down, and the kernel knows.
    fn untold(&mut self, host: &Host, state: &'static str, problem: Option<String>) -> HostView {
        let head = &host.record.head;
        let workers = host.survivors().into_iter().map(|made| self.survivor(made)).collect();
        let (process, wait) = match host.life {
            Life::Alive => (self.process(head.pid, None), procfs::wait_channel(head.pid, head.pid)),
            Life::Dead | Life::Past => (None, None),
        };
        view_of(head, state, problem, process, Doing { call: None, wait }, Value::Null, workers)
    }

    fn survivor(&mut self, made: &Made) -> WorkerView {
        let process = self.process(made.pid, None);
        WorkerView {
            id: None,
            parent: None,
            name: made.name.clone(),
            target: None,
            backend: made.kind.clone(),
            pid: Some(made.pid),
            thread: None,
            state: None,
            age: process.as_ref().map(|process| process.age),
            doing: Doing { call: self.call(made.pid), wait: procfs::wait_channel(made.pid, made.pid) },
            process,
        }
    }

    fn process(&mut self, pid: i32, thread: Option<i32>) -> Option<Use> {
        let Stat { state, ticks, start, resident, .. } = match thread {
            Some(thread) => procfs::stat_of_thread(pid, thread)?,
            None => procfs::stat_of(pid)?,
        };
        let per_second = rustix::param::clock_ticks_per_second() as f64;
        let age = (procfs::uptime() - start as f64 / per_second).max(0.0);
        let (key, now) = ((thread.unwrap_or(-pid), start), Instant::now());
        self.now.insert(key, (ticks, now));
        let (used, period) = match self.before.get(&key) {
            Some((before, then)) => (ticks.saturating_sub(*before), (now - *then).as_secs_f64()),
            None => (ticks, age),
        };
        // What is younger than the clock's tick has no share yet.
        let cpu = if period < 1.0 / per_second { 0.0 } else { 100.0 * used as f64 / per_second / period };
        let rss = thread.is_none().then_some(resident);
        Some(Use { state, age, rss, cpu: (cpu * 10.0).round() / 10.0 })
    }
}

fn view_of(
    head: &Head,
    state: &'static str,
    problem: Option<String>,
    process: Option<Use>,
    doing: Doing,
    statistics: Value,
    workers: Vec<WorkerView>,
) -> HostView {
    let (argv, executable) = (head.argv.clone(), head.executable.clone());
    HostView { pid: head.pid, argv, executable, state, problem, process, doing, statistics, workers }
}

fn is_stopped(host: &Host) -> bool {
    procfs::stat_of(host.record.head.pid).is_some_and(|stat| matches!(stat.state, 'T' | 't'))
}

fn some(value: &Value) -> Option<Value> {
    Some(value).filter(|value| !value.is_null()).cloned()
}
