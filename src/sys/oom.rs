//! What the kernel tells of its out-of-memory killer: counters, one of each memory cgroup and one of the
//! whole machine. They say how many processes it has ended, and never which; so a count is taken before a
//! process is made, and held against another one when it has died.
//!
//! What cannot be read is no evidence, for nothing and against nothing.

use std::collections::HashMap;
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Counts at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Counts {
    taken: Instant,
    /// Of the whole machine.
    machine: Option<u64>,
    /// Of the memory cgroup of this process.
    cgroup: Option<Counter>,
}

/// The counter of one memory cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Counter {
    file: PathBuf,
    count: u64,
}

/// What is known of one process from before its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Before {
    /// What the machine had counted.
    machine: Option<u64>,
    /// The cgroup that the process was made in, and what it had counted.
    cgroup: Option<Counter>,
}

/// What the counters say of a death by SIGKILL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Evidence {
    /// Nothing can be told.
    #[default]
    None,
    /// The cgroup of the process has counted so many more.
    Cgroup(u64),
    /// The machine has counted so many more, and the process's cgroup cannot be asked.
    Machine(u64),
    /// Nobody on this machine has been ended.
    Nobody,
}

/// Takes counts and compares them.
#[derive(Debug, Default)]
pub struct Watch {
    /// Once it could be read.
    layout: Option<Layout>,
    latest: Option<Counts>,
    /// Up to where the count of a cgroup (of the machine: no path) has been told as the end of a process of
    /// ours. What it has ended once is no evidence for the death of another process that is older.
    told: HashMap<Option<PathBuf>, u64>,
}

/// How old a count may be to stand for that of now. Taking one costs some 40 µs.
const FRESH: Duration = Duration::from_millis(100);

impl Watch {
    /// To be called before a process is made: what has been counted until now, or shortly before.
    pub fn look(&mut self) {
        if self.latest.as_ref().is_some_and(|counts| counts.taken.elapsed() < FRESH) {
            return;
        }
        if self.layout.is_none() {
            self.layout = fs::read_to_string("/proc/self/mountinfo").ok().map(|text| Layout::parse(&text));
        }
        let taken = Instant::now();
        let cgroup = self.counter_file("self").and_then(|file| {
            let count = count_in(&file)?;
            Some(Counter { file, count })
        });
        self.latest = Some(Counts { taken, machine: count_in(MACHINE.as_ref()), cgroup });
    }

    /// What there is to compare with for a process that was made after the last look, and lives.
    pub fn before(&self, pid: i32) -> Before {
        let Some(counts) = &self.latest else { return Before { machine: None, cgroup: None } };
        let file = self.counter_file(pid);
        // Elsewhere than this process it has been put by somebody, and its own count is not known from before.
        let cgroup = counts.cgroup.clone().filter(|counter| Some(&counter.file) == file.as_ref());
        Before { machine: counts.machine, cgroup }
    }

    /// What the counters say of a process that SIGKILL has ended and that was not waited for yet. Each count
    /// is evidence once.
    pub fn compare(&mut self, before: &Before, pid: i32) -> Evidence {
        let machine = count_in(MACHINE.as_ref());
        if machine.is_some() && machine == before.machine {
            return Evidence::Nobody;
        }
        let cgroup = before.cgroup.as_ref().filter(|counter| self.still_in(pid, &counter.file));
        let evidence = if let Some(counter) = cgroup
            && let Some(now) = count_in(&counter.file)
        {
            match self.rise(Some(&counter.file), counter.count, now) {
                0 => Evidence::None,
                more => Evidence::Cgroup(more),
            }
        } else if let (Some(then), Some(now)) = (before.machine, machine) {
            match self.rise(None, then, now) {
                0 => Evidence::None,
                more => Evidence::Machine(more),
            }
        } else {
            Evidence::None
        };
        if let (Evidence::Cgroup(_) | Evidence::Machine(_), Some(then)) = (evidence, before.machine) {
            let told = self.told.entry(None).or_default();
            *told = then.max(*told) + 1;
        }
        if let (Evidence::Cgroup(_), Some(counter)) = (evidence, cgroup) {
            let told = self.told.entry(Some(counter.file.clone())).or_default();
            *told = counter.count.max(*told) + 1;
        }
        evidence
    }

    fn rise(&self, counter: Option<&PathBuf>, then: u64, now: u64) -> u64 {
        let told = self.told.get(&counter.cloned()).copied().unwrap_or(0);
        now.saturating_sub(then.max(told))
    }

    /// Whether a process that has ended was in the cgroup with that counter to the last, as far as can be
    /// known: version 1 forgets at once where a process was.
    fn still_in(&self, pid: i32, counter: &Path) -> bool {
        let forgets = self.layout.as_ref().is_some_and(|layout| layout.memory.is_some());
        forgets || self.counter_file(pid).as_deref() == Some(counter)
    }

    /// The counter of the memory cgroup that a process is in.
    fn counter_file(&self, process: impl Display) -> Option<PathBuf> {
        let membership = fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
        self.layout.as_ref()?.counter_file(&membership, Path::exists)
    }
}

/// What has the count of the whole machine.
const MACHINE: &str = "/proc/vmstat";

fn count_in(file: &Path) -> Option<u64> {
    parse_count(&fs::read_to_string(file).ok()?)
}

/// Where the cgroup file systems are mounted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layout {
    /// Version 1, with the memory controller.
    pub memory: Option<Mount>,
    /// Version 2.
    pub unified: Option<Mount>,
}

/// A part of a file system, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The folder of the file system that is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
}

impl Layout {
    /// From the text of a `/proc/PID/mountinfo`.
    pub fn parse(mountinfo: &str) -> Self {
        let mut found = Self::default();
        for line in mountinfo.lines() {
            let Some((place, kind)) = line.split_once(" - ") else { continue };
            let (mut place, mut kind) = (place.split(' ').skip(3), kind.split(' '));
            let (Some(root), Some(point)) = (place.next(), place.next()) else { continue };
            let mount = Mount { root: unescape(root).into(), point: unescape(point).into() };
            match (kind.next(), kind.nth(1)) {
                (Some("cgroup"), Some(options)) if options.split(',').any(|option| option == "memory") => {
                    found.memory.get_or_insert(mount);
                }
                (Some("cgroup2"), _) => drop(found.unified.get_or_insert(mount)),
                _ => {}
            }
        }
        found
    }

    /// The file with the counter of the memory cgroup that the text of a `/proc/PID/cgroup` names, if that
    /// can be seen from here.
    pub fn counter_file(&self, membership: &str, exists: impl Fn(&Path) -> bool) -> Option<PathBuf> {
        let mut unified = None;
        for line in membership.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
            if controllers.split(',').any(|controller| controller == "memory") {
                let file = self.memory.as_ref()?.folder(path)?.join("memory.oom_control");
                return exists(&file).then_some(file);
            }
            if controllers.is_empty() {
                unified = Some(path);
            }
        }
        // Where the controller is not enabled, the next cgroup above answers for the memory.
        let mount = self.unified.as_ref()?;
        let folder = mount.folder(unified?)?;
        folder.ancestors().take_while(|folder| folder.starts_with(&mount.point)).find_map(|folder| {
            ["memory.events.local", "memory.events"]
                .into_iter()
                .map(|name| folder.join(name))
                .find(|file| exists(file))
        })
    }
}

impl Mount {
    /// Where a cgroup is to be found; nowhere, when it has been removed or is not in this mount.
    fn folder(&self, cgroup: &str) -> Option<PathBuf> {
        if cgroup.ends_with(" (deleted)") || cgroup.split('/').any(|part| part == "..") {
            return None;
        }
        Some(self.point.join(Path::new(cgroup).strip_prefix(&self.root).ok()?))
    }
}

/// The value of `oom_kill` in a file of names and numbers: a `memory.events`, a `memory.oom_control`, a
/// `vmstat`.
pub fn parse_count(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")).and_then(|count| count.trim().parse().ok())
}

/// A path as mountinfo writes it: a space is `\040`.
fn unescape(path: &str) -> String {
    ["\\040 ", "\\011\t", "\\012\n", "\\134\\"]
        .into_iter()
        .fold(path.to_owned(), |text, pair| text.replace(&pair[..4], &pair[4..]))
}
