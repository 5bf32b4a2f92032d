//! Counting SIGINTs without taking them from Python: our handler stands in front of CPython's and calls
//! it. Other signals can be made to count as one. No signal is blocked anywhere, so nothing that is forked or
//! executed inherits a mask.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering};
use std::time::Instant;

use rustix::io::Errno;
use rustix::thread::futex;

use super::thread;

/// How many have come.
static COUNT: AtomicU32 = AtomicU32::new(0);
/// How many of them the handler behind ours has been told of.
static TOLD: AtomicU32 = AtomicU32::new(0);
/// Rung for each, and to have the listener look up. A futex.
static BELL: AtomicU32 = AtomicU32::new(0);
/// The handler that ours stands in front of.
static BEHIND: AtomicUsize = AtomicUsize::new(0);
/// The thread that ran the handler last.
static HEARD_BY: AtomicI32 = AtomicI32::new(0);
/// The signal that came last.
static LAST: AtomicI32 = AtomicI32::new(libc::SIGINT);
/// How many SIGQUITs have come.
static QUITS: AtomicU32 = AtomicU32::new(0);

/// How many SIGINTs this process has been sent, as far as Python would have noticed them.
pub fn count() -> u32 {
    COUNT.load(Ordering::Acquire)
}

/// Whether the handler behind ours has been told of all of them.
pub fn all_told() -> bool {
    TOLD.load(Ordering::Acquire) == count()
}

/// The thread that the kernel chose for the last one.
pub fn heard_by() -> i32 {
    HEARD_BY.load(Ordering::Acquire)
}

/// The signal that the last one was.
pub fn last() -> i32 {
    LAST.load(Ordering::Acquire)
}

/// How many SIGQUITs have come, if they are [listened for](listen).
pub fn quits() -> u32 {
    QUITS.load(Ordering::Acquire)
}

/// How often the bell has rung.
pub fn rings() -> u32 {
    BELL.load(Ordering::Acquire)
}

/// Waits until the bell has rung more often than `heard`, or the deadline passes.
pub fn wait_for_bell(heard: u32, deadline: Instant) {
    if let Some(left) = deadline.checked_duration_since(Instant::now()) {
        // Woken, rung before it slept (EAGAIN), interrupted or out of time: the caller looks itself.
        let _: Result<(), Errno> =
            futex::wait(&BELL, futex::Flags::PRIVATE, heard, Some(&thread::timespec(left)));
    }
}

/// Has whoever waits in [`wait_for_bell`] look up.
pub fn ring() {
    BELL.fetch_add(1, Ordering::AcqRel);
    // It cannot fail: the word is ours and private. The count of the woken is of no use.
    let _ = futex::wake(&BELL, futex::Flags::PRIVATE, u32::MAX >> 1);
}

/// Puts our handler in front of the one that SIGINT has, if that is code of CPython's, which lies in `image`.
/// To be called again and again: whoever sets a handler by Python takes ours away. In between Python hears
/// what comes, and it is not counted.
pub fn stand_in_front(image: &Range<u64>) {
    let Some(mut action) = action() else { return };
    let found = action.sa_sigaction;
    if found == ours() || !image.contains(&(found as u64)) {
        return; // or it is ignored, has the default action, or is somebody else's
    }
    BEHIND.store(found, Ordering::Release);
    action.sa_sigaction = ours();
    action.sa_flags |= libc::SA_SIGINFO;
    if let Some(replaced) = exchange(&action)
        && replaced.sa_sigaction != found
        && replaced.sa_sigaction != ours()
    {
        // Somebody was faster, and meant it.
        exchange(&replaced);
    }
}

/// Whether a SIGINT that has a handler waits for a thread that does not block it. For a thread that blocks all.
pub fn is_held_up() -> bool {
    // SAFETY: all zeros is a valid, empty set; the kernel fills it.
    let is_pending = unsafe {
        let mut pending: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&mut pending) == 0 && libc::sigismember(&pending, libc::SIGINT) == 1
    };
    is_pending && action().is_some_and(|action| action.sa_sigaction == ours())
}

/// Gives SIGINT the handler back that it had.
pub fn step_aside() {
    let Some(mut action) = action() else { return };
    if action.sa_sigaction == ours() {
        action.sa_sigaction = BEHIND.load(Ordering::Acquire);
        // CPython's takes the number alone.
        action.sa_flags &= !libc::SA_SIGINFO;
        exchange(&action);
    }
}

/// Has a signal that nobody has a handler for count as a SIGINT (SIGTERM, SIGHUP), or as a request
/// (SIGQUIT). Whether it does now.
pub fn listen(number: c_int) -> bool {
    let handler = on_other as extern "C" fn(c_int) as libc::sighandler_t;
    // SAFETY: all zeros is a valid `sigaction`; the kernel only reads the new one and fills the old. The
    // handler is async-signal-safe, see there.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(number, std::ptr::null(), &mut action) != 0 {
            return false;
        }
        if action.sa_sigaction == libc::SIG_DFL {
            action.sa_sigaction = handler;
            action.sa_flags = libc::SA_ONSTACK | if number == libc::SIGQUIT { libc::SA_RESTART } else { 0 };
            return libc::sigaction(number, &action, std::ptr::null_mut()) == 0;
        }
        action.sa_sigaction == handler
    }
}

fn ours() -> libc::sighandler_t {
    on_sigint as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as libc::sighandler_t
}

fn action() -> Option<libc::sigaction> {
    // SAFETY: all zeros is a valid `sigaction`, which the kernel fills; a null new one only asks.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        (libc::sigaction(libc::SIGINT, std::ptr::null(), &mut action) == 0).then_some(action)
    }
}

/// Sets an action; returns the one that was there.
fn exchange(action: &libc::sigaction) -> Option<libc::sigaction> {
    // SAFETY: the new action was read from the kernel and has its handler, or ours, which is
    // async-signal-safe; the old one is filled by the kernel.
    unsafe {
        let mut replaced: libc::sigaction = std::mem::zeroed();
        (libc::sigaction(libc::SIGINT, action, &mut replaced) == 0).then_some(replaced)
    }
}

/// Atomics, futex and gettid, which rustix calls without libc, so that `errno` is left alone; then the
/// handler behind, whose business that is.
extern "C" fn on_sigint(number: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    LAST.store(number, Ordering::Release);
    HEARD_BY.store(thread::id(), Ordering::Release);
    COUNT.fetch_add(1, Ordering::AcqRel);
    let behind = BEHIND.load(Ordering::Acquire);
    // SAFETY: it was SIGINT's handler when ours was put in front of it. One that takes the number alone, as
    // CPython's does, leaves the other arguments, which are in registers, where they are.
    unsafe {
        let behind: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = std::mem::transmute(behind);
        behind(number, info, context);
    }
    TOLD.fetch_add(1, Ordering::AcqRel);
    ring();
}

/// As above. CPython's handler is told of a SIGINT, which it notes, and wakes the event loop.
extern "C" fn on_other(number: c_int) {
    if number == libc::SIGQUIT {
        QUITS.fetch_add(1, Ordering::AcqRel);
        ring();
        return;
    }
    LAST.store(number, Ordering::Release);
    HEARD_BY.store(thread::id(), Ordering::Release);
    COUNT.fetch_add(1, Ordering::AcqRel);
    let behind = BEHIND.load(Ordering::Acquire);
    if behind != 0 {
        // SAFETY: it is a handler of CPython's, which uses the number alone.
        unsafe {
            let behind: extern "C" fn(c_int) = std::mem::transmute(behind);
            behind(libc::SIGINT);
        }
    }
    TOLD.fetch_add(1, Ordering::AcqRel);
    ring();
}
