//! `doctor`: whether this machine has what tractor-host needs, found out by using it.

use std::process::{Command, Stdio};

use rustix::fs::MemfdFlags;
use rustix::process::{PidfdFlags, Signal, WaitId, WaitIdOptions};

use super::{print, python};

/// The exit code when something is missing.
const MISSING: i32 = 1;

/// What was looked at, and what came of it: good to know, or what is missing.
type Finding = (&'static str, Result<String, String>);

/// Looks at everything, prints it, and returns 0 if nothing is missing.
pub(super) fn examine() -> i32 {
    let mut findings: Vec<Finding> = vec![("tractor-host", Ok(env!("CARGO_PKG_VERSION").into()))];
    findings.extend(embedded_python());
    findings.extend([
        ("kernel", Ok(kernel())),
        ("pidfd", pidfd().map(|()| "processes can be signalled and reaped by descriptor".into())),
        ("memfd", memfd().map(|()| "files in memory can be made".into())),
        ("seccomp", seccomp()),
    ]);
    let mut text = String::new();
    let mut missing = Vec::new();
    for (name, found) in &findings {
        let (mark, what) = match found {
            Ok(what) => ("  ", what),
            Err(what) => ("! ", what),
        };
        if found.is_err() {
            missing.push(*name);
        }
        text.push_str(&format!("{mark}{name:<14}{what}\n"));
    }
    text.push_str(&if missing.is_empty() {
        "everything is there\n".into()
    } else {
        format!("missing: {}\n", missing.join(", "))
    });
    match print(&text) {
        0 if missing.is_empty() => 0,
        0 => MISSING,
        failed => failed,
    }
}

/// Starts the embedded Python, in a process of its own, and asks it.
fn embedded_python() -> Vec<Finding> {
    const CODE: &str = "import sys\n\
        print(sys.version.split()[0], sys.implementation.name)\n\
        print(sys.executable)\n\
        print(sys.prefix)\n\
        try:\n    from tractor_host import __version__, __file__, rungs\n\
        except ImportError as error: print('!', error)\n\
        else:\n\
        \x20   print(__version__, __file__, sep='\\t')\n\
        \x20   for rung, missing in rungs('subint').items(): print(rung, missing or '', sep='\\t')\n";
    let executable = match python::executable() {
        Ok(executable) => executable,
        Err(reason) => return vec![("python", Err(reason))],
    };
    let own = std::env::current_exe().unwrap_or_else(|_| "tractor-host".into());
    let output = Command::new(own).args(["run", "-P", "-c", CODE]).stdin(Stdio::null()).output();
    let (told, complaint) = match &output {
        Ok(output) => (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)),
        Err(error) => ("".into(), error.to_string().into()),
    };
    let lines: Vec<&str> = told.lines().collect();
    let [version, found, prefix, package, ref rungs @ ..] = lines[..] else {
        let what = format!("{} cannot be started: {}", executable.display(), complaint.trim());
        return vec![("python", Err(what))];
    };
    vec![
        ("python", Ok(format!("{version}, {found}"))),
        ("environment", Ok(prefix.into())),
        ("tractor_host", package_of(package)),
        ("ladder", ladder_of(rungs)),
    ]
}

/// The rungs for subinterpreters, and which are missing.
fn ladder_of(lines: &[&str]) -> Result<String, String> {
    let (mut names, mut missing) = (Vec::new(), Vec::new());
    for (rung, reason) in lines.iter().filter_map(|line| line.split_once('\t')) {
        names.push(rung);
        if !reason.is_empty() {
            missing.push(format!("`{rung}` is missing: {reason}"));
        }
    }
    match (names.as_slice(), missing.as_slice()) {
        ([], _) => Err("the package tells of none".into()),
        (_, []) => Ok(names.join(", ")),
        _ => Err(missing.join("; ")),
    }
}

/// The Python package must be the launcher's own: they speak to each other.
fn package_of(line: &str) -> Result<String, String> {
    let own = env!("CARGO_PKG_VERSION");
    match line.split_once('\t') {
        Some((version, path)) if version == own => Ok(format!("{version}, {path}")),
        Some((version, path)) => Err(format!("{path} is version {version}, not {own}")),
        None => Err(line.trim_start_matches("! ").into()),
    }
}

fn kernel() -> String {
    let name = rustix::system::uname();
    let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
    format!("{} {}, {}", text(name.sysname()), text(name.release()), text(name.machine()))
}

/// Starts a child, ends it and reaps it, all by its descriptor.
fn pidfd() -> Result<(), String> {
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
            Some(libc::SIGKILL) => Ok(()),
            other => Err(format!("a killed process ended by {other:?}")),
        }
    })();
    if outcome.is_err() {
        // Whatever did not work, no child stays. It fails only where there is none any more.
        let _ = child.kill().and_then(|()| child.wait());
    }
    outcome
}

fn memfd() -> Result<(), String> {
    rustix::fs::memfd_create("th-doctor", MemfdFlags::CLOEXEC)
        .map(drop)
        .map_err(|errno| format!("failed to make a file in memory: {errno}"))
}

/// A filter is no fault of its own; what it refuses shows in the other findings.
fn seccomp() -> Result<String, String> {
    let status = std::fs::read_to_string("/proc/self/status")
        .map_err(|error| format!("/proc/self/status cannot be read: {error}"))?;
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:")).map(str::trim);
    Ok(match mode {
        Some("0") => "no filter".into(),
        Some(mode) => format!("a filter is active (mode {mode}): it may refuse more than is seen here"),
        None => "not in this kernel".into(),
    })
}
