"""What every test is held to: it leaves nothing behind, and it ends.

The time limit is pytest's own faulthandler timer (see pyproject.toml): a thread in C that dumps all
stacks and ends the run, whatever the GIL is doing.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import targets
import tractor_host as th
from tractor_host import devx
from tractor_host._plugin import tree

#: The backends of this version; a test that takes `backend` runs once for each.
BACKENDS = ("subint", "forkserver", "subint_forkserver", "fork", "exec")
PROCESS_BACKENDS = ("forkserver", "subint_forkserver", "fork", "exec")
#: Those whose workers' code runs in the main interpreter of a process, which hears of signals.
SIGNALLED_BACKENDS = ("forkserver", "fork", "exec")
#: Longer than anything takes on a loaded machine; what waits for less says so.
PATIENCE = 30.0


def pytest_configure() -> None:
    """What is started in the background by a shell, or by nohup, ignores these, and so would every
    program that a test starts."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=PROCESS_BACKENDS)
def process_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=SIGNALLED_BACKENDS)
def signalled_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def owned() -> dict[str, Any]:
    """What this process owns just now that a test could leak."""
    found = devx.resources()
    return {
        # Sockets are numbered.
        "fds": {fd: re.sub(r"^socket:.*", "socket", what) for fd, what in found.fds.items()},
        # Whoever runs `tractor-host ps` meanwhile has this process answer.
        "threads": [name for name in found.threads if name != "th-control"],
        "children": found.children,
        "interpreters": found.interpreters,
        "shm": set(found.shm) - (of_others(found.shm) if found.shm else set()),
        "memory": found.memory,
        "workers": found.workers,
    }


def of_others(names: Iterable[str]) -> set[str]:
    """Those of `/dev/shm` that processes have mapped which are neither this one nor below it."""
    inodes = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            inodes[str(os.stat(f"/dev/shm/{name}").st_ino)] = name
    ours = {os.getpid(), *tree.descendants()}
    found: set[str] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) not in ours:
            with contextlib.suppress(OSError):
                # A semaphore's file had another name when it was mapped.
                maps = (folder / "maps").read_text()
                found |= {inodes[it] for it in re.findall(r" (\d+) +/dev/shm/", maps) if it in inodes}
    return found


@pytest.fixture(scope="session", autouse=True)
def supervisor_is_up() -> None:
    """Its own threads and fds are there before the first test counts any."""
    th.spawn("os:getpid", backend="forkserver").result(timeout=PATIENCE)
    th.spawn("os:getpid", backend="subint_forkserver").result(timeout=PATIENCE)
    th.spawn("os:getpid", backend="fork").result(timeout=PATIENCE)
    th.spawn("os:getpid", backend="subint").result(timeout=PATIENCE)
    th.spawn(targets.spawn_again, ["forkserver"], backend="forkserver").result(timeout=PATIENCE)
    # Loaded lazily by tests otherwise, with an fd or a thread of its own at first use.
    import asyncio  # noqa: F401
    import random

    random.random()
    os.urandom(1)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    # /proc/self/task leaves out a thread now and then while another one ends.
    before = owned()
    for _ in range(100):
        if (again := owned()) == before:
            break
        before = again
    yield
    deadline = time.monotonic() + 10
    while not _same(before, after := owned()):
        if time.monotonic() > deadline:
            break
        gc.collect()
        # A thread is on its way out for a moment after its last word; nothing announces its end.
        time.sleep(0.01)
    else:
        return
    left = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    pytest.fail(f"left behind (before, after): {left}")


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether there is nothing new. Less is no leak: a thread of an earlier test, or the timer that
    watched it, may have been on its way out when this test began.
    """
    # The numbers of interpreters and fds may differ, what there is may not.
    return (
        Counter(after["fds"].values()) <= Counter(before["fds"].values())
        and Counter(after["threads"]) <= Counter(before["threads"])
        and set(after["children"]) <= set(before["children"])
        and len(after["interpreters"]) <= len(before["interpreters"])
        and after["shm"] <= before["shm"]
        and len(after["memory"]) <= len(before["memory"])
        and after["workers"] == before["workers"]
    )


class Running(subprocess.Popen[str]):
    """As a context manager it does not wait for what a failed test has left running."""

    def __exit__(self, exc_type: type[BaseException] | None, *rest: Any) -> None:
        if exc_type is not None and self.poll() is None:
            kill_session(self.pid)
            self.kill()
        super().__exit__(exc_type, *rest)


class Program:
    """A Python program in a process of its own, run as a user would."""

    def __init__(self, path: Path, launcher: str) -> None:
        self.path = path
        self.command = [sys.executable, str(path)]
        if launcher == "tractor-host":
            self.command = [str(Path(sys.executable).with_name("tractor-host")), "run", str(path)]

    def start(self, *args: str, **options: Any) -> Running:
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        # Of its own, so that what it started can be ended with it: that may hold the pipes open.
        options.setdefault("start_new_session", True)
        return Running([*self.command, *args], text=True, **options)

    def run(self, *args: str, timeout: float = PATIENCE, **options: Any) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, **options)
        with process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                kill_session(process.pid)
                out, err = process.communicate()
                pytest.fail(f"no end within {timeout} s\n--- stdout\n{out}\n--- stderr\n{err}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def kill_session(leader: int) -> None:
    """Kills every process of a session, whatever groups they made."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            session = (folder / "stat").read_text().rpartition(")")[2].split()[3]
            if int(session) == leader:
                os.kill(int(folder.name), signal.SIGKILL)


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Program]:
    """Makes a program of source text: `program(text)`, or `program(text, launcher="tractor-host")`."""

    def make(source: str, *, name: str = "program.py", launcher: str = "python") -> Program:
        path = tmp_path / name
        path.write_text(textwrap.dedent(source))
        return Program(path, launcher)

    return make


def pid_is_gone(pid: int, timeout: float = 5.0) -> bool:
    """Waits until a process that is not our child has ended (a zombie has)."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            if " Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except FileNotFoundError, ProcessLookupError:
            return True
        time.sleep(0.005)
    return False


@pytest.fixture(scope="session")
def launcher() -> Path:
    found = shutil.which("tractor-host", path=os.path.dirname(sys.executable))
    assert found, "run `make build` first: there is no tractor-host beside this Python"
    return Path(found)
