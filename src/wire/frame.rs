//! Length-prefixed frames: `magic, version, header length, payload length, header, payload`.
//!
//! The decoder takes bytes as they come, from a peer that may be hostile: it allocates for what has
//! arrived and never for what a length claims.

use std::collections::VecDeque;

use crate::error::{Error, Result};

/// The first bytes of every frame; the last one is the version.
const MAGIC: [u8; 4] = *b"TH\0\x01";
/// Bytes in front of a frame's header: the magic, a 32-bit and a 64-bit length, little endian.
const PREFIX: usize = 4 + 4 + 8;
/// The longest header. Ours are far below 4 KiB, but for a long environment.
pub const MAX_HEADER: usize = 16 << 20;
/// The longest payload: what Python can pickle fits well below.
pub const MAX_PAYLOAD: u64 = 16 << 30;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The message, as JSON.
    pub header: Vec<u8>,
    /// Bytes that go with it.
    pub payload: Vec<u8>,
}

/// Encodes the part of a frame that precedes its payload.
///
/// # Errors
/// When the header or the payload is longer than a peer would accept.
pub fn encode_head(header: &[u8], payload_length: usize) -> Result<Vec<u8>> {
    let payload_length = payload_length as u64;
    if header.len() > MAX_HEADER || payload_length > MAX_PAYLOAD {
        return Err(Error::invalid(format!(
            "a message of {} + {payload_length} bytes is over the limit of {MAX_HEADER} + {MAX_PAYLOAD}",
            header.len()
        )));
    }
    let mut bytes = Vec::with_capacity(PREFIX + header.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&(header.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&payload_length.to_le_bytes());
    bytes.extend_from_slice(header);
    Ok(bytes)
}

/// Turns bytes, in pieces of any size, into frames. A payload is collected where it stays: a result
/// of hundreds of megabytes is copied once.
#[derive(Debug, Default)]
pub struct Decoder {
    /// What has come of the prefix and the header of the frame that is being read.
    head: Vec<u8>,
    /// The frame whose payload is being read, and how much of that is missing.
    open: Option<(Frame, u64)>,
    /// Whole frames that nobody has taken yet.
    whole: VecDeque<Frame>,
    broken: Option<String>,
}

impl Decoder {
    /// A decoder that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes in.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while self.broken.is_none() {
            if let Some((mut frame, missing)) = self.open.take() {
                let take = bytes.len().min(usize::try_from(missing).unwrap_or(usize::MAX));
                frame.payload.extend_from_slice(&bytes[..take]);
                bytes = &bytes[take..];
                let missing = missing - take as u64;
                if missing > 0 {
                    self.open = Some((frame, missing));
                    return;
                }
                self.whole.push_back(frame);
            }
            if bytes.is_empty() {
                return;
            }
            match self.missing_of_head() {
                Ok(missing) => {
                    let take = missing.min(bytes.len());
                    self.head.extend_from_slice(&bytes[..take]);
                    bytes = &bytes[take..];
                }
                Err(error) => self.broken = Some(error),
            }
            match self.missing_of_head() {
                Ok(0) => {
                    let payload = array(&self.head, 8).map_or(0, u64::from_le_bytes);
                    let header = self.head.split_off(PREFIX);
                    self.head.clear();
                    self.open = Some((Frame { header, payload: Vec::new() }, payload));
                }
                Ok(_) => {}
                Err(error) => self.broken = Some(error),
            }
        }
    }

    /// The next whole frame, or `None` until more bytes have come.
    ///
    /// # Errors
    /// When the bytes are no frame of ours. The stream is of no more use then.
    pub fn next_frame(&mut self) -> Result<Option<Frame>> {
        match (self.whole.pop_front(), &self.broken) {
            (Some(frame), _) => Ok(Some(frame)),
            (None, None) => Ok(None),
            (None, Some(reason)) => Err(Error::protocol(reason.clone())),
        }
    }

    /// Whether a frame has begun that has not ended.
    pub fn is_mid_frame(&self) -> bool {
        !self.head.is_empty() || self.open.is_some()
    }

    /// How many bytes are missing until the prefix, and then until the header, is whole.
    fn missing_of_head(&self) -> Result<usize, String> {
        let seen = self.head.len().min(MAGIC.len());
        if self.head[..seen] != MAGIC[..seen] {
            let shown = String::from_utf8_lossy(&self.head);
            return Err(format!("expected a frame of protocol version 1, got {shown:?}"));
        }
        let (Some(header), Some(payload)) = (array(&self.head, 4), array(&self.head, 8)) else {
            return Ok(PREFIX - self.head.len());
        };
        let (header, payload) = (u32::from_le_bytes(header) as usize, u64::from_le_bytes(payload));
        if header > MAX_HEADER || payload > MAX_PAYLOAD {
            return Err(format!(
                "a frame that claims {header} + {payload} bytes; the limit is {MAX_HEADER} + {MAX_PAYLOAD}"
            ));
        }
        Ok(PREFIX + header - self.head.len())
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}
