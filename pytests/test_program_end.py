"""The end of a program, beyond the common cases of test_host_exit.py: what can't be ended, what comes in
between, and ends that run no Python any more."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from conftest import Program, pid_is_gone
from helpers import importable

pytestmark = pytest.mark.outside

LAUNCHERS = ("python", "tractor-host")

#: Spawns a worker of each kind, tells their pids and ends in the way that is asked for.
ENDS = """
import ctypes, os, signal, sys, time
import helpers, targets, tractor_host as th

def end(how):
    match how:
        case "return": return
        case "os._exit": os._exit(7)
        case "segfault": ctypes.string_at(0)
        case "sigterm": os.kill(os.getpid(), signal.SIGTERM)
        case "abort": os.abort()
        case "execv": os.execv("/bin/sleep", ["sleep", "60"])
    time.sleep(60)

if __name__ == "__main__":
    how, names, *backends = sys.argv[1:]
    workers = [
        helpers.ready(th.spawn(getattr(targets, name), backend=backend, stdio="pipe"))
        for name in names.split(",") for backend in backends
    ]
    print(*[worker.pid for worker in workers if worker.pid], flush=True)
    end(how)
"""


def pids(out: str) -> list[int]:
    return [int(word) for word in out.split()]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_program_ends_in_time_with_default_budgets(launcher: str, program: Callable[..., Program]) -> None:
    """Sleepers and busy ones, all at once, each with 3 s to end by itself and 3 s to be ended."""
    start = time.monotonic()
    ended = program(ENDS, launcher=launcher).run(
        "return", "sleep,spin,sleep_and_swallow", "subint", "forkserver", "exec", env=importable(), timeout=20
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert time.monotonic() - start < 10
    assert len(pids(ended.stdout)) == 6
    assert all(pid_is_gone(pid) for pid in pids(ended.stdout))


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("gil", ["shared", "own"])
def test_a_program_with_something_that_can_not_be_ended_ends_with_its_own_code(
    launcher: str, gil: str, program: Callable[..., Program]
) -> None:
    start = time.monotonic()
    ended = program(
        """
        import sys, atexit
        import helpers, targets, tractor_host as th
        atexit.register(print, "atexit")
        worker = th.spawn(targets.hash_for_ever, backend="subint", gil=sys.argv[1], name="hasher", stdio="pipe",
                          cancel_timeout=0.2, kill_timeout=0.3)
        helpers.ready(worker)
        sys.stdout.write("not flushed yet\\n")
        sys.exit(3)
        """,
        launcher=launcher,
    ).run(gil, env=importable(), timeout=20)
    assert time.monotonic() - start < 10
    assert (ended.returncode, ended.stdout) == (3, "not flushed yet\natexit\n")
    assert ended.stderr == "tractor-host: worker `hasher` (subint) could not be ended and is abandoned\n"


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("os._exit", 7),
        ("segfault", -signal.SIGSEGV),
        ("sigterm", -signal.SIGTERM),
        ("abort", -signal.SIGABRT),
    ],
)
def test_workers_do_not_outlive_a_program_that_ends_without_a_word(
    how: str, code: int, program: Callable[..., Program]
) -> None:
    ended = program(ENDS).run(
        how, "sleep,ignore_signals", "forkserver", "fork", "exec", env=importable(), timeout=20
    )
    assert ended.returncode == code
    assert len(pids(ended.stdout)) == 6
    assert all(pid_is_gone(pid, timeout=3.0) for pid in pids(ended.stdout))


@pytest.mark.parametrize("how", ["SIGKILL", "os._exit", "return", "abort"])
def test_no_daemon_of_a_worker_outlives_the_program(
    how: str, signalled_backend: str, program: Callable[..., Program]
) -> None:
    """However far from its worker it went: its session, its group and its parent are its own."""
    process = program(
        """
        import os, signal, sys
        import helpers, targets, tractor_host as th
        how, backend = sys.argv[1:]
        workers = [
            th.spawn(targets.daemons, then, backend=backend, stdio="pipe", cancel_timeout=0.2, kill_timeout=1)
            for then in ("sleep", "swallow", "ignore")
        ]
        for worker in workers:
            helpers.until(lambda: len(helpers.children_of(worker)) == 2)
            print(worker.pid, *helpers.children_of(worker), flush=True)
        match how:
            case "SIGKILL": os.kill(os.getpid(), signal.SIGKILL)
            case "os._exit": os._exit(0)
            case "abort": os.abort()
        """
    ).start(how, signalled_backend, env=importable())
    with process:
        out, _ = process.communicate(timeout=30)
    assert len(pids(out)) == 9
    assert all(pid_is_gone(pid, timeout=3.0) for pid in pids(out))


def test_workers_do_not_outlive_a_program_whose_channels_somebody_else_holds(
    process_backend: str, program: Callable[..., Program]
) -> None:
    """A fork of the host has copies of the host's ends: no worker sees an end of file."""
    process = program(
        """
        import os, signal, sys, time
        import helpers, targets, tractor_host as th
        worker = helpers.ready(th.spawn(targets.spin_and_swallow, backend=sys.argv[1], stdio="pipe"))
        if (copy := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        print(worker.pid, copy, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    ).start(process_backend, env=importable())
    with process:
        assert process.stdout is not None
        worker, copy = pids(process.stdout.readline())
        try:
            assert pid_is_gone(worker, timeout=3.0)
        finally:
            os.kill(copy, signal.SIGKILL)


def test_a_worker_that_is_stopped_does_not_outlive_the_program(
    process_backend: str, program: Callable[..., Program]
) -> None:
    process = program(
        """
        import os, signal, sys
        from pathlib import Path
        import helpers, targets, tractor_host as th
        worker = helpers.ready(th.spawn(targets.stop_itself, backend=sys.argv[1], stdio="pipe"))
        helpers.until(lambda: "State:\\tT" in Path(f"/proc/{worker.pid}/status").read_text())
        print(worker.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    ).start(process_backend, env=importable())
    with process:
        out, _ = process.communicate(timeout=30)
    (pid,) = pids(out)
    assert pid_is_gone(pid, timeout=3.0)


def test_workers_do_not_outlive_a_program_that_becomes_another(program: Callable[..., Program]) -> None:
    """Its threads end with the exec, and a worker's death signal follows the one that forked it."""
    process = program(ENDS).start("execv", "sleep,spin", "forkserver", "fork", "exec", env=importable())
    with process:
        assert process.stdout is not None
        found = pids(process.stdout.readline())
        try:
            assert len(found) == 6
            # Zombies of the new program, which does not know of them.
            assert all(pid_is_gone(pid) for pid in found)
        finally:
            process.kill()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("call", ["wait()", "result()", "kill()", "wait(timeout=100)"])
def test_ctrl_c_is_heard_at_once_by_whoever_waits(
    launcher: str, call: str, backend: str, program: Callable[..., Program]
) -> None:
    process = program(
        """
        import sys
        import helpers, targets, tractor_host as th
        backend, text = sys.argv[1:]
        kills = text == "kill()"
        worker = th.spawn(targets.spin_in_finally if kills else targets.spin, backend=backend, stdio="pipe",
                          cancel_timeout=0.5 if kills else 3, kill_timeout=30)
        helpers.ready(worker)
        if kills:
            worker.cancel()
            helpers.ready(worker, "cleaning up")
        call = compile("worker." + text, "call", "eval")
        try:
            print("waits", flush=True)
            eval(call)
            print("it has ended", flush=True)
        except KeyboardInterrupt:
            print("interrupted", worker.state, flush=True)
        print(worker.kill().kind)
        """,
        launcher=launcher,
    ).start(backend, call, env=importable())
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "waits\n"
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        heard = process.stdout.readline()
        took = time.monotonic() - start
        # Not `communicate`: it does not know what `readline` has buffered.
        out, err = process.stdout.read(), process.stderr.read()
    assert (process.returncode, err) == (0, "")
    # It runs on; `kill` may not have got further than to ask, when it is interrupted.
    assert heard in ("interrupted running\n", "interrupted cancelling\n", "interrupted killing\n")
    assert took < 1
    assert out in ("cancelled\n", "killed\n")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_that_interrupts_another_thread_is_heard_by_whoever_waits(
    launcher: str, program: Callable[..., Program]
) -> None:
    """The kernel may hand a signal to any thread; its handler is run by the main one alone."""
    ended = program(
        """
        import os, signal, threading, time
        import helpers, targets, tractor_host as th
        worker = helpers.ready(th.spawn(targets.sleep, stdio="pipe"))
        main = helpers.Path(f"/proc/self/task/{os.getpid()}")
        def send():
            helpers.until(lambda: (main / "syscall").read_text().startswith("202 "))  # futex
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            os.kill(os.getpid(), signal.SIGINT)
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            threading.Thread(target=send).start()
            worker.wait(timeout=20)
        except KeyboardInterrupt:
            print("interrupted", worker.state)
        worker.kill()
        """,
        launcher=launcher,
    ).run(env=importable())
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "interrupted running\n", "")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_during_the_end_does_not_leave_workers(
    launcher: str, signalled_backend: str, program: Callable[..., Program]
) -> None:
    process = program(
        """
        import atexit, sys
        import helpers, targets, tractor_host as th
        worker = th.spawn(targets.ignore_signals, backend=sys.argv[1], stdio="pipe", cancel_timeout=1, kill_timeout=1)
        helpers.ready(worker)
        # Registered last, so that it is called first.
        atexit.register(print, worker.pid, flush=True)
        """,
        launcher=launcher,
    ).start(signalled_backend, env=importable())
    with process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        process.wait(timeout=40)
    assert pid_is_gone(pid, timeout=3.0)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_thread_that_waits_for_a_worker_does_not_keep_the_program(
    launcher: str, backend: str, program: Callable[..., Program]
) -> None:
    start = time.monotonic()
    ended = program(
        """
        import sys, threading
        import helpers, targets, tractor_host as th
        worker = th.spawn(targets.spin, backend=sys.argv[1], stdio="pipe")
        helpers.ready(worker)
        waits = threading.Event()
        def wait():
            waits.set()
            worker.wait()
        threading.Thread(target=wait, daemon=True).start()
        waits.wait()
        print("end")
        """,
        launcher=launcher,
    ).run(backend, env=importable(), timeout=20)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")
    assert time.monotonic() - start < 10


def test_threads_that_spawn_for_ever_do_not_keep_the_program(
    backend: str, program: Callable[..., Program]
) -> None:
    ended = program(
        """
        import sys, threading
        import targets, tractor_host as th
        some = threading.Event()
        def spawn():
            try:
                while True:
                    th.spawn(targets.nothing, backend=sys.argv[1], stdio="null").wait()
                    some.set()
            except RuntimeError as error:
                assert "shutting down" in str(error)
        for _ in range(3):
            threading.Thread(target=spawn, daemon=True).start()
        some.wait()
        """
    ).run(backend, env=importable(), timeout=20)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_worker_that_is_spawned_during_the_end_is_ended_too(
    backend: str, program: Callable[..., Program]
) -> None:
    ended = program(
        """
        import atexit, sys
        import targets, tractor_host as th
        th.spawn(targets.nothing, backend=sys.argv[1]).wait()
        # Called before the supervisor's own.
        atexit.register(lambda: print(th.spawn(targets.add, 1, 2, backend=sys.argv[1]).result(timeout=30)))
        sys.kept = []
        atexit.register(lambda: sys.kept.append(th.spawn(targets.spin, backend=sys.argv[1], stdio="null")))
        """
    ).run(backend, env=importable(), timeout=20)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "3\n", "")


def test_a_program_that_never_spawned_has_nothing_to_end(program: Callable[..., Program]) -> None:
    ended = program(
        """
        import tractor_host as th
        from tractor_host import _native
        print(th.workers(), th.BACKENDS["fork"], _native.resources()["threads"])
        """
    ).run()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "th-" not in ended.stdout


def test_fork_based_multiprocessing_works_beside_process_workers(
    process_backend: str, program: Callable[..., Program]
) -> None:
    """Its children are not ours, and ours not theirs."""
    ended = program(
        """
        import multiprocessing, sys, warnings
        import helpers, targets, tractor_host as th
        warnings.simplefilter("ignore")  # of forking with threads
        if __name__ == "__main__":
            with helpers.ready(th.spawn(targets.sleep, backend=sys.argv[1], stdio="pipe")) as worker:
                context = multiprocessing.get_context("fork")
                with context.Pool(2) as pool:
                    print(pool.map(abs, [-1, -2, -3]))
                process = context.Process(target=sys.exit, args=[5])
                process.start()
                process.join()
                print(process.exitcode, worker.state)
        """
    ).run(process_backend, env=importable(), timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[1, 2, 3]\n5 running\n", "")


def test_a_pool_of_interpreters_works_beside_workers(backend: str, program: Callable[..., Program]) -> None:
    ended = program(
        """
        import sys
        from concurrent.futures import InterpreterPoolExecutor
        import helpers, targets, tractor_host as th
        if __name__ == "__main__":
            with helpers.ready(th.spawn(targets.spin, backend=sys.argv[1], stdio="pipe")) as worker:
                with InterpreterPoolExecutor(2) as pool:
                    print(list(pool.map(abs, [-1, -2, -3])))
                print(worker.state)
        """
    ).run(backend, env=importable(), timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[1, 2, 3]\nrunning\n", "")
