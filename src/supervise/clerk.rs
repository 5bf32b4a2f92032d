//! Workers for workers: a worker process has its supervisor start what it wants started, so that all
//! processes have one owner. Here is what such a request brings along, and the thread that carries it out.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::error::{Error, Result};
use crate::spawn::parcel::{Contents, Parcel};
use crate::spawn::request::{Request, bytes};
use crate::spawn::stdio::Streams;
use crate::sys::lock::lock;
use crate::sys::process::{self, Child, Means};
use crate::sys::{fd, procfs, thread};
use crate::wire::message::{Role, Standing};

/// What a process has from whoever wants it, where that is not the process that starts it.
#[derive(Debug)]
pub(super) struct Surroundings {
    pub(super) stdout: Arc<OwnedFd>,
    stderr: Arc<OwnedFd>,
    directory: Arc<OwnedFd>,
    standing: Option<Standing>,
}

impl Surroundings {
    /// What this process's own workers are to have.
    ///
    /// # Errors
    /// EMFILE; when there is no such directory.
    pub(super) fn here(request: &Request, streams: Option<Streams>) -> Result<Self> {
        let (stdout, stderr) = match streams {
            Some(streams) => (streams.stdout, streams.stderr),
            None => (host_stream(rustix::stdio::stdout())?, host_stream(rustix::stdio::stderr())?),
        };
        let directory = match &request.cwd {
            Some(cwd) => std::ffi::OsString::from_vec(bytes("cwd", cwd)?),
            None => ".".into(),
        };
        let directory = fd::directory(directory.as_ref())?;
        let [stdout, stderr, directory] = [stdout, stderr, directory].map(Arc::new);
        Ok(Self { stdout, stderr, directory, standing: None })
    }

    /// What another process's worker is to have.
    ///
    /// # Errors
    /// A protocol error, when something is missing.
    pub(super) fn of_another(standing: Standing, fds: Vec<(Role, OwnedFd)>) -> Result<Self> {
        let mut found: HashMap<Role, OwnedFd> = fds.into_iter().collect();
        let mut take = |role| {
            let missing = || Error::protocol(format!("a worker's worker is to start without its {role:?}"));
            found.remove(&role).ok_or_else(missing)
        };
        Ok(Self {
            stdout: take(Role::Stdout)?.into(),
            stderr: take(Role::Stderr)?.into(),
            directory: take(Role::Directory)?.into(),
            standing: Some(standing),
        })
    }

    /// With a parcel, for sending: the payload, the descriptors that go beside it, and what for.
    ///
    /// # Errors
    /// When the parcel is empty.
    pub(super) fn with(&self, parcel: &Parcel) -> Result<Contents> {
        let (payload, mut roles, mut along) = parcel.contents()?;
        roles.extend([Role::Stderr, Role::Stdout, Role::Directory]);
        along.extend([&self.stderr, &self.stdout, &self.directory].map(Arc::clone));
        Ok((payload, roles, along))
    }

    /// The rest of it, for another process.
    pub(super) fn standing(&self) -> Standing {
        self.standing.clone().unwrap_or_else(|| Standing { umask: procfs::umask(), means: Means::own() })
    }

    /// The file mode creation mask.
    pub(super) fn umask(&self) -> Option<u32> {
        self.standing.as_ref().map_or_else(procfs::umask, |standing| standing.umask)
    }

    /// Gives a new child what it would otherwise have from this process.
    ///
    /// # Errors
    /// EPERM, for what this process may not give. The child is ended then.
    pub(super) fn apply_to(&self, child: Child) -> Result<Child> {
        let Some(standing) = &self.standing else { return Ok(child) };
        match child.give(&standing.means, None) {
            Ok(()) => Ok(child),
            Err(error) => {
                child.destroy();
                Err(error)
            }
        }
    }
}

/// Whether a process may do and see just what this one may. One that may not must start by itself what it
/// wants started, or it would get out of where it was put. Where that can't be told, it counts as not.
///
/// # Errors
/// EMFILE, ENOMEM: it could be told another time.
pub(super) fn is_as_free(pid: i32) -> Result<bool> {
    let both = procfs::confinement(pid).and_then(|its| Ok(its == procfs::confinement(process::id())?));
    match both.as_ref().map_err(Error::raw_os_error) {
        Err(Some(libc::ENOENT | libc::ESRCH | libc::EACCES | libc::EPERM)) => Ok(false),
        _ => both,
    }
}

/// A copy of this process's stdout or stderr; /dev/null where that is closed.
pub(super) fn host_stream(stream: impl AsFd) -> Result<OwnedFd> {
    if fd::is_inheritable(&stream)
        && let Ok(copy) = fd::duplicate(stream)
    {
        return Ok(copy);
    }
    fd::open("/dev/null".as_ref(), rustix::fs::OFlags::WRONLY)
}

type Job = Box<dyn FnOnce() + Send>;

/// The thread that starts workers for workers, one after the other: to start one takes waits. It is started
/// by the first job.
#[derive(Default)]
pub(super) struct Clerk(Mutex<Option<(Sender<Job>, JoinHandle<()>)>>);

impl Clerk {
    /// Has it do this, after what it has been given before.
    ///
    /// # Errors
    /// EAGAIN when no thread can be made.
    pub(super) fn give(&self, job: impl FnOnce() + Send + 'static) -> Result<()> {
        let mut running = lock(&self.0);
        if running.is_none() {
            let (sender, jobs) = channel::<Job>();
            let handle = thread::spawn_deaf("th-clerk", move || serve(&jobs))
                .map_err(|error| Error::os("start the thread that starts workers for workers", error))?;
            *running = Some((sender, handle));
        }
        let sender = running.as_ref().map(|(sender, _)| sender.send(Box::new(job)));
        sender
            .transpose()
            .map(drop)
            .map_err(|_| Error::state("the thread that starts workers for workers is gone"))
    }

    /// Ends the thread once it has done all of it.
    pub(super) fn stop(&self) {
        let running = lock(&self.0).take();
        if let Some((sender, handle)) = running {
            drop(sender);
            // If it has panicked, that has been printed; nothing is left to do about it.
            let _ = handle.join();
        }
    }
}

fn serve(jobs: &Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        job();
    }
}
