//! What the threads of an interpreter are doing, seen from outside: no GIL, no thread state.
//!
//! All memory is read through `/proc/self/mem`, which answers a bad address with an error. The
//! structures change while they are read; so what comes out is a picture that may be blurred, and
//! every walk has a bound.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::Serialize;

use crate::ffi::offsets::{Offsets, StackOffsets};
use crate::interp::attach::Interpreter;
use crate::sys::kick;

/// One thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stack {
    /// The kernel's id of the thread.
    pub thread: i32,
    /// The number of the system call that it is in; `None` when it runs.
    pub syscall: Option<i64>,
    /// Its Python frames, innermost first.
    pub frames: Vec<Frame>,
}

/// One call of a Python function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Frame {
    /// The file that it was compiled from.
    pub file: String,
    /// The line that it is at; `None` where the compiler noted none.
    pub line: Option<i64>,
    /// The function's qualified name.
    pub function: String,
}

/// More threads, and deeper stacks, than anybody reads.
const MAX_THREADS: usize = 4096;
const MAX_FRAMES: usize = 64;
/// Longer than any name or path.
const MAX_TEXT: u64 = 4096;
/// As long as the line table of a very long function.
const MAX_TABLE: u64 = 1 << 20;

/// The threads of an interpreter that are in Python code or have been called from it; the supervisor's
/// own, which come to press it, are not. Empty where this Python's layout is not known.
pub fn of(interpreter: Interpreter) -> Vec<Stack> {
    let (Ok(offsets), Ok(memory)) = (Offsets::get(), File::open("/proc/self/mem")) else { return Vec::new() };
    let reader = Reader { memory, at: offsets.stacks };
    let mut found = Vec::new();
    let mut thread = reader.pointer(interpreter.address(), offsets.stacks.interpreter_threads_head);
    while let Some(state) = thread {
        found.extend(reader.stack(state).filter(|stack| !stack.frames.is_empty()));
        if found.len() >= MAX_THREADS {
            break;
        }
        thread = reader.pointer(state, offsets.stacks.thread_next);
    }
    found
}

struct Reader {
    memory: File,
    at: StackOffsets,
}

impl Reader {
    fn bytes<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.memory.read_exact_at(&mut bytes, address).ok()?;
        Some(bytes)
    }

    fn word(&self, base: u64, offset: usize) -> Option<u64> {
        self.bytes(base.checked_add(offset as u64)?).map(u64::from_ne_bytes)
    }

    fn pointer(&self, base: u64, offset: usize) -> Option<u64> {
        self.word(base, offset).filter(|address| *address != 0)
    }

    fn stack(&self, state: u64) -> Option<Stack> {
        let thread = i32::try_from(self.word(state, self.at.thread_native_id)?).ok()?;
        let mut frames = Vec::new();
        let mut next = self.pointer(state, self.at.thread_current_frame);
        while let Some(frame) = next {
            frames.extend(self.frame(frame));
            if frames.len() >= MAX_FRAMES {
                break;
            }
            next = self.pointer(frame, self.at.frame_previous);
        }
        Some(Stack { thread, syscall: kick::look(thread).map(|blocked| blocked.number), frames })
    }

    fn frame(&self, frame: u64) -> Option<Frame> {
        /// Frames from here on belong to the interpreter's C code and have none of their own.
        const OWNED_BY_INTERPRETER: u8 = 3;
        /// The low bits of a stack reference are tags.
        const TAGS: u64 = 3;
        let [owner] = self.bytes(frame.checked_add(self.at.frame_owner as u64)?)?;
        if owner >= OWNED_BY_INTERPRETER {
            return None;
        }
        let code = self.pointer(frame, self.at.frame_executable)? & !TAGS;
        let start = code.checked_add(self.at.code_adaptive as u64)?;
        let instruction = self.word(frame, self.at.frame_instr_ptr)?.checked_sub(start)? / 2;
        let first = self.bytes(code.checked_add(self.at.code_firstlineno as u64)?).map(i32::from_ne_bytes)?;
        let table = self.pointer(code, self.at.code_linetable).and_then(|table| self.bytes_object(table));
        Some(Frame {
            file: self.text(self.pointer(code, self.at.code_filename)?)?,
            line: table.and_then(|table| line_at(&table, first.into(), instruction)),
            function: self.text(self.pointer(code, self.at.code_qualname)?)?,
        })
    }

    fn bytes_object(&self, object: u64) -> Option<Vec<u8>> {
        let size = self.word(object, self.at.bytes_size).filter(|size| *size <= MAX_TABLE)?;
        self.buffer(object.checked_add(self.at.bytes_value as u64)?, size)
    }

    fn buffer(&self, address: u64, size: u64) -> Option<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(size).ok()?];
        self.memory.read_exact_at(&mut bytes, address).ok()?;
        Some(bytes)
    }

    /// A `str`, in whichever of CPython's forms it is.
    fn text(&self, object: u64) -> Option<String> {
        /// The size of the head of a string that is not ASCII: its UTF-8 form's length and place
        /// follow the ASCII head.
        const COMPACT_EXTRA: u64 = 16;
        let state = self.bytes(object.checked_add(self.at.unicode_state as u64)?).map(u32::from_ne_bytes)?;
        let length = self.word(object, self.at.unicode_length).filter(|length| *length <= MAX_TEXT)?;
        // CPython's bit fields: interned (2), kind (3), compact (1), ascii (1), …
        let (kind, compact, ascii) = (u64::from(state >> 2 & 7), state >> 5 & 1, state >> 6 & 1);
        if compact == 0 || !matches!(kind, 1 | 2 | 4) {
            return None;
        }
        let head = self.at.unicode_ascii_size as u64 + if ascii == 1 { 0 } else { COMPACT_EXTRA };
        let bytes = self.buffer(object.checked_add(head)?, length * kind)?;
        let chars = bytes.chunks_exact(usize::try_from(kind).ok()?).map(|unit| {
            let mut word = [0; 4];
            word[..unit.len()].copy_from_slice(unit);
            char::from_u32(u32::from_ne_bytes(word)).unwrap_or(char::REPLACEMENT_CHARACTER)
        });
        Some(chars.collect())
    }
}

/// The line of an instruction, by CPython's location table: entries that each say how many
/// instructions they are for, and how the line differs from that of the entry before.
fn line_at(table: &[u8], first: i64, instruction: u64) -> Option<i64> {
    let mut bytes = table.iter().copied();
    let mut line = first;
    let mut end = 0;
    while let Some(head) = bytes.next() {
        let code = head >> 3 & 15;
        let mut has_line = true;
        match code {
            0..=9 => drop(bytes.next()),
            10..=12 => {
                line += i64::from(code - 10);
                bytes.next();
                bytes.next();
            }
            13 => line += signed(&mut bytes)?,
            14 => {
                line += signed(&mut bytes)?;
                for _ in 0..3 {
                    unsigned(&mut bytes)?;
                }
            }
            _ => has_line = false,
        }
        end += u64::from(head & 7) + 1;
        if instruction < end {
            return has_line.then_some(line);
        }
    }
    None
}

/// A number in pieces of six bits, lowest first.
fn unsigned(bytes: &mut impl Iterator<Item = u8>) -> Option<u64> {
    let mut value = 0;
    for shift in (0..60).step_by(6) {
        let byte = bytes.next()?;
        value |= u64::from(byte & 63) << shift;
        if byte & 64 == 0 {
            return Some(value);
        }
    }
    None
}

/// The same with a sign in the lowest bit.
fn signed(bytes: &mut impl Iterator<Item = u8>) -> Option<i64> {
    let value = unsigned(bytes)?;
    let size = i64::try_from(value >> 1).ok()?;
    Some(if value & 1 == 1 { -size } else { size })
}
