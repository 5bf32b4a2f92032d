"""Guards of the whole program: a Ctrl-C that works whatever Python does, and a watch over the GILs."""

import math
from collections.abc import Iterable
from typing import Literal

from tractor_host import _native

Policy = Literal["warn", "dump", "kill-worker", "exit"]


def guard_ctrl_c(
    enabled: bool = True,
    *,
    react_timeout: float = 1.0,
    end_timeout: float = 5.0,
    signals: Iterable[Literal["SIGTERM", "SIGHUP", "SIGQUIT"]] = (),
) -> None:
    """Makes Ctrl-C work whatever state Python is in. `tractor-host run` does this by itself.

    The first Ctrl-C stays Python's: KeyboardInterrupt rises, or the program's handler is called, as fast as
    ever. If that has not happened within `react_timeout`, or a second Ctrl-C comes within `end_timeout` of
    the first, all workers are ended by their ladders, and what the main thread is blocked in returns. A
    program that is still there `end_timeout` after the first, or at a third, is ended with exit code 130,
    and everything below it with it. A line on stderr says where it was.

    A Ctrl-C at a prompt (the REPL, IPython, pdb) ends a line: there a second is a first again, as long as
    Python reacts.

    Nothing is done where SIGINT is ignored or has its default action, and to children nothing is handed on:
    no signal is blocked or ignored. A thread (`th-guard`) does all this, and needs no GIL for it.

    Args:
        enabled: False leaves Ctrl-C to Python alone again.
        react_timeout: Seconds until Python's handler must have been called.
        end_timeout: Seconds from the first Ctrl-C until the program must have ended, if it did not react or
            there was a second.
        signals: What else is guarded. SIGTERM and SIGHUP count as Ctrl-C, so that a program unwinds and
            cleans up; the exit code of one that had to be ended is then 143 or 129. SIGQUIT writes
            what everything does where dumps go (see `dump`), and the program goes on.

    Raises:
        ValueError: For a negative number, or a signal that can't be guarded.
        RuntimeError: Where the program has a handler of its own for one of `signals`, or ignores it; in a
            process that was forked by `os.fork()` from one that uses this.
        OSError: Where no thread can be made.
    """
    bounds = (_seconds("react_timeout", react_timeout), _seconds("end_timeout", end_timeout))
    _native.guard_ctrl_c(bounds if enabled else None, list(signals))


def watch_gil(
    enabled: bool = True,
    *,
    warn: float = 1.0,
    limit: float = 10.0,
    policy: Policy = "dump",
) -> None:
    """Watches for a thread that keeps a GIL: C code that does not release it, so that nobody else runs.

    Watched are the program's GIL, which `subint` workers share, and those of workers that have one of their
    own. After `warn` seconds one line on stderr says who has it: the worker, the thread, and the line of
    Python that it is at. After `limit` seconds `policy` is followed. Python code, however busy, is never
    taken for that. Interpreters that are not tractor_host's can't be asked, and are passed over.

    The watch needs no GIL, asks only a thread that has had its GIL for a tenth of a second, and costs less
    than a thousandth of a core. `tractor-host run` watches by itself, for the sake of workers that share the
    program's GIL, with these defaults; the variable TRACTOR_HOST_WATCHDOG sets another policy, or `off`.

    Args:
        enabled: False ends the watch.
        warn: Seconds.
        limit: Seconds.
        policy: `"warn"` does no more; `"dump"` writes what everything does where dumps go; then
            `"kill-worker"` ends the worker that does it, by its ladder (where that is the program itself,
            nothing); `"exit"` ends the process with exit code 86.

    Raises:
        ValueError: For a negative number or an unknown policy.
        RuntimeError: In a process that was forked by `os.fork()` from one that uses this.
        OSError: Where no thread can be made.
    """
    bounds = (_seconds("warn", warn), _seconds("limit", limit))
    _native.watch_gil(bounds if enabled else None, policy)


def _seconds(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number of seconds, not negative and not infinite: got {value!r}")
    return float(value)
