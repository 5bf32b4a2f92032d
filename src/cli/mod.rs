//! The launcher's command line: what was typed (`args`), which Python that means (`python`), and one
//! file a command. How Python is started and run is `interp::runtime`'s business.

pub mod args;
mod doctor;
mod dump;
mod help;
mod ps;
mod python;
mod reap;
mod run;

use std::fmt::Display;
use std::io::Write;

use args::Command;

/// The exit code for a command line that makes no sense.
const USAGE: i32 = 2;

/// Does what the command line says and returns the exit code that the process should leave with.
/// A Python program may as well leave the process itself.
pub fn main() -> i32 {
    match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Run(program)) => run::program(&program),
        Ok(Command::Child { directory, options }) => run::child(directory, options),
        Ok(Command::Doctor { json }) => doctor::examine(json),
        Ok(Command::Ps(how)) => ps::show(&how),
        Ok(Command::Reap(how)) => reap::reap(&how),
        Ok(Command::Dump(picture)) => dump::show(&picture),
        Ok(Command::Help(topic)) => print(help::text(topic)),
        Ok(Command::Version) => print(concat!("tractor-host ", env!("CARGO_PKG_VERSION"), "\n")),
        Err(error) => {
            complain(&error);
            if error.is_empty_command_line() {
                complain_plainly(help::text(args::Topic::All));
            }
            USAGE
        }
    }
}

/// Writes a command's answer to stdout.
fn print(text: &str) -> i32 {
    match std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush()) {
        Ok(()) => 0,
        Err(error) => {
            complain(format_args!("failed to write to stdout: {error}"));
            1
        }
    }
}

/// One line to stderr. Where there is none, there is nobody to tell.
fn complain(what: impl Display) {
    complain_plainly(&format!("tractor-host: {what}\n"));
}

fn complain_plainly(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
