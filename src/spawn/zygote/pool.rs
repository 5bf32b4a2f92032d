//! Blanks: forked children of the zygote that have booted as far as they can without a task, and wait for one.
//!
//! Here they are only kept and told apart; who orders them and hands them out is [`super`].

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Instant;

use rustix::process::Signal;

use crate::error::Result;
use crate::events::fault;
use crate::interp::subinterp::Gil;
use crate::sys::process::Child;
use crate::sys::{fd, memfile};

/// The most that can be kept ready of a kind: so many orders fit into the zygote's socket.
pub const MOST: usize = 64;

/// A child that waits for its task.
#[derive(Debug)]
pub struct Blank {
    /// The process.
    pub child: Child,
    /// Our end of its channel.
    pub channel: OwnedFd,
    /// Its stderr during the boot.
    pub boot_log: OwnedFd,
    /// The second interpreter that it has.
    interpreter: Option<Gil>,
    /// Whether it was forked with the means that the host had at its last order.
    in_step: bool,
}

impl Blank {
    /// Whether it must be given the host's means.
    pub fn is_out_of_step(&self) -> bool {
        !self.in_step
    }

    /// Whether it can be given a task: it has not ended, and is not stopped from here on.
    ///
    /// # Errors
    /// When there is no reaching it.
    pub fn wake(&self) -> Result<bool> {
        // Somebody may have stopped it. It does not concern one that runs.
        self.child.signal(Signal::CONT)?;
        Ok(!self.child.wait_until(Instant::now()))
    }
}

/// What goes beside an order to fork.
#[derive(Debug)]
pub struct Fds {
    /// The child's end of its channel, its fd 0 at first.
    pub channel: OwnedFd,
    /// Its stderr during the boot.
    pub boot_log: OwnedFd,
}

/// A child that was ordered, and of which nothing has been heard yet.
#[derive(Debug)]
pub struct Order {
    channel: OwnedFd,
    boot_log: OwnedFd,
    /// The second interpreter that it is to have.
    pub interpreter: Option<Gil>,
    in_step: bool,
}

impl Order {
    /// An order, and what goes beside it.
    ///
    /// # Errors
    /// EMFILE, ENOMEM.
    pub fn new(interpreter: Option<Gil>) -> Result<(Self, Fds)> {
        let (ours, theirs) = fd::channel_pair()?;
        let log = memfile::create("th-boot")?;
        let order = Self { channel: ours, boot_log: fd::duplicate(&log)?, interpreter, in_step: true };
        Ok((order, Fds { channel: theirs, boot_log: log }))
    }

    /// It has become this process.
    pub fn filled(self, child: Child) -> Blank {
        let Self { channel, boot_log, interpreter, in_step } = self;
        Blank { child, channel, boot_log, interpreter, in_step }
    }
}

/// The blanks of one zygote.
#[derive(Debug, Default)]
pub struct Pool {
    ready: VecDeque<Blank>,
    /// In the order in which the zygote answers.
    ordered: VecDeque<Order>,
}

impl Pool {
    /// The one that is ready for longest, with such a second interpreter.
    pub fn take(&mut self, interpreter: Option<Gil>) -> Option<Blank> {
        let index = self.ready.iter().position(|blank| blank.interpreter == interpreter)?;
        self.ready.remove(index)
    }

    /// How many there are, or will be, of a kind.
    pub fn count(&self, interpreter: Option<Gil>) -> usize {
        let ready = self.ready.iter().filter(|blank| blank.interpreter == interpreter).count();
        ready + self.expected(interpreter)
    }

    /// How many there are, or will be, of all kinds.
    pub fn total(&self) -> usize {
        self.ready.len() + self.ordered.len()
    }

    /// How many of a kind will be.
    pub fn expected(&self, interpreter: Option<Gil>) -> usize {
        self.ordered.iter().filter(|order| order.interpreter == interpreter).count()
    }

    /// An order has been sent.
    pub fn expect(&mut self, order: Order) {
        self.ordered.push_back(order);
    }

    /// The order that is answered next.
    pub fn next(&self) -> Option<&Order> {
        self.ordered.front()
    }

    /// The order that has just been answered.
    pub fn answered(&mut self) -> Option<Order> {
        self.ordered.pop_front()
    }

    /// There is one more.
    pub fn keep(&mut self, blank: Blank) {
        self.ready.push_back(blank);
    }

    /// The host has other means now. Those that were ordered before may have either.
    pub fn fall_out_of_step(&mut self) {
        self.ready.iter_mut().for_each(|blank| blank.in_step = false);
        self.ordered.iter_mut().for_each(|order| order.in_step = false);
    }

    /// Those that are ready.
    pub fn pids(&self) -> impl Iterator<Item = i32> {
        self.ready.iter().map(|blank| blank.child.pid())
    }

    /// The descriptors that it takes to keep them, and to wait for those that were ordered.
    pub fn fds(&self) -> impl Iterator<Item = RawFd> {
        let ready = self.ready.iter().flat_map(|blank| {
            [blank.child.pidfd().as_raw_fd(), blank.channel.as_raw_fd(), blank.boot_log.as_raw_fd()]
        });
        let ordered = self.ordered.iter();
        ready.chain(ordered.flat_map(|order| [order.channel.as_raw_fd(), order.boot_log.as_raw_fd()]))
    }

    /// Ends all of them.
    pub fn end(self) {
        for blank in &self.ready {
            if let Err(error) = blank.child.signal(Signal::KILL) {
                fault!("{error}");
            }
        }
        for blank in self.ready {
            blank.child.destroy();
        }
    }
}
