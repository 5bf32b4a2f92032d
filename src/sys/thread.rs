//! Naming threads and starting the supervisor's own ones.

use std::ffi::CString;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::thread::Timespec;

use super::signal;

/// Python's own threads get what the system gives the main one; so do ours.
pub const PYTHON_STACK_BYTES: usize = 8 << 20;

/// Names the calling thread, as `ps -T` shows it. The kernel keeps 15 bytes.
pub fn set_name(name: &str) {
    if let Ok(name) = CString::new(&name[..name.floor_char_boundary(15)]) {
        // A name is a courtesy: prctl(PR_SET_NAME) has no failure that matters to anyone.
        let _ = rustix::thread::set_name(&name);
    }
}

/// Starts a thread of the supervisor: named, and deaf to signals, so that the kernel hands them to
/// Python's threads. What it opens for a moment is never taken for a standard stream that is closed: by
/// then none is.
///
/// # Errors
/// The operating system's, when no thread can be made (EAGAIN).
pub fn spawn_deaf<F>(name: &str, body: F) -> std::io::Result<JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
{
    super::fd::occupy_stdio();
    // It has the mask from its first moment: the kernel may hand it a signal at any time.
    signal::with_all_blocked(|| spawn_named(name, body))
}

/// Starts a named thread with a stack for Python code and the caller's signal mask.
///
/// # Errors
/// The operating system's, when no thread can be made (EAGAIN).
pub fn spawn_named<F>(name: &str, body: F) -> std::io::Result<JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
{
    let title = name.to_owned();
    std::thread::Builder::new().stack_size(PYTHON_STACK_BYTES).spawn(move || {
        set_name(&title);
        body();
    })
}

/// A duration as the kernel takes it, capped where it would overflow (the cap is centuries).
pub fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

/// Whether the calling thread is the one that its process began with.
pub fn is_main() -> bool {
    id() == super::process::id()
}

/// The kernel's id of the calling thread.
pub fn id() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}
