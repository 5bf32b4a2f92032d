//! What was typed: words to a [`Command`], and nothing else. It looks at no file and starts nothing.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use lexopt::Arg;

/// What the launcher is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Run a Python program.
    Run(Program),
    /// Be a worker process: `--child DIRECTORY [PYTHON-OPTION…]`, for tractor-host's own use.
    Child {
        /// The directory that has the Python package.
        directory: OsString,
        /// Options for the interpreter.
        options: Vec<OsString>,
    },
    /// Tell whether everything is there that tractor-host needs.
    Doctor {
        /// For programs.
        json: bool,
    },
    /// Show what hosts of this user do.
    Ps(Ps),
    /// End what killed hosts have left.
    Reap(Reap),
    /// Show what every thread of a process is doing.
    Dump(Picture),
    /// Print a text.
    Help(Topic),
    /// Print the version.
    Version,
}

/// A Python program and where to run it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    /// Which interpreter of the process.
    pub place: Place,
    /// The value for `TRACTOR_HOST_BACKEND`.
    pub backend: Option<OsString>,
    /// The file for its timeline, the value for `TRACTOR_HOST_TRACE`.
    pub trace: Option<OsString>,
    /// What `python3.14` would be given.
    pub words: Vec<OsString>,
}

/// How to show hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ps {
    /// Again and again, on a full screen where there is a terminal.
    pub watch: bool,
    /// For programs.
    pub json: bool,
    /// How often.
    pub interval: Duration,
}

/// How to look after dead hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reap {
    /// Act, and don't only tell.
    pub force: bool,
    /// For programs.
    pub json: bool,
    /// How long a process has between SIGINT and SIGKILL.
    pub grace: Duration,
}

/// What a dump is to be of, and how it is to look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// The process.
    pub pid: i32,
    /// As JSON.
    pub json: bool,
    /// Of the processes below it too.
    pub tree: bool,
}

/// The interpreter that a program runs in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Place {
    /// The main one, as with `python3.14`.
    #[default]
    Plain,
    /// A subinterpreter with the shared GIL; the main one stays as it was started.
    Subint,
}

/// What help is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topic {
    /// All commands.
    All,
    /// `run` and `pytest`.
    Run,
}

/// A command line that makes no sense; the text says why and what would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Misuse {
    /// Nothing was typed.
    NoCommand,
    /// Anything else.
    Wrong(String),
}

impl Misuse {
    /// Nothing was typed, so the help is the answer.
    pub fn is_empty_command_line(&self) -> bool {
        *self == Self::NoCommand
    }
}

impl fmt::Display for Misuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCommand => f.write_str("no command was given"),
            Self::Wrong(what) => write!(f, "{what}; try `tractor-host help`"),
        }
    }
}

impl From<lexopt::Error> for Misuse {
    fn from(error: lexopt::Error) -> Self {
        Self::Wrong(error.to_string())
    }
}

/// Reads a command line, without the launcher's own name.
///
/// # Errors
/// What is wrong with it, in words for whoever typed it.
pub fn parse(words: impl IntoIterator<Item = OsString, IntoIter: 'static>) -> Result<Command, Misuse> {
    let mut parser = lexopt::Parser::from_args(words);
    let command = match parser.next()? {
        None => return Err(Misuse::NoCommand),
        Some(Arg::Short('h') | Arg::Long("help")) => Command::Help(Topic::All),
        Some(Arg::Short('V') | Arg::Long("version")) => Command::Version,
        Some(Arg::Long("child")) => {
            let directory = parser.value()?;
            return Ok(Command::Child { directory, options: parser.raw_args()?.collect() });
        }
        Some(Arg::Value(name)) => match name.to_str() {
            Some("run") => return run(&mut parser, None),
            Some("trace") => return traced(&mut parser),
            Some(name @ ("pytest" | "bench")) => {
                let module = if name == "bench" { "tractor_host.bench" } else { name };
                let mut words = vec!["-m".into(), module.into()];
                words.extend(parser.raw_args()?);
                return Ok(Command::Run(Program { words, ..Program::default() }));
            }
            Some("doctor") => return doctor(&mut parser),
            Some("ps") => return ps(&mut parser),
            Some("reap") => return reap(&mut parser),
            Some("dump") => return dump(&mut parser),
            Some("help") => Command::Help(topic(&mut parser)?),
            _ => return Err(Misuse::Wrong(format!("there is no command `{}`", name.display()))),
        },
        Some(other) => return Err(other.unexpected().into()),
    };
    match parser.next()? {
        None => Ok(command),
        // `tractor-host help --help`
        Some(Arg::Short('h') | Arg::Long("help")) => Ok(Command::Help(Topic::All)),
        Some(other) => Err(other.unexpected().into()),
    }
}

fn doctor(parser: &mut lexopt::Parser) -> Result<Command, Misuse> {
    let mut json = false;
    while let Some(word) = parser.next()? {
        match word {
            Arg::Long("json") => json = true,
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(Topic::All)),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Command::Doctor { json })
}

fn ps(parser: &mut lexopt::Parser) -> Result<Command, Misuse> {
    let mut ps = Ps { watch: false, json: false, interval: Duration::from_secs(2) };
    while let Some(word) = parser.next()? {
        match word {
            Arg::Short('w') | Arg::Long("watch") => ps.watch = true,
            Arg::Long("json") => ps.json = true,
            Arg::Short('n') | Arg::Long("interval") => ps.interval = seconds(&parser.value()?, 0.1)?,
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(Topic::All)),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Command::Ps(ps))
}

fn reap(parser: &mut lexopt::Parser) -> Result<Command, Misuse> {
    let mut reap = Reap { force: false, json: false, grace: Duration::from_secs(3) };
    while let Some(word) = parser.next()? {
        match word {
            Arg::Short('f') | Arg::Long("force") => reap.force = true,
            Arg::Long("json") => reap.json = true,
            Arg::Long("grace") => reap.grace = seconds(&parser.value()?, 0.0)?,
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(Topic::All)),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Command::Reap(reap))
}

/// A time of at least so many seconds, and at most an hour.
fn seconds(value: &OsStr, least: f64) -> Result<Duration, Misuse> {
    const MOST: f64 = 3600.0;
    let number = value.to_str().and_then(|text| text.parse::<f64>().ok());
    let number = number.filter(|number| (least..=MOST).contains(number));
    number.map(Duration::from_secs_f64).ok_or_else(|| {
        Misuse::Wrong(format!("expected {least} to {MOST} seconds, not `{}`", value.display()))
    })
}

fn topic(parser: &mut lexopt::Parser) -> Result<Topic, Misuse> {
    match parser.next()? {
        None => Ok(Topic::All),
        Some(Arg::Value(name)) => match name.to_str() {
            Some("run" | "pytest" | "trace") => Ok(Topic::Run),
            Some("bench" | "doctor" | "dump" | "ps" | "reap" | "help") => Ok(Topic::All),
            _ => Err(Misuse::Wrong(format!("there is no command `{}`", name.display()))),
        },
        Some(other) => Err(other.unexpected().into()),
    }
}

fn dump(parser: &mut lexopt::Parser) -> Result<Command, Misuse> {
    let (mut pid, mut json, mut tree) = (None, false, true);
    while let Some(word) = parser.next()? {
        match word {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(Topic::All)),
            Arg::Long("json") => json = true,
            Arg::Long("no-tree") => tree = false,
            Arg::Value(value) if pid.is_none() => {
                let number = value.to_str().and_then(|text| text.parse().ok()).filter(|pid| *pid > 0);
                let wrong = || Misuse::Wrong(format!("`{}` is no process number", value.display()));
                pid = Some(number.ok_or_else(wrong)?);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    let pid = pid.ok_or_else(|| Misuse::Wrong("`dump` takes the number of a process".into()))?;
    Ok(Command::Dump(Picture { pid, json, tree }))
}

/// The file, then what `run` takes; a `--` may stand between the two.
fn traced(parser: &mut lexopt::Parser) -> Result<Command, Misuse> {
    match parser.next()? {
        Some(Arg::Value(file)) => {
            let mut raw = parser.raw_args()?;
            if raw.peek() == Some(OsStr::new("--")) {
                raw.next();
            }
            if raw.peek().is_none() {
                return Err(Misuse::Wrong("`trace` takes a file and a program".into()));
            }
            run(parser, Some(file))
        }
        Some(Arg::Short('h') | Arg::Long("help")) => Ok(Command::Help(Topic::Run)),
        None => Err(Misuse::Wrong("`trace` takes a file and a program".into())),
        Some(other) => Err(other.unexpected().into()),
    }
}

/// Our own options may stand anywhere before the program, among Python's.
fn run(parser: &mut lexopt::Parser, trace: Option<OsString>) -> Result<Command, Misuse> {
    let mut program = Program { trace, ..Program::default() };
    loop {
        let mut raw = parser.raw_args()?;
        let Some(word) = raw.peek() else { return Ok(Command::Run(program)) };
        if is_ours(word) {
            match parser.next()? {
                Some(Arg::Long("main")) => program.place = place(&parser.value()?)?,
                Some(Arg::Long("backend")) => program.backend = Some(parser.value()?),
                Some(Arg::Long("trace")) => program.trace = Some(parser.value()?),
                _ => return Ok(Command::Help(Topic::Run)),
            }
            continue;
        }
        let kind = PythonWord::of(word);
        program.words.extend(raw.next());
        match kind {
            PythonWord::Option => {}
            PythonWord::OptionWithValue => program.words.extend(raw.next()),
            PythonWord::Program => {
                program.words.extend(raw);
                return Ok(Command::Run(program));
            }
        }
    }
}

fn is_ours(word: &OsStr) -> bool {
    let name = word.as_bytes().split(|byte| *byte == b'=').next().unwrap_or_default();
    matches!(name, b"--main" | b"--backend" | b"--trace" | b"--help" | b"-h")
}

fn place(value: &OsStr) -> Result<Place, Misuse> {
    match value.to_str() {
        Some("plain") => Ok(Place::Plain),
        Some("subint") => Ok(Place::Subint),
        _ => Err(Misuse::Wrong(format!("--main takes `plain` or `subint`, not `{}`", value.display()))),
    }
}

/// What a word before the program means to `python3.14`: just enough to find where the program
/// begins. Python itself judges the options.
enum PythonWord {
    Option,
    OptionWithValue,
    Program,
}

impl PythonWord {
    fn of(word: &OsStr) -> Self {
        let letters = match word.as_bytes() {
            b"--check-hash-based-pycs" => return Self::OptionWithValue,
            b"-" | b"--" => return Self::Program,
            [b'-', b'-', ..] => return Self::Option,
            [b'-', letters @ ..] => letters,
            _ => return Self::Program,
        };
        for (index, letter) in letters.iter().enumerate() {
            match letter {
                b'c' | b'm' => return Self::Program,
                b'W' | b'X' if index + 1 == letters.len() => return Self::OptionWithValue,
                b'W' | b'X' => return Self::Option,
                _ => {}
            }
        }
        Self::Option
    }
}
