"""Awaits a call that a worker carries out: `run_sync`, as anyio has it in `to_process` and `to_interpreter`.

The workers are those of a pool (`executor`), one for each event loop and backend. An async generator that the
loop closes when it ends, which trio and asyncio both do, ends the pools then.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, Final, cast

try:
    import anyio
    import anyio.lowlevel
except ImportError as error:
    raise ImportError(
        "tractor_host.to_worker needs anyio: pip install 'tractor-host[nursery]'", name="anyio"
    ) from error

from tractor_host import executor
from tractor_host._child import is_async
from tractor_host._spawn import resolve_backend, running_loop
from tractor_host._worker import finite

if TYPE_CHECKING:
    from tractor_host._future import Future

__all__ = ["current_default_worker_limiter", "run_sync"]

#: Seconds after which a worker that has nothing to do leaves; as anyio's.
_IDLE: Final = 300.0
#: The limiter says how many there may be.
_MOST: Final = 1 << 30
#: Seconds: a timer that never comes.
_FAR: Final = 1e9

_limiter: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar("tractor_host_limiter")
_home: anyio.lowlevel.RunVar[weakref.ref[_Home]] = anyio.lowlevel.RunVar("tractor_host_home")
#: Those of trio's, which closes all of them.
_ends: dict[_Home, AsyncGenerator[None]] = {}


async def run_sync[*Ts, T](
    func: Callable[[*Ts], T],
    *args: *Ts,
    cancellable: bool = True,
    limiter: anyio.CapacityLimiter | None = None,
    backend: str | None = None,
    timeout: float | None = None,
    pool: executor.Executor | None = None,
) -> T:
    """Has a worker call `func(*args)`, and returns what that returns; in trio or asyncio.

    When the caller is cancelled, the worker is ended by its ladder, and is gone when this raises. Workers
    that have nothing to do are used again, leave after five minutes, and end with the event loop.

        >>> import asyncio, math
        >>> import tractor_host as th
        >>> asyncio.run(th.to_worker.run_sync(math.factorial, 20))
        2432902008176640000

    Args:
        func: As for `Executor.submit`.
        args: Its arguments.
        cancellable: With `False`, the caller is not cancelled before the call is over.
        limiter: What bounds how many such calls there are at a time, in the place of
            `current_default_worker_limiter()`.
        backend: As for `spawn`.
        timeout: Seconds that the call may take, once a worker has it; then that is ended.
        pool: Has the call carried out by this pool's workers, which stay what they are; its options, and its
            `task_timeout` where there is no `timeout`, hold.

    Raises:
        Exception: What the function raises, with the traceback there as its cause. What pickling or
            unpickling the call or its result raises, with a note that says of what.
        TaskTimeout: It took longer than it may.
        WorkerDied: The worker died of it.
        TypeError, ValueError: An argument can't be right; the text says which and why.
        OSError: No worker could be started.
    """
    if not callable(func):
        raise TypeError(f"func must be callable, not of type {type(func).__name__}")
    if is_async(func):
        raise TypeError(f"{func!r} is async: an actor of open_nursery() can carry it out, or spawn()")
    if pool is not None and not isinstance(pool, executor.Executor):
        raise TypeError(f"pool must be a tractor_host.Executor, not of type {type(pool).__name__}")
    if pool is not None and backend is not None:
        raise ValueError("a pool has a backend of its own: name one of both")
    seconds = finite("timeout", timeout)
    wall = resolve_backend(backend)
    await anyio.lowlevel.checkpoint_if_cancelled()
    async with current_default_worker_limiter() if limiter is None else limiter:
        waiter = _Waiter()
        chosen = (await _home_here()).get(wall) if pool is None else pool
        submitter = chosen if seconds is None else chosen.with_timeout(seconds)
        future = cast("Future[T]", submitter.submit(func, *args))
        future.tell_when_over(waiter)
        try:
            with anyio.CancelScope(shield=not cancellable):
                await waiter.wait()
        except BaseException:
            future.cancel()
            with anyio.CancelScope(shield=True):
                await waiter.wait()
            raise
    try:
        return future.result()
    finally:
        # The exception would refer to itself by way of this frame.
        del future, waiter


def current_default_worker_limiter() -> anyio.CapacityLimiter:
    """What bounds how many calls this event loop has workers carry out at a time: by default as many as there
    are processors that may be used. It can be changed, as in `.total_tokens = 8`.
    """
    try:
        return _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(os.process_cpu_count() or 1)
        _limiter.set(limiter)
        return limiter


class _Waiter:
    """A call that waits in the event loop, as a pool sees it."""

    def __init__(self) -> None:
        self._bell = executor._Bell()

    @property
    def event(self) -> _Waiter:
        return self

    def post(self, _: Future[Any]) -> None:
        """By the pool: the task is not carried out any more."""
        self._bell.ring()

    async def wait(self) -> None:
        await anyio.wait_readable(self._bell.fd)


class _Home:
    """The pools of an event loop."""

    def __init__(self) -> None:
        self.pools: dict[str, executor.Executor] = {}

    def get(self, backend: str) -> executor.Executor:
        if backend not in self.pools:
            self.pools[backend] = executor.Executor(_MOST, backend, idle_timeout=_IDLE, name="to_worker")
        return self.pools[backend]

    def close(self) -> None:
        """Nobody waits for a call any more, whatever is still carried out."""
        for pool in self.pools.values():
            pool._pool.close(cancel=True, kill=True)
        for pool in self.pools.values():
            pool.terminate_workers()


async def _home_here() -> _Home:
    """This event loop's."""
    reference = _home.get(None)
    home = None if reference is None else reference()
    if home is None:
        home = _Home()
        _home.set(weakref.ref(home))
        end = _until_the_end(home)
        if running_loop() == "asyncio":
            # It lives as long as the loop's timers: one that is closed without its generators lets go of it.
            asyncio.get_running_loop().call_later(_FAR, end.__anext__)
        else:
            _ends[home] = end
        await anext(end)
    return home


async def _until_the_end(home: _Home) -> AsyncGenerator[None]:
    """The event loop closes it."""
    try:
        yield
    finally:
        _ends.pop(home, None)
        home.close()
