//! What the threads of an interpreter are doing, seen from outside: no GIL, no thread state.

use serde::{Deserialize, Serialize};

use super::python::Runtime;
use super::reader::Reader;
use crate::ffi::offsets::Offsets;
use crate::interp::attach::Interpreter;
use crate::sys::look;
use crate::sys::memory::Memory;

/// One thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stack {
    /// The kernel's id of the thread.
    pub thread: i32,
    /// The number of the system call that it is in; `None` when it runs.
    pub syscall: Option<i64>,
    /// Its Python frames, innermost first.
    pub frames: Vec<Frame>,
}

/// One call of a Python function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// The file that it was compiled from.
    pub file: String,
    /// The line that it is at; `None` where the compiler noted none.
    pub line: Option<i64>,
    /// The function's qualified name.
    pub function: String,
}

/// Deeper stacks than anybody reads.
pub const MAX_FRAMES: usize = 64;

/// The threads of an interpreter of this process that are in Python code or have been called from it; the
/// supervisor's own, which come to press it, are not. Empty where this Python's layout is not known.
pub fn of(interpreter: Interpreter) -> Vec<Stack> {
    let Ok(offsets) = Offsets::get() else { return Vec::new() };
    let reader = Reader::new(Memory::own(), offsets.layout);
    stacks(&reader, crate::sys::process::id(), interpreter.address())
}

/// The same of all interpreters of a process. Empty where that is no Python that can be read.
pub fn of_process(pid: i32) -> Vec<Stack> {
    let Ok(runtime) = Runtime::find(pid) else { return Vec::new() };
    runtime.interpreters().iter().flat_map(|&found| stacks(&runtime.reader, pid, found)).collect()
}

fn stacks(reader: &Reader, pid: i32, interpreter: u64) -> Vec<Stack> {
    let stack = |(state, thread)| {
        let frames = reader.frames(reader.pointer(state, reader.at.thread_current_frame), MAX_FRAMES);
        let syscall = look::at(pid, thread).and_then(|found| found.call).map(|call| call.number);
        let frames: Vec<_> = frames.shown.into_iter().map(|(_, frame)| frame).collect();
        Stack { thread, syscall, frames }
    };
    reader
        .walk()
        .threads(interpreter)
        .into_iter()
        .map(stack)
        .filter(|found| !found.frames.is_empty())
        .collect()
}
