//! The tasks of event loops, read from outside: trio's by the variables of its `run`, asyncio's by the
//! list that its C module keeps. Neither loop is asked, so it may be stuck.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::reader::{Frames, Reader};
use super::stacks::Frame;
use crate::ffi::offsets::AsyncioOffsets;
use crate::ffi::walk::chain;

/// More tasks, and longer chains of coroutines, than anybody reads.
const MAX_TASKS: usize = 2000;
const MAX_DEPTH: usize = 32;

/// An event loop that runs in a thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Loop {
    /// `trio` or `asyncio`.
    pub kind: &'static str,
    /// Its tasks: each one behind the one that waits for it.
    pub tasks: Vec<Task>,
}

/// A task of an event loop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Task {
    /// Its place in the list.
    pub id: usize,
    /// The task that waits for it (asyncio), or whose nursery it is in (trio).
    pub parent: Option<usize>,
    /// How many such ones there are up to the loop.
    pub depth: usize,
    /// Its name.
    pub name: String,
    /// Whether it is the one that runs.
    pub running: bool,
    /// What it is at, innermost first.
    pub frames: Vec<Frame>,
}

/// The loops of a thread, by its stack and its thread state.
pub fn of_thread(
    reader: &Reader,
    frames: &Frames,
    state: u64,
    asyncio: Option<&AsyncioOffsets>,
) -> Vec<Loop> {
    let trio = || trio(reader, frames).map(|tasks| Loop { kind: "trio", tasks });
    let asyncio = || asyncio_tasks(reader, state, asyncio?).map(|tasks| Loop { kind: "asyncio", tasks });
    [trio(), asyncio()].into_iter().flatten().filter(|found| !found.tasks.is_empty()).collect()
}

fn trio(reader: &Reader, frames: &Frames) -> Option<Vec<Task>> {
    let runner = frames.shown.iter().chain(&frames.bottom).find_map(|(frame, at)| {
        let is_loop =
            at.file.ends_with("trio/_core/_run.py") && matches!(&*at.function, "run" | "unrolled_run");
        is_loop.then(|| reader.local(*frame, "runner")).flatten()
    })?;
    let tasks = reader.set_items(reader.attribute(runner, "tasks")?)?;
    // A nursery is known to the task that opened it and to those that are in it.
    let mut openers = HashMap::new();
    for &task in &tasks {
        let nurseries = reader.attribute(task, "_child_nurseries").and_then(|list| reader.list_items(list));
        openers.extend(nurseries.unwrap_or_default().into_iter().map(|nursery| (nursery, task)));
    }
    let parent = |task| openers.get(&reader.attribute(task, "_parent_nursery")?).copied();
    Some(in_order(&tasks, parent, |task| {
        let name = reader.attribute(task, "name").and_then(|name| reader.text(name));
        (name, reader.attribute(task, "coro").map(|coroutine| reader.awaiting(coroutine, MAX_DEPTH)))
    }))
}

fn asyncio_tasks(reader: &Reader, state: u64, at: &AsyncioOffsets) -> Option<Vec<Task>> {
    let head = state.checked_add(at.thread_tasks_head as u64)?;
    // The list is a ring, and its head is none of the nodes.
    let next = |node| reader.pointer(node, 0).filter(|next| *next != head);
    let nodes = chain(next(head), MAX_TASKS, next);
    let tasks: Vec<u64> =
        nodes.into_iter().filter_map(|node| node.checked_sub(at.task_node as u64)).collect();
    let parent = |task| {
        let waits = reader.pointer(task, at.task_awaited_by)?;
        match reader.byte(task, at.task_awaited_by_is_set)? {
            0 => Some(waits),
            _ => reader.set_items(waits)?.into_iter().next(),
        }
    };
    Some(in_order(&tasks, parent, |task| {
        let name = reader.pointer(task, at.task_name).and_then(|name| name_of(reader, name));
        let coroutine = reader.pointer(task, at.task_coro);
        (name, coroutine.map(|coroutine| reader.awaiting(coroutine, MAX_DEPTH)))
    }))
}

/// asyncio makes a task's name when it is first asked for: until then there is its number.
fn name_of(reader: &Reader, name: u64) -> Option<String> {
    if reader.type_name(name)? == "int" {
        return reader.small_int(name).map(|number| format!("Task-{number}"));
    }
    reader.text(name)
}

/// What is told of a task: its name, and where its coroutine is.
type Told = (Option<String>, Option<(Vec<Frame>, bool)>);

/// The tasks as a tree, each before those that it waits for.
fn in_order(tasks: &[u64], parent: impl Fn(u64) -> Option<u64>, tell: impl Fn(u64) -> Told) -> Vec<Task> {
    let known: HashSet<u64> = tasks.iter().copied().collect();
    let mut children: HashMap<Option<u64>, Vec<u64>> = HashMap::new();
    for &task in tasks.iter().take(MAX_TASKS) {
        let parent = parent(task).filter(|parent| known.contains(parent) && *parent != task);
        children.entry(parent).or_default().push(task);
    }
    let mut found = Vec::new();
    let mut placed = HashSet::new();
    // Those that wait for each other in a ring are below nobody: they come last.
    let roots = children.remove(&None).unwrap_or_default().into_iter().chain(tasks.iter().copied());
    for root in roots {
        let mut open = vec![(root, None, 0)];
        while let Some((task, parent, depth)) = open.pop() {
            if found.len() >= MAX_TASKS || !placed.insert(task) {
                continue;
            }
            let id = found.len();
            let (name, at) = tell(task);
            let (frames, running) = at.unwrap_or_default();
            found.push(Task { id, parent, depth, name: name.unwrap_or_else(|| "?".into()), running, frames });
            let below = children.remove(&Some(task)).unwrap_or_default();
            open.extend(below.into_iter().rev().map(|child| (child, Some(id), depth + 1)));
        }
    }
    found
}
