//! The folder of this user's running hosts: where it is, and whether it can be trusted.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::process;
use crate::error::{Error, Result};

/// A folder that belongs to this user and that nobody else can look into.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    fd: OwnedFd,
}

impl Folder {
    /// The first of [`places`] that can be used, made if need be.
    ///
    /// # Errors
    /// What is wrong with each of them.
    pub fn provide(places: &[PathBuf]) -> Result<Self> {
        let mut reasons = Vec::new();
        for path in places {
            let made = match rustix::fs::mkdir(path, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => Self::open(path),
                Err(errno) => Err(Error::os(format_args!("make `{}`", path.display()), errno)),
            };
            match made {
                Ok(folder) => return Ok(folder),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        Err(Error::state(format!("there is no folder for what runs: {}", reasons.join("; "))))
    }

    /// One that is there.
    ///
    /// # Errors
    /// ENOENT; when it is a link, or somebody else's, or others may look into it: what is in it can't be
    /// trusted then.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |errno| Error::os(format_args!("use the folder `{}`", path.display()), errno);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
        let status = rustix::fs::fstat(&fd).map_err(failed)?;
        let user = process::user()[1];
        if status.st_uid != user {
            return Err(Error::state(format!(
                "the folder `{}` belongs to user {}, and not to {user}",
                path.display(),
                status.st_uid
            )));
        }
        if status.st_mode & 0o077 != 0 {
            return Err(Error::state(format!(
                "the folder `{}` is open to others (mode {:03o}); `chmod 700` it",
                path.display(),
                status.st_mode & 0o777
            )));
        }
        Ok(Self { path: path.to_owned(), fd: super::fd::above_stdio(fd)? })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where something in it is.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A path to something in it that is short enough for a socket's address.
    pub fn short_path(&self, name: &str) -> PathBuf {
        /// The kernel has 108 bytes for it, one of which ends it.
        const MOST: usize = 107;
        let path = self.join(name);
        if path.as_os_str().len() <= MOST {
            return path;
        }
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()))
    }

    /// The names of all that is in it.
    ///
    /// # Errors
    /// The operating system's.
    pub fn names(&self) -> Result<Vec<String>> {
        let failed = |error: std::io::Error| Error::os(format_args!("list `{}`", self.path.display()), error);
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            found.extend(entry.map_err(failed)?.file_name().into_string().ok());
        }
        found.sort();
        Ok(found)
    }

    /// Removes a file in it. One that is not there is no error.
    ///
    /// # Errors
    /// The operating system's.
    pub fn remove(&self, name: &str) -> Result<()> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(Error::os(format_args!("remove `{}`", self.join(name).display()), errno)),
        }
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The variable that names the folder, or says that there is to be none.
pub const VARIABLE: &str = "TRACTOR_HOST_CONTROL";

/// Whether this process is to have no files there.
pub fn is_declined() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|value| value == "0")
}

/// Where the folder may be, best first. A host takes the first that can be used; who looks for hosts looks into
/// all of them, as they may have been started with another environment. Where the environment names one, it is that
/// alone.
pub fn places() -> Vec<PathBuf> {
    const NAME: &str = "tractor-host";
    if let Some(named) = std::env::var_os(VARIABLE).map(PathBuf::from).filter(|path| path.is_absolute()) {
        return vec![named];
    }
    let user = process::user()[1];
    let mut found: Vec<PathBuf> = Vec::new();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    for base in runtime.into_iter().chain([PathBuf::from(format!("/run/user/{user}"))]) {
        // `sudo` and `su` leave another user's in the environment; nothing of ours may be made there.
        let own = rustix::fs::stat(&base).is_ok_and(|status| status.st_uid == user);
        if base.is_absolute() && own {
            found.push(base.join(NAME));
        }
    }
    found.extend([std::env::temp_dir(), "/tmp".into()].map(|base| base.join(format!("{NAME}-{user}"))));
    let mut seen = std::collections::HashSet::new();
    found.retain(|path| seen.insert(path.clone()));
    found
}
