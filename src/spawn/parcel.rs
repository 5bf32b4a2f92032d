//! What goes from one interpreter to another: a pickle, in bytes or, where it is large, in a sealed file in
//! memory; and the descriptors that it refers to by number.

use std::os::fd::{OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use crate::error::{Error, Result};
use crate::sys::fd;
use crate::sys::lock::lock;

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
    /// What goes over a channel as it is.
    pub fn bytes(&self) -> Arc<Vec<u8>> {
        match self {
            Self::Bytes(bytes) => Arc::clone(bytes),
            Self::Memory(_) | Self::Lost => Arc::default(),
        }
    }
}

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

    /// The pickle, for sending; it stays here.
    pub fn content(&self) -> Result<Content> {
        lock(&self.content).clone().ok_or_else(taken)
    }

    /// The descriptors that have not been taken, for sending; they stay here.
    pub fn passed(&self) -> Vec<Arc<OwnedFd>> {
        lock(&self.passed).iter().flatten().cloned().collect()
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
