//! Who is alive, how they end, and the one thread that decides. It reaches workers through `spawn`
//! and `interp`, and never waits for Python itself.

mod clerk;
pub mod exit;
mod house;
pub mod ladder;
pub mod reactor;
pub mod supervisor;
pub mod worker;

pub use ladder::Rung;
pub use supervisor::{Supervisor, forget_in_child};
