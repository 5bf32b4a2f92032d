//! Waiting for something to read: for a moment without sleeping, and then asleep.
//!
//! A processor that has nothing to do sleeps itself, and to have it wake up for a thread takes 20 to 50 µs, many
//! times what most short calls take. Who expects something within such a time does better to look for it
//! again and again, if nobody else wants the processor.

use std::os::fd::{BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// For so long at most it is looked for.
const LOOKING: Duration = Duration::from_micros(100);
/// To look once takes a tenth of this; when it took longer, it was somebody else's turn.
const TURN: Duration = Duration::from_micros(10);

/// Waits until there is something to read, and `asleep` for so long at most; before that, if it is `brisk`, for
/// a moment awake. Whether there is; or may be: a signal has come, or it can't be read at all.
pub fn readable(number: RawFd, brisk: bool, asleep: Duration) -> bool {
    if number < 0 {
        return true;
    }
    // SAFETY: it is polled and no more, and is not -1; of a number that is not open, or is somebody else's by now,
    // it tells nothing worse than that there is something to read.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    (brisk && is_soon(fd)) || (!asleep.is_zero() && is_ready(fd, asleep))
}

fn is_soon(fd: BorrowedFd<'_>) -> bool {
    let begin = Instant::now();
    let mut last = begin;
    loop {
        if is_ready(fd, Duration::ZERO) {
            return true;
        }
        std::thread::yield_now();
        let now = Instant::now();
        if now - begin > LOOKING || now - last > TURN {
            return false;
        }
        last = now;
    }
}

fn is_ready(fd: BorrowedFd<'_>, within: Duration) -> bool {
    let within = Timespec::try_from(within).ok();
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], within.as_ref()) != Ok(0)
}
