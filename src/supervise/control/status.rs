//! What `tractor-host ps` is told of a host and its workers. It waits for nobody.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::supervisor::Supervisor;
use super::super::worker::Worker;
use crate::diag::stacks::{self, Stack};
use crate::interp::attach::Interpreter;
use crate::sys::process;

/// The document's layout.
const VERSION: u32 = 1;
/// How long is spent on looking at stacks. What comes after that is told without.
const LOOKING: Duration = Duration::from_millis(250);

/// The document.
pub(super) fn of(supervisor: &Supervisor) -> Value {
    let deadline = Instant::now() + LOOKING;
    let pid = process::id();
    let workers: Vec<Value> =
        supervisor.live().iter().map(|worker| told(worker, Instant::now() < deadline)).collect();
    json!({
        "version": VERSION,
        "tractor_host": env!("CARGO_PKG_VERSION"),
        "pid": pid,
        "call": call(&stacks::of(Interpreter::main()), pid),
        "statistics": supervisor.statistics(),
        "workers": workers,
    })
}

fn told(worker: &Worker, look: bool) -> Value {
    let mut info = worker.info();
    let door = worker.door.get();
    let thread = door.as_ref().and_then(|door| door.runner());
    let found = match (door, thread) {
        (Some(door), Some(thread)) if look => {
            door.behind().and_then(|interpreter| call(&stacks::of(interpreter), thread))
        }
        _ => None,
    };
    if let Some(info) = info.as_object_mut() {
        info.remove("ladder");
        info.insert("thread".into(), json!(thread));
        info.insert("call".into(), json!(found));
    }
    info
}

/// The innermost call of a thread.
fn call(stacks: &[Stack], thread: i32) -> Option<Value> {
    let frame = stacks.iter().find(|stack| stack.thread == thread)?.frames.first()?;
    Some(json!(frame))
}
