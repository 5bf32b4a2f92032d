//! A condemned interpreter is pressed through its own threads.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use _native::interp::call;
use _native::interp::door::Door;
use _native::interp::rungs::{Force, pardon, report_missing};
use _native::interp::runtime::{self, Start};
use _native::interp::subinterp::{Gil, SubInterpreter};

const BOUND: Duration = Duration::from_secs(60);

/// Nothing but the summons tells the loop to end: nobody else ever attaches to its interpreter.
#[test]
fn a_busy_thread_takes_note_of_a_summons() {
    let executable = Path::new(env!("TRACTOR_HOST_BUILD_PYTHON"));
    let start = Start { executable, arguments: &[], environment: &[] };
    runtime::start(&start).expect("Python starts");
    runtime::starting_thread().detached(|| {
        for (gil, force, code) in [
            (Gil::Own, Force::Interrupt, "while True: pass"),
            (Gil::Shared, Force::Interrupt, "while True: pass"),
            (Gil::Own, Force::Unwind, "while True:\n try:\n  while True: pass\n except BaseException: pass"),
        ] {
            end_by_summons(gil, force, code);
        }
    });
}

fn end_by_summons(gil: Gil, force: Force, code: &'static str) {
    let door = Arc::new(Door::new());
    let (say, heard) = channel();
    let runner = std::thread::spawn({
        let door = Arc::clone(&door);
        move || {
            let interpreter = SubInterpreter::create(gil).expect("an interpreter");
            let token = interpreter.token();
            report_missing(token);
            door.open(token);
            say.send(true).expect("a listener");
            let ended = call::source(token, code);
            door.close(token);
            door.seal(token);
            pardon(token);
            interpreter.end(&door);
            say.send(ended.is_err()).expect("a listener");
        }
    });
    assert_eq!(heard.recv_timeout(BOUND), Ok(true));
    let deadline = Instant::now() + BOUND;
    let ended = loop {
        // Again and again, as the supervisor does: the first may come before the loop.
        door.summon(force);
        match heard.recv_timeout(Duration::from_millis(5)) {
            Ok(ended) => break ended,
            Err(_) => assert!(Instant::now() < deadline, "{gil:?} {force:?}: not ended"),
        }
    };
    assert!(ended, "{gil:?} {force:?}: the code returned");
    runner.join().expect("no panic");
    // With the door sealed there is nobody to be told.
    door.summon(force);
}
