"""Workers that count what they do, where their host sees it: in a file that both have mapped."""

from __future__ import annotations

import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from helpers import PATIENCE

#: How many counters a file has.
SLOTS = 64
_FORM = struct.Struct("=q")


class Counters:
    """The counters of a file, which need not be there yet."""

    def __init__(self, path: str) -> None:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb+") as file:
            file.truncate(SLOTS * _FORM.size)
            self._map = mmap.mmap(file.fileno(), SLOTS * _FORM.size)

    def __enter__(self) -> Counters:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._map.close()

    def __getitem__(self, slot: int) -> int:
        return int(_FORM.unpack_from(self._map, slot * _FORM.size)[0])

    def up(self, slot: int) -> None:
        _FORM.pack_into(self._map, slot * _FORM.size, self[slot] + 1)

    def all(self, count: int) -> list[int]:
        return [self[slot] for slot in range(count)]

    def stand_still(self, count: int = 1) -> None:
        """Waits until none of the first `count` has changed for a while."""
        deadline = time.monotonic() + PATIENCE
        since, before = time.monotonic(), self.all(count)
        while time.monotonic() - since < 0.15:
            assert time.monotonic() < deadline, "they count on"
            time.sleep(0.01)
            if (now := self.all(count)) != before:
                since, before = time.monotonic(), now

    def go_on(self, count: int = 1) -> None:
        """Waits until each of the first `count` has changed."""
        deadline = time.monotonic() + PATIENCE
        before = self.all(count)
        while any(now == was for now, was in zip(self.all(count), before, strict=True)):
            assert time.monotonic() < deadline, f"they do not count on: {before}"
            time.sleep(0.01)


# -- what workers run ------------------------------------------------------------------------------------


def count(path: str, slot: int = 0) -> None:
    counters = Counters(path)
    while True:
        counters.up(slot)


def count_in_threads(path: str, threads: int) -> None:
    counters = Counters(path)

    def loop(slot: int) -> None:
        while True:
            counters.up(slot)

    for slot in range(1, threads):
        threading.Thread(target=loop, args=(slot,), daemon=True).start()
    loop(0)


def count_and_sleep(path: str) -> None:
    """Blocked in a system call nearly always."""
    counters = Counters(path)
    while True:
        counters.up(0)
        time.sleep(0.005)


def count_under_a_lock(path: str) -> None:
    """Two threads that wait for each other."""
    counters, lock = Counters(path), threading.Lock()

    def loop(slot: int) -> None:
        while True:
            with lock:
                counters.up(slot)

    threading.Thread(target=loop, args=(1,), daemon=True).start()
    loop(0)


async def count_in_a_loop(path: str) -> None:
    import sniffio

    counters = Counters(path)
    if sniffio.current_async_library() == "trio":
        import trio

        sleep: Callable[[float], object] = trio.sleep
    else:
        import asyncio

        sleep = asyncio.sleep
    while True:
        counters.up(0)
        await sleep(0.001)  # type: ignore[misc]


def count_and_resist(path: str) -> None:
    counters = Counters(path)
    while True:
        try:
            while True:
                counters.up(0)
        except BaseException:
            counters.up(1)


def count_with_a_child(path: str, backend: str) -> None:
    """Counts, and has a worker that counts."""
    import tractor_host as th

    with th.spawn(count, path, 1, backend=backend):
        count(path)


def count_with_a_grandchild(path: str) -> None:
    """Counts, and has started a process that does."""
    import subprocess

    code = f"import sys; sys.path[:] = {sys.path!r}; import counting; counting.count({path!r}, 1)"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        count(path)
    finally:
        process.kill()
        process.wait()


def pause_another(path: str) -> None:
    """Has a worker of its own stand still, and says so."""
    import tractor_host as th

    counters = Counters(path)
    with th.spawn(count, path, 1, backend="subint") as other:
        while not counters[1]:
            time.sleep(0.001)
        other.pause()
        counters.up(2)
        while not counters[3]:
            time.sleep(0.001)
        other.resume()
        count(path)


def path_of(folder: Path) -> str:
    return str(folder / "counters")
