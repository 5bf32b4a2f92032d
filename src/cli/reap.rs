//! `reap`: what hosts that were killed have left, by what they have written down of it, and its end.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde::Serialize;

use super::args::Reap;
use super::{complain, print};
use crate::diag::hosts::{self, Host};
use crate::sys::ledger::{Life, Made};
use crate::sys::process::Child;

/// The exit code when something is left, or would be.
const LEFT: i32 = 1;
/// How long the kernel may take to end a process that was killed.
const KILLING: Duration = Duration::from_secs(2);

/// What came of looking after all dead hosts.
#[derive(Debug, Serialize)]
struct Account {
    version: u32,
    /// Whether anything was done about it.
    forced: bool,
    hosts: Vec<HostAccount>,
    /// What could not be read.
    problems: Vec<String>,
    /// Whether something is left.
    left: bool,
}

#[derive(Debug, Serialize)]
struct HostAccount {
    pid: i32,
    argv: Vec<String>,
    /// What of its it is.
    processes: Vec<ProcessAccount>,
    /// Its files that are, or were, there.
    files: Vec<String>,
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ProcessAccount {
    #[serde(flatten)]
    made: Made,
    /// `found`, `ended by SIGINT`, `ended by SIGKILL`, `left` or why it could not be reached.
    outcome: String,
}

/// Tells of it, or sees to it; the exit code.
pub(super) fn reap(how: &Reap) -> i32 {
    let (found, problems) = hosts::find_and_hold();
    let dead: Vec<&Host> = found.iter().filter(|host| host.life != Life::Alive).collect();
    let mut account = Account { version: 1, forced: how.force, hosts: Vec::new(), problems, left: false };
    for host in dead {
        let (told, left) = look_after(host, how);
        account.hosts.push(told);
        account.left |= left;
    }
    account.left |= !account.problems.is_empty();
    let printed = if how.json {
        match serde_json::to_string(&account) {
            Ok(text) => print(&(text + "\n")),
            Err(error) => {
                complain(error);
                1
            }
        }
    } else {
        account.problems.iter().for_each(complain);
        print(&text(&account))
    };
    match printed {
        0 if account.left => LEFT,
        code => code,
    }
}

/// One dead host. Whether something of it is left.
fn look_after(host: &Host, how: &Reap) -> (HostAccount, bool) {
    let there = host.record.head.files.iter().filter(|own| own.is_there());
    let mut told = HostAccount {
        pid: host.record.head.pid,
        argv: host.record.head.argv.clone(),
        processes: Vec::new(),
        files: there.map(|own| own.path.display().to_string()).chain([host.record_path()]).collect(),
        problems: Vec::new(),
    };
    if host.record.unreadable > 0 {
        let what = format!("{} lines of its record cannot be read", host.record.unreadable);
        told.problems.push(what);
    }
    let survivors = host.survivors();
    if !how.force {
        let found = |made: &&Made| ProcessAccount { made: (*made).clone(), outcome: "found".into() };
        told.processes = survivors.iter().map(found).collect();
        return (told, true);
    }
    told.processes = end(&survivors, how.grace);
    // What can't be ended must still be known to the next one who looks.
    let mut left = told.processes.iter().any(|process| !process.outcome.starts_with("ended"));
    if !left {
        told.problems.extend(host.remove_files());
        left = host.record_is_there();
    }
    (told, left)
}

/// Ends these, all at the same time.
fn end(survivors: &[&Made], grace: Duration) -> Vec<ProcessAccount> {
    let held: Vec<(&Made, Result<Option<Child>, String>)> =
        survivors.iter().map(|made| (*made, made.hold().map_err(|error| error.to_string()))).collect();
    let asked = Instant::now() + grace;
    let tell = |child: &Child, signals: &[Signal]| -> Result<(), String> {
        signals.iter().try_for_each(|signal| child.signal(*signal)).map_err(|error| error.to_string())
    };
    let told: Vec<(&Made, Result<Option<Child>, String>)> = held
        .into_iter()
        .map(|(made, held)| {
            // One that is stopped would not hear of it.
            let held = held.and_then(|held| match held {
                Some(child) => tell(&child, &[Signal::INT, Signal::CONT]).map(|()| Some(child)),
                None => Ok(None),
            });
            (made, held)
        })
        .collect();
    let mut ended = Vec::new();
    let mut stubborn = Vec::new();
    for (made, held) in told {
        match held {
            Ok(Some(child)) if child.wait_until(asked) => ended.push((made, "ended by SIGINT".to_owned())),
            Ok(Some(child)) => stubborn.push((made, tell(&child, &[Signal::KILL]), child)),
            // It has ended since it was found.
            Ok(None) => ended.push((made, "ended by itself".to_owned())),
            Err(error) => ended.push((made, error)),
        }
    }
    let killed = Instant::now() + KILLING;
    for (made, told, child) in stubborn {
        let outcome = match told {
            Ok(()) if child.wait_until(killed) => "ended by SIGKILL".to_owned(),
            Ok(()) => "left".to_owned(),
            Err(error) => error,
        };
        ended.push((made, outcome));
    }
    ended.into_iter().map(|(made, outcome)| ProcessAccount { made: made.clone(), outcome }).collect()
}

fn text(account: &Account) -> String {
    if account.hosts.is_empty() {
        return "nothing is left of any host that is gone\n".into();
    }
    let mut text = String::new();
    for host in &account.hosts {
        text.push_str(&format!("host {} ({})\n", host.pid, clean(&host.argv.join(" "))));
        for ProcessAccount { made, outcome } in &host.processes {
            let what = if account.forced { outcome } else { "is still there" };
            text.push_str(&format!(
                "  process {} ({} `{}`): {}\n",
                made.pid,
                clean(&made.kind),
                clean(&made.name),
                clean(what)
            ));
        }
        let verb = match (account.forced, host.processes.iter().all(|one| one.outcome.starts_with("ended"))) {
            (true, true) => "removed",
            (true, false) => "kept",
            (false, _) => "is still there",
        };
        for file in &host.files {
            text.push_str(&format!("  {}: {verb}\n", clean(file)));
        }
        for problem in &host.problems {
            text.push_str(&format!("  {}\n", clean(problem)));
        }
    }
    text.push_str(match (account.forced, account.left) {
        (false, _) => "nothing was done; `tractor-host reap --force` ends and removes it\n",
        (true, true) => "something is left\n",
        (true, false) => "nothing is left\n",
    });
    text
}

fn clean(text: &str) -> String {
    text.replace(char::is_control, "?")
}
