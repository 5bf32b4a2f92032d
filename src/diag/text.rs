//! A dump for people: what matters first, one line for what needs no more.

use std::fmt::{self, Display, Write};

use super::dump::{Dump, Gil, Process, Thread, WorkerLine};
use super::stacks::Frame;
use super::tasks::{Loop, Task};

impl Dump {
    /// For people.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, to: &mut String) -> fmt::Result {
        writeln!(to, "==== tractor-host dump of process {}, {}", self.pid, self.reason)?;
        writeln!(to, "taken at {} in {:.1} ms", moment(self.taken), self.seconds * 1e3)?;
        if let Some(workers) = &self.workers {
            writeln!(to, "\nWorkers: {}", workers.len())?;
            write_workers(to, workers)?;
        }
        for process in &self.processes {
            write_process(to, process)?;
        }
        if !self.events.is_empty() {
            writeln!(to, "\nLast events")?;
            for event in &self.events {
                let before = self.taken - event["time_ns"].as_f64().unwrap_or_default() / 1e9;
                let (level, text) = (&event["level"], &event["text"]);
                let (level, text) = (level.as_str().unwrap_or_default(), text.as_str().unwrap_or_default());
                writeln!(to, "  {before:9.3} s before  {level:5} {text}")?;
            }
        }
        if !self.unread.is_empty() {
            writeln!(to, "\nNot read")?;
            for what in &self.unread {
                writeln!(to, "  {what}")?;
            }
        }
        writeln!(to, "==== end of the dump of process {}", self.pid)
    }
}

fn write_workers(to: &mut String, workers: &[WorkerLine]) -> fmt::Result {
    let known = |id: u64| workers.iter().any(|worker| worker.id == id);
    let is_root = |worker: &&WorkerLine| worker.parent.is_none_or(|parent| !known(parent));
    let mut open: Vec<_> = workers.iter().filter(is_root).rev().map(|worker| (worker, 1)).collect();
    // A worker's parent is older than it, so this is a tree.
    while let Some((worker, depth)) = open.pop() {
        write!(to, "{:indent$}{} `{}` [{}", "", worker.id, worker.name, worker.backend, indent = depth * 2)?;
        if let Some(pid) = worker.pid {
            write!(to, ", pid {pid}")?;
        }
        let state = worker.state.as_deref().unwrap_or("its record is locked");
        let given_up = if worker.quarantined { ", could not be ended" } else { "" };
        writeln!(to, "] {state}{given_up}, {}: {}", age(worker.age), worker.target)?;
        let below = workers.iter().rev().filter(|other| other.parent == Some(worker.id));
        open.extend(below.map(|other| (other, depth + 1)));
    }
    Ok(())
}

fn write_process(to: &mut String, process: &Process) -> fmt::Result {
    const LONGEST: usize = 120;
    write!(to, "\n== Process {} `{}`", process.pid, process.name)?;
    if let Some(version) = &process.python {
        write!(to, ", Python {version}")?;
    }
    write!(to, ", child of {}", process.parent)?;
    if let Some(lived) = process.age {
        write!(to, ", {}", age(lived))?;
    }
    if matches!(process.state, 'T' | 't' | 'Z' | 'X') {
        write!(to, ", {}", state(process.state))?;
    }
    let mut command = process.command.join(" ").replace('\n', "\\n");
    if command.len() > LONGEST {
        command.truncate(command.floor_char_boundary(LONGEST));
        command.push('…');
    }
    writeln!(to, ": {command}")?;
    if let Some(obstacle) = &process.obstacle {
        writeln!(to, "no Python stacks: {obstacle}")?;
    }
    for gil in &process.gils {
        write_gil(to, gil, process)?;
    }
    for interpreter in &process.interpreters {
        writeln!(to, "Interpreter {}", interpreter.id)?;
        for thread in &interpreter.threads {
            write_thread(to, thread)?;
        }
    }
    if !process.threads.is_empty() {
        if !process.interpreters.is_empty() {
            writeln!(to, "Threads without Python")?;
        }
        for thread in &process.threads {
            write_thread(to, thread)?;
        }
    }
    Ok(())
}

fn write_gil(to: &mut String, gil: &Gil, process: &Process) -> fmt::Result {
    let of: Vec<_> = gil.interpreters.iter().map(i64::to_string).collect();
    write!(to, "GIL of interpreter {}: ", of.join(", "))?;
    let Some(holder) = gil.holder else { return writeln!(to, "free") };
    let threads = process.interpreters.iter().flat_map(|it| &it.threads).chain(&process.threads);
    let named = threads.filter(|thread| thread.id == holder).map(name).next().unwrap_or_default();
    write!(to, "held by thread {holder}{named}")?;
    if let Some(id) = gil.held_in {
        write!(to, " in interpreter {id}")?;
    }
    match &gil.at {
        Some(frame) => writeln!(to, ", at {frame}"),
        None => writeln!(to),
    }
}

fn write_thread(to: &mut String, thread: &Thread) -> fmt::Result {
    write!(to, "  Thread {}{}: {}", thread.id, name(thread), state(thread.state))?;
    if let Some(call) = &thread.syscall {
        write!(to, " in {call}")?;
    }
    if let Some(what) = &thread.waits_for {
        write!(to, ": {what}")?;
    }
    if let Some(channel) = thread.wait_channel.as_ref().filter(|_| thread.state == 'D') {
        write!(to, ", in the kernel's {channel}")?;
    }
    writeln!(to, "{}", if thread.holds_gil { ", HOLDS THE GIL" } else { "" })?;
    write_frames(to, &thread.frames, 4)?;
    if thread.omitted > 0 {
        writeln!(to, "    … and {} more", thread.omitted)?;
    }
    for found in &thread.loops {
        write_loop(to, found)?;
    }
    Ok(())
}

fn write_loop(to: &mut String, found: &Loop) -> fmt::Result {
    writeln!(to, "    {} tasks: {}", found.kind, found.tasks.len())?;
    for task in &found.tasks {
        write_task(to, task)?;
    }
    Ok(())
}

fn write_task(to: &mut String, task: &Task) -> fmt::Result {
    /// Of a deep one: what it waits in, and what it was made for.
    const INNERMOST: usize = 2;
    const OUTERMOST: usize = 3;
    const DEEPEST: usize = 20;
    let indent = 6 + 2 * task.depth.min(DEEPEST);
    let runs = if task.running { ", runs" } else { "" };
    writeln!(to, "{:indent$}`{}`{runs}", "", task.name)?;
    // All of trio's tasks that wait do so in the same two functions.
    let same = task.frames.iter().take_while(|frame| frame.file.ends_with("trio/_core/_traps.py")).count();
    let frames = &task.frames[same..];
    if frames.len() <= INNERMOST + OUTERMOST {
        return write_frames(to, frames, indent + 4);
    }
    write_frames(to, &frames[..INNERMOST], indent + 4)?;
    writeln!(to, "{:indent$}…", "", indent = indent + 4)?;
    write_frames(to, &frames[frames.len() - OUTERMOST..], indent + 4)
}

fn write_frames(to: &mut String, frames: &[Frame], indent: usize) -> fmt::Result {
    frames.iter().try_for_each(|frame| writeln!(to, "{:indent$}{frame}", ""))
}

impl Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line} in {}", self.file, self.function),
            None => write!(f, "{} in {}", self.file, self.function),
        }
    }
}

/// Both names, where they differ.
fn name(thread: &Thread) -> String {
    match &thread.name {
        Some(name) if !name.starts_with(&thread.kernel_name) || thread.kernel_name.is_empty() => {
            format!(" `{name}` (`{}`)", thread.kernel_name)
        }
        Some(name) => format!(" `{name}`"),
        None => format!(" `{}`", thread.kernel_name),
    }
}

fn state(state: char) -> &'static str {
    match state {
        'R' => "runs",
        'S' | 'I' => "sleeps",
        'D' => "sleeps and can't be woken",
        'T' | 't' => "stopped",
        'Z' | 'X' => "ended",
        _ => "in a state that is not known",
    }
}

fn age(seconds: f64) -> String {
    match seconds {
        ..60.0 => format!("{seconds:.1} s old"),
        ..3600.0 => format!("{:.0} min old", seconds / 60.0),
        _ => format!("{:.1} h old", seconds / 3600.0),
    }
}

/// A time of day in UTC, by the calendar that the world uses.
fn moment(since_1970: f64) -> String {
    let seconds = since_1970 as i64;
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Counted from the first of March of the year 0, so that the day that is there every four years is the
    // last one of a year; 146,097 days are 400 years.
    let day = days + 719_468;
    let (era, of_era) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", rest / 3600, rest / 60 % 60, rest % 60)
}
