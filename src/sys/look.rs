//! What the kernel says of any thread: its name, its state, the system call that it is in. Looking takes
//! nothing from it: it is neither stopped nor asked.

use std::path::PathBuf;

use super::procfs;

/// A thread, as the kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    /// Its name, of at most 15 bytes.
    pub name: String,
    /// `R` for running, `S` for sleeping, …, as in `ps`.
    pub state: char,
    /// What it is in, if it is in one.
    pub call: Option<Call>,
    /// The function of the kernel that it sleeps in, where the kernel tells.
    pub wait_channel: Option<String>,
}

/// A system call that a thread is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// What it was given.
    pub arguments: [u64; 6],
    /// The stack pointer at the call.
    pub stack: u64,
}

impl Call {
    /// The first argument, where that is a descriptor.
    pub fn descriptor(&self) -> Option<i32> {
        takes_descriptor(self.number).then(|| self.arguments[0] as i32)
    }
}

/// Looks at a thread; `None` when it is gone.
pub fn at(pid: i32, thread: i32) -> Option<Thread> {
    let folder = format!("/proc/{pid}/task/{thread}");
    let read = |name: &str| std::fs::read_to_string(format!("{folder}/{name}"));
    let stat = read("stat").ok()?;
    let (head, rest) = stat.rsplit_once(')')?;
    let name = head.split_once('(').map_or("", |(_, name)| name).to_owned();
    let state = rest.trim_start().chars().next()?;
    let call = read("syscall").ok().and_then(|text| call(&text));
    let wait_channel = read("wchan").ok().filter(|name| !name.is_empty() && name != "0");
    Some(Thread { name, state, call, wait_channel })
}

/// A line of a `syscall` file: number, six arguments, stack pointer, instruction pointer.
fn call(text: &str) -> Option<Call> {
    let mut words = text.split_whitespace();
    // -1: it sleeps in the kernel for another reason.
    let number = words.next()?.parse().ok().filter(|number| *number >= 0)?;
    let mut numbers = words.filter_map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
    let mut arguments = [0; 6];
    for argument in &mut arguments {
        *argument = numbers.next()?;
    }
    Some(Call { number, arguments, stack: numbers.next()? })
}

/// The kernel's ids of the threads of a process, lowest first; none when it is gone.
pub fn threads(pid: i32) -> Vec<i32> {
    let mut found = procfs::numbers(&format!("/proc/{pid}/task")).unwrap_or_default();
    found.sort_unstable();
    found
}

/// What a descriptor of a process is open for.
pub fn descriptor(pid: i32, fd: i32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()
}

/// A process, as the kernel knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Process {
    /// Its parent.
    pub parent: i32,
    /// Its name.
    pub name: String,
    /// As for a thread.
    pub state: char,
    /// Seconds since it was started.
    pub age: Option<f64>,
    /// What it was started as; empty for a zombie.
    pub command: Vec<String>,
}

/// Looks at a process; `None` when there is none by that number.
pub fn process(pid: i32) -> Option<Process> {
    /// Where a `stat` line has the time of the start, behind the name: after the state.
    const START: usize = 19;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (head, rest) = stat.rsplit_once(')')?;
    let name = head.split_once('(').map_or("", |(_, name)| name).to_owned();
    let words: Vec<&str> = rest.split_whitespace().collect();
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = command.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    let up = std::fs::read_to_string("/proc/uptime").ok();
    let up: Option<f64> = up.and_then(|text| text.split_whitespace().next()?.parse().ok());
    let started = words.get(START).and_then(|ticks| ticks.parse::<f64>().ok());
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    Some(Process {
        parent: words.get(1)?.parse().ok()?,
        name,
        state: words.first()?.chars().next()?,
        age: up.zip(started).map(|(up, started)| (up - started / ticks).max(0.0)),
        command: command.map(|word| String::from_utf8_lossy(word).into_owned()).collect(),
    })
}

macro_rules! calls {
    ($($name:ident)*) => {
        /// The name of a system call, for those that a thread is likely to be seen in.
        pub fn name(number: i64) -> Option<&'static str> {
            $(if number == libc::$name { return Some(stringify!($name).trim_start_matches("SYS_")); })*
            legacy_name(number)
        }
    };
}

calls! {
    SYS_read SYS_write SYS_close SYS_lseek SYS_mmap SYS_mprotect SYS_munmap SYS_brk SYS_mremap SYS_madvise SYS_msync
    SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigsuspend SYS_rt_sigtimedwait SYS_ioctl SYS_pread64 SYS_pwrite64
    SYS_readv SYS_writev SYS_preadv SYS_pwritev SYS_preadv2 SYS_pwritev2 SYS_sched_yield SYS_nanosleep
    SYS_clock_nanosleep SYS_getpid SYS_gettid SYS_sendfile SYS_socket SYS_connect SYS_accept SYS_accept4 SYS_sendto
    SYS_recvfrom SYS_sendmsg SYS_recvmsg SYS_sendmmsg SYS_recvmmsg SYS_shutdown SYS_bind SYS_listen SYS_clone
    SYS_clone3 SYS_execve SYS_execveat SYS_exit SYS_exit_group SYS_wait4 SYS_waitid SYS_kill SYS_tkill SYS_tgkill
    SYS_semop SYS_semtimedop SYS_msgsnd SYS_msgrcv SYS_fcntl SYS_flock SYS_fsync SYS_fdatasync SYS_truncate
    SYS_ftruncate SYS_getcwd SYS_chdir SYS_openat SYS_openat2 SYS_unlinkat SYS_renameat SYS_renameat2 SYS_mkdirat
    SYS_linkat SYS_symlinkat SYS_readlinkat SYS_fchmodat SYS_faccessat SYS_newfstatat SYS_fstat SYS_statx SYS_getdents64
    SYS_futex SYS_futex_waitv SYS_epoll_pwait SYS_epoll_pwait2 SYS_epoll_ctl SYS_epoll_create1 SYS_ppoll SYS_pselect6
    SYS_eventfd2 SYS_timerfd_settime SYS_signalfd4 SYS_pipe2 SYS_dup SYS_dup3 SYS_splice SYS_tee SYS_vmsplice
    SYS_copy_file_range SYS_getrandom SYS_memfd_create SYS_process_vm_readv SYS_process_vm_writev SYS_io_getevents
    SYS_io_uring_enter SYS_pidfd_open SYS_pidfd_send_signal SYS_restart_syscall SYS_ptrace SYS_mount SYS_umount2
    SYS_sync SYS_syncfs SYS_sync_file_range SYS_fallocate SYS_mlock SYS_membarrier SYS_prctl SYS_mq_timedreceive
    SYS_mq_timedsend SYS_userfaultfd
}

/// Those that newer machines have not.
#[cfg(target_arch = "x86_64")]
fn legacy_name(number: i64) -> Option<&'static str> {
    Some(match number {
        libc::SYS_open => "open",
        libc::SYS_stat => "stat",
        libc::SYS_lstat => "lstat",
        libc::SYS_poll => "poll",
        libc::SYS_select => "select",
        libc::SYS_epoll_wait => "epoll_wait",
        libc::SYS_pause => "pause",
        libc::SYS_fork => "fork",
        libc::SYS_vfork => "vfork",
        libc::SYS_unlink => "unlink",
        libc::SYS_rename => "rename",
        libc::SYS_mkdir => "mkdir",
        libc::SYS_rmdir => "rmdir",
        libc::SYS_access => "access",
        _ => return None,
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn legacy_name(_: i64) -> Option<&'static str> {
    None
}

/// Whether the first argument of a call is a descriptor.
fn takes_descriptor(number: i64) -> bool {
    const THEM: &[i64] = &[
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
        libc::SYS_connect,
        libc::SYS_accept,
        libc::SYS_accept4,
        libc::SYS_sendto,
        libc::SYS_recvfrom,
        libc::SYS_sendmsg,
        libc::SYS_recvmsg,
        libc::SYS_sendmmsg,
        libc::SYS_recvmmsg,
        libc::SYS_sendfile,
        libc::SYS_splice,
        libc::SYS_flock,
        libc::SYS_fcntl,
        libc::SYS_ioctl,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
        libc::SYS_getdents64,
        libc::SYS_close,
        libc::SYS_ftruncate,
        libc::SYS_syncfs,
        libc::SYS_fallocate,
    ];
    THEM.contains(&number) || is_epoll_wait(number)
}

#[cfg(target_arch = "x86_64")]
fn is_epoll_wait(number: i64) -> bool {
    number == libc::SYS_epoll_wait
}

#[cfg(not(target_arch = "x86_64"))]
fn is_epoll_wait(_: i64) -> bool {
    false
}

/// Whether a call waits for some of the descriptors in a list of `pollfd`s, its first argument.
#[cfg(target_arch = "x86_64")]
pub fn is_poll(number: i64) -> bool {
    number == libc::SYS_poll || number == libc::SYS_ppoll
}

/// Whether a call waits for some of the descriptors in a list of `pollfd`s, its first argument.
#[cfg(not(target_arch = "x86_64"))]
pub fn is_poll(number: i64) -> bool {
    number == libc::SYS_ppoll
}
