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

usage: tractor-host run [--main plain|subint] [--backend B] PROGRAM [ARG…]
       tractor-host pytest [ARG…]
       tractor-host bench NAME [OPTION…]
       tractor-host doctor
       tractor-host help [run]
       tractor-host --version

run      run a Python program as python3.14 does (`tractor-host help run` has more)
pytest   run pytest under the embedded interpreter
bench    measure; `bench kill` shows how each shape of stuck code ends, `bench spawn` what a start costs,
         `bench share` what it costs to carry a large array there and back
doctor   tell whether this machine has everything that tractor-host needs
";

const RUN: &str = "\
usage: tractor-host run [--main plain|subint] [--backend B] [PYTHON-OPTION…] PROGRAM [ARG…]
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
";
