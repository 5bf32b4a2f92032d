//! Interpreters: starting the embedded one, attaching to one, making and ending subinterpreters,
//! injecting exceptions, forking with one. The last room that may be unsafe: from here up, Python
//! is reached through guards and tokens only.
#![allow(unsafe_code)] // this room keeps the C-API's rules so that the rooms above need not

pub mod attach;
pub mod call;
pub mod door;
pub mod fork;
pub mod gate;
pub mod gil;
pub mod rungs;
pub mod runtime;
pub mod subinterp;
pub mod template;
pub mod turn;
