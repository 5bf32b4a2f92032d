//! What the machine offers: each thing found out by using it, where that does no harm.

use rustix::fs::MemfdFlags;
use rustix::process::{PidfdFlags, Resource, Signal, WaitId, WaitIdOptions};

use super::Finding;
use crate::sys::runtime_folder::{self, Folder};
use crate::sys::{process, procfs};

/// All there is to say of it.
pub(super) fn examine() -> Vec<Finding> {
    let mut found = vec![
        Finding::good("kernel", kernel()),
        Finding::or_unusable("pidfd", pidfd(), "no worker process can be watched, signalled or reaped"),
        Finding::or_unusable("proc", proc(), "neither threads nor descriptors can be told"),
        Finding::or_unusable("memfd", memfd(), "no worker process can be started, no output collected"),
    ];
    found.extend([
        Finding::or_degraded("clone3", clone3(), "the fork server falls back on clone(2)"),
        Finding::or_degraded(
            "close_range",
            close_range(),
            "an `exec` worker keeps the descriptors that this program had marked inheritable",
        ),
        Finding::or_degraded(
            "subreaper",
            subreaper(),
            "what a worker leaves behind by double forks is not found again",
        ),
        Finding::or_degraded(
            "own stacks",
            own_memory(),
            "quarantined workers and `tractor-host ps` are without Python calls",
        ),
        Finding::or_degraded(
            "hidepid",
            hidepid(),
            "`tractor-host ps` can't say what worker processes wait for",
        ),
        Finding::or_degraded("processes", processes(), "few workers can be had at a time"),
        Finding::or_degraded(
            "descriptors",
            descriptors(),
            "about a fourth as many workers can be had at a time",
        ),
        Finding::or_degraded("shared memory", shared_memory(), "multiprocessing's own locks and arrays fail"),
        Finding::or_degraded(
            "runtime folder",
            runtime_folder(),
            "`tractor-host ps` and `reap` will not see your programs",
        ),
        Finding::good("seccomp", seccomp()),
        Finding::good("ptrace", ptrace()),
        Finding::good("cgroup", cgroup()),
    ]);
    found
}

fn kernel() -> String {
    let name = rustix::system::uname();
    let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    format!(
        "{} {}, {}, {processors} processors",
        text(name.sysname()),
        text(name.release()),
        text(name.machine())
    )
}

/// Starts a child, ends it and reaps it, all by its descriptor.
fn pidfd() -> Result<String, String> {
    use std::process::{Command, Stdio};
    let failed = |what: &str, error: std::io::Error| format!("failed to {what}: {error}");
    let own = std::env::current_exe().map_err(|error| failed("find the launcher", error))?;
    // It waits for its stdin, which stays open.
    let code = "import sys; sys.stdin.read()";
    let mut command = Command::new(own);
    command
        .args(["run", "-I", "-S", "-c", code])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| failed("start a process", error))?;
    let outcome = (|| {
        let pid =
            i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw).ok_or("no process id")?;
        let fd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .map_err(|errno| failed("open a pidfd", errno.into()))?;
        rustix::process::pidfd_send_signal(&fd, Signal::KILL)
            .map_err(|errno| failed("send a signal by pidfd", errno.into()))?;
        let status =
            rustix::process::waitid(WaitId::PidFd(std::os::fd::AsFd::as_fd(&fd)), WaitIdOptions::EXITED)
                .map_err(|errno| failed("wait by pidfd", errno.into()))?;
        match status.and_then(|status| status.terminating_signal()) {
            Some(libc::SIGKILL) => Ok("processes can be signalled and reaped by descriptor".into()),
            other => Err(format!("a killed process ended by {other:?}")),
        }
    })();
    if outcome.is_err() {
        // Whatever did not work, no child stays. It fails only where there is none any more.
        let _ = child.kill().and_then(|()| child.wait());
    }
    outcome
}

fn proc() -> Result<String, String> {
    procfs::threads().map(|_| "/proc is mounted".into()).map_err(|error| error.to_string())
}

fn memfd() -> Result<String, String> {
    rustix::fs::memfd_create("th-doctor", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map(|_| "files in memory can be made, and sealed".into())
        .map_err(|errno| format!("failed to make a file in memory: {errno}"))
}

fn clone3() -> Result<String, String> {
    match process::probe_clone3() {
        Ok(()) => Ok("processes can be forked with a descriptor".into()),
        Err(error) => Err(format!("clone3(2) is refused: {error}")),
    }
}

fn close_range() -> Result<String, String> {
    match crate::sys::fd::probe_close_range() {
        Ok(()) => Ok("descriptors can be closed at once".into()),
        Err(error) => Err(format!("close_range(2) is refused: {error}")),
    }
}

fn subreaper() -> Result<String, String> {
    process::be_subreaper().map_err(|error| error.to_string())?;
    // This process starts nothing that it does not wait for; but it is to be as it was.
    rustix::process::set_child_subreaper(None).map_err(|errno| errno.to_string())?;
    Ok("a worker inherits what its processes leave behind".into())
}

fn own_memory() -> Result<String, String> {
    std::fs::File::open("/proc/self/mem")
        .map(|_| "the memory of this process can be read from outside its threads".into())
        .map_err(|error| format!("/proc/self/mem cannot be opened: {error}"))
}

fn hidepid() -> Result<String, String> {
    // Whose it is does not matter: what hides others hides the first.
    match std::fs::metadata("/proc/1") {
        Ok(_) => Ok("processes are visible".into()),
        Err(error) => Err(format!("/proc hides processes: {error}")),
    }
}

fn limit(what: Resource) -> (Option<u64>, String) {
    let limit = rustix::process::getrlimit(what).current;
    (limit, limit.map_or("no limit".into(), |limit| limit.to_string()))
}

fn processes() -> Result<String, String> {
    /// A fork server, a blank, and a tree of workers.
    const FEW: u64 = 256;
    let (limit, text) = limit(Resource::Nproc);
    if limit.is_some_and(|limit| limit < FEW) { Err(format!("at most {text} (ulimit -u)")) } else { Ok(text) }
}

fn descriptors() -> Result<String, String> {
    /// Four for each of a hundred workers, and the program's own.
    const FEW: u64 = 512;
    let (limit, text) = limit(Resource::Nofile);
    let text = format!("{text} (ulimit -n)");
    if limit.is_some_and(|limit| limit < FEW) { Err(format!("at most {text}")) } else { Ok(text) }
}

fn shared_memory() -> Result<String, String> {
    const FEW: u64 = 64 << 20;
    let found = rustix::fs::statvfs("/dev/shm").map_err(|errno| format!("there is no /dev/shm: {errno}"))?;
    let (size, free) = (found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize);
    let text = format!("/dev/shm of {} MiB, {} MiB free", size >> 20, free >> 20);
    if free < FEW { Err(text) } else { Ok(text) }
}

fn runtime_folder() -> Result<String, String> {
    if runtime_folder::is_declined() {
        return Err(format!("{}=0 is set", runtime_folder::VARIABLE));
    }
    match Folder::provide(&runtime_folder::places()) {
        Ok(folder) => Ok(folder.path().display().to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// A filter is no fault of its own; what it refuses shows in the other findings.
fn seccomp() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:")).map(str::trim);
    match mode {
        Some("0") => "no filter".into(),
        Some(mode) => format!("a filter is active (mode {mode}): it may refuse more than is seen here"),
        None => "not in this kernel".into(),
    }
}

/// Only who looks into other processes needs it, and that is nobody who kills.
fn ptrace() -> String {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    match scope.as_deref().map(str::trim) {
        Ok("0") | Err(_) => "a program of yours may look into another".into(),
        Ok("1") => "a program may look into those that it has started (yama 1)".into(),
        Ok(other) => format!("only root may look into another program (yama {other})"),
    }
}

/// Groups bound what workers use; nothing of ours needs them.
fn cgroup() -> String {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::")) else {
        return "version 1, or none: out-of-memory kills are told by the machine's counter".into();
    };
    let folder = format!("/sys/fs/cgroup{path}");
    let controllers = std::fs::read_to_string(format!("{folder}/cgroup.controllers")).unwrap_or_default();
    let delegated =
        rustix::fs::access(format!("{folder}/cgroup.subtree_control"), rustix::fs::Access::WRITE_OK);
    format!(
        "version 2 at {path}, {}, {}",
        if delegated.is_ok() { "may be divided" } else { "may not be divided" },
        if controllers.trim().is_empty() {
            "no controllers".to_owned()
        } else {
            format!("controllers {}", controllers.trim().replace(' ', ", "))
        }
    )
}
