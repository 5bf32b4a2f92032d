//! Processes by pidfd, so that a reused pid is never hit; and what a new process does to itself.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use crate::error::{Error, Result};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It left with this exit code.
    Exited(i32),
    /// A signal ended it.
    Signalled {
        /// The signal's number.
        signal: i32,
        /// Whether it left a core file.
        core: bool,
    },
    /// Somebody else took the status (another waiter, or SIGCHLD is ignored).
    Lost,
}

/// A child of this process, by pidfd.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Child {
    /// Takes hold of a child that was just made and has not been waited for.
    ///
    /// # Errors
    /// ESRCH when somebody reaped it already, EMFILE when no fd is left. The child is killed then.
    pub fn adopt(pid: i32) -> Result<Self> {
        let pid = Pid::from_raw(pid).ok_or_else(|| Error::invalid("0 is no process id"))?;
        match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self { pid, pidfd }),
            Err(errno) => {
                if errno != Errno::SRCH {
                    // It is our unreaped child, so the pid can't have been reused.
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                    let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
                }
                Err(Error::os(format_args!("open a pidfd of process {pid}"), errno))
            }
        }
    }

    /// The process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// The pidfd; readable once the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Sends a signal. A process that is gone already is no error.
    ///
    /// # Errors
    /// The operating system's, but for ESRCH.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(Error::os(format_args!("send {signal:?} to process {}", self.pid()), errno)),
        }
    }

    /// Kills what is left of the process group that the child leads. Only right while the child has
    /// not been reaped: until then its pid, and so the group's id, can't belong to anybody else.
    pub fn kill_group(&self) {
        // ESRCH: nothing is left, or it never made its own group. There is no other failure between
        // processes of one user, and none that a caller could act on.
        let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
    }

    /// Kills and reaps a child that nobody has use for. It waits for the kernel to carry that out.
    pub fn destroy(self) {
        // Failing means that it is gone or reaped already.
        let _ = self.signal(Signal::KILL);
        let _ = rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
    }

    /// The status if the process has ended, and `None` while it runs. Reaps it.
    ///
    /// # Errors
    /// The operating system's.
    pub fn try_wait(&self) -> Result<Option<Status>> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        loop {
            match rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
                Ok(None) => return Ok(None),
                Ok(Some(status)) => {
                    return Ok(Some(match (status.exit_status(), status.terminating_signal()) {
                        (Some(code), _) => Status::Exited(code),
                        (None, Some(signal)) => Status::Signalled { signal, core: status.dumped() },
                        (None, None) => Status::Lost,
                    }));
                }
                Err(Errno::INTR) => {}
                Err(Errno::CHILD) => return Ok(Some(Status::Lost)),
                Err(errno) => {
                    return Err(Error::os(format_args!("wait for process {}", self.pid()), errno));
                }
            }
        }
    }
}

/// Children of threads that must end, and that die with them.
#[derive(Debug, Default)]
pub struct Orphans(Vec<Child>);

impl Orphans {
    /// Kills the processes that `thread`, a thread of this process, has started and not waited for.
    ///
    /// # Errors
    /// When /proc is not mounted, or EMFILE.
    pub fn kill_children_of(&mut self, thread: i32) -> Result<()> {
        for pid in super::procfs::children_of(thread)? {
            if self.0.iter().any(|child| child.pid() == pid) {
                continue;
            }
            let Some(id) = Pid::from_raw(pid) else { continue };
            let pidfd = match rustix::process::pidfd_open(id, PidfdFlags::empty()) {
                Ok(pidfd) => pidfd,
                Err(Errno::SRCH) => continue, // reaped meanwhile
                Err(errno) => return Err(Error::os(format_args!("open a pidfd of process {pid}"), errno)),
            };
            // Had it been reaped and its pid reused since it was listed, it would not be listed now.
            if super::procfs::children_of(thread)?.contains(&pid) {
                let child = Child { pid: id, pidfd };
                child.signal(Signal::KILL)?;
                self.0.push(child);
            }
        }
        Ok(())
    }

    /// Reaps them. Each is waited for until `deadline` at the longest; what the kernel has not ended
    /// by then stays.
    pub fn reap(self, deadline: Instant) {
        for child in self.0 {
            let left = super::thread::timespec(deadline.saturating_duration_since(Instant::now()));
            let mut ended = [PollFd::new(&child.pidfd, PollFlags::IN)];
            // An error or a time-out: it is looked at once more below, and that is all there is to do.
            let _ = rustix::event::poll(&mut ended, Some(&left));
            // Failing: whoever started it has waited for it after all.
            let _ = child.try_wait();
        }
    }
}

/// The id of this process, asked of the kernel (a forked child's is its own).
pub fn id() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

/// The id of this process's parent; 0 when that is in another pid namespace.
pub fn parent_id() -> i32 {
    rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get())
}

/// Makes the kernel kill this process when the *thread* that forked it ends, and leaves at once if
/// the parent was gone before that was armed.
pub fn die_with_parent(parent: i32) {
    // It can only fail for a bad signal number.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    if parent_id() != parent {
        exit_now(ORPHANED);
    }
}

/// The exit code of a worker whose supervisor went away.
pub const ORPHANED: i32 = 0x6f;

/// Makes this process the leader of a process group of its own.
///
/// # Errors
/// The operating system's; none is known for a process that was just forked.
pub fn lead_own_group() -> Result<()> {
    rustix::process::setpgid(None, None).map_err(|errno| Error::os("make a process group", errno))
}

/// Ends this process at once: no handler, no buffer, no destructor runs.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit never returns and touches no memory of ours.
    unsafe { libc::_exit(code) }
}

/// fork(2), with glibc's own fork handlers (they make malloc usable in the child). Returns 0 in the
/// child.
///
/// # Errors
/// EAGAIN at the process limit, ENOMEM.
///
/// # Safety
/// The child has only this thread. Until it leaves or execs it may take no lock that another thread
/// of the parent could have held; the caller knows which those are.
pub unsafe fn fork() -> std::io::Result<i32> {
    // SAFETY: forwarded to the caller.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()),
        pid => Ok(pid),
    }
}
