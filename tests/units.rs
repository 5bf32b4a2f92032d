//! What only the parts themselves can test: files of the library that are compiled here once more, each with the
//! `tests` module that it has. The library has no test binary of its own, which would not link (see Cargo.toml).

#![allow(dead_code, unreachable_pub)] // of what is compiled here, the library uses more

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use _native::sys;
use _native::sys::fd;
use _native::sys::ready::readable;

#[path = "../src/interp/turn.rs"]
mod turn;

#[path = "../src/supervise"]
mod supervise {
    mod limit;
    #[path = "scheduler/policy.rs"]
    mod policy;
}

#[test]
fn what_is_there_is_found_and_what_is_not_is_not_waited_for_longer_than_told() {
    let (ours, theirs) = fd::channel_pair().unwrap();
    for brisk in [false, true] {
        let begin = Instant::now();
        assert!(!readable(ours.as_raw_fd(), brisk, Duration::from_millis(20)));
        assert!(begin.elapsed() >= Duration::from_millis(20));
    }
    fd::write_all(&theirs, b"x").unwrap();
    assert!(readable(ours.as_raw_fd(), true, Duration::ZERO));
    assert!(readable(ours.as_raw_fd(), false, Duration::MAX));
    assert!(!readable(ours.as_raw_fd(), false, Duration::ZERO), "it has not looked");
    assert!(readable(-1, true, Duration::MAX), "who reads it is told what is wrong with it");
}
