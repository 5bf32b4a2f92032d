//! What this process owns just now. It reports, and acts on nothing.

pub mod resources;
pub mod stacks;
