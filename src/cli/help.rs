//! The texts of `help`.

use super::args::Topic;

/// The text about `topic`.
pub(super) fn text(topic: Topic) -> &'static str {
    match topic {
        Topic::All => ALL,
        Topic::Run => RUN,
    }
}

const ALL: &str = "\
tractor-host: run Python programs whose workers can always be killed

usage: tractor-host run [--main plain|subint] [--backend B] [--trace FILE] PROGRAM [ARG…]
       tractor-host trace FILE PROGRAM [ARG…]
       tractor-host pytest [ARG…]
       tractor-host bench NAME [OPTION…]
       tractor-host ps [--watch] [--interval SECONDS] [--json]
       tractor-host reap [--force] [--grace SECONDS] [--json]
       tractor-host doctor [--json]
       tractor-host dump [--json] [--no-tree] PID
       tractor-host help [run]
       tractor-host --version

run      run a Python program as python3.14 does (`tractor-host help run` has more)
trace    run it, and write the timeline of its workers, for ui.perfetto.dev or chrome://tracing
pytest   run pytest under the embedded interpreter
bench    measure; `bench kill` shows how each shape of stuck code ends, `bench spawn` what a start costs,
         `bench share` what it costs to carry a large array there and back, `bench calls` what a call costs
         to a worker that is there, `bench ctrl-c` what one Ctrl-C does, `bench fairness` what busy
         subinterpreters leave to the program
ps       show your running hosts with their trees of workers; --watch goes on doing so until `q` or Ctrl-C
reap     tell what hosts that were killed have left; --force ends and removes it (SIGINT, then SIGKILL).
         Leaves with 1 when something is left
doctor   tell whether this machine has everything that tractor-host needs. Leaves with
         0 when it has, 1 when something is missing that one can do without, 2 when it can't be used
dump     show what every thread of a Python process is doing, and of those below it, whatever they are
         stuck in: stacks, tasks, who holds the GIL. For people, or as JSON
";

const RUN: &str = "\
usage: tractor-host run [--main plain|subint] [--backend B] [--trace FILE] [PYTHON-OPTION…] PROGRAM [ARG…]
       tractor-host trace FILE …     the same as: run --trace FILE …
       tractor-host pytest [ARG…]    the same as: run -m pytest [ARG…]

PROGRAM is what python3.14 takes: SCRIPT, -m MODULE, -c CODE or - (stdin). Python's own options
(-X, -W, -O, -I, -u, …), PYTHON* variables and the virtual environment that tractor-host is installed
in mean what they mean to python3.14.

--main plain    run the program in the main interpreter (the default)
--main subint   run it in a subinterpreter, so that the main interpreter stays as it was started.
                Python handles signals in the main interpreter alone: the program cannot set handlers,
                and Ctrl-C ends it within 5 seconds whatever it does
--backend B     the backend of workers that the program starts without naming one; sets
                TRACTOR_HOST_BACKEND for it
--trace FILE    write the timeline of its workers into FILE, for ui.perfetto.dev or chrome://tracing; the
                same as TRACTOR_HOST_TRACE=FILE. It is complete at any moment, however the program ends
";
