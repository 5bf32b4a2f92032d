"""Help with code that hangs or leaks: dumps that no capture swallows, and counts of what a block left behind.

    >>> from tractor_host import devx
    >>> with devx.dump_on_hang(30) as path:
    ...     print("quick enough")
    quick enough

`dump_on_hang`, `track_resource_deltas` and `resource_delta_fixture` have the names and the ways of
`tractor.devx`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, final

from tractor_host import _native, _own
from tractor_host._worker import budget

__all__ = ["Resources", "dump_on_hang", "resource_delta_fixture", "resources", "track_resource_deltas"]


@contextlib.contextmanager
def dump_on_hang(seconds: float = 30.0, *, path: str | os.PathLike[str] | None = None) -> Iterator[str]:
    """Writes what every thread of every interpreter is doing, unless the block ends in time.

    The timer needs no GIL: C code that keeps it for ever is shown too, with the line that called it.
    It writes to a file and not to stderr, which pytest captures, and takes it back when a test hangs. The
    block goes on; only the first hang of a block is dumped.

    Args:
        seconds: How long the block may take.
        path: The file, which is emptied at once; by default `tractor-host-hang-PID.dump` among the temporary
            files.

    Yields:
        The absolute path of the file.

    Raises:
        TypeError, ValueError: `seconds` is no number of seconds.
        OSError: The file can't be opened.
    """
    seconds = budget("seconds", seconds)
    if path is None:
        path = os.path.join(tempfile.gettempdir(), f"tractor-host-hang-{os.getpid()}.dump")
    path = os.path.abspath(path)
    number = _native.hang_arm(os.fsencode(path), seconds, None)
    try:
        yield path
    finally:
        _native.hang_disarm(number)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Resources:
    """What a process owns at one moment.

    The fork server and its blanks, which stay, are left out.

    Attributes:
        threads: The names of its threads, those that Python does not know included.
        interpreters: The ids of its interpreters.
        fds: Its open descriptors, and what they are.
        children: The pids of its direct children, zombies included.
        shm: The names of what is in `/dev/shm`, of all processes.
        memory: The files in memory that large values of workers are in, as this process has mapped them.
        workers: The names of its workers that have not ended.
        rss: Its resident memory in bytes.
    """

    threads: tuple[str, ...]
    interpreters: tuple[int, ...]
    fds: dict[int, str]
    children: tuple[int, ...]
    shm: tuple[str, ...]
    memory: tuple[str, ...]
    workers: tuple[str, ...]
    rss: int

    def delta(self, later: Resources) -> str:
        """How many there are, and how many `later`: `threads 2->2, …, rss 20.1->20.3 MiB`."""
        names = ("threads", "interpreters", "fds", "children", "shm", "memory", "workers")
        counts = [f"{name} {len(getattr(self, name))}->{len(getattr(later, name))}" for name in names]
        return ", ".join([*counts, f"rss {self.rss / 2**20:.1f}->{later.rss / 2**20:.1f} MiB"])


def resources() -> Resources:
    """What this process owns just now."""
    import _interpreters

    stays = _own.of_fork_server()
    found = _native.resources()
    fds = {}
    for fd in found["fds"]:
        if fd not in stays["fds"]:
            with contextlib.suppress(OSError):  # another thread has closed it meanwhile
                fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
    with open("/proc/self/maps") as maps:
        memory = tuple(line.rstrip("\n") for line in maps if "/memfd:th-" in line)
    return Resources(
        threads=tuple(found["threads"]),
        interpreters=tuple(sorted(int(entry[0]) for entry in _interpreters.list_all())),
        fds=fds,
        children=tuple(pid for pid in found["children"] if pid not in stays["processes"]),
        shm=tuple(sorted(os.listdir("/dev/shm"))) if os.path.isdir("/dev/shm") else (),
        memory=memory,
        workers=tuple(info["name"] for info in _own.workers()),
        rss=found["resident"],
    )


@contextlib.contextmanager
def track_resource_deltas(
    label: str = "", *, writer: Callable[[str], object] | None = None
) -> Iterator[Resources]:
    """Tells in a line how what this process owns has changed over a block: `LABEL: threads 2->3, …`.

    Where a suite hangs more often the longer it runs, this shows whether something accumulates.

    Args:
        label: What the line begins with.
        writer: Takes the line, without a line end; by default it goes to `sys.stderr`.

    Yields:
        What there was before, to compare with.
    """
    before = resources()
    try:
        yield before
    finally:
        line = f"{label}: {before.delta(resources())}"
        if writer is not None:
            writer(line)
        elif sys.stderr is not None:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def resource_delta_fixture(*, autouse: bool = True, writer: Callable[[str], object] | None = None) -> Any:
    """Makes a pytest fixture that tracks the resources of each test, under the test's name.

    In a `conftest.py`: `track_resources = resource_delta_fixture()`. With `autouse=False` it is for the tests
    that ask for it. Its value is what there was before the test.

    Args:
        autouse: Whether all tests within reach have it.
        writer: As for `track_resource_deltas`.
    """
    import pytest

    @pytest.fixture(autouse=autouse)
    def track_resources(request: pytest.FixtureRequest) -> Iterator[Resources]:
        with track_resource_deltas(request.node.name, writer=writer) as before:
            yield before

    return track_resources
