//! What the launcher makes of its command line: above all, where Python's options end and the program
//! begins.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use _native::cli::args::{Command, Misuse, Place, Program, Topic, parse};

fn words(line: &str) -> Vec<OsString> {
    line.split_whitespace().map(OsString::from).collect()
}

fn parsed(line: &str) -> Result<Command, Misuse> {
    parse(words(line))
}

fn program(line: &str) -> Program {
    match parsed(line) {
        Ok(Command::Run(program)) => program,
        other => panic!("`{line}` is {other:?}"),
    }
}

#[test]
fn commands() {
    assert_eq!(parsed("doctor"), Ok(Command::Doctor));
    assert_eq!(parsed("help"), Ok(Command::Help(Topic::All)));
    assert_eq!(parsed("help run"), Ok(Command::Help(Topic::Run)));
    assert_eq!(parsed("--help"), Ok(Command::Help(Topic::All)));
    assert_eq!(parsed("doctor --help"), Ok(Command::Help(Topic::All)));
    assert_eq!(parsed("--version"), Ok(Command::Version));
    assert_eq!(parsed("-V"), Ok(Command::Version));
}

#[test]
fn what_makes_no_sense_is_said() {
    assert_eq!(parsed(""), Err(Misuse::NoCommand));
    for line in ["x", "--x", "-x", "doctor x", "help x", "help run x", "--child", "--version=1"] {
        assert!(matches!(parsed(line), Err(Misuse::Wrong(_))), "`{line}`");
    }
    for line in ["run --main", "run --main=x", "run --backend", "run -X dev --main"] {
        assert!(matches!(parsed(line), Err(Misuse::Wrong(_))), "`{line}`");
    }
}

#[test]
fn own_options_stand_anywhere_before_the_program() {
    let expected = Program {
        place: Place::Subint,
        backend: Some("fork".into()),
        words: words("-X dev -OO -W error script.py --main plain --backend exec"),
    };
    for line in [
        "run --main subint --backend fork -X dev -OO -W error",
        "run -X dev --main=subint -OO --backend=fork -W error",
        "run -X dev -OO -W error --backend fork --main subint",
    ] {
        assert_eq!(program(&format!("{line} script.py --main plain --backend exec")), expected, "`{line}`");
    }
}

#[test]
fn a_program_keeps_its_words() {
    for line in [
        "script.py --main x",
        "- --main x",
        "-- --main x",
        "-c --main x",
        "-c pass --help",
        "-m module --backend x",
        "-mmodule --main x",
        "-Bsc pass --main x",
        "-W error -c pass -h",
        "-Werror -Xdev script.py -h",
        "-BX dev script.py --main x",
        "--check-hash-based-pycs always script.py --main x",
        "--unknown script.py --main x",
        "-I",
        "",
    ] {
        let found = program(&format!("run {line}"));
        assert_eq!(found, Program { place: Place::Plain, backend: None, words: words(line) }, "`{line}`");
    }
}

#[test]
fn a_value_is_not_taken_for_our_option() {
    // Python's `-W` takes the next word whatever it is.
    assert_eq!(program("run -W --main subint").words, words("-W --main subint"));
    assert_eq!(program("run -X --help script.py").words, words("-X --help script.py"));
}

#[test]
fn help_of_run_is_ours() {
    for line in ["run --help", "run -h", "run -X dev --help", "run --main subint -h"] {
        assert_eq!(parsed(line), Ok(Command::Help(Topic::Run)), "`{line}`");
    }
}

#[test]
fn bench_is_a_module_of_ours() {
    let found = program("bench kill --help");
    assert_eq!(
        found,
        Program { place: Place::Plain, backend: None, words: words("-m tractor_host.bench kill --help") }
    );
}

#[test]
fn pytest_is_a_module() {
    let found = program("pytest --main -x --help tests");
    assert_eq!(
        found,
        Program { place: Place::Plain, backend: None, words: words("-m pytest --main -x --help tests") }
    );
}

#[test]
fn child_takes_a_directory_and_options() {
    let expected = Command::Child { directory: "/a".into(), options: words("-X dev -W error") };
    assert_eq!(parsed("--child /a -X dev -W error"), Ok(expected));
}

#[test]
fn words_need_not_be_text() {
    let odd = OsString::from_vec(vec![b'-', 0xff, 0xfe]);
    let line = [OsString::from("run"), "-c".into(), odd.clone(), odd.clone()];
    let Ok(Command::Run(program)) = parse(line.clone()) else { panic!("not a program") };
    assert_eq!(program.words, line[1..]);
    assert!(parse([odd.clone()]).is_err());
    let Ok(Command::Run(program)) = parse(["run".into(), "--backend".into(), odd.clone()]) else {
        panic!("not a program")
    };
    assert_eq!(program.backend, Some(odd));
}
