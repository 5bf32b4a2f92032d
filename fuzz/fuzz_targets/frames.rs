//! A stream of anything, in pieces of any sizes.
//!
//! The first byte says how many of the next ones are the sizes of the pieces, over and over.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/hostile/mod.rs"]
mod hostile;

fuzz_target!(|data: &[u8]| {
    let Some((&count, rest)) = data.split_first() else { return };
    let (sizes, stream) = rest.split_at(usize::from(count % 16).min(rest.len()));
    let mut sizes = sizes.iter().map(|&size| usize::from(size) + 1).cycle();
    let seen = hostile::read(stream, || sizes.next().unwrap_or(usize::MAX));
    assert_eq!(seen, hostile::read(stream, || usize::MAX), "in pieces, and in one");
    for frame in &seen.frames {
        hostile::decode_as_any(frame);
    }
});
