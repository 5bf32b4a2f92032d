//! Signal masks and dispositions.

use std::mem::MaybeUninit;

/// The highest signal number of Linux on the machines that we know.
const LAST_SIGNAL: libc::c_int = 64;

/// Blocks every signal on the calling thread, but for those that a fault of its own raises.
pub fn block_all() {
    let mut set = full_set();
    for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGABRT] {
        // SAFETY: `set` is an initialised signal set and `fault` a valid signal number.
        unsafe { libc::sigdelset(&mut set, fault) };
    }
    // SAFETY: `set` is initialised; a null old set is allowed. SIG_SETMASK with a valid set cannot fail.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut()) };
}

/// Runs `body` with the mask of [`block_all`], which threads that it makes have from their first moment, and
/// gives the calling thread its own back.
pub fn with_all_blocked<R>(body: impl FnOnce() -> R) -> R {
    struct Restore(libc::sigset_t);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: the set is the one that the thread had; a null old set is allowed.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
        }
    }
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: a null new set only asks; the call initialises what it is given, and cannot fail for that.
    let _restore = unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), before.as_mut_ptr());
        Restore(before.assume_init())
    };
    block_all();
    body()
}

/// Gives the calling thread an empty signal mask and every signal its default action, as a program
/// that has just been started by a shell has it. For the only thread of a new process.
pub fn reset_for_new_process() {
    for number in 1..=LAST_SIGNAL {
        // SAFETY: SIG_DFL installs no code. Numbers that cannot be set (SIGKILL, SIGSTOP, those that
        // glibc keeps for itself) are refused with EINVAL, which is what we want for them.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
    unblock_all();
}

/// Gives every signal that this program inherited as ignored its default action, but for those that
/// Python itself ignores. For a program that has just been started by one that ignores some.
pub fn stop_ignoring() {
    for number in (1..=LAST_SIGNAL).filter(|number| ![libc::SIGPIPE, libc::SIGXFSZ].contains(number)) {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: the call fills `action` in, or fails for a number that can't be set and leaves it zero,
        // which is the default action. SIG_DFL installs no code.
        unsafe {
            libc::sigaction(number, std::ptr::null(), action.as_mut_ptr());
            if action.assume_init().sa_sigaction == libc::SIG_IGN {
                libc::signal(number, libc::SIG_DFL);
            }
        }
    }
}

/// Gives the calling thread an empty signal mask.
pub fn unblock_all() {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises what it is given; the mask call reads it then.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut());
    }
}

fn full_set() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset initialises the whole set before it is read.
    unsafe {
        libc::sigfillset(set.as_mut_ptr());
        set.assume_init()
    }
}

/// Sends a signal to one thread of this process.
///
/// # Errors
/// `ESRCH` when the thread has ended.
pub fn to_thread(thread: i32, number: i32) -> std::io::Result<()> {
    // SAFETY: tgkill takes three integers and touches no memory of ours.
    let done = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, number) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// A signal's name and meaning, for people: `SIGSEGV (segmentation fault)`.
pub fn describe(number: i32) -> String {
    let (name, meaning) = match number {
        libc::SIGHUP => ("SIGHUP", "hangup"),
        libc::SIGINT => ("SIGINT", "interrupt"),
        libc::SIGQUIT => ("SIGQUIT", "quit"),
        libc::SIGILL => ("SIGILL", "illegal instruction"),
        libc::SIGTRAP => ("SIGTRAP", "trap"),
        libc::SIGABRT => ("SIGABRT", "abort"),
        libc::SIGBUS => ("SIGBUS", "bus error"),
        libc::SIGFPE => ("SIGFPE", "arithmetic error"),
        libc::SIGKILL => ("SIGKILL", "killed"),
        libc::SIGUSR1 => ("SIGUSR1", "user signal 1"),
        libc::SIGSEGV => ("SIGSEGV", "segmentation fault"),
        libc::SIGUSR2 => ("SIGUSR2", "user signal 2"),
        libc::SIGPIPE => ("SIGPIPE", "broken pipe"),
        libc::SIGALRM => ("SIGALRM", "alarm"),
        libc::SIGTERM => ("SIGTERM", "terminated"),
        libc::SIGXCPU => ("SIGXCPU", "CPU time limit"),
        libc::SIGXFSZ => ("SIGXFSZ", "file size limit"),
        libc::SIGSYS => ("SIGSYS", "bad system call"),
        _ => return format!("signal {number}"),
    };
    format!("{name} ({meaning})")
}
