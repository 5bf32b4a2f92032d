"""The fork backend: a child that holds nothing of its parent's, also beside live subinterpreters."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import tractor_host as th
from conftest import PATIENCE, Program, pid_is_gone
from helpers import importable
from tractor_host import testing


def fds() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listed them
            continue
    return found


def status(*keys: str) -> dict[str, str]:
    lines = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: lines[key] for key in keys}


def use(fd: int) -> str:
    try:
        os.read(fd, 1)
    except OSError as error:
        return str(error.strerror)
    return "read"


def spin() -> None:
    print("ready", flush=True)
    while True:
        pass


@pytest.mark.parametrize("gils", [("shared", "shared"), ("own", "own"), ("shared", "own")])
def test_it_forks_while_subinterpreters_are_busy(gils: tuple[str, str]) -> None:
    busy = [
        th.spawn(spin, backend="subint", gil=gil, stdio="pipe", cancel_timeout=0)  # type: ignore[arg-type]
        for gil in gils
    ]
    for worker in busy:
        testing.wait_ready(worker)
    for number in range(40):
        assert th.spawn("math:sqrt", number * number, backend="fork").result(PATIENCE) == number
    for worker in busy:
        assert worker.kill().kind == "killed"


def test_a_child_can_fork_and_make_interpreters_itself() -> None:
    code = """
import tractor_host as th
[th.spawn("os:getpid", backend=backend).result(30) for backend in ("subint", "fork", "exec")]
"""
    here, forked, fresh = th.spawn(th.Source(code), backend="fork").result(PATIENCE)
    assert len({here, forked, fresh, os.getpid()}) == 4


def test_its_fds_are_stdio_its_channel_and_placeholders() -> None:
    reading, writing = os.pipe()
    try:
        found = th.spawn(fds, backend="fork").result(PATIENCE)
        # The number is taken, what it meant is gone.
        assert found[reading] == found[writing] == "/"
        live = {fd: what for fd, what in found.items() if fd > 2 and what != "/"}
        kinds = sorted(what.partition(":")[0] for what in live.values())
        # Both ends of reading and writing the channel are one socket; the boot's record is a memory file;
        # the end of the host is seen at a pidfd.
        assert kinds == ["/memfd", "anon_inode", "socket", "socket"], live
        assert "anon_inode:[pidfd]" in live.values()
        assert th.spawn(use, reading, backend="fork").result(PATIENCE) == "Bad file descriptor"
    finally:
        os.close(reading)
        os.close(writing)


def test_a_pipe_of_the_host_reaches_its_end_while_workers_live() -> None:
    reading, writing = os.pipe()
    with th.spawn(spin, backend="fork", stdio="pipe") as worker:
        testing.wait_ready(worker)
        os.close(writing)
        assert os.read(reading, 1) == b""
    os.close(reading)


def test_signals_are_as_in_a_new_process() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
    handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        for backend in ("forkserver", "fork", "exec"):
            found = th.spawn(status, "SigBlk", "SigIgn", backend=backend).result(PATIENCE)
            assert int(found["SigBlk"], 16) == 0, backend
            ignored = {number for number in range(1, 65) if int(found["SigIgn"], 16) >> (number - 1) & 1}
            # Those that Python ignores; and the two that glibc keeps for itself and nobody can set.
            assert ignored <= {signal.SIGPIPE, signal.SIGXFSZ, 32, 33}, backend
    finally:
        signal.signal(signal.SIGUSR2, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_loop_in_the_child_notices_a_signal() -> None:
    """CPython leaves main_tstate dangling in a child that another thread than the main one forked."""
    with th.spawn(spin, backend="fork", stdio="pipe") as worker:
        testing.wait_ready(worker)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        found = worker.wait(PATIENCE)
    assert (found.kind, found.cause) == ("raised", "raised KeyboardInterrupt")


def test_it_leads_its_own_group_and_its_thread_is_the_main_one() -> None:
    code = (
        "import os, threading\n"
        "os.getpgid(0) == os.getpid(), threading.current_thread() is threading.main_thread()"
    )
    assert th.spawn(th.Source(code), backend="fork").result(PATIENCE) == (True, True)


def test_random_numbers_differ() -> None:
    random.seed(1)
    values = {th.spawn("random:random", backend="fork").result(PATIENCE) for _ in range(3)}
    assert len(values) == 3


def test_neither_atexit_nor_unflushed_output_of_the_parent_runs_twice(
    program: Callable[..., Program],
) -> None:
    ran = program(
        """
        import atexit, sys
        import tractor_host as th

        atexit.register(print, "goodbye")
        sys.stdout.write("once ")
        print(th.spawn("math:sqrt", 4, backend="fork").result(30))
        """
    ).run()
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "once 2.0\ngoodbye\n", "")


def test_a_process_forked_behind_our_back_is_told_so(program: Callable[..., Program]) -> None:
    ran = program(
        """
        import os, sys, time, warnings
        import tractor_host as th

        warnings.simplefilter("ignore")
        worker = th.spawn("time:sleep", 1000, backend="fork")
        while worker.state == "booting":
            time.sleep(0.001)
        if (pid := os.fork()) == 0:
            for attempt in (lambda: th.spawn("os:getpid"), worker.kill, th.workers):
                try:
                    attempt()
                except RuntimeError as error:
                    print(str(error).split(",")[0].split(" (")[0], flush=True)
            sys.exit(5)  # with all that ends a program: the parent's workers are not its own
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        print(worker.state, worker.kill().kind)
        """
    ).run()
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == lines[2] == "this process"
    assert lines[1].startswith("this process was forked by os.fork() from process")
    assert lines[3:] == ["5", "running cancelled"]
    assert ran.stderr == ""


@pytest.mark.parametrize("target", ["tractor_host.testing:stuck", "time:sleep"])
@pytest.mark.parametrize("backend", ["fork", "exec"])
def test_workers_die_with_a_host_that_is_killed(
    program: Callable[..., Program], backend: str, target: str
) -> None:
    """Also when the thread that spawned them has ended long before."""
    host = program(
        f"""
        import threading, time
        import tractor_host as th

        def spawn():
            global worker
            argument = "spin" if {target!r}.endswith("stuck") else 1000
            worker = th.spawn({target!r}, argument, backend={backend!r}, stdio="null")

        thread = threading.Thread(target=spawn)
        thread.start()
        thread.join()
        while worker.state != "running":
            time.sleep(0.001)
        print(worker.pid, flush=True)
        time.sleep(1000)
        """
    ).start()
    with host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        host.kill()
    assert pid_is_gone(pid, 1.0)


# -- forks of the user's own -------------------------------------------------------------------------

BESIDE_SUBINTERPRETERS = """
import contextlib, multiprocessing, os, signal, subprocess, sys, threading, warnings
import helpers, tractor_host as th
from tractor_host import testing

warnings.simplefilter("ignore")  # of forking with threads

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def by_hand():
    for _ in range(20):
        if (pid := os.fork()) == 0:
            os._exit(7)
        assert ended(pid) == 7

def from_a_thread():
    thread = threading.Thread(target=by_hand)
    thread.start()
    thread.join()

def that_goes_on():
    if (pid := os.fork()) == 0:
        thread = threading.Thread(target=print, args=["a thread"])
        thread.start()
        thread.join()
        from concurrent import interpreters
        made = interpreters.create()
        made.exec("print('an interpreter')")
        made.close()
        subprocess.run(["true"], check=True)
        sys.stdout.flush()
        os._exit(3)  # the workers are the parent's
    assert ended(pid) == 3

def by_multiprocessing():
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        assert pool.map(abs, [-1, -2, -3]) == [1, 2, 3]
    process = context.Process(target=sys.exit, args=[5])
    process.start()
    process.join()
    assert process.exitcode == 5

def by_preexec_fn():
    ran = subprocess.run(["true"], preexec_fn=os.setsid, check=True)
    assert ran.returncode == 0

def by_pty():
    import pty
    pid, fd = pty.fork()
    if pid == 0:
        os._exit(6)
    assert ended(pid) == 6
    os.close(fd)

if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        for shape in ("sleep", "spin"):
            for gil in ("shared", "own"):
                worker = th.spawn("tractor_host.testing:stuck", shape, backend="subint", gil=gil, stdio="pipe",
                                  cancel_timeout=0.2)
                testing.wait_ready(stack.enter_context(worker))
        globals()[sys.argv[1]]()
        sys.stdout.flush()
    print("good")
"""


@pytest.mark.parametrize("launcher", ["python", "tractor-host"])
@pytest.mark.parametrize(
    "how", ["by_hand", "from_a_thread", "that_goes_on", "by_multiprocessing", "by_preexec_fn", "by_pty"]
)
def test_a_fork_of_the_user_s_own_works_beside_busy_subinterpreters(
    how: str, launcher: str, program: Callable[..., Program]
) -> None:
    """In any other CPython 3.14 its child crashes (cpython#139759)."""
    ended = program(BESIDE_SUBINTERPRETERS, launcher=launcher).run(how, env=importable())
    expected = "a thread\nan interpreter\ngood\n" if how == "that_goes_on" else "good\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, expected, "")


def test_a_fork_while_the_first_subinterpreter_is_made_survives(program: Callable[..., Program]) -> None:
    source = """
        import os, warnings
        import tractor_host as th

        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        worker = th.spawn("time:sleep", 0.1, backend="subint")
        ends = []
        while worker.state != "running" and worker.exit is None:
            if (pid := os.fork()) == 0:
                os._exit(0)
            ends.append(os.waitpid(pid, 0)[1])
        worker.result(timeout=20)
        print(len(ends) > 0, {*ends})
    """
    ran = program(source).run()
    assert (ran.stdout, ran.stderr) == ("True {0}\n", "")


@pytest.mark.parametrize("gil", ["shared", "own"])
def test_a_fork_from_inside_a_subinterpreter_is_refused(gil: str) -> None:
    """By a clear error, and not by the death of its child."""
    worker = th.spawn(th.Source("import os; os.fork()"), backend="subint", gil=gil)  # type: ignore[arg-type]
    with pytest.raises(th.RemoteError) as raised:
        worker.result(timeout=30)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert "fork not supported" in str(raised.value.__cause__)


def test_a_forked_worker_does_not_end_the_executors_of_its_host(program: Callable[..., Program]) -> None:
    """Their clean-up is registered with `threading`, and would write to descriptors that are gone."""
    ended = program(
        """
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
        import tractor_host as th

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as processes, ThreadPoolExecutor(1) as threads:
                assert processes.submit(abs, -1).result(30) == threads.submit(abs, -1).result(30) == 1
                with th.spawn("os:getpid", backend="fork", stdio="pipe") as worker:
                    assert worker.result(timeout=30) == worker.pid
                    print(worker.stderr.decode(), end="")
                assert processes.submit(abs, -2).result(30) == 2
            print("good")
        """
    ).run()
    assert (ended.stdout, ended.stderr) == ("good\n", "")


IMPORTS = """
    import os, sys, threading
    import tractor_host as th

    HOST = os.getpid()
    entered, leave = threading.Event(), threading.Event()

    def use():
        import slow.part
        return slow.part.whole and slow.whole

    if __name__ == "__main__":
        sys.modules["program"] = sys.modules["__main__"]
        thread = threading.Thread(target=__import__, args=("slow",))
        thread.start()
        assert entered.wait(30)
        worker = th.spawn(use, backend="fork")
        try:
            print(worker.result(timeout=30))
        finally:
            leave.set()
            thread.join()
"""
SLOW = """
import os
import slow.part
from program import HOST, entered, leave

if os.getpid() == HOST:
    entered.set()
    leave.wait(60)
whole = True
"""


def test_an_import_that_another_thread_of_the_host_is_in_begins_anew(
    program: Callable[..., Program], tmp_path: Path
) -> None:
    """A fork copies it half done, with its lock, which nobody in the child would ever give back."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "__init__.py").write_text(SLOW)
    (tmp_path / "slow" / "part.py").write_text("whole = True\n")
    ran = program(IMPORTS).run()
    assert (ran.stdout, ran.stderr) == ("True\n", "")
