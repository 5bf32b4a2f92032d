//! The view as aligned text: a tree, cut to a width.

use std::collections::{HashMap, HashSet};

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::view::{Doing, HostView, Use, View, WorkerView};

/// How a line looks, where there are colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    /// The head of the table.
    Head,
    /// A host.
    Host,
    /// Somebody should look at it.
    Alarm,
    /// It is on its way in or out.
    Change,
}

/// One line.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) text: String,
    style: Style,
}

impl Line {
    pub(super) fn new(text: String, style: Style) -> Self {
        Self { text, style }
    }

    pub(super) fn painted(&self, colours: bool) -> String {
        let code = match self.style {
            _ if !colours => return self.text.clone(),
            Style::Plain => return self.text.clone(),
            Style::Head => "7",
            Style::Host => "1",
            Style::Alarm => "31",
            Style::Change => "33",
        };
        format!("\x1b[{code}m{}\x1b[0m", self.text)
    }
}

const COLUMNS: [&str; 8] = ["HOST / WORKER", "PID", "BACKEND", "STATE", "AGE", "RSS", "CPU%", "CALL"];
/// Numbers stand to the right.
const RIGHT: [bool; 8] = [false, true, false, false, true, true, true, false];
/// The tree is cut where it takes more than half of what the others leave, but not below this.
const LEAST_TREE: usize = 20;

struct Row {
    cells: [String; 8],
    style: Style,
}

/// The table. With nothing to show it says so.
pub(super) fn lines(view: &View, width: usize) -> Vec<Line> {
    let rows: Vec<Row> = view.hosts.iter().flat_map(rows_of).collect();
    if rows.is_empty() {
        return vec![Line::new(cut("no host is running", width), Style::Plain)];
    }
    let head = Row { cells: COLUMNS.map(str::to_owned), style: Style::Head };
    let rows: Vec<Row> = std::iter::once(head).chain(rows).collect();
    let mut widths = [0; 8];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(&row.cells) {
            *width = (*width).max(cell.width());
        }
    }
    let others: usize = widths[1..7].iter().map(|width| width + 1).sum();
    widths[0] = widths[0].min((width.saturating_sub(others) / 2).max(LEAST_TREE));
    // The last one takes what there is, and nothing is added to it.
    widths[7] = 0;
    rows.iter()
        .map(|row| {
            let cells: Vec<String> =
                (0..8).map(|index| fit(&row.cells[index], widths[index], index)).collect();
            Line::new(cut(cells.join(" ").trim_end(), width), row.style)
        })
        .collect()
}

fn fit(cell: &str, width: usize, column: usize) -> String {
    if column == 7 {
        return cell.to_owned();
    }
    let cell = cut(cell, width);
    let room = " ".repeat(width.saturating_sub(cell.width()));
    if RIGHT[column] { room + &cell } else { cell + &room }
}

fn rows_of(host: &HostView) -> Vec<Row> {
    let mut words = host.argv.iter().map(String::as_str);
    let program = words.next().unwrap_or("?");
    let program = program.rsplit('/').next().unwrap_or(program);
    let label = std::iter::once(program).chain(words).collect::<Vec<_>>().join(" ");
    let call = match (&host.problem, host.state) {
        (Some(problem), _) => clean(problem),
        (None, _) => doing(&host.doing),
    };
    let mut rows = vec![Row {
        cells: [
            clean(&label),
            host.pid.to_string(),
            "host".into(),
            host.state.into(),
            host.process.as_ref().map_or("-".into(), |process| age(process.age)),
            memory(host.process.as_ref()),
            share(host.process.as_ref()),
            call,
        ],
        style: if host.state == "up" { Style::Host } else { Style::Alarm },
    }];
    let known: HashSet<u64> = host.workers.iter().filter_map(|worker| worker.id).collect();
    let mut below: HashMap<Option<u64>, Vec<&WorkerView>> = HashMap::new();
    for worker in &host.workers {
        // One whose parent has ended stands where that would.
        let parent = worker.parent.filter(|parent| known.contains(parent) && worker.id > Some(*parent));
        below.entry(parent).or_default().push(worker);
    }
    branch(None, "", &below, &mut rows);
    rows
}

fn branch(
    parent: Option<u64>,
    stem: &str,
    below: &HashMap<Option<u64>, Vec<&WorkerView>>,
    rows: &mut Vec<Row>,
) {
    let workers = below.get(&parent).map_or(&[][..], Vec::as_slice);
    for (index, worker) in workers.iter().enumerate() {
        let (twig, rest) = if index + 1 == workers.len() { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        rows.push(row_of(worker, &format!("{stem}{twig}")));
        if worker.id.is_some() {
            branch(worker.id, &format!("{stem}{rest}"), below, rows);
        }
    }
}

fn row_of(worker: &WorkerView, stem: &str) -> Row {
    let stopped = worker.process.as_ref().is_some_and(|process| matches!(process.state, 'T' | 't'));
    let state = match &worker.state {
        _ if stopped => "stopped",
        Some(state) => state,
        None => "?",
    };
    let style = match state {
        "killing" | "stopped" => Style::Alarm,
        "booting" | "cancelling" => Style::Change,
        _ => Style::Plain,
    };
    let number = match (worker.pid, worker.thread) {
        (Some(pid), _) => pid.to_string(),
        (None, Some(thread)) => format!("({thread})"),
        (None, None) => "-".into(),
    };
    Row {
        cells: [
            format!("{stem}{}", clean(&worker.name)),
            number,
            clean(&worker.backend),
            clean(state),
            worker.age.map_or("-".into(), age),
            memory(worker.process.as_ref()),
            share(worker.process.as_ref()),
            doing(&worker.doing),
        ],
        style,
    }
}

fn doing(doing: &Doing) -> String {
    let call = doing.call.as_ref().map(|call| {
        let file = call["file"].as_str().unwrap_or("?");
        let line = call["line"].as_i64().map_or("?".into(), |line| line.to_string());
        let function = call["function"].as_str().unwrap_or("?");
        clean(&format!("{}:{line} {function}", file.rsplit('/').next().unwrap_or(file)))
    });
    let wait = doing.wait.as_ref().map(|wait| format!("[{}]", clean(wait)));
    call.into_iter().chain(wait).collect::<Vec<_>>().join(" ")
}

fn memory(process: Option<&Use>) -> String {
    const UNITS: [&str; 5] = ["B", "K", "M", "G", "T"];
    let Some(bytes) = process.and_then(|process| process.rss) else { return "-".into() };
    let (mut size, mut unit) = (bytes as f64, 0);
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if size < 10.0 && unit > 0 {
        format!("{size:.1}{}", UNITS[unit])
    } else {
        format!("{size:.0}{}", UNITS[unit])
    }
}

fn share(process: Option<&Use>) -> String {
    process.map_or("-".into(), |process| format!("{:.0}", process.cpu))
}

/// `7s`, `3m05s`, `2h11m`, `4d06h`.
fn age(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    let (days, hours, minutes, seconds) = (whole / 86400, whole / 3600 % 24, whole / 60 % 60, whole % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{seconds:02}s"),
        (0, ..) => format!("{hours}h{minutes:02}m"),
        _ => format!("{days}d{hours:02}h"),
    }
}

/// Without what would act on a terminal: names come from anybody.
fn clean(text: &str) -> String {
    let acts = |char: char| {
        char.is_control()
            || matches!(char, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|char| if acts(char) { '?' } else { char }).collect()
}

/// At most so many columns of it.
pub(super) fn cut(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let (mut kept, mut used) = (String::new(), 0);
    for char in text.chars() {
        used += char.width().unwrap_or(0);
        if used >= width {
            break;
        }
        kept.push(char);
    }
    if width > 0 {
        kept.push('…');
    }
    kept
}
