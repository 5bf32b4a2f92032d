//! Making fds that no child inherits, and taking inherited ones away in a forked child.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};
use rustix::io::{DupFlags, Errno};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::error::{Error, Result};

/// A connected pair of stream sockets: the supervisor's end (non-blocking) and the worker's.
///
/// # Errors
/// The operating system's (EMFILE, ENFILE).
pub fn channel_pair() -> Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|errno| Error::os("make a worker's channel", errno))?;
    rustix::io::ioctl_fionbio(&ours, true)
        .map_err(|errno| Error::os("make a worker's channel non-blocking", errno))?;
    Ok((above_stdio(ours)?, above_stdio(theirs)?))
}

/// Opens a file for a worker's stdio.
///
/// # Errors
/// The operating system's, with the path in the message.
pub fn open(path: &std::path::Path, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from_bits_truncate(0o666))
        .map_err(|errno| Error::os(format_args!("open `{}`", path.display()), errno))
}

/// A directory, to change to.
///
/// # Errors
/// The operating system's, with the path in the message: there is none, or it is none.
pub fn directory(path: &std::path::Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Error::os(format_args!("start in `{}`", path.display()), errno))
}

/// A copy of `fd` under a number of at least 3, closed at exec.
///
/// # Errors
/// The operating system's (EMFILE).
pub fn duplicate(fd: impl AsFd) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(|errno| Error::os("copy a descriptor", errno))
}

/// The same descriptor under a number of at least 3: a process that has closed its stdio is given the
/// low ones, and Python would take what is there for its streams.
///
/// # Errors
/// The operating system's (EMFILE).
pub fn above_stdio(fd: OwnedFd) -> Result<OwnedFd> {
    if fd.as_raw_fd() > 2 { Ok(fd) } else { duplicate(fd) }
}

/// The standard streams that [`occupy_stdio`] has found closed.
static OCCUPIED: [AtomicBool; 3] = [const { AtomicBool::new(false) }; 3];

/// Whether a standard stream is closed as far as anybody else is concerned: it was, and nobody has put anything
/// in its place.
pub fn is_placeholder(number: RawFd) -> bool {
    // SAFETY: named to ask what it is.
    let stream = unsafe { BorrowedFd::borrow_raw(number) };
    occupied(number).is_some_and(|occupied| occupied.load(Ordering::Relaxed)) && !is_inheritable(stream)
}

fn occupied(number: RawFd) -> Option<&'static AtomicBool> {
    OCCUPIED.get(usize::try_from(number).ok()?)
}

/// Opens /dev/null, not inheritable, for the standard streams that are closed, as Rust's runtime does in its
/// own programs: an interpreter that is being made would take any file with such a number for its stream.
pub fn occupy_stdio() {
    for number in 0..=2 {
        // SAFETY: named to ask whether it is open.
        let stream = unsafe { BorrowedFd::borrow_raw(number) };
        if rustix::io::fcntl_getfd(stream) != Err(Errno::BADF) {
            continue;
        }
        // Where that fails, the stream stays closed, and nothing depends on it.
        if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            && null.as_raw_fd() <= 2
        {
            // It is a standard stream now, which nobody owns.
            if let Some(occupied) = occupied(null.into_raw_fd()) {
                occupied.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// Whether a new program would have it. What is not inheritable under the number of a standard stream is no
/// stream: that was closed, and the number was given to whatever has been opened next.
pub fn is_inheritable(fd: impl AsFd) -> bool {
    rustix::io::fcntl_getfd(fd).is_ok_and(|flags| !flags.contains(rustix::io::FdFlags::CLOEXEC))
}

/// What a descriptor is open for, whatever its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    /// What a descriptor is open for; `None` where it is not open.
    pub fn of(fd: impl AsFd) -> Option<Self> {
        let found = rustix::fs::fstat(fd).ok()?;
        Some(Self { device: found.st_dev, inode: found.st_ino })
    }

    /// A copy of a descriptor of this process that is open for the same, and for writing to it. stderr first.
    pub fn find(&self) -> Option<OwnedFd> {
        let others = super::procfs::open_fds().unwrap_or_default();
        [2].into_iter().chain(others).find_map(|number| {
            // Another thread may close it at any time, so only the copy is looked at.
            let copy = duplicate_number(number).ok()?;
            let writable = rustix::fs::fcntl_getfl(&copy).is_ok_and(|flags| {
                flags.intersects(OFlags::WRONLY | OFlags::RDWR) && !flags.contains(OFlags::PATH)
            });
            (writable && Self::of(&copy) == Some(*self)).then_some(copy)
        })
    }
}

/// Closes all fds above 2. For a program that has just been started and has opened none itself.
pub fn close_inherited() {
    // SAFETY: nobody in this process owns any of them yet, as the caller knows. It fails only on kernels
    // without the call, where what the host marked inheritable stays so.
    unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) };
}

/// Whether the kernel, and what filters its calls, knows close_range(2).
///
/// # Errors
/// ENOSYS, EPERM.
pub fn probe_close_range() -> std::io::Result<()> {
    // SAFETY: there is no descriptor of that number.
    match unsafe { libc::syscall(libc::SYS_close_range, u32::MAX, u32::MAX, 0u32) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Has room made for a descriptor where there is none: the soft limit becomes the hard one, and fd 0 is
/// given up. For a worker that is about to leave.
pub fn make_room() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limits = getrlimit(Resource::Nofile);
    // It can only fail for a limit above the hard one.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, ..limits });
    // SAFETY: a worker's stdin is /dev/null, placed there for whoever reads it. Nothing in Rust owns it; who
    // still reads it in Python is told that it is closed.
    drop(unsafe { OwnedFd::from_raw_fd(0) });
}

/// Makes `number` a copy of `fd`, open across exec. For 0, 1 and 2 of a new process.
///
/// # Errors
/// The operating system's.
pub fn place(fd: BorrowedFd<'_>, number: RawFd) -> Result<()> {
    place_with(fd, number, DupFlags::empty())
        .map_err(|errno| Error::os(format_args!("place descriptor {number}"), errno))
}

fn place_with(fd: BorrowedFd<'_>, number: RawFd, flags: DupFlags) -> rustix::io::Result<()> {
    if fd.as_raw_fd() == number {
        // dup3 refuses equal numbers; the only effect it would have is on the flag.
        return rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty());
    }
    // SAFETY: the number is only named so that dup3 can replace what it means; ManuallyDrop keeps
    // this temporary owner from closing it.
    let mut target = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
    rustix::io::dup3(fd, &mut target, flags)
}

/// A copy of a descriptor that is known by its number: one that Python holds, or that a program was
/// started with.
///
/// # Errors
/// EBADF when there is no such fd; EMFILE.
pub fn duplicate_number(number: RawFd) -> Result<OwnedFd> {
    if number < 0 {
        return Err(Error::os("copy a descriptor", Errno::BADF));
    }
    // SAFETY: borrowed for one call only, and not -1, which is no descriptor; a number that is not open gives
    // EBADF, never memory errors.
    let found = unsafe { BorrowedFd::borrow_raw(number) };
    duplicate(found)
}

/// Takes over a descriptor that Python code has been given by the kernel.
///
/// # Errors
/// EBADF when there is no such fd.
pub fn adopt(number: RawFd) -> Result<OwnedFd> {
    if number < 0 {
        return Err(Error::os("take over a descriptor", Errno::BADF));
    }
    // SAFETY: it has just been received there, in the only place that does, and no object there owns it. A number
    // that is not open is only asked about.
    let found = unsafe { OwnedFd::from_raw_fd(number) };
    match rustix::io::fcntl_getfd(&found) {
        Ok(_) => Ok(found),
        Err(errno) => {
            let _ = found.into_raw_fd();
            Err(Error::os("take over a descriptor", errno))
        }
    }
}

/// A descriptor on which every read and write fails with EBADF, for [`neutralise_inherited`].
///
/// # Errors
/// EMFILE.
pub fn tomb() -> Result<OwnedFd> {
    let made = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    above_stdio(made.map_err(|errno| Error::os("open `/` as a placeholder", errno))?)
}

/// In a forked child: makes every inherited fd above 2, but those in `keep`, useless without freeing
/// its number.
///
/// The files, pipes and sockets behind them are let go, so no peer waits for an end of file that
/// cannot come. The numbers stay taken, by copies of `tomb`: Python objects copied from the parent
/// still think that they own them, and closing a number that had meanwhile been given to a new file
/// would hit that file.
///
/// # Errors
/// The operating system's.
pub fn neutralise_inherited(tomb: BorrowedFd<'_>, keep: &[RawFd]) -> Result<()> {
    // Where /proc is not mounted, every number that there can be is asked for.
    let numbers = super::procfs::open_fds().unwrap_or_else(|_| (3..=highest_number()).collect());
    for number in numbers {
        if number <= 2 || keep.contains(&number) {
            continue;
        }
        // SAFETY: named to test that it is still open: the list may have used one itself.
        let open = unsafe { BorrowedFd::borrow_raw(number) };
        if rustix::io::fcntl_getfd(open) == Err(Errno::BADF) {
            continue;
        }
        place_with(tomb, number, DupFlags::CLOEXEC)
            .map_err(|errno| Error::os(format_args!("let descriptor {number} go"), errno))?;
    }
    Ok(())
}

/// The highest number that an fd of this process can have been given, unless its limit was lowered.
fn highest_number() -> RawFd {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    // The kernel's own bound, where there is no other.
    const MOST: u64 = 1 << 20;
    RawFd::try_from(limit.unwrap_or(MOST).min(MOST)).unwrap_or(RawFd::MAX) - 1
}

/// Writes all of `bytes` to a blocking fd.
///
/// # Errors
/// The operating system's; EPIPE when the other side is gone.
pub fn write_all(fd: impl AsFd, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::net::send(&fd, bytes, rustix::net::SendFlags::NOSIGNAL) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// As [`write_all`], with descriptors (at most [`MOST_FDS`]) beside the first of the bytes.
///
/// # Errors
/// As there.
pub fn write_all_with_fds(fd: impl AsFd, bytes: &[u8], along: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    let sent = loop {
        match send_with_fds(&fd, bytes, along) {
            Err(Errno::INTR) => {}
            outcome => break outcome?,
        }
    };
    write_all(fd, &bytes[sent..])
}

/// The most descriptors that go beside one message: the kernel's limit.
pub const MOST_FDS: usize = 253;

/// Sends `bytes` with descriptors (at most [`MOST_FDS`]) beside the first of them; returns how many
/// bytes went.
///
/// # Errors
/// The operating system's; EAGAIN when the socket is full.
pub fn send_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOBIG);
    }
    sendmsg(socket, &[std::io::IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
}

/// How many bytes [`receive_with_fds`] takes at most. Not many, as that is new memory for a process that has
/// just been forked.
pub const AT_ONCE: usize = 1 << 13;

/// Receives some bytes and the descriptors that came beside them.
///
/// # Errors
/// The operating system's; `UnexpectedEof` at the end of the stream.
pub fn receive_with_fds(socket: impl AsFd) -> std::io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = [0; AT_ONCE];
    let mut arrived = Arrived::default();
    let count = loop {
        match receive(&socket, &mut bytes, &mut arrived) {
            Err(Errno::INTR) => {}
            outcome => break outcome?,
        }
    };
    if count == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok((bytes[..count].to_vec(), arrived.fds.into()))
}

/// Descriptors that have come over a stream, in the order of the messages that they belong to.
#[derive(Debug, Default)]
pub struct Arrived {
    fds: VecDeque<OwnedFd>,
    /// There was no number left for one of them: nobody knows whose the others are.
    lost: bool,
}

impl Arrived {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.fds.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.fds.is_empty()
    }

    /// Those of the next message, which has so many. Fewer where some have been lost.
    pub fn take(&mut self, count: usize) -> Vec<OwnedFd> {
        let there = if self.lost { 0 } else { count.min(self.fds.len()) };
        self.fds.drain(..there).collect()
    }

    /// Whether some have been lost since all that had come by then was read.
    pub fn is_incomplete(&self) -> bool {
        self.lost
    }

    /// All messages that have begun to come have been read.
    pub fn begin_anew(&mut self) {
        self.lost = false;
    }
}

/// Reads what there is of a stream, and takes in the descriptors that came beside it.
///
/// # Errors
/// The operating system's; EAGAIN when there is nothing.
pub fn receive(socket: impl AsFd, bytes: &mut [u8], arrived: &mut Arrived) -> rustix::io::Result<usize> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [std::io::IoSliceMut::new(bytes)];
    let received = recvmsg(&socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            arrived.fds.extend(more);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        arrived.fds.clear();
        arrived.lost = true;
    }
    Ok(received.bytes)
}

/// A counter that is readable once [`raise`] has been called on it.
///
/// # Errors
/// EMFILE.
pub fn event_fd() -> Result<OwnedFd> {
    use rustix::event::{EventfdFlags, eventfd};
    let made = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    above_stdio(made.map_err(|errno| Error::os("make an event descriptor", errno))?)
}

/// Makes an event descriptor readable.
pub fn raise(event: &OwnedFd) {
    // It fails only when the counter is full, and then it is readable.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Waits until there is something to read, without a bound.
pub fn wait_readable(fd: &OwnedFd) {
    use rustix::event::{PollFd, PollFlags, poll};
    // Other failures there are none of for one descriptor; then it is as if there were something.
    while poll(&mut [PollFd::new(fd, PollFlags::IN)], None) == Err(Errno::INTR) {}
}

/// Makes an event descriptor unreadable until it is raised again.
pub fn lower(event: &OwnedFd) {
    // EAGAIN: it was not raised.
    let _ = rustix::io::read(event, &mut [0; 8]);
}
