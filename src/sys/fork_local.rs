//! State of this process alone: a fork's child starts without it, and never touches the parent's.

use std::sync::atomic::{AtomicPtr, Ordering};

use super::process;
use crate::error::{Error, Result};

/// A process-wide value that is made on first use and left behind by a fork.
///
/// A child has a copy of the value with every lock as it was at the fork, so it must not so much as
/// look into it. Workers of ours call [`ForkLocal::forget`] first of all; a process that was forked
/// by somebody else is told so.
#[derive(Debug)]
pub struct ForkLocal<T: 'static>(AtomicPtr<Owned<T>>);

#[derive(Debug)]
struct Owned<T> {
    pid: i32,
    value: T,
}

impl<T: Send + Sync> Default for ForkLocal<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Send + Sync> ForkLocal<T> {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self(AtomicPtr::new(std::ptr::null_mut()))
    }

    /// The value, if this process has made it.
    ///
    /// # Errors
    /// When it was made by the process that this one was forked from.
    pub fn get(&self) -> Result<Option<&'static T>> {
        let owned = self.0.load(Ordering::Acquire);
        if owned.is_null() {
            return Ok(None);
        }
        // SAFETY: a non-null pointer was leaked by `get_or_make` and is never freed.
        let owned = unsafe { &*owned };
        if owned.pid == process::id() {
            return Ok(Some(&owned.value));
        }
        Err(Error::state(format!(
            "this process (pid {}) was forked by os.fork() from one (pid {}) that uses tractor_host, whose \
             workers belong to that process; spawn from there, or start this process afresh",
            process::id(),
            owned.pid
        )))
    }

    /// The value, made by the first caller.
    ///
    /// # Errors
    /// Those of `make`, and those of [`ForkLocal::get`].
    pub fn get_or_make(&self, make: impl FnOnce() -> Result<T>) -> Result<&'static T> {
        if let Some(value) = self.get()? {
            return Ok(value);
        }
        let made = Box::into_raw(Box::new(Owned { pid: process::id(), value: make()? }));
        match self.0.compare_exchange(std::ptr::null_mut(), made, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: leaked just now.
            Ok(_) => Ok(unsafe { &(*made).value }),
            Err(first) => {
                // SAFETY: `made` was never shared; `first` was leaked by whoever came first.
                unsafe {
                    drop(Box::from_raw(made));
                    Ok(&(*first).value)
                }
            }
        }
    }

    /// In the only thread of a fork's child: leaves the parent's value behind.
    pub fn forget(&self) {
        self.0.store(std::ptr::null_mut(), Ordering::Release);
    }
}
