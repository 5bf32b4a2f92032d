//! The last events of this process, in memory of a fixed size: the newest stay.
//!
//! A writer takes a number and with it a place, and marks that as being written to before and as written
//! after. So nobody waits for anybody: a reader leaves out what is being written, and a fork in the middle
//! of that leaves nothing locked. A child begins with a ring of its own, which takes no memory before there
//! is something to keep.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use rustix::thread::futex;

use super::Event;
use super::record::{Packed, WORDS, unpack};
use crate::error::{Error, Result};
use crate::sys::fork_local::ForkLocal;
use crate::sys::{thread, words};

/// How many events are kept.
pub const KEPT: u64 = 1024;

static RING: ForkLocal<Ring> = ForkLocal::new();

/// A place is a state and an event. The state of number N is 2N when it is there, and one less while it is
/// being written; 0 before there was any.
const PLACE: usize = 1 + WORDS;

struct Ring {
    words: Box<[AtomicU64]>,
    /// The last number that was given.
    last: AtomicU64,
    /// Changes with each event that is there.
    changes: AtomicU32,
    waiting: AtomicU32,
}

/// What a look at a place shows.
enum Seen {
    There(Box<Packed>),
    /// Being written.
    Soon,
    Gone,
}

impl Ring {
    fn new() -> Self {
        Self {
            words: words::zeroed(PLACE * KEPT as usize),
            last: AtomicU64::new(0),
            changes: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
        }
    }

    fn place(&self, number: u64) -> &[AtomicU64] {
        // Less than KEPT: it fits.
        let index = (number % KEPT) as usize * PLACE;
        &self.words[index..index + PLACE]
    }

    fn push(&self, packed: &Packed) -> u64 {
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let [state, words @ ..] = self.place(number) else { return number };
        let before = state.load(Ordering::Relaxed);
        let writing = number * 2 - 1;
        // Who has begun to write here a whole round ago, and has not been scheduled since, goes first.
        let free = before % 2 == 0 && before < writing;
        if !free || state.compare_exchange(before, writing, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return number;
        }
        fence(Ordering::Release);
        for (word, value) in words.iter().zip(packed) {
            word.store(*value, Ordering::Relaxed);
        }
        state.store(number * 2, Ordering::Release);
        self.changes.fetch_add(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            // It cannot fail: the word is ours and private.
            let _ = futex::wake(&self.changes, futex::Flags::PRIVATE, u32::MAX >> 1);
        }
        number
    }

    fn look(&self, number: u64) -> Seen {
        let [state, words @ ..] = self.place(number) else { return Seen::Gone };
        match state.load(Ordering::Acquire) {
            there if there == number * 2 => {}
            later if later > number * 2 => return Seen::Gone,
            _ => return Seen::Soon,
        }
        let mut packed = [0; WORDS];
        for (value, word) in packed.iter_mut().zip(words) {
            *value = word.load(Ordering::Relaxed);
        }
        fence(Ordering::Acquire);
        if state.load(Ordering::Relaxed) == number * 2 { Seen::There(Box::new(packed)) } else { Seen::Gone }
    }

    /// What there is after a number, in order; up to the first that is being written, if `whole`.
    fn after(&self, number: u64, whole: bool) -> Vec<Event> {
        let last = self.last.load(Ordering::Acquire);
        let first = (number + 1).max((last + 1).saturating_sub(KEPT));
        let mut found = Vec::new();
        for number in first..=last {
            match self.look(number) {
                Seen::There(packed) => found.extend(unpack(number, &packed)),
                Seen::Soon if whole => break,
                Seen::Soon | Seen::Gone => {}
            }
        }
        found
    }
}

/// Keeps an event, and gives it its number; 0 in a process that was forked behind our back.
pub(super) fn push(packed: &Packed) -> u64 {
    RING.get_or_make(|| Ok(Ring::new())).map_or(0, |ring| ring.push(packed))
}

/// The last events that are there, oldest first, after the one with this number. Takes no lock.
pub fn after(number: u64) -> Vec<Event> {
    RING.get().ok().flatten().map_or_else(Vec::new, |ring| ring.after(number, false))
}

/// The last events, oldest first.
pub fn recent() -> Vec<Event> {
    after(0)
}

/// Waits for events after the one with this number, and returns all that there are, in order and without a
/// gap but for what is not kept any more; none when the deadline has passed.
///
/// # Errors
/// Interrupted, when a signal has come; in a process that was forked behind our back.
pub fn wait_after(number: u64, deadline: Instant) -> Result<Vec<Event>> {
    /// Somebody who was stopped in the middle of writing an event is not waited for any longer.
    const WRITING: Duration = Duration::from_millis(100);
    let ring = RING.get_or_make(|| Ok(Ring::new()))?;
    let _waiting = Waiting::on(ring);
    let mut unfinished: Option<Instant> = None;
    loop {
        let changes = ring.changes.load(Ordering::SeqCst);
        let patient = unfinished.is_none_or(|since| since.elapsed() < WRITING);
        let found = ring.after(number, patient);
        if !found.is_empty() {
            return Ok(found);
        }
        let now = Instant::now();
        if now >= deadline {
            return Ok(found);
        }
        let mut left = deadline - now;
        if ring.last.load(Ordering::Acquire) > number {
            unfinished.get_or_insert(now);
            left = left.min(WRITING);
        }
        let left = thread::timespec(left);
        // Woken, changed meanwhile or out of time: the loop's head decides.
        let slept = futex::wait(&ring.changes, futex::Flags::PRIVATE, changes, Some(&left));
        if slept == Err(rustix::io::Errno::INTR) {
            return Err(Error::interrupted());
        }
    }
}

struct Waiting<'a>(&'a Ring);

impl<'a> Waiting<'a> {
    fn on(ring: &'a Ring) -> Self {
        ring.waiting.fetch_add(1, Ordering::SeqCst);
        Self(ring)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Wakes who waits for events, though there may be none.
pub fn nudge() {
    if let Ok(Some(ring)) = RING.get() {
        ring.changes.fetch_add(1, Ordering::SeqCst);
        // As above.
        let _ = futex::wake(&ring.changes, futex::Flags::PRIVATE, u32::MAX >> 1);
    }
}

/// The number of the last event.
pub fn last() -> u64 {
    RING.get().ok().flatten().map_or(0, |ring| ring.last.load(Ordering::Acquire))
}

pub(super) fn forget_in_child() {
    RING.forget();
}
