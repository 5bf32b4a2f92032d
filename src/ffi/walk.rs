//! From CPython's runtime to its interpreters, their threads and their GILs, in this process or another: no
//! thread state, and nothing is waited for.
//!
//! All memory is read through the kernel, which answers a bad address with an error. The structures change
//! while they are read, so what comes out can be wrong; a second look does not confirm that, then.

use std::collections::HashSet;
use std::ffi::c_int;

use super::offsets::{Layout, Offsets};
use crate::sys::memory::Memory;

/// More interpreters and threads than anybody has.
const MAX_INTERPRETERS: usize = 4096;
const MAX_THREADS: usize = 4096;
/// So much of a thread's state is copied at once at most, in bytes.
const MAX_SPAN: usize = 512;

/// A Python whose structures can be followed.
#[derive(Debug, Clone, Copy)]
pub struct Walk<'a> {
    memory: &'a Memory,
    at: &'a Layout,
}

/// What of a thread's state is needed to get on, as it was at one moment.
struct Thread {
    state: u64,
    next: Option<u64>,
    interpreter: u64,
    /// What the kernel calls it.
    native: Option<i32>,
}

impl Walk<'static> {
    /// This process's. `None` while its layout is not known; may be called by any thread.
    pub fn own() -> Option<Self> {
        static OWN: Memory = Memory::own();
        Some(Self { memory: &OWN, at: &Offsets::if_checked()?.layout })
    }
}

impl<'a> Walk<'a> {
    /// That of whose memory this is, laid out so.
    pub fn new(memory: &'a Memory, at: &'a Layout) -> Self {
        Self { memory, at }
    }

    /// Where the interpreters of a runtime are, the oldest first.
    pub fn interpreters(&self, runtime: u64) -> Vec<u64> {
        let (memory, at) = (self.memory, self.at);
        let main =
            memory.pointer(runtime, at.runtime_main_interpreter).filter(|it| self.id_of(*it) == Some(0));
        let walk = || {
            let head = memory.pointer(runtime, at.runtime_interpreters_head);
            let found = chain(head, MAX_INTERPRETERS, |one| memory.pointer(one, at.interpreter_next));
            // The main one is the last; a walk that came by one that was being ended does not get there.
            let is_whole = main.is_none() || found.last().copied() == main;
            (found, is_whole)
        };
        let mut found = steadily(walk);
        found.extend(main.filter(|main| !found.contains(main)));
        found.reverse();
        found
    }

    /// What an interpreter is called by Python.
    pub fn id_of(&self, interpreter: u64) -> Option<i64> {
        self.memory.word(interpreter, self.at.interpreter_id).map(u64::cast_signed)
    }

    /// The threads of an interpreter: the state of each, and what the kernel calls it.
    pub fn threads(&self, interpreter: u64) -> Vec<(u64, i32)> {
        let (memory, at) = (self.memory, self.at);
        let walk = || {
            let mut found = Vec::new();
            let mut seen = HashSet::new();
            let mut next = memory.pointer(interpreter, at.interpreter_threads_head);
            while let Some(state) = next.filter(|one| found.len() < MAX_THREADS && seen.insert(*one)) {
                let Some(thread) = self.thread(state).filter(|it| it.interpreter == interpreter) else {
                    return (found, false);
                };
                next = thread.next;
                found.push(thread);
            }
            (found, true)
        };
        let mut found = steadily(walk);
        // New ones come first, so this one is the first to be lost.
        if let Some(main) = memory.pointer(interpreter, at.interpreter_threads_main)
            && found.iter().all(|thread| thread.state != main)
        {
            found.extend(self.thread(main).filter(|it| it.interpreter == interpreter));
        }
        found.iter().filter_map(|thread| Some((thread.state, thread.native?))).collect()
    }

    fn thread(&self, state: u64) -> Option<Thread> {
        let at = self.at;
        let last = at.thread_next.max(at.thread_interpreter).max(at.thread_native_id);
        let mut bytes = [0; MAX_SPAN];
        let span = bytes.get_mut(..last + size_of::<u64>())?;
        if !self.memory.read(state, span) {
            return None;
        }
        let word = |offset: usize| bytes.get(offset..)?.first_chunk().copied().map(u64::from_ne_bytes);
        Some(Thread {
            state,
            next: word(at.thread_next).filter(|next| *next != 0),
            interpreter: word(at.thread_interpreter)?,
            native: word(at.thread_native_id).and_then(|id| i32::try_from(id).ok()).filter(|id| *id > 0),
        })
    }

    /// Which GIL an interpreter has.
    pub fn gil_of(&self, interpreter: u64) -> Option<u64> {
        self.memory.pointer(interpreter, self.at.interpreter_gil)
    }

    /// Whether some thread has a GIL.
    pub fn is_taken(&self, gil: u64) -> bool {
        let locked = gil.checked_add(self.at.gil_locked as u64).and_then(|at| self.memory.bytes(at));
        // -1 before it is made.
        locked.map(c_int::from_ne_bytes) == Some(1)
    }

    /// The state of the thread that has a GIL, if one has.
    pub fn holder_of(&self, gil: u64) -> Option<u64> {
        if self.is_taken(gil) { self.memory.pointer(gil, self.at.gil_holder) } else { None }
    }

    /// How often a GIL has gone from one thread to another.
    pub fn switches_of(&self, gil: u64) -> Option<u64> {
        self.memory.word(gil, self.at.gil_switches)
    }

    /// The thread that a state is of, as the kernel calls it, and the interpreter that it is attached to.
    pub fn thread_of(&self, state: u64) -> Option<(i32, u64)> {
        let thread = self.thread(state)?;
        Some((thread.native?, thread.interpreter))
    }
}

/// Walks a list again, if somebody was changing it; the longest that was found, if they all the time are.
fn steadily<T>(walk: impl Fn() -> (Vec<T>, bool)) -> Vec<T> {
    const TIMES: usize = 5;
    let mut longest = Vec::new();
    for _ in 0..TIMES {
        let (found, is_whole) = walk();
        if is_whole {
            return found;
        }
        if found.len() > longest.len() {
            longest = found;
        }
    }
    longest
}

/// A linked list, which somebody may be changing.
pub fn chain(head: Option<u64>, most: usize, next: impl Fn(u64) -> Option<u64>) -> Vec<u64> {
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    let mut at = head;
    while let Some(one) = at.filter(|one| found.len() < most && seen.insert(*one)) {
        found.push(one);
        at = next(one);
    }
    found
}
