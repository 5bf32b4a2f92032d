//! The launcher's entry point: a C `main`, so that the process is Python's from its first moment.
//!
//! Rust's own start-up would open `/dev/null` in the place of closed standard streams, ignore SIGPIPE
//! and install handlers for SIGSEGV and SIGBUS; a Python program could tell all of that.
#![no_main]
#![allow(unsafe_code)] // the attribute that exports `main`; there is no unsafe block here

use std::ffi::{c_char, c_int};

/// What the C library calls. The arguments are read through `std`, which glibc passes them to.
#[unsafe(no_mangle)]
pub extern "C" fn main(_count: c_int, _words: *const *const c_char) -> c_int {
    _native::cli::main()
}
