//! The control socket of a program's process, where `tractor-host ps` and its like ask what it is doing. It is made
//! with the supervisor and goes with it; a worker's supervisor has none, because the program's knows its workers.
//!
//! The supervisor's loop only sees that somebody wants to be let in. A thread serves them, which is there as long as
//! there are any; it needs no GIL, and what it takes in and sends is bounded in size, number and time.

mod serve;
mod status;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::supervisor::Supervisor;
use crate::diag::hosts;
use crate::error::Result;
use crate::events::fault;
use crate::spawn::context;
use crate::sys::ledger::{self, Own, SOCKET_SUFFIX, SUFFIX};
use crate::sys::lock::lock;
use crate::sys::runtime_folder::{self, Folder};
use crate::sys::{fd, process, thread, unix_socket};

/// The socket, and what serves it.
#[derive(Debug)]
pub(super) struct Control {
    folder: Folder,
    stem: String,
    listener: OwnedFd,
    /// Raised when it is to be over.
    stop: OwnedFd,
    stopping: AtomicBool,
    server: Mutex<Option<JoinHandle<()>>>,
    /// Who may ask, beside root.
    user: u32,
}

/// Where the socket is to be, found out on a thread that may read the environment. `None` where there is to be none:
/// in a worker, and where `TRACTOR_HOST_CONTROL` is 0.
pub(super) fn wanted() -> Option<Vec<PathBuf>> {
    (!runtime_folder::is_declined() && context::of_process().is_none()).then(runtime_folder::places)
}

/// Makes the socket and the ledger. Where that fails, one line says so, and there is none.
pub(super) fn open(places: &[PathBuf]) -> Option<Control> {
    let made = Control::open(places);
    made.inspect_err(|error| fault!("`tractor-host ps` will not see this program: {error}")).ok()
}

impl Control {
    fn open(places: &[PathBuf]) -> Result<Self> {
        let folder = Folder::provide(places)?;
        let stem = ledger::own_stem()?;
        hosts::sweep(&folder);
        let socket = format!("{stem}{SOCKET_SUFFIX}");
        let listener = unix_socket::listen(&folder, &socket)?;
        let opened = Own::at(folder.join(&socket))
            .and_then(|own| ledger::open(&folder, &stem, vec![own]))
            .and_then(|()| fd::event_fd());
        let stop = match opened {
            Ok(stop) => stop,
            Err(error) => {
                ledger::close();
                for suffix in [SOCKET_SUFFIX, SUFFIX] {
                    folder.remove(&format!("{stem}{suffix}"))?;
                }
                return Err(error);
            }
        };
        let user = process::user()[1];
        Ok(Self {
            folder,
            stem,
            listener,
            stop,
            stopping: AtomicBool::new(false),
            server: Mutex::default(),
            user,
        })
    }

    /// Readable when somebody wants to be let in.
    pub(super) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Has a thread serve those who have come, which says [`super::reactor::Command::Unattended`] when no more
    /// come. Whether there is one: until then nobody else need look.
    pub(super) fn attend(self: &Arc<Self>, supervisor: &Arc<Supervisor>) -> bool {
        let mut server = lock(&self.server);
        if self.stopping.load(Ordering::Acquire) {
            return true;
        }
        if let Some(last) = server.take() {
            // It has said its last word.
            let _ = last.join();
        }
        let (control, supervisor) = (Arc::clone(self), Arc::clone(supervisor));
        match thread::spawn_deaf("th-control", move || control.serve(&supervisor)) {
            Ok(handle) => {
                *server = Some(handle);
                true
            }
            Err(error) => {
                fault!("nobody can answer at the control socket: {error}");
                // Who waits sees that nobody does; more than can wait need not be looked at now.
                for _ in 0..unix_socket::BACKLOG {
                    let Ok(Some(visitor)) = unix_socket::accept(&self.listener) else { break };
                    drop(visitor);
                }
                false
            }
        }
    }

    /// Lets nobody in any more, and removes the socket and the ledger.
    pub(super) fn close(&self) {
        self.stopping.store(true, Ordering::Release);
        fd::raise(&self.stop);
        if let Some(server) = lock(&self.server).take() {
            // A panic of it has been printed.
            let _ = server.join();
        }
        ledger::close();
        for suffix in [SOCKET_SUFFIX, SUFFIX] {
            if let Err(error) = self.folder.remove(&format!("{}{suffix}", self.stem)) {
                fault!("{error}");
            }
        }
    }

    /// Whether somebody may ask.
    fn admits(&self, visitor: &OwnedFd) -> bool {
        unix_socket::peer_user(visitor).is_ok_and(|user| user == self.user || user == 0)
    }
}
