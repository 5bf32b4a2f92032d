//! Making a blocked system call of another thread of this process return an error.
//!
//! A thread that is blocked can be woken by a signal, but CPython (rightly) goes back to waiting. So
//! the signal's handler rewrites what the interrupted call returns: `ECANCELED`, or `ETIMEDOUT` for a
//! lock, instead of `EINTR`. It does so only if the thread is still in the very call that was looked
//! at: same instruction, same stack pointer, and a result of `-EINTR`. Otherwise it does nothing, and
//! nothing stays behind.
//!
//! x86_64 Linux with `/proc/self/task/TID/syscall` only; [`support`] says what is missing elsewhere.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use super::lock::lock;
use super::memory;

/// The signal: the one that glibc keeps for pthread_cancel. Its `pthread_sigmask` silently refuses
/// to block it, so that code that blocks "all" signals can still be reached.
#[cfg(target_arch = "x86_64")]
const SIGNAL: libc::c_int = 32;

/// Why blocked calls can't be ended here, if they can't.
pub fn support() -> Result<(), String> {
    if !cfg!(target_arch = "x86_64") {
        return Err(format!(
            "ending blocked system calls is written for x86_64, this is {}",
            std::env::consts::ARCH
        ));
    }
    std::fs::read_to_string("/proc/thread-self/syscall")
        .map(drop)
        .map_err(|error| format!("/proc/thread-self/syscall cannot be read: {error}"))
}

/// The right to kick threads: as long as one is alive, the handler is installed.
#[derive(Debug)]
pub struct Kicker {
    /// Where a thread was seen waiting for a lock. Only one that is seen there twice in a row is
    /// kicked: CPython's own short waits look the same, and must not be cut short.
    seen: HashMap<i32, Blocked>,
}

/// What a blocked thread is blocked in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocked {
    /// The number of the system call.
    pub number: i64,
    first_argument: u64,
    stack: u64,
    instruction: u64,
}

impl Blocked {
    /// What it waits at, if the call is one that waits at an address.
    pub fn address(self) -> u64 {
        self.first_argument
    }
}

static INSTALLED: Mutex<Option<imp::Installed>> = Mutex::new(None);
static KICKERS: Mutex<usize> = Mutex::new(0);

impl Kicker {
    /// Installs the handler, if nobody else has.
    ///
    /// # Errors
    /// What is missing for it on this machine.
    pub fn new() -> Result<Self, String> {
        support()?;
        Self::for_parking()
    }

    /// As [`Kicker::new`], on a machine that may lack what [`Kicker::kick`] and [`Kicker::wake`] need:
    /// they do nothing then, and [`Kicker::park`] works.
    ///
    /// # Errors
    /// What is missing for that too.
    pub fn for_parking() -> Result<Self, String> {
        let mut kickers = lock(&KICKERS);
        if *kickers == 0 {
            *lock(&INSTALLED) = Some(imp::Installed::new()?);
        }
        *kickers += 1;
        Ok(Self { seen: HashMap::new() })
    }

    /// Looks at what the thread does, and if it is blocked in a call that may be ended, ends that.
    /// Returns the number of the call it was sent for.
    ///
    /// The caller makes sure that `thread` is still the thread that it means: its id could have been
    /// given to another one otherwise. Waits for what lies in `internals` are left alone.
    pub fn kick(&mut self, thread: i32, internals: &[Range<u64>]) -> Option<i64> {
        self.end_call(thread, internals, |number| imp::is_blocking(number).then_some(libc::ECANCELED))
    }

    /// As [`Kicker::kick`], but only where the call then returns as if its time had come: from a lock, a
    /// sleep, a wait for events. So an innocent thread can be made to look up.
    pub fn wake(&mut self, thread: i32, internals: &[Range<u64>]) -> Option<i64> {
        self.end_call(thread, internals, |number| imp::has_timeout(number).then_some(0))
    }

    fn end_call(
        &mut self,
        thread: i32,
        internals: &[Range<u64>],
        errno_for: impl Fn(i64) -> Option<i32>,
    ) -> Option<i64> {
        let blocked = look(thread)?;
        let errno = match blocked.number {
            libc::SYS_futex => {
                // CPython parks a thread that waits for a lock on a semaphore on its own stack; all
                // other futexes (the GIL, malloc, other libraries) are none of our business.
                let on_stack =
                    (blocked.stack..blocked.stack + PARKING_RANGE).contains(&blocked.first_argument);
                if !on_stack
                    || !may_fail(blocked.first_argument, internals)
                    || self.seen.insert(thread, blocked) != Some(blocked)
                {
                    return None;
                }
                libc::ETIMEDOUT
            }
            number => errno_for(number)?,
        };
        imp::send(thread, &blocked, errno).then_some(blocked.number)
    }
}

impl Kicker {
    /// Stops the thread for good, wherever it is; only the end of the process ends it then. For what
    /// has to be left behind at the end of a program, and must not touch what that takes down.
    pub fn park(&self, thread: i32) {
        let nowhere = Blocked { number: 0, first_argument: 0, stack: 0, instruction: 0 };
        imp::send(thread, &nowhere, PARK);
    }

    /// Interrupts whatever call the thread is blocked in, as any signal does.
    pub fn interrupt(&self, thread: i32) {
        let nowhere = Blocked { number: 0, first_argument: 0, stack: 0, instruction: 0 };
        imp::send(thread, &nowhere, libc::EINTR);
    }

    /// Leaves the handler installed for as long as the process lives.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

/// In the place of an error number: stop for good.
const PARK: i32 = i32::MIN;

/// How far above the stack pointer of a futex call CPython's semaphore can be.
const PARKING_RANGE: u64 = 64 << 10;

impl Drop for Kicker {
    fn drop(&mut self) {
        let mut kickers = lock(&KICKERS);
        *kickers -= 1;
        if *kickers == 0 {
            // Whom a kick was sent to is gone by now, and what was pending went with it.
            *lock(&INSTALLED) = None;
        }
    }
}

/// Whether a wait on a semaphore of CPython's parking lot is one that may end without what it waited for.
///
/// A lock of CPython's own is taken for granted afterwards: giving it back would be fatal. Those lie in the
/// memory of the runtime or of an interpreter; what Python code waits for lies elsewhere. Its address stands
/// before the semaphore. That has one byte, which is small and not 0 while somebody waits; where the waiting is
/// for the parking lot itself, there is a pointer to the next in the queue, or null, in its place.
fn may_fail(semaphore: u64, internals: &[Range<u64>]) -> bool {
    let mut word = [0; 8];
    let mut state = [0; 1];
    if !memory::read(semaphore.wrapping_sub(8), &mut word) {
        return false;
    }
    let address = u64::from_ne_bytes(word);
    !internals.iter().any(|range| range.contains(&address))
        && memory::read(address, &mut state)
        && (1..8).contains(&state[0])
}

/// What a thread of this process is blocked in; `None` when it runs or is gone.
pub fn look(thread: i32) -> Option<Blocked> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/syscall")).ok()?;
    let mut words = text.split_whitespace();
    let number = words.next()?.parse().ok()?;
    let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    let numbers: Vec<u64> = words.filter_map(hex).collect();
    // Six arguments, the stack pointer, the instruction pointer.
    let &[first_argument, _, _, _, _, _, stack, instruction] = numbers.as_slice() else { return None };
    Some(Blocked { number, first_argument, stack, instruction })
}

#[cfg(target_arch = "x86_64")]
mod imp {
    use std::mem::MaybeUninit;

    use super::{Blocked, PARK, SIGNAL};

    /// Calls whose result 0 says that the time is up.
    pub(super) fn has_timeout(number: i64) -> bool {
        matches!(
            number,
            libc::SYS_poll
                | libc::SYS_ppoll
                | libc::SYS_select
                | libc::SYS_pselect6
                | libc::SYS_epoll_wait
                | libc::SYS_epoll_pwait
                | libc::SYS_epoll_pwait2
                | libc::SYS_nanosleep
                | libc::SYS_clock_nanosleep
        )
    }

    /// Calls that wait for the world and that CPython makes with the GIL released.
    pub(super) fn is_blocking(number: i64) -> bool {
        matches!(
            number,
            libc::SYS_read
                | libc::SYS_write
                | libc::SYS_readv
                | libc::SYS_writev
                | libc::SYS_pread64
                | libc::SYS_pwrite64
                | libc::SYS_preadv
                | libc::SYS_pwritev
                | libc::SYS_preadv2
                | libc::SYS_pwritev2
                | libc::SYS_open
                | libc::SYS_openat
                | libc::SYS_poll
                | libc::SYS_ppoll
                | libc::SYS_select
                | libc::SYS_pselect6
                | libc::SYS_epoll_wait
                | libc::SYS_epoll_pwait
                | libc::SYS_epoll_pwait2
                | libc::SYS_pause
                | libc::SYS_nanosleep
                | libc::SYS_clock_nanosleep
                | libc::SYS_accept
                | libc::SYS_accept4
                | libc::SYS_connect
                | libc::SYS_sendto
                | libc::SYS_recvfrom
                | libc::SYS_sendmsg
                | libc::SYS_recvmsg
                | libc::SYS_recvmmsg
                | libc::SYS_sendmmsg
                | libc::SYS_sendfile
                | libc::SYS_splice
                | libc::SYS_wait4
                | libc::SYS_waitid
                | libc::SYS_flock
                | libc::SYS_fcntl
                | libc::SYS_semop
                | libc::SYS_semtimedop
                | libc::SYS_msgsnd
                | libc::SYS_msgrcv
                | libc::SYS_rt_sigsuspend
                | libc::SYS_rt_sigtimedwait
                | libc::SYS_io_getevents
                | libc::SYS_io_uring_enter
                | libc::SYS_futex_waitv
                | libc::SYS_copy_file_range
                | libc::SYS_getrandom
        )
    }

    /// The kernel's own form of a signal's disposition, which glibc's sigaction refuses to set for
    /// this signal.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct KernelAction {
        handler: usize,
        flags: u64,
        restorer: usize,
        mask: u64,
    }

    /// The handler is in place; what was there before comes back with the drop.
    #[derive(Debug)]
    pub(super) struct Installed {
        before: KernelAction,
    }

    impl Installed {
        pub(super) fn new() -> Result<Self, String> {
            let failed = || format!("failed to install a handler: {}", std::io::Error::last_os_error());
            // glibc knows the code that returns from a handler; it is taken from a signal that glibc
            // sets for us, whose disposition is put back at once.
            let borrowed = libc::SIGURG;
            let mut ours = MaybeUninit::<libc::sigaction>::zeroed();
            let mut theirs = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: an all-zero sigaction is a valid one; both are written before they are read.
            unsafe {
                (*ours.as_mut_ptr()).sa_sigaction = on_kick as *const () as usize;
                (*ours.as_mut_ptr()).sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                if libc::sigaction(borrowed, ours.as_ptr(), theirs.as_mut_ptr()) != 0 {
                    return Err(failed());
                }
            }
            let action = get(borrowed);
            // SAFETY: `theirs` was filled in by the successful call above.
            unsafe { libc::sigaction(borrowed, theirs.as_ptr(), std::ptr::null_mut()) };
            let action = action.map_err(|_| failed())?;
            let before = get(SIGNAL).map_err(|_| failed())?;
            set(SIGNAL, &action).map_err(|_| failed())?;
            Ok(Self { before })
        }
    }

    impl Drop for Installed {
        fn drop(&mut self) {
            // It worked for this very signal before.
            let _ = set(SIGNAL, &self.before);
        }
    }

    fn get(number: libc::c_int) -> Result<KernelAction, ()> {
        let mut action = MaybeUninit::<KernelAction>::zeroed();
        // SAFETY: the kernel writes one KernelAction (its mask is 8 bytes long on this machine).
        unsafe {
            let null = std::ptr::null::<KernelAction>();
            match libc::syscall(libc::SYS_rt_sigaction, number, null, action.as_mut_ptr(), 8usize) {
                0 => Ok(action.assume_init()),
                _ => Err(()),
            }
        }
    }

    fn set(number: libc::c_int, action: &KernelAction) -> Result<(), ()> {
        let null = std::ptr::null_mut::<KernelAction>();
        // SAFETY: the kernel reads one KernelAction, whose handler is a function of this library
        // (which is never unloaded) or what the kernel itself reported.
        let done = unsafe { libc::syscall(libc::SYS_rt_sigaction, number, &raw const *action, null, 8usize) };
        if done == 0 { Ok(()) } else { Err(()) }
    }

    /// A queued signal's information, as the kernel keeps it: 48 bytes, of which we use the first 32
    /// to carry what the handler must know. So no memory has to outlive the signal.
    #[repr(C)]
    struct Info {
        signal: i32,
        /// The error that the call is to return.
        errno: i32,
        code: i32,
        _pad: i32,
        /// Where a sender's pid and uid stand otherwise.
        stack: u64,
        /// The value that goes with the signal.
        instruction: u64,
        _rest: [u64; 12],
    }

    /// Marks the signal as queued by a process and not sent by the kernel or `kill`.
    const QUEUED: i32 = -1;

    pub(super) fn send(thread: i32, blocked: &Blocked, errno: i32) -> bool {
        let info = Info {
            signal: SIGNAL,
            errno,
            code: QUEUED,
            _pad: 0,
            stack: blocked.stack,
            instruction: blocked.instruction,
            _rest: [0; 12],
        };
        // SAFETY: the kernel copies a siginfo_t of 128 bytes, which `info` is.
        let sent = unsafe {
            libc::syscall(libc::SYS_rt_tgsigqueueinfo, libc::getpid(), thread, SIGNAL, &raw const info)
        };
        sent == 0
    }

    /// Rewrites the result of the interrupted call, if it is the one that was meant.
    extern "C" fn on_kick(_signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        // SAFETY: the kernel passes a siginfo_t of 128 bytes, which `Info` has the layout of for a
        // queued signal, and the context of this very thread, which it restores from afterwards.
        // Nothing in here calls anything, so no state (errno, locks) of the thread is touched; but for
        // a thread that is stopped for good, which has no use for it.
        unsafe {
            let info = &*info.cast::<Info>();
            if info.code != QUEUED {
                return;
            }
            if info.errno == PARK {
                loop {
                    libc::pause();
                }
            }
            let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
            let [stack, instruction, result] =
                [libc::REG_RSP, libc::REG_RIP, libc::REG_RAX].map(|register| register as usize);
            if registers[stack].cast_unsigned() == info.stack
                && registers[instruction].cast_unsigned() == info.instruction
                && registers[result] == -i64::from(libc::EINTR)
            {
                registers[result] = -i64::from(info.errno);
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod imp {
    use super::Blocked;

    #[derive(Debug)]
    pub(super) struct Installed;

    impl Installed {
        pub(super) fn new() -> Result<Self, String> {
            Err("not on this architecture".into())
        }
    }

    pub(super) fn has_timeout(_number: i64) -> bool {
        false
    }

    pub(super) fn is_blocking(_number: i64) -> bool {
        false
    }

    pub(super) fn send(_thread: i32, _blocked: &Blocked, _errno: i32) -> bool {
        false
    }
}
