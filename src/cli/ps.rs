//! `ps`: what the hosts of this user do just now.

mod table;
mod view;
mod watch;

use std::time::Instant;

use super::args::Ps;
use super::{complain, print};
use crate::sys::terminal::{self, Signals};
use view::Viewer;

/// The exit code of a program that Ctrl-C has ended.
const INTERRUPTED: i32 = 130;

/// Shows it as often as was asked for, and returns the exit code.
pub(super) fn show(how: &Ps) -> i32 {
    let mut viewer = Viewer::default();
    match (how.watch, how.json, terminal::size()) {
        (true, false, Some(_)) => match watch::watch(&mut viewer, how.interval) {
            Ok(code) => code,
            Err(error) => {
                complain(error);
                1
            }
        },
        (true, ..) => repeat(&mut viewer, how),
        (false, ..) => once(&mut viewer, how.json),
    }
}

fn once(viewer: &mut Viewer, json: bool) -> i32 {
    let view = viewer.look();
    if json {
        return print(&format!("{}\n", view.to_json()));
    }
    for problem in &view.problems {
        complain(problem);
    }
    let width = width_asked_for().or(terminal::size().map(|(columns, _)| columns));
    let lines = table::lines(&view, width.unwrap_or(usize::MAX));
    let painted = lines.iter().map(|line| line.painted(has_colours()) + "\n");
    print(&painted.collect::<String>())
}

/// For a pipe: one after the other, until a signal comes or nobody reads any more.
fn repeat(viewer: &mut Viewer, how: &Ps) -> i32 {
    let signals = match Signals::block() {
        Ok(signals) => signals,
        Err(error) => {
            complain(error);
            return 1;
        }
    };
    let mut next = Instant::now();
    loop {
        match once(viewer, how.json) {
            0 => {}
            failed => return failed,
        }
        if !how.json && print("\n") != 0 {
            return 1;
        }
        next = (next + how.interval).max(Instant::now());
        while let Some(left) = next.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if let Some(number) = terminal::wait_for_signal(&signals, left) {
                return if number == libc::SIGINT { INTERRUPTED } else { 128 + number };
            }
        }
    }
}

/// `COLUMNS`, where somebody has exported it.
fn width_asked_for() -> Option<usize> {
    std::env::var("COLUMNS").ok()?.parse().ok().filter(|width| *width > 0)
}

/// Whether stdout takes colours, and wants them.
fn has_colours() -> bool {
    let declined = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    terminal::size().is_some() && !declined && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}
