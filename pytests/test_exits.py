"""Every way for a worker to end by itself is reported as what it was: kind, code, signal, and a cause
that names it. Shapes 19, 20, 21 and 23 of the adversaries."""

from __future__ import annotations

import os
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import targets
import tractor_host as th
from conftest import PATIENCE, Program
from helpers import importable, ready, until

#: A death during boot is told at once, not by a time limit. Seconds, with room for a loaded machine.
AT_ONCE = 2.0


def ended(target: Any, *args: Any, **options: Any) -> tuple[th.Worker, th.Exit]:
    worker = th.spawn(target, *args, **options)
    found = worker.wait(timeout=PATIENCE)
    assert found.elapsed is None, "nobody asked for its end"
    assert found.rung is None
    return worker, found


# -- it can't begin --------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a module of source text that workers can import; its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(source: str) -> str:
        name = f"made_by_a_test_{os.urandom(8).hex()}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return make


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        ("no_such_module:main", ModuleNotFoundError, "No module named 'no_such_module'"),
        ("targets:nowhere", AttributeError, "module 'targets' has no attribute 'nowhere'"),
        ("targets:Adder.nowhere", AttributeError, "'Adder' has no attribute 'nowhere'"),
        ("targets:FOR_EVER", TypeError, "the target 'targets:FOR_EVER' is not callable: it is of type float"),
    ],
)
def test_a_target_that_is_not_there_is_the_worker_s_failure(
    backend: str, target: str, error: type[BaseException], says: str
) -> None:
    worker, found = ended(target, backend=backend)
    assert (found.kind, found.signal) == ("raised", None)
    assert found.code == (None if backend == "subint" else 1)
    assert found.cause.startswith(f"failed to start: {error.__name__}: ")
    assert says in found.cause
    assert found.lifetime < AT_ONCE
    with pytest.raises(th.RemoteError) as caught:
        worker.result()
    assert type(caught.value.__cause__) is error
    assert caught.value.exit == found


def test_a_module_that_does_not_compile_is_named_with_the_line(
    backend: str, module: Callable[[str], str]
) -> None:
    name = module("x = 1\ny = = 2\n")
    worker, found = ended(f"{name}:main", backend=backend)
    assert found.kind == "raised"
    assert found.cause.startswith("failed to start: SyntaxError: invalid syntax")
    with pytest.raises(th.RemoteError, match=rf"{name}\.py") as caught:
        worker.result()
    assert isinstance(caught.value.__cause__, SyntaxError)
    assert caught.value.__cause__.lineno == 2


def test_a_module_that_raises_is_shown_with_its_traceback(backend: str, module: Callable[[str], str]) -> None:
    name = module("def setup():\n    raise OSError(5, 'too bad')\n\nsetup()\n")
    worker, found = ended(f"{name}:main", backend=backend)
    assert (found.kind, found.cause) == ("raised", "failed to start: OSError: [Errno 5] too bad")
    with pytest.raises(th.RemoteError, match=rf'{name}\.py", line 2, in setup'):
        worker.result()


def test_a_module_that_exits_is_reported_as_an_exit(backend: str, module: Callable[[str], str]) -> None:
    name = module("import sys; sys.exit(5)")
    worker, found = ended(f"{name}:main", backend=backend)
    assert (found.kind, found.code, found.cause) == ("exited", 5, "raised SystemExit, exit code 5")
    with pytest.raises(th.WorkerDied):
        worker.result()


@pytest.mark.parametrize(
    "argument", [targets.Grenade(), targets.Grenade("ImportError")], ids=["value", "import"]
)
def test_arguments_that_do_not_unpickle_are_the_worker_s_failure(backend: str, argument: Any) -> None:
    worker, found = ended(targets.nothing, argument, backend=backend)
    assert found.kind == "raised"
    assert found.cause == f"failed to start: {argument.kind}: exploded while unpickled"
    with pytest.raises(th.RemoteError, match="_explode"):
        worker.result()


def test_a_death_by_exit_code_during_boot_is_told_at_once(
    process_backend: str, module: Callable[[str], str]
) -> None:
    name = module("import os, sys; print('last words', file=sys.stderr, flush=True); os._exit(7)")
    worker, found = ended(f"{name}:main", backend=process_backend)
    assert (found.kind, found.code, found.signal) == ("exited", 7, None)
    assert found.cause == (
        "its process left with exit code 7 before it had started its target, without a result"
    )
    assert found.stderr == "last words\n"
    assert found.lifetime < AT_ONCE
    with pytest.raises(th.WorkerDied, match=r"(?s)exit code 7.*The last of its stderr:\nlast words"):
        worker.result()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT], ids=lambda n: n.name)
def test_a_death_by_signal_during_boot_is_told_at_once(
    process_backend: str, module: Callable[[str], str], number: signal.Signals
) -> None:
    name = module(
        "import signal, sys\n"
        "def crash():\n"
        f"    print('last words', file=sys.stderr, flush=True); signal.raise_signal({int(number)})\n"
        "    while True: pass\n"
        "crash()"
    )
    worker, found = ended(f"{name}:main", backend=process_backend)
    assert (found.kind, found.code, found.signal) == ("signalled", None, number)
    assert found.cause.startswith(f"its process was ended by {number.name} (")
    assert "before it had started its target" in found.cause
    assert found.stderr.startswith("last words\n")
    if number != signal.SIGKILL:
        assert "in crash" in found.stderr
    assert found.lifetime < AT_ONCE
    with pytest.raises(th.WorkerDied, match="last words"):
        worker.result()


def test_a_long_stderr_of_a_death_during_boot_is_shown_by_its_end(
    process_backend: str, module: Callable[[str], str]
) -> None:
    name = module(
        "import os, sys\n"
        "for number in range(200000): print('line', number, file=sys.stderr)\n"
        "sys.stderr.flush(); os._exit(7)"
    )
    _, found = ended(f"{name}:main", backend=process_backend)
    assert found.stderr.endswith("line 199998\nline 199999\n")
    assert 1000 < len(found.stderr) < 100_000


def test_what_boot_writes_to_stderr_is_passed_on_when_it_succeeds(
    process_backend: str, module: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    name = module(
        "import sys; print('a warning', file=sys.stderr)\ndef main(): print('hello', file=sys.stderr)"
    )
    _, found = ended(f"{name}:main", backend=process_backend)
    assert (found.kind, found.stderr) == ("returned", "")
    assert capfd.readouterr().err == "a warning\nhello\n"


# -- it leaves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 7, 111, 112, 255])
def test_an_exit_behind_our_back(process_backend: str, code: int) -> None:
    worker, found = ended(targets.exit_now, code, backend=process_backend)
    assert (found.kind, found.code, found.signal) == ("exited", code, None)
    assert found.cause == f"its process left with exit code {code}, without a result"
    with pytest.raises(
        th.WorkerDied, match=f"died: its process left with exit code {code}, without"
    ) as caught:
        worker.result()
    assert caught.value.exit == found


def test_an_exit_by_a_thread(process_backend: str) -> None:
    _, found = ended(targets.exit_from_thread, 7, backend=process_backend)
    assert (found.kind, found.code) == ("exited", 7)


@pytest.mark.parametrize(
    ("argument", "code", "err"),
    [
        (3, 3, ""),
        (None, 0, ""),
        (0, 0, ""),
        (256 + 7, 7, ""),
        (-1, 255, ""),
        (True, 1, ""),
        ("a text", 1, "a text\n"),
        (("a", 1), 1, "('a', 1)\n"),
    ],
    ids=repr,
)
def test_sys_exit_gives_the_code_that_a_program_would_leave_with(
    backend: str, argument: Any, code: int, err: str
) -> None:
    worker, found = ended(targets.sys_exit, argument, backend=backend, stdio="pipe")
    assert (found.kind, found.code, found.signal) == ("exited", code, None)
    assert found.cause == f"raised SystemExit, exit code {code}"
    assert worker.stderr.decode() == err
    with pytest.raises(th.WorkerDied, match=f"raised SystemExit, exit code {code}"):
        worker.result()


def test_sys_exit_with_an_integer_beyond_c(backend: str) -> None:
    """CPython leaves with 255 then (-1)."""
    _, found = ended(targets.sys_exit, 1 << 100, backend=backend, stdio="null")
    assert (found.kind, found.code) == ("exited", 255)


# -- it raises -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "error", "summary"),
    [
        (targets.raise_keyboard_interrupt, KeyboardInterrupt, "KeyboardInterrupt"),
        (targets.raise_base_group, BaseExceptionGroup, "BaseExceptionGroup: several (2 sub-exceptions)"),
        (targets.raise_with_notes, ValueError, "ValueError: ('noted', 1)"),
        (targets.raise_with_state, targets.WithState, "WithState: ('a text', 42)"),
    ],
)
def test_what_a_target_raises_is_raised_here(
    backend: str, target: Any, error: type[BaseException], summary: str
) -> None:
    worker, found = ended(target, backend=backend)
    assert (found.kind, found.cause) == ("raised", f"raised {summary}")
    assert found.code == (None if backend == "subint" else 1)
    with pytest.raises(th.RemoteError) as caught:
        worker.result()
    assert type(caught.value.__cause__) is error


def test_an_exception_that_spans_lines_is_summed_up_in_one(backend: str) -> None:
    worker, found = ended(th.Source("raise ValueError('first\\nsecond')"), backend=backend)
    assert found.cause == "raised ValueError: first"
    with pytest.raises(th.RemoteError, match="second"):
        worker.result()


def test_an_exception_with_an_empty_first_line(backend: str) -> None:
    _, found = ended(th.Source("raise ValueError('\\nsecond')"), backend=backend)
    assert (found.kind, found.cause.split(":")[0]) == ("raised", "raised ValueError")


def test_an_exception_that_is_one_newline(backend: str) -> None:
    _, found = ended(th.Source("raise ValueError('\\n')"), backend=backend)
    assert (found.kind, found.cause.split(":")[0]) == ("raised", "raised ValueError")


def test_an_exception_with_lone_surrogates(backend: str) -> None:
    """Its summary can't be encoded as it is."""
    worker, found = ended(th.Source("raise ValueError('file \\udc80')"), backend=backend)
    assert (found.kind, found.cause.split(":")[0]) == ("raised", "raised ValueError")
    with pytest.raises(th.RemoteError) as caught:
        worker.result()
    assert caught.value.__cause__ is not None
    assert caught.value.__cause__.args == ("file \udc80",)


@pytest.mark.parametrize(
    ("target", "name", "says"),
    [
        (targets.raise_unreducible, "Unreducible: a text", r"it cannot be pickled"),
        (targets.raise_two_arguments, "TwoArguments: one and other", r"it does not unpickle here"),
        (targets.raise_no_text, "NoText: <its __str__ raised RuntimeError>", None),
    ],
)
def test_an_exception_that_can_not_be_brought_over_is_described(
    backend: str, target: Any, name: str, says: str | None
) -> None:
    worker, found = ended(target, backend=backend)
    assert (found.kind, found.cause) == ("raised", f"raised {name}")
    with pytest.raises(th.RemoteError) as caught:
        worker.result()
    if says is not None:
        assert type(caught.value.__cause__).__name__ == "UnpicklableError"
        assert name in str(caught.value.__cause__)
        assert says in str(caught.value.__cause__)
    assert f"in {target.__name__}" in caught.value.traceback


# -- its result can't be brought over ------------------------------------------------------------------------


def test_a_result_that_can_not_be_pickled_is_named(backend: str) -> None:
    worker, found = ended(targets.unpicklable, backend=backend)
    assert found.kind == "raised"
    assert found.cause.startswith("raised TypeError: the result of type function cannot be pickled: ")
    with pytest.raises(th.RemoteError) as caught:
        worker.result()
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_result_that_explodes_when_it_is_unpickled_here(backend: str) -> None:
    worker, found = ended(targets.grenade, backend=backend)
    assert found.kind == "returned"
    for _ in range(2):
        with pytest.raises(th.RemoteError) as caught:
            worker.result()
        assert repr(caught.value.__cause__) == "ValueError('exploded while unpickled')"
        assert caught.value.__cause__.__notes__ == ["raised while the worker's result was unpickled here"]


def test_a_result_can_not_end_the_program_that_unpickles_it(backend: str) -> None:
    """A SystemExit out of `result()` would be the worker's to raise."""
    worker, _ = ended(targets.grenade, "SystemExit", backend=backend)
    with pytest.raises(th.RemoteError):
        worker.result()


# -- it dies after its result ------------------------------------------------------------------------------


def test_a_result_followed_by_an_exit_code_is_a_result(process_backend: str) -> None:
    worker, found = ended(targets.exit_at_exit, "precious", 9, backend=process_backend)
    assert (found.kind, found.code) == ("returned", 9)
    assert found.cause == "returned, then its process left with exit code 9"
    assert worker.result() == "precious"


def test_a_result_followed_by_a_signal_is_a_result(process_backend: str) -> None:
    worker, found = ended(targets.die_at_exit, "precious", signal.SIGKILL, backend=process_backend)
    assert (found.kind, found.code, found.signal) == ("returned", None, signal.SIGKILL)
    assert found.cause == "returned, then its process was ended by SIGKILL (killed)"
    assert worker.result() == "precious"


def test_a_big_result_followed_by_a_signal_is_whole(process_backend: str) -> None:
    size = 20 << 20
    worker, found = ended(targets.die_at_exit, bytes(size), signal.SIGKILL, backend=process_backend)
    assert found.kind == "returned"
    assert worker.result() == bytes(size)


def test_a_big_result_cut_short_by_a_death_is_no_result(process_backend: str) -> None:
    """Its thread waits until some of it has been sent, and kills the process in the middle of it."""
    code = """
    import os, threading, signal, socket, pickle, resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # so that it goes through the channel, and by no file in memory
    class Slow:
        def __reduce__(self):
            threading.Thread(target=die).start()
            return bytes, (b"x" * (128 << 20),)
    def die():
        # The channel is a socket: it is being written to when its queue is not empty.
        import array, fcntl, termios, os
        while True:
            for name in os.listdir("/proc/self/fd"):
                try:
                    if os.readlink("/proc/self/fd/" + name).startswith("socket:"):
                        queued = array.array("i", [0])
                        fcntl.ioctl(int(name), termios.TIOCOUTQ, queued)
                        if queued[0] > 1000:
                            os.kill(os.getpid(), signal.SIGKILL)
                except OSError:
                    pass
    Slow()
    """
    worker, found = ended(th.Source(textwrap.dedent(code)), backend=process_backend)
    assert (found.kind, found.signal) == ("signalled", signal.SIGKILL)
    with pytest.raises(th.WorkerDied, match="SIGKILL"):
        worker.result()


# -- it crashes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "args", "number", "says"),
    [
        (targets.segfault, (), signal.SIGSEGV, "SIGSEGV (segmentation fault)"),
        (targets.abort, (), signal.SIGABRT, "SIGABRT (abort)"),
        (targets.kill_itself, (signal.SIGKILL,), signal.SIGKILL, "SIGKILL (killed)"),
        (targets.kill_itself, (signal.SIGTERM,), signal.SIGTERM, "SIGTERM (terminated)"),
        (targets.kill_itself, (signal.SIGALRM,), signal.SIGALRM, "SIGALRM (alarm)"),
        (targets.kill_itself, (signal.SIGRTMIN + 3,), signal.SIGRTMIN + 3, f"signal {signal.SIGRTMIN + 3}"),
    ],
    ids=["segfault", "abort", "kill", "term", "alarm", "realtime"],
)
def test_a_death_by_signal_is_told_with_its_name(
    process_backend: str, target: Any, args: tuple[Any, ...], number: int, says: str
) -> None:
    worker, found = ended(target, *args, backend=process_backend, stdio="pipe")
    assert (found.kind, found.code, found.signal) == ("signalled", None, number)
    assert found.cause.startswith(f"its process was ended by {says}")
    assert ("the supervisor did not send it" in found.cause) == (number == signal.SIGKILL)
    if number in (signal.SIGSEGV, signal.SIGABRT):
        assert f"in {target.__name__}" in found.stderr, "where in Python it crashed"
    with pytest.raises(th.WorkerDied, match="died: its process was ended by "):
        worker.result()


def test_where_it_crashed_is_told_also_when_its_stderr_goes_elsewhere(process_backend: str) -> None:
    _, found = ended(targets.segfault, backend=process_backend, stdio="null")
    assert "in segfault" in found.stderr


def test_a_signal_from_outside_is_told(process_backend: str) -> None:
    worker = th.spawn(targets.sleep, backend=process_backend, stdio="null")
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    found = worker.wait(timeout=PATIENCE)
    assert (found.kind, found.signal, found.elapsed) == ("signalled", signal.SIGKILL, None)


def test_a_keyboard_interrupt_from_outside_is_an_exception(process_backend: str) -> None:
    worker = ready(th.spawn(targets.sleep, backend=process_backend, stdio="pipe"))
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    found = worker.wait(timeout=PATIENCE)
    assert (found.kind, found.cause) == ("raised", "raised KeyboardInterrupt")


# -- it is hostile to its channel ------------------------------------------------------------------------------


def _fds_of(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/fd")
    except FileNotFoundError:
        return []


def test_a_worker_that_closed_all_its_fds_can_be_killed(process_backend: str) -> None:
    with th.spawn(
        targets.close_all_fds,
        True,
        backend=process_backend,
        stdio="pipe",
        cancel_timeout=0.2,
        kill_timeout=0.6,
    ) as worker:
        ready(worker)
        # Until then it can still be told to stop, and does.
        until(lambda: worker.exit or not _fds_of(worker.pid), "the closing of all its fds")
        found = worker.kill()
    assert found.kind in ("killed", "exited")
    # It leaves by itself where its reader finds the descriptor closed.
    assert found.elapsed is None or found.elapsed < 2.8
    with pytest.raises(th.WorkerError):
        worker.result()


def test_a_worker_that_closed_all_its_fds_ends_without_a_result(process_backend: str) -> None:
    worker = th.spawn(targets.close_all_fds, False, backend=process_backend, stdio="null")
    found = worker.wait(timeout=PATIENCE)
    # With its channel it lost the way to tell what happened.
    assert found.kind in ("killed", "exited")
    with pytest.raises(th.WorkerError):
        worker.result()


def test_a_worker_that_writes_garbage_to_its_channel_is_ended(process_backend: str) -> None:
    worker = th.spawn(targets.write_garbage, backend=process_backend, stdio="null")
    found = worker.wait(timeout=PATIENCE)
    assert found.kind == "killed"
    assert "it broke the protocol of its channel" in found.cause
    with pytest.raises(th.WorkerKilled, match="protocol"):
        worker.result()


def test_half_a_frame_with_a_length_of_gigabytes_is_no_result(process_backend: str) -> None:
    worker = th.spawn(targets.write_half_a_frame, backend=process_backend, stdio="null")
    found = worker.wait(timeout=PATIENCE)
    assert found.kind in ("killed", "exited")
    assert "in the middle of a message" in found.cause
    with pytest.raises(th.WorkerError):
        worker.result()


# -- somebody else takes its status -----------------------------------------------------------------------------

LOST = """
import os, signal, sys, threading, time, targets, tractor_host as th
backend, how = sys.argv[1:]
if how == "ignore":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
else:
    def reap():
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                time.sleep(0.0001)
    threading.Thread(target=reap, daemon=True).start()

def tell(target, *args):
    # Whoever reaps can be later than the supervisor: then nothing is lost.
    for _ in range(100):
        found = th.spawn(target, *args, backend=backend, stdio="null").wait(timeout=30)
        if "somebody else took its exit status" in found.cause:
            break
    print(found.kind, found.code, found.signal, "|", found.cause)

tell(targets.give, 1)
tell(targets.exit_now, 7)
tell(targets.kill_itself, signal.SIGKILL)
with th.spawn(targets.sleep, backend=backend, stdio="null") as worker:
    pass
print(worker.exit.kind)
"""


@pytest.mark.parametrize("how", ["ignore", "reap"])
def test_an_exit_status_that_somebody_else_took_is_reported_as_lost(
    process_backend: str, how: str, program: Callable[..., Program]
) -> None:
    start = time.monotonic()
    found = program(LOST).run(process_backend, how, env=importable())
    assert (found.returncode, found.stderr) == (0, "")
    lost = "its process ended, and somebody else took its exit status"
    returned, exited, killed, last = found.stdout.splitlines()
    assert returned == f"returned None None | returned, then {lost}"
    assert exited == f"exited None None | {lost}, without a result"
    assert killed == f"exited None None | {lost}, without a result"
    assert last in ("cancelled", "killed")
    assert time.monotonic() - start < PATIENCE
