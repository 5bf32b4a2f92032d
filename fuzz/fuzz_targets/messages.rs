//! A whole frame with anything for its header, as every message.

#![no_main]

use _native::wire::frame::encode_head;
use libfuzzer_sys::fuzz_target;

#[path = "../../tests/hostile/mod.rs"]
mod hostile;

fuzz_target!(|data: &[u8]| {
    let stream = encode_head(data, 0).expect("within the limits");
    let seen = hostile::read(&stream, || usize::MAX);
    assert!(seen.frames.len() == 1 && !seen.is_broken && !seen.is_mid_frame, "{seen:?}");
    hostile::decode_as_any(&seen.frames[0]);
});
