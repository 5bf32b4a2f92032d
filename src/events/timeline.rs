//! Events to entries of a timeline, in the Trace Event Format of Chrome: what is a track, and what a slice.
//! Pure; [`super::trace`] writes them.
//!
//! The program is a group of tracks, one for each of its threads that spawns or waits; the supervisor is one, with
//! a track of its own and one for the fork server; and so are the workers of a backend, or of a process that
//! several live in. A worker's track has one slice for its life, in which others follow each other: `booting`,
//! `running`, `killing` with the rungs in it, `ending`, `abandoned`.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::trace::Span;
use super::{Event, Moment};
use crate::sys::{process, signal};

/// The group of the program's threads.
const PROGRAM: usize = 1;
/// The group of the supervisor, with its tracks.
const SUPERVISOR: usize = 2;
const FAULTS: u64 = 1;
const ZYGOTE: u64 = 2;

/// A track, by its group and its number there.
type Place = (usize, u64);

/// What has been begun and not ended.
pub(super) struct Timeline {
    origin: Moment,
    /// The groups of workers, by name.
    groups: Vec<String>,
    workers: HashMap<u64, Track>,
    zygote: Option<Track>,
    /// What threads of the program are at.
    spans: HashMap<i32, Pending>,
    named: Vec<i32>,
}

struct Track {
    at: Place,
    open: Vec<String>,
}

struct Pending {
    since_ns: u64,
    entry: Json,
}

impl Track {
    fn begin(&mut self, at: f64, name: &str, args: Json, into: &mut Vec<Json>) {
        into.push(entry("B", at, self.at, name, args));
        self.open.push(name.to_owned());
    }

    /// Ends slices until so many are left.
    fn end_to(&mut self, left: usize, at: f64, args: &Json, into: &mut Vec<Json>) {
        while self.open.len() > left {
            let name = self.open.pop().unwrap_or_default();
            let args = if self.open.len() == left { args.clone() } else { json!({}) };
            into.push(entry("E", at, self.at, &name, args));
        }
    }

    /// Goes on to the next slice of a life.
    fn turn_to(&mut self, at: f64, name: &str, args: Json, into: &mut Vec<Json>) {
        self.end_to(1, at, &json!({}), into);
        self.begin(at, name, args, into);
    }

    fn is_at(&self, name: &str) -> bool {
        self.open.get(1).is_some_and(|open| open == name)
    }

    fn instant(&self, at: f64, name: &str, args: Json, into: &mut Vec<Json>) {
        into.push(instant(at, self.at, name, args));
    }
}

fn entry(phase: &str, at: f64, (group, track): Place, name: &str, args: Json) -> Json {
    json!({ "ph": phase, "ts": at, "pid": group, "tid": track, "name": name, "cat": "tractor_host", "args": args })
}

fn instant(at: f64, place: Place, name: &str, args: Json) -> Json {
    let mut entry = entry("i", at, place, name, args);
    entry["s"] = "t".into();
    entry
}

/// The name of a group, or of a track in it, and its place among the others.
fn named(what: &str, (group, track): Place, name: &str, order: u64) -> [Json; 2] {
    let head = |key: String| json!({ "ph": "M", "ts": 0, "pid": group, "tid": track, "name": key });
    let (mut naming, mut sorting) = (head(format!("{what}_name")), head(format!("{what}_sort_index")));
    naming["args"] = json!({ "name": name });
    sorting["args"] = json!({ "sort_index": order });
    [naming, sorting]
}

/// All that an event tells beside its kind.
fn args(event: &Event) -> Json {
    let fields = event.fields.iter().map(|(key, value)| (key.clone(), value.clone()));
    let pid = event.pid.map(|pid| ("pid".to_owned(), pid.into()));
    Json::Object(fields.chain(pid).collect())
}

fn text<'a>(event: &'a Event, field: &str) -> &'a str {
    event.field(field).and_then(Json::as_str).unwrap_or_default()
}

impl Timeline {
    pub(super) fn begin(origin: Moment) -> Self {
        Self {
            origin,
            groups: Vec::new(),
            workers: HashMap::new(),
            zygote: None,
            spans: HashMap::new(),
            named: Vec::new(),
        }
    }

    /// What stands at the head.
    pub(super) fn first(&mut self) -> Vec<Json> {
        let main = process::id();
        let track = (PROGRAM, u64::from(main.unsigned_abs()));
        let mut first = Vec::new();
        first.extend(named("process", track, &format!("program (pid {main})"), 0));
        first.extend(named("thread", track, "main thread", 0));
        first.extend(named("process", (SUPERVISOR, FAULTS), "supervisor", 1));
        first.extend(named("thread", (SUPERVISOR, FAULTS), "faults", 0));
        let started = json!({ "unix_time_ns": self.origin.time_ns, "pid": main });
        first.push(entry("B", 0.0, track, "program", started));
        self.named.push(main);
        first
    }

    /// Microseconds since the beginning.
    fn micros(&self, monotonic_ns: u64) -> f64 {
        // Exact for a hundred days.
        monotonic_ns.saturating_sub(self.origin.monotonic_ns) as f64 / 1000.0
    }

    pub(super) fn event(&mut self, event: &Event, into: &mut Vec<Json>) {
        let at = self.micros(event.monotonic_ns);
        match event.kind.as_str() {
            "spawn" => self.spawned(event, at, into),
            kind if kind.starts_with("zygote_") => self.zygote(kind, event, at, into),
            kind => match event.worker.and_then(|worker| self.workers.get_mut(&worker)) {
                Some(track) => {
                    if goes_on(track, kind, event, at, into) {
                        return;
                    }
                    self.workers.remove(&event.worker.unwrap_or(0));
                }
                None if matches!(kind, "fault" | "refusal" | "quarantine" | "reclaim") => {
                    let mut args = args(event);
                    args["text"] = event.text.clone().into();
                    into.push(instant(at, (SUPERVISOR, FAULTS), kind, args));
                }
                None => {}
            },
        }
    }

    fn spawned(&mut self, event: &Event, at: f64, into: &mut Vec<Json>) {
        let Some(id) = event.worker else { return };
        let backend = event.backend.as_deref().unwrap_or("?");
        let group = match event.field("process").and_then(Json::as_str) {
            Some(process) => format!("process `{process}`"),
            None => format!("{backend} workers"),
        };
        let index = self.groups.iter().position(|known| *known == group).unwrap_or_else(|| {
            self.groups.push(group.clone());
            self.groups.len() - 1
        });
        let place = (SUPERVISOR + 1 + index, id);
        let name = event.name.as_deref().unwrap_or("?");
        let title = event.pid.map_or_else(|| name.to_owned(), |pid| format!("{name} (pid {pid})"));
        into.extend(named("process", place, &group, place.0 as u64));
        into.extend(named("thread", place, &title, id));
        let age = event.field("age").and_then(Json::as_f64).unwrap_or(0.0) * 1e6;
        let since = (at - age).max(0.0);
        let mut track = Track { at: place, open: Vec::new() };
        track.begin(since, name, args(event), into);
        track.begin(since, "booting", json!({}), into);
        self.workers.insert(id, track);
    }

    fn zygote(&mut self, kind: &str, event: &Event, at: f64, into: &mut Vec<Json>) {
        let place = (SUPERVISOR, ZYGOTE);
        if kind == "zygote_start" {
            if self.zygote.is_none() {
                into.extend(named("thread", place, "fork server", 1));
            }
            let mut track = Track { at: place, open: Vec::new() };
            let pid = event.pid.unwrap_or(0);
            track.begin(at, &format!("fork server (pid {pid})"), args(event), into);
            track.begin(at, "starting", json!({}), into);
            self.zygote = Some(track);
            return;
        }
        let Some(track) = &mut self.zygote else { return };
        if kind == "zygote_ready" {
            track.turn_to(at, "ready", args(event), into);
            return;
        }
        track.end_to(0, at, &args(event), into);
        if kind == "zygote_lost" {
            track.instant(at, "lost", args(event), into);
        }
    }

    pub(super) fn span(&mut self, span: &Span, thread_name: &str, now: Moment, into: &mut Vec<Json>) {
        let elapsed = u64::try_from(span.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        // When it was told, not when it is written.
        let late = super::Moment::now().monotonic_ns.saturating_sub(now.monotonic_ns);
        let since_ns = now.monotonic_ns.saturating_sub(elapsed.saturating_sub(late));
        let place = (PROGRAM, u64::from(span.thread.unsigned_abs()));
        if !self.named.contains(&span.thread) {
            self.named.push(span.thread);
            into.extend(named("thread", place, thread_name, u64::from(span.thread.unsigned_abs())));
        }
        let at = self.micros(since_ns);
        let args = json!({ "worker": span.of });
        let mut slice = entry("X", at, place, &format!("{} {}", span.what, span.of), args);
        slice["dur"] = ((now.monotonic_ns - since_ns) as f64 / 1000.0).into();
        // The same call that went on has begun at the same time, but for what it takes to reckon that.
        const SAME: u64 = 50_000;
        if let Some(before) = self.spans.remove(&span.thread)
            && before.since_ns.abs_diff(since_ns) > SAME
        {
            into.push(before.entry);
        }
        if span.goes_on {
            self.spans.insert(span.thread, Pending { since_ns, entry: slice });
        } else {
            into.push(slice);
        }
    }

    /// Ends all that has been begun.
    pub(super) fn end(&mut self, now: Moment, into: &mut Vec<Json>) {
        let at = self.micros(now.monotonic_ns);
        into.extend(self.spans.drain().map(|(_, pending)| pending.entry));
        let nothing = json!({});
        for track in self.workers.values_mut().chain(&mut self.zygote) {
            track.end_to(0, at, &nothing, into);
        }
        let main = (PROGRAM, u64::from(process::id().unsigned_abs()));
        into.push(entry("E", at, main, "program", nothing));
    }
}

/// Enters what happens to a worker. Whether there is more to come.
fn goes_on(track: &mut Track, kind: &str, event: &Event, at: f64, into: &mut Vec<Json>) -> bool {
    match kind {
        "started" if track.is_at("booting") => track.turn_to(at, "running", args(event), into),
        "told" if !track.is_at("killing") => track.turn_to(at, "ending", args(event), into),
        "kill" if !track.is_at("killing") => track.turn_to(at, "killing", args(event), into),
        "rung" => {
            if !track.is_at("killing") {
                track.turn_to(at, "killing", args(event), into);
            }
            track.end_to(2, at, &json!({}), into);
            track.begin(at, text(event, "rung"), args(event), into);
        }
        "exit" if text(event, "exit") == "abandoned" => {
            track.turn_to(at, "abandoned", args(event), into);
        }
        "exit" | "reclaim" | "refusal" => {
            track.end_to(0, at, &args(event), into);
            return false;
        }
        kind => {
            let mut args = args(event);
            let signal =
                event.field("signal").and_then(Json::as_i64).and_then(|number| i32::try_from(number).ok());
            let name = signal
                .map_or_else(|| kind.to_owned(), |number| format!("{kind}: {}", signal::describe(number)));
            if kind == "fault" {
                args["text"] = event.text.clone().into();
            }
            track.instant(at, &name, args, into);
        }
    }
    true
}
