//! What happens to workers, as structured events: told by `tracing`, kept in a bounded ring ([`ring`]), and
//! passed on to a log ([`log`]) and to the timeline of a run ([`trace`]) where somebody wants that.
//!
//! To tell an event takes no lock and no system call: whoever tells it may have been forked in the middle of
//! anything, and must not wait for whoever listens. Nobody who listens needs a GIL.

pub mod log;
mod record;
pub mod ring;
mod timeline;
pub mod trace;

use std::sync::Once;

use rustix::time::{ClockId, clock_gettime};
use serde::{Serialize, Serializer};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::{Interest, Subscriber};
use tracing::{Level, Metadata};

use crate::error::Result;
use record::{Builder, Packer};

/// All that happens is told under this name or one below it, in Rust and in Python's `logging` alike.
pub const ROOT: &str = "tractor_host";
/// What becomes of a worker.
pub const WORKER: &str = "tractor_host.worker";
/// How a worker is ended.
pub const LADDER: &str = "tractor_host.ladder";
/// The fork server.
pub const ZYGOTE: &str = "tractor_host.zygote";
/// The supervisor itself, and what goes wrong in it.
pub const SUPERVISOR: &str = "tractor_host.supervisor";

/// A fault, in words: nobody who could be handed an error is there.
macro_rules! fault {
    ($($text:tt)+) => {
        tracing::warn!(target: $crate::events::SUPERVISOR, kind = "fault", $($text)+)
    };
}
pub(crate) use fault;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Event {
    /// Counts from 1 in this process.
    pub number: u64,
    /// Nanoseconds of the monotonic clock.
    pub monotonic_ns: u64,
    /// Nanoseconds since 1970.
    pub time_ns: u64,
    /// How much it matters.
    #[serde(serialize_with = "level")]
    pub level: Level,
    /// Under which name it was told.
    pub logger: String,
    /// What happened, in a word.
    pub kind: String,
    /// The number of the worker that it happened to, in this process.
    pub worker: Option<u64>,
    /// That worker's name.
    pub name: Option<String>,
    /// Its backend.
    pub backend: Option<String>,
    /// The process id of the worker, or of whomever else it happened to.
    pub pid: Option<i64>,
    /// The rest, in the order in which it was told.
    #[serde(serialize_with = "map")]
    pub fields: Vec<(String, serde_json::Value)>,
    /// The whole in words, for people.
    pub text: String,
}

fn level<S: Serializer>(level: &Level, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(level.as_str())
}

fn map<S: Serializer>(
    fields: &[(String, serde_json::Value)],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(fields.iter().map(|(key, value)| (key, value)))
}

impl Event {
    /// A field by its name.
    pub fn field(&self, name: &str) -> Option<&serde_json::Value> {
        self.fields.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }
}

/// When something happens, by both clocks.
#[derive(Debug, Clone, Copy)]
struct Moment {
    monotonic_ns: u64,
    time_ns: u64,
}

impl Moment {
    fn now() -> Self {
        Self { monotonic_ns: nanoseconds(ClockId::Monotonic), time_ns: nanoseconds(ClockId::Realtime) }
    }
}

/// A clock in nanoseconds; neither runs backwards past its zero.
fn nanoseconds(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Whoever listens in this process.
struct Listener;

impl Subscriber for Listener {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && metadata.target().starts_with(ROOT)
    }

    fn event(&self, event: &tracing::Event<'_>) {
        let (metadata, moment) = (event.metadata(), Moment::now());
        let mut packer = Packer::begin(moment, metadata);
        event.record(&mut packer);
        let number = ring::push(&packer.finish());
        let (logged, traced) = (log::wants(metadata), trace::is_on());
        if logged || traced {
            let mut builder = Builder::default();
            event.record(&mut builder);
            let event = builder.finish(number, moment, *metadata.level(), metadata.target());
            if logged {
                log::write(&event);
            }
            if traced {
                trace::tell(event);
            }
        }
    }

    // There are no spans.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// Begins to listen, once, before there is a thread that forks: what this sets up is never locked again.
pub fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::read_environment();
        // Somebody else's would have to be in this very library.
        let _ = tracing::subscriber::set_global_default(Listener);
    });
}

/// Opens what the environment asks for, in a program (not in a worker of one).
///
/// # Errors
/// A filter that is none; a file that can't be opened.
pub fn open() -> Result<()> {
    log::open()?;
    trace::open_asked()
}

/// In the only thread of a fork's child: what the parent has told, and to whom, is not this process's.
pub fn forget_in_child() {
    ring::forget_in_child();
    log::forget_in_child();
    trace::forget_in_child();
}
