//! What goes from one interpreter to another: a pickle, in bytes or, where it is large, in a sealed file in
//! memory; and the descriptors that it refers to by number.

use std::os::fd::{OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use crate::error::{Error, Result};
use crate::sys::fd;
use crate::sys::lock::lock;
use crate::sys::memfile::{self, Seals};
use crate::wire::message::{Outcome, Role};

/// The most descriptors that arguments can refer to; those of ours go beside the same message.
pub const MOST_PASSED: usize = 240;
const _: () = assert!(MOST_PASSED + 8 <= fd::MOST_FDS, "room for stdio, directory and payload");

/// A pickle.
#[derive(Debug, Clone)]
pub enum Content {
    /// Copied wherever it goes.
    Bytes(Arc<Vec<u8>>),
    /// Mapped by whoever reads it.
    Memory(Arc<OwnedFd>),
    /// It was sent in such a file, for which there was no descriptor left here.
    Lost,
}

impl Content {
    /// What there is when there is nothing.
    pub fn none() -> Self {
        Self::Bytes(Arc::default())
    }

    /// What was told to be in a sealed file in memory, if that has come.
    ///
    /// # Errors
    /// It is no such file.
    pub fn received(memory: Option<OwnedFd>) -> Result<Self> {
        let Some(memory) = memory else { return Ok(Self::Lost) };
        memfile::check_sealed(&memory, Seals::Everything)?;
        Ok(Self::Memory(Arc::new(memory)))
    }

    /// What another process ended with, as that is told.
    ///
    /// # Errors
    /// As for [`Content::received`].
    pub fn of_outcome(
        outcome: Outcome,
        payload: Arc<Vec<u8>>,
        memory: Option<OwnedFd>,
    ) -> Result<Option<Self>> {
        match outcome {
            Outcome::None => Ok(None),
            Outcome::Payload => Ok(Some(Self::Bytes(payload))),
            Outcome::Memory => Self::received(memory).map(Some),
            Outcome::Lost => Ok(Some(Self::Lost)),
        }
    }

    /// How that is told.
    pub fn outcome(content: Option<&Self>) -> Outcome {
        match content {
            None => Outcome::None,
            Some(Self::Bytes(_)) => Outcome::Payload,
            Some(Self::Memory(_)) => Outcome::Memory,
            Some(Self::Lost) => Outcome::Lost,
        }
    }

    /// What goes beside a message.
    pub fn memory(&self) -> Option<&Arc<OwnedFd>> {
        match self {
            Self::Memory(memory) => Some(memory),
            Self::Bytes(_) | Self::Lost => None,
        }
    }

    /// What goes over a channel as it is.
    pub fn bytes(&self) -> Arc<Vec<u8>> {
        match self {
            Self::Bytes(bytes) => Arc::clone(bytes),
            Self::Memory(_) | Self::Lost => Arc::default(),
        }
    }
}

/// What came beside a message that says what each descriptor is for: a parcel, and the rest.
///
/// # Errors
/// When not all of them have come.
pub fn sort(
    roles: &[Role],
    fds: Vec<OwnedFd>,
    payload: Arc<Vec<u8>>,
) -> Result<(Parcel, Vec<(Role, OwnedFd)>)> {
    if roles.len() != fds.len() {
        // The kernel leaves out what there is no room for.
        let doing = format!("take over descriptors, of which {} of {} came", fds.len(), roles.len());
        return Err(Error::os(doing, rustix::io::Errno::MFILE));
    }
    let (mut content, mut passed, mut rest) = (Content::Bytes(payload), Vec::new(), Vec::new());
    for (role, fd) in roles.iter().zip(fds) {
        match role {
            Role::Payload => content = Content::Memory(Arc::new(fd)),
            Role::Passed => passed.push(Arc::new(fd)),
            role => rest.push((*role, fd)),
        }
    }
    Ok((Parcel::new(content, passed), rest))
}

/// What is sent: a payload, what the descriptors beside it are for, and those.
pub type Contents = (Arc<Vec<u8>>, Vec<Role>, Vec<Arc<OwnedFd>>);

/// A worker's target and arguments. Nothing of it has to be taken: what is left is closed with it.
#[derive(Debug)]
pub struct Parcel {
    content: Mutex<Option<Content>>,
    passed: Mutex<Vec<Option<Arc<OwnedFd>>>>,
}

impl Parcel {
    /// Of what has arrived.
    pub fn new(content: Content, passed: Vec<Arc<OwnedFd>>) -> Self {
        Self {
            content: Mutex::new(Some(content)),
            passed: Mutex::new(passed.into_iter().map(Some).collect()),
        }
    }

    /// Of numbers that Python knows, and which stay Python's: the parcel has copies.
    ///
    /// # Errors
    /// Too many; one that is closed; EMFILE.
    pub fn of_numbers(payload: &[u8], memory: Option<RawFd>, passed: &[RawFd]) -> Result<Self> {
        if passed.len() > MOST_PASSED {
            return Err(Error::invalid(format!(
                "there are {} descriptors in the arguments, and at most {MOST_PASSED} can be passed to a worker",
                passed.len()
            )));
        }
        let copy = |&number: &RawFd| fd::duplicate_number(number).map(Arc::new);
        let content = match &memory {
            Some(number) => Content::Memory(copy(number)?),
            None => Content::Bytes(Arc::new(payload.to_vec())),
        };
        Ok(Self::new(content, passed.iter().map(copy).collect::<Result<_>>()?))
    }

    /// For sending, and it all stays here: the payload, the descriptors that go beside it, and what for.
    ///
    /// # Errors
    /// When it has been taken.
    pub fn contents(&self) -> Result<Contents> {
        let content = lock(&self.content).clone().ok_or_else(taken)?;
        let mut along: Vec<_> = content.memory().cloned().into_iter().collect();
        let mut roles = vec![Role::Payload; along.len()];
        along.extend(lock(&self.passed).iter().flatten().cloned());
        roles.resize(along.len(), Role::Passed);
        Ok((content.bytes(), roles, along))
    }

    /// The pickle, once; or once more later on, if it is to be kept.
    ///
    /// # Errors
    /// When it has been taken.
    pub fn take_content(&self, keep: bool) -> Result<Content> {
        let mut content = lock(&self.content);
        if keep { content.clone() } else { content.take() }.ok_or_else(taken)
    }

    /// A descriptor, as [`Parcel::take_content`].
    ///
    /// # Errors
    /// There is none; EMFILE.
    pub fn take_passed(&self, index: usize, keep: bool) -> Result<OwnedFd> {
        let mut passed = lock(&self.passed);
        let found = passed.get_mut(index).and_then(|fd| if keep { fd.clone() } else { fd.take() });
        drop(passed);
        own(found.ok_or_else(taken)?)
    }
}

fn taken() -> Error {
    Error::state("the worker's arguments have been taken already")
}

/// The descriptor itself where nobody else has it, else a copy.
///
/// # Errors
/// EMFILE.
pub fn own(shared: Arc<OwnedFd>) -> Result<OwnedFd> {
    Arc::try_unwrap(shared).or_else(|shared| fd::duplicate(&shared))
}
