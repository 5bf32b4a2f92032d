//! Sockets with a name, between processes of one user.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::fd::above_stdio;
use super::runtime_folder::Folder;
use crate::error::{Error, Result};

/// How many may wait to be let in.
pub const BACKLOG: i32 = 16;

/// A socket in the folder that others of this user can connect to. What had the name is replaced.
///
/// # Errors
/// The operating system's (EMFILE, ENOSPC, EROFS).
pub fn listen(folder: &Folder, name: &str) -> Result<OwnedFd> {
    let failed = |errno| Error::os(format_args!("listen at `{}`", folder.join(name).display()), errno);
    folder.remove(name)?;
    let socket = new_socket()?;
    // The file has this mode from its first moment, whatever the umask, which only takes away.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    let address = SocketAddrUnix::new(folder.short_path(name)).map_err(failed)?;
    rustix::net::bind(&socket, &address).map_err(failed)?;
    rustix::net::listen(&socket, BACKLOG).map_err(failed)?;
    Ok(socket)
}

/// Connects to such a socket, without waiting.
///
/// # Errors
/// ECONNREFUSED when nobody listens, EAGAIN when too many wait already.
pub fn connect(folder: &Folder, name: &str) -> Result<OwnedFd> {
    let failed = |errno| Error::os(format_args!("reach `{}`", folder.join(name).display()), errno);
    let socket = new_socket()?;
    let address = SocketAddrUnix::new(folder.short_path(name)).map_err(failed)?;
    rustix::net::connect(&socket, &address).map_err(failed)?;
    Ok(socket)
}

/// Lets the next one in; `None` when nobody waits.
///
/// # Errors
/// EMFILE.
pub fn accept(listener: impl AsFd) -> Result<Option<OwnedFd>> {
    match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(socket) => above_stdio(socket).map(Some),
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
        Err(errno) => Err(Error::os("accept a connection", errno)),
    }
}

/// The user on the other side, as it was when that connected.
///
/// # Errors
/// None is known for a connected socket.
pub fn peer_user(socket: impl AsFd) -> Result<u32> {
    let mut found = MaybeUninit::<libc::ucred>::zeroed();
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes, one ucred, to `found`. (rustix has this call, but takes
    // the process id for non-zero, which one in another namespace is not.)
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            found.as_mut_ptr().cast(),
            &raw mut size,
        )
    };
    if outcome != 0 {
        return Err(Error::os("see who has connected", std::io::Error::last_os_error()));
    }
    // SAFETY: three integers, of which any bytes are values; zeroed, should fewer have been written.
    Ok(unsafe { found.assume_init() }.uid)
}

fn new_socket() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let made = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    above_stdio(made.map_err(|errno| Error::os("make a socket", errno))?)
}
