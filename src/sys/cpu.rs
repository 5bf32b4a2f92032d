//! What threads have used of the processors.

use std::time::Duration;

/// What a thread of this process has used so far; `None` when there is no such thread.
pub fn used_by(thread: i32) -> Option<Duration> {
    // As the kernel numbers the clocks of threads: a thread (4) and its scheduler's view of it (2).
    clock((!thread << 3) | 6)
}

/// What this process has used so far, with all its threads.
pub fn used_by_process() -> Duration {
    clock(libc::CLOCK_PROCESS_CPUTIME_ID).unwrap_or_default()
}

fn clock(clock: libc::clockid_t) -> Option<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, and refuses a clock that there is not.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return None;
    }
    Some(Duration::new(u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?))
}
