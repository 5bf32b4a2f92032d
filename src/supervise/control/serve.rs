//! The thread that serves the control socket. Nobody who connects can keep it from the others, or have it hold more
//! than a bounded amount: each has one short request and a time limit, and there are only so many at a time.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::super::reactor::Command;
use super::super::supervisor::Supervisor;
use super::{Control, status};
use crate::diag::dump::Told;
use crate::error::{Error, Result};
use crate::events::{fault, ring};
use crate::sys::{thread, unix_socket};
use crate::wire::control::{MAX_REQUEST, Reply, Request};
use crate::wire::frame::Decoder;
use crate::wire::message::{decode, encode};

/// How many are served at a time. One more, and the oldest one that has asked nothing yet is sent away.
const VISITORS: usize = 8;
/// How long one may take to ask, and then to read the answer.
const ASKING: Duration = Duration::from_secs(2);
const READING: Duration = Duration::from_secs(5);
/// How long the thread stays when nobody comes.
const IDLE: Duration = Duration::from_secs(2);
/// An answer that is this old is not made anew: many who ask take no more than one does.
const FRESH: Duration = Duration::from_millis(100);
/// How long nobody is let in where there was no descriptor for one.
const FULL: Duration = Duration::from_secs(1);

struct Visitor {
    socket: OwnedFd,
    decoder: Decoder,
    received: usize,
    /// What it is told, and how much of that it has been sent.
    answer: Option<(Arc<Vec<u8>>, usize)>,
    deadline: Instant,
}

enum Progress {
    Waits,
    Done,
}

impl Control {
    pub(super) fn serve(&self, supervisor: &Arc<Supervisor>) {
        let mut visitors: Vec<Visitor> = Vec::new();
        let mut last = Last::default();
        let mut leave_at = Instant::now() + IDLE;
        let mut closed_until = None;
        while !self.stopping.load(Ordering::Acquire) {
            let mut now = Instant::now();
            if closed_until.is_none_or(|until| now >= until) {
                // Who asks is told by the answer that does not come; nobody here can do anything about it.
                closed_until = self.let_in(&mut visitors).err().map(|_| now + FULL);
                now = Instant::now();
            }
            let before = visitors.len();
            visitors.retain_mut(|visitor| {
                let progress = visitor.proceed(|request| last.answer(supervisor, request));
                matches!(progress, Ok(Progress::Waits)) && visitor.deadline > now
            });
            if visitors.len() < before {
                // They have given back theirs.
                closed_until = None;
            }
            if !visitors.is_empty() {
                leave_at = Instant::now() + IDLE;
            } else if now >= leave_at && closed_until.is_none() {
                break;
            }
            self.sleep(&visitors, leave_at, closed_until);
        }
        // From now on the supervisor's loop looks who comes.
        supervisor.order(Command::Unattended);
    }

    /// Lets in who waits.
    ///
    /// # Errors
    /// For want of a descriptor.
    fn let_in(&self, visitors: &mut Vec<Visitor>) -> Result<()> {
        // So many at a time; then those who are there have their turn.
        for _ in 0..VISITORS {
            match unix_socket::accept(&self.listener) {
                Ok(Some(socket)) if self.admits(&socket) => {
                    if visitors.len() == VISITORS {
                        let idle = visitors.iter().position(|visitor| visitor.answer.is_none());
                        visitors.remove(idle.unwrap_or(0));
                    }
                    visitors.push(Visitor {
                        socket,
                        decoder: Decoder::new(),
                        received: 0,
                        answer: None,
                        deadline: Instant::now() + ASKING,
                    });
                }
                // It is not told why: it is no friend of ours.
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Until there is something to do.
    fn sleep(&self, visitors: &[Visitor], leave_at: Instant, closed_until: Option<Instant>) {
        let until =
            visitors.iter().map(|visitor| visitor.deadline).chain(closed_until).min().unwrap_or(leave_at);
        let left = thread::timespec(until.saturating_duration_since(Instant::now()));
        let mut fds = vec![PollFd::new(&self.stop, PollFlags::IN)];
        if closed_until.is_none() {
            fds.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        fds.extend(visitors.iter().map(|visitor| {
            let wants = if visitor.answer.is_some() { PollFlags::OUT } else { PollFlags::IN };
            PollFd::new(&visitor.socket, wants)
        }));
        match rustix::event::poll(&mut fds, Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => fault!("poll failed at the control socket: {errno}"),
        }
    }
}

impl Visitor {
    /// Reads, answers and writes what can be without waiting.
    ///
    /// # Errors
    /// When it is of no use to go on.
    fn proceed(&mut self, answer: impl FnOnce(&[u8]) -> Arc<Vec<u8>>) -> Result<Progress> {
        if self.answer.is_none() {
            let Some(request) = self.listen()? else { return Ok(Progress::Waits) };
            self.answer = Some((answer(&request), 0));
            self.deadline = Instant::now() + READING;
        }
        let Some((bytes, sent)) = &mut self.answer else { return Ok(Progress::Waits) };
        while *sent < bytes.len() {
            match rustix::net::send(&self.socket, &bytes[*sent..], rustix::net::SendFlags::NOSIGNAL) {
                Ok(count) => *sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Progress::Waits),
                Err(errno) => return Err(Error::os("answer", errno)),
            }
        }
        Ok(Progress::Done)
    }

    fn listen(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame.header));
            }
            if self.received >= MAX_REQUEST {
                return Err(Error::protocol("too long a request"));
            }
            let mut chunk = [0; MAX_REQUEST];
            let room = MAX_REQUEST - self.received;
            match rustix::io::read(&self.socket, &mut chunk[..room]) {
                Ok(0) => return Err(Error::protocol("no request")),
                Ok(count) => {
                    self.received += count;
                    self.decoder.push(&chunk[..count]);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(Error::os("read a request", errno)),
            }
        }
    }
}

/// The last answer to each request.
#[derive(Default)]
struct Last(Vec<(Request, Instant, Arc<Vec<u8>>)>);

impl Last {
    fn answer(&mut self, supervisor: &Supervisor, header: &[u8]) -> Arc<Vec<u8>> {
        let frame = crate::wire::frame::Frame { header: header.to_vec(), payload: Vec::new() };
        let request: Request = match decode(&frame, "a request") {
            Ok(request) => request,
            Err(error) => return Arc::new(refusal(error.to_string())),
        };
        self.0.retain(|(_, made, _)| made.elapsed() < FRESH);
        if let Some((.., answer)) = self.0.iter().find(|(known, ..)| *known == request) {
            return Arc::clone(answer);
        }
        let answer = Arc::new(match answer(supervisor, request) {
            Ok(document) => match encode(&Reply::Answer, document.len()) {
                Ok(head) => [head, document].concat(),
                Err(error) => refusal(error.to_string()),
            },
            Err(error) => refusal(error.to_string()),
        });
        self.0.push((request, Instant::now(), Arc::clone(&answer)));
        answer
    }
}

/// The document that was asked for. It is made on a thread that may take its time, and holds nothing up.
fn answer(supervisor: &Supervisor, request: Request) -> Result<Vec<u8>> {
    let document = match request {
        Request::Status => status::of(supervisor),
        Request::Dump => {
            serde_json::to_value(Told::own()).map_err(|error| Error::state(error.to_string()))?
        }
        Request::Events => {
            serde_json::to_value(ring::recent()).map_err(|error| Error::state(error.to_string()))?
        }
    };
    serde_json::to_vec(&document).map_err(|error| Error::state(error.to_string()))
}

fn refusal(reason: String) -> Vec<u8> {
    encode(&Reply::Refused { reason }, 0).unwrap_or_default()
}
