//! Events as lines on stderr, or in a file: what the variables TRACTOR_HOST_LOG and TRACTOR_HOST_LOG_FILE ask
//! for. Each line is one call and takes no lock, so that it works in a forked child, and on a thread that must
//! not wait for Python.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::Targets;

use super::{Event, ROOT};
use crate::error::{Error, Result};
use crate::sys::fork_local::ForkLocal;
use crate::sys::{fd, process};

/// Which events.
pub const VARIABLE: &str = "TRACTOR_HOST_LOG";
/// Where to.
pub const FILE_VARIABLE: &str = "TRACTOR_HOST_LOG_FILE";

static SETTING: OnceLock<Setting> = OnceLock::new();
static FILE: ForkLocal<OwnedFd> = ForkLocal::new();
/// Somebody else passes on what is no error.
static TAKEN: AtomicBool = AtomicBool::new(false);

struct Setting {
    filter: Targets,
    /// The loudest that gets through it.
    most: LevelFilter,
    /// Somebody has asked for just this.
    explicit: bool,
    file: Option<PathBuf>,
    wrong: Option<String>,
}

/// Reads the variables, once.
pub(super) fn read_environment() {
    SETTING.get_or_init(|| {
        let text = std::env::var_os(VARIABLE).unwrap_or_default();
        let text = text.to_string_lossy();
        let usual = || Targets::new().with_default(LevelFilter::WARN);
        let (filter, wrong) = match parse(&text) {
            Ok(Some(filter)) => (filter, None),
            Ok(None) => (usual(), None),
            Err(wrong) => (usual(), Some(wrong)),
        };
        let file = std::env::var_os(FILE_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        Setting {
            most: filter
                .iter()
                .map(|(_, level)| level)
                .chain(filter.default_level())
                .max()
                .unwrap_or(LevelFilter::OFF),
            filter,
            explicit: !text.trim().is_empty() && wrong.is_none(),
            // The directory may change.
            file: file.map(|file| std::path::absolute(&file).unwrap_or(file)),
            wrong,
        }
    });
}

/// What a filter means: `debug`, `tractor_host.ladder=info,warn`, `off`; `None` where there is none.
///
/// # Errors
/// Why it is none.
pub fn parse(text: &str) -> std::result::Result<Option<Targets>, String> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    let wrong = |what: String| {
        format!(
            "{VARIABLE}={text:?}: {what}; it takes a level (off, error, warn, info, debug, trace), or \
             NAME=LEVEL for the names {}, separated by commas",
            super::record::loggers().join(", ")
        )
    };
    let directives: Vec<_> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    // `Targets` takes any word for a name.
    for directive in &directives {
        let (name, level) =
            directive.split_once('=').map_or((*directive, None), |(name, level)| (name, Some(level)));
        let known = name == ROOT || super::record::loggers().contains(&name);
        if level.is_none() && name.parse::<LevelFilter>().is_ok() {
            continue;
        }
        if level.is_some_and(|level| level.parse::<LevelFilter>().is_err()) {
            return Err(wrong(format!("`{directive}` names no level")));
        }
        if !known {
            return Err(wrong(format!("there is no `{name}`")));
        }
    }
    directives.join(",").parse().map(Some).map_err(|error| wrong(format!("{error}")))
}

/// Whether such an event becomes a line.
pub(super) fn wants(metadata: &Metadata<'_>) -> bool {
    let Some(setting) = SETTING.get() else { return false };
    let level = metadata.level();
    setting.most >= *level
        && setting.filter.would_enable(metadata.target(), level)
        && (*level == Level::ERROR || setting.explicit || !TAKEN.load(Ordering::Relaxed))
}

/// Has lines that nobody has asked for in the environment left to somebody else, but for errors.
pub fn leave_to_another(taken: bool) {
    TAKEN.store(taken, Ordering::Relaxed);
}

/// Opens the file, if there is to be one.
///
/// # Errors
/// A filter that is none; a file that can't be opened.
pub(super) fn open() -> Result<()> {
    let Some(setting) = SETTING.get() else { return Ok(()) };
    if let Some(wrong) = &setting.wrong {
        return Err(Error::invalid(wrong));
    }
    match &setting.file {
        Some(path) => FILE.get_or_make(|| append_to(path)).map(drop),
        None => Ok(()),
    }
}

fn append_to(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC | OFlags::NOCTTY;
    let opened = rustix::fs::open(path, flags, Mode::from_raw_mode(0o600));
    let failed =
        |errno| Error::os(format_args!("open the log `{}` ({FILE_VARIABLE})", path.display()), errno);
    fd::above_stdio(opened.map_err(failed)?)
}

/// Writes a line, with one call, so that those of several processes do not mix.
pub(super) fn write(event: &Event) {
    let Some(setting) = SETTING.get() else { return };
    let text = &event.text;
    let line = if setting.explicit {
        let (seconds, micros) = (event.time_ns / 1_000_000_000, event.time_ns / 1000 % 1_000_000);
        let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        let (level, pid) = (event.level, process::id());
        let name = event.logger.as_str();
        format!(
            "tractor-host: {hour:02}:{minute:02}:{second:02}.{micros:06}Z {level:<5} [{pid}] {name}: {text}\n"
        )
    } else {
        format!("tractor-host: {text}\n")
    };
    // A closed or full stream must not stop a supervisor, and where it can't be told there is nobody to tell.
    let _ = match &setting.file {
        None => rustix::io::write(rustix::stdio::stderr(), line.as_bytes()),
        // A forked child has closed what it inherited.
        Some(path) => match FILE.get_or_make(|| append_to(path)) {
            Ok(file) => rustix::io::write(file, line.as_bytes()),
            Err(_) => rustix::io::write(rustix::stdio::stderr(), line.as_bytes()),
        },
    };
}

pub(super) fn forget_in_child() {
    FILE.forget();
    TAKEN.store(false, Ordering::Relaxed);
}
