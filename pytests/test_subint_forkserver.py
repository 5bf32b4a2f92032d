"""Workers whose code runs in a second interpreter of a forked process."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal, get_args

import pytest

import targets
import tractor_host as th
from conftest import PATIENCE, pid_is_gone
from helpers import children_of, keeping, ready, until
from tractor_host import _native, testing

Gil = Literal["shared", "own"]
BACKEND = "subint_forkserver"
#: What may end code that did not stop when it was asked to.
FORCED = ("interrupt", "unwind", "unblock")
#: Shapes that are stuck in the end of their interpreter.
ENDINGS = ("finaliser-loop", "finaliser-sleep", "atexit-loop")


@pytest.fixture(params=get_args(Gil))
def gil(request: pytest.FixtureRequest) -> Any:
    return request.param


def look(code: str, **options: Any) -> Any:
    return th.spawn(th.Source(code), backend=BACKEND, **options).result(timeout=PATIENCE)


def test_the_code_runs_in_a_second_interpreter_on_the_main_thread_of_a_process(gil: Gil) -> None:
    worker = th.spawn(
        th.Source(
            "import _interpreters, os, threading\n"
            "own, _ = _interpreters.get_current()\n"
            "(own, [id for id, _ in _interpreters.list_all()], os.getpid(), threading.get_native_id(),"
            " threading.current_thread() is threading.main_thread(), threading.main_thread().native_id)"
        ),
        backend=BACKEND,
        gil=gil,
    )
    own, every, pid, native, is_main, main_native = worker.result(timeout=PATIENCE)
    assert own != 0
    assert sorted(every) == [0, own]
    assert worker.pid not in (None, os.getpid())
    assert (pid, native, is_main, main_native) == (worker.pid, worker.pid, True, worker.pid)


def test_the_main_interpreter_stays_as_it_was_started(gil: Gil) -> None:
    code = """
    import decimal, tractor_host as th
    with th.spawn(th.Source("import sys; 'decimal' in sys.modules"), backend="fork") as copy:
        found = copy.result(timeout=30)
    found
    """
    assert look(dedent(code), gil=gil) is False


def test_modules_are_preloaded_in_its_interpreter(gil: Gil) -> None:
    th.preload(["colorsys"])
    try:
        assert look("import sys; 'colorsys' in sys.modules", gil=gil)
    finally:
        th.preload([])
    assert not look("import sys; 'colorsys' in sys.modules", gil=gil)


def test_what_modules_want_done_after_a_fork_is_done(gil: Gil) -> None:
    th.preload(["random"])
    try:
        code = "import random, sys; (random.random(), random.getrandbits(64))"
        assert len({look(code, gil=gil) for _ in range(5)}) == 5
    finally:
        th.preload([])


def test_a_module_that_cannot_be_preloaded_there_is_told() -> None:
    with pytest.raises(ImportError, match="failed to preload 'no_such_module'"):
        th.preload(["no_such_module"])
    try:
        with pytest.warns(RuntimeWarning, match="'no_such_module' could not be preloaded"):
            worker = th.spawn(targets.add, 1, 2, backend=BACKEND)
        assert worker.result(timeout=PATIENCE) == 3
    finally:
        th.preload([])


def test_a_module_that_refuses_a_gil_of_its_own() -> None:
    code = "import faulthandler; __import__('_interpreters').get_current()[0]"
    with pytest.raises(th.RemoteError, match="does not support loading in subinterpreters"):
        look(code, gil="own")
    assert look(code, gil="shared") > 0
    target = "faulthandler:is_enabled"
    for _ in range(2):  # the second time it is known
        assert th.spawn(target, backend=BACKEND, gil="auto").result(timeout=PATIENCE) is True


@pytest.mark.parametrize("runtime", ["trio", "asyncio"])
def test_loops_run_and_are_cancelled(gil: Gil, runtime: Any) -> None:
    sleep = {"trio": targets.trio_sleep, "asyncio": targets.asyncio_sleep}[runtime]
    worker = ready(th.spawn(sleep, backend=BACKEND, gil=gil, runtime=runtime, stdio="pipe"))
    worker.cancel()
    assert worker.wait(timeout=PATIENCE).kind == "cancelled"


@pytest.mark.parametrize(
    ("shape", "variant"),
    [
        (name, variant)
        for name, shape in testing.SHAPES.items()
        if shape.can_be_ended
        for variant in shape.variants
    ],
)
def test_stuck_code_ends_by_the_ladder_of_subinterpreters(
    shape: str, variant: testing.Variant, gil: Gil
) -> None:
    ladder = {"interrupt": 0.02, "unwind": 0.02, "unblock": PATIENCE, "sigkill": 1.0}
    with th.spawn(
        "tractor_host.testing:stuck", shape, variant, backend=BACKEND, gil=gil, stdio="pipe", ladder=ladder
    ) as worker:
        testing.wait_ready(worker)
        if shape in ENDINGS:
            # Its target must be over first, which comes after what it has written.
            until(lambda: _native.outcome(worker.id) is not None, "a target's value")
        found = worker.kill()
    if shape in ENDINGS:
        # The target is over; and its interpreter is not ended, but its process.
        assert (found.kind, found.signal) == ("returned", None)
    else:
        assert (found.kind, found.signal) == ("killed", None)
        assert found.rung in FORCED
    assert worker.pid is not None
    assert not Path(f"/proc/{worker.pid}").exists()
    assert all(pid_is_gone(pid, timeout=3.0) for pid in children_of(worker))


@pytest.mark.parametrize("shape", [name for name, shape in testing.SHAPES.items() if not shape.can_be_ended])
def test_code_that_cannot_be_ended_ends_with_its_process(shape: str, gil: Gil) -> None:
    with th.spawn(
        "tractor_host.testing:stuck",
        shape,
        backend=BACKEND,
        gil=gil,
        stdio="pipe",
        cancel_timeout=0,
        kill_timeout=0.3,
    ) as worker:
        testing.wait_ready(worker)
        # It says so just before it enters the code.
        assert worker.pid is not None
        threads = f"/proc/{worker.pid}/task/{worker.pid}/stat"
        with open(threads) as stat:
            begun = int(stat.read().rpartition(")")[2].split()[11])

        def has_run() -> bool:
            with open(threads) as stat:
                return int(stat.read().rpartition(")")[2].split()[11]) > begun + 5

        until(has_run, "it to compute for 50 ms")
        found = worker.kill()
    assert (found.kind, found.rung, found.signal) == ("killed", "sigkill", signal.SIGKILL)


def test_a_second_interrupt_from_outside_ends_what_does_not_listen(gil: Gil) -> None:
    worker = ready(th.spawn(targets.sleep_and_swallow, backend=BACKEND, gil=gil, stdio="pipe"))

    def has_ended() -> bool:
        # Two that come together may be one to the kernel.
        if worker.exit is None and worker.pid is not None:
            with suppress(ProcessLookupError):  # reaped just now
                os.kill(worker.pid, signal.SIGINT)
        return worker.exit is not None

    until(has_ended, "its end")
    found = worker.wait(timeout=PATIENCE)
    assert (found.kind, found.code) == ("exited", 128 + signal.SIGINT)


def test_workers_of_a_worker_end_with_it(gil: Gil) -> None:
    code = """
    import targets, helpers, tractor_host as th
    for backend in ("subint", "forkserver", "fork", "subint_forkserver"):
        assert th.spawn(targets.add, 1, 2, backend=backend).result(timeout=30) == 3
    left = helpers.ready(th.spawn(targets.sleep, backend="forkserver", stdio="pipe"))
    print("child", left.pid, flush=True)
    """
    worker = th.spawn(th.Source(dedent(code)), backend=BACKEND, gil=gil, stdio="pipe")
    assert worker.wait(timeout=PATIENCE).kind == "returned", worker.exit
    assert all(pid_is_gone(pid, timeout=1.0) for pid in children_of(worker))


@pytest.mark.parametrize("rung", ["unblock", "sigkill"])
def test_what_it_started_ends_with_it_in_whatever_session(gil: Gil, rung: str) -> None:
    code = """
    import subprocess, time
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    print("child", child.pid, flush=True)
    time.sleep(1000)
    """
    ladder = {rung: PATIENCE} if rung == "sigkill" else {rung: PATIENCE, "sigkill": 1.0}
    worker = th.spawn(th.Source(dedent(code)), backend=BACKEND, gil=gil, stdio="pipe", ladder=ladder)
    ready(worker, "child")
    assert worker.kill().rung == rung
    assert [pid_is_gone(pid, timeout=1.0) for pid in children_of(worker)] == [True]


@pytest.mark.parametrize("gil", ["shared", "own"])
def test_asyncio_can_be_preloaded(gil: Any) -> None:
    """It wants something done in a forked child that can't be done in a second interpreter."""
    with (
        keeping(1, ["asyncio"]),
        th.spawn("os:getpid", backend="subint_forkserver", gil=gil, stdio="pipe") as worker,
    ):
        worker.wait(PATIENCE)
        assert (worker.stdout, worker.stderr) == (b"", b"")
