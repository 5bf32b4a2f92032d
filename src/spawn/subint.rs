//! A worker in a subinterpreter, on a thread that does nothing else: the runner.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::context::{self, ThreadWorker};
use super::parcel::Parcel;
use super::{Reports, held};
use crate::error::{Error, Result};
use crate::events::fault;
use crate::interp::attach::Token;
use crate::interp::call;
use crate::interp::door::Door;
use crate::interp::rungs::{self, PERIOD, evict_others, pardon};
use crate::interp::subinterp::{Gil, SubInterpreter};
use crate::interp::turn::Turn;
use crate::sys::thread;

/// What a runner needs.
pub struct Job {
    /// The worker's number.
    pub id: u64,
    /// The worker's name.
    pub name: String,
    /// The GIL to start with, and the one to fall back on when an extension module refuses it.
    pub gils: (Gil, Option<Gil>),
    /// For `_child`.
    pub spec: serde_json::Value,
    /// The pickled target and arguments.
    pub parcel: Arc<Parcel>,
    /// `sys.path`.
    pub sys_path: Vec<Vec<u8>>,
    /// stdout and stderr; `None` for the process's. Open for as long as the runner: a stream that is
    /// flushed in the last moments of its interpreter still writes where it should.
    pub stdio: Option<[OwnedFd; 2]>,
    /// The way in for the supervisor.
    pub door: Arc<Door>,
    /// Where to send what happens.
    pub reports: Arc<dyn Reports>,
    /// How long threads that the target left get to end before the supervisor hears of them.
    pub drain: Duration,
}

/// Starts the runner. It reports [`Reports::ended`] as its last act, whatever happens.
///
/// # Errors
/// EAGAIN when no thread can be made.
pub fn spawn(job: Job) -> Result<JoinHandle<()>> {
    let name = format!("th:{}", job.name);
    thread::spawn_named(&name, move || run(job)).map_err(|error| Error::os("start a worker's thread", error))
}

fn run(job: Job) {
    let mut interpreters = Vec::new();
    let lives = std::panic::AssertUnwindSafe(|| run_lives(&job, &mut interpreters));
    let error = match std::panic::catch_unwind(lives) {
        Ok(outcome) => outcome.err().map(|error| error.to_string()),
        Err(_) => Some("the runner thread panicked; the message is on stderr".into()),
    };
    job.reports.ended(&interpreters, error);
}

fn run_lives(job: &Job, interpreters: &mut Vec<i64>) -> Result<()> {
    let (first, fall_back) = job.gils;
    let refused = run_in(job, first, fall_back.is_some(), interpreters)?;
    if let (true, Some(gil)) = (refused, fall_back) {
        job.reports.refused_own_gil();
        run_in(job, gil, false, interpreters)?;
    }
    Ok(())
}

/// One life of an interpreter. Whether an extension module refused it, so that it should be tried
/// again with the other GIL.
fn run_in(job: &Job, gil: Gil, may_fall_back: bool, interpreters: &mut Vec<i64>) -> Result<bool> {
    let interpreter = SubInterpreter::create(gil)?;
    let token = interpreter.token();
    let id = token.interpreter_id();
    interpreters.push(id);
    rungs::report_missing(token);
    let worker = ThreadWorker {
        id: job.id,
        spec: job.spec.clone(),
        parcel: Arc::clone(&job.parcel),
        stdio: job.stdio.as_ref().map(|streams| streams.each_ref().map(AsRawFd::as_raw_fd)),
        reports: Arc::clone(&job.reports),
        fall_back: may_fall_back,
    };
    let entered = worker.enter(id);
    job.door.open(token);
    let outcome = entered
        .and_then(|()| call::set_sys_path(token, &job.sys_path))
        .and_then(|()| call::function(token, c"tractor_host._child", c"main"));
    job.door.close(token);
    drain(job, token);
    job.door.seal(token);
    pardon(token);
    if let Err(error) = job.door.end_children(token) {
        fault!("the children of worker {} may have been left: {error}", job.name);
    }
    let refused = context::forget(id);
    job.reports.over();
    let turn = if gil == Gil::Shared { token.detached(Turn::wait) } else { None };
    interpreter.end(&job.door);
    drop(turn);
    // Not before: what its finalisers still use must be what they think it is.
    held::forget(id);
    job.door.runner_leaves();
    outcome.map(|()| refused)
}

/// Sees to it that this thread is the interpreter's last. It does not return before.
fn drain(job: &Job, token: Token<'_>) {
    let (mut period, mut deadline) = (PERIOD, Instant::now() + job.drain);
    loop {
        match evict_others(token, &job.door, period, deadline) {
            Ok(0) => return,
            Ok(left) if period == PERIOD => {
                job.reports.stuck(left);
                period = PATIENT_PERIOD;
            }
            Ok(_) => {}
            Err(error) => {
                // Nobody can be told to end, or counted.
                fault!("the threads of worker {} are not known: {error}", job.name);
                return;
            }
        }
        deadline = Instant::now() + PATIENCE;
    }
}

/// How often threads that have not listened for long are told to end, and for how long at a time.
const PATIENT_PERIOD: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(60);
