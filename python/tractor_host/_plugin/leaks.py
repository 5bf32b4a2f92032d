"""The leak check: fails a test that leaves something behind, and tells what that is and where it was made.

What a fixture of a wider scope has made is the fixture's until that ends. What is made once and stays,
whoever is the first to need it (the supervisor, the fork server, multiprocessing's resource tracker), is
nobody's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, Final

import pytest

from tractor_host import _own, devx
from tractor_host._loaded import loaded
from tractor_host._plugin import tree
from tractor_host._plugin.sites import Sites
from tractor_host._plugin.watch import VARIABLE

#: What can be left behind.
KINDS: Final = ("workers", "processes", "fds", "sockets", "threads", "interpreters", "shm", "temp files")
#: Seconds that things have to be gone: a thread is on its way out for a moment after its last word.
_SETTLE: Final = 5.0
#: As long as only such things are left as nobody else is going to end.
_SETTLE_SOON: Final = 1.0
_END_BY_THEMSELVES: Final = frozenset(("workers", "processes", "threads"))
#: Seconds for the first worker of a backend, which has what stays made.
_WARM_UP: Final = 60.0
#: The threads of the supervisor and of the plugin, which come and go by themselves.
_OURS: Final = re.compile(
    "th-(supervisor|clean|control|clerk|spawn|dump|hang|exit|scheduler|ladder|cancel|channel|guard|trace|interrupt)"
)
#: Threads that wait for work, and end by themselves after a while without any.
_CACHED: Final = re.compile(r"Trio thread \d+")
#: Where what loky's (and joblib's) reusable executor is made of is made; that stays for the whole program.
_BY_LOKY: Final = re.compile(r"/loky/|/joblib/_memmapping_reducer\.py")
#: Of these it counts how many there are of a sort: one that takes the place of another is none more.
_COUNTED: Final = frozenset(("fds", "sockets", "threads", "interpreters"))
#: What the frames of an exception may still refer to.
_HELD_BY_FRAMES: Final = frozenset(("fds", "sockets"))

#: A thing: its kind, and its number or name.
Thing = tuple[str, Any]
#: Things, and of what sort each of them is.
Things = dict[Thing, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Allowed:
    """What may be left behind.

    Attributes:
        kinds: Of the `KINDS`; all of them if empty.
        match: A pattern that is searched for in the text of each.
    """

    kinds: frozenset[str]
    match: re.Pattern[str]

    @classmethod
    def of(cls, kinds: Iterable[str], match: str = "", reason: str = "") -> Allowed:
        """As the marker `allow_leaks` has it.

        Raises:
            ValueError: There is no such kind, or `match` is no pattern.
        """
        named = frozenset(kinds)
        if unknown := named.difference(KINDS):
            raise ValueError(f"unknown kind {min(unknown)!r}; there are {', '.join(map(repr, KINDS))}")
        try:
            return cls(named, re.compile(match))
        except re.PatternError as error:
            raise ValueError(f"match={match!r} is no pattern: {error}") from None

    def has(self, thing: Thing, text: str) -> bool:
        """Whether this thing, which the text tells, may be left behind."""
        return (not self.kinds or thing[0] in self.kinds) and self.match.search(text) is not None


class Leaks:
    """As a plugin: fails each test that leaves something behind."""

    def __init__(self, allowed: list[Allowed], root: Path, run: str) -> None:
        self._allowed = allowed
        self._pid = os.getpid()
        self._run = run
        self._sites = Sites(str(root))
        self._sites.before_spawn = self._warm_up
        self._warm: set[str] = set()
        #: What there was when the test began, and what is not the test's.
        self._before: Things = {}
        self._old_pids: set[str] = set()
        #: What fixtures of a wider scope have made, with the words for it; and of those that have ended.
        self._owned: dict[object, dict[Thing, str]] = {}
        self._disowned: dict[Thing, str] = {}
        self._has_raised = False
        self._processes: dict[int, str] = {}
        self._sites.install()

    def close(self) -> None:
        """Ends the processes that it has told of: nothing outlives the session."""
        self._sites.uninstall()
        for pid, start in self._processes.items():
            if _start_of(pid) == start:
                tree.end_below(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    # -- a test ------------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None, object, object]:
        if self._pid != os.getpid():  # a test's fork that runs on as if it were the session
            return (yield)
        self._sites.clear()
        self._disowned.clear()
        self._has_raised = False
        self._old_pids = set(os.listdir("/proc"))
        self._before = self._look()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        self._has_raised |= call.excinfo is not None  # also where that is expected, or skips it
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        if self._pid != os.getpid():
            return (yield)
        try:
            result = yield
        except BaseException as error:
            if told := self._check(item):
                error.add_note(told)
            raise
        if told := self._check(item):
            pytest.fail(told, pytrace=False)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        if fixturedef.scope == "function" or self._pid != os.getpid():
            return (yield)
        before = self._look()
        try:
            return (yield)
        finally:
            new = self._new(before, self._look())
            mine = {thing: sort for thing, sort in new.items() if thing not in self._before}
            self._before |= mine
            who = f"by the {fixturedef.scope} fixture `{fixturedef.argname}`"
            self._owned[fixturedef] = {thing: who + self._where(thing) for thing in mine}

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        for thing, who in self._owned.pop(fixturedef, {}).items():
            self._before.pop(thing, None)
            self._disowned[thing] = who

    def _warm_up(self, backend: str) -> None:
        """Has what stays made, by the first worker of a backend."""
        if backend in self._warm:
            return
        self._warm.add(backend)
        import tractor_host

        before = self._look()
        tractor_host.spawn("os:getpid", backend=backend).result(timeout=_WARM_UP)
        self._before |= self._new(before, self._look())

    # -- what is left ------------------------------------------------------------------------------------

    def _check(self, item: pytest.Item) -> str:
        """What the test has left behind, once what was on its way out is gone; empty if that is nothing."""
        allowed = [Allowed.of(mark.args, **mark.kwargs) for mark in item.iter_markers("allow_leaks")]
        begun = time.monotonic()
        while left := self._left([*allowed, *self._allowed]):
            alive = any(kind in _END_BY_THEMSELVES for kind, _ in left)
            if time.monotonic() - begun > (_SETTLE if alive else _SETTLE_SOON):
                break
            gc.collect()
            # Nothing announces that a thread has ended.
            time.sleep(0.01)
        for kind, key in left:
            if kind == "processes":
                self._processes[key] = _start_of(key)
        return "left behind: " + "\n  and ".join(left.values()) if left else ""

    def _left(self, allowed: list[Allowed]) -> dict[Thing, str]:
        new = self._new(self._before, self._look())
        if self._has_raised:
            new = {thing: sort for thing, sort in new.items() if thing[0] not in _HELD_BY_FRAMES}
        if workers := [key for kind, key in new if kind == "workers"]:
            # A worker's process, thread, interpreter and descriptors are told by its name.
            pids = {info["pid"] for info in _own.workers() if info["id"] in workers}
            new = {
                thing: sort
                for thing, sort in new.items()
                if not (thing[0] in _COUNTED and not self._where(thing))
                and not (thing[0] == "processes" and thing[1] in pids)
            }
        texts = {}
        for thing in new:
            text = _describe(thing)
            if text and not any(one.has(thing, text) for one in allowed):
                made = self._disowned.get(thing) or self._where(thing)
                if _BY_LOKY.search(made) and _has_reusable_executor():
                    continue
                texts[thing] = f"{text}, made {made.strip()}" if made else text
        return texts

    def _where(self, thing: Thing) -> str:
        """Where a thing was made: ` at …`, or nothing if that is not known."""
        kind, key = thing
        if kind in ("fds", "sockets"):
            target = ""
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{key}")
            found = self._sites.of_fd(key, target)
        elif kind == "threads":
            found = self._sites.of_thread(key)
        elif kind in ("shm", "temp files"):
            found = self._sites.of_file(key)
        else:
            found = self._sites.of(kind, key)
        return f" at {found}" if found else ""

    @staticmethod
    def _new(before: Things, after: Things) -> Things:
        """What is there of `after` and was not before."""
        new = {thing: sort for thing, sort in after.items() if before.get(thing) != sort}
        more = Counter((kind, sort) for (kind, _), sort in after.items())
        more.subtract((kind, sort) for (kind, _), sort in before.items())
        kept = {}
        for (kind, key), sort in reversed(new.items()):
            more[kind, sort] -= 1
            if kind not in _COUNTED or more[kind, sort] >= 0:
                kept[kind, key] = sort
        return kept

    def _look(self) -> Things:
        """What there is just now."""
        found: Things = {}
        now = devx.resources()
        their_fds, their_pids, their_files = _of_multiprocessing()
        for fd, target in now.fds.items():
            if fd not in their_fds and target not in their_files:
                # Those are numbered.
                sort = re.sub(r"^(socket|pipe):.*", r"\1", target)
                found["sockets" if sort == "socket" else "fds", fd] = sort
        for pid in (*now.children, *self._orphans()):
            if pid not in their_pids:
                found["processes", pid] = ""
        for number in now.interpreters:
            found["interpreters", number] = ""
        for info in _own.workers():
            found["workers", info["id"]] = ""
        for path, kind in self._sites.files_left():
            if path not in their_files:
                found[kind, path] = ""
        for task in os.listdir("/proc/self/task"):
            if int(task) in self._sites.of_imports:
                continue
            with (
                contextlib.suppress(OSError),
                open(f"/proc/self/task/{task}/comm") as file,
            ):  # it has just ended
                name = file.read().rstrip("\n")
                if not _OURS.fullmatch(name) and not _CACHED.fullmatch(name):
                    found["threads", int(task)] = name
        return found

    def _orphans(self) -> list[int]:
        """The processes that this run has started and that are below nobody of it any more."""
        new = set(os.listdir("/proc")) - self._old_pids
        found = []
        for name in new:
            if name.isdecimal() and tree.is_marked(name, VARIABLE, self._run) and not _is_below(int(name)):
                found.append(int(name))
        return found


def _is_below(pid: int) -> bool:
    """Whether a process is one of ours by its ancestors, which end with it if it ends meanwhile."""
    mine = os.getpid()
    while pid > 1:
        if pid == mine:
            return True
        try:
            with open(f"/proc/{pid}/stat") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            return True
    return False


def _start_of(pid: int) -> str:
    """When a process began, by which it differs from a later one with its number."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _of_multiprocessing() -> tuple[set[Any], set[Any], set[Any]]:
    """The descriptors, processes and files of what multiprocessing starts once and keeps."""
    fds, pids, files = set(), set(), set()
    if (module := loaded("multiprocessing.resource_tracker")) is not None:
        fds.add(module._resource_tracker._fd)
        pids.add(module._resource_tracker._pid)
    if (module := loaded("multiprocessing.forkserver")) is not None:
        fds.add(module._forkserver._forkserver_alive_fd)
        pids.add(module._forkserver._forkserver_pid)
    if (module := loaded("multiprocessing.heap")) is not None:
        # Its memory has a descriptor of that file, too.
        arenas = [f"/proc/self/fd/{arena.fd}" for arena in module.BufferWrapper._heap._arenas]
        files |= {os.readlink(arena) for arena in arenas if os.path.lexists(arena)}
    if (module := loaded("multiprocessing.process")) is not None:
        files.add(module.current_process()._config.get("tempdir"))
    return fds, pids, files


def _has_reusable_executor() -> bool:
    """Whether loky has one, or joblib's copy of it."""
    names = ("loky.reusable_executor", "joblib.externals.loky.reusable_executor")
    return any(getattr(loaded(name), "_executor", None) is not None for name in names)


def _describe(thing: Thing) -> str:
    """A thing in words; empty if it is gone."""
    kind, key = thing
    if kind == "workers":
        for info in _own.workers():
            if info["id"] == key:
                pid = "" if info["pid"] is None else f", pid {info['pid']}"
                return f"worker `{info['name']}` ({info['backend']}{pid})"
        return ""
    if kind == "processes":
        zombie = ""
        with contextlib.suppress(OSError), open(f"/proc/{key}/stat") as file:
            zombie = ", which has ended and was not waited for" if ") Z " in file.read() else ""
        return tree.describe(key) + zombie
    if kind == "sockets":
        return f"socket fd {key}{_address(key)}"
    if kind == "fds":
        with contextlib.suppress(OSError):
            return f"fd {key} ({os.readlink(f'/proc/self/fd/{key}')})"
        return ""
    if kind == "threads":
        for thread in threading.enumerate():
            if thread.native_id == key:
                return f"{'daemon ' if thread.daemon else ''}thread `{thread.name}`"
        with contextlib.suppress(OSError), open(f"/proc/self/task/{key}/comm") as file:
            return f"thread `{file.read().rstrip()}`, not of Python's"
        return ""
    if kind == "interpreters":
        return f"interpreter {key}"
    return f"{'shm segment' if kind == 'shm' else 'temp file'} {key}"


def _address(fd: int) -> str:
    """Where a socket is bound or connected to."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as copy:
        peer = None
        with contextlib.suppress(OSError):
            peer = copy.getpeername()
        told = [str(address) for address in (copy.getsockname(), peer) if address]
        return f" ({' to '.join([copy.family.name, *told])})"
    return ""
