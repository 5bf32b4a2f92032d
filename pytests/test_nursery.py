"""`open_nursery`: actors, calls and streams, and that a block never ends before they are gone."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import math
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio

import acting
import helpers
import tractor_host as th
from conftest import Program
from helpers import PATIENCE
from tractor_host import _aio, _calls, _logs
from tractor_host._calls import Datagram, Link

pytestmark = pytest.mark.outside

BACKENDS = ("subint", "forkserver", "subint_forkserver", "fork", "exec")
LOOPS = ("trio", "asyncio")
#: What workers would import otherwise, each for itself.
MODULES = ("trio", "anyio._backends._trio", "anyio._backends._asyncio", "tractor_host.nursery")


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> Iterator[None]:
    th.preload(MODULES)
    yield
    th.preload([])


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=LOOPS)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run[T](loop: str, function: Callable[..., Awaitable[T]], *args: Any, patience: float = PATIENCE) -> T:
    """Runs it in such a loop, and finds nothing left of its workers."""

    async def main() -> T:
        with anyio.fail_after(patience):
            return await function(*args)

    value = anyio.run(main, backend=loop)
    assert th.workers() == []
    return value


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions of a group, and of the groups in it."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


# -- calls ----------------------------------------------------------------------------------------------


def test_calls(loop: str, backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend) as nursery:
            portal = await nursery.start_actor("first")
            assert await portal.run(acting.add, 1, b=2) == 3
            assert await portal.run(acting.multiply, 3, 4) == 12
            assert await portal.run(math.factorial, 5) == 120
            found = await portal.run(acting.who)
            assert (found.name, found.path, found.parent) == ("first", ("main", "first"), "main")
            assert (found.backend, found.runtime, found.budget) == (backend, loop, 3.0)
            assert await portal.run(acting.who_in_sync) == found
            assert portal.worker is not None
            assert portal.worker.state == "running"
        assert await portal.result() is None

    run(loop, main)


def test_the_other_loop(loop: str, backend: str) -> None:
    async def main() -> None:
        other = "asyncio" if loop == "trio" else "trio"
        async with th.open_nursery(backend, runtime=other) as nursery:  # type: ignore[arg-type]
            portal = await nursery.start_actor()
            assert (await portal.run(acting.who)).runtime == other
            assert await portal.run(acting.tree, [backend], 2, None) == 3
            async with portal.open_stream(acting.double) as stream:
                await stream.send(4)
                assert await stream.receive() == 8

    run(loop, main)


def test_an_actor_without_a_loop(loop: str, backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend, runtime="sync") as nursery:
            portal = await nursery.start_actor()
            assert (await portal.run(acting.who_in_sync)).runtime == "sync"
            results: list[int] = []

            async def call(number: int) -> None:
                results.append(await portal.run(acting.multiply, number, 2))

            async with anyio.create_task_group() as tasks:
                for number in range(10):
                    tasks.start_soon(call, number)
            assert sorted(results) == list(range(0, 20, 2))
            with pytest.raises(ValueError, match="on purpose"):
                await portal.run(acting.fail_in_sync)
            with pytest.raises(TypeError, match="no event loop"):
                async with portal.open_stream(acting.double):
                    pass
            # It can't be stopped in the middle but by its end.
            with anyio.move_on_after(0.05) as scope:
                await portal.run(time.sleep, 3600)
            assert scope.cancelled_caught
            with pytest.raises(th.WorkerKilled):
                await portal.run(acting.multiply, 1, 1)

    run(loop, main)


def test_many_at_a_time(loop: str) -> None:
    async def main() -> None:
        async with th.open_nursery() as nursery:
            portal = await nursery.start_actor()
            results: dict[int, float] = {}

            async def call(number: int) -> None:
                results[number] = await portal.run(acting.add, number, 0.5)

            async with anyio.create_task_group() as tasks:
                for number in range(500):
                    tasks.start_soon(call, number)
            assert results == {number: number + 0.5 for number in range(500)}

    run(loop, main)


def test_large_arguments_and_results(loop: str, backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend) as nursery:
            portal = await nursery.start_actor()
            for size in (0, 60_000, 70_000, 5_000_000):
                assert await portal.run(acting.size_of, b"x" * size) == size
                assert len(await portal.run(acting.large, size)) == size

    run(loop, main)


def test_descriptors_go_along(loop: str, backend: str) -> None:
    async def main() -> None:
        reading, writing = os.pipe()
        try:
            async with th.open_nursery(backend) as nursery:
                portal = await nursery.start_actor()
                await portal.run(_write_to, th.Fd(writing))
                os.close(writing)
                writing_closed = True
                assert os.read(reading, 100) == b"hello"
                assert os.read(reading, 100) == b""
        finally:
            os.close(reading)
            assert writing_closed

    run(loop, main)


def _write_to(fd: th.Fd) -> None:
    with fd:
        os.write(fd.fileno(), b"hello")


def test_threads_are_used_again(loop: str, runtime: str, backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend, runtime=runtime) as nursery:
            portal = await nursery.start_actor()
            found = [await portal.run(acting.thread_of) for _ in range(10)]
            assert found == [(found[0][0], "call:thread_of", 1)] * 10
            with pytest.raises(ValueError, match="on purpose"):
                await portal.run(acting.fail_in_sync)
            with anyio.move_on_after(0.02) as scope:
                await portal.run(acting.until_told)
            assert scope.cancelled_caught
            # Of what was cancelled the next call there knows nothing.
            assert await portal.run(acting.who_in_sync) == await portal.run(acting.who)
            many: list[tuple[int, str, int]] = []

            async def call() -> None:
                many.append(await portal.run(acting.thread_beside, 5))

            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(call)
            assert len({thread for thread, _, _ in many}) == 5
            assert [rest for _, *rest in many] == [["call:thread_beside", 1]] * 5
            assert found[0][0] in {thread for thread, _, _ in many}
            assert (await portal.run(acting.threads)).count("th-idle") == 5

    # Those that wait for another call keep no actor from leaving.
    begun = time.monotonic()
    run(loop, main)
    assert time.monotonic() - begun < _aio._IDLE


def test_a_thread_that_has_nothing_to_do_leaves(loop: str) -> None:
    async def main() -> None:
        async with th.open_nursery() as nursery:
            portal = await nursery.start_actor()
            await portal.run(acting.let_threads_wait, 0.001)
            for _ in range(50):
                assert (await portal.run(acting.thread_of))[1:] == ("call:thread_of", 1)
            while "th-idle" in await portal.run(acting.threads):
                await anyio.sleep(0.001)

    run(loop, main)


def test_what_a_call_raises_is_its_callers(loop: str, backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend) as nursery:
            portal = await nursery.start_actor()
            for function in (acting.fail, acting.fail_in_sync):
                with pytest.raises(ValueError, match="on purpose") as caught:
                    await portal.run(function)
                assert f"in {function.__name__}" in str(caught.value.__cause__)
            with pytest.raises(RuntimeError, match="left with SystemExit: 3") as left:
                await portal.run(acting.exit_with, 3)
            assert isinstance(left.value.__cause__, SystemExit)
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


@pytest.mark.parametrize(
    ("function", "args", "kind", "text"),
    [
        ("add", (1,), TypeError, "missing 1 required positional argument"),
        ("give", ("pickle",), TypeError, "not me"),
        ("give", ("unpickle",), ValueError, "no number"),
        ("count", (3,), TypeError, "is for open_stream"),
    ],
)
def test_bad_calls_leave_the_actor_alive(
    loop: str, function: str, args: Any, kind: type[Exception], text: str
) -> None:
    async def main() -> None:
        async with th.open_nursery() as nursery:
            portal = await nursery.start_actor()
            with pytest.raises(kind, match=text):
                await portal.run(getattr(acting, function), *args)
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


def test_what_can_not_be_sent_is_refused_here(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cloudpickle", None)

    async def main() -> None:
        async with th.open_nursery() as nursery:
            portal = await nursery.start_actor()
            with pytest.raises(Exception, match="lambda"):
                await portal.run(lambda: 1)
            with pytest.raises(TypeError, match="must be callable, not of type int"):
                await portal.run(3)  # type: ignore[call-overload]
            with pytest.raises(TypeError, match="not me"):
                await portal.run(acting.size_of, acting.DoesNotPickle())  # type: ignore[arg-type]
            with pytest.raises(Exception, match="lambda"):
                await nursery.run_in_actor(lambda: 1)
            assert len(nursery._core.actors) == 1
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


def test_lambdas_go_by_cloudpickle(loop: str) -> None:
    async def main() -> None:
        async with th.open_nursery() as nursery:
            portal = await nursery.start_actor()
            offset = 3
            assert await portal.run(lambda x: x + offset, 4) == 7

    run(loop, main)


# -- cancelling calls ---------------------------------------------------------------------------------------


def test_a_call_is_cancelled_with_its_caller(loop: str, backend: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with th.open_nursery(backend) as nursery:
            portal = await nursery.start_actor()
            path = tmp_path / "async"
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(portal.run, acting.tell_and_sleep, str(path))
                while not path.exists() or path.read_text() != "running":
                    await anyio.sleep(0.001)
                tasks.cancel_scope.cancel()
            assert path.read_text() == "running cancelled"
            path = tmp_path / "sync"
            with anyio.move_on_after(0.05):
                await portal.run(acting.until_told_but, str(path))
            assert path.read_text() == "told"
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


def test_a_deadline_goes_along(loop: str) -> None:
    async def main() -> None:
        async with th.open_nursery() as nursery:
            portal = await nursery.start_actor()
            assert 20 < await portal.run(acting.left) <= PATIENCE
            with anyio.fail_after(20):
                assert 10 < await portal.run(acting.left) <= 20
            with pytest.raises(TimeoutError), anyio.fail_after(0.02):
                await portal.run(acting.sleep_forever)
            with pytest.raises(TimeoutError), anyio.fail_after(0.02):
                await portal.run(acting.until_told)
            with anyio.move_on_after(0) as scope:
                await portal.run(acting.sleep_forever)
            assert scope.cancelled_caught
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


def test_waiting_for_what_was_cancelled_is_an_error_of_the_call(loop: str) -> None:
    async def main() -> None:
        async with th.open_nursery(runtime="asyncio") as nursery:
            portal = await nursery.start_actor()
            with pytest.raises(RuntimeError, match="left with CancelledError"):
                await portal.run(acting.wait_for_what_was_cancelled)
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


def test_what_is_late_and_told_so_is_a_time_out(loop: str) -> None:
    async def main() -> None:
        async with th.open_nursery() as nursery:
            portal = await nursery.start_actor()
            for _ in range(20):
                with pytest.raises(TimeoutError), anyio.fail_after(0.01):
                    await portal.run(acting.until_late)

    run(loop, main)


@pytest.mark.parametrize("function", ["does_not_listen", "blocks"])
def test_a_call_that_does_not_listen_costs_the_actor_its_life(loop: str, backend: str, function: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend, cancel_timeout=0.2) as nursery:
            other = await nursery.start_actor("other")
            portal = await nursery.start_actor("stuck")
            begun = time.monotonic()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(portal.run, getattr(acting, function))
                await anyio.sleep(0.05)
                tasks.cancel_scope.cancel()
            assert time.monotonic() - begun < 10
            with pytest.raises(th.WorkerKilled):
                await portal.run(acting.add, 1, 1)
            assert await other.run(acting.add, 1, 1) == 2

    run(loop, main)


def test_who_did_not_listen_is_not_asked_again(loop: str, backend: str) -> None:
    """The time to listen is over once, not for the call and then for its actor."""

    async def main() -> None:
        async with th.open_nursery(backend, cancel_timeout=0.5) as nursery:
            portal = await nursery.start_actor()
            with anyio.move_on_after(0.05):
                await portal.run(acting.does_not_listen)
            found = await portal.cancel_actor()
        assert found.kind == "killed"
        assert found.rung != "cancel"
        assert found.elapsed is not None
        assert "what it was doing was cancelled and did not end" in found.cause

    begun = time.monotonic()
    run(loop, main)
    assert time.monotonic() - begun > 0.5


@pytest.mark.parametrize("way", ["run", "stream"])
@pytest.mark.parametrize("is_deaf", [False, True])
def test_asyncio_may_cancel_a_call_twice(way: str, is_deaf: bool, tmp_path: Path) -> None:
    """No shield of anyio's holds a `Task.cancel`, and what runs in the actor goes on for a while."""
    path, go = tmp_path / "running", tmp_path / "go"

    async def main() -> None:
        cancel_timeout = 0.2 if is_deaf else PATIENCE
        async with th.open_nursery(cancel_timeout=cancel_timeout) as nursery:
            portal = await nursery.start_actor()
            actor = portal._actor

            async def call() -> None:
                if way == "run":
                    await portal.run(acting.end_slowly, str(path), str(go))
                else:
                    async with portal.open_stream(acting.stream_and_end_slowly, str(path), str(go)) as stream:
                        await stream.receive()

            task = asyncio.create_task(call())
            while not path.exists():
                await asyncio.sleep(0.001)
            (pending,) = actor._calls.values()
            task.cancel()
            while not pending.is_being_stopped:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert list(actor._calls.values()) == [pending]
            if is_deaf:
                await actor._over.wait()
            else:
                go.touch()
                while actor._calls:
                    await asyncio.sleep(0.001)
                assert await portal.run(acting.add, 1, 1) == 2

    run("asyncio", main)


# -- one function ---------------------------------------------------------------------------------------


def test_one_function(loop: str, backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend) as nursery:
            first = await nursery.run_in_actor(acting.add, 1, 2)
            second = await nursery.run_in_actor(acting.multiply, 3, 4)
            third = await nursery.using(name="third").run_in_actor(acting.who_in_sync)
            fourth = await nursery.run_in_actor(acting.add, 1, 2)
            assert (first.name, second.name, third.name) == ("add", "multiply", "third")
            assert await first.result() == 3
        assert await second.result() == 12
        assert await fourth.result() == 3
        found = await third.result()
        assert (found.path, found.runtime) == (("main", "third"), "sync")

    run(loop, main)


def test_its_error_ends_the_nursery(loop: str, backend: str, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "sibling"
        with pytest.raises(ExceptionGroup) as caught:
            async with th.open_nursery(backend) as nursery:
                await nursery.start_actor("idle")
                await nursery.run_in_actor(acting.tell_and_sleep, str(path))
                while not path.exists():
                    await anyio.sleep(0.001)
                await nursery.run_in_actor(acting.fail, "it")
                await anyio.sleep_forever()
        (error,) = caught.value.exceptions
        assert isinstance(error, ValueError)
        assert str(error) == "it"
        assert path.read_text() == "running cancelled"

    run(loop, main)


def test_all_that_have_failed_are_told(loop: str, backend: str, tmp_path: Path) -> None:
    """Those that fail while they are cancelled, too, as in one process."""

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with th.open_nursery(backend, cancel_timeout=PATIENCE) as nursery:
                paths = [tmp_path / "a", tmp_path / "b"]
                portals = [await nursery.run_in_actor(acting.fail_in_the_end, str(path)) for path in paths]
                await nursery.run_in_actor(acting.sleep_forever)
                while not all(path.exists() for path in paths):
                    await anyio.sleep(0.001)
                raise ValueError("mine")
        found = sorted(map(repr, caught.value.exceptions))
        assert found == ["KeyError('a')", "KeyError('b')", "ValueError('mine')"]
        with pytest.raises(KeyError, match="a"):
            await portals[0].result()

    run(loop, main)


def test_what_a_call_raises_when_it_is_cancelled(loop: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with th.open_nursery(cancel_timeout=PATIENCE) as nursery:
            portal = await nursery.start_actor()
            path, scope = tmp_path / "call", anyio.CancelScope()

            async def call() -> None:
                with pytest.raises(KeyError, match="call"), scope:
                    await portal.run(acting.fail_in_the_end, str(path))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call)
                while not path.exists():
                    await anyio.sleep(0.001)
                scope.cancel()
            assert await portal.run(acting.add, 1, 1) == 2
            with pytest.raises(KeyError, match="generator"), anyio.CancelScope() as scope:
                async with portal.open_stream(acting.count_and_fail_in_the_end) as stream:
                    await stream.receive()
                    scope.cancel()
                    await stream.receive()
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


def test_waiting_for_it_does_not_double_the_error(loop: str) -> None:
    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with th.open_nursery() as nursery:
                portal = await nursery.run_in_actor(acting.fail)
                await portal.result()
        assert [type(error) for error in caught.value.exceptions] == [ValueError]
        with pytest.raises(ValueError, match="on purpose"):
            await portal.result()

    run(loop, main)


def test_an_error_of_the_block_cancels_them(loop: str, backend: str, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "there"
        with pytest.raises(ExceptionGroup) as caught:
            async with th.open_nursery(backend) as nursery:
                await nursery.start_actor()
                portal = await nursery.run_in_actor(acting.tell_and_sleep, str(path))
                while not path.exists():
                    await anyio.sleep(0.001)
                raise KeyError("mine")
        assert [type(error) for error in caught.value.exceptions] == [KeyError]
        assert path.read_text() == "running cancelled"
        with pytest.raises(th.WorkerKilled):
            await portal.result()

    run(loop, main)


# -- deaths ------------------------------------------------------------------------------------------------


def test_a_death_fails_its_calls_and_the_nursery(loop: str, process_backend: str) -> None:
    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with th.open_nursery(process_backend) as nursery:
                portal = await nursery.start_actor("victim")
                with pytest.raises(th.WorkerDied, match="SIGKILL") as died:
                    await portal.run(acting.crash)
                assert died.value.exit.signal == signal.SIGKILL
                with pytest.raises(th.WorkerDied):
                    await anyio.sleep_forever()
                    await portal.run(acting.add, 1, 1)
        (error,) = caught.value.exceptions
        assert isinstance(error, th.WorkerDied)
        assert error.exit.signal == signal.SIGKILL

    run(loop, main)


def test_a_death_that_is_told_often_does_not_grow(loop: str) -> None:
    async def main() -> None:
        async with th.open_nursery() as nursery:
            portal = await nursery.run_in_actor(acting.sleep_forever)
            await portal.cancel_actor()
            found: list[list[BaseException]] = [[], []]
            for _ in range(3):
                for told, ask in zip(found, (portal.result, portal.run), strict=True):
                    args = (acting.add, 1, 1) if told is found[1] else ()
                    with pytest.raises(th.WorkerKilled) as caught:
                        await ask(*args)  # type: ignore[operator]
                    told.append(caught.value)
            for told in found:
                depths = [len(list(traceback.walk_tb(error.__traceback__))) for error in told]
                assert depths == depths[:1] * 3
                assert len({id(error) for error in told}) == 3
                assert len({(str(error), error.exit) for error in told}) == 1  # type: ignore[attr-defined]

    run(loop, main)


def test_a_death_that_many_are_told_is_one_error(loop: str) -> None:
    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with th.open_nursery() as nursery:
                portal = await nursery.start_actor()
                async with anyio.create_task_group() as tasks:
                    for _ in range(3):
                        tasks.start_soon(portal.run, acting.sleep_forever)
                    await portal.run(acting.crash)
        assert [type(error) for error in leaves(caught.value)] == [th.WorkerDied]

    run(loop, main)


def test_a_death_is_told_to_who_waits_for_room(loop: str, process_backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(process_backend, restart="always", restart_delay=0) as nursery:
            portal = await nursery.start_actor("victim")
            pid = await portal.run(os.getpid)
            channel = portal._actor._channel
            assert channel is not None
            caught: list[BaseException] = []

            async def call() -> None:
                with pytest.raises(th.WorkerDied, match="SIGKILL") as died:
                    await portal.run(acting.size_of, b"x" * 30_000)
                caught.append(died.value)

            async def send(stream: th.Stream) -> None:
                with pytest.raises(anyio.BrokenResourceError) as broken:
                    await stream.send(b"x" * 30_000)
                caught.append(broken.value)

            with pytest.raises(th.WorkerDied, match="SIGKILL"):
                async with portal.open_stream(acting.do_not_read) as stream:
                    os.kill(pid, signal.SIGSTOP)
                    async with anyio.create_task_group() as tasks:
                        for _ in range(100):
                            tasks.start_soon(call)
                        while not channel._queue:
                            await anyio.lowlevel.checkpoint()
                        tasks.start_soon(send, stream)
                        while not any(sender.kind == _calls.ITEM for sender in channel._queue):
                            await anyio.lowlevel.checkpoint()
                        os.kill(pid, signal.SIGKILL)
            assert len(caught) == 101
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


def test_it_can_be_cancelled_alone(loop: str, backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend) as nursery:
            first = await nursery.start_actor("first")
            second = await nursery.start_actor("second")
            stuck = await nursery.using(cancel_timeout=0.1, name="stuck").run_in_actor(acting.does_not_listen)
            found = await first.cancel_actor()
            assert found.kind == "cancelled"
            assert await first.cancel_actor() == found
            found = await stuck.cancel_actor()
            assert found.kind == "killed"
            with pytest.raises(th.WorkerCancelled):
                await first.run(acting.add, 1, 1)
            with pytest.raises(th.WorkerKilled):
                await stuck.result()
            assert await second.run(acting.add, 1, 1) == 2
            again = await nursery.start_actor("first")
            assert await again.run(acting.add, 1, 1) == 2

    run(loop, main)


def test_the_nursery_can_be_cancelled(loop: str, backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend) as nursery:
            await nursery.start_actor()
            await nursery.run_in_actor(acting.sleep_forever)
            nursery.cancel()
            nursery.cancel()
            await anyio.sleep_forever()

    run(loop, main)


def test_a_portal_that_is_kept_keeps_no_descriptor(loop: str) -> None:
    async def main() -> None:
        # A blank that is still being made has descriptors here.
        helpers.settled()
        before = len(os.listdir("/proc/self/fd"))
        kept = []
        for _ in range(3):
            async with th.open_nursery("fork") as nursery:
                kept.append(await nursery.start_actor())
                nursery.cancel()
            async with th.open_nursery("fork") as nursery:
                kept.append(await nursery.start_actor())
        helpers.settled()
        assert len(os.listdir("/proc/self/fd")) == before
        assert all(portal.worker is None for portal in kept)

    run(loop, main)


def test_cancelling_twice_does_not_hurt(loop: str, backend: str) -> None:
    async def main() -> None:
        with anyio.CancelScope() as outer, anyio.CancelScope() as inner:
            async with th.open_nursery(backend, cancel_timeout=0.3) as nursery:
                await nursery.run_in_actor(acting.does_not_listen)
                portal = await nursery.start_actor()
                assert portal.worker is not None
                inner.cancel()

                def again() -> None:
                    outer.cancel()
                    inner.cancel()
                    nursery.cancel()

                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.05)
                    again()
        assert outer.cancel_called

    run(loop, main)


# -- starting ------------------------------------------------------------------------------------------------


def test_modules_are_imported_first(loop: str, backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend) as nursery:
            portal = await nursery.start_actor(enable_modules=["colorsys"])
            assert await portal.run(eval, "'colorsys' in __import__('sys').modules")
            with pytest.raises(ModuleNotFoundError, match="no_such_module") as caught:
                await nursery.start_actor("second", enable_modules=["no_such_module"])
            assert any("while actor 'second' started" in note for note in caught.value.__notes__)
            assert len(th.workers()) == 1

    run(loop, main)


def test_who_does_not_speak_is_ended(loop: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with th.open_nursery(backend, boot_timeout=0.3) as nursery:
            with pytest.raises(th.BootTimeout, match="'mute' was not ready within 0.3 s"):
                await nursery.start_actor("mute")

    monkeypatch.setattr("tractor_host._actor.serve", _say_nothing)
    run(loop, main)


async def _say_nothing(socket: Any) -> None:
    await anyio.sleep_forever()


def test_who_dies_while_it_starts_is_told_at_once(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with th.open_nursery() as nursery:
            with pytest.raises(th.WorkerDied, match="exit code 7"):
                await nursery.start_actor()

    monkeypatch.setattr("tractor_host._actor.serve", _leave_at_once)
    run(loop, main)


async def _leave_at_once(socket: Any) -> None:
    os._exit(7)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"x",
        b"\xff" * 100,
        bytes([2]) + bytes(23),
        bytes([1, 99]) + bytes(22),
        "unasked",
        "twice",
        "spec",
    ],
    ids=repr,
)
def test_who_says_what_it_should_not_is_ended(loop: str, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with th.open_nursery() as nursery:
            with pytest.raises(th.WorkerDied if said == b"" else th.WorkerKilled) as caught:
                await nursery.start_actor()
            if said:
                assert caught.value.__notes__[0].startswith("It had sent ")

    monkeypatch.setattr("tractor_host._actor.serve", functools.partial(_say, said))
    run(loop, main)


async def _say(said: Any, socket: Any) -> None:
    if isinstance(said, bytes):
        socket.send(said)
        if not said:
            os._exit(1)
    elif said == "twice":
        for _ in range(2):
            Datagram(_calls.READY, 0).send(socket)
            Datagram(_calls.HELLO, 0).send(socket)
    else:
        Datagram({"unasked": _calls.RETURNED, "spec": _calls.SPEC}[said], 5).send(socket)
    await anyio.sleep_forever()


def test_there_is_no_process_to_be_had(loop: str) -> None:
    async def main() -> None:
        async with th.open_nursery("exec") as nursery:
            with helpers.no_descriptor_left(), pytest.raises(OSError, match="Too many open files"):
                await nursery.start_actor()
            portal = await nursery.start_actor()
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


# -- streams -------------------------------------------------------------------------------------------------


def test_a_generators_items_are_streamed(loop: str, backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend) as nursery:
            portal = await nursery.start_actor()
            async with portal.open_stream(acting.count, 1000) as stream:
                assert [item async for item in stream] == list(range(1000))
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()
            with pytest.raises(anyio.ClosedResourceError):
                await stream.receive()

    run(loop, main)


def test_streams_go_both_ways(loop: str, backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend) as nursery:
            portal = await nursery.start_actor()
            async with portal.open_stream(acting.double) as stream:
                for number in range(200):
                    await stream.send(number)
                    assert await stream.receive() == 2 * number
                await stream.send(b"x" * 100_000)
                assert len(await stream.receive()) == 200_000
                await stream.send_eof()
                assert [item async for item in stream] == []
                assert await stream.result() == "all doubled"
                with pytest.raises(anyio.ClosedResourceError):
                    await stream.send(1)
            async with portal.open_stream(acting.add_up) as stream:
                for number in range(1000):
                    await stream.send(number)
                await stream.send_eof()
                assert await stream.result() == 499_500

    run(loop, main)


def test_leaving_early_closes_a_generator(loop: str, backend: str, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "closed"
        async with th.open_nursery(backend) as nursery:
            portal = await nursery.start_actor()
            async with portal.open_stream(acting.count_and_tell, str(path)) as stream:
                async for item in stream:
                    if item == 100:
                        break
            assert path.read_text() == "closed"
            async with portal.open_stream(acting.talk) as stream:
                assert await stream.receive() == "word"
            # What was sent is taken, too.
            async with portal.open_stream(acting.add_up) as stream:
                await stream.send(1)
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


def test_what_a_streams_function_raises(loop: str, backend: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend) as nursery:
            portal = await nursery.start_actor()
            found = []
            with pytest.raises(ValueError, match="after the last one"):
                async with portal.open_stream(acting.count_and_fail, 3) as stream:
                    async for item in stream:
                        found.append(item)
            assert found == [0, 1, 2]
            # Also of one that is left before.
            with pytest.raises(ValueError, match="after the last one"):
                async with portal.open_stream(acting.count_and_fail, 0):
                    await anyio.sleep(0.2)
            with pytest.raises(TypeError, match="is no async function"):
                async with portal.open_stream(acting.multiply, 1, 2) as stream:
                    await stream.receive()
            with pytest.raises(KeyError):
                async with portal.open_stream(acting.do_not_read):
                    raise KeyError
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


def test_who_sends_waits_for_who_receives(loop: str, backend: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with th.open_nursery(backend) as nursery:
            portal = await nursery.start_actor()
            async with portal.open_stream(acting.read_slowly, str(tmp_path / "go")) as stream:
                sent = 0
                with anyio.move_on_after(0.3):
                    while True:
                        await stream.send(sent)
                        sent += 1
                assert sent == 64
                (tmp_path / "go").touch()
                for _ in range(1000):
                    await stream.send(0)
                await stream.send_eof()
                assert await stream.result() == 1064

    run(loop, main)


def test_a_death_ends_a_stream(loop: str) -> None:
    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with th.open_nursery() as nursery:
                portal = await nursery.start_actor()
                async with portal.open_stream(acting.do_not_read) as stream:
                    assert portal.worker is not None
                    assert portal.worker.pid is not None
                    os.kill(portal.worker.pid, signal.SIGKILL)
                    await stream.receive()
        assert [type(error) for error in leaves(caught.value)] == [th.WorkerDied]

    run(loop, main)


# -- trees -------------------------------------------------------------------------------------------------

TREES = [[backend] * 3 for backend in BACKENDS] + [
    ["exec", "subint", "forkserver"],
    ["subint", "fork", "subint_forkserver"],
    ["forkserver", "exec", "subint"],
]


@pytest.mark.parametrize("backends", TREES, ids="-".join)
def test_a_tree(loop: str, backends: list[str]) -> None:
    found = run(loop, acting.tree, backends[:2], 2, None)
    assert found == 7


@pytest.mark.parametrize("backends", TREES, ids="-".join)
def test_errors_at_the_leaves_of_a_tree(loop: str, backends: list[str], tmp_path: Path) -> None:
    """All of them arrive, each once, in a group for each level."""
    with pytest.raises(ExceptionGroup) as caught:
        run(loop, acting.tree, backends, 2, str(tmp_path), patience=2 * PATIENCE)
    assert th.workers() == []

    def texts(error: BaseException, depth: int) -> list[str]:
        if depth == 0:
            assert isinstance(error, ValueError)
            return [str(error)]
        assert isinstance(error, ExceptionGroup)
        return [text for inner in error.exceptions for text in texts(inner, depth - 1)]

    assert sorted(texts(caught.value, len(backends))) == [
        "leaf 0." + ".".join(path) for path in itertools.product("01", repeat=len(backends))
    ]


@pytest.mark.parametrize("backends", TREES, ids="-".join)
def test_a_tree_ends_within_one_budget(loop: str, backends: list[str]) -> None:
    """Also where the leaves do not listen: those above them end in order all the same."""

    async def main() -> None:
        async with th.open_nursery(backends[0]) as nursery:
            portal = await nursery.run_in_actor(acting.tree, backends[1:], 1, "shield", "0")
            while _running() < 3:
                await anyio.sleep(0.005)
            begun = time.monotonic()
            found = await portal.cancel_actor()
            assert time.monotonic() - begun < 3.5
            assert found.kind == "cancelled", found

    def _running() -> int:
        return sum(worker.state == "running" for worker in th.workers())

    run(loop, main)


# -- cancelled at every step -------------------------------------------------------------------------------------


async def _all_of_it(backend: str) -> None:
    """What a nursery can do, in short."""
    async with th.open_nursery(backend) as nursery:
        portal = await nursery.start_actor()
        await portal.run(acting.add, 1, 1)
        async with portal.open_stream(acting.double) as stream:
            await stream.send(1)
            await stream.receive()
        await nursery.run_in_actor(acting.multiply, 1, 1)


class _TrioSteps(trio.abc.Instrument):
    """Cancels a scope at a step of any task."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.steps = 0
        self.scope: anyio.CancelScope | None = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.scope is not None:
            self.steps += 1
            if self.steps == self.at:
                self.scope.cancel()


class _AsyncioSteps(asyncio.SelectorEventLoop):
    """The same."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.steps = 0
        self.scope: anyio.CancelScope | None = None

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        if self.scope is not None:
            self.steps += 1
            if self.steps == self.at:
                scope, self.scope = self.scope, None
                super().call_soon(scope.cancel)
                self.scope = scope
        return super().call_soon(callback, *args, context=context)


def _cancelled_at(loop: str, at: int, backend: str) -> tuple[int, bool]:
    """How many steps there were, and whether it came to be cancelled."""
    made: list[Any] = []

    async def main() -> bool:
        with anyio.fail_after(PATIENCE), anyio.CancelScope() as scope:
            steps = made[0]
            steps.scope = scope
            await _all_of_it(backend)
        steps.scope = None
        return scope.cancelled_caught

    if loop == "trio":
        made.append(_TrioSteps(at))
        caught = trio.run(main, instruments=made)
    else:

        def factory() -> asyncio.AbstractEventLoop:
            made.append(_AsyncioSteps(at))
            return made[0]  # type: ignore[no-any-return]

        caught = asyncio.run(main(), loop_factory=factory)
    return made[0].steps, caught


def test_cancelled_at_every_step(loop: str, backend: str) -> None:
    stride = {"subint": 2, "exec": 3}.get(backend, 1)  # they take their time
    for at in itertools.count(1, stride):
        steps, caught = _cancelled_at(loop, at, backend)
        assert th.workers() == [], at
        if steps < at:
            assert not caught
            assert at > 20
            return


@pytest.mark.outside
@pytest.mark.parametrize("launcher", ["python", "tractor-host"])
def test_ctrl_c_cancels_the_tree_in_order(
    loop: str, backend: str, launcher: str, program: Callable[..., Program], tmp_path: Path
) -> None:
    found = program(
        """
        import sys, anyio
        import tractor_host as th

        def note(word):
            with open(sys.argv[3], "a") as file:
                file.write(word + "\\n")

        async def leaf():
            try:
                print("ready", flush=True)
                await anyio.sleep_forever()
            finally:
                note("leaf")

        async def branch():
            try:
                async with th.open_nursery(sys.argv[2]) as nursery:
                    await nursery.run_in_actor(leaf)
            finally:
                note("branch")

        async def main():
            try:
                async with th.open_nursery(sys.argv[2]) as nursery:
                    await nursery.start_actor("idle")
                    await nursery.run_in_actor(branch)
            finally:
                assert th.workers() == []
                note("main")

        if __name__ == "__main__":
            anyio.run(main, backend=sys.argv[1])
        """,
        launcher=launcher,
    )
    notes = tmp_path / "notes"
    with found.start(loop, backend, str(notes)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT, err
    assert "KeyboardInterrupt" in err
    assert notes.read_text().split() == ["leaf", "branch", "main"]


# -- starting again ----------------------------------------------------------------------------------------------


def test_what_has_died_is_started_again(loop: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with th.open_nursery(restart="on-failure", restart_delay=0.01) as nursery:
            portal = await nursery.run_in_actor(acting.crash_later, str(tmp_path / "a"), 2)
            assert await portal.result() == 3
            portal = await nursery.start_actor("phoenix")
            with pytest.raises(th.WorkerDied):
                await portal.run(acting.crash)
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


def test_what_has_failed_is_started_again(loop: str, backend: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with th.open_nursery(backend, restart="on-failure", restart_delay=0.01) as nursery:
            portal = await nursery.run_in_actor(acting.fail_first, str(tmp_path / "a"), 2)
            assert await portal.result() == 3

    run(loop, main)


def test_it_can_be_cancelled_while_it_waits_to_be_started_again(loop: str) -> None:
    async def main() -> None:
        async with th.open_nursery(restart="on-failure", restart_delay=20) as nursery:
            portal, idle = await nursery.start_actor("one"), await nursery.start_actor("two")
            for victim in (portal, idle):
                with pytest.raises(th.WorkerDied):
                    await victim.run(acting.crash)
            assert (await portal.cancel_actor()).signal == signal.SIGKILL
            # The other one is waited for by nobody.

    run(loop, main)


def test_it_can_be_cancelled_while_it_is_started_again(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with th.open_nursery(restart="always", restart_delay=0) as nursery:
            portal = await nursery.start_actor()
            spawn, is_starting = th.spawn, threading.Event()

            def spawn_when_unwanted(*args: Any, **kwargs: Any) -> th.Worker:
                is_starting.set()
                helpers.until(lambda: portal._actor._is_unwanted)
                return spawn(*args, **kwargs)

            monkeypatch.setattr("tractor_host.nursery.spawn", spawn_when_unwanted)
            with pytest.raises(th.WorkerDied):
                await portal.run(acting.crash)
            while not is_starting.is_set():
                await anyio.sleep(0.001)
            assert portal.worker is None
            assert (await portal.cancel_actor()).kind in ("cancelled", "killed")
            with pytest.raises(th.WorkerKilled):
                await portal.run(acting.add, 1, 1)

    run(loop, main)


@pytest.mark.outside
def test_what_is_in_main_can_be_called(loop: str, backend: str, program: Callable[..., Program]) -> None:
    ended = program(
        """
        import sys, anyio
        import tractor_host as th

        async def double(number):
            return 2 * number

        async def main():
            results = []

            async def call(portal, number):
                results.append(await portal.run(double, number))

            async with th.open_nursery(sys.argv[2]) as nursery:
                portal = await nursery.start_actor()
                async with anyio.create_task_group() as tasks:
                    for number in range(5):
                        tasks.start_soon(call, portal, number)
                one = await nursery.run_in_actor(double, 21)
            print(sorted(results), await one.result())

        print("made", flush=True)
        if __name__ == "__main__":
            anyio.run(main, backend=sys.argv[1])
        """
    ).run(loop, backend)
    made = 1 if backend == "fork" else 3
    assert ended.stdout.splitlines() == ["made"] * made + ["[0, 2, 4, 6, 8] 42"], ended.stderr


def test_but_not_too_often(loop: str, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "a"
        with pytest.raises(ExceptionGroup) as caught:
            async with th.open_nursery(restart="on-failure", restart_delay=0, max_restarts=4) as nursery:
                await nursery.run_in_actor(acting.fail_first, str(path), 1000)
        (error,) = caught.value.exceptions
        assert str(error) == "time 5"
        assert any("there were too many" in note for note in error.__notes__)
        with pytest.raises(ExceptionGroup):
            async with th.open_nursery() as nursery:
                await nursery.run_in_actor(acting.fail_first, str(tmp_path / "b"), 1000)
        assert (tmp_path / "b").read_text() == "x"

    run(loop, main)


def test_what_returns_can_be_started_again(loop: str, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "a"
        async with th.open_nursery(restart="always", restart_delay=0, max_restarts=100) as nursery:
            portal = await nursery.run_in_actor(acting.fail_first, str(path), 0)
            while not path.exists() or len(path.read_text()) < 3:
                await anyio.sleep(0.005)
            await portal.cancel_actor()
        helpers.until(lambda: th.workers() == [])

    run(loop, main)


def test_what_returns_too_often_fails_the_nursery(loop: str, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "a"
        with pytest.raises(ExceptionGroup) as caught:
            async with th.open_nursery(restart="always", restart_delay=0, max_restarts=2) as nursery:
                await nursery.run_in_actor(acting.fail_first, str(path), 0)
                await anyio.sleep_forever()
        (error,) = caught.value.exceptions
        assert isinstance(error, RuntimeError)
        assert "'fail_first' was not started again: there were too many (max_restarts=2" in str(error)
        assert path.read_text() == "xxx"

    run(loop, main)


@pytest.mark.parametrize(
    ("life", "delays"),
    [(0.0, [1.0, 2.0, 4.0, None]), (2.0, [1.0, 2.0, 4.0, 4.0, 4.0]), (6.0, [1.0] * 5)],
    ids=["at once", "seldom", "once in the period"],
)
def test_the_pauses_are_not_counted(
    life: float, delays: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would make room for one more restart each, and one that always fails would never be given up."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    core = th.open_nursery(max_restarts=3, restart_period=5.0)._core
    for expected in delays:
        now += life
        delay = core.restart_delay(1.0)
        assert delay == expected
        now += delay or 0.0


@pytest.mark.parametrize("restart", ["on-failure", "always"])
def test_who_did_not_listen_is_started_again(loop: str, restart: Any) -> None:
    async def main() -> None:
        async with th.open_nursery(restart=restart, restart_delay=0, cancel_timeout=0.1) as nursery:
            for way, stuck, good in (
                (None, acting.does_not_listen, acting.add),
                ("sync", acting.until_told, acting.multiply),
            ):
                portal = await nursery.using(runtime=way).start_actor(str(way))
                with anyio.move_on_after(0.05) as scope:
                    await portal.run(stuck)
                assert scope.cancelled_caught
                assert await portal.run(good, 2, 3) in (5, 6)
                await portal.cancel_actor()
                with pytest.raises(th.WorkerKilled):
                    await portal.run(good, 2, 3)

    run(loop, main)


# -- records for the log --------------------------------------------------------------------------------------


def test_what_actors_log_is_logged_here(loop: str, backend: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with th.open_nursery(backend, log_level="INFO") as nursery:
            portal = await nursery.start_actor("talker")
            with caplog.at_level(logging.INFO):
                await portal.run(acting.log, "this")
                # It has been read before the answer was.
                found = [record for record in caplog.records if record.name.startswith("acting")]
        (record,) = found
        assert (record.name, record.levelname, record.getMessage()) == ("acting.some", "WARNING", "said this")
        assert record.actor == "talker"  # type: ignore[attr-defined]
        assert "ValueError: inner" in (record.exc_text or "")

    run(loop, main)


def test_odd_records_are_logged_too(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> list[logging.LogRecord]:
        async with th.open_nursery(log_level="INFO") as nursery:
            portal = await nursery.start_actor("talker")
            with caplog.at_level(logging.INFO):
                await portal.run(acting.log_oddly)
                return [record for record in caplog.records if record.name == "acting.odd"]

    odd, text, extra, message = run(loop, main)
    assert (odd.levelno, odd.getMessage()) == (45, "type")
    assert [odd.__dict__[key] for key in ("tag", "code", "size")] == ["x", 45, 0.5]
    assert text.getMessage() == "text %s (its arguments do not fit: ValueError: no text)"
    assert extra.__dict__["odd"] == "<NoText that has no text: ValueError: no text>"
    assert message.getMessage().startswith("<NoText that has no text")


def test_a_record_that_can_not_be_taken_harms_nobody(
    loop: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with th.open_nursery("fork", log_level="INFO") as nursery:
            portal = await nursery.start_actor("talker")
            with caplog.at_level(logging.INFO):
                await portal.run(acting.log, "this")
            assert await portal.run(acting.add, 1, 1) == 2

    monkeypatch.setattr(_logs, "_content_of", lambda record: {"odd": acting.OnlyHere()})
    run(loop, main)
    (record,) = [record for record in caplog.records if record.name == "tractor_host"]
    assert record.getMessage() == "a record of actor 'talker' could not be logged"
    assert "nowhere but there" in caplog.text


def test_records_of_a_tree_are_those_of_who_has_logged_them(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> list[logging.LogRecord]:
        async with th.open_nursery(log_level="INFO") as nursery:
            portal = await nursery.start_actor("branch")
            with caplog.at_level(logging.INFO):
                await portal.run(acting.log_below)
                return [record for record in caplog.records if record.name.startswith("acting")]

    (record,) = run(loop, main)
    assert record.__dict__["actor"] == "leaf"


# -- wrong use -------------------------------------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    for wrong, kind in (
        ({"backend": "nothing"}, ValueError),
        ({"runtime": "twisted"}, ValueError),
        ({"restart": "sometimes"}, ValueError),
        ({"max_restarts": -1}, ValueError),
        ({"max_restarts": "many"}, TypeError),
        ({"boot_timeout": math.nan}, ValueError),
        ({"cancel_timeout": "soon"}, TypeError),
        ({"log_level": "LOUD"}, ValueError),
        ({"log_level": 1.5}, TypeError),
        ({"gil": "mine"}, ValueError),
        ({"stdio": ""}, ValueError),
        ({"priority": 0}, ValueError),
        ({"priority": "high"}, TypeError),
        ({"cpu_quota": 0}, ValueError),
        ({"ladder": ["cancel"]}, TypeError),
        ({"ladder": {"cancel": -1}}, ValueError),
        ({"process": 3}, TypeError),
        ({"env": ["A"]}, TypeError),
        ({"env": {"A": "\0"}}, ValueError),
    ):
        with pytest.raises(kind, match=next(iter(wrong))):
            th.open_nursery(**wrong)  # type: ignore[arg-type]


def test_a_ladder_stands_in_for_the_time_outs_of_an_actor_too(loop: str) -> None:
    async def main() -> None:
        assert await acting.one_with_a_ladder() == 2.0
        async with th.open_nursery() as nursery:
            portal = await nursery.start_actor()
            assert await portal.run(acting.one_with_a_ladder) == 2.0

    run(loop, main)


def test_it_is_used_in_its_block_alone(loop: str) -> None:
    async def main() -> None:
        nursery = th.open_nursery()
        with pytest.raises(RuntimeError, match="is not open"):
            await nursery.start_actor()
        async with nursery:
            await nursery.start_actor("one")
            with pytest.raises(ValueError, match="has an actor 'one' already"):
                await nursery.start_actor("one")
            with pytest.raises(ValueError, match="name must not be empty"):
                await nursery.start_actor("")
            with pytest.raises(TypeError, match="name must be a str"):
                await nursery.start_actor(3)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="a list of module names"):
                await nursery.start_actor("two", enable_modules="math")
            with pytest.raises(TypeError, match="the options of an actor are name, backend"):
                nursery.using(colour="red")
            with pytest.raises(ValueError, match="restart must be"):
                nursery.using(restart="sometimes")
            with pytest.raises(TypeError, match="cancel_timeout must be a number"):
                nursery.using(cancel_timeout="soon")
        with pytest.raises(RuntimeError, match="block has ended"):
            await nursery.start_actor()
        with pytest.raises(RuntimeError, match="opened once"):
            async with nursery:
                pass

    run(loop, main)


def test_another_thread_or_loop_is_refused(loop: str) -> None:
    async def main() -> tuple[th.Nursery, Any]:
        async with th.open_nursery() as nursery:
            portal = await nursery.start_actor()
            caught: list[BaseException] = []

            def elsewhere() -> None:
                for function in (portal.run, nursery.run_in_actor):
                    try:
                        anyio.run(function, acting.add, 1, 1)
                    except RuntimeError as error:
                        caught.append(error)

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert len(caught) == 2
            assert all("of another thread" in str(error) for error in caught)
        return nursery, portal

    nursery, portal = run(loop, main)
    for other in LOOPS:
        with pytest.raises(RuntimeError, match="another event loop"):
            anyio.run(portal.run, acting.add, 1, 1, backend=other)
    with pytest.raises(RuntimeError, match="another event loop"):
        nursery.cancel()


def test_a_stream_is_used_in_its_loop_alone(loop: str) -> None:
    async def main() -> None:
        async with th.open_nursery() as nursery:
            portal = await nursery.start_actor()
            async with portal.open_stream(acting.double) as stream:
                caught: list[str] = []

                def elsewhere() -> None:
                    for function, args in (
                        (stream.send, (1,)),
                        (stream.receive, ()),
                        (stream.send_eof, ()),
                        (stream.aclose, ()),
                        (stream.result, ()),
                    ):
                        with pytest.raises(RuntimeError) as refused:
                            anyio.run(function, *args)  # type: ignore[arg-type]
                        caught.append(str(refused.value))

                thread = threading.Thread(target=elsewhere)
                thread.start()
                thread.join()
                assert len(caught) == 5
                assert all("of another thread" in text for text in caught)
                await stream.send(2)
                assert await stream.receive() == 4

    run(loop, main)


def test_a_fault_here_is_not_held_against_the_actor(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with th.open_nursery() as nursery:
                portal = await nursery.start_actor()
                monkeypatch.setattr("tractor_host.nursery._Worker._heard", _fail_to_hear)
                await portal.run(acting.add, 1, 1)
        (error,) = caught.value.exceptions
        assert isinstance(error, th.WorkerKilled)
        (note,) = error.__notes__
        assert note.endswith("what it said could not be taken here: MemoryError('none left').")

    run(loop, main)


def _fail_to_hear(*args: Any) -> None:
    raise MemoryError("none left")


def test_a_forked_copy_is_refused(loop: str) -> None:
    async def main() -> None:
        async with th.open_nursery() as nursery:
            portal = await nursery.start_actor()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    await portal.run(acting.add, 1, 1)
                except RuntimeError as error:
                    code = 0 if "forked copy" in str(error) else 2
                finally:
                    os._exit(code)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            assert await portal.run(acting.add, 1, 1) == 2

    run(loop, main)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_wrong_order_ends_its_actors() -> None:
    async def main() -> None:
        outer, inner = th.open_nursery(), th.open_nursery()
        await outer.__aenter__()
        await inner.__aenter__()
        worker = (await outer.start_actor()).worker
        assert worker is not None
        with pytest.raises(RuntimeError, match="one that was opened in it is still open"):
            await outer.__aexit__(None, None, None)
        worker.wait(PATIENCE)
        await inner.__aexit__(None, None, None)
        await outer.__aexit__(None, None, None)

    run("asyncio", main)


def test_an_actor_whose_answer_can_not_be_received_is_not_waited_for(loop: str) -> None:
    async def main() -> None:
        reader, writer = os.pipe()
        try:
            with pytest.raises(ExceptionGroup) as raised:
                async with th.open_nursery() as nursery:
                    portal = await nursery.run_in_actor(acting.answer_when_told, th.Fd(reader), 4 << 20)
                    with helpers.no_descriptor_left():
                        os.write(writer, b"x")
                        with pytest.raises(OSError, match="descriptors of a message") as lost:
                            await portal.result()
                    raise lost.value
            assert isinstance(raised.value.exceptions[0], OSError)
        finally:
            os.close(reader)
            os.close(writer)

    run(loop, main)


@pytest.mark.outside
def test_a_program_without_a_guard_is_told_of_it(program: Callable[..., Program]) -> None:
    source = """
        import asyncio
        import tractor_host as th

        def work():
            pass

        async def main():
            async with th.open_nursery() as nursery:
                await nursery.run_in_actor(work)

        asyncio.run(main())
    """
    ran = program(source).run()
    assert (ran.returncode, "RuntimeError: a worker was asked for while" in ran.stderr) == (1, True), (
        ran.stderr
    )


# -- the messages themselves ---------------------------------------------------------------------------------------


def _a_full_channel() -> tuple[_aio.Channel, Link]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel, other = _aio.Channel(Link(ours)), Link(theirs)
    while channel.try_send(Datagram.of_bytes(_calls.CALL, 0, bytes(5000))):
        pass
    return channel, other


async def _until_they_wait(channel: _aio.Channel, count: int) -> None:
    while len(channel._queue) < count:
        await anyio.lowlevel.checkpoint()


def test_who_waits_for_room_is_told_of_the_end(loop: str) -> None:
    async def main() -> None:
        channel, other = _a_full_channel()
        caught: list[BaseException] = []

        async def send() -> None:
            with pytest.raises(BrokenPipeError) as broken:
                await channel.send(Datagram.of_bytes(_calls.CALL, 1, b""))
            caught.append(broken.value)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(send)
            await _until_they_wait(channel, 3)
            channel.close()
        await send()
        channel.close()
        other.close()
        assert len(caught) == 4

    run(loop, main)


def test_what_is_to_be_heard_in_time_does_not_wait_for_the_rest(loop: str) -> None:
    async def main() -> None:
        channel, other = _a_full_channel()
        given_up = anyio.CancelScope()

        async def send(kind: int, number: int) -> None:
            await channel.send(Datagram(kind, number))

        async def give_up() -> None:
            with given_up:
                await send(_calls.CALL, 100)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(give_up)
            await _until_they_wait(channel, 1)
            for count, (kind, number) in enumerate(
                [
                    (_calls.ITEM, 3),
                    (_calls.CANCEL, 1),
                    (_calls.CLOSED, 4),
                    (_calls.CREDIT, 2),
                    (_calls.CALL, 5),
                ]
            ):
                tasks.start_soon(send, kind, number)
                await _until_they_wait(channel, count + 2)
            # Who waits for room, and leaves, has somebody else do so.
            given_up.cancel()
            found: list[int] = []
            while len(found) < 5:
                await anyio.lowlevel.checkpoint()
                with contextlib.suppress(BlockingIOError):
                    message = other.receive(wait=False)
                    assert message is not None
                    if message.number:
                        found.append(message.number)
        channel.close()
        other.close()
        assert found == [1, 2, 3, 4, 5]

    run(loop, main)


def test_messages_of_another_version_are_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        Datagram(_calls.HELLO, 0).send(ours)
        good = theirs.recv(100)
        ours.send(bytes([good[0] + 1]) + good[1:])
        with pytest.raises(ValueError, match=f"something else than a message of version {_calls.VERSION}:"):
            Link(theirs).receive()
        ours.send(good)
        message = Link(theirs).receive()
        assert message is not None
        assert (message.kind, message.number, message.content) == (_calls.HELLO, 0, b"")
