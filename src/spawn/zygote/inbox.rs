//! What came over the socket between a host and its zygote and was not looked at yet, on either side.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use crate::error::Result;
use crate::sys::fd;
use crate::wire::frame::{Decoder, Frame};

/// A message, and the descriptors that came beside it.
pub type Message = (Frame, Vec<OwnedFd>);

/// Messages in their order.
#[derive(Debug, Default)]
pub struct Inbox {
    decoder: Decoder,
    whole: VecDeque<Message>,
}

impl Inbox {
    /// Reads once.
    ///
    /// # Errors
    /// Those of [`fd::receive_with_fds`].
    pub fn read(&mut self, socket: &OwnedFd) -> std::io::Result<()> {
        let (bytes, fds) = fd::receive_with_fds(socket)?;
        self.decoder.push(&bytes);
        // What is no message is told by `next_message`.
        while let Ok(Some(frame)) = self.decoder.next_frame() {
            self.whole.push_back((frame, Vec::new()));
        }
        // One read takes in several messages without descriptors, and ends with the first one that has some.
        if let Some((_, beside)) = self.whole.back_mut() {
            *beside = fds;
        }
        Ok(())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.whole.is_empty()
    }

    /// The next message, or `None` until more is read.
    ///
    /// # Errors
    /// When what came is none.
    pub fn next_message(&mut self) -> Result<Option<Message>> {
        match self.whole.pop_front() {
            Some(message) => Ok(Some(message)),
            None => Ok(self.decoder.next_frame()?.map(|frame| (frame, Vec::new()))),
        }
    }
}
