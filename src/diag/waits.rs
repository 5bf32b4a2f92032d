//! What a thread waits for, in words: the GIL, a lock and its owner, a descriptor.

use super::python::Runtime;
use super::reader::Reader;
use crate::ffi::offsets::object;
use crate::sys::look::{self, Call};

/// How far above the stack pointer of a futex call CPython's semaphore can be.
const PARKING_RANGE: u64 = 64 << 10;

/// What there is to be known of a process to say what one of its threads waits for.
pub(super) struct Context<'a> {
    /// Its number.
    pub(super) pid: i32,
    /// Its Python, if that can be read.
    pub(super) runtime: Option<&'a Runtime>,
    /// Where its GILs are.
    pub(super) gils: &'a [u64],
    /// Its threads: Python's ident and the kernel's id.
    pub(super) idents: &'a [(u64, i32)],
}

impl Context<'_> {
    /// What a call waits for; `None` where that is not known, or nothing in particular.
    pub(super) fn of(&self, call: &Call) -> Option<String> {
        if call.number == libc::SYS_futex {
            return self.lock(call);
        }
        if let Some(fd) = call.descriptor() {
            return Some(self.descriptor(fd));
        }
        if look::is_poll(call.number) {
            return self.polled(call);
        }
        if call.number == libc::SYS_wait4 {
            return match call.arguments[0] as i32 {
                pid if pid > 0 => Some(format!("process {pid}")),
                _ => Some("any child".into()),
            };
        }
        None
    }

    fn descriptor(&self, fd: i32) -> String {
        match look::descriptor(self.pid, fd) {
            Some(file) => format!("fd {fd} ({})", file.display()),
            None => format!("fd {fd}"),
        }
    }

    fn polled(&self, call: &Call) -> Option<String> {
        const SHOWN: u64 = 4;
        let (list, count) = (call.arguments[0], call.arguments[1]);
        let reader = &self.runtime?.reader;
        let fds = (0..count.min(SHOWN)).filter_map(|index| {
            let entry = reader.bytes(list.checked_add(index * 8)?)?;
            Some(self.descriptor(i32::from_ne_bytes(entry)))
        });
        let mut text = fds.collect::<Vec<_>>().join(", ");
        if count > SHOWN {
            text.push_str(&format!(" and {} more", count - SHOWN));
        }
        Some(text).filter(|text| !text.is_empty())
    }

    fn lock(&self, call: &Call) -> Option<String> {
        let (runtime, address) = (self.runtime?, call.arguments[0]);
        if let Some(&gil) =
            self.gils.iter().find(|gil| (**gil..gil.saturating_add(object::GIL_SIZE)).contains(&address))
        {
            let holder = runtime.reader.walk().holder_of(gil);
            let native =
                holder.and_then(|state| runtime.reader.word(state, runtime.reader.at.thread_native_id));
            return Some(
                native.map_or("a GIL".into(), |native| format!("the GIL, which thread {native} holds")),
            );
        }
        // CPython parks a thread that waits for a lock on a semaphore on its own stack, and before that stands
        // what it waits for.
        if !(call.stack..call.stack.saturating_add(PARKING_RANGE)).contains(&address) {
            return None;
        }
        let lock = runtime.reader.pointer(address.checked_sub(8)?, 0)?;
        Some(self.named(&runtime.reader, lock))
    }

    fn named(&self, reader: &Reader, lock: u64) -> String {
        let object = lock.wrapping_sub(object::LOCK_STATE as u64);
        match reader.type_name(object).as_deref() {
            Some("_thread.RLock") => {
                let owner = reader.word(object, object::RLOCK_OWNER);
                let owner = owner.and_then(|owner| self.idents.iter().find(|(ident, _)| *ident == owner));
                let owner =
                    owner.map_or(String::new(), |(_, native)| format!(", which thread {native} holds"));
                format!("an RLock at {object:#x}{owner}")
            }
            Some("_thread.lock") => format!("a Lock at {object:#x}"),
            _ => format!("a lock or event of Python's at {lock:#x}"),
        }
    }
}
