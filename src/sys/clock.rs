//! A clock for time limits, which stands still while somebody debugs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::ClockId;

/// When it was stopped, in nanoseconds of the monotonic clock; 0 while it goes.
static STOPPED: AtomicU64 = AtomicU64::new(0);
/// For how long it has stood still before, in nanoseconds.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Has the clock stand still, or go on. For one thread alone.
pub fn hold(on: bool) {
    let since = STOPPED.load(Ordering::Acquire);
    if on && since == 0 {
        STOPPED.store(monotonic(), Ordering::Release);
    } else if !on && since != 0 {
        LOST.fetch_add(monotonic() - since, Ordering::AcqRel);
        STOPPED.store(0, Ordering::Release);
    }
}

/// In the only thread of a fork's child: it is told by itself to hold.
pub fn forget_in_child() {
    STOPPED.store(0, Ordering::Release);
}

/// Its time: differences count.
pub fn now() -> Duration {
    let lost = LOST.load(Ordering::Acquire);
    let now = match STOPPED.load(Ordering::Acquire) {
        0 => monotonic(),
        since => since,
    };
    Duration::from_nanos(now.saturating_sub(lost))
}

fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
