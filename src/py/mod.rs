//! The functions of `tractor_host._native`: one thin line each between Python and the rooms below.
//! `_native.pyi` is their contract; stubtest holds the two together.

mod functions;

use crate::ffi::module::Table;

/// The module's name: what its `.so` is called, and what the launcher has built in.
pub const NAME: &std::ffi::CStr = c"tractor_host._native";
const DOC: &std::ffi::CStr = c"The supervisor of tractor_host: plain functions over plain data.";

pub use crate::ffi::module::initialise;

/// The functions.
pub fn table() -> Table {
    functions::table()
}

/// The docstring.
pub fn doc() -> &'static std::ffi::CStr {
    DOC
}
