//! The hosts of this user: found by their records, asked over their sockets. A host that does not answer is known by
//! its record and by /proc.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::events::fault;
use crate::sys::ledger::{Hold, Life, Record, SOCKET_SUFFIX, SUFFIX, is_running, own_stem};
use crate::sys::runtime_folder::{Folder, places};
use crate::sys::{process, thread, unix_socket};
use crate::wire::control::{Reply, Request};
use crate::wire::frame::Decoder;
use crate::wire::message::{decode, encode};

/// A host, dead or alive.
#[derive(Debug)]
pub struct Host {
    /// Where its files are.
    pub folder: std::sync::Arc<Folder>,
    /// What they are called, without what tells them apart.
    pub stem: String,
    /// What it has written down.
    pub record: Record,
    /// Whether it is there.
    pub life: Life,
    /// Nobody else looks after what it has left, while this is there.
    pub hold: Hold,
}

/// As [`find`], for who means to look after what the dead ones left: one that somebody else looks after counts as
/// alive.
pub fn find_and_hold() -> (Vec<Host>, Vec<String>) {
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for place in places() {
        match Folder::open(&place) {
            Ok(folder) => find_in(folder, &mut found, &mut problems),
            // There is none.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => problems.push(error.to_string()),
        }
    }
    found.sort_by_key(|host| (host.record.head.pid, host.record.head.start));
    (found, problems)
}

/// All hosts of this user, by process id, and what could not be read.
pub fn find() -> (Vec<Host>, Vec<String>) {
    let (mut found, problems) = find_and_hold();
    found.iter_mut().for_each(|host| host.hold = Hold::default());
    (found, problems)
}

fn find_in(folder: Folder, found: &mut Vec<Host>, problems: &mut Vec<String>) {
    let folder = std::sync::Arc::new(folder);
    let names = folder.names().unwrap_or_else(|error| {
        problems.push(error.to_string());
        Vec::new()
    });
    for name in names {
        let Some(stem) = name.strip_suffix(SUFFIX) else { continue };
        match look(&folder, &name) {
            Ok((record, life, hold)) => {
                found.push(Host { folder: folder.clone(), stem: stem.to_owned(), record, life, hold });
            }
            // It has ended meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => problems.push(error.to_string()),
        }
    }
}

fn look(folder: &Folder, name: &str) -> Result<(Record, Life, Hold)> {
    let record = Record::read(folder, name)?;
    let (life, hold) = record.life(folder, name)?;
    Ok((record, life, hold))
}

impl Host {
    /// Where its record is.
    pub fn record_path(&self) -> String {
        self.folder.join(&format!("{}{SUFFIX}", self.stem)).display().to_string()
    }

    /// Whether it has not taken its record away meanwhile, as one does that ends.
    pub fn record_is_there(&self) -> bool {
        Record::read(&self.folder, &format!("{}{SUFFIX}", self.stem)).is_ok()
    }

    /// Removes its socket and its record, and the other files that it had. What could not be removed.
    pub fn remove_files(&self) -> Vec<String> {
        let mut left = Vec::new();
        for own in &self.record.head.files {
            left.extend(own.remove().err().map(|error| error.to_string()));
        }
        if left.is_empty() {
            // Last, as it is what the others are found by.
            left.extend(
                self.folder.remove(&format!("{}{SUFFIX}", self.stem)).err().map(|error| error.to_string()),
            );
        }
        left
    }

    /// The processes that it had made and that are still there.
    pub fn survivors(&self) -> Vec<&crate::sys::ledger::Made> {
        match self.life {
            Life::Past => Vec::new(),
            Life::Alive | Life::Dead => {
                self.record.made.iter().filter(|made| is_running(made.pid, made.start)).collect()
            }
        }
    }
}

/// Removes what hosts that were killed have left in the folder, where that is nothing but files: there is nothing to
/// decide about those, and they would be there until the next boot. For a new host; what it can't do it leaves.
pub fn sweep(folder: &Folder) {
    /// Enough to keep up with any number of hosts that are killed.
    const AT_MOST: usize = 16;
    let Ok(names) = folder.names() else { return };
    let own = own_stem().unwrap_or_default();
    let mut others: Vec<&str> =
        names.iter().filter_map(|name| name.strip_suffix(SUFFIX)).filter(|stem| *stem != own).collect();
    // Where there are more, each new host looks at others of them.
    let turn = process::id().unsigned_abs() as usize % others.len().max(1);
    others.rotate_left(turn);
    for stem in others.into_iter().take(AT_MOST) {
        let Ok((record, life, _hold)) = look(folder, &format!("{stem}{SUFFIX}")) else { continue };
        let quiet = match life {
            Life::Alive => false,
            Life::Past => true,
            Life::Dead => !record.made.iter().any(|made| is_running(made.pid, made.start)),
        };
        if quiet && record.unreadable == 0 {
            let removed: Result<Vec<bool>> = record.head.files.iter().map(|own| own.remove()).collect();
            if let Err(error) = removed.and_then(|_| folder.remove(&format!("{stem}{SUFFIX}"))) {
                fault!("{error}");
            }
        }
    }
}

/// Asks all of these at once, and gives each until the deadline to answer: the JSON document, or why there is none.
pub fn ask(hosts: &[&Host], request: Request, deadline: Instant) -> Vec<Result<Vec<u8>>> {
    // The longest wait that one of them is given when another one has used up all the time.
    const LEAST: Duration = Duration::from_millis(10);
    let asked: Vec<Result<OwnedFd>> = hosts.iter().map(|host| begin(host, request)).collect();
    let answers = asked.into_iter().map(|asked| {
        let socket = asked?;
        hear(&socket, deadline.max(Instant::now() + LEAST))
    });
    answers.collect()
}

fn begin(host: &Host, request: Request) -> Result<OwnedFd> {
    let socket = unix_socket::connect(&host.folder, &format!("{}{SOCKET_SUFFIX}", host.stem))?;
    // There is room for it.
    crate::sys::fd::write_all(&socket, &encode(&request, 0)?).map_err(|error| Error::os("ask it", error))?;
    Ok(socket)
}

fn hear(socket: &OwnedFd, deadline: Instant) -> Result<Vec<u8>> {
    let mut decoder = Decoder::new();
    let mut chunk = vec![0; 1 << 16];
    loop {
        if let Some(frame) = decoder.next_frame()? {
            return match decode(&frame, "a host's answer")? {
                Reply::Answer => Ok(frame.payload),
                Reply::Refused { reason } => Err(Error::state(reason)),
            };
        }
        match rustix::io::read(socket, &mut chunk) {
            Ok(0) => return Err(Error::state("it has closed the connection")),
            Ok(count) => decoder.push(&chunk[..count]),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(Error::timed_out("it does not answer"));
                }
                let mut readable = [PollFd::new(socket, PollFlags::IN)];
                match rustix::event::poll(&mut readable, Some(&thread::timespec(left))) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(Error::os("wait for its answer", errno)),
                }
            }
            Err(errno) => return Err(Error::os("hear its answer", errno)),
        }
    }
}
