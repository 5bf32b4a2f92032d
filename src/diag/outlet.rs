//! Where dumps go that nobody has named a place for: what `TRACTOR_HOST_DUMP` says, or the stderr that the
//! process was started with. Writing there waits for no reader.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::dump::Dump;
use crate::events::fault;
use crate::sys::event::Event;
use crate::sys::{fd, process, thread};

/// Names a file, which dumps are appended to, or a directory, where each is a new file.
const VARIABLE: &str = "TRACTOR_HOST_DUMP";

/// How long a reader may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a dump takes at most, with its writing: two seconds each, and some time to get there.
pub const BOUND: Duration = Duration::from_millis(4500);

/// Read once: the environment may be changed by Python code, and reading it meanwhile is not safe.
static NAMED: OnceLock<Option<OsString>> = OnceLock::new();
static STDERR: OnceLock<fd::Identity> = OnceLock::new();

/// Notes where dumps go. To be called early: pytest replaces stderr while a test runs.
pub fn prepare() {
    NAMED.get_or_init(|| std::env::var_os(VARIABLE).filter(|name| !name.is_empty()));
}

/// Has dumps go to what stderr is now, also when that is something else by then. It takes no descriptor, which
/// the program would see: who replaces stderr for a time keeps one.
pub fn remember_stderr() {
    if let Some(identity) = fd::Identity::of(rustix::stdio::stderr()) {
        // Who comes second has seen the same.
        let _ = STDERR.set(identity);
    }
}

/// Takes a dump of this process and writes it where dumps go. For any thread, attached or not. It takes [`BOUND`]
/// at most.
///
/// # Errors
/// What there was to write to did not take it.
pub fn write_now(reason: &str) -> io::Result<()> {
    write(Dump::own(reason, true).to_text().as_bytes()).map(drop)
}

/// As [`write_now`]; that it failed is said on stderr.
pub fn write_or_complain(reason: &str) {
    if let Err(error) = write_now(reason) {
        fault!("failed to write a dump: {error}");
    }
}

/// As [`write_or_complain`], on a thread of its own. What is returned is set when that is done, which it is at
/// once where no thread can be made: then it was done here.
pub fn write_apart(reason: &str) -> Arc<Event> {
    let done = Arc::new(Event::new());
    let (told, why) = (Arc::clone(&done), reason.to_owned());
    let spawned = thread::spawn_deaf("th-dump", move || {
        write_or_complain(&why);
        told.set();
    });
    if spawned.is_err() {
        write_or_complain(reason);
        done.set();
    }
    done
}

/// Writes where dumps go, and tells where that is; `None`: to stderr.
///
/// # Errors
/// The operating system's, or a reader that reads nothing.
pub fn write(text: &[u8]) -> io::Result<Option<PathBuf>> {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    prepare();
    let Some(named) = NAMED.get().and_then(Option::as_ref) else {
        let elsewhere = STDERR.get().and_then(fd::Identity::find);
        let stderr = elsewhere.as_ref().map_or(rustix::stdio::stderr(), AsFd::as_fd);
        return write_to(stderr, text).map(|()| None);
    };
    let mut path = PathBuf::from(named);
    if path.is_dir() {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        path.push(format!("tractor-host-dump-{}-{count}.txt", process::id()));
    }
    let file = OpenOptions::new().append(true).create(true).open(&path);
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let file = file.map_err(named)?;
    write_to(file.as_fd(), text).map_err(named)?;
    Ok(Some(path))
}

fn write_to(to: BorrowedFd<'_>, mut text: &[u8]) -> io::Result<()> {
    /// A pipe that has room takes this much at once.
    const PIECE: usize = 4096;
    let deadline = Instant::now() + PATIENCE;
    while !text.is_empty() {
        let left = thread::timespec(deadline.saturating_duration_since(Instant::now()));
        let mut fds = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
        match poll(&mut fds, Some(&left)) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody reads it")),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        match rustix::io::write(to, &text[..text.len().min(PIECE)]) {
            Ok(count) => text = &text[count..],
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
