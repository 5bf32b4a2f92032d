//! The registry's part of a dump: the workers, as far as can be seen without waiting for a thread that may be
//! stuck with a lock.

use std::time::{Duration, Instant};

use super::supervisor::Supervisor;
use super::worker::State;
use crate::diag::dump::{Dump, WorkerLine};

/// For all of it.
const BOUND: Duration = Duration::from_millis(200);
/// For what a lock guards that is held for moments only.
const PATIENCE: Duration = Duration::from_millis(20);

/// Adds the workers of this process to a dump of it.
pub(super) fn tell(dump: &mut Dump) {
    let deadline = Instant::now() + BOUND;
    let supervisor = match Supervisor::existing() {
        Ok(Some(supervisor)) => supervisor,
        Ok(None) => return,
        Err(error) => {
            dump.unread.push(format!("the workers: {error}"));
            return;
        }
    };
    let Some(mut workers) = supervisor.workers_within(PATIENCE) else {
        dump.unread.push("the workers: their registry is locked".into());
        return;
    };
    workers.sort_by_key(|worker| worker.id);
    let quarantined = supervisor.quarantined_within(PATIENCE);
    if quarantined.is_none() {
        dump.unread.push("which workers could not be ended: that list is locked".into());
    }
    let quarantined = quarantined.unwrap_or_default();
    let mut lines = Vec::new();
    for worker in workers {
        let left = deadline.saturating_duration_since(Instant::now()).min(PATIENCE);
        let seen = worker.seen_within(left);
        let given_up = quarantined.contains(&worker.id);
        if !given_up && matches!(seen, Some((State::Ended, _))) {
            continue;
        }
        lines.push(WorkerLine {
            id: worker.id,
            parent: worker.parent,
            name: worker.name.clone(),
            target: worker.target.clone(),
            backend: worker.backend.name().to_owned(),
            state: seen.map(|(state, _)| state.name().to_owned()),
            pid: seen.and_then(|(_, pid)| pid),
            age: worker.created.elapsed().as_secs_f64(),
            quarantined: given_up,
        });
    }
    dump.workers = Some(lines);
}
