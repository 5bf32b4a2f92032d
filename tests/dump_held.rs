//! A dump waits for nobody: not for the GIL, and not for the supervisor's locks.

use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use _native::diag::dump::{Dump, set_registry};
use _native::diag::outlet;
use _native::interp::call;
use _native::interp::runtime::{self, Start};
use _native::sys::thread;

const BOUND: Duration = Duration::from_secs(60);

#[test]
fn a_thread_that_python_does_not_know_dumps_while_the_gil_is_held() {
    let executable = Path::new(env!("TRACTOR_HOST_BUILD_PYTHON"));
    runtime::start(&Start { executable, arguments: &[], environment: &[] }).expect("Python starts");
    set_registry(|dump| dump.unread.push("the workers: their registry is locked".into()));
    let token = runtime::starting_thread();
    let (holder, (sender, taken)) = (thread::id(), channel());
    // This thread has the GIL, and gives it to nobody.
    call::source(token, "import sys").expect("it is attached");
    let taker = thread::spawn_deaf("dump", move || {
        let dump = Dump::own("a test", true);
        sender.send((dump, outlet::write_now("a test"))).expect("somebody waits");
    });
    let (dump, written) = taken.recv_timeout(BOUND).expect("it does not wait for the GIL");
    taker.expect("there is a thread").join().expect("it ends");
    written.expect("there is a stderr");
    let own = &dump.processes[0];
    assert_eq!(own.gils.len(), 1);
    assert_eq!((own.gils[0].holder, own.gils[0].held_in), (Some(holder), Some(0)));
    assert!(own.interpreters[0].threads.iter().any(|thread| thread.id == holder && thread.holds_gil));
    assert!(own.threads.iter().any(|thread| thread.kernel_name == "dump"));
    let text = dump.to_text();
    assert!(text.contains("Not read\n  the workers: their registry is locked\n"), "{text}");
    let json = serde_json::to_value(&dump).expect("it is JSON");
    assert_eq!(
        (json["schema"].as_i64(), json["processes"][0]["pid"].as_i64()),
        (Some(1), Some(own.pid.into()))
    );
}
