//! Length-prefixed frames: `magic, version, header length, payload length, header, payload`.
//!
//! The decoder takes bytes as they come, from a peer that may be hostile: it allocates for what has
//! arrived and never for what a length claims.

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

/// Turns bytes, in pieces of any size, into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// A decoder that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes in.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` until more bytes have come.
    ///
    /// # Errors
    /// When the bytes are no frame of ours. The stream is of no more use then.
    pub fn next_frame(&mut self) -> Result<Option<Frame>> {
        let Some((header, payload)) = self.lengths()? else { return Ok(None) };
        let whole = PREFIX + header + payload;
        if self.buffer.len() < whole {
            return Ok(None);
        }
        let rest = self.buffer.split_off(whole);
        let mut bytes = std::mem::replace(&mut self.buffer, rest);
        let payload = bytes.split_off(PREFIX + header);
        bytes.drain(..PREFIX);
        Ok(Some(Frame { header: bytes, payload }))
    }

    /// Whether a frame has begun that has not ended.
    pub fn is_mid_frame(&self) -> bool {
        !self.buffer.is_empty()
    }

    fn lengths(&self) -> Result<Option<(usize, usize)>> {
        let seen = self.buffer.len().min(MAGIC.len());
        if self.buffer[..seen] != MAGIC[..seen] {
            let shown = String::from_utf8_lossy(&self.buffer[..self.buffer.len().min(32)]).into_owned();
            return Err(Error::protocol(format!("expected a frame of protocol version 1, got {shown:?}")));
        }
        let (Some(header), Some(payload)) = (array(&self.buffer, 4), array(&self.buffer, 8)) else {
            return Ok(None);
        };
        let (header, payload) = (u32::from_le_bytes(header), u64::from_le_bytes(payload));
        if header as usize > MAX_HEADER || payload > MAX_PAYLOAD {
            return Err(Error::protocol(format!(
                "a frame that claims {header} + {payload} bytes; the limit is {MAX_HEADER} + {MAX_PAYLOAD}"
            )));
        }
        Ok(Some((header as usize, payload as usize)))
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}
