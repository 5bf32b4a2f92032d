//! What a host says it has made, in a file that outlives it: so that what a killed host leaves behind can be found
//! by ownership, and never by a name.
//!
//! The file is text: a head of [`HEAD`] bytes (JSON, who the host is and what files it has), then a line of
//! [`SLOT`] bytes for each process: `PID START KIND NAME`, or blanks. A line is written with one call when a
//! process comes or goes. The host holds a lock on the file, which the kernel gives back with its end.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Mutex;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};

use super::fork_local::ForkLocal;
use super::lock::lock;
use super::process::Child;
use super::runtime_folder::Folder;
use super::{fd, process, procfs};
use crate::error::{Error, Result};

/// How the name of a ledger ends.
pub const SUFFIX: &str = ".host";
/// How the name of a host's socket ends.
pub const SOCKET_SUFFIX: &str = ".sock";
/// The kind of a fork server, and of its idle children; all others are workers, by the names of their backends.
pub const FORK_SERVER: &str = "fork-server";
/// See there.
pub const BLANK: &str = "blank";
/// The layout of the file.
const VERSION: u32 = 1;
const HEAD: usize = 4096;
const SLOT: usize = 128;
/// No ledger of ours is longer.
const LONGEST: u64 = 64 << 20;

static LEDGER: ForkLocal<Mutex<Option<Ledger>>> = ForkLocal::new();

/// In the only thread of a fork's child: the ledger is the parent's.
pub fn forget_in_child() {
    LEDGER.forget();
}

/// Who a host is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// [`VERSION`].
    pub version: u32,
    /// Its process.
    pub pid: i32,
    /// When that was started, in clock ticks since the boot.
    pub start: u64,
    /// The boot.
    pub boot: String,
    /// The namespace that process ids are of.
    pub namespace: String,
    /// Its program.
    pub executable: String,
    /// What that was started with, as much as there is room for.
    pub argv: Vec<String>,
    /// Files of its own.
    pub files: Vec<Own>,
}

/// A file, socket or empty directory that belongs to a host. Shared memory is a file below `/dev/shm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Own {
    /// Where it is.
    pub path: PathBuf,
    /// Its file system.
    pub device: u64,
    /// Its number there. Another file by the same name is not the host's.
    pub inode: u64,
}

impl Own {
    /// What is at that path now.
    ///
    /// # Errors
    /// ENOENT.
    pub fn at(path: PathBuf) -> Result<Self> {
        let status = rustix::fs::lstat(&path)
            .map_err(|errno| Error::os(format_args!("look at `{}`", path.display()), errno))?;
        Ok(Self { path, device: status.st_dev, inode: status.st_ino })
    }

    /// Whether it is still there.
    pub fn is_there(&self) -> bool {
        Self::at(self.path.clone()).is_ok_and(|found| found == *self)
    }

    /// Removes it, if it is still there. Whether it was.
    ///
    /// # Errors
    /// The operating system's.
    pub fn remove(&self) -> Result<bool> {
        if !self.is_there() {
            return Ok(false);
        }
        let unlink = |flags| rustix::fs::unlinkat(rustix::fs::CWD, &self.path, flags);
        match unlink(AtFlags::empty()).or_else(|errno| match errno {
            Errno::ISDIR | Errno::PERM => unlink(AtFlags::REMOVEDIR),
            other => Err(other),
        }) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(Error::os(format_args!("remove `{}`", self.path.display()), errno)),
        }
    }
}

/// A process that a host has made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Made {
    /// Its number.
    pub pid: i32,
    /// When it was started, in clock ticks since the boot: together with the number that is it for sure.
    pub start: u64,
    /// A backend's name, or what else it is.
    pub kind: String,
    /// A worker's name.
    pub name: String,
}

impl Made {
    /// Takes hold of it, if it is still there and no other process has its number.
    ///
    /// # Errors
    /// EMFILE.
    pub fn hold(&self) -> Result<Option<Child>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH) => return Ok(None),
            Err(errno) => return Err(Error::os(format_args!("open a pidfd of process {pid}"), errno)),
        };
        // Looked at after that: had its number been given away before, its start would be another one.
        if is_running(self.pid, self.start) { Child::from_parts(self.pid, pidfd).map(Some) } else { Ok(None) }
    }
}

#[derive(Debug)]
struct Ledger {
    file: OwnedFd,
    /// Where a process is noted, and when it was started.
    slots: HashMap<i32, (u64, u64)>,
    free: Vec<u64>,
    next: u64,
    broken: bool,
}

/// What the name of the files of this process begins with.
///
/// # Errors
/// When /proc is not mounted.
pub fn own_stem() -> Result<String> {
    let pid = process::id();
    let stat = procfs::stat_of(pid).ok_or_else(|| Error::unsupported("/proc/self/stat cannot be read"))?;
    Ok(format!("{pid}-{}", stat.start))
}

/// Opens the ledger of this process, as `STEM.host` in the folder. It says from now on what [`note`] is told.
///
/// # Errors
/// ENOSPC, EROFS, EMFILE; when another process has it.
pub fn open(folder: &Folder, stem: &str, files: Vec<Own>) -> Result<()> {
    let pid = process::id();
    let start = procfs::stat_of(pid).map(|stat| stat.start);
    let mut head = Head {
        version: VERSION,
        pid,
        start: start.ok_or_else(|| Error::unsupported("/proc/self/stat cannot be read"))?,
        boot: procfs::boot_id().unwrap_or_default(),
        namespace: procfs::pid_namespace(pid).unwrap_or_default(),
        executable: procfs::executable(pid).unwrap_or_default(),
        argv: procfs::arguments(pid),
        files,
    };
    let name = format!("{stem}{SUFFIX}");
    let failed = |errno: Errno| Error::os(format_args!("write `{}`", folder.join(&name).display()), errno);
    let unfinished = format!("{name}.new");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, &*unfinished, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    let file = fd::above_stdio(file)?;
    rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).map_err(failed)?;
    let text = loop {
        let text = serde_json::to_string(&head).map_err(|error| Error::state(error.to_string()))?;
        if text.len() < HEAD || head.argv.pop().is_none() {
            break text;
        }
    };
    if text.len() >= HEAD {
        return Err(Error::state("this process has too long a path for its record"));
    }
    // Nobody ever finds half of it. What had the name is of a program that has replaced itself by this one.
    let written = write_at(&file, padded(&text, HEAD).as_bytes(), 0)
        .and_then(|()| rustix::fs::renameat(folder, &*unfinished, folder, &*name));
    if let Err(errno) = written {
        folder.remove(&unfinished)?;
        return Err(failed(errno));
    }
    let ledger = Ledger { file, slots: HashMap::new(), free: Vec::new(), next: 0, broken: false };
    *lock(LEDGER.get_or_make(|| Ok(Mutex::default()))?) = Some(ledger);
    Ok(())
}

/// Closes the ledger of this process. Its file is the caller's to remove.
pub fn close() {
    with(|ledger| *ledger = None);
}

/// There is such a process, which is this one's child, or that of another one that was noted. If it was noted
/// before, it is something else now.
pub fn note(pid: i32, kind: &str, name: &str) {
    with(|ledger| {
        let Some(ledger) = ledger else { return };
        let (slot, start) = match ledger.slots.get(&pid) {
            // It has not been struck, so it is the same.
            Some(known) => *known,
            None => {
                // One that somebody has reaped may have left its number to a stranger.
                let ours = |parent| parent == process::id() || ledger.slots.contains_key(&parent);
                let Some(stat) = procfs::stat_of(pid).filter(|stat| ours(stat.parent)) else { return };
                let slot = ledger.free.pop().unwrap_or_else(|| {
                    ledger.next += 1;
                    ledger.next - 1
                });
                ledger.slots.insert(pid, (slot, stat.start));
                (slot, stat.start)
            }
        };
        let name = name.replace(char::is_control, "?");
        ledger.write(slot, &format!("{pid} {start} {kind} {name}"));
    });
}

/// There is no such process any more, or will not be in a moment. While it is there for sure, if only as a zombie:
/// its number could be another one's later.
pub fn strike(pid: i32) {
    with(|ledger| ledger.as_mut().map_or((), |ledger| ledger.strike(pid)));
}

/// Nobody has heard of that process for a while: it is struck if it is not there.
pub fn strike_gone(pid: i32) {
    with(|ledger| {
        let Some(ledger) = ledger else { return };
        if ledger.slots.get(&pid).is_some_and(|(_, start)| !is_running(pid, *start)) {
            ledger.strike(pid);
        }
    });
}

fn with(body: impl FnOnce(&mut Option<Ledger>)) {
    // An error: forked behind our back, so it is not this process's.
    if let Ok(Some(ledger)) = LEDGER.get() {
        body(&mut lock(ledger));
    }
}

impl Ledger {
    fn strike(&mut self, pid: i32) {
        if let Some((slot, _)) = self.slots.remove(&pid) {
            self.free.push(slot);
            self.write(slot, "");
        }
    }

    fn write(&mut self, slot: u64, text: &str) {
        let cut = &text[..text.floor_char_boundary(SLOT - 1)];
        let written = write_at(&self.file, padded(cut, SLOT).as_bytes(), HEAD as u64 + slot * SLOT as u64);
        if let Err(errno) = written
            && !std::mem::replace(&mut self.broken, true)
        {
            tracing::warn!(target: "tractor_host.supervisor", kind = "fault", "`tractor-host reap` will not know all that this process made: {errno}");
        }
    }
}

/// A line of so many bytes.
fn padded(text: &str, length: usize) -> String {
    format!("{text}{}\n", " ".repeat(length - 1 - text.len()))
}

fn write_at(file: &OwnedFd, bytes: &[u8], at: u64) -> rustix::io::Result<()> {
    match rustix::io::pwrite(file, bytes, at)? {
        count if count == bytes.len() => Ok(()),
        _ => Err(Errno::NOSPC),
    }
}

/// A ledger, as somebody else reads it.
#[derive(Debug, Clone)]
pub struct Record {
    /// Who the host is.
    pub head: Head,
    /// What it had made and not seen the end of.
    pub made: Vec<Made>,
    /// How many lines make no sense.
    pub unreadable: usize,
}

/// Whether the host of a ledger is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// It is.
    Alive,
    /// It is not; and what it has noted of processes is about this boot, and numbers that mean the same here.
    Dead,
    /// It is not, and its processes can't be either, or can't be told from others.
    Past,
}

impl Record {
    /// Reads one.
    ///
    /// # Errors
    /// When it is none; the operating system's.
    pub fn read(folder: &Folder, name: &str) -> Result<Self> {
        let failed = |errno: Errno| Error::os(format_args!("read `{}`", folder.join(name).display()), errno);
        let file = open_existing(folder, name)?;
        let size = rustix::fs::fstat(&file).map_err(failed)?.st_size.unsigned_abs();
        if size > LONGEST {
            return Err(Error::protocol(format!("`{}` is too long", folder.join(name).display())));
        }
        let mut bytes = Vec::with_capacity(size as usize);
        while (bytes.len() as u64) < LONGEST {
            let mut chunk = [0; 1 << 14];
            match rustix::io::pread(&file, &mut chunk, bytes.len() as u64) {
                Ok(0) => break,
                Ok(count) => bytes.extend_from_slice(&chunk[..count]),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        Self::parse(&bytes)
            .ok_or_else(|| Error::protocol(format!("`{}` is no record", folder.join(name).display())))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let head: Head = serde_json::from_slice(bytes.get(..HEAD)?).ok()?;
        if head.version != VERSION || head.pid <= 0 {
            return None;
        }
        let (mut made, mut unreadable) = (Vec::new(), 0);
        for slot in bytes[HEAD..].chunks(SLOT) {
            let text = String::from_utf8_lossy(slot);
            match text.trim_end() {
                "" => {}
                line => match read_line(line) {
                    Some(process) => made.push(process),
                    None => unreadable += 1,
                },
            }
        }
        Some(Self { head, made, unreadable })
    }

    /// Whether the host is there. Its lock says so, whatever a process's number may mean here; and so does its
    /// process, should the lock have been lost.
    ///
    /// # Errors
    /// When the lock can't be tried.
    pub fn life(&self, folder: &Folder, name: &str) -> Result<(Life, Hold)> {
        let file = open_existing(folder, name)?;
        match rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::AGAIN | Errno::ACCESS) => return Ok((Life::Alive, Hold(None))),
            Err(errno) => {
                return Err(Error::os(format_args!("lock `{}`", folder.join(name).display()), errno));
            }
        }
        let head = &self.head;
        let own_namespace = procfs::pid_namespace(process::id());
        let life = if procfs::boot_id().is_none_or(|boot| boot != head.boot)
            || own_namespace.is_none_or(|namespace| namespace != head.namespace)
        {
            Life::Past
        } else if is_running(head.pid, head.start) {
            Life::Alive
        } else {
            Life::Dead
        };
        Ok((life, Hold(Some(file))))
    }
}

/// A dead host's lock, held by who looks after what it left; for that time nobody else does.
#[derive(Debug, Default)]
pub struct Hold(#[allow(dead_code)] Option<OwnedFd>);

/// Whether the process that was started then is there, and has not ended.
pub fn is_running(pid: i32, start: u64) -> bool {
    procfs::stat_of(pid).is_some_and(|stat| stat.start == start && !matches!(stat.state, 'Z' | 'X'))
}

fn open_existing(folder: &Folder, name: &str) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::openat(folder, name, flags, Mode::empty())
        .map_err(|errno| Error::os(format_args!("open `{}`", folder.join(name).display()), errno))
}

fn read_line(line: &str) -> Option<Made> {
    let mut words = line.splitn(4, ' ');
    let pid = words.next()?.parse().ok().filter(|pid| *pid > 0)?;
    let start = words.next()?.parse().ok()?;
    Some(Made { pid, start, kind: words.next()?.to_owned(), name: words.next().unwrap_or("").to_owned() })
}
