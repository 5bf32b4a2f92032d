//! The wire against two hundred thousand inputs, the same ones every time: messages of ours with something done
//! to them. `fuzz/` has the same checks, for as long as one likes.

#![allow(unsafe_code)] // an allocator that counts

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use _native::wire::frame::{Frame, MAX_HEADER, encode_head};
use _native::wire::message::{MAX_VALUES, ToWorker, decode};

mod hostile;

const CASES: u64 = if cfg!(debug_assertions) { 20_000 } else { 200_000 };
/// Bytes in memory for each byte that has come. A frame without content is 48 bytes, beside the 16 that it came as,
/// and what is in a list is up to 32 beside 2; where such things are collected there may be room for twice as many,
/// and while that grows the smaller room is there as well.
const FACTOR: usize = 64;
/// The same for a header that is full of the smallest objects: each is a node of a tree, twice for a moment.
const UNFOLDED: usize = 128;
/// And whatever has come. The text of an error is the most of it.
const CONSTANT: usize = 4096;

/// Most kinds of messages, with all that they are made of.
const SAMPLES: &[&str] = &[
    r#"{"type":"spec","spec":{"kind":"call","target":"os:getpid","n":[1,-2,3.5,null,true]},"contract":{"name":"w","parent":1,"umask":18,"apart":false},"roles":["stdout","stderr","directory","payload","passed"]}"#,
    r#"{"type":"template","spec":{},"preload":["math","os"],"contract":{"name":"","parent":1,"umask":null,"apart":true}}"#,
    r#"{"type":"press","force":"unwind"}"#,
    r#"{"type":"lodge","id":18446744073709551615,"request":[[[{}]]],"roles":["passed"]}"#,
    r#"{"type":"lodger","id":7,"wish":{"type":"kill","why":{"timed_out":{"seconds":1.25e-3}}}}"#,
    r#"{"type":"lodger","id":7,"news":{"type":"ended","exit":{"code":0},"outcome":"memory"}}"#,
    r#"{"type":"own","id":7,"wish":{"type":"kill","why":"owner_died"}}"#,
    r#"{"type":"own","id":7,"report":{"type":"made","info":{"name":"x"},"parent":{"lodger":3}}}"#,
    r#"{"type":"about","id":0,"news":{"type":"refused","error":{"kind":{"os":24},"message":"Too many"},"confined":true}}"#,
    r#"{"type":"about","id":0,"news":{"type":"spawned","pid":-1}}"#,
    r#"{"type":"about","id":1,"wish":{"type":"spawn","request":{},"standing":{"umask":2,"means":{"limits":[[7,1024,18446744073709551615]],"nice":-5,"processors":[0,1]}},"roles":[],"parent":null}}"#,
    r#"{"type":"about","id":1,"wish":{"type":"pause"}}"#,
    r#"{"type":"started"}"#,
    r#"{"type":"returned_in_memory"}"#,
    r#"{"type":"raised","summary":"ValueError: \u00e4\ud83d\ude00\n","boot":true,"refused":false}"#,
    r#"{"type":"exited","code":-2147483648}"#,
    r#"{"type":"cancel"}"#,
    r#"{"type":"fork","interpreter":"own","at_leisure":true}"#,
    r#"{"type":"hurry"}"#,
    r#"{"type":"ready","failures":[{"module":"m","traceback":"t"}],"threads":["a","b"]}"#,
    r#"{"type":"forked","pid":12,"failures":[]}"#,
    r#"{"type":"failed","errno":11}"#,
    r#"{"type":"refused","reason":"threads"}"#,
    r#"{"type":"status"}"#,
    r#"{"type":"answer"}"#,
];
/// What hostile JSON is full of.
const SCRAPS: &[&str] = &[
    "\"type\":",
    "\"\\ud800\"",
    "\u{ff}",
    "1e999",
    "-0",
    "18446744073709551616",
    "0.1e-400",
    "null",
    "[[[[[[[[[[[[[[[[",
    "{\"\":{\"\":{\"\":",
    "[0,0,0,0,0,0,0,0]",
    ",",
    "}",
    "]",
    "\0",
];

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static MOST: Cell<usize> = const { Cell::new(0) };
}

/// The system's, which counts what this thread has: each test has a thread.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

fn count(more: usize, less: usize) {
    let now = NOW.get().wrapping_add(more).wrapping_sub(less);
    NOW.set(now);
    MOST.set(MOST.get().max(now));
}

// SAFETY: all of it is the system allocator's work; the counters are plain cells that need no memory of their own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as whoever called has promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // What another thread has made may be given back here.
        count(0, layout.size().min(NOW.get()));
        // SAFETY: as whoever called has promised.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, 0); // both may be there for a moment
        count(0, layout.size().min(NOW.get()));
        // SAFETY: as whoever called has promised.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// What it returns, and the most memory that it had, beyond what was there before.
fn measured<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = NOW.get();
    MOST.set(before);
    let result = work();
    (result, MOST.get() - before)
}

/// The bytes of a frame.
fn framed(header: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut bytes = encode_head(header, payload.len()).expect("within the limits");
    bytes.extend_from_slice(payload);
    bytes
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a [u8] {
        of[self.below(of.len())].as_bytes()
    }

    /// Does something to it.
    fn spoil(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len());
        match self.below(8) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
            1 if !bytes.is_empty() => bytes[at] = self.next() as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..(at + self.below(9)).min(bytes.len()))),
            4 => {
                let scrap = self.pick(SCRAPS);
                drop(bytes.splice(at..at, scrap.iter().copied()));
            }
            5 => {
                let other = self.pick(SAMPLES);
                let from = self.below(other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            6 => {
                let again = bytes[at..(at + self.below(40)).min(bytes.len())].to_vec();
                drop(bytes.splice(at..at, again));
            }
            // Digits, if there are any: ids, pids, counts.
            _ => bytes.iter_mut().filter(|byte| byte.is_ascii_digit()).for_each(|digit| *digit = b'9'),
        }
    }

    /// A few frames, hardly any of which is as it should be.
    fn stream(&mut self) -> Vec<u8> {
        let mut stream = Vec::new();
        for _ in 0..=self.below(2) {
            let mut header = self.pick(SAMPLES).to_vec();
            for _ in 0..self.below(4) {
                self.spoil(&mut header);
            }
            let payload = vec![7; [0, 0, 1, 40, 3000][self.below(5)]];
            let start = stream.len();
            stream.extend_from_slice(&framed(&header, &payload));
            match self.below(12) {
                // One of the lengths is another one, of any magnitude, or nearly what it was.
                0 => {
                    let (at, width) = [(4, 4), (8, 8)][self.below(2)];
                    let length = (self.next() >> self.below(64)).to_le_bytes();
                    stream[start + at..start + at + width].copy_from_slice(&length[..width]);
                }
                1 => stream[start + 4 + 4 * self.below(2)] ^= 1 << self.below(8),
                2 => self.spoil(&mut stream),
                _ => {}
            }
        }
        stream
    }
}

#[test]
fn hostile_streams_break_nothing_and_cost_what_they_weigh() {
    let mut random = Random(20);
    let (mut frames, mut messages, mut broken) = (0, 0, 0);
    for case in 0..CASES {
        let stream = random.stream();
        let limit = FACTOR * stream.len() + CONSTANT;
        let (seen, most) = measured(|| hostile::read(&stream, || usize::MAX));
        assert!(most <= limit, "case {case}: {most} bytes to read {}", stream.len());
        let widest = [2, 20, 5000][random.below(3)];
        let (in_pieces, most) = measured(|| hostile::read(&stream, || 1 + random.below(widest)));
        assert!(most <= limit, "case {case}: {most} bytes to read {} in pieces", stream.len());
        assert_eq!(in_pieces, seen, "case {case}, in pieces and in one");
        for frame in &seen.frames {
            let limit = FACTOR * frame.header.len() + CONSTANT;
            let (taken, most) = measured(|| hostile::decode_as_any(frame));
            assert!(most <= limit, "case {case}: {most} bytes to decode {}", frame.header.len());
            messages += usize::from(taken > 0);
        }
        frames += seen.frames.len();
        broken += u64::from(seen.is_broken);
    }
    // Or else the inputs test nothing.
    assert!(messages > frames / 8 && messages < frames / 8 * 7, "{messages} messages in {frames} frames");
    assert!(broken > CASES / 50 && broken < CASES / 2, "{broken} broken streams");
}

#[test]
fn every_sample_is_a_message() {
    for sample in SAMPLES {
        let seen = hostile::read(&framed(sample.as_bytes(), b""), || usize::MAX);
        assert!(hostile::decode_as_any(&seen.frames[0]) > 0, "{sample}");
    }
}

#[test]
fn what_unfolds_is_bounded_too() {
    for unit in ["0,", "[],", "{},", "\"\",", "{\"\":0},", "[[0]],"] {
        let values = unit.repeat(MAX_VALUES / 4);
        let header = format!(r#"{{"type":"lodge","id":1,"roles":[],"request":[{values}0]}}"#);
        let length = header.len();
        let frame = Frame { header: header.into_bytes(), payload: Vec::new() };
        let (message, most) = measured(|| decode::<ToWorker>(&frame, "a message to a worker"));
        assert!(message.is_ok(), "{unit}");
        assert!(most <= UNFOLDED * length, "{} times as much for {unit}", most / length);
    }
    // As many as a header has room for.
    for unit in ["0,", "{},", "{\"\":0},", "[[0]],", "[", "\",\","] {
        let values = unit.repeat((MAX_HEADER - 100) / unit.len());
        let header = format!(r#"{{"type":"lodge","id":1,"roles":[],"request":[{values}0]}}"#);
        let frame = Frame { header: header.into_bytes(), payload: Vec::new() };
        let (taken, most) = measured(|| hostile::decode_as_any(&frame));
        assert!(taken == 0 && most < 1 << 16, "{most} bytes for {unit:?}");
    }
    // One text is one value, whatever is in it.
    let long = ",:[{\\\"".repeat(1 << 20);
    let text = format!(r#"{{"type":"refused","reason":"{long}"}}"#);
    let (taken, most) =
        measured(|| hostile::decode_as_any(&Frame { header: text.into_bytes(), payload: Vec::new() }));
    assert!(taken > 0 && most < FACTOR * long.len(), "{taken}, {most} bytes");
    // As deep as it gets.
    for bracket in ["[", "{\"\":"] {
        let header = format!(r#"{{"type":"lodge","id":1,"roles":[],"request":{}"#, bracket.repeat(1 << 20));
        let seen = hostile::read(&framed(header.as_bytes(), b""), || usize::MAX);
        let (taken, most) = measured(|| hostile::decode_as_any(&seen.frames[0]));
        assert!(taken == 0 && most < 1 << 16, "{most} bytes for {bracket:?}");
    }
}

#[test]
fn empty_frames_cost_little() {
    let stream = framed(b"", b"").repeat(100_000);
    let (seen, most) = measured(|| hostile::read(&stream, || usize::MAX));
    assert_eq!(seen.frames.len(), 100_000);
    assert!(most <= FACTOR * stream.len(), "{} times", most / stream.len());
}
