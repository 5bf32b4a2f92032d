"""What is special about workers in subinterpreters: which GIL they get, what they share with nobody,
what their threads leave, and that cycle after cycle leaves nothing."""

from __future__ import annotations

import _interpreters
import gc
import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import targets
import tractor_host as th
from conftest import PATIENCE, Program
from helpers import children_of, ready, together, until
from tractor_host import _native


@pytest.fixture(params=["shared", "own"])
def gil(request: pytest.FixtureRequest) -> Any:
    return request.param


# -- the two kinds of GIL ------------------------------------------------------------------------------


def whose_gil() -> str:
    """`_interpreters` knows the configuration that an interpreter was made with."""
    import _interpreters

    return str(_interpreters.get_config(_interpreters.get_current()[0]).gil)


@pytest.mark.parametrize("asked", ["shared", "own", "auto"])
def test_a_subinterpreter_has_the_gil_that_was_asked_for(asked: Any) -> None:
    found = th.spawn("test_subint:whose_gil", backend="subint", gil=asked).result(timeout=PATIENCE)
    assert found == ("shared" if asked == "shared" else "own")


def test_the_shared_gil_is_the_default() -> None:
    assert th.spawn("test_subint:whose_gil", backend="subint").result(timeout=PATIENCE) == "shared"


@pytest.mark.parametrize(
    "code",
    [
        "import asyncio; asyncio.run(asyncio.sleep(0)); 1",
        "import trio; trio.run(trio.sleep, 0); 1",
        "import trio; trio.run(trio.to_thread.run_sync, lambda: 1)",
        "import json, ssl, sqlite3, ctypes, decimal, hashlib, zlib, socket, struct; 1",
        "import threading; t = threading.Thread(target=print); t.start(); t.join(); 1",
        "import subprocess; subprocess.run(['true']).returncode + 1",
        "from concurrent.futures import ThreadPoolExecutor as T\nwith T() as p: v = p.submit(int, '1').result()\nv",
    ],
    ids=["asyncio", "trio", "trio thread", "modules", "thread", "subprocess", "pool"],
)
def test_what_programs_do_works(gil: Any, code: str) -> None:
    worker = th.spawn(th.Source(code), backend="subint", gil=gil, stdio="null")
    assert worker.result(timeout=PATIENCE) == 1


NUMPY = """
import tractor_host as th
code = "import numpy as np\\nint(np.arange(10).sum())"
print(th.spawn(th.Source(code), backend="subint").result(timeout=30))
try:
    print(th.spawn(th.Source(code), backend="subint").result(timeout=30))
except th.RemoteError as error:
    print(type(error.__cause__).__name__, error.__cause__)
"""


def test_numpy_works_with_the_shared_gil(program: Callable[..., Program]) -> None:
    """In a program of its own: numpy loads once in a process, wherever. The second time it says so."""
    if importlib.util.find_spec("numpy") is None:
        pytest.skip("numpy is not installed")
    found = program(NUMPY).run()
    assert found.returncode == 0, found.stderr
    first, second = found.stdout.splitlines()
    assert first == "45"
    assert second in ("45", "ImportError cannot load module more than once per process")


def use_msgspec(text: bytes) -> Any:
    import msgspec

    import test_subint

    return msgspec.json.decode(text), test_subint.whose_gil()


def use_msgspec_too(text: bytes) -> Any:
    return use_msgspec(text)


def test_a_module_that_refuses_its_own_gil_is_told_as_an_import_error() -> None:
    pytest.importorskip("msgspec")
    worker = th.spawn(use_msgspec, b"[1]", backend="subint", gil="own")
    with pytest.raises(th.RemoteError, match="does not support loading in subinterpreters") as caught:
        worker.result(timeout=PATIENCE)
    assert isinstance(caught.value.__cause__, ImportError)
    assert "msgspec" in str(caught.value)


def test_auto_falls_back_to_the_shared_gil_and_remembers() -> None:
    pytest.importorskip("msgspec")
    before = th.statistics()
    worker = th.spawn(use_msgspec, b"[1]", backend="subint", gil="auto")
    assert worker.result(timeout=PATIENCE) == ([1], "shared")
    # One worker, though it had two lives.
    assert th.statistics().spawned == before.spawned + 1
    assert _interpreters_made(lambda: th.spawn(use_msgspec, b"[2]", backend="subint", gil="auto")) == 1
    # Remembered for that target only; and not for those who insist.
    assert _interpreters_made(lambda: th.spawn(use_msgspec_too, b"[3]", backend="subint", gil="auto")) == 2
    with pytest.raises(th.RemoteError):
        th.spawn(use_msgspec, b"[1]", backend="subint", gil="own").result(timeout=PATIENCE)


def _interpreters_made(spawn: Any) -> int:
    """How many interpreters it takes; their ids are given out one after the other."""

    def next_id() -> int:
        made = _interpreters.create()
        _interpreters.destroy(made)
        return int(made)

    first = next_id()
    (value, _) = spawn().result(timeout=PATIENCE)
    assert value
    return next_id() - first - 1


def test_auto_falls_back_during_boot_too() -> None:
    pytest.importorskip("msgspec")
    worker = th.spawn("msgspec.json:decode", b"[1]", backend="subint", gil="auto", stdio="pipe")
    assert worker.result(timeout=PATIENCE) == [1]
    assert worker.stderr == b""


def test_auto_keeps_the_output_of_both_lives() -> None:
    pytest.importorskip("msgspec")
    code = th.Source(
        "print('life', flush=True)\nimport msgspec\nmsgspec.json.decode(b'[1]')", filename="two lives"
    )
    worker = th.spawn(code, backend="subint", gil="auto", stdio="pipe")
    assert worker.result(timeout=PATIENCE) == [1]
    assert worker.stdout == b"life\nlife\n"


def test_auto_can_be_killed_in_its_second_life() -> None:
    pytest.importorskip("msgspec")
    code = th.Source("import msgspec\nprint('ready', flush=True)\nwhile True: pass", filename="second life")
    worker = ready(th.spawn(code, backend="subint", gil="auto", stdio="pipe"))
    assert worker.kill().kind == "cancelled"


# -- isolation ---------------------------------------------------------------------------------------------


def test_two_subinterpreters_share_nothing(gil: Any) -> None:
    code = th.Source(
        "import builtins, os, sys, targets\n"
        "seen = hasattr(builtins, 'mark'), 'mark' in sys.modules, hasattr(targets, 'mark'), sys.getrecursionlimit()\n"
        "builtins.mark = targets.mark = 1; sys.modules['mark'] = sys; sys.setrecursionlimit(777)\n"
        "seen"
    )
    limit = sys.getrecursionlimit()
    for _ in range(2):
        worker = th.spawn(code, backend="subint", gil=gil)
        assert worker.result(timeout=PATIENCE) == (False, False, False, 1000)
    assert not hasattr(targets, "mark")
    assert sys.getrecursionlimit() == limit


def test_an_exit_of_a_subinterpreter_is_its_own(gil: Any) -> None:
    for code in ("raise SystemExit(3)", "import sys; sys.exit(3)", "exit(3)", "quit(3)"):
        found = th.spawn(th.Source(code), backend="subint", gil=gil).wait(timeout=PATIENCE)
        assert (found.kind, found.code) == ("exited", 3), code


def test_os_fork_in_a_subinterpreter_does_not_take_the_host_along() -> None:
    """CPython ends the child of such a fork; the worker and the host go on."""
    code = th.Source(
        "import os\ntry:\n    pid = os.fork()\nexcept RuntimeError:\n    pid = 0\nif pid: os.waitpid(pid, 0)\n1"
    )
    worker = th.spawn(code, backend="subint", gil="own", stdio="null")
    assert worker.result(timeout=PATIENCE) == 1


def test_a_busy_own_gil_does_not_hold_up_the_host() -> None:
    with together() as spawn:
        hogs = [
            ready(spawn(targets.hog_in_c_for, 4.0, backend="subint", gil="own", stdio="pipe"))
            for _ in range(2)
        ]
        for _ in range(10):
            th.spawn(targets.nothing, backend="fork").result(timeout=PATIENCE)
        assert [hog.exit for hog in hogs] == [None, None]


# -- threads that a target leaves ------------------------------------------------------------------------------

LEAVE = """
import threading, time, queue
threads = {
    "spin": lambda: [None for _ in iter(int, 1)],
    "sleep": lambda: time.sleep(1e6),
    "event": threading.Event().wait,
    "queue": queue.Queue().get,
}
for name in args:
    threading.Thread(target=threads[name], daemon=True).start()
42
"""


@pytest.mark.parametrize("names", [("spin",), ("spin", "spin", "spin")], ids=len)
def test_daemon_threads_that_run_python_end_with_the_target(gil: Any, names: tuple[str, ...]) -> None:
    worker = th.spawn(th.Source(LEAVE), *names, backend="subint", gil=gil, stdio="null")
    assert worker.result(timeout=PATIENCE) == 42
    assert worker.wait().lifetime < 5


def test_threads_that_are_no_daemons_are_waited_for(gil: Any) -> None:
    code = th.Source(
        "import threading, time\n"
        "def late():\n    time.sleep(0.2); print('late', flush=True)\n"
        "threading.Thread(target=late, daemon=False).start()\n42"
    )
    worker = th.spawn(code, backend="subint", gil=gil, stdio="pipe")
    assert worker.result(timeout=PATIENCE) == 42
    assert worker.stdout == b"late\n"


def test_a_thread_that_is_no_daemon_and_never_ends_can_be_killed(gil: Any) -> None:
    code = th.Source(
        "import threading\n"
        "def spin():\n    print('ready', flush=True)\n    while True: pass\n"
        "threading.Thread(target=spin, daemon=False).start()\n42"
    )
    worker = th.spawn(code, backend="subint", gil=gil, stdio="pipe", cancel_timeout=0.2, kill_timeout=45)
    found = ready(worker).kill()
    # Its value came before it was killed.
    assert found.kind in ("returned", "killed")


def test_atexit_functions_of_a_subinterpreter_are_called(gil: Any) -> None:
    code = th.Source("import atexit; atexit.register(print, 'bye', flush=True); 42")
    worker = th.spawn(code, backend="subint", gil=gil, stdio="pipe")
    assert worker.result(timeout=PATIENCE) == 42
    assert worker.stdout == b"bye\n"


def test_a_child_process_of_a_subinterpreter_is_not_left(gil: Any) -> None:
    """Its process is the host, so nothing else would end it."""
    worker = ready(
        th.spawn(
            targets.wait_for_child,
            backend="subint",
            gil=gil,
            stdio="pipe",
            cancel_timeout=0.1,
            kill_timeout=10,
        )
    )
    (pid,) = children_of(worker)
    found = worker.kill()
    assert found.kind in ("killed", "cancelled")
    until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the child")


# -- nothing is left -------------------------------------------------------------------------------------------


def test_a_hundred_cycles_leave_nothing(gil: Any) -> None:
    shapes: list[tuple[Any, str | None, bool]] = [
        (targets.spin, None, True),
        (targets.trio_sleep, "trio", True),
        (targets.asyncio_sleep, "asyncio", True),
        (targets.nothing, None, False),
    ]

    def owned() -> tuple[int, list[str], int]:
        found = _native.resources()
        threads = [name for name in found["threads"] if name.startswith("th")]
        return len(found["fds"]), sorted(threads), len(_interpreters.list_all())

    gc.collect()
    before = owned()
    for cycle in range(100):
        # trio is slow to import: every tenth.
        target, runtime, stays = shapes[
            3 if cycle % 10 in (3, 6, 9) else 0 if cycle % 10 else 1 + cycle // 10 % 2
        ]
        worker = th.spawn(target, backend="subint", gil=gil, runtime=runtime, stdio="pipe")  # type: ignore[arg-type]
        found = ready(worker).kill() if stays else worker.wait(timeout=PATIENCE)
        assert found.kind == ("cancelled" if stays else "returned"), found
    del worker
    gc.collect()
    until(lambda: owned() == before, f"{before} again, now {owned()}")


def test_memory_is_given_back(gil: Any) -> None:
    def spawn_some(count: int) -> int:
        for _ in range(count):
            th.spawn(targets.nothing, backend="subint", gil=gil).wait(timeout=PATIENCE)
        return int(_native.resources()["resident"])

    first = spawn_some(15)
    # Measured: 20 to 40 kB a cycle; an interpreter that leaked would be 1,500 kB.
    assert (spawn_some(30) - first) / 30 < 300_000


def test_subinterpreters_of_others_are_left_alone() -> None:
    mine = _interpreters.create()
    try:
        th.spawn(targets.nothing, backend="subint").result(timeout=PATIENCE)
        assert _interpreters.run_string(mine, "x = 1") is None
    finally:
        _interpreters.destroy(mine)


def test_a_thread_of_the_host_sees_no_exception_of_a_killed_worker() -> None:
    done = threading.Event()
    errors: list[BaseException] = []

    def innocent() -> None:
        try:
            while not done.is_set():
                sum(range(100))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=innocent)
    thread.start()
    try:
        for _ in range(5):
            ready(th.spawn(targets.spin, backend="subint", stdio="pipe", cancel_timeout=0)).kill()
    finally:
        done.set()
        thread.join()
    assert errors == []
