//! Reads what a hostile peer may send, and checks what holds for all of it. Also what `fuzz/` calls.

use std::fmt::Debug;

use _native::wire::control::{Reply, Request};
use _native::wire::frame::{Decoder, Frame};
use _native::wire::message::{FromWorker, FromZygote, ToWorker, ToZygote, decode, encode};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What a decoder has made of a stream. The text of an error depends on what of it had come.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Seen {
    pub(crate) frames: Vec<Frame>,
    pub(crate) is_broken: bool,
    pub(crate) is_mid_frame: bool,
}

/// Has a decoder read a stream, in pieces of such sizes.
///
/// It must not stay in the middle of a frame that it has handed out, and be of no more use once it is broken.
pub(crate) fn read(stream: &[u8], mut size: impl FnMut() -> usize) -> Seen {
    let mut decoder = Decoder::new();
    let mut seen = Seen::default();
    let mut rest = stream;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(size().clamp(1, rest.len()));
        rest = after;
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => seen.frames.push(frame),
                Ok(None) => {
                    assert!(!seen.is_broken, "it mended itself");
                    break;
                }
                Err(error) => {
                    assert!(error.is_protocol(), "{error}");
                    seen.is_broken = true;
                    break;
                }
            }
        }
    }
    seen.is_mid_frame = !seen.is_broken && decoder.is_mid_frame();
    seen
}

/// Decodes a frame as every message there is; returns how many take it.
pub(crate) fn decode_as_any(frame: &Frame) -> usize {
    usize::from(decode_as(frame, ToWorker::descriptors))
        + usize::from(decode_as(frame, FromWorker::descriptors))
        + usize::from(decode_as::<ToZygote>(frame, |_| 0))
        + usize::from(decode_as::<FromZygote>(frame, |_| 0))
        + usize::from(decode_as::<Request>(frame, |_| 0))
        + usize::from(decode_as::<Reply>(frame, |_| 0))
}

/// Whether the frame is such a message. It can be sent on then, and expects the same descriptors.
fn decode_as<M: Debug + Serialize + DeserializeOwned>(frame: &Frame, descriptors: fn(&M) -> usize) -> bool {
    match decode::<M>(frame, "something") {
        Ok(message) => {
            let again = read(&encode(&message, 0).expect("it was short enough"), || usize::MAX);
            let again = decode::<M>(&again.frames[0], "the same").expect("what was encoded just now");
            assert_eq!(descriptors(&message), descriptors(&again), "{message:?}, {again:?}");
            true
        }
        Err(error) => {
            assert!(error.is_protocol(), "{error}");
            false
        }
    }
}
