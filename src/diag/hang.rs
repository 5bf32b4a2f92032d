//! Dumps of what hangs: a timer that is disarmed in time, or else writes to a file what every thread is in.
//! Its thread needs no GIL, so it makes no difference who keeps that.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::dump::Dump;
use crate::error::{Error, Result};
use crate::events::fault;
use crate::ffi::offsets::Offsets;
use crate::sys::event::Event;
use crate::sys::fork_local::ForkLocal;
use crate::sys::lock::lock;
use crate::sys::{fd, lent, process, thread};

/// How often a watch whose time is over looks whether it has ended all the same.
const PERIOD: Duration = Duration::from_millis(20);

static ARMED: ForkLocal<Mutex<HashMap<u64, Armed>>> = ForkLocal::new();

#[derive(Debug)]
struct Armed {
    disarmed: Arc<Event>,
    fired: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// Begins: unless it is disarmed within this time, a dump is written to the file, which is emptied now. From then on,
/// a byte that comes from `told` is the exit code that the process leaves with at once.
///
/// # Errors
/// When the file can't be opened; EAGAIN when no thread can be made; in a process that was forked behind our
/// back. The calling thread is attached.
pub fn arm(path: &[u8], after: Duration, told: Option<OwnedFd>) -> Result<u64> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOCTTY;
    let opened = rustix::fs::open(path, flags, Mode::from_raw_mode(0o666));
    let file = opened.map_err(|errno| Error::os(format_args!("open `{}`", path.display()), errno))?;
    let file = fd::above_stdio(file)?;
    // The timer's thread can't check the layout that it reads. Where that is not known, its dump says so.
    let _ = Offsets::get();
    let armed = ARMED.get_or_make(|| Ok(Mutex::default()))?;
    let (disarmed, fired) = (Arc::<Event>::default(), Arc::<AtomicBool>::default());
    let (event, mark) = (Arc::clone(&disarmed), Arc::clone(&fired));
    let deadline = Instant::now().checked_add(after);
    let thread = thread::spawn_deaf("th-hang", move || {
        if !event.wait_through_signals(deadline) {
            mark.store(true, Ordering::Release);
            write(&file, after);
            if let Some(told) = told {
                leave_when_told(&told, &event);
            }
        }
    });
    let thread = thread.map_err(|error| Error::os("start a thread that watches for a hang", error))?;
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    lock(armed).insert(id, Armed { disarmed, fired, thread });
    Ok(id)
}

/// Ends the watch, once a dump that has begun is written. Whether there was one.
pub fn disarm(id: u64) -> bool {
    // A forked child has no such thread.
    let Ok(Some(armed)) = ARMED.get() else { return false };
    let Some(armed) = lock(armed).remove(&id) else { return false };
    armed.disarmed.set();
    // Its panic has been printed.
    let _ = armed.thread.join();
    armed.fired.load(Ordering::Acquire)
}

/// In the only thread of a fork's child: those who watch are the parent's.
pub fn forget_in_child() {
    ARMED.forget();
}

/// Leaves the process with the byte that comes from `told` as its exit code, whoever keeps its GIL, unless the watch
/// is ended or `told` is.
fn leave_when_told(told: &OwnedFd, disarmed: &Event) {
    while !disarmed.is_set() {
        let mut code = [0];
        let ready = poll(&mut [PollFd::new(told, PollFlags::IN)], Some(&thread::timespec(PERIOD)));
        let heard =
            ready.and_then(
                |count| if count == 0 { Ok(None) } else { rustix::io::read(told, &mut code).map(Some) },
            );
        match heard {
            Ok(Some(0)) => return,
            Ok(Some(_)) => {
                lent::give_back();
                process::exit_now(code[0].into())
            }
            Ok(None) | Err(Errno::INTR) => {}
            Err(errno) => {
                fault!("whoever may end this process can't be heard: {errno}");
                return;
            }
        }
    }
}

fn write(file: &OwnedFd, after: Duration) {
    let text = Dump::own(&format!("no end within {} s", after.as_secs_f64()), true).to_text();
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        match rustix::io::write(file, rest) {
            Ok(count) => rest = &rest[count..],
            Err(Errno::INTR) => {}
            Err(errno) => {
                fault!("a dump of a hang could not be written: {errno}");
                return;
            }
        }
    }
}
