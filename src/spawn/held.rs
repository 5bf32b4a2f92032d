//! Descriptors that objects of our Python side know by their numbers.
//!
//! An object in an interpreter that is destroyed may never be told so, and its finaliser is Python code, which
//! is not let run then. So what it owns is kept here, and closed with its interpreter at the latest.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use crate::error::{Error, Result};
use crate::sys::fork_local::ForkLocal;
use crate::sys::lock::lock;

/// By number, with the interpreter that knows it.
type Held = HashMap<RawFd, (i64, OwnedFd)>;

static HELD: ForkLocal<Mutex<Held>> = ForkLocal::new();

/// Keeps a descriptor for an interpreter, which knows its number from now on.
///
/// # Errors
/// In a process that was forked behind our back.
pub fn hold(interpreter: i64, fd: OwnedFd) -> Result<RawFd> {
    let number = fd.as_raw_fd();
    let held = HELD.get_or_make(|| Ok(Mutex::default()))?;
    if let Some((_, stale)) = lock(held).insert(number, (interpreter, fd)) {
        // Somebody has closed that one by its number, which is the new one's by now.
        let _ = stale.into_raw_fd();
    }
    Ok(number)
}

/// Gives a descriptor out of our hands.
///
/// # Errors
/// When the interpreter has no such.
pub fn take(interpreter: i64, number: RawFd) -> Result<OwnedFd> {
    let found = HELD.get()?.and_then(|held| remove(held, interpreter, number));
    found.ok_or_else(|| Error::invalid(format!("descriptor {number} is closed, or another interpreter's")))
}

/// Closes a descriptor. In a forked copy of its process, which it does not belong to, nothing happens.
pub fn close(interpreter: i64, number: RawFd) {
    if let Ok(Some(held)) = HELD.get() {
        drop(remove(held, interpreter, number));
    }
}

/// It is closed by the caller, when the lock is free again: a close can take its time.
fn remove(held: &Mutex<Held>, interpreter: i64, number: RawFd) -> Option<OwnedFd> {
    let mut held = lock(held);
    held.get(&number).filter(|&&(owner, _)| owner == interpreter)?;
    held.remove(&number).map(|(_, fd)| fd)
}

/// Closes all descriptors of an interpreter that has ended.
pub(super) fn forget(interpreter: i64) {
    if let Ok(Some(held)) = HELD.get() {
        let found: Vec<_> = lock(held).extract_if(|_, &mut (owner, _)| owner == interpreter).collect();
        drop(found);
    }
}

/// In the only thread of a fork's child: the numbers are the parent's.
pub(super) fn forget_all() {
    HELD.forget();
}
