//! An event's way from `tracing` into words of the ring, and out of them.

use std::fmt::{Debug, Write};

use serde_json::Value as Json;
use tracing::field::{Field, Visit};
use tracing::{Level, Metadata};

use super::{Event, LADDER, Moment, SUPERVISOR, WORKER, ZYGOTE};

/// What an event takes in the ring.
pub(super) const WORDS: usize = 63;
const BYTES: usize = WORDS * 8;
/// No text takes more, so that there is room for the others.
const LONGEST: usize = 200;

const LEVELS: [Level; 5] = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];
const LOGGERS: [&str; 4] = [WORKER, LADDER, ZYGOTE, SUPERVISOR];

/// All names that events are told under.
pub(super) fn loggers() -> [&'static str; 4] {
    LOGGERS
}

/// An event as the ring has it.
pub(super) type Packed = [u64; WORDS];

#[derive(Clone, Copy)]
#[repr(u8)]
enum Tag {
    End,
    Unsigned,
    Signed,
    Float,
    Bool,
    Text,
}

/// Puts the fields of an event one after the other, as far as there is room.
pub(super) struct Packer {
    bytes: [u8; BYTES],
    used: usize,
}

impl Packer {
    pub(super) fn begin(moment: Moment, metadata: &Metadata<'_>) -> Self {
        let mut packer = Self { bytes: [0; BYTES], used: 0 };
        packer.put(&moment.monotonic_ns.to_le_bytes());
        packer.put(&moment.time_ns.to_le_bytes());
        let level = LEVELS.iter().position(|level| level == metadata.level());
        let logger = LOGGERS.iter().position(|logger| *logger == metadata.target());
        // So few that they fit.
        packer.put(&[level.unwrap_or(0) as u8, logger.unwrap_or(LOGGERS.len() - 1) as u8]);
        packer
    }

    pub(super) fn finish(self) -> Packed {
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(self.bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        }
        words
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
    }

    fn field(&mut self, field: &Field, tag: Tag, value: &[u8]) {
        let name = field.name().as_bytes();
        // With the tag that ends it all.
        if self.used + 2 + name.len() + value.len() < BYTES
            && let Ok(length) = u8::try_from(name.len())
        {
            self.put(&[tag as u8, length]);
            self.put(name);
            self.put(value);
        }
    }

    fn text(&mut self, field: &Field, text: &str) {
        let room = BYTES.saturating_sub(self.used + field.name().len() + 4).min(LONGEST);
        if text.len() <= room {
            self.sized(field, text.as_bytes());
        } else {
            const CUT: &str = "…";
            let mut buffer = [0; LONGEST];
            let kept = text.floor_char_boundary(room.saturating_sub(CUT.len()));
            buffer[..kept].copy_from_slice(&text.as_bytes()[..kept]);
            buffer[kept..kept + CUT.len()].copy_from_slice(CUT.as_bytes());
            self.sized(field, &buffer[..kept + CUT.len()]);
        }
    }

    fn sized(&mut self, field: &Field, text: &[u8]) {
        let mut buffer = [0; LONGEST + 1];
        // LONGEST fits into a byte.
        buffer[0] = text.len() as u8;
        buffer[1..=text.len()].copy_from_slice(text);
        self.field(field, Tag::Text, &buffer[..=text.len()]);
    }
}

/// As much of a text as the ring takes.
struct Short {
    bytes: [u8; LONGEST + 4],
    used: usize,
}

impl Write for Short {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let kept = text.floor_char_boundary(self.bytes.len() - self.used);
        self.bytes[self.used..self.used + kept].copy_from_slice(&text.as_bytes()[..kept]);
        self.used += kept;
        // It is longer than the ring takes by now.
        if kept < text.len() { Err(std::fmt::Error) } else { Ok(()) }
    }
}

impl Visit for Packer {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.field(field, Tag::Unsigned, &value.to_le_bytes());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.field(field, Tag::Signed, &value.to_le_bytes());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.field(field, Tag::Float, &value.to_le_bytes());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.field(field, Tag::Bool, &[value.into()]);
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, value);
    }
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let mut short = Short { bytes: [0; LONGEST + 4], used: 0 };
        // What does not fit is cut off.
        let _ = write!(short, "{value:?}");
        let text = String::from_utf8_lossy(&short.bytes[..short.used]);
        self.text(field, &text);
    }
}

/// Makes an event of its fields.
#[derive(Default)]
pub(super) struct Builder {
    kind: String,
    worker: Option<u64>,
    name: Option<String>,
    backend: Option<String>,
    pid: Option<i64>,
    message: Option<String>,
    fields: Vec<(String, Json)>,
}

impl Builder {
    fn add(&mut self, name: &str, value: Json) {
        let text = |value: Json| match value {
            Json::String(text) => text,
            other => other.to_string(),
        };
        match name {
            "kind" => self.kind = text(value),
            "worker" => self.worker = value.as_u64(),
            "name" => self.name = Some(text(value)),
            "backend" => self.backend = Some(text(value)),
            "pid" => self.pid = value.as_i64(),
            "message" => self.message = Some(text(value)),
            _ => self.fields.push((name.to_owned(), value)),
        }
    }

    pub(super) fn finish(self, number: u64, moment: Moment, level: Level, logger: &str) -> Event {
        let text = self.text();
        let Self { kind, worker, name, backend, pid, fields, .. } = self;
        let Moment { monotonic_ns, time_ns } = moment;
        let logger = logger.to_owned();
        Event { number, monotonic_ns, time_ns, level, logger, kind, worker, name, backend, pid, fields, text }
    }

    /// The message, or what it would say.
    fn text(&self) -> String {
        if let Some(message) = &self.message {
            return message.clone();
        }
        let mut text = match (&self.name, &self.backend) {
            (Some(name), Some(backend)) => format!("worker `{name}` ({backend}"),
            _ => "(".to_owned(),
        };
        // Writing to a string cannot fail.
        if let Some(pid) = self.pid {
            let _ = write!(text, "{}pid {pid}", if text.len() > 1 { ", " } else { "" });
        }
        text.push(')');
        let mut text = if text == "()" { self.kind.clone() } else { format!("{}: {text}", self.kind) };
        for (name, value) in &self.fields {
            let _ = write!(text, " {name}={value}");
        }
        text
    }
}

impl Visit for Builder {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field.name(), value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field.name(), value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field.name(), value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field.name(), value.into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field.name(), value.into());
    }
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.add(field.name(), format!("{value:?}").into());
    }
}

/// Takes an event out of what a [`Packer`] has made.
pub(super) fn unpack(number: u64, words: &Packed) -> Option<Event> {
    let mut bytes = Vec::with_capacity(BYTES);
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    let mut rest = &bytes[..];
    let monotonic_ns = u64::from_le_bytes(*take(&mut rest)?);
    let time_ns = u64::from_le_bytes(*take(&mut rest)?);
    let [level, logger] = *take::<2>(&mut rest)?;
    let level = *LEVELS.get(usize::from(level))?;
    let logger = *LOGGERS.get(usize::from(logger))?;
    let mut builder = Builder::default();
    while let Some(&[tag, length]) = take::<2>(&mut rest).filter(|[tag, _]| *tag != Tag::End as u8) {
        let (name, after) = rest.split_at_checked(length.into())?;
        rest = after;
        let value: Json = match tag {
            tag if tag == Tag::Unsigned as u8 => u64::from_le_bytes(*take(&mut rest)?).into(),
            tag if tag == Tag::Signed as u8 => i64::from_le_bytes(*take(&mut rest)?).into(),
            tag if tag == Tag::Float as u8 => f64::from_le_bytes(*take(&mut rest)?).into(),
            tag if tag == Tag::Bool as u8 => (*take::<1>(&mut rest)? != [0]).into(),
            tag if tag == Tag::Text as u8 => {
                let [length] = *take::<1>(&mut rest)?;
                let (text, after) = rest.split_at_checked(length.into())?;
                rest = after;
                String::from_utf8_lossy(text).into()
            }
            _ => return None,
        };
        builder.add(&String::from_utf8_lossy(name), value);
    }
    Some(builder.finish(number, Moment { monotonic_ns, time_ns }, level, logger))
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (taken, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(taken)
}
