//! `ps --watch`: a full screen that is drawn anew every now and then.

use std::time::{Duration, Instant};

use super::table::{self, Line, Style};
use super::view::{View, Viewer};
use super::{INTERRUPTED, has_colours};
use crate::error::Result;
use crate::sys::terminal::{self, Event, Screen};

/// Lines that are not the list: what this is, the table's head, and the keys.
const FRAME: usize = 3;

/// Shows it until somebody wants to leave. The exit code.
///
/// # Errors
/// When the terminal can't be used. It is as it was before in any case.
pub(super) fn watch(viewer: &mut Viewer, interval: Duration) -> Result<i32> {
    let screen = Screen::open()?;
    let colours = has_colours();
    let mut top = 0;
    let mut view = viewer.look();
    let mut next = Instant::now() + interval;
    loop {
        let (columns, rows) = terminal::size().unwrap_or((80, 24));
        let (shown, most) = page(&view, columns, rows, &mut top, interval);
        screen.draw(&shown.iter().map(|line| line.painted(colours)).collect::<Vec<_>>())?;
        match screen.wait_until(next)? {
            Event::Keys(keys) => match action(&keys) {
                Action::Leave(code) => return Ok(code),
                Action::Move(by) => top = top.saturating_add_signed(by).min(most),
                Action::Page(by) => {
                    let page = isize::try_from(rows.saturating_sub(FRAME).max(1)).unwrap_or(1);
                    top = top.saturating_add_signed(by * page).min(most);
                }
                Action::Look => next = Instant::now(),
                Action::None => {}
            },
            Event::Signal(libc::SIGINT) => return Ok(INTERRUPTED),
            Event::Signal(number) => return Ok(128 + number),
            Event::Redraw => {}
            Event::Quiet => {}
            Event::Gone => return Ok(0),
        }
        if Instant::now() >= next {
            view = viewer.look();
            next = Instant::now() + interval;
        }
    }
}

/// What is to be seen, and how far down one can go.
fn page(view: &View, columns: usize, rows: usize, top: &mut usize, interval: Duration) -> (Vec<Line>, usize) {
    let mut table = table::lines(view, columns).into_iter();
    let title = format!(
        "tractor-host ps   {}, {}   every {} s",
        count(view.hosts.len(), "host"),
        count(view.workers(), "worker"),
        interval.as_secs_f64()
    );
    let title = match view.problems.first() {
        Some(problem) => format!("{title}   ({problem})"),
        None => title,
    };
    let head = table.next();
    let list: Vec<Line> = table.collect();
    let room = rows.saturating_sub(FRAME);
    let most = list.len().saturating_sub(room);
    *top = (*top).min(most);
    let below = list.len().saturating_sub(*top + room);
    let keys = match (*top, below) {
        (0, 0) => "q quit   space look now".to_owned(),
        (above, below) => format!("↑↓ {above} above, {below} below   q quit   space look now"),
    };
    let mut shown = vec![Line::new(table::cut(&title, columns), Style::Plain)];
    shown.extend(head);
    shown.extend(list.into_iter().skip(*top).take(room));
    shown.resize_with(rows.saturating_sub(1).max(1), || Line::new(String::new(), Style::Plain));
    shown.push(Line::new(table::cut(&keys, columns), Style::Plain));
    // A terminal of a line or two shows what it can.
    shown.truncate(rows.max(1));
    (shown, most)
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

enum Action {
    Leave(i32),
    Move(isize),
    Page(isize),
    Look,
    None,
}

fn action(keys: &[u8]) -> Action {
    match keys {
        b"q" | b"Q" => Action::Leave(0),
        b"\x03" => Action::Leave(INTERRUPTED),
        b"j" | b"\x1b[B" | b"\x1bOB" => Action::Move(1),
        b"k" | b"\x1b[A" | b"\x1bOA" => Action::Move(-1),
        b"\x1b[6~" => Action::Page(1),
        b"\x1b[5~" => Action::Page(-1),
        b" " | b"\r" | b"\n" => Action::Look,
        // Several at once, of a fast typist.
        other if other.contains(&b'q') => Action::Leave(0),
        _ => Action::None,
    }
}
