//! A worker process, as the reactor holds it: its channel in both directions, and the way to end it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;
use rustix::process::Signal;

use super::TREE_BOUND;
use crate::error::{Error, Result};
use crate::events::fault;
use crate::spawn::parcel::Content;
use crate::sys::fd::Arrived;
use crate::sys::process::Child;
use crate::sys::tree::{self, Tree};
use crate::sys::{fd, oom};
use crate::wire::frame::{Decoder, Frame};
use crate::wire::message::{self, FromWorker, News, Outcome};

/// A worker process.
pub(in crate::supervise) struct Process {
    pub(super) child: Child,
    /// `None` once it is closed, by either side.
    pub(super) channel: Option<OwnedFd>,
    pub(super) decoder: Decoder,
    /// What came beside its messages and has not been taken.
    pub(super) arrived: Arrived,
    outbox: VecDeque<Outgoing>,
    pub(super) boot_log: OwnedFd,
    /// What was found below it when it was told to end in a way that it can't hear.
    pub(super) tree: Tree,
    /// What the kernel's out-of-memory killer had done before.
    pub(super) oom: Option<oom::Before>,
}

struct Outgoing {
    bytes: Arc<Vec<u8>>,
    sent: usize,
    /// They go beside the first byte.
    fds: Vec<Arc<OwnedFd>>,
}

impl Process {
    pub(in crate::supervise) fn new(child: Child, channel: OwnedFd, boot_log: OwnedFd) -> Self {
        Self {
            child,
            channel: Some(channel),
            decoder: Decoder::new(),
            arrived: Arrived::default(),
            outbox: VecDeque::new(),
            boot_log,
            tree: Tree::default(),
            oom: None,
        }
    }

    pub(in crate::supervise) fn pid(&self) -> i32 {
        self.child.pid()
    }

    pub(in crate::supervise) fn post(&mut self, bytes: Arc<Vec<u8>>) {
        self.outbox.push_back(Outgoing { bytes, sent: 0, fds: Vec::new() });
    }

    pub(in crate::supervise) fn post_with_fds(&mut self, bytes: Vec<u8>, fds: Vec<Arc<OwnedFd>>) {
        self.outbox.push_back(Outgoing { bytes: Arc::new(bytes), sent: 0, fds });
    }

    /// Sends a signal, and lets a stopped process act on it. Where that can end it on the spot, all that is
    /// below it is remembered, or ended, before: it can't be found any more afterwards. Whether that was
    /// stopped, and is to go on if the process does not end.
    pub(super) fn end(&mut self, number: Signal) -> bool {
        let deadline = Instant::now() + TREE_BOUND;
        match number {
            Signal::KILL => {
                self.signal(Signal::STOP);
                self.tree.gather(self.child.pid(), deadline);
                self.tree.kill();
                self.child.kill_group();
                self.signal(Signal::KILL);
                false
            }
            Signal::TERM => {
                self.signal(Signal::STOP);
                self.tree.gather(self.child.pid(), deadline);
                self.signal(number);
                self.signal(Signal::CONT);
                !self.tree.is_empty()
            }
            _ => {
                self.signal(number);
                self.signal(Signal::CONT);
                false
            }
        }
    }

    /// Stops it, and all that is below it; or lets them go on.
    pub(super) fn hold_still(&self, still: bool) {
        let deadline = Instant::now() + TREE_BOUND;
        if still {
            self.signal(Signal::STOP);
            tree::hold_still(self.child.pid(), deadline);
        } else {
            tree::go_on(self.child.pid(), deadline);
            self.signal(Signal::CONT);
        }
    }

    /// Has no more to do with its channel, which leaves the epoll by that.
    pub(super) fn hang_up(&mut self) {
        self.channel = None;
        self.outbox.clear();
    }

    /// Whether it is over, whoever has seen that.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.child.peek(), Ok(Some(_)))
    }

    pub(super) fn signal(&self, number: Signal) {
        if let Err(error) = self.child.signal(number) {
            fault!("{error}");
        }
    }

    /// A message of the worker's: what it says, what it carries, and what else came beside it.
    ///
    /// # Errors
    /// When it breaks the protocol.
    pub(super) fn open(&mut self, frame: Frame) -> Result<(FromWorker, Content, Vec<OwnedFd>)> {
        let message: FromWorker = message::decode(&frame, "a worker's message")?;
        let mut along = self.arrived.take(message.descriptors());
        let content = match &message {
            FromWorker::ReturnedInMemory
            | FromWorker::Lodger { news: News::Ended { outcome: Outcome::Memory, .. }, .. } => {
                if along.is_empty() && !self.arrived.is_incomplete() {
                    return Err(Error::protocol("expected a descriptor beside a result in memory, got none"));
                }
                Content::received(along.pop())?
            }
            _ => Content::Bytes(Arc::new(frame.payload)),
        };
        Ok((message, content, along))
    }

    /// Writes what the channel takes. Whether something is left for later.
    ///
    /// # Errors
    /// What the worker was to be told can't be sent: there is no use in its waiting for that.
    pub(in crate::supervise) fn flush(&mut self) -> rustix::io::Result<bool> {
        let Some(channel) = &self.channel else {
            self.outbox.clear();
            return Ok(false);
        };
        while let Some(item) = self.outbox.front_mut() {
            let rest = &item.bytes[item.sent..];
            if rest.is_empty() {
                self.outbox.pop_front();
                continue;
            }
            let fds: Vec<_> = item.fds.iter().map(AsFd::as_fd).collect();
            let sent = fd::send_with_fds(channel, rest, &fds);
            match sent {
                Ok(count) => {
                    item.sent += count;
                    item.fds.clear();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(true),
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    // The worker has closed its end; how it ends is seen at its pidfd.
                    self.outbox.clear();
                    return Ok(false);
                }
                // ETOOMANYREFS, mostly: descriptors that are on their way count against a limit too.
                Err(errno) => return Err(errno),
            }
        }
        Ok(false)
    }
}
