//! A one-way event that a thread can wait for with a bound, and that a signal interrupts.
//!
//! A futex and no fd, so that waiting for a worker never fails for want of descriptors. A condvar
//! would not do: it sleeps on through a signal, and Ctrl-C would then wait for the worker.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::thread::futex;

/// Set once, never cleared.
#[derive(Debug, Default)]
pub struct Event(AtomicU32);

/// Why a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The event is set.
    Set,
    /// The deadline passed.
    TimedOut,
    /// A signal handler ran on this thread.
    Interrupted,
}

impl Event {
    /// An event that is not set.
    pub const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Sets the event and wakes everyone who waits.
    pub fn set(&self) {
        self.0.store(1, Ordering::Release);
        // It cannot fail: the word is ours and private. The count of the woken is of no use.
        let _ = futex::wake(&self.0, futex::Flags::PRIVATE, u32::MAX >> 1);
    }

    /// Whether it has been set.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }

    /// Waits until the event is set, the deadline passes (`None`: no bound) or a signal arrives.
    pub fn wait_until(&self, deadline: Option<Instant>) -> Wait {
        loop {
            if self.is_set() {
                return Wait::Set;
            }
            let left = match deadline {
                None => None,
                Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                    None | Some(Duration::ZERO) => return Wait::TimedOut,
                    Some(left) => Some(super::thread::timespec(left)),
                },
            };
            // Woken, changed before we slept (EAGAIN) or out of time: the loop's head decides.
            let slept = futex::wait(&self.0, futex::Flags::PRIVATE, 0, left.as_ref());
            if slept == Err(Errno::INTR) {
                return if self.is_set() { Wait::Set } else { Wait::Interrupted };
            }
        }
    }

    /// As [`Event::wait_until`], waiting on through signals: for threads that no signal concerns.
    pub fn wait_through_signals(&self, deadline: Option<Instant>) -> bool {
        loop {
            match self.wait_until(deadline) {
                Wait::Set => return true,
                Wait::TimedOut => return false,
                Wait::Interrupted => {}
            }
        }
    }
}

/// A value that one thread fills in once and another waits for.
#[derive(Debug)]
pub struct Slot<T> {
    state: std::sync::Mutex<SlotState<T>>,
    filled: Event,
}

#[derive(Debug)]
enum SlotState<T> {
    Empty,
    Full(T),
    /// Whoever waited has gone; nobody would ever see a value.
    Deserted,
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self { state: std::sync::Mutex::new(SlotState::Empty), filled: Event::new() }
    }
}

impl<T> Slot<T> {
    /// Fills the slot.
    ///
    /// # Errors
    /// The value comes back when nobody waits for it any more.
    pub fn fill(&self, value: T) -> Result<(), T> {
        let mut state = super::lock::lock(&self.state);
        if matches!(*state, SlotState::Deserted) {
            return Err(value);
        }
        *state = SlotState::Full(value);
        drop(state);
        self.filled.set();
        Ok(())
    }

    /// Waits for the value, which stays.
    pub fn wait_until(&self, deadline: Option<Instant>) -> Wait {
        self.filled.wait_until(deadline)
    }

    /// Waits for the value and takes it. `None` when the deadline passed first; then the slot is
    /// deserted.
    pub fn take(&self, deadline: Option<Instant>) -> Option<T> {
        self.filled.wait_through_signals(deadline);
        match std::mem::replace(&mut *super::lock::lock(&self.state), SlotState::Deserted) {
            SlotState::Full(value) => Some(value),
            SlotState::Empty | SlotState::Deserted => None,
        }
    }
}
