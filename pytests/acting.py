"""What the actors of the tests do."""

from __future__ import annotations

import contextvars
import enum
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import anyio

import tractor_host as th


async def add(a: float, b: float) -> float:
    await anyio.lowlevel.checkpoint()
    return a + b


def multiply(a: int, b: int) -> int:
    return a * b


async def who() -> th.Actor:
    return th.current_actor()


def who_in_sync() -> th.Actor:
    return th.current_actor()


async def fail(text: str = "on purpose") -> NoReturn:
    raise ValueError(text)


def fail_in_sync(text: str = "on purpose") -> NoReturn:
    raise ValueError(text)


async def exit_with(code: int) -> NoReturn:
    sys.exit(code)


async def sleep_forever() -> NoReturn:
    await anyio.sleep_forever()
    raise AssertionError("it went on")


async def tell_and_sleep(path: str) -> None:
    """Says in a file that it runs, and later that it was cancelled."""
    with open(path, "w") as file:
        file.write("running")
    try:
        await anyio.sleep_forever()
    finally:
        with open(path, "a") as file:
            file.write(" cancelled")


async def note(path: str, word: str) -> None:
    """Adds a word to a file when it is cancelled."""
    try:
        await anyio.sleep_forever()
    finally:
        with open(path, "a") as file:
            file.write(word + "\n")


def until_told() -> NoReturn:
    while True:
        th.check_cancelled()
        time.sleep(0.001)


def until_told_but(path: str) -> None:
    """Says in a file whether it was told to stop."""
    try:
        until_told()
    except th.Cancelled:
        with open(path, "w") as file:
            file.write("told")
        raise


async def wait_for_what_was_cancelled() -> NoReturn:
    import asyncio

    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future
    raise AssertionError("it went on")


def until_late() -> NoReturn:
    """Looks at the clock before its loop does."""
    while True:
        th.check_cancelled()


async def does_not_listen() -> NoReturn:
    with anyio.CancelScope(shield=True):
        await anyio.sleep_forever()
    raise AssertionError("it went on")


async def end_slowly(path: str, go: str) -> None:
    """Says in a file that it runs; when it is cancelled, ends once there is the other file."""
    open(path, "w").close()
    try:
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            while not os.path.exists(go):
                await anyio.sleep(0.001)


async def stream_and_end_slowly(stream: th.Stream, path: str, go: str) -> None:
    await end_slowly(path, go)


async def blocks() -> NoReturn:
    while True:
        try:
            time.sleep(3600)
        except BaseException:
            continue


async def left() -> float:
    """Seconds until its deadline."""
    return anyio.current_effective_deadline() - anyio.current_time()


def crash() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)
    raise AssertionError("it went on")


def _count_run(path: str) -> int:
    """Marks one more run in a file; how many there have been."""
    with open(path, "a+") as file:
        file.write("x")
        file.seek(0)
        return len(file.read())


async def crash_later(path: str, times: int) -> int:
    """Dies the first so many times; returns how often it was run."""
    count = _count_run(path)
    if count <= times:
        os._exit(7)
    return count


async def fail_first(path: str, times: int) -> int:
    count = _count_run(path)
    if count <= times:
        raise ValueError(f"time {count}")
    return count


class DoesNotPickle:
    def __reduce__(self) -> NoReturn:
        raise TypeError("not me")


class DoesNotUnpickle:
    def __reduce__(self) -> Any:
        return int, ("no number",)


async def give(what: str) -> object:
    return {"pickle": DoesNotPickle, "unpickle": DoesNotUnpickle}[what]()


async def size_of(data: bytes) -> int:
    return len(data)


async def large(count: int) -> bytes:
    return b"x" * count


_calls_here = contextvars.ContextVar("_calls_here", default=0)


def thread_of() -> tuple[int, str, int]:
    """Who carries it out, what it is called, and how many such calls its context knows of."""
    _calls_here.set(_calls_here.get() + 1)
    return threading.get_native_id(), threading.current_thread().name, _calls_here.get()


def thread_beside(others: int) -> tuple[int, str, int]:
    """The same, when so many are being carried out."""
    _beside.append(None)
    while len(_beside) < others:
        th.check_cancelled()
        time.sleep(0.001)
    return thread_of()


_beside: list[None] = []


async def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


async def let_threads_wait(seconds: float) -> None:
    from tractor_host import _aio

    _aio._IDLE = seconds  # type: ignore[misc]


def log(text: str) -> None:
    try:
        raise ValueError("inner")
    except ValueError:
        logging.getLogger("acting.some").warning("said %s", text, exc_info=True)
    logging.getLogger("acting").debug("not this")


class OnlyHere(str):
    """A text of a type that nobody else can unpickle."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _not_there, ()


def _not_there() -> NoReturn:
    raise AttributeError("nowhere but there")


class NoText:
    def __str__(self) -> NoReturn:
        raise ValueError("no text")

    __repr__ = __str__


class Level(enum.IntEnum):
    HIGH = 45


def log_oddly() -> None:
    logger = logging.getLogger("acting.odd")
    logger.log(Level.HIGH, OnlyHere("type"), extra={"tag": OnlyHere("x"), "code": Level.HIGH, "size": 0.5})
    logger.warning("text %s", NoText())
    logger.warning("extra", extra={"odd": NoText()})
    logger.warning(NoText())


async def log_below() -> None:
    async with th.open_nursery(log_level="INFO") as nursery:
        await (await nursery.start_actor("leaf")).run(log, "below")


# -- streams -----------------------------------------------------------------------------------------------


async def count(limit: int) -> AsyncIterator[int]:
    for number in range(limit):
        yield number


async def count_and_fail(limit: int) -> AsyncIterator[int]:
    for number in range(limit):
        yield number
    raise ValueError("after the last one")


async def count_and_tell(path: str) -> AsyncIterator[int]:
    number = 0
    try:
        while True:
            yield number
            number += 1
    finally:
        with open(path, "w") as file:
            file.write("closed")


async def double(stream: th.Stream) -> str:
    async for item in stream:
        await stream.send(2 * item)
    return "all doubled"


async def add_up(stream: th.Stream) -> float:
    return sum([item async for item in stream])


async def talk(stream: th.Stream) -> None:
    """To whoever does not listen any more."""
    while True:
        await stream.send("word")


async def do_not_read(stream: th.Stream) -> None:
    await anyio.sleep_forever()


async def read_slowly(stream: th.Stream, go: str) -> int:
    """Reads nothing before there is such a file."""
    while not os.path.exists(go):
        await anyio.sleep(0.005)
    return len([item async for item in stream])


async def fail_in_the_end(path: str) -> NoReturn:
    """Says in a file that it runs, and fails when it is cancelled."""
    try:
        open(path, "w").close()
        await anyio.sleep_forever()
    finally:
        raise KeyError(os.path.basename(path))


async def count_and_fail_in_the_end() -> AsyncIterator[int]:
    try:
        yield 0
        await anyio.sleep_forever()
    finally:
        raise KeyError("generator")


async def one_with_a_ladder() -> float | None:
    """The budget of one of its own."""
    async with th.open_nursery(ladder={"cancel": 2.0, "sigkill": 1.0}) as nursery:
        return (await (await nursery.start_actor()).run(who)).budget


# -- trees -------------------------------------------------------------------------------------------------


async def tree(backends: list[str], breadth: int, fault: str | None, base: str = "0") -> int:
    """An actor of each level starts `breadth` of the next one; the leaves do as `fault` says. How many there are.

    A directory: they raise when all of them are there.
    """
    if not backends:
        if fault is not None and fault.startswith("/"):
            # Each of them, also where the first one has had it cancelled.
            try:
                open(f"{fault}/{base}", "w").close()
                while len(os.listdir(fault)) < breadth ** base.count("."):
                    await anyio.sleep(0.01)
            finally:
                raise ValueError(f"leaf {base}")
        if fault == "sleep":
            await anyio.sleep_forever()
        if fault == "shield":
            await does_not_listen()
        return 1
    # There is time for all that is to be told.
    cancel_timeout = 30.0 if th.current_actor().budget is None else None
    async with th.open_nursery(backends[0], cancel_timeout=cancel_timeout) as nursery:
        portals = [
            await nursery.using(name=f"n{index}").run_in_actor(
                tree, backends[1:], breadth, fault, f"{base}.{index}"
            )
            for index in range(breadth)
        ]
        return 1 + sum([await portal.result() for portal in portals])


def answer_when_told(told: th.Fd, size: int) -> bytes:
    with told:
        os.read(told.fileno(), 1)
    return bytes(size)
