"""The contract of worker processes: what they have of their host, what they must not have, also beside
busy subinterpreters and busy threads; and who dies with whom. test_fork.py has the basics."""

from __future__ import annotations

import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import targets
import tractor_host as th
from conftest import PATIENCE, Program, pid_is_gone
from helpers import children_of, importable, ready, together

# -- forking while much goes on --------------------------------------------------------------------------


@pytest.mark.parametrize("gil", ["shared", "own"])
def test_a_hundred_forks_beside_busy_subinterpreters(gil: Any) -> None:
    """CPython crashes here: cpython#139759."""
    with together() as spawn:
        busy = [
            spawn(target, backend="subint", gil=gil, stdio="pipe")
            for target in (targets.sleep_then_clean_up, targets.spin)
        ]
        for worker in busy:
            ready(worker)
        for number in range(100 if gil == "own" else 50):
            assert th.spawn(targets.give, number, backend="fork").result(timeout=PATIENCE) == number
        assert [worker.state for worker in busy] == ["running"] * 2


def test_forks_while_subinterpreters_come_and_go() -> None:
    stop = threading.Event()
    failures = []

    def keep_making_subinterpreters(gil: Any) -> None:
        while not stop.is_set():
            found = th.spawn(targets.nothing, backend="subint", gil=gil).wait(timeout=PATIENCE)
            if found.kind != "returned":
                failures.append(found)

    threads = [threading.Thread(target=keep_making_subinterpreters, args=[gil]) for gil in ("shared", "own")]
    for thread in threads:
        thread.start()
    try:
        for number in range(60):
            assert th.spawn(targets.give, number, backend="fork").result(timeout=PATIENCE) == number
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_forked_worker_can_do_all_that_a_program_does() -> None:
    code = """
    import asyncio, subprocess, threading, trio, gc, random
    import tractor_host as th
    async def sleep_in(loop): await loop.sleep(0); return 1
    values = [trio.run(sleep_in, trio), asyncio.run(sleep_in(asyncio))]
    thread = threading.Thread(target=values.append, args=[1]); thread.start(); thread.join()
    values.append(int(subprocess.run(["echo", "1"], capture_output=True).stdout))
    with th.spawn("operator:add", 0, 1, backend="subint") as worker: values.append(worker.result(timeout=30))
    with th.spawn("operator:add", 0, 1, backend="fork") as worker: values.append(worker.result(timeout=30))
    gc.collect()
    values
    """
    with th.spawn(targets.spin, backend="subint", stdio="pipe") as busy:
        ready(busy)
        assert th.spawn(_source(code), backend="fork").result(timeout=PATIENCE) == [1] * 6


def test_a_fork_does_not_wait_for_locks_that_other_threads_held() -> None:
    """Of modules that are imported, of logging, of buffered streams."""
    stop = threading.Event()

    def keep_locking() -> None:
        import logging

        log = logging.getLogger("of.a.test")
        log.addHandler(logging.NullHandler())
        log.propagate = False
        while not stop.is_set():
            log.warning("text")
            sys.stderr.flush()

    threads = [threading.Thread(target=keep_locking) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        code = "import logging, sys; logging.getLogger('of.a.test').warning('x'); sys.stderr.flush(); 1"
        for _ in range(20):
            assert th.spawn(th.Source(code), backend="fork").result(timeout=PATIENCE) == 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_the_memory_of_the_host_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "FOR_EVER", "changed here")
    code = th.Source("import targets; targets.FOR_EVER")
    assert th.spawn(code, backend="fork").result(timeout=PATIENCE) == "changed here"
    assert th.spawn(code, backend="exec").result(timeout=PATIENCE) == 1e6


# -- the child's own state ---------------------------------------------------------------------------------


def test_threading_in_the_child_of_a_thread_is_as_in_a_program() -> None:
    found: list[dict[str, Any]] = []

    def spawn_here() -> None:
        found.append(th.spawn(targets.surroundings, backend="fork").result(timeout=PATIENCE))

    thread = threading.Thread(target=spawn_here)
    thread.start()
    thread.join()
    assert found[0]["is_main_thread"]
    assert found[0]["threads"] == ["MainThread"]


def test_what_the_host_registered_for_its_exit_is_not_done_by_children(
    program: Callable[..., Program], process_backend: str
) -> None:
    found = program(
        """
        import atexit, os, sys, weakref, targets, tractor_host as th
        host = os.getpid()
        class Thing: pass
        thing = Thing()
        finalizer = weakref.finalize(thing, lambda: print("finalizer in", os.getpid() == host, flush=True))
        atexit.register(lambda: print("atexit in", os.getpid() == host, flush=True))
        if __name__ == "__main__":
            backend = sys.argv[1]
            th.spawn(targets.nothing, backend=backend).result(timeout=30)
            th.spawn(targets.sys_exit, 3, backend=backend).wait(timeout=30)
            code = "import atexit; atexit.register(print, 'atexit of the worker', flush=True); 1"
            th.spawn(th.Source(code), backend=backend).result(timeout=30)
        """
    ).run(process_backend, env=importable())
    assert (found.returncode, found.stderr) == (0, "")
    assert sorted(found.stdout.splitlines()) == [
        "atexit in True",
        "atexit of the worker",
        "finalizer in True",
    ]


def test_a_child_leads_a_process_group_of_its_own_in_the_host_s_session(process_backend: str) -> None:
    code = th.Source("import os; (os.getpid(), os.getpgid(0), os.getsid(0), os.getppid())")
    pid, group, session, parent = th.spawn(code, backend=process_backend).result(timeout=PATIENCE)
    assert (group, session, parent) == (pid, os.getsid(0), os.getpid())


# -- descriptors -------------------------------------------------------------------------------------------

FDS = """
import os
found = {}
for name in os.listdir("/proc/self/fd"):
    try:
        found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        pass
found
"""


def test_the_child_has_nothing_of_the_host_s_files(process_backend: str) -> None:
    with open(__file__) as file:
        os.set_inheritable(file.fileno(), True)  # even so
        found = th.spawn(th.Source(FDS), backend=process_backend, stdio="pipe").result(timeout=PATIENCE)
    assert found[0] == "/dev/null"
    assert "th-stdout" in found[1]
    assert "th-stderr" in found[2]
    # What is left: the channel, the record of the boot, the host's pidfd, and placeholders.
    known = ("socket:", "/memfd:th-boot", "/memfd:th-std", "anon_inode:[pidfd]")
    others = sorted(
        what for fd, what in found.items() if fd > 2 and not what.startswith(known) and what != "/"
    )
    assert others == []


def test_inherited_numbers_are_taken_and_useless_in_a_forked_child() -> None:
    code = """
    import errno, os
    def attempt(call, *args):
        try:
            call(*args)
        except OSError as error:
            return errno.errorcode[error.errno]
    reader, writer = args
    fresh = os.open("/dev/null", os.O_RDONLY)
    numbers = [attempt(os.read, reader, 1), attempt(os.write, writer, b"x"), fresh in args]
    os.close(reader)   # as the end of a Python object that owns it would
    numbers
    """
    reader, writer = os.pipe()
    try:
        os.write(writer, b"for the host")
        worker = th.spawn(_source(code), reader, writer, backend="fork")
        assert worker.result(timeout=PATIENCE) == ["EBADF", "EBADF", False]
        assert os.read(reader, 100) == b"for the host"
    finally:
        os.close(reader)
        os.close(writer)


def test_a_pipe_of_the_host_reaches_its_end_though_workers_live(process_backend: str) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_inheritable(writer, True)  # even so
    try:
        with th.spawn(targets.sleep, backend=process_backend, stdio="pipe") as worker:
            ready(worker)
            os.close(writer)
            try:
                assert os.read(reader, 1) == b""
            except BlockingIOError:
                pytest.fail("the worker holds it open")
    finally:
        os.close(reader)


def test_workers_do_not_have_each_other_s_channels(process_backend: str) -> None:
    """Then the death of the host, or of one of them, would go unnoticed."""
    with together() as spawn:
        workers = [ready(spawn(targets.sleep, backend=process_backend, stdio="pipe")) for _ in range(3)]
        owners: dict[str, list[int]] = {}
        for worker in workers:
            for fd in Path(f"/proc/{worker.pid}/fd").iterdir():
                if (link := os.readlink(fd)).startswith("socket:"):
                    owners.setdefault(link, []).append(worker.id)
        assert owners
        assert all(len(set(ids)) == 1 for ids in owners.values())


# -- signals -------------------------------------------------------------------------------------------------


def masks(pid: int) -> dict[str, set[int]]:
    text = Path(f"/proc/{pid}/status").read_text()
    found = {}
    for name in ("SigBlk", "SigIgn"):
        bits = int(re.findall(rf"^{name}:\s+([0-9a-f]+)$", text, re.MULTILINE)[0], 16)
        found[name] = {number for number in range(1, 65) if bits >> (number - 1) & 1}
    return found


def test_a_worker_begins_with_the_signals_of_a_program(process_backend: str) -> None:
    # Those that Python ignores; and the two that glibc keeps for itself and nobody can set.
    python = {int(signal.SIGPIPE), int(signal.SIGXFSZ), 32, 33}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        worker = th.spawn(targets.sleep, backend=process_backend, stdio="pipe")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with worker:
        ready(worker)
        assert worker.pid is not None
        found = masks(worker.pid)
        assert found["SigBlk"] == set()
        assert found["SigIgn"] <= python


def test_handlers_of_the_host_are_not_the_worker_s(process_backend: str) -> None:
    def handler(number: int, frame: object) -> None:
        raise AssertionError("the host's handler")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        worker = th.spawn(targets.kill_itself, signal.SIGUSR1, backend=process_backend, stdio="null")
        found = worker.wait(timeout=PATIENCE)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (found.kind, found.signal) == ("signalled", signal.SIGUSR1)


def test_python_in_a_forked_worker_knows_the_dispositions_that_it_has() -> None:
    code = th.Source("import signal; [signal.getsignal(n) for n in (10, 15, 17)] == [signal.SIG_DFL] * 3")
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        assert th.spawn(code, backend="fork").result(timeout=PATIENCE) is True
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("target", [targets.spin, targets.sleep, targets.wait_for_event])
def test_ctrl_c_is_noticed_in_a_worker(process_backend: str, target: Any) -> None:
    """CPython leaves the main thread state dangling in a child forked by another thread."""
    with th.spawn(target, backend=process_backend, stdio="pipe") as worker:
        pid = ready(worker).pid
        assert pid is not None
        os.kill(pid, signal.SIGINT)
        assert worker.wait(timeout=PATIENCE).cause == "raised KeyboardInterrupt"


def test_a_worker_can_handle_signals_itself(signalled_backend: str) -> None:
    code = """
    import os, signal, time
    got = []
    signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    while not got: time.sleep(0.001)
    got == [signal.SIGUSR1]
    """
    assert th.spawn(_source(code), backend=signalled_backend).result(timeout=PATIENCE) is True


# -- who dies with whom ----------------------------------------------------------------------------------------

HOST = """
import os, signal, sys, threading, time
import helpers, targets, tractor_host as th
backend, name, where = sys.argv[1:4]
workers = []

def spawn_all():
    for _ in range(3):
        workers.append(helpers.ready(th.spawn(getattr(targets, name), backend=backend, stdio="pipe")))

if where == "thread":
    thread = threading.Thread(target=spawn_all)
    thread.start()
    thread.join()
else:
    spawn_all()
if where == "nested":
    code = "import helpers, targets, tractor_host as th, time\\nwith th.spawn(targets.sleep, backend='fork', stdio='pipe') as w:\\n    helpers.ready(w); print('child', w.pid, flush=True); time.sleep(1000)"
    middle = th.spawn(th.Source(code), backend=backend, stdio="pipe")
    helpers.ready(middle, "child")
    print(middle.pid, *helpers.children_of(middle))
print(*[worker.pid for worker in workers], "ready", flush=True)
time.sleep(0.2)
assert all(worker.state == "running" for worker in workers), "they die with the host, not with a thread"
print("alive", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("where", ["main", "thread", "nested"])
@pytest.mark.parametrize("name", ["sleep", "spin", "ignore_signals"])
def test_workers_are_gone_within_a_second_of_their_host(
    process_backend: str, name: str, where: str, program: Callable[..., Program]
) -> None:
    if (process_backend, name) == ("subint_forkserver", "ignore_signals"):
        name = "block_signals"  # a subinterpreter can't set handlers
    process = program(HOST).start(process_backend, name, where, env=importable())
    with process:
        assert process.stdout is not None
        pids: list[int] = []
        for line in process.stdout:
            pids += [int(word) for word in line.split() if word.isdigit()]
            if line == "alive\n":
                break
        assert len(pids) == (5 if where == "nested" else 3), process.stderr and process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [pid_is_gone(pid, timeout=1.0) for pid in pids] == [True] * len(pids)


def test_a_worker_that_is_killed_takes_its_own_workers_along(process_backend: str) -> None:
    code = """
    import helpers, targets, time, tractor_host as th
    with th.spawn(targets.ignore_signals, backend="fork", stdio="pipe") as inner:
        helpers.ready(inner)
        print("child", inner.pid, flush=True)
        time.sleep(1000)
    """
    worker = th.spawn(_source(code), backend=process_backend, stdio="pipe")
    ready(worker, "child")
    (inner,) = children_of(worker)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.wait(timeout=PATIENCE).kind == "signalled"
    assert pid_is_gone(inner, timeout=1.0)


def test_a_worker_that_is_stopped_does_not_outlive_its_host(
    process_backend: str, program: Callable[..., Program]
) -> None:
    process = program(HOST).start(process_backend, "sleep", "main", env=importable())
    with process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split() if word.isdigit()]
        assert process.stdout.readline() == "alive\n"
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [pid_is_gone(pid, timeout=1.0) for pid in pids] == [True] * 3


def test_the_worker_s_channel_is_not_left_to_what_it_starts(process_backend: str) -> None:
    """Or else the host would not see its end, and what it started would hear of the host's."""
    code = th.Source(
        "import subprocess; subprocess.run(['ls', '-l', '/proc/self/fd'], capture_output=True, text=True).stdout"
    )
    listing = th.spawn(code, backend=process_backend, stdio="null").result(timeout=PATIENCE)
    assert "socket:" not in listing
    assert "memfd" not in listing


def _source(code: str) -> th.Source:
    return th.Source(textwrap.dedent(code))
