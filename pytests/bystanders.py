"""Innocent work that runs in subinterpreters beside others that are killed: it counts what it does, and
any error that it sees is the test's failure."""

from __future__ import annotations

import time
from collections.abc import Callable


def work(kind: str, seconds: float) -> int:
    """Does one kind of work over and over; returns how often. Raises what went wrong."""
    deadline = time.monotonic() + seconds
    print("ready", flush=True)
    if kind in ("trio", "asyncio"):
        return _LOOPS[kind](deadline)
    step = _STEPS[kind]()
    count = 0
    while time.monotonic() < deadline:
        step()
        count += 1
    return count


def _sleeps() -> Callable[[], None]:
    def step() -> None:
        before = time.monotonic()
        time.sleep(0.003)
        assert time.monotonic() - before >= 0.003, "a sleep was cut short"

    return step


def _sockets() -> Callable[[], None]:
    import socket
    import threading

    ours, theirs = socket.socketpair()

    def echo() -> None:
        while data := theirs.recv(16):
            theirs.sendall(data)

    threading.Thread(target=echo, daemon=True).start()

    def step() -> None:
        ours.sendall(b"0123456789abcdef")
        assert ours.recv(16, socket.MSG_WAITALL) == b"0123456789abcdef"

    return step


def _pipes() -> Callable[[], None]:
    import os
    import threading
    from io import FileIO

    # Owned by objects: what an interpreter holds by number alone outlives it.
    there, back = ([FileIO(fd, mode) for fd, mode in zip(os.pipe(), "rw", strict=True)] for _ in range(2))

    def echo() -> None:
        while data := os.read(there[0].fileno(), 1):
            os.write(back[1].fileno(), data)

    threading.Thread(target=echo, daemon=True).start()

    def step() -> None:
        assert os.write(there[1].fileno(), b"x") == 1
        assert os.read(back[0].fileno(), 1) == b"x"

    return step


def _locks() -> Callable[[], None]:
    import threading

    first, second = threading.Semaphore(0), threading.Semaphore(0)

    def other() -> None:
        while True:
            assert first.acquire(), "an untimed lock was not acquired"
            second.release()

    threading.Thread(target=other, daemon=True).start()

    def step() -> None:
        first.release()
        assert second.acquire(), "an untimed lock was not acquired"

    return step


def _timed_locks() -> Callable[[], None]:
    import threading

    event = threading.Event()

    def step() -> None:
        before = time.monotonic()
        assert not event.wait(0.005)
        assert time.monotonic() - before >= 0.005, "a timed wait was cut short"

    return step


def _subprocesses() -> Callable[[], None]:
    import subprocess

    def step() -> None:
        ran = subprocess.run(["true"], check=True, capture_output=True)
        assert (ran.returncode, ran.stdout) == (0, b"")

    return step


def _trio(deadline: float) -> int:
    import trio

    async def main() -> int:
        count = 0
        while time.monotonic() < deadline:
            with trio.move_on_after(0.002):
                await trio.sleep_forever()
            assert await trio.to_thread.run_sync(len, "four") == 4
            count += 1
        return count

    return trio.run(main)


def _asyncio(deadline: float) -> int:
    import asyncio

    async def main() -> int:
        count = 0
        while time.monotonic() < deadline:
            await asyncio.sleep(0.002)
            assert await asyncio.to_thread(len, "four") == 4
            count += 1
        return count

    return asyncio.run(main())


_STEPS = {
    "sleeps": _sleeps,
    "sockets": _sockets,
    "pipes": _pipes,
    "locks": _locks,
    "timed locks": _timed_locks,
    "subprocesses": _subprocesses,
}
_LOOPS = {"trio": _trio, "asyncio": _asyncio}
KINDS = (*_STEPS, *_LOOPS)
