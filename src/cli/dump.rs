//! `dump`: what the threads of a process are doing, read from outside.

use super::args::Picture;
use std::time::{Duration, Instant};

use super::{complain, print};
use crate::diag::dump::{Dump, Told};
use crate::diag::hosts;
use crate::sys::ledger::Life;
use crate::wire::control::Request;

/// The exit code when there is nothing to be shown.
const FAILED: i32 = 1;
/// How long a host has to tell of its workers.
const TO_TELL: Duration = Duration::from_secs(1);

/// Takes the dump and prints it; the exit code.
pub(super) fn show(picture: &Picture) -> i32 {
    let mut dump = match Dump::of(picture.pid, "read from outside", picture.tree) {
        Ok(dump) => dump,
        Err(obstacle) => {
            complain(format_args!("no dump of process {}: {obstacle}", picture.pid));
            return FAILED;
        }
    };
    ask(&mut dump);
    if !picture.json {
        return print(&dump.to_text());
    }
    match serde_json::to_string_pretty(&dump) {
        Ok(text) => print(&(text + "\n")),
        Err(error) => {
            complain(format_args!("no dump of process {}: {error}", picture.pid));
            FAILED
        }
    }
}

/// Has the process tell what can't be read from outside, if it is a host.
fn ask(dump: &mut Dump) {
    let (hosts, _) = hosts::find();
    let is_it = |host: &&hosts::Host| host.record.head.pid == dump.pid && matches!(host.life, Life::Alive);
    let Some(host) = hosts.iter().find(is_it) else { return };
    let answer = hosts::ask(&[host], Request::Dump, Instant::now() + TO_TELL).remove(0);
    let told = answer
        .map_err(|error| error.to_string())
        .and_then(|document| serde_json::from_slice::<Told>(&document).map_err(|error| error.to_string()));
    match told {
        Ok(told) => dump.take_in(told),
        Err(reason) => dump.unread.push(format!("its workers and events: {reason}")),
    }
}
