"""Waiting for what workers do, by looking at it: no test sleeps for a time and hopes."""

from __future__ import annotations

import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tractor_host as th
from tractor_host import _native

#: Longer than anything takes; as conftest's, which programs can't import without pytest.
PATIENCE = 30.0


def importable() -> dict[str, str]:
    """An environment in which programs can import what the tests can."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}


def resources() -> dict[str, Any]:
    """What this process owns, but for the fork server and its blanks; its fds by what they are."""
    stays = _native.fork_server_owns()
    found = _native.resources()
    fds = {}
    for fd in found["fds"]:
        with suppress(OSError):  # the one that was used to look
            if fd not in stays["fds"]:
                fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
    children = [pid for pid in found["children"] if pid not in stays["processes"]]
    return {**found, "fds": fds, "children": children}


def blanks() -> list[int]:
    """The pids of the idle processes that the fork server keeps ready, once it has made all that it was asked for."""
    return _native.fork_server_owns()["processes"][1:]


@contextmanager
def keeping(count: int, modules: Iterable[str] = ()) -> Iterator[None]:
    """Has a new fork server that keeps so many blanks ready."""
    th.preload(modules, blanks=count)
    try:
        yield
    finally:
        th.preload([])


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """This process has no number for another descriptor meanwhile."""
    top = os.open("/dev/null", os.O_RDONLY)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1, limits[1]))
    taken = [top]
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(top))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)


def settled() -> None:
    """Waits until this process's descriptors have stayed the same for a while: what tests before this one have
    started may still be being made (a blank), or be on its way out."""
    seen: list[list[str]] = []

    def is_settled() -> bool:
        seen.append(sorted(os.listdir("/proc/self/fd")))
        return len(seen) > 20 and all(look == seen[-1] for look in seen[-20:])

    until(is_settled, "descriptors that stay as they are")


def until_same(look: Callable[[], Any], before: Any) -> Any:
    """Waits until `look()` is as it was."""
    deadline = time.monotonic() + PATIENCE
    while (now := look()) != before:
        assert time.monotonic() < deadline, f"left behind: {before} has become {now}"
        time.sleep(0.002)
    return now


def until(condition: Callable[[], Any], what: str = "it", timeout: float = PATIENCE) -> Any:
    """Waits until `condition()` is true and returns its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come about within {timeout} s"
        time.sleep(0.002)
    return value


def ready(worker: th.Worker, text: str = "ready") -> th.Worker:
    """Waits until a worker with stdio="pipe" has written `text`; fails at once when it ends before."""

    def seen() -> bool:
        ended = worker.exit
        # What it writes can be seen before the supervisor has heard that it has started.
        if text.encode() in worker.stdout and worker.state != "booting":
            return True
        assert ended is None, f"ended before it was {text}: {ended}\n{worker.stderr.decode()}"
        return False

    until(seen, f"{text!r} of {worker}")
    return worker


def stuck_for_a_while(**options: Any) -> th.Worker:
    """A worker that is in C code which has given up the GIL: nothing can interrupt that, and it comes to its end
    by itself after longer than the ladder waits."""
    code = "import hashlib; print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 3_000_000)"
    options = {"backend": "subint", "stdio": "pipe", "cancel_timeout": 0, "kill_timeout": 0.05, **options}
    worker = ready(th.spawn(th.Source(code), **options))

    def used() -> int:
        return int((thread_of(worker) / "schedstat").read_text().split()[0])

    # It is in there once it has worked for a while, in ns.
    begun = used()
    until(lambda: used() > begun + 50_000_000, "the C code")
    return worker


def children_of(worker: th.Worker) -> list[int]:
    """The pids that it has written as `child PID`."""
    return [int(pid) for pid in re.findall(rb"^child (\d+)$", worker.stdout, re.MULTILINE)]


def descendants(pid: int) -> list[int]:
    """The processes below one, the nearest first."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found + [below for child in found for below in descendants(child)]


def thread_names(pid: int | str = "self") -> list[str]:
    """The names of a process's threads."""
    names = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text().strip())
    return names


def thread_of(worker: th.Worker) -> Path:
    """The /proc folder of the thread that a worker's target runs on."""
    if worker.pid is not None:
        return Path(f"/proc/{worker.pid}/task/{worker.pid}")
    return thread_named(f"th:{worker.name}"[:15])


def thread_named(name: str, pid: int | str = "self") -> Path:
    """The /proc folder of a process's thread."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            if (task / "comm").read_text().rstrip("\n") == name:
                return task
        except OSError:  # it ended just now
            continue
    raise AssertionError(f"there is no thread {name!r}")


def blocked(task: Path, *, samples: int = 4) -> None:
    """Waits until a thread sleeps in the kernel for good: it is not scheduled for a while.

    A thread that waits for the GIL is woken every 5 ms.
    """
    switches: list[str] = []

    def quiet() -> bool:
        status = (task / "status").read_text()
        state = re.findall(r"^State:\t(.)|^(?:non)?voluntary_ctxt_switches:\t(\d+)", status, re.MULTILINE)
        now = repr(state)
        if "'S'" not in now or (switches and switches[-1] != now):
            switches.clear()
        switches.append(now)
        time.sleep(0.01)
        return len(switches) > samples

    until(quiet, f"a blocked {task}")


@contextmanager
def together() -> Iterator[Callable[..., th.Worker]]:
    """Gives a `spawn` whose workers are all killed at the same time at the end, however it comes."""
    workers: list[th.Worker] = []

    def spawn(*args: Any, **options: Any) -> th.Worker:
        workers.append(th.spawn(*args, **options))
        return workers[-1]

    try:
        yield spawn
    finally:
        kill_all(workers)


def kill_all(workers: Iterable[th.Worker]) -> list[th.Exit]:
    """Kills all at once: `kill` waits, so it is called on a thread for each."""
    workers = list(workers)
    threads = [threading.Thread(target=worker.kill) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [worker.wait(timeout=PATIENCE) for worker in workers]
