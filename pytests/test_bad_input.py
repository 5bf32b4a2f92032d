"""Bad input gets a clear error that says what to do, at once and in the caller, and leaks nothing; so
does an operating system that refuses."""

from __future__ import annotations

import functools
import math
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import targets
import tractor_host as th
from conftest import PATIENCE, Program
from helpers import importable, ready

# -- targets ---------------------------------------------------------------------------------------------


def refuses(error: type[Exception], text: str, *args: Any, **options: Any) -> None:
    """Nothing is begun, and the message says why."""
    before = th.statistics().spawned
    with pytest.raises(error) as caught:
        th.spawn(*args, **options)
    assert th.statistics().spawned == before
    assert type(caught.value) is error
    assert re.search(text, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "math", "math:", ":sqrt", "math.sqrt", "math:sqrt:x", "a b:c", "math:1", "../x:y"]
)
def test_a_name_that_is_no_name_says_how_to_write_one(backend: str, name: str) -> None:
    refuses(
        ValueError, rf"written 'module:qualname' \(such as 'math:sqrt'\), not {name!r}", name, backend=backend
    )


@pytest.mark.parametrize("target", [None, 3, b"math:sqrt", ["math:sqrt"], Path("x")], ids=repr)
def test_a_target_that_is_none_says_what_is_one(backend: str, target: Any) -> None:
    refuses(
        TypeError,
        r"a target is a callable, a 'module:qualname' string or a tractor_host\.Source, not ",
        target,
    )


@pytest.mark.parametrize("code", [None, b"1 + 1", 3], ids=repr)
def test_source_that_is_no_text(code: Any) -> None:
    with pytest.raises(TypeError, match=f"source code must be a str, not {type(code).__name__}"):
        th.Source(code)


def test_a_lambda_says_what_to_use_instead(backend: str) -> None:
    refuses(
        TypeError,
        r"the target <function .*<lambda>.* cannot be sent .* imported by its name",
        lambda: 1,
        backend=backend,
    )


def test_a_local_function_says_what_to_use_instead(backend: str) -> None:
    def local() -> None:
        pass

    refuses(TypeError, r"local.* cannot be sent .*not a lambda or a local one", local, backend=backend)
    refuses(TypeError, r"cannot be sent to a worker", functools.partial(local), backend=backend)


def test_a_bound_method_of_something_that_can_not_be_pickled(backend: str) -> None:
    refuses(
        TypeError,
        r"the target .*acquire.* cannot be sent to a worker",
        threading.Lock().acquire,
        backend=backend,
    )


# -- arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((threading.Lock(),), {}, r"^argument 1 of type lock cannot be pickled: "),
        ((1, 2, open), {"key": threading.Lock()}, r"^argument 'key' of type lock cannot be pickled: "),
        ((1, [[lambda: 1]]), {}, r"^argument 2 of type list cannot be pickled: "),
        (
            (targets.Unreducible("x"),),
            {},
            r"^argument 1 of type Unreducible cannot be pickled: no __reduce__ today",
        ),
    ],
    ids=["first", "keyword", "inside", "own reason"],
)
def test_an_argument_that_can_not_be_pickled_is_named(
    backend: str, args: tuple[Any, ...], kwargs: dict[str, Any], text: str
) -> None:
    refuses(TypeError, text, targets.nothing, *args, backend=backend, kwargs=kwargs)


def test_an_argument_that_is_too_deep_to_pickle_is_named(backend: str) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    refuses(
        TypeError,
        "^argument 1 of type list cannot be pickled: ([Rr]ecursion|Stack overflow)",
        targets.nothing,
        deep,
        backend=backend,
    )
    while deep:  # or else its end is as deep
        deep = deep.pop()


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [({1: 2}, "strings as keys, not 1"), ([1], "kwargs"), ("ab", "kwargs"), (3, "kwargs")],
    ids=repr,
)
def test_keyword_arguments_that_are_none(kwargs: Any, text: str) -> None:
    refuses(TypeError, text, targets.nothing, kwargs=kwargs)


# -- options ----------------------------------------------------------------------------------------------


def test_an_unknown_backend_says_which_there_are() -> None:
    for name in ("thread", "", "Fork", "subinterpreter"):
        refuses(
            ValueError,
            rf"unknown backend {name!r}; there are 'forkserver', 'subint', 'subint_forkserver', 'fork', 'exec'",
            targets.nothing,
            backend=name,
        )


def test_an_unknown_backend_of_the_environment_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACTOR_HOST_BACKEND", "thread")
    refuses(ValueError, r"unknown backend 'thread' \(from TRACTOR_HOST_BACKEND\)", targets.nothing)


@pytest.mark.parametrize("value", [3, b"fork", ["fork"]], ids=repr)
def test_a_backend_that_is_no_text(value: Any) -> None:
    refuses(TypeError, f"backend must be a str, not {type(value).__name__}", targets.nothing, backend=value)


@pytest.mark.parametrize("name", ["timeout", "cancel_timeout", "kill_timeout"])
@pytest.mark.parametrize("value", [-1, -0.001, math.nan, -math.inf], ids=repr)
def test_a_bound_that_can_not_be_one(backend: str, name: str, value: float) -> None:
    text = f"^{name} must be a number of seconds, at least 0, not {value}"
    refuses(ValueError, text, targets.nothing, backend=backend, **{name: value})


@pytest.mark.parametrize("name", ["timeout", "cancel_timeout", "kill_timeout"])
@pytest.mark.parametrize("value", ["1", True, [1], 1j], ids=repr)
def test_a_bound_that_is_no_number(name: str, value: Any) -> None:
    text = f"^{name} must be a number of seconds, not {type(value).__name__}"
    refuses(TypeError, text, targets.nothing, **{name: value})


@pytest.mark.parametrize("name", ["cancel_timeout", "kill_timeout"])
def test_a_ladder_without_a_bound_is_refused(name: str) -> None:
    refuses(TypeError, f"^{name} must be a number of seconds, not NoneType", targets.nothing, **{name: None})


@pytest.mark.parametrize("value", [10**400, 1e300, math.inf], ids=["int", "float", "inf"])
def test_a_bound_may_be_longer_than_any_clock_goes(backend: str, value: float) -> None:
    options: dict[str, Any] = dict.fromkeys(["timeout", "cancel_timeout", "kill_timeout"], value)
    worker = th.spawn(targets.add, 1, 2, backend=backend, **options)
    assert worker.wait(value).kind == "returned"
    assert worker.result(timeout=value) == 3


def test_waits_with_a_bound_that_can_not_be_one(backend: str) -> None:
    with th.spawn(targets.spin, backend=backend, stdio="pipe") as worker:
        ready(worker)
        for call in (worker.wait, worker.result):
            for value in (-1, math.nan):
                with pytest.raises(ValueError, match="timeout must be a number of seconds, at least 0"):
                    call(value)
            for other in ("1", True):
                with pytest.raises(TypeError, match="timeout must be a number of seconds, not"):
                    call(other)  # type: ignore[arg-type]
        assert worker.state == "running"


@pytest.mark.parametrize("name", ["", "a\0b", "\0"])
def test_a_name_that_no_worker_can_have(backend: str, name: str) -> None:
    refuses(
        ValueError, r"name must not be empty or contain a NUL", targets.nothing, backend=backend, name=name
    )


def test_a_name_that_is_no_text() -> None:
    refuses(TypeError, "name must be a str, not bytes", targets.nothing, name=b"name")


def test_a_name_with_lone_surrogates_says_so_in_terms_of_the_caller(backend: str) -> None:
    with pytest.raises((TypeError, ValueError), match="name"):
        th.spawn(targets.nothing, backend=backend, name="lone \udc80")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("runtime", "curio", r"runtime must be 'sync', 'trio', 'asyncio' or None, not 'curio'"),
        ("gil", "none", r"gil must be 'shared', 'own' or 'auto', not 'none'"),
        ("gil", None, r"gil must be 'shared', 'own' or 'auto', not None"),
        ("stdio", None, r"stdio must be 'inherit', 'null', 'pipe' or the path of a file, not None"),
        ("stdio", "", r"stdio must be 'inherit', 'null', 'pipe' or the path of a file, not ''"),
        ("stdio", 1, r"stdio must be 'inherit', 'null', 'pipe' or the path of a file, not 1"),
        ("stdio", "a\0b", r"NUL in the stdio path|null byte|null character"),
    ],
)
def test_a_choice_that_there_is_not(backend: str, name: str, value: Any, text: str) -> None:
    refuses(ValueError, text, targets.nothing, backend=backend, **{name: value})


def test_a_file_for_output_that_can_not_be_opened(backend: str, tmp_path: Path) -> None:
    refuses(
        FileNotFoundError, "nowhere/log", targets.nothing, backend=backend, stdio=tmp_path / "nowhere" / "log"
    )
    refuses(IsADirectoryError, re.escape(str(tmp_path)), targets.nothing, backend=backend, stdio=tmp_path)


@pytest.mark.parametrize("option", [{"env": {"A": "b"}}, {"cwd": "/"}, {"env": {}}], ids=repr)
def test_env_and_cwd_are_refused_for_a_subinterpreter(option: dict[str, Any]) -> None:
    text = r'env and cwd belong to a process .* use backend="fork" or "exec"'
    refuses(ValueError, text, targets.nothing, backend="subint", **option)


@pytest.mark.parametrize(
    ("env", "error"),
    [
        ({"A": 1}, TypeError),
        ({1: "a"}, TypeError),
        ({"A": None}, TypeError),
        ({"A": "x\0y"}, ValueError),
        ({"A\0": "x"}, ValueError),
        ({"A=B": "x"}, ValueError),
        ({"": "x"}, ValueError),
    ],
    ids=repr,
)
def test_an_environment_that_no_process_can_have(
    process_backend: str, env: Any, error: type[Exception]
) -> None:
    refuses(error, "env", targets.nothing, backend=process_backend, env=env)


def test_a_directory_that_no_process_can_have(process_backend: str) -> None:
    refuses(ValueError, "NUL in cwd", targets.nothing, backend=process_backend, cwd="a\0b")
    refuses(TypeError, "", targets.nothing, backend=process_backend, cwd=3)


def test_a_directory_that_is_not_there_is_named(process_backend: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises((FileNotFoundError, th.WorkerDied), match=re.escape(str(missing))):
        th.spawn(targets.nothing, backend=process_backend, cwd=missing).result(timeout=PATIENCE)


def test_reading_output_that_is_not_collected() -> None:
    with th.spawn(targets.nothing) as worker, pytest.raises(ValueError, match='use stdio="pipe"'):
        _ = worker.stdout


@pytest.mark.parametrize("sent", [targets.Grenade(), [targets.Grenade()]], ids=["alone", "inside"])
def test_what_does_not_unpickle_there_is_the_worker_s_failure(backend: str, sent: Any) -> None:
    with pytest.raises(th.RemoteError, match="failed to start: ValueError: exploded while unpickled"):
        th.spawn(targets.nothing, sent, backend=backend).result(timeout=PATIENCE)


# -- at the wrong time, in the wrong process -----------------------------------------------------------------


def test_after_shutdown_nothing_can_be_spawned(backend: str, program: Callable[..., Program]) -> None:
    found = program(
        """
        import atexit, sys
        import targets, tractor_host as th
        @atexit.register
        def late():
            try:
                th.spawn(targets.nothing, backend=sys.argv[1])
            except RuntimeError as error:
                print(error)
            print(th.workers(), th.statistics().live)
        assert th.spawn(targets.add, 1, 2, backend=sys.argv[1]).result(timeout=30) == 3
        """
    ).run(backend, env=importable())
    assert found.returncode == 0, found.stderr
    assert found.stdout == "tractor_host is shutting down: no worker can be spawned any more\n[] 0\n"
    assert found.stderr == ""


def test_a_process_that_was_forked_behind_our_back_is_told_so(
    backend: str, program: Callable[..., Program]
) -> None:
    found = program(
        """
        import os, sys, warnings
        import targets, tractor_host as th
        warnings.simplefilter("ignore")
        worker = th.spawn(targets.sleep, backend="fork", stdio="pipe")
        pid = os.fork()
        if pid == 0:
            for call in (lambda: th.spawn(targets.nothing, backend=sys.argv[1]), th.workers, th.statistics,
                         worker.wait, worker.kill, worker.cancel, worker.result, worker.fileno):
                try:
                    call()
                    print("no error from", call)
                except RuntimeError as error:
                    # Either of the two says whose they are.
                    text = str(error)
                    assert "was forked by os.fork()" in text or "belongs to process" in text, error
                    assert str(os.getppid()) in text
            print("child is done", flush=True)
            # It leaves as any program does: with its handle to the worker, and atexit.
            sys.exit(0)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), worker.state)
        print(worker.kill().kind)
        """
    ).run(backend, env=importable())
    assert found.returncode == 0, found.stderr
    assert found.stdout == "child is done\n0 running\ncancelled\n"
    assert found.stderr == ""


# -- the operating system refuses -----------------------------------------------------------------------------

#: Gives up what exempts root from RLIMIT_NPROC, but not its access to files, also over exec.
NO_PROCESSES = """
import contextlib, ctypes, errno, os, resource, sys
import targets, helpers, tractor_host as th
backend = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)

def check(done):
    if done != 0:
        print("SKIP", os.strerror(ctypes.get_errno()))
        sys.exit(0)

# Capabilities are a thread's: before there is a second one.
if os.getuid() == 0:
    check(libc.prctl(8, 1, 0, 0, 0))  # PR_SET_KEEPCAPS
    os.setresuid(54321, 54321, 54321)
    files = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)(files, files, files, 0, 0, 0)))
    for capability in (1, 2):
        check(libc.prctl(47, 2, capability, 0, 0))  # PR_CAP_AMBIENT_RAISE
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, or /proc/self belongs to root
# What is loaded lazily otherwise, while no thread can be made.
th.spawn(targets.nothing, backend=backend).result(timeout=30)

def left():
    owned = helpers.resources()
    return sorted(owned["fds"].values()), owned["threads"], owned["children"]

before = left()
limits = resource.getrlimit(resource.RLIMIT_NPROC)
resource.setrlimit(resource.RLIMIT_NPROC, (1, limits[1]))
for _ in range(20):
    try:
        th.spawn(targets.nothing, backend=backend)
        print("no error")
    except BlockingIOError as error:
        assert error.errno == errno.EAGAIN
        text = str(error)
assert left() == before, (before, left())
assert th.workers() == []
resource.setrlimit(resource.RLIMIT_NPROC, limits)
print(th.spawn(targets.add, 1, 2, backend=backend).result(timeout=30), text)
"""


def test_at_the_limit_of_processes_and_threads(backend: str, program: Callable[..., Program]) -> None:
    # A blank that is ready would do.
    found = program(NO_PROCESSES).run(backend, env={**importable(), "TRACTOR_HOST_BLANKS": "0"})
    assert found.returncode == 0, found.stderr
    if found.stdout.startswith("SKIP"):
        pytest.skip(f"this machine does not let go of capabilities: {found.stdout}")
    what = {
        "subint": "start a worker's thread",
        "forkserver": "fork a worker",
        "subint_forkserver": "fork a worker",
        "fork": "fork a worker",
        "exec": "start `",
    }[backend]
    assert found.stdout.startswith(f"3 [Errno 11] failed to {what}"), found.stdout
    assert "Resource temporarily unavailable" in found.stdout
    assert found.stderr == ""


NO_FDS = """
import errno, os, resource, sys
import targets, helpers, tractor_host as th
backend, stdio, first = sys.argv[1:]

def attempt():
    return th.spawn(targets.add, 1, 2, backend=backend, stdio=stdio).result(timeout=30)

if first == "warm":
    attempt()

def left():
    # What a worker could leave: the supervisor itself may come to be at any step.
    owned = helpers.resources()
    fds = [what for what in owned["fds"].values() if what != "/" and not what.startswith("anon_inode:[event")]
    threads = [name for name in owned["threads"] if name not in ("th-supervisor", "th-clean")]
    return sorted(fds), threads, owned["children"]

# No gap below the limit: what is left is what the limit leaves.
top = os.open("/dev/null", os.O_RDONLY)
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1, hard))
fill = []
while True:
    try:
        fill.append(os.dup(top))
    except OSError:
        break

refused = accepted = 0
unclear = []
for spare in range(24):
    resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1 + spare, hard))
    how = ""
    try:
        assert attempt() == 3
        accepted += 1
    except OSError as error:
        assert error.errno == errno.EMFILE, error
        how = str(error)
        refused += 1
    except th.WorkerError as error:
        # It got as far as the worker's own side, which says why.
        how = str(error)
        if "Too many open files" not in how and "Errno 24" not in how:
            unclear.append((spare, how))
        refused += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(spare, how.partition("\\n")[0], flush=True)
    if spare == 0:
        before = left()
    helpers.until_same(left, before)
assert refused, "the limit did not limit"
assert accepted, "23 fds are plenty"
for fd in [top, *fill]:
    os.close(fd)
assert attempt() == 3
assert th.workers() == []
assert not unclear, unclear
print("all good")
"""


@pytest.mark.parametrize("first", ["warm", "cold"])
@pytest.mark.parametrize("stdio", ["inherit", "pipe"])
def test_without_fds_a_spawn_fails_or_works_and_nothing_is_left(
    backend: str, stdio: str, first: str, program: Callable[..., Program]
) -> None:
    # The control socket comes to be at some step, and stays.
    found = program(NO_FDS).run(backend, stdio, first, env={**importable(), "TRACTOR_HOST_CONTROL": "0"})
    assert found.returncode == 0, f"{found.stdout}\n{found.stderr}"
    assert found.stdout.endswith("\nall good\n")


def test_waiting_and_killing_need_no_fds(backend: str, program: Callable[..., Program]) -> None:
    found = program(
        """
        import os, resource, sys
        import targets, helpers, tractor_host as th
        # What is imported at the first result otherwise.
        th.spawn(targets.nothing, backend=sys.argv[1]).result()
        ended = th.spawn(targets.add, 1, 2, backend=sys.argv[1])
        helpers.until(lambda: ended.exit is not None, "its end")
        ended.wait(timeout=30)
        worker = helpers.ready(th.spawn(targets.spin, backend=sys.argv[1], stdio="pipe"))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        result, found = ended.result(timeout=30), worker.kill()
        try:
            worker.fileno()
        except OSError as error:
            message = error
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        print(result, found.kind, message.errno)
        """
    ).run(backend, env=importable())
    assert found.returncode == 0, found.stderr
    assert found.stdout == "3 cancelled 24\n"


def test_a_program_that_is_not_python_3_14_can_not_import_it(tmp_path: Path) -> None:
    """The extension module carries a version in its name, so no other Python finds it. What it says
    if it is loaded all the same is tested where one is to be had."""
    from tractor_host import _native

    name = os.path.basename(getattr(_native, "__file__", None) or "_native.cpython-314-x.so")
    assert ".cpython-314-" in name
    assert sys.version_info[:2] == (3, 14)
