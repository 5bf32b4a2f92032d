//! CPython's private layout, read from the table that CPython publishes for debuggers
//! (`_Py_DebugOffsets`, at the head of `_PyRuntime`), for one minor version, checked at start-up.
//!
//! This is the one place that names a position in that table. Everything that relies on it asks
//! [`Offsets::get`] and says clearly what it can't do when the checks fail.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::walk::Walk;
use super::{_PyRuntime, py};
use crate::error::{Error, Result};
use crate::sys::memory::{self, Memory};

/// The layout of this process's Python, checked, and what changes it.
#[derive(Debug, Clone, Copy)]
pub struct Offsets {
    /// Where things are.
    pub layout: Layout,
    runtime_size: usize,
    interpreter_size: usize,
}

/// Where things are in CPython's structures. All of it is read through the kernel, which refuses bad
/// addresses, so a wrong offset gives a wrong or no answer and never a crash.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "each is named after CPython's field")]
pub struct Layout {
    pub runtime_interpreters_head: usize,
    pub runtime_main_interpreter: usize,
    pub interpreter_id: usize,
    pub interpreter_next: usize,
    pub interpreter_threads_head: usize,
    pub interpreter_threads_main: usize,
    /// A pointer to the GIL: the main interpreter's, or the one that lies in this interpreter's state.
    pub interpreter_gil: usize,
    /// Counted from where the GIL begins, as the next two.
    pub gil_locked: usize,
    pub gil_holder: usize,
    /// How often it has gone from one thread to another.
    pub gil_switches: usize,
    pub thread_next: usize,
    pub thread_interpreter: usize,
    pub thread_id: usize,
    pub thread_current_frame: usize,
    pub thread_native_id: usize,
    pub frame_previous: usize,
    pub frame_executable: usize,
    pub frame_instr_ptr: usize,
    pub frame_localsplus: usize,
    pub frame_owner: usize,
    pub frame_stackpointer: usize,
    pub code_filename: usize,
    pub code_qualname: usize,
    pub code_linetable: usize,
    pub code_firstlineno: usize,
    pub code_localsplusnames: usize,
    pub code_adaptive: usize,
    pub object_type: usize,
    pub type_name: usize,
    pub type_flags: usize,
    pub tuple_items: usize,
    pub tuple_size: usize,
    pub list_items: usize,
    pub list_size: usize,
    pub set_table: usize,
    pub set_mask: usize,
    pub dict_keys: usize,
    pub dict_values: usize,
    pub int_digits: usize,
    pub generator_frame: usize,
    pub generator_state: usize,
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
    pub(super) const INTERPRETER_THREADS_MAIN: usize = 9;
    pub(super) const INTERPRETER_CEVAL_GIL: usize = 14;
    pub(super) const INTERPRETER_OWN_GIL: usize = 15;
    pub(super) const OWN_GIL_LOCKED: usize = 17;
    pub(super) const OWN_GIL_HOLDER: usize = 18;
    pub(super) const THREAD_NEXT: usize = 23;
    pub(super) const THREAD_INTERPRETER: usize = 24;
    pub(super) const THREAD_CURRENT_FRAME: usize = 25;
    pub(super) const THREAD_ID: usize = 26;
    pub(super) const NATIVE_THREAD_ID: usize = 27;
    pub(super) const FRAME_PREVIOUS: usize = 31;
    pub(super) const FRAME_EXECUTABLE: usize = 32;
    pub(super) const FRAME_INSTR_PTR: usize = 33;
    pub(super) const FRAME_LOCALSPLUS: usize = 34;
    pub(super) const FRAME_OWNER: usize = 35;
    pub(super) const FRAME_STACKPOINTER: usize = 36;
    pub(super) const CODE_FILENAME: usize = 39;
    pub(super) const CODE_QUALNAME: usize = 41;
    pub(super) const CODE_LINETABLE: usize = 42;
    pub(super) const CODE_FIRSTLINENO: usize = 43;
    pub(super) const CODE_LOCALSPLUSNAMES: usize = 45;
    pub(super) const CODE_ADAPTIVE: usize = 47;
    pub(super) const OBJECT_TYPE: usize = 50;
    pub(super) const TYPE_NAME: usize = 52;
    pub(super) const TYPE_FLAGS: usize = 54;
    pub(super) const TUPLE_ITEMS: usize = 56;
    pub(super) const TUPLE_SIZE: usize = 57;
    pub(super) const LIST_ITEMS: usize = 59;
    pub(super) const LIST_SIZE: usize = 60;
    pub(super) const SET_TABLE: usize = 63;
    pub(super) const SET_MASK: usize = 64;
    pub(super) const DICT_KEYS: usize = 66;
    pub(super) const DICT_VALUES: usize = 67;
    pub(super) const INT_DIGITS: usize = 72;
    pub(super) const BYTES_SIZE: usize = 74;
    pub(super) const BYTES_VALUE: usize = 75;
    pub(super) const UNICODE_STATE: usize = 77;
    pub(super) const UNICODE_LENGTH: usize = 78;
    pub(super) const UNICODE_ASCII_SIZE: usize = 79;
    pub(super) const GENERATOR_FRAME: usize = 84;
    pub(super) const GENERATOR_STATE: usize = 85;
    pub(super) const COUNT: usize = 94;
}

/// How much of `_PyRuntime` is the table, in bytes.
pub const TABLE_SIZE: usize = 8 + 8 * word::COUNT;

/// Why a table is not the one that this file is written for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mismatch {
    /// It is none: what is there instead.
    NoTable([u8; 8]),
    /// It is another version's: major and minor.
    Version(u64, u64),
    /// It is that of a build without a GIL.
    FreeThreaded,
    /// It says what cannot be.
    Nonsense(String),
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTable(found) => write!(f, "no debug offsets at the head of _PyRuntime (found {found:?})"),
            Self::Version(major, minor) => write!(f, "debug offsets of version {major}.{minor}, not of 3.14"),
            Self::FreeThreaded => f.write_str("a free-threaded build"),
            Self::Nonsense(what) => f.write_str(what),
        }
    }
}

/// The table, as it was copied from some process.
struct Table<'a>(&'a [u8; TABLE_SIZE]);

impl<'a> Table<'a> {
    fn parse(bytes: &'a [u8; TABLE_SIZE]) -> std::result::Result<Self, Mismatch> {
        if !bytes.starts_with(b"xdebugpy") {
            let mut found = [0; 8];
            found.copy_from_slice(&bytes[..8]);
            return Err(Mismatch::NoTable(found));
        }
        let table = Self(bytes);
        let version = table.word(word::VERSION);
        if version >> 16 != 0x030e {
            return Err(Mismatch::Version(version >> 24, version >> 16 & 0xff));
        }
        if table.word(word::FREE_THREADED) != 0 {
            return Err(Mismatch::FreeThreaded);
        }
        Ok(table)
    }

    fn word(&self, index: usize) -> u64 {
        let at = 8 + 8 * index;
        let mut word = [0; 8];
        word.copy_from_slice(&self.0[at..at + 8]);
        u64::from_ne_bytes(word)
    }

    fn offset(&self, index: usize) -> std::result::Result<usize, String> {
        // No structure of CPython's is larger than this.
        let found = usize::try_from(self.word(index)).ok().filter(|offset| *offset < 1 << 24);
        found.ok_or_else(|| format!("word {index} of the debug offsets is {:#x}", self.word(index)))
    }
}

impl Layout {
    /// Those of the Python whose table this is, and its version (`3.14.8`): of any process.
    ///
    /// # Errors
    /// When it is no table of CPython 3.14 with a GIL.
    pub fn parse(bytes: &[u8; TABLE_SIZE]) -> std::result::Result<(Self, String), Mismatch> {
        let table = Table::parse(bytes)?;
        let version = table.word(word::VERSION);
        let named = format!("{}.{}.{}", version >> 24, version >> 16 & 0xff, version >> 8 & 0xff);
        Ok((Self::of(&table).map_err(Mismatch::Nonsense)?, named))
    }

    fn of(table: &Table<'_>) -> std::result::Result<Self, String> {
        let offset = |index: usize| table.offset(index);
        let gil = |index: usize| {
            let own = offset(word::INTERPRETER_OWN_GIL)?;
            let inside = offset(index)?.checked_sub(own).filter(|inside| *inside < 256);
            inside.ok_or_else(|| "a field of the GIL that lies outside".to_owned())
        };
        let gil_locked = gil(word::OWN_GIL_LOCKED)?;
        Ok(Self {
            runtime_interpreters_head: offset(word::INTERPRETERS_HEAD)?,
            // It is in no table, and stands behind the head of the list.
            runtime_main_interpreter: offset(word::INTERPRETERS_HEAD)? + size_of::<usize>(),
            interpreter_id: offset(word::INTERPRETER_ID)?,
            interpreter_next: offset(word::INTERPRETER_NEXT)?,
            interpreter_threads_head: offset(word::INTERPRETER_THREADS_HEAD)?,
            interpreter_threads_main: offset(word::INTERPRETER_THREADS_MAIN)?,
            interpreter_gil: offset(word::INTERPRETER_CEVAL_GIL)?,
            gil_locked,
            gil_holder: gil(word::OWN_GIL_HOLDER)?,
            // In no table: the next field behind an `int`.
            gil_switches: (gil_locked + 4).next_multiple_of(8),
            thread_next: offset(word::THREAD_NEXT)?,
            thread_interpreter: offset(word::THREAD_INTERPRETER)?,
            thread_id: offset(word::THREAD_ID)?,
            thread_current_frame: offset(word::THREAD_CURRENT_FRAME)?,
            thread_native_id: offset(word::NATIVE_THREAD_ID)?,
            frame_previous: offset(word::FRAME_PREVIOUS)?,
            frame_executable: offset(word::FRAME_EXECUTABLE)?,
            frame_instr_ptr: offset(word::FRAME_INSTR_PTR)?,
            frame_localsplus: offset(word::FRAME_LOCALSPLUS)?,
            frame_owner: offset(word::FRAME_OWNER)?,
            frame_stackpointer: offset(word::FRAME_STACKPOINTER)?,
            code_filename: offset(word::CODE_FILENAME)?,
            code_qualname: offset(word::CODE_QUALNAME)?,
            code_linetable: offset(word::CODE_LINETABLE)?,
            code_firstlineno: offset(word::CODE_FIRSTLINENO)?,
            code_localsplusnames: offset(word::CODE_LOCALSPLUSNAMES)?,
            code_adaptive: offset(word::CODE_ADAPTIVE)?,
            object_type: offset(word::OBJECT_TYPE)?,
            type_name: offset(word::TYPE_NAME)?,
            type_flags: offset(word::TYPE_FLAGS)?,
            tuple_items: offset(word::TUPLE_ITEMS)?,
            tuple_size: offset(word::TUPLE_SIZE)?,
            list_items: offset(word::LIST_ITEMS)?,
            list_size: offset(word::LIST_SIZE)?,
            set_table: offset(word::SET_TABLE)?,
            set_mask: offset(word::SET_MASK)?,
            dict_keys: offset(word::DICT_KEYS)?,
            dict_values: offset(word::DICT_VALUES)?,
            int_digits: offset(word::INT_DIGITS)?,
            generator_frame: offset(word::GENERATOR_FRAME)?,
            generator_state: offset(word::GENERATOR_STATE)?,
            bytes_size: offset(word::BYTES_SIZE)?,
            bytes_value: offset(word::BYTES_VALUE)?,
            unicode_state: offset(word::UNICODE_STATE)?,
            unicode_length: offset(word::UNICODE_LENGTH)?,
            unicode_ascii_size: offset(word::UNICODE_ASCII_SIZE)?,
        })
    }
}

/// Where what asyncio's tasks are made of is: the table that its C module publishes in its section
/// `.AsyncioDebug`.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "each is named after CPython's field")]
pub struct AsyncioOffsets {
    pub task_name: usize,
    pub task_awaited_by: usize,
    pub task_awaited_by_is_set: usize,
    pub task_coro: usize,
    pub task_node: usize,
    pub thread_tasks_head: usize,
}

impl AsyncioOffsets {
    /// The bytes of the section, 13 words; `None` where that is not 3.14's.
    pub fn parse(section: &[u8]) -> Option<Self> {
        let words: Vec<u64> =
            section.chunks_exact(8).filter_map(|word| word.try_into().ok().map(u64::from_ne_bytes)).collect();
        let &[_, name, awaited_by, _, is_set, coro, node, _, _, _, _, _, tasks] = words.get(..13)? else {
            return None;
        };
        let offset = |word: u64| usize::try_from(word).ok().filter(|offset| *offset < 1 << 24);
        Some(Self {
            task_name: offset(name)?,
            task_awaited_by: offset(awaited_by)?,
            task_awaited_by_is_set: offset(is_set)?,
            task_coro: offset(coro)?,
            task_node: offset(node)?,
            thread_tasks_head: offset(tasks)?,
        })
    }
}

/// Where things are in objects whose structures are in CPython's public headers, or have not changed for long.
pub mod object {
    use std::mem::offset_of;

    use super::py;

    /// In a type: its size, its slots (`PyMemberDef`s, up to one without a name), its first base.
    pub const TYPE_BASICSIZE: usize = offset_of!(py::PyTypeObject, tp_basicsize);
    /// See there.
    pub const TYPE_MEMBERS: usize = offset_of!(py::PyTypeObject, tp_members);
    /// See there.
    pub const TYPE_BASE: usize = offset_of!(py::PyTypeObject, tp_base);
    /// In a type: the names of its instances' attributes (`PyDictKeysObject`).
    pub const TYPE_CACHED_KEYS: usize = 880;
    /// In a slot's description: its name (a C string), its offset. And its size.
    pub const MEMBER_NAME: usize = offset_of!(py::PyMemberDef, name);
    /// See there.
    pub const MEMBER_OFFSET: usize = offset_of!(py::PyMemberDef, offset);
    /// See there.
    pub const MEMBER_SIZE: usize = size_of::<py::PyMemberDef>();
    /// A flag of a type whose instances have their attributes' values behind them.
    pub const INLINE_VALUES: u64 = 1 << 2;
    /// A flag of a type whose instances have a dict before them.
    pub const MANAGED_DICT: u64 = 1 << 4;
    /// How far before them it is.
    pub const MANAGED_DICT_BEFORE: u64 = 24;
    /// In values: whether they are the ones that count, and the first.
    pub const VALUES_VALID: usize = 3;
    /// See there.
    pub const VALUES_FIRST: usize = 8;
    /// In a dict's keys: the size of their index (its logarithm), their kind, their number, that index.
    pub const KEYS_INDEX_SIZE: usize = 9;
    /// See there.
    pub const KEYS_KIND: usize = 10;
    /// See there.
    pub const KEYS_COUNT: usize = 24;
    /// See there.
    pub const KEYS_INDEX: usize = 32;
    /// The size of an entry of a set: the object and its hash.
    pub const SET_ENTRY: usize = 16;
    /// Where a lock that Python code has made keeps its state, and the ident of an `RLock`'s owner.
    pub const LOCK_STATE: usize = 16;
    /// See there.
    pub const RLOCK_OWNER: usize = 24;
    /// The size of a GIL: what lies in it is waited for by who waits for it.
    pub const GIL_SIZE: u64 = 208;
}

/// A GIL that is there for as long as the runtime is, seen from outside.
#[derive(Debug, Clone, Copy)]
pub struct GilView(u64);

impl GilView {
    /// Whether some thread has it just now.
    pub fn is_taken(self) -> bool {
        Walk::own().is_some_and(|walk| walk.is_taken(self.0))
    }

    /// Whether a thread that waits on the futex at this address waits for the GIL, or for whoever takes it next.
    pub fn is_waited_for_at(self, address: u64) -> bool {
        (self.0..self.0 + object::GIL_SIZE).contains(&address)
    }

    /// Replaces the switch interval, in microseconds, if it is `from`.
    pub fn replace_interval(self, from: u64, to: u64) -> bool {
        // SAFETY: an aligned word at the head of the GIL, whose form was checked against CPython's table, and which
        // lives as long as the runtime. CPython reads it with one load, whether it has the GIL or not.
        let interval = unsafe { AtomicU64::from_ptr(self.0 as *mut u64) };
        interval.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

static CHECKED: OnceLock<std::result::Result<Offsets, String>> = OnceLock::new();

/// Where this process's runtime is, which begins with the table.
pub fn own_runtime() -> u64 {
    (&raw const _PyRuntime) as u64
}

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
        let mut bytes = [0; TABLE_SIZE];
        // SAFETY: `_PyRuntime` is a static of libpython, far larger than the table, whatever is in it.
        unsafe { (&raw const _PyRuntime).copy_to_nonoverlapping(bytes.as_mut_ptr(), TABLE_SIZE) };
        let table = Table::parse(&bytes).map_err(|mismatch| mismatch.to_string())?;
        let found = Self {
            layout: Layout::of(&table)?,
            runtime_size: table.offset(word::RUNTIME_SIZE)?,
            interpreter_size: table.offset(word::INTERPRETER_SIZE)?,
        };
        if (found.layout.gil_holder, found.layout.gil_locked) != (8, 16) {
            return Err("a GIL of another form".into());
        }
        found.check()?;
        Ok(found)
    }

    /// Holds the offsets against what public functions say.
    fn check(&self) -> std::result::Result<(), String> {
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
            let id = interpreter.cast::<u8>().add(self.layout.interpreter_id).cast::<i64>().read_unaligned();
            (id, py::PyInterpreterState_GetID(interpreter))
        };
        if id != expected {
            return Err(format!("interpreter id reads as {id}, is {expected}"));
        }
        if !(self.layout.interpreter_id..1 << 24).contains(&self.interpreter_size) {
            return Err(format!("an interpreter's state of {} bytes", self.interpreter_size));
        }
        // SAFETY: as above; both sides are read while interpreters can't vanish under this GIL's main.
        let (head, expected) = unsafe {
            let slot = (&raw const _PyRuntime).add(self.layout.runtime_interpreters_head);
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
            let native = base.add(self.layout.thread_native_id).cast::<u64>().read_unaligned();
            ThreadIds {
                ident: base.add(self.layout.thread_id).cast::<u64>().read_unaligned(),
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
            let head = (&raw const _PyRuntime).cast_mut().add(self.layout.runtime_interpreters_head);
            head.cast::<*mut py::PyInterpreterState>().write_unaligned(main);
            let next = main.cast::<u8>().add(self.layout.interpreter_next);
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

    /// The GIL of the main interpreter, which is there for as long as the runtime is.
    pub fn main_gil(&self) -> Option<GilView> {
        // SAFETY: a field of the runtime that is set at start-up and never changes.
        let main = unsafe { py::PyInterpreterState_Main() };
        Walk::new(&Memory::own(), &self.layout).gil_of(main as u64).map(GilView)
    }

    /// Lets other threads of an interpreter handle its pending calls while the calling one is still busy with
    /// one of them: CPython lets in one at a time. Where the place for that is not found nothing is done.
    ///
    /// The field (`handling_thread`) is in no table, so it is searched for: it points to the state of the thread
    /// that handles the calls, and the two limits of the queue follow behind its lock and its length.
    ///
    /// # Safety
    /// In a pending call of `interpreter`, attached to it.
    pub unsafe fn share_pending_calls(&self, interpreter: *mut py::PyInterpreterState) {
        /// `PENDINGCALLSARRAYSIZE` and `MAXPENDINGCALLSLOOP`.
        const LIMITS: [i32; 2] = [300, 100];
        static FOUND: OnceLock<Option<usize>> = OnceLock::new();
        // SAFETY: the caller is attached.
        let own = unsafe { py::PyThreadState_Get() } as u64;
        let base = interpreter.cast::<u8>();
        let holds = |offset: usize| {
            // SAFETY: `offset + 24` is at most the size that an interpreter's state says it has.
            unsafe {
                base.add(offset).cast::<u64>().read_unaligned() == own
                    && base.add(offset + 16).cast::<[i32; 2]>().read_unaligned() == LIMITS
            }
        };
        let search = || {
            let mut found = (0..=self.interpreter_size.saturating_sub(24)).step_by(8).filter(|&at| holds(at));
            found.next().filter(|_| found.next().is_none())
        };
        if let Some(offset) = *FOUND.get_or_init(search)
            && holds(offset)
        {
            // SAFETY: the place was found to hold this pointer, just now too. Whoever reads or writes it is
            // attached to this interpreter, whose GIL this thread has.
            unsafe { base.add(offset).cast::<u64>().write_unaligned(0) };
        }
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
            let head = (&raw const _PyRuntime).cast_mut().add(self.layout.runtime_interpreters_head);
            let next = found.cast::<u8>().add(self.layout.interpreter_next);
            next.cast::<*mut py::PyInterpreterState>().write_unaligned(py::PyInterpreterState_Main());
            head.cast::<*mut py::PyInterpreterState>().write_unaligned(found);
        }
    }

    /// How large the runtime's static state is.
    pub fn runtime_size(&self) -> usize {
        self.runtime_size
    }

    /// Where CPython keeps what is its own and no object: its static memory, and an interpreter's state.
    pub fn internals(&self, interpreter: *const py::PyInterpreterState) -> [Range<u64>; 2] {
        let state = interpreter as u64;
        let runtime = (&raw const _PyRuntime) as u64;
        let image = image().unwrap_or(runtime..runtime + self.runtime_size as u64);
        [image, state..state + self.interpreter_size as u64]
    }

    /// Takes one interpreter out of the runtime's list, so that the runtime's end passes it by.
    ///
    /// # Safety
    /// Attached to the main interpreter, which is about to end; nobody makes or ends interpreters any
    /// more. What is behind `lost` is not looked at.
    pub unsafe fn unlink(&self, lost: *mut py::PyInterpreterState) {
        // SAFETY: forwarded to the caller; the offsets have been checked against this runtime.
        unsafe {
            let mut place = (&raw const _PyRuntime).cast_mut().add(self.layout.runtime_interpreters_head);
            loop {
                let slot = place.cast::<*mut py::PyInterpreterState>();
                let interpreter = slot.read_unaligned();
                if interpreter.is_null() {
                    return;
                }
                let next = interpreter.cast::<u8>().add(self.layout.interpreter_next);
                if interpreter == lost {
                    slot.write_unaligned(next.cast::<*mut py::PyInterpreterState>().read_unaligned());
                    return;
                }
                place = next;
            }
        }
    }
}

/// Where CPython's code and static memory are.
pub fn image() -> Option<Range<u64>> {
    static IMAGE: OnceLock<Option<Range<u64>>> = OnceLock::new();
    IMAGE.get_or_init(|| memory::image_of((&raw const _PyRuntime) as u64)).clone()
}
