//! Who is alive, how they end, and the one thread that decides. It reaches workers through `spawn`
//! and `interp`, and never waits for Python itself.

/// Tells an event of a worker's: level, logger, kind, the worker, and fields.
macro_rules! tell {
    ($level:ident, $logger:ident, $kind:literal, $worker:expr $(, $($field:tt)+)?) => {{
        let worker: &crate::supervise::worker::Worker = &$worker;
        tracing::event!(
            target: crate::events::$logger,
            tracing::Level::$level,
            kind = $kind,
            worker = worker.id,
            name = &*worker.name,
            backend = worker.backend.name(),
            pid = worker.pid()
            $(, $($field)+)?
        );
    }};
}

mod clerk;
mod control;
pub mod exit;
pub mod guard;
mod house;
pub mod ladder;
mod limit;
pub mod reactor;
mod registry;
mod scheduler;
pub mod supervisor;
pub mod worker;

pub use ladder::Rung;
pub use supervisor::{Supervisor, forget_in_child};
