//! CPython's private layout, read from the table that CPython publishes for debuggers
//! (`_Py_DebugOffsets`, at the head of `_PyRuntime`), for one minor version, checked at start-up.
//!
//! This is the one place that names a position in that table. Everything that relies on it asks
//! [`Offsets::get`] and says clearly what it can't do when the checks fail.

use std::ops::Range;
use std::sync::OnceLock;

use super::{_PyRuntime, py};
use crate::error::{Error, Result};
use crate::sys::memory;

/// Where the few private fields that we need are.
#[derive(Debug, Clone, Copy)]
pub struct Offsets {
    interpreters_head: usize,
    interpreter_next: usize,
    thread_id: usize,
    native_thread_id: usize,
    runtime_size: usize,
    interpreter_size: usize,
    /// What a stack is read with.
    pub stacks: StackOffsets,
}

/// Where what a Python stack is made of is. All of it is read through the kernel, which refuses bad
/// addresses, so a wrong offset gives a wrong or no answer and never a crash.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "each is named after CPython's field")]
pub struct StackOffsets {
    pub interpreter_threads_head: usize,
    pub thread_next: usize,
    pub thread_current_frame: usize,
    pub thread_native_id: usize,
    pub frame_previous: usize,
    pub frame_executable: usize,
    pub frame_instr_ptr: usize,
    pub frame_owner: usize,
    pub code_filename: usize,
    pub code_qualname: usize,
    pub code_linetable: usize,
    pub code_firstlineno: usize,
    pub code_adaptive: usize,
    pub bytes_size: usize,
    pub bytes_value: usize,
    pub unicode_state: usize,
    pub unicode_length: usize,
    pub unicode_ascii_size: usize,
}

/// One thread of an interpreter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadIds {
    /// What `threading.get_ident()` returns there.
    pub ident: u64,
    /// What the kernel calls it.
    pub native: i32,
}

/// Positions in the table, in 64-bit words behind the 8 bytes of its cookie (3.14's
/// `pycore_debug_offsets.h`).
mod word {
    pub(super) const VERSION: usize = 0;
    pub(super) const FREE_THREADED: usize = 1;
    pub(super) const RUNTIME_SIZE: usize = 2;
    pub(super) const INTERPRETERS_HEAD: usize = 4;
    pub(super) const INTERPRETER_SIZE: usize = 5;
    pub(super) const INTERPRETER_ID: usize = 6;
    pub(super) const INTERPRETER_NEXT: usize = 7;
    pub(super) const INTERPRETER_THREADS_HEAD: usize = 8;
    pub(super) const THREAD_NEXT: usize = 23;
    pub(super) const THREAD_CURRENT_FRAME: usize = 25;
    pub(super) const THREAD_ID: usize = 26;
    pub(super) const NATIVE_THREAD_ID: usize = 27;
    pub(super) const FRAME_PREVIOUS: usize = 31;
    pub(super) const FRAME_EXECUTABLE: usize = 32;
    pub(super) const FRAME_INSTR_PTR: usize = 33;
    pub(super) const FRAME_OWNER: usize = 35;
    pub(super) const CODE_FILENAME: usize = 39;
    pub(super) const CODE_QUALNAME: usize = 41;
    pub(super) const CODE_LINETABLE: usize = 42;
    pub(super) const CODE_FIRSTLINENO: usize = 43;
    pub(super) const CODE_ADAPTIVE: usize = 47;
    pub(super) const BYTES_SIZE: usize = 74;
    pub(super) const BYTES_VALUE: usize = 75;
    pub(super) const UNICODE_STATE: usize = 77;
    pub(super) const UNICODE_LENGTH: usize = 78;
    pub(super) const UNICODE_ASCII_SIZE: usize = 79;
}

static CHECKED: OnceLock<std::result::Result<Offsets, String>> = OnceLock::new();

impl Offsets {
    /// The offsets, once checked. The calling thread must be attached the first time.
    ///
    /// # Errors
    /// When this Python's table is not the one of CPython 3.14, or does not agree with what the
    /// public functions say of the calling thread.
    pub fn get() -> Result<&'static Self> {
        // SAFETY: may be called without being attached: it returns null then.
        if CHECKED.get().is_none() && unsafe { py::PyThreadState_GetUnchecked() }.is_null() {
            return Err(Error::state("this Python's private layout has not been checked yet"));
        }
        CHECKED.get_or_init(Self::read_and_check).as_ref().map_err(|reason| {
            Error::unsupported(format!("this Python's private layout is not known: {reason}"))
        })
    }

    /// The offsets, if they have been checked, and found right. May be called by any thread.
    pub fn if_checked() -> Option<&'static Self> {
        CHECKED.get()?.as_ref().ok()
    }

    fn read_and_check() -> std::result::Result<Self, String> {
        let base = &raw const _PyRuntime;
        // SAFETY: `_PyRuntime` is a static of libpython, far larger than the 8 bytes read here.
        let cookie = unsafe { base.cast::<[u8; 8]>().read_unaligned() };
        if &cookie != b"xdebugpy" {
            return Err(format!("no debug offsets at the head of _PyRuntime (found {cookie:?})"));
        }
        // SAFETY: the cookie says that the table is there; every index used is inside 3.14's table,
        // and the version, which is checked before any other word is used, is its first word.
        let at = |index: usize| unsafe { base.add(8 + 8 * index).cast::<u64>().read_unaligned() };
        if at(word::VERSION) >> 16 != 0x030e {
            return Err(format!("debug offsets of version {:#x}, not of 3.14", at(word::VERSION)));
        }
        if at(word::FREE_THREADED) != 0 {
            return Err("a free-threaded build".into());
        }
        let offset = |index: usize| usize::try_from(at(index)).map_err(|error| error.to_string());
        let found = Self {
            interpreters_head: offset(word::INTERPRETERS_HEAD)?,
            interpreter_next: offset(word::INTERPRETER_NEXT)?,
            thread_id: offset(word::THREAD_ID)?,
            native_thread_id: offset(word::NATIVE_THREAD_ID)?,
            runtime_size: offset(word::RUNTIME_SIZE)?,
            interpreter_size: offset(word::INTERPRETER_SIZE)?,
            stacks: StackOffsets {
                interpreter_threads_head: offset(word::INTERPRETER_THREADS_HEAD)?,
                thread_next: offset(word::THREAD_NEXT)?,
                thread_current_frame: offset(word::THREAD_CURRENT_FRAME)?,
                thread_native_id: offset(word::NATIVE_THREAD_ID)?,
                frame_previous: offset(word::FRAME_PREVIOUS)?,
                frame_executable: offset(word::FRAME_EXECUTABLE)?,
                frame_instr_ptr: offset(word::FRAME_INSTR_PTR)?,
                frame_owner: offset(word::FRAME_OWNER)?,
                code_filename: offset(word::CODE_FILENAME)?,
                code_qualname: offset(word::CODE_QUALNAME)?,
                code_linetable: offset(word::CODE_LINETABLE)?,
                code_firstlineno: offset(word::CODE_FIRSTLINENO)?,
                code_adaptive: offset(word::CODE_ADAPTIVE)?,
                bytes_size: offset(word::BYTES_SIZE)?,
                bytes_value: offset(word::BYTES_VALUE)?,
                unicode_state: offset(word::UNICODE_STATE)?,
                unicode_length: offset(word::UNICODE_LENGTH)?,
                unicode_ascii_size: offset(word::UNICODE_ASCII_SIZE)?,
            },
        };
        found.check(offset(word::INTERPRETER_ID)?)?;
        Ok(found)
    }

    /// Holds the offsets against what public functions say.
    fn check(&self, interpreter_id: usize) -> std::result::Result<(), String> {
        // SAFETY: PyThreadState_GetUnchecked may be called without being attached: it returns null.
        let state = unsafe { py::PyThreadState_GetUnchecked() };
        if state.is_null() {
            return Err("checked from a thread that is not attached".into());
        }
        // SAFETY: `state` is the calling thread's own, alive state.
        let ids = unsafe { self.thread_ids(state) };
        // SAFETY: gettid and pthread_self have no preconditions.
        let (native, ident) = unsafe { (libc::gettid(), libc::pthread_self() as u64) };
        if ids != (ThreadIds { ident, native }) {
            return Err(format!("thread ids read as {ids:?}, are {ident} and {native}"));
        }
        // SAFETY: this thread is attached, so the runtime and its interpreters are alive.
        let (id, expected) = unsafe {
            let interpreter = py::PyThreadState_GetInterpreter(state);
            let id = interpreter.cast::<u8>().add(interpreter_id).cast::<i64>().read_unaligned();
            (id, py::PyInterpreterState_GetID(interpreter))
        };
        if id != expected {
            return Err(format!("interpreter id reads as {id}, is {expected}"));
        }
        if !(interpreter_id..1 << 24).contains(&self.interpreter_size) {
            return Err(format!("an interpreter's state of {} bytes", self.interpreter_size));
        }
        // SAFETY: as above; both sides are read while interpreters can't vanish under this GIL's main.
        let (head, expected) = unsafe {
            let slot = (&raw const _PyRuntime).add(self.interpreters_head);
            (slot.cast::<*mut py::PyInterpreterState>().read_unaligned(), py::PyInterpreterState_Head())
        };
        if head != expected {
            return Err("the list of interpreters is elsewhere".into());
        }
        Ok(())
    }

    /// The ids of the thread that `state` belongs to.
    ///
    /// # Safety
    /// `state` is a live thread state: the caller is attached to its interpreter.
    pub unsafe fn thread_ids(&self, state: *mut py::PyThreadState) -> ThreadIds {
        let base = state.cast::<u8>();
        // SAFETY: both offsets lie inside the thread state, which the caller keeps alive.
        unsafe {
            let native = base.add(self.native_thread_id).cast::<u64>().read_unaligned();
            ThreadIds {
                ident: base.add(self.thread_id).cast::<u64>().read_unaligned(),
                native: i32::try_from(native).unwrap_or(0),
            }
        }
    }

    /// Drops every interpreter but the main one from the runtime's list (they leak). The cure for
    /// the crash of `PyOS_AfterFork_Child` while subinterpreters live (cpython#139759).
    ///
    /// # Safety
    /// Only in a freshly forked child, by its only thread, before `PyOS_AfterFork_Child`.
    pub unsafe fn forget_other_interpreters(&self) {
        // SAFETY: the one thread of the process owns the whole runtime; both fields are pointers to
        // interpreters, and the offsets have been checked against this very runtime.
        unsafe {
            let main = py::PyInterpreterState_Main();
            let head = (&raw const _PyRuntime).cast_mut().add(self.interpreters_head);
            head.cast::<*mut py::PyInterpreterState>().write_unaligned(main);
            let next = main.cast::<u8>().add(self.interpreter_next);
            next.cast::<*mut py::PyInterpreterState>().write_unaligned(std::ptr::null_mut());
        }
    }

    /// Where the runtime keeps the thread state that it tells about signals (`main_tstate`).
    ///
    /// CPython 3.13 and 3.14 leave it dangling in a child that was forked by another thread than the
    /// main one: signals are then noted in freed memory, and a loop never sees its Ctrl-C. The field
    /// is in no table, so it is searched for: behind the main thread's ident there is a pointer to
    /// that very thread's state. `None` when there is not exactly one such place.
    ///
    /// # Safety
    /// The thread is attached to the main interpreter.
    pub unsafe fn main_state_slot(&self) -> Option<usize> {
        static FOUND: OnceLock<Option<usize>> = OnceLock::new();
        *FOUND.get_or_init(|| {
            let mut states = Vec::new();
            // SAFETY: forwarded to the caller: the states of the main interpreter stay alive while
            // this thread holds its GIL.
            unsafe {
                let mut state = py::PyInterpreterState_ThreadHead(py::PyInterpreterState_Main());
                while !state.is_null() {
                    states.push((self.thread_ids(state).ident, state as u64));
                    state = py::PyThreadState_Next(state);
                }
            }
            let word_at = |offset: usize| {
                // SAFETY: `offset + 8` is at most the size that the runtime says it has.
                unsafe { (&raw const _PyRuntime).add(offset).cast::<u64>().read_unaligned() }
            };
            let last = self.runtime_size.checked_sub(16)?;
            let mut found = (0..=last).step_by(8).filter(|&offset| {
                let ident = word_at(offset);
                ident != 0 && states.contains(&(ident, word_at(offset + 8)))
            });
            match (found.next(), found.next()) {
                (Some(offset), None) => Some(offset + 8),
                _ => None,
            }
        })
    }

    /// Makes the calling thread's state the one that is told about signals.
    ///
    /// # Safety
    /// Only in a freshly forked child, attached, with `slot` from [`Offsets::main_state_slot`].
    pub unsafe fn receive_signals(&self, slot: usize) {
        // SAFETY: the slot was found to hold such a pointer, and nobody else runs in this process.
        unsafe {
            let place = (&raw const _PyRuntime).cast_mut().add(slot);
            place.cast::<*mut py::PyThreadState>().write_unaligned(py::PyThreadState_Get());
        }
    }

    /// Makes an interpreter that [`Offsets::forget_other_interpreters`] has dropped the runtime's second, and
    /// last, again.
    ///
    /// # Safety
    /// In the only thread of a forked child, attached to the main interpreter, which is the runtime's only
    /// one; the memory behind `found` is that of an idle interpreter.
    pub unsafe fn link(&self, found: *mut py::PyInterpreterState) {
        // SAFETY: forwarded to the caller; the offsets have been checked against this very runtime. New
        // interpreters go to the head of the list, so the main one is its last.
        unsafe {
            let head = (&raw const _PyRuntime).cast_mut().add(self.interpreters_head);
            let next = found.cast::<u8>().add(self.interpreter_next);
            next.cast::<*mut py::PyInterpreterState>().write_unaligned(py::PyInterpreterState_Main());
            head.cast::<*mut py::PyInterpreterState>().write_unaligned(found);
        }
    }

    /// Where CPython keeps what is its own and no object: its static memory, and an interpreter's state.
    pub fn internals(&self, interpreter: *const py::PyInterpreterState) -> [Range<u64>; 2] {
        static IMAGE: OnceLock<Range<u64>> = OnceLock::new();
        let runtime = (&raw const _PyRuntime) as u64;
        let image = IMAGE
            .get_or_init(|| memory::image_of(runtime).unwrap_or(runtime..runtime + self.runtime_size as u64));
        let state = interpreter as u64;
        [image.clone(), state..state + self.interpreter_size as u64]
    }

    /// Takes one interpreter out of the runtime's list, so that the runtime's end passes it by.
    ///
    /// # Safety
    /// Attached to the main interpreter, which is about to end; nobody makes or ends interpreters any
    /// more. What is behind `lost` is not looked at.
    pub unsafe fn unlink(&self, lost: *mut py::PyInterpreterState) {
        // SAFETY: forwarded to the caller; the offsets have been checked against this runtime.
        unsafe {
            let mut place = (&raw const _PyRuntime).cast_mut().add(self.interpreters_head);
            loop {
                let slot = place.cast::<*mut py::PyInterpreterState>();
                let interpreter = slot.read_unaligned();
                if interpreter.is_null() {
                    return;
                }
                let next = interpreter.cast::<u8>().add(self.interpreter_next);
                if interpreter == lost {
                    slot.write_unaligned(next.cast::<*mut py::PyInterpreterState>().read_unaligned());
                    return;
                }
                place = next;
            }
        }
    }
}
