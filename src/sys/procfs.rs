//! What /proc says of this process, and of others.

use std::os::fd::RawFd;

use crate::error::{Error, Result};

/// What the kernel calls a thread of this process.
pub fn thread_name(thread: i32) -> Option<String> {
    let name = std::fs::read_to_string(format!("/proc/self/task/{thread}/comm")).ok()?;
    Some(name.trim_end().to_owned())
}

/// The fds that are open, but for the one used to look.
///
/// # Errors
/// The operating system's, when /proc is not mounted.
pub fn open_fds() -> Result<Vec<RawFd>> {
    numbers("/proc/self/fd")
}

/// The kernel's ids of this process's threads.
///
/// # Errors
/// The operating system's, when /proc is not mounted.
pub fn threads() -> Result<Vec<i32>> {
    numbers("/proc/self/task")
}

/// The names of this process's threads, in no order.
///
/// # Errors
/// The operating system's, when /proc is not mounted.
pub fn thread_names() -> Result<Vec<String>> {
    let names = threads()?.into_iter().filter_map(|id| {
        // A thread that ended since it was listed has no name any more.
        let name = std::fs::read_to_string(format!("/proc/self/task/{id}/comm")).ok()?;
        Some(name.trim_end().to_owned())
    });
    Ok(names.collect())
}

/// The pids of this process's direct children, zombies included.
///
/// # Errors
/// The operating system's, when /proc is not mounted.
pub fn children() -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for thread in threads()? {
        found.extend(children_of(thread)?);
    }
    Ok(found)
}

/// The pids of the direct children that one thread of this process has made, zombies included. A
/// thread's children pass to another one when it ends.
///
/// # Errors
/// The operating system's, when /proc is not mounted.
pub fn children_of(thread: i32) -> Result<Vec<i32>> {
    children_list(&format!("/proc/self/task/{thread}/children"))
}

fn children_list(path: &str) -> Result<Vec<i32>> {
    match std::fs::read_to_string(path) {
        Ok(list) => Ok(list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()),
        // The thread has ended: its children are another one's now.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Error::os(format_args!("read `{path}`"), error)),
    }
}

/// The pids of the direct children of any process, zombies included; none when it has ended or /proc is
/// not mounted.
pub fn children_of_process(pid: i32) -> Vec<i32> {
    let mut found = Vec::new();
    for thread in numbers(&format!("/proc/{pid}/task")).unwrap_or_default() {
        found.extend(children_list(&format!("/proc/{pid}/task/{thread}/children")).unwrap_or_default());
    }
    found
}

/// Whether no thread of a process can run on by itself: it is stopped, or has ended.
pub fn has_stopped(pid: i32) -> bool {
    let threads = numbers(&format!("/proc/{pid}/task")).unwrap_or_default();
    threads.into_iter().all(|thread| {
        let state = state(&format!("/proc/{pid}/task/{thread}/stat"));
        state.is_none_or(|state| matches!(state, 'T' | 't' | 'Z' | 'X'))
    })
}

/// Whether a process has ended and was not waited for.
pub fn is_zombie(pid: i32) -> bool {
    state(&format!("/proc/{pid}/stat")).is_none_or(|state| matches!(state, 'Z' | 'X'))
}

/// What a `stat` file says of a process or thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// R, S, D, T, t, Z, X or I.
    pub state: char,
    /// The parent process.
    pub parent: i32,
    /// The time that it has run for, in clock ticks.
    pub ticks: u64,
    /// When it was started, in clock ticks since the boot.
    pub start: u64,
    /// Resident memory, in bytes.
    pub resident: u64,
}

/// What there is to say of a process; `None` when there is none by that number.
pub fn stat_of(pid: i32) -> Option<Stat> {
    stat(&format!("/proc/{pid}/stat"))
}

/// The same for one thread of a process.
pub fn stat_of_thread(pid: i32, thread: i32) -> Option<Stat> {
    stat(&format!("/proc/{pid}/task/{thread}/stat"))
}

fn stat(path: &str) -> Option<Stat> {
    use std::io::Read;
    // Longer than any; one read, as this is asked for every process that is made.
    let mut bytes = [0; 1024];
    let count = std::fs::File::open(path).ok()?.read(&mut bytes).ok()?;
    let text = std::str::from_utf8(&bytes[..count]).ok();
    // The name, which may hold anything, is in parentheses.
    let behind = match text {
        Some(text) => text.rsplit_once(')')?.1,
        None => std::str::from_utf8(bytes[..count].rsplit(|byte| *byte == b')').next()?).ok()?,
    };
    let fields: Vec<&str> = behind.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        ticks: number(11)? + number(12)?,
        start: number(19)?,
        resident: number(21)? * rustix::param::page_size() as u64,
    })
}

/// Seconds since the boot, by the clock that processes' starts are told by.
pub fn uptime() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// Which boot of this machine it is.
pub fn boot_id() -> Option<String> {
    Some(std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned())
}

/// The namespace that a process's ids are of.
pub fn pid_namespace(pid: i32) -> Option<String> {
    Some(std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok()?.to_string_lossy().into_owned())
}

/// The program that a process runs.
pub fn executable(pid: i32) -> Option<String> {
    Some(std::fs::read_link(format!("/proc/{pid}/exe")).ok()?.to_string_lossy().into_owned())
}

/// What a process was started with; empty when there is none by that number.
pub fn arguments(pid: i32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = bytes.strip_suffix(b"\0").unwrap_or(&bytes).split(|byte| *byte == 0);
    words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// Where in the kernel a thread waits; `None` when it does not, or that is not told.
pub fn wait_channel(pid: i32, thread: i32) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/wchan")).ok()?;
    Some(text).filter(|text| !matches!(text.as_str(), "" | "0"))
}

/// The state in a `stat` file: behind the name, which may hold anything.
fn state(path: &str) -> Option<char> {
    let text = std::fs::read_to_string(path).ok()?;
    text.rsplit_once(')')?.1.trim_start().chars().next()
}

/// Resident memory, in bytes.
///
/// # Errors
/// The operating system's, when /proc is not mounted.
pub fn resident_bytes() -> Result<u64> {
    let path = "/proc/self/statm";
    let text =
        std::fs::read_to_string(path).map_err(|error| Error::os(format_args!("read `{path}`"), error))?;
    let pages: u64 = text.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    Ok(pages * rustix::param::page_size() as u64)
}

/// The name of a process; `None` when there is none by that number.
pub fn name_of(pid: i32) -> Option<String> {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end().to_owned())
}

/// The file mode creation mask of this process. The call that would tell changes it too.
pub fn umask() -> Option<u32> {
    let status = std::fs::read_to_string("/proc/thread-self/status").ok()?;
    let mask = status.lines().find_map(|line| line.strip_prefix("Umask:"))?;
    u32::from_str_radix(mask.trim(), 8).ok()
}

/// What a process may do and see, as far as it hands that on to those that it starts: its user, groups and
/// capabilities, filters of its system calls, namespaces, root directory and control groups.
///
/// # Errors
/// The operating system's, when /proc is not mounted, or the process has ended or hides this.
pub fn confinement(pid: i32) -> Result<Vec<String>> {
    const STATUS: [&str; 9] = [
        "Uid:",
        "Gid:",
        "Groups:",
        "CapPrm:",
        "CapEff:",
        "CapBnd:",
        "NoNewPrivs:",
        "Seccomp:",
        "Seccomp_filters:",
    ];
    const LINKS: [&str; 8] =
        ["root", "ns/cgroup", "ns/ipc", "ns/mnt", "ns/net", "ns/pid_for_children", "ns/user", "ns/uts"];
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        std::fs::read_to_string(&path).map_err(|error| Error::os(format_args!("read `{path}`"), error))
    };
    let mut found: Vec<String> = read("status")?
        .lines()
        .filter(|line| STATUS.iter().any(|start| line.starts_with(start)))
        .map(str::to_owned)
        .collect();
    found.push(read("cgroup")?);
    for name in LINKS {
        let path = format!("/proc/{pid}/{name}");
        match std::fs::read_link(&path) {
            Ok(link) => found.push(format!("{name} {}", link.display())),
            // This kernel has no such namespace.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::os(format_args!("read `{path}`"), error)),
        }
    }
    Ok(found)
}

pub(super) fn numbers(path: &str) -> Result<Vec<i32>> {
    let entries = std::fs::read_dir(path).map_err(|error| Error::os(format_args!("read `{path}`"), error))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Error::os(format_args!("read `{path}`"), error))?;
        found.extend(entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(found)
}

/// Whether an fd that was listed is still open: the one that listed them is not.
pub fn is_open(fd: RawFd) -> bool {
    std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok()
}
