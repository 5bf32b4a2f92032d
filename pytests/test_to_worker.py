"""`to_worker.run_sync`: a call that an event loop awaits, and that is gone when it is cancelled."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import trio

import targets
import tractor_host as th
from conftest import Program, pid_is_gone
from helpers import PATIENCE, until
from tractor_host import to_worker

pytestmark = pytest.mark.outside

LOOPS = ("trio", "asyncio")


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run[T](loop: str, function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Runs it in such a loop, whose workers have ended when it has."""

    async def main() -> T:
        with anyio.fail_after(PATIENCE):
            return await function(*args)

    before = th.workers()
    result = anyio.run(main, backend=loop)
    assert th.workers() == before
    return result


async def begun(count: int = 1) -> list[th.Worker]:
    """Waits until so many workers carry out something."""
    with anyio.fail_after(PATIENCE):
        while len(found := [one for one in th.workers() if one.state == "running"]) < count:
            await anyio.sleep(0.002)
    return found


# -- calls ---------------------------------------------------------------------------------------------------


def test_a_call_is_carried_out_by_a_worker_that_stays(loop: str, backend: str) -> None:
    async def main() -> None:
        assert await th.to_worker.run_sync(divmod, 7, 2, backend=backend) == (3, 1)
        (worker,) = th.workers()
        assert worker.backend == backend
        for number in range(5):
            assert await th.to_worker.run_sync(abs, -number, backend=backend) == number
        assert [one.id for one in th.workers()] == [worker.id]
        keywords = functools.partial(targets.echo, key="word")
        assert await th.to_worker.run_sync(keywords, 1, backend=backend) == ((1,), {"key": "word"})

    run(loop, main)


def test_what_it_raises_is_raised_with_where_it_did(loop: str) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="noted") as caught:
            await th.to_worker.run_sync(targets.raise_with_notes)
        assert "in raise_with_notes" in str(caught.value.__cause__)
        with pytest.raises(TypeError) as unsent:
            await th.to_worker.run_sync(targets.give, threading.Lock())
        assert unsent.value.__notes__[-1].startswith("argument 1 of type lock cannot be pickled")

    run(loop, main)


def test_a_death_is_told_and_the_next_call_has_another_worker(loop: str) -> None:
    async def main() -> None:
        with th.Executor(1, stdio="null") as pool:
            with pytest.raises(th.WorkerDied, match="SIGABRT") as caught:
                await th.to_worker.run_sync(targets.abort, pool=pool)
            assert caught.value.exit.kind == "signalled"
            assert await th.to_worker.run_sync(abs, -1, pool=pool) == 1

    run(loop, main)


def test_large_values_go_both_ways(loop: str) -> None:
    async def main() -> None:
        data = os.urandom(3 << 20)
        assert await th.to_worker.run_sync(targets.give, data) == data

    run(loop, main)


def test_the_loop_goes_on_meanwhile(loop: str) -> None:
    async def main() -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await anyio.sleep(0)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            await th.to_worker.run_sync(time.sleep, 0.05)
            tasks.cancel_scope.cancel()
        assert turns > 10

    run(loop, main)


# -- its end -------------------------------------------------------------------------------------------------


def test_who_is_cancelled_ends_the_worker(loop: str, backend: str) -> None:
    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(functools.partial(th.to_worker.run_sync, targets.spin, backend=backend))
                (worker,) = await begun()
                await anyio.sleep(0.05)
                scope.cancel()
        assert scope.cancelled_caught
        # It is gone before the block is left.
        assert worker.exit is not None
        assert th.workers() == []
        assert await th.to_worker.run_sync(abs, -1, backend=backend) == 1

    run(loop, main)


def test_c_code_that_keeps_its_gil_is_ended_within_the_bounds_of_the_ladder(loop: str) -> None:
    async def main() -> float:
        with th.Executor(1, cancel_timeout=0.1, kill_timeout=1) as pool:
            start = anyio.current_time()
            with anyio.move_on_after(0.3) as scope:
                await th.to_worker.run_sync(sum, range(10**12), pool=pool)
            assert scope.cancelled_caught
            return anyio.current_time() - start

    assert run(loop, main) < 5


def test_who_can_not_be_cancelled_has_the_result(loop: str) -> None:
    async def main() -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(anyio.get_cancelled_exc_class()):
                await th.to_worker.run_sync(abs, -1, cancellable=False)
        # From the start on it is waited for.
        with anyio.move_on_after(0.1) as scope:
            assert await th.to_worker.run_sync(targets.return_after, 0.3, 7, cancellable=False) == 7
        assert not scope.cancelled_caught
        assert len(th.workers()) == 1

    run(loop, main)


def test_a_time_limit_is_the_call_s_own(loop: str, backend: str) -> None:
    async def main() -> None:
        with pytest.raises(th.TaskTimeout, match=r"targets:spin took longer than 0\.1 s"):
            await th.to_worker.run_sync(targets.spin, backend=backend, timeout=0.1)
        with th.Executor(1, backend, task_timeout=0.1) as pool:
            with pytest.raises(TimeoutError):
                await th.to_worker.run_sync(targets.spin, pool=pool)
            assert await th.to_worker.run_sync(targets.return_after, 0.15, 1, pool=pool, timeout=20) == 1

    run(loop, main)


def test_cancelled_at_any_moment_nothing_is_left(loop: str) -> None:
    async def main() -> None:
        await th.to_worker.run_sync(abs, 1)
        limiter = anyio.CapacityLimiter(1)
        cancelled = 0
        for step in range(40):
            with anyio.move_on_after(step * 0.0002) as scope:
                await th.to_worker.run_sync(targets.return_after, 0.002, step, limiter=limiter)
            cancelled += scope.cancelled_caught
            assert limiter.borrowed_tokens == 0
        assert cancelled > 0
        assert await th.to_worker.run_sync(abs, -1, limiter=limiter) == 1

    run(loop, main)


def test_other_calls_do_not_notice_that_one_is_cancelled(loop: str) -> None:
    async def main() -> None:
        results: list[int] = []

        async def call(number: int) -> None:
            results.append(await th.to_worker.run_sync(targets.return_after, 0.2, number))

        limiter = anyio.CapacityLimiter(1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, 1)
            with anyio.move_on_after(0.1):
                await th.to_worker.run_sync(targets.spin, limiter=limiter)
        assert results == [1]

    run(loop, main)


@pytest.mark.outside
@pytest.mark.parametrize("which", LOOPS)
def test_ctrl_c_ends_the_program_and_the_worker(program: Callable[..., Program], which: str) -> None:
    source = f"""
        import anyio, os, tractor_host as th

        def stuck():
            print(os.getpid(), flush=True)
            while True:
                pass

        if __name__ == "__main__":
            anyio.run(th.to_worker.run_sync, stuck, backend={which!r})
    """
    with program(source).start() as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert pid_is_gone(pid)


def test_a_loop_that_is_dropped_leaves_no_worker_either() -> None:
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(th.to_worker.run_sync(abs, -1)) == 1
    assert len(th.workers()) == 1
    loop.close()
    del loop
    gc.collect()
    until(lambda: not th.workers(), "the end of the workers")


def test_a_call_whose_loop_is_dropped_is_ended() -> None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(th.to_worker.run_sync(targets.spin))
    loop.run_until_complete(begun())
    coroutine = task.get_coro()
    assert coroutine is not None
    with pytest.raises(RuntimeError, match="event loop"):  # anyio's
        coroutine.close()
    # It was never told what became of it, and would complain of that.
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    del loop, task, coroutine
    gc.collect()
    until(lambda: not th.workers(), "the end of the workers")


def test_what_nobody_waits_for_any_more_ends_with_the_loop(loop: str) -> None:
    async def main() -> None:
        await th.to_worker.run_sync(abs, 1)
        home = await to_worker._home_here()
        # As an interrupt leaves it that comes just before the caller waits.
        home.get("forkserver").submit(targets.spin)
        home.get("subint").submit(targets.spin)
        await begun(2)

    run(loop, main)


def test_each_loop_has_workers_of_its_own(loop: str) -> None:
    found: list[list[int]] = []

    async def look() -> None:
        await th.to_worker.run_sync(abs, 1)
        found.append([one.id for one in th.workers()])

    async def main() -> None:
        await look()
        another = threading.Thread(target=functools.partial(anyio.run, look, backend=loop))
        another.start()
        another.join(PATIENCE)
        await look()
        assert len(found[0]) == 1
        assert found == [found[0], found[1], found[0]]
        assert len(found[1]) == 2

    run(loop, main)


# -- how many ------------------------------------------------------------------------------------------------


def test_a_limiter_says_how_many_there_are_at_a_time(loop: str) -> None:
    async def main() -> None:
        default = th.to_worker.current_default_worker_limiter()
        assert default is th.to_worker.current_default_worker_limiter()
        assert default.total_tokens == os.process_cpu_count()
        most = 0

        async def call(limiter: anyio.CapacityLimiter | None) -> None:
            nonlocal most
            await th.to_worker.run_sync(time.sleep, 0.02, limiter=limiter)
            most = max(most, len(th.workers()))

        default.total_tokens = 1
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(call, None)
        assert most == 1
        async with anyio.create_task_group() as tasks:
            for _ in range(9):
                tasks.start_soon(call, anyio.CapacityLimiter(3))
        # Each with one of its own: nothing else bounds them.
        assert 3 <= most <= 9

    run(loop, main)


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((5,), {}, TypeError, "func must be callable, not of type int"),
        ((targets.add_soon, 1, 2), {}, TypeError, "is async"),
        ((abs, 1), {"backend": "nonsense"}, ValueError, "nonsense"),
        ((abs, 1), {"timeout": -1}, ValueError, "timeout"),
        ((abs, 1), {"timeout": "soon"}, TypeError, "timeout"),
        ((abs, 1), {"pool": 3}, TypeError, "pool must be a tractor_host.Executor"),
    ],
)
def test_what_can_not_be_right_is_refused(
    arguments: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    async def main() -> None:
        with pytest.raises(error, match=text):
            await th.to_worker.run_sync(*arguments, **options)
        assert th.workers() == []

    run("asyncio", main)


def test_a_pool_has_its_backend_and_its_end(loop: str) -> None:
    async def main() -> None:
        with th.Executor(1, "subint") as pool:
            with pytest.raises(ValueError, match="a backend of its own"):
                await th.to_worker.run_sync(abs, 1, pool=pool, backend="fork")
            assert await th.to_worker.run_sync(abs, -1, pool=pool) == 1
        with pytest.raises(RuntimeError, match="after shutdown"):
            await th.to_worker.run_sync(abs, 1, pool=pool)
        assert th.to_worker.current_default_worker_limiter().borrowed_tokens == 0

    run(loop, main)


def test_outside_of_an_event_loop_it_says_so() -> None:
    coroutine = th.to_worker.run_sync(abs, 1)
    with pytest.raises(RuntimeError, match="event loop|async"):
        coroutine.send(None)


def test_trio_s_own_cancel_scopes_do_as_well() -> None:
    async def main() -> bool:
        with trio.move_on_after(0.2) as scope:
            await th.to_worker.run_sync(targets.spin)
        return scope.cancelled_caught

    assert trio.run(main)
    assert th.workers() == []


@pytest.mark.outside
def test_without_anyio_it_says_what_it_needs() -> None:
    code = (
        "import sys; sys.modules['anyio'] = None\nimport tractor_host as th\n"
        "try:\n    th.to_worker\nexcept ImportError as error:\n    print(error.name, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "anyio tractor_host.to_worker needs anyio: pip install 'tractor-host[nursery]'\n"
