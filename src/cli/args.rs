//! What was typed: words to a [`Command`], and nothing else. It looks at no file and starts nothing.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;

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
    Doctor,
    /// Print a text.
    Help(Topic),
    /// Print the version.
    Version,
}

/// A Python program and where to run it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Which interpreter of the process.
    pub place: Place,
    /// The value for `TRACTOR_HOST_BACKEND`.
    pub backend: Option<OsString>,
    /// What `python3.14` would be given.
    pub words: Vec<OsString>,
}

/// The interpreter that a program runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The main one, as with `python3.14`.
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
            Some("run") => return run(&mut parser),
            Some(name @ ("pytest" | "bench")) => {
                let module = if name == "bench" { "tractor_host.bench" } else { name };
                let mut words = vec!["-m".into(), module.into()];
                words.extend(parser.raw_args()?);
                return Ok(Command::Run(Program { place: Place::Plain, backend: None, words }));
            }
            Some("doctor") => Command::Doctor,
            Some("help") => Command::Help(topic(&mut parser)?),
            _ => return Err(Misuse::Wrong(format!("there is no command `{}`", name.display()))),
        },
        Some(other) => return Err(other.unexpected().into()),
    };
    match parser.next()? {
        None => Ok(command),
        // `tractor-host doctor --help`
        Some(Arg::Short('h') | Arg::Long("help")) => Ok(Command::Help(Topic::All)),
        Some(other) => Err(other.unexpected().into()),
    }
}

fn topic(parser: &mut lexopt::Parser) -> Result<Topic, Misuse> {
    match parser.next()? {
        None => Ok(Topic::All),
        Some(Arg::Value(name)) => match name.to_str() {
            Some("run" | "pytest") => Ok(Topic::Run),
            Some("bench" | "doctor" | "help") => Ok(Topic::All),
            _ => Err(Misuse::Wrong(format!("there is no command `{}`", name.display()))),
        },
        Some(other) => Err(other.unexpected().into()),
    }
}

/// Our own options may stand anywhere before the program, among Python's.
fn run(parser: &mut lexopt::Parser) -> Result<Command, Misuse> {
    let mut program = Program { place: Place::Plain, backend: None, words: Vec::new() };
    loop {
        let mut raw = parser.raw_args()?;
        let Some(word) = raw.peek() else { return Ok(Command::Run(program)) };
        if is_ours(word) {
            match parser.next()? {
                Some(Arg::Long("main")) => program.place = place(&parser.value()?)?,
                Some(Arg::Long("backend")) => program.backend = Some(parser.value()?),
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
    matches!(name, b"--main" | b"--backend" | b"--help" | b"-h")
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
