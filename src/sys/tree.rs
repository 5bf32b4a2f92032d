//! The processes below a process, wherever they went: found, held, stopped and killed as a whole.
//!
//! A worker process is a subreaper: what its descendants leave behind becomes its own child again,
//! whatever session or process group it made. So all of them can be found from it as long as it lives.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal};

use super::lock::lock;
use super::process::{self, Child};
use super::{fd, procfs};
use crate::error::Result;

/// Processes that were found, by pidfd: none of them can be mistaken for another.
#[derive(Debug, Default)]
pub struct Tree(Vec<Child>);

impl Tree {
    /// Adds everything below a process that is not in it yet, and stops it, so that it can't make more. It
    /// goes on until nothing new is found, or until `deadline`. The process itself has been stopped by the
    /// caller, or is its own.
    ///
    /// Where /proc is not mounted nothing is found. A process that no descriptor is left for is killed at
    /// once.
    pub fn gather(&mut self, root: i32, deadline: Instant) {
        self.collect(root, deadline, Signal::KILL);
    }

    /// As [`Tree::gather`]; whom no descriptor is left for is sent `otherwise`.
    fn collect(&mut self, root: i32, deadline: Instant, otherwise: Signal) {
        let _room = Room::make();
        if root != process::id() {
            await_stop(root, deadline);
        }
        let mut known: HashSet<i32> = self.0.iter().map(Child::pid).collect();
        loop {
            let (before, mut out_of_reach) = (self.0.len(), false);
            let mut seen = HashSet::from([root]);
            let mut parents = vec![root];
            while let Some(parent) = parents.pop() {
                let children = procfs::children_of_process(parent);
                let new =
                    children.iter().filter(|pid| !known.contains(pid)).filter_map(|&pid| Pid::from_raw(pid));
                let opened: Vec<_> = new.map(|pid| (pid, hold(pid))).collect();
                if !opened.is_empty() {
                    // Whoever is still listed was not reaped meanwhile, so its number is still its own.
                    let still = procfs::children_of_process(parent);
                    for (pid, pidfd) in opened {
                        let number = pid.as_raw_nonzero().get();
                        if !still.contains(&number) {
                            continue;
                        }
                        match pidfd.map(|pidfd| Child::from_parts(number, pidfd)) {
                            Some(Ok(child)) => {
                                signal(&child, Signal::STOP);
                                known.insert(number);
                                self.0.push(child);
                            }
                            // There is no room, or it has ended. What is below it comes to light when it is gone.
                            _ if otherwise == Signal::KILL => {
                                out_of_reach |= rustix::process::kill_process(pid, otherwise).is_ok();
                            }
                            _ => {
                                known.insert(number);
                                // Failing: it has ended, or has become somebody else.
                                let _ = rustix::process::kill_process(pid, otherwise);
                            }
                        }
                    }
                }
                parents.extend(children.into_iter().filter(|&pid| seen.insert(pid)));
            }
            // Whoever was in the middle of a fork still finishes it: only what has stopped makes no more.
            for kin in &self.0[before..] {
                await_stop(kin.pid(), deadline);
            }
            if self.0.len() == before && !out_of_reach || Instant::now() > deadline {
                return;
            }
            if out_of_reach {
                std::thread::sleep(PERIOD);
            }
        }
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Lets all of them go on.
    pub fn go_on(&self) {
        for kin in &self.0 {
            signal(kin, Signal::CONT);
        }
    }

    /// Kills all of them.
    pub fn kill(&self) {
        for kin in &self.0 {
            signal(kin, Signal::KILL);
        }
    }

    /// Kills all of them, and what is below those by now.
    pub fn kill_with_kin(&mut self, deadline: Instant) {
        let known: Vec<i32> =
            self.0.iter().filter(|kin| !kin.wait_until(Instant::now())).map(Child::pid).collect();
        for pid in known {
            self.gather(pid, deadline);
        }
        self.kill();
    }

    /// Waits until all of them have ended; whether they have by the deadline.
    pub fn wait_until(&self, deadline: Instant) -> bool {
        self.0.iter().all(|kin| kin.wait_until(deadline))
    }
}

/// Stops everything below a process that was told to stop. Nobody is held or killed.
pub fn hold_still(root: i32, deadline: Instant) {
    Tree::default().collect(root, deadline, Signal::STOP);
}

/// Lets everything below a process that is stopped go on.
pub fn go_on(root: i32, deadline: Instant) {
    let mut tree = Tree::default();
    tree.collect(root, deadline, Signal::CONT);
    tree.go_on();
}

/// A descriptor that is kept for a look at /proc when there are no others.
static SPARE: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// Keeps a descriptor free for finding what is below a process, also when this one has used up all others.
///
/// # Errors
/// EMFILE.
pub fn keep_room() -> Result<()> {
    let mut spare = lock(&SPARE);
    if spare.is_none() {
        *spare = Some(fd::tomb()?);
    }
    Ok(())
}

/// There is room for one descriptor, unless another thread is quicker.
struct Room(Option<MutexGuard<'static, Option<OwnedFd>>>);

impl Room {
    /// It never waits: in a forked child, who has the lock is in the parent.
    fn make() -> Self {
        let mut spare = SPARE.try_lock().ok();
        if let Some(spare) = &mut spare {
            **spare = None;
        }
        Self(spare)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(spare) = &mut self.0 {
            // EMFILE: somebody was quicker; the next one who makes room tries again.
            **spare = fd::tomb().ok();
        }
    }
}

/// A descriptor of a process, if that leaves room for one more: to look at /proc again.
fn hold(pid: Pid) -> Option<OwnedFd> {
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
    fd::tomb().ok().map(|_| pidfd)
}

fn signal(process: &Child, number: Signal) {
    // EPERM: it has become somebody else, whom we may not end.
    let _ = process.signal(number);
}

/// How often it is looked at what nobody tells.
const PERIOD: Duration = Duration::from_micros(200);

/// Waits until a process that was told to stop has, or has ended. The kernel tells that to nobody but its
/// parent, so it is looked at.
fn await_stop(pid: i32, deadline: Instant) {
    while !procfs::has_stopped(pid) && Instant::now() < deadline {
        std::thread::sleep(PERIOD);
    }
}

/// Ends everything below this process, and waits for that until `deadline`. Other threads of it may be
/// making more meanwhile.
pub fn end_own(deadline: Instant) {
    if !process::has_children() {
        return;
    }
    if procfs::threads().is_err() {
        fd::make_room();
    }
    let own = process::id();
    while Instant::now() < deadline {
        let mut left = procfs::children_of_process(own);
        left.retain(|&pid| !procfs::is_zombie(pid));
        if left.is_empty() {
            return;
        }
        let mut tree = Tree::default();
        tree.gather(own, deadline);
        tree.kill();
        if tree.is_empty() {
            // No descriptor is left to hold anybody by, and to go on looking. What is below these becomes a
            // child of this process when they end.
            for pid in left.into_iter().filter_map(Pid::from_raw) {
                // Failing: it has been waited for meanwhile, or has become somebody else.
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(PERIOD);
        }
        if !tree.wait_until(deadline) {
            return;
        }
    }
}
