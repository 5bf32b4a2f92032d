//! What a process owns and does just now, seen from outside, and which hosts this user has. It reports, and
//! acts on nothing.

pub mod dump;
pub mod hang;
pub mod hosts;
pub mod lines;
pub mod outlet;
pub mod python;
pub mod reader;
pub mod resources;
pub mod stacks;
pub mod tasks;
mod text;
mod waits;
