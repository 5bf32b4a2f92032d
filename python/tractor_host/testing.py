"""Workers that misbehave, for tests and measurements: the shapes of stuck code, by name.

>>> import tractor_host as th
>>> worker = th.spawn("tractor_host.testing:stuck", "spin", backend="subint", stdio="pipe")
>>> worker.kill().kind in ("cancelled", "killed")
True
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from io import FileIO

    from tractor_host._worker import Worker

Variant = Literal["plain", "except-all", "threads"]

#: How a shape is run: as it is; in a loop that catches everything; with two more threads that do the same.
VARIANTS: Final[tuple[Variant, ...]] = ("plain", "except-all", "threads")


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """One way of being stuck.

    Attributes:
        make: Makes what it takes, and returns the function that gets stuck with it.
        hogs_gil: It is C code that keeps the GIL and never checks for anything.
        never_returns: It is C code that gave the GIL up and does not come back.
        announces: Its function prints `ready` by itself, once it has made what only that can make.
        variants: How it can be run.
    """

    make: Callable[[], Callable[[], object]]
    hogs_gil: bool = False
    never_returns: bool = False
    announces: bool = False
    variants: tuple[Variant, ...] = VARIANTS

    @property
    def can_be_ended(self) -> bool:
        """Whether a thread that is stuck in it can be ended without the process."""
        return not (self.hogs_gil or self.never_returns)


def stuck(name: str, variant: Variant = "plain") -> None:
    """Gets stuck in the named shape, once it has made what it needs and printed `ready` to stdout."""
    shape = SHAPES[name]
    block = shape.make()
    if variant == "threads":
        import threading

        for daemon in (True, False):
            threading.Thread(target=shape.make(), daemon=daemon).start()
    if not shape.announces:
        print("ready", flush=True)
    if variant == "except-all":
        while True:
            try:
                block()
            except BaseException:
                continue
    block()


def wait_ready(worker: Worker, timeout: float = 30.0) -> None:
    """Waits until a worker that collects its stdout (`stdio="pipe"`) has printed `ready`.

    Raises:
        TimeoutError: It has not within `timeout` seconds, or it has ended.
    """
    deadline = time.monotonic() + timeout
    while b"ready" not in worker.stdout:
        if time.monotonic() > deadline or worker.exit is not None:
            raise TimeoutError(f"{worker!r} is not ready")
        time.sleep(0.0005)


# -- code that runs ----------------------------------------------------------------------------------


def _spin() -> None:
    while True:
        pass


def _swallow() -> None:
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue


def _finally_loop() -> None:
    try:
        _spin()
    finally:
        _spin()


def _untraced() -> None:
    while True:
        try:
            while True:
                sys.settrace(None)
        except BaseException:
            continue


# -- code that waits ---------------------------------------------------------------------------------


def _sleep() -> None:
    time.sleep(1e6)


def _make_sleep_without_signals() -> Callable[[], object]:
    import signal
    import warnings

    def block() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 32 and 33 are not for everybody
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        time.sleep(1e6)

    return block


def _make_event() -> Callable[[], object]:
    import threading

    return threading.Event().wait


def _make_condition() -> Callable[[], object]:
    import threading

    condition = threading.Condition()

    def block() -> None:
        with condition:
            condition.wait()

    return block


def _make_semaphore() -> Callable[[], object]:
    import threading

    return threading.Semaphore(0).acquire


def _make_barrier() -> Callable[[], object]:
    import threading

    # Never the last one, also when others of the same shape wait.
    return threading.Barrier(100).wait


def _make_queue() -> Callable[[], object]:
    import queue

    return queue.Queue[None]().get


def _make_simple_queue() -> Callable[[], object]:
    import queue

    return queue.SimpleQueue[None]().get


def _make_timed_wait() -> Callable[[], object]:
    import threading

    event = threading.Event()

    def block() -> None:
        while True:
            event.wait(1.0)

    return block


def _make_lock_twice() -> Callable[[], object]:
    import threading

    lock = threading.Lock()
    lock.acquire()
    return lock.acquire


def _make_lock_cycle() -> Callable[[], object]:
    import threading

    first, second, both = threading.Lock(), threading.Lock(), threading.Barrier(2)

    def take(one: threading.Lock, other: threading.Lock) -> None:
        with one:
            both.wait()
            with other:
                pass

    threading.Thread(target=take, args=(second, first)).start()
    return lambda: take(first, second)


def _make_join() -> Callable[[], object]:
    import threading

    thread = threading.Thread(target=_spin)
    thread.start()
    return thread.join


def _make_ten_threads() -> Callable[[], object]:
    import threading

    shapes = (_spin, _swallow, _sleep, _make_event(), _make_recv())
    for index in range(10):
        threading.Thread(target=shapes[index % 5], daemon=index % 2 == 0).start()
    return _spin


def _make_recv() -> Callable[[], object]:
    import socket

    ours, theirs = socket.socketpair()
    # The other end lives as long as the function does.
    return lambda: (ours.recv(1), theirs)


def _make_accept() -> Callable[[], object]:
    import socket

    return socket.create_server(("127.0.0.1", 0)).accept


def _make_select() -> Callable[[], object]:
    import select
    import socket

    ours, theirs = socket.socketpair()
    return lambda: (select.select([ours], [], []), theirs)


def _make_poll() -> Callable[[], object]:
    import select
    import socket

    ours, theirs = socket.socketpair()
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    return lambda: (poll.poll(), ours, theirs)


def _make_epoll() -> Callable[[], object]:
    import select
    import socket

    ours, theirs = socket.socketpair()
    poll = select.epoll()
    poll.register(ours, select.EPOLLIN)
    return lambda: (poll.poll(), ours, theirs)


def _pipe() -> tuple[FileIO, FileIO]:
    import os
    from io import FileIO

    reading, writing = os.pipe()
    return FileIO(reading, "rb"), FileIO(writing, "wb")


def _make_pipe_read() -> Callable[[], object]:
    import os

    reading, writing = _pipe()
    return lambda: (os.read(reading.fileno(), 1), writing)


def _make_pipe_write() -> Callable[[], object]:
    import os

    reading, writing = _pipe()

    def block(keep: object = reading) -> None:
        while True:
            os.write(writing.fileno(), b"x" * (1 << 20))

    return block


def _make_subprocess() -> Callable[[], object]:
    import subprocess

    return subprocess.Popen(["sleep", "1000"]).wait


def _make_waitpid() -> Callable[[], object]:
    import os
    import subprocess

    child = subprocess.Popen(["sleep", "1000"])
    return lambda: (os.waitpid(child.pid, 0), child)


# -- event loops -------------------------------------------------------------------------------------


def _make_trio_forever() -> Callable[[], object]:
    import trio

    async def main() -> None:
        print("ready", flush=True)
        await trio.sleep_forever()

    return lambda: trio.run(main)


def _make_trio_shielded() -> Callable[[], object]:
    import trio

    async def main() -> None:
        print("ready", flush=True)
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()

    return lambda: trio.run(main)


def _make_asyncio_swallow() -> Callable[[], object]:
    import asyncio

    async def main() -> None:
        print("ready", flush=True)
        while True:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                continue

    return lambda: asyncio.run(main())


# -- the end of an interpreter -----------------------------------------------------------------------


class _Clinging:
    """Does not want to go."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run

    def __del__(self) -> None:
        self.run()


_kept: list[Any] = []


def _finaliser_loop() -> None:
    _kept.append(_Clinging(_spin))


def _finaliser_sleep() -> None:
    _kept.append(_Clinging(_sleep))


def _atexit_loop() -> None:
    import atexit

    atexit.register(_spin)


# -- code in C ---------------------------------------------------------------------------------------


def _hog_sum() -> None:
    sum(range(10**12))


def _hog_regex() -> None:
    import re

    re.match("(a*)*b", "a" * 64)


def _c_without_gil() -> None:
    import hashlib

    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)


#: All shapes by name.
SHAPES: Final[dict[str, Shape]] = {
    "spin": Shape(lambda: _spin),
    "swallow": Shape(lambda: _swallow),
    "finally-loop": Shape(lambda: _finally_loop),
    "untraced": Shape(lambda: _untraced),
    "sleep": Shape(lambda: _sleep),
    "sleep-without-signals": Shape(_make_sleep_without_signals),
    "event": Shape(_make_event),
    "condition": Shape(_make_condition),
    "semaphore": Shape(_make_semaphore),
    "barrier": Shape(_make_barrier),
    "queue": Shape(_make_queue),
    "simple-queue": Shape(_make_simple_queue),
    "timed-wait": Shape(_make_timed_wait),
    "lock-twice": Shape(_make_lock_twice),
    "lock-cycle": Shape(_make_lock_cycle),
    "join": Shape(_make_join),
    "ten-threads": Shape(_make_ten_threads),
    "recv": Shape(_make_recv),
    "accept": Shape(_make_accept),
    "select": Shape(_make_select),
    "poll": Shape(_make_poll),
    "epoll": Shape(_make_epoll),
    "pipe-read": Shape(_make_pipe_read),
    "pipe-write": Shape(_make_pipe_write),
    "subprocess": Shape(_make_subprocess),
    "waitpid": Shape(_make_waitpid),
    # An event loop runs in one thread of an interpreter only.
    "trio-forever": Shape(_make_trio_forever, announces=True, variants=("plain", "except-all")),
    "trio-shielded": Shape(_make_trio_shielded, announces=True, variants=("plain", "except-all")),
    "asyncio-swallow": Shape(_make_asyncio_swallow, announces=True, variants=("plain", "except-all")),
    "finaliser-loop": Shape(lambda: _finaliser_loop, variants=("plain",)),
    "finaliser-sleep": Shape(lambda: _finaliser_sleep, variants=("plain",)),
    "atexit-loop": Shape(lambda: _atexit_loop, variants=("plain",)),
    "hog-sum": Shape(lambda: _hog_sum, hogs_gil=True, variants=("plain",)),
    "hog-regex": Shape(lambda: _hog_regex, hogs_gil=True, variants=("plain",)),
    "c-without-gil": Shape(lambda: _c_without_gil, never_returns=True, variants=("plain",)),
}
