//! The timeline of a run, written to a file while it happens, in the format that Perfetto and chrome://tracing
//! read. The file is valid JSON at any moment, however this process ends.
//!
//! A thread of its own writes: nobody who tells an event waits for a disk.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use serde_json::Value as Json;

use super::timeline::Timeline;
use super::{Event, Moment, fault};
use crate::error::{Error, Result};
use crate::sys::event::Event as Flag;
use crate::sys::fork_local::ForkLocal;
use crate::sys::lock::lock;
use crate::sys::{fd, procfs, thread};

/// Names the file.
pub const VARIABLE: &str = "TRACTOR_HOST_TRACE";

static TRACE: ForkLocal<Trace> = ForkLocal::new();
static ON: AtomicBool = AtomicBool::new(false);

/// How long the end of the program waits for the disk.
const CLOSING: Duration = Duration::from_secs(10);

/// What is to be written, and by what.
type Work = (Writer, Receiver<Told>);

struct Trace {
    to_writer: Sender<Told>,
    /// What the writer begins with. Its thread is started by the first that is told, so that a program that
    /// spawns nothing has none.
    waiting: Arc<Mutex<Option<Work>>>,
    started: AtomicBool,
    done: Arc<Flag>,
}

/// What a thread of the program has spent time on.
#[derive(Debug)]
pub struct Span {
    /// In a word.
    pub what: &'static str,
    /// The kernel's id of the thread.
    pub thread: i32,
    /// From when on.
    pub since: Instant,
    /// Of which worker, in words.
    pub of: String,
    /// It goes on: the last of those that begin at the same time counts.
    pub goes_on: bool,
}

enum Told {
    Event(Box<Event>),
    Span { span: Span, thread_name: String, now: Moment },
    End(Moment),
}

/// Begins a timeline, if the environment names a file for it.
///
/// # Errors
/// As [`open`].
pub fn open_asked() -> Result<()> {
    match std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        Some(path) => open(path.as_ref()),
        None => Ok(()),
    }
}

/// Begins a timeline in a file, which must not be one that another process writes to.
///
/// # Errors
/// When it can't be opened.
pub fn open(path: &Path) -> Result<()> {
    if TRACE.get()?.is_some() {
        return Ok(());
    }
    let failed =
        |errno: rustix::io::Errno| Error::os(format_args!("open the timeline `{}`", path.display()), errno);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o666)).map_err(failed)?;
    let file = fd::above_stdio(file)?;
    // A program that was started by a traced one has the same variable.
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        fault!("the timeline `{}` is another process's: none is written for this one", path.display());
        return Ok(());
    }
    rustix::fs::ftruncate(&file, 0).map_err(failed)?;
    let now = Moment::now();
    let mut writer = Writer { file, at: 0, timeline: Timeline::begin(now), broken: false };
    let first = writer.timeline.first();
    writer.append(&first);
    if writer.broken {
        return Err(Error::state(format!("the timeline `{}` cannot be written", path.display())));
    }
    TRACE.get_or_make(|| {
        let (to_writer, told) = channel();
        let waiting = Arc::new(Mutex::new(Some((writer, told))));
        Ok(Trace { to_writer, waiting, started: AtomicBool::new(false), done: Arc::default() })
    })?;
    ON.store(true, Ordering::Release);
    Ok(())
}

/// Whether there is a timeline.
pub fn is_on() -> bool {
    ON.load(Ordering::Acquire)
}

/// Ends the timeline, once nothing happens any more.
pub fn close() {
    if !ON.swap(false, Ordering::AcqRel) {
        return;
    }
    let Ok(Some(trace)) = TRACE.get() else { return };
    // Whoever tells something just now is too late, or not: it is the end of the program.
    if trace.to_writer.send(Told::End(Moment::now())).is_err() {
        return;
    }
    if trace.started.load(Ordering::Acquire) {
        trace.done.wait_through_signals(Some(Instant::now() + CLOSING));
    } else {
        write_all(&trace.waiting, &trace.done);
    }
}

/// Hands something to the writer.
fn send(told: Told) {
    let Ok(Some(trace)) = TRACE.get() else { return };
    // If it has ended, that was told.
    let _ = trace.to_writer.send(told);
    if !trace.started.swap(true, Ordering::AcqRel) {
        let (waiting, done) = (Arc::clone(&trace.waiting), Arc::clone(&trace.done));
        if thread::spawn_deaf("th-trace", move || write_all(&waiting, &done)).is_err() {
            // What was told is kept for the next attempt.
            trace.started.store(false, Ordering::Release);
        }
    }
}

/// The writer's life.
fn write_all(waiting: &Mutex<Option<Work>>, done: &Flag) {
    let Some((mut writer, told)) = lock(waiting).take() else { return };
    let mut entries = Vec::new();
    while let Ok(first) = told.recv() {
        let mut ended = false;
        for told in std::iter::once(first).chain(told.try_iter()) {
            match told {
                Told::Event(event) => writer.timeline.event(&event, &mut entries),
                Told::Span { span, thread_name, now } => {
                    writer.timeline.span(&span, &thread_name, now, &mut entries);
                }
                Told::End(now) => {
                    writer.timeline.end(now, &mut entries);
                    ended = true;
                }
            }
        }
        writer.append(&entries);
        entries.clear();
        if ended {
            break;
        }
    }
    done.set();
}

struct Writer {
    file: OwnedFd,
    /// Where the next entry goes: the bracket that closes the list is written over.
    at: u64,
    timeline: Timeline,
    broken: bool,
}

impl Writer {
    fn append(&mut self, entries: &[Json]) {
        if entries.is_empty() || self.broken {
            return;
        }
        let mut text = String::new();
        for entry in entries {
            text.push_str(if self.at == 0 && text.is_empty() { "[\n" } else { ",\n" });
            text.push_str(&entry.to_string());
        }
        let next = self.at + text.len() as u64;
        text.push_str("\n]\n");
        let mut bytes = text.as_bytes();
        let mut at = self.at;
        while !bytes.is_empty() {
            match rustix::io::pwrite(&self.file, bytes, at) {
                Ok(count) => {
                    bytes = &bytes[count..];
                    at += count as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    // A full disk, mostly.
                    self.broken = true;
                    fault!("the timeline ends here, it cannot be written: {errno}");
                    return;
                }
            }
        }
        self.at = next;
    }
}

pub(super) fn tell(event: Event) {
    send(Told::Event(Box::new(event)));
}

/// Enters what a thread of the program has done.
pub fn enter(span: Span) {
    // What took no time is no slice.
    const NOTHING: Duration = Duration::from_micros(20);
    if is_on() && span.since.elapsed() >= NOTHING {
        let thread_name = procfs::thread_name(span.thread).unwrap_or_default();
        send(Told::Span { span, thread_name, now: Moment::now() });
    }
}

pub(super) fn forget_in_child() {
    ON.store(false, Ordering::Relaxed);
    TRACE.forget();
}
