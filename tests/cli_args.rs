//! What the launcher makes of its command line: above all, where Python's options end and the program
//! begins.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use std::time::Duration;

use _native::cli::args::{Command, Misuse, Picture, Place, Program, Ps, Reap, Topic, parse};

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
    assert_eq!(parsed("doctor"), Ok(Command::Doctor { json: false }));
    assert_eq!(parsed("doctor --json"), Ok(Command::Doctor { json: true }));
    let every = |seconds| Ps { watch: true, json: false, interval: Duration::from_secs_f64(seconds) };
    assert_eq!(parsed("ps --watch"), Ok(Command::Ps(every(2.0))));
    assert_eq!(parsed("ps -w -n 0.5"), Ok(Command::Ps(every(0.5))));
    let reap = Reap { force: true, json: true, grace: Duration::from_secs(7) };
    assert_eq!(parsed("reap --force --json --grace=7"), Ok(Command::Reap(reap)));
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
    for line in [
        "x",
        "--x",
        "-x",
        "doctor x",
        "ps x",
        "ps -n 0",
        "reap 1",
        "reap --grace inf",
        "help x",
        "help run x",
        "--child",
        "--version=1",
    ] {
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
        trace: None,
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
        assert_eq!(found, Program { words: words(line), ..Program::default() }, "`{line}`");
    }
}

#[test]
fn a_value_is_not_taken_for_our_option() {
    // Python's `-W` takes the next word whatever it is.
    assert_eq!(program("run -W --main subint").words, words("-W --main subint"));
    assert_eq!(program("run -X --help script.py").words, words("-X --help script.py"));
}

#[test]
fn a_trace_is_a_run_with_a_file() {
    let expected = Program {
        place: Place::Subint,
        trace: Some("t.json".into()),
        words: words("-X dev s.py --trace x"),
        backend: None,
    };
    for line in [
        "trace t.json --main subint -X dev s.py --trace x",
        "trace t.json -- --main subint -X dev s.py --trace x",
        "run --trace t.json --main subint -X dev s.py --trace x",
        "run -X dev --main subint --trace=t.json s.py --trace x",
    ] {
        assert_eq!(program(line), expected, "`{line}`");
    }
    for line in ["trace", "trace t.json", "trace t.json --", "trace --x t.json s.py", "run --trace"] {
        assert!(matches!(parsed(line), Err(Misuse::Wrong(_))), "`{line}`");
    }
    assert_eq!(parsed("trace --help"), Ok(Command::Help(Topic::Run)));
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
    assert_eq!(found, Program { words: words("-m tractor_host.bench kill --help"), ..Program::default() });
}

#[test]
fn pytest_is_a_module() {
    let found = program("pytest --main -x --help tests");
    assert_eq!(found, Program { words: words("-m pytest --main -x --help tests"), ..Program::default() });
}

#[test]
fn child_takes_a_directory_and_options() {
    let expected = Command::Child { directory: "/a".into(), options: words("-X dev -W error") };
    assert_eq!(parsed("--child /a -X dev -W error"), Ok(expected));
}

#[test]
fn dump_takes_a_process() {
    let picture = |pid, json, tree| Ok(Command::Dump(Picture { pid, json, tree }));
    assert_eq!(parsed("dump 17"), picture(17, false, true));
    assert_eq!(parsed("dump --no-tree 17 --json"), picture(17, true, false));
    assert_eq!(parsed("dump --json --help"), Ok(Command::Help(Topic::All)));
    for wrong in
        ["dump", "dump x", "dump 0", "dump 99999999999", "dump 1 2", "dump --jason 1", "dump --json=1 1"]
    {
        assert!(parsed(wrong).is_err(), "{wrong}");
    }
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
