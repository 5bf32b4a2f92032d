//! Processes by pidfd, so that a reused pid is never hit; and what a new process does to itself.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use rustix::thread::CpuSet;
use serde::{Deserialize, Serialize};

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

/// A process that this one may end, by pidfd; a child of it, mostly.
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
                let reaped =
                    if errno == Errno::SRCH { ", which has ended and somebody else has reaped" } else { "" };
                Err(Error::os(format_args!("open a pidfd of process {pid}{reaped}"), errno))
            }
        }
    }

    /// One whose pidfd is there already.
    ///
    /// # Errors
    /// When `pid` is none.
    pub fn from_parts(pid: i32, pidfd: OwnedFd) -> Result<Self> {
        let pid = Pid::from_raw(pid).ok_or_else(|| Error::invalid("0 is no process id"))?;
        Ok(Self { pid, pidfd })
    }

    /// Waits until the process has ended; whether it has by the deadline. It is not reaped.
    pub fn wait_until(&self, deadline: Instant) -> bool {
        loop {
            let left = super::thread::timespec(deadline.saturating_duration_since(Instant::now()));
            let mut ended = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match rustix::event::poll(&mut ended, Some(&left)) {
                Err(Errno::INTR) => {}
                outcome => return outcome == Ok(1),
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
        // While the number is its own for sure.
        super::ledger::strike(self.pid());
        // Failing means that it is gone or reaped already.
        let _ = self.signal(Signal::KILL);
        let _ = rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
    }

    /// The status if the process has ended, and `None` while it runs. Reaps it.
    ///
    /// # Errors
    /// The operating system's.
    pub fn try_wait(&self) -> Result<Option<Status>> {
        self.status(WaitIdOptions::empty())
    }

    /// The status if the process has ended, and `None` while it runs. It is not reaped.
    ///
    /// # Errors
    /// The operating system's.
    pub fn peek(&self) -> Result<Option<Status>> {
        self.status(WaitIdOptions::NOWAIT)
    }

    fn status(&self, how: WaitIdOptions) -> Result<Option<Status>> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | how;
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
            // If it has not ended, it is looked at once more below, and that is all there is to do.
            let _ = child.wait_until(deadline);
            // Failing: whoever started it has waited for it after all.
            let _ = child.try_wait();
        }
    }
}

/// Whether the kernel, and what filters its calls, knows clone3(2).
///
/// # Errors
/// ENOSYS, EPERM.
pub fn probe_clone3() -> std::io::Result<()> {
    // SAFETY: no arguments of no size: it is refused before anything is read or made.
    unsafe { libc::syscall(libc::SYS_clone3, std::ptr::null::<libc::c_void>(), 0usize) };
    match std::io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => Err(error),
        _ => Ok(()),
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

/// From now on the end of the thread that forked this process only makes it go on, should it be stopped.
/// For one that sees the end of its parent by itself, and has more to do then than to die.
pub fn go_on_without_parent() {
    // It can only fail for a bad signal number.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::CONT));
}

/// Makes this process the parent of all that its descendants leave behind.
///
/// # Errors
/// None is known.
pub fn be_subreaper() -> Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|errno| Error::os("become a subreaper", errno))
}

/// A descriptor that is readable once the parent has ended. It leaves at once if it has already.
///
/// # Errors
/// EMFILE.
pub fn parent_fd(parent: i32) -> Result<OwnedFd> {
    let opened = Pid::from_raw(parent).map(|id| rustix::process::pidfd_open(id, PidfdFlags::empty()));
    // Still the parent, so the number is still its own.
    if parent_id() != parent {
        exit_now(ORPHANED);
    }
    match opened {
        Some(Ok(pidfd)) => Ok(pidfd),
        Some(Err(errno)) => Err(Error::os("open a pidfd of the supervisor", errno)),
        None => Err(Error::state("the supervisor is in another pid namespace")),
    }
}

/// Whether this process has children, zombies included.
pub fn has_children() -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    !matches!(rustix::process::waitid(WaitId::All, options), Err(Errno::CHILD))
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

/// What a process may use of the machine, as far as its children have that from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Means {
    /// Resource limits: number, soft and hard, for all that this kernel knows.
    limits: Vec<(u32, u64, u64)>,
    /// The nice value.
    nice: i32,
    /// The processors that it may run on; empty where that can't be told.
    processors: Vec<usize>,
}

impl Means {
    /// Those of this process, and of the calling thread, of which a child would have the processors.
    pub fn own() -> Self {
        let set = rustix::thread::sched_getaffinity(None).ok();
        let processors = set.map(|set| (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect());
        Self {
            limits: limits(),
            nice: rustix::process::getpriority_process(None).unwrap_or(0),
            processors: processors.unwrap_or_default(),
        }
    }
}

fn limits() -> Vec<(u32, u64, u64)> {
    let mut found = Vec::new();
    for number in 0..32 {
        let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the kernel writes one rlimit64, or refuses a number that it does not know.
        if unsafe { libc::prlimit64(0, number, std::ptr::null(), &raw mut limit) } != 0 {
            break;
        }
        found.push((number, limit.rlim_cur, limit.rlim_max));
    }
    found
}

/// The real and effective user and group of this process.
pub fn user() -> [u32; 4] {
    use rustix::process::{getegid, geteuid, getgid, getuid};
    [getuid().as_raw(), geteuid().as_raw(), getgid().as_raw(), getegid().as_raw()]
}

/// Sets the file mode creation mask of this process.
pub fn set_umask(mask: u32) {
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(mask));
}

impl Child {
    /// Raises the child's nice value by so many steps, or lowers it.
    ///
    /// # Errors
    /// EPERM or EACCES, for what this process may not give.
    pub fn be_nicer(&self, steps: i32) -> Result<()> {
        let set = rustix::process::getpriority_process(Some(self.pid)).and_then(|nice| {
            rustix::process::setpriority_process(Some(self.pid), (nice + steps).clamp(-20, 19))
        });
        set.map_err(|errno| {
            let doing = "set the nice value of a worker; a process's priority above 1 takes the right to lower that \
                         (CAP_SYS_NICE)";
            Error::os(doing, errno)
        })
    }

    /// Gives the child these means, where it has others; `has` is what it has, if that is known.
    ///
    /// # Errors
    /// EPERM or EACCES, for what this process may not give.
    pub fn give(&self, means: &Means, has: Option<&Means>) -> Result<()> {
        if has.is_none_or(|has| means.limits != has.limits) {
            for &(number, soft, hard) in &means.limits {
                let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
                // SAFETY: the kernel reads one rlimit64.
                if unsafe { libc::prlimit64(self.pid(), number, &raw const limit, std::ptr::null_mut()) } != 0
                {
                    let error = std::io::Error::last_os_error();
                    return Err(Error::os(format_args!("set resource limit {number}"), error));
                }
            }
        }
        if has.is_none_or(|has| means.nice != has.nice) {
            rustix::process::setpriority_process(Some(self.pid), means.nice)
                .map_err(|errno| Error::os("set the nice value", errno))?;
        }
        if has.is_none_or(|has| means.processors != has.processors) && !means.processors.is_empty() {
            let mut set = CpuSet::new();
            means.processors.iter().filter(|&&cpu| cpu < CpuSet::MAX_CPU).for_each(|&cpu| set.set(cpu));
            rustix::thread::sched_setaffinity(Some(self.pid), &set)
                .map_err(|errno| Error::os("choose the processors", errno))?;
        }
        Ok(())
    }
}

/// Ends this process at once: no handler, no buffer, no destructor runs.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit never returns and touches no memory of ours.
    unsafe { libc::_exit(code) }
}

/// Has `handler` called in every child that this process forks from now on, before fork(2) returns
/// there. It cannot be taken back.
///
/// # Errors
/// ENOMEM.
pub fn at_fork_in_child(handler: extern "C" fn()) -> std::io::Result<()> {
    // SAFETY: `handler` is a function of this library, which is never unloaded.
    match unsafe { libc::pthread_atfork(None, None, Some(handler)) } {
        0 => Ok(()),
        code => Err(std::io::Error::from_raw_os_error(code)),
    }
}

/// Has `before` called before, and `after` after each fork(2) of this process, in it. It cannot be taken back.
///
/// # Errors
/// ENOMEM.
pub fn around_fork(before: extern "C" fn(), after: extern "C" fn()) -> std::io::Result<()> {
    // SAFETY: both are functions of this library, which is never unloaded.
    match unsafe { libc::pthread_atfork(Some(before), Some(after), None) } {
        0 => Ok(()),
        code => Err(std::io::Error::from_raw_os_error(code)),
    }
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

/// How often this process has forked since it was asked first, by whoever: what any code maps privately, a child
/// of a fork has too. In a child it is larger by one than it was.
pub fn forks() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static COUNTED: OnceLock<bool> = OnceLock::new();
    extern "C" fn count() {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the handler touches an atomic and nothing else, and this library is never unloaded.
    let is_counted = *COUNTED.get_or_init(|| unsafe { libc::pthread_atfork(Some(count), None, None) } == 0);
    if !is_counted {
        // There was no memory for it: as if there were a fork between any two questions.
        count();
    }
    COUNT.load(Ordering::Relaxed)
}

/// What a fork made: nothing new to know for the child, the child's pid and pidfd for who forked.
pub type Sibling = Option<(i32, OwnedFd)>;

/// Forks a child of this process's *parent*: that one reaps it, and its death signal follows that one.
///
/// It is glibc's fork in all that matters to a process with one thread: the thread's cached id and its
/// list of robust locks are put right. Handlers of `pthread_atfork` are not run.
///
/// # Errors
/// EAGAIN at the process limit, ENOMEM, EMFILE; ENOSYS where glibc's cache of the id is not found.
///
/// # Safety
/// This process has no other thread than the calling one.
pub unsafe fn fork_as_sibling() -> std::io::Result<Sibling> {
    static CACHE: OnceLock<Option<usize>> = OnceLock::new();
    let Some(cached_id) = *CACHE.get_or_init(find_cached_id) else {
        return Err(std::io::Error::from_raw_os_error(libc::ENOSYS));
    };
    let (mut robust_list, mut robust_size) = (std::ptr::null_mut::<libc::c_void>(), 0usize);
    let mut cleared_id: *mut libc::pid_t = std::ptr::null_mut();
    let mut pidfd: libc::c_int = -1;
    // SAFETY: the first two calls write to the places that they are given. The last one copies the whole
    // process; without CLONE_VM the null stack means a copy of this one, so that both sides return here.
    // The kernel writes the child's id to `cached_id` in the child alone, where glibc keeps it, and the
    // pidfd to `pidfd` in this process alone.
    let pid = unsafe {
        libc::syscall(libc::SYS_get_robust_list, 0, &raw mut robust_list, &raw mut robust_size);
        libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut cleared_id);
        clone_sibling(cached_id as *mut libc::pid_t, &raw mut pidfd)
    };
    match pid {
        -1 => Err(std::io::Error::last_os_error()),
        0 => {
            // SAFETY: what this thread had registered with the kernel, and a fork drops.
            unsafe {
                libc::syscall(libc::SYS_set_robust_list, robust_list, robust_size);
                if !cleared_id.is_null() {
                    libc::syscall(libc::SYS_set_tid_address, cleared_id);
                }
            }
            Ok(None)
        }
        pid => {
            // SAFETY: the kernel has just made it, and nobody else knows of it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Some((i32::try_from(pid).unwrap_or(0), pidfd)))
        }
    }
}

/// Where glibc keeps the kernel's id of the calling thread, which is the only one of its process: behind
/// that, `pthread_kill` and its like find the thread. A place in the thread's descriptor that holds the id
/// and that a public function's answer depends on.
fn find_cached_id() -> Option<usize> {
    /// Every version of glibc has it within that many bytes, and a larger descriptor.
    const WITHIN: usize = 1024;
    // SAFETY: no preconditions.
    let (own, id) = unsafe { (libc::pthread_self(), libc::gettid()) };
    let answer = || {
        let mut clock: libc::clockid_t = 0;
        // SAFETY: the thread is this one; the call writes to `clock`.
        (unsafe { libc::pthread_getcpuclockid(own, &raw mut clock) } == 0).then_some(clock)
    };
    let truth = answer()?;
    (own as usize..own as usize + WITHIN).step_by(size_of::<libc::pid_t>()).find(|&address| {
        let place = address as *mut libc::pid_t;
        // SAFETY: inside this thread's descriptor, which nobody but this thread uses meanwhile: it is the
        // only one, and calls nothing else. What is there is put back.
        unsafe {
            if place.read_volatile() != id {
                return false;
            }
            place.write_volatile(id ^ 1);
            let depends = answer() != Some(truth);
            place.write_volatile(id);
            depends
        }
    })
}

/// The call itself: clone3, or clone where a filter refuses that.
///
/// # Safety
/// As [`fork_as_sibling`]; both pointers are valid.
unsafe fn clone_sibling(cached_id: *mut libc::pid_t, pidfd: *mut libc::c_int) -> libc::c_long {
    /// The first version of the kernel's `struct clone_args`.
    #[repr(C)]
    #[derive(Default)]
    struct CloneArgs {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
    }
    let flags =
        libc::CLONE_PARENT | libc::CLONE_PIDFD | libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID;
    let arguments = CloneArgs {
        // No exit signal: with CLONE_PARENT the child takes over this process's.
        flags: u64::from(flags.cast_unsigned()),
        pidfd: pidfd as u64,
        child_tid: cached_id as u64,
        ..CloneArgs::default()
    };
    // SAFETY: forwarded to the caller.
    unsafe {
        let pid = libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArgs>());
        let refused = matches!(*libc::__errno_location(), libc::ENOSYS | libc::EPERM);
        if pid != -1 || !refused {
            return pid;
        }
        let null = std::ptr::null_mut::<libc::c_void>();
        if cfg!(target_arch = "x86_64") {
            libc::syscall(libc::SYS_clone, libc::c_long::from(flags), null, pidfd, cached_id, null)
        } else {
            // The order of arguments everywhere else that matters (CONFIG_CLONE_BACKWARDS).
            libc::syscall(libc::SYS_clone, libc::c_long::from(flags), null, pidfd, null, cached_id)
        }
    }
}
