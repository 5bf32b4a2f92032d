//! The clean thread: the only thread of this process that forks.
//!
//! It is attached to the main interpreter, has never run a line of user code and never ends while
//! the supervisor lives: a child's death signal follows the *thread* that forked it.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::interp::attach::{Token, with_main};
use crate::interp::fork::{Side, fork};
use crate::sys::event::Slot;
use crate::sys::lock::lock;
use crate::sys::process::Child;
use crate::sys::{fd, thread};

/// What a forked child does; it owns what it needs and never returns. It must not end before [`Gate::pass`].
pub type Body = Box<dyn FnOnce(Token<'_>, Gate) -> Never + Send>;
/// What the parent does with a child before that may pass the gate.
pub type Settle = Box<dyn FnOnce(Child) -> Result<Child> + Send>;

/// Keeps a forked child from ending before its parent has hold of it: where nobody waits for children
/// (SIGCHLD is ignored), or somebody for all of them, it would be gone without a trace.
#[derive(Debug)]
pub struct Gate(OwnedFd);

impl Gate {
    /// Waits until the parent has hold of this process, which dies with it by now.
    pub fn pass(self) {
        fd::wait_readable(&self.0);
    }
}

/// No value: a function that returns it does not return.
#[derive(Debug)]
pub enum Never {}

struct Order {
    body: Body,
    settle: Settle,
    /// Not after this moment: whoever asked has stopped waiting.
    deadline: Instant,
    reply: Arc<Slot<Result<Child>>>,
}

/// The handle to the thread. It is started by the first order.
#[derive(Default)]
pub struct CleanThread {
    running: Mutex<Option<(Sender<Order>, JoinHandle<()>)>>,
}

impl CleanThread {
    /// Forks a child that runs `body` once this process has settled it, and waits for that until `deadline`.
    ///
    /// # Errors
    /// That of `settle`; EAGAIN at the process limit, EMFILE when there is no fd for its pidfd, a time-out when the
    /// main interpreter's GIL could not be had.
    pub fn fork(&self, body: Body, settle: Settle, deadline: Instant) -> Result<Child> {
        let reply = Arc::new(Slot::default());
        let order = Order { body, settle, deadline, reply: Arc::clone(&reply) };
        self.sender()?.send(order).map_err(|_| Error::state("the clean thread is gone"))?;
        reply.take(Some(deadline)).unwrap_or_else(|| {
            Err(Error::timed_out("the clean thread did not get the main interpreter's GIL in time to fork"))
        })
    }

    fn sender(&self) -> Result<Sender<Order>> {
        let mut running = lock(&self.running);
        if let Some((sender, _)) = &*running {
            return Ok(sender.clone());
        }
        let (sender, orders) = channel();
        let handle = thread::spawn_deaf("th-clean", move || serve(&orders))
            .map_err(|error| Error::os("start the thread that forks", error))?;
        *running = Some((sender.clone(), handle));
        Ok(sender)
    }

    /// Ends the thread, once no child of it is left.
    pub fn stop(&self) {
        if let Some((sender, handle)) = lock(&self.running).take() {
            drop(sender);
            // It can only have panicked while it forked, which its order's sender was told.
            let _ = handle.join();
        }
    }
}

fn serve(orders: &Receiver<Order>) {
    while let Ok(order) = orders.recv() {
        let outcome = with_main(|token| {
            if Instant::now() > order.deadline {
                return Err(Error::timed_out("the order to fork came too late"));
            }
            let gate = fd::event_fd()?;
            match fork(token)? {
                Side::Child => match (order.body)(token, Gate(gate)) {},
                Side::Parent(pid) => {
                    let child = Child::adopt(pid).and_then(order.settle);
                    fd::raise(&gate);
                    // The parent's copies of what the child was given.
                    drop(order.body);
                    child
                }
            }
        });
        if let Err(Ok(child)) = order.reply.fill(outcome) {
            // Asked for, made, and nobody is there to take it: it must not be left behind.
            child.destroy();
        }
    }
}
