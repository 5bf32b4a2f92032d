"""Actors that live no longer than the block that has started them: `tractor_host.open_nursery`.

Each actor is a worker that carries out calls (`_actor`). Two tasks of the nursery belong to it: one
supervises it from its start until it is gone, whatever happens; the other reads what it says. Whoever calls
it sends the call and waits for the reader to hand him the answer.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Final, Literal, Self, cast, final, overload

from tractor_host._aio import Channel, Stream, anew, in_thread  # first: it says what is not installed

import anyio  # isort: skip
import anyio.abc  # isort: skip
import anyio.lowlevel  # isort: skip

from tractor_host import _actor, _calls, _logs, _native, _remote
from tractor_host._calls import Datagram, Incomplete, Link, Message
from tractor_host._child import check_main_is_made, is_async
from tractor_host._errors import BootTimeout, RemoteError, WorkerError, WorkerKilled
from tractor_host._parcel import Packed
from tractor_host._spawn import check_options, has_our_main, resolve_backend, running_loop, spawn
from tractor_host._target import call_of, main_module
from tractor_host._worker import budget, death_of

if TYPE_CHECKING:
    from tractor_host._target import Target
    from tractor_host._worker import Exit, Worker

__all__ = ["Nursery", "Portal", "Stream", "open_nursery"]

Restart = Literal["never", "on-failure", "always"]

#: Of the seconds that an actor has to end by itself, so much is for those below it to do so, and so much for
#: the rungs that end those that do not. The rest is its own.
_SHARES: Final = (0.5, 0.3)
#: The longest pause before an actor is started again.
_LONGEST_DELAY: Final = 30.0


def open_nursery(
    backend: str | None = None,
    *,
    runtime: Literal["sync", "trio", "asyncio"] | None = None,
    gil: Literal["shared", "own", "auto"] = "shared",
    process: str | None = None,
    stdio: str | os.PathLike[str] = "inherit",
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    cancel_timeout: float | None = None,
    kill_timeout: float | None = None,
    ladder: Mapping[str, float] | None = None,
    priority: float = 1.0,
    cpu_quota: float | None = None,
    boot_timeout: float = 60.0,
    log_level: int | str | None = None,
    restart: Restart = "never",
    restart_delay: float = 0.1,
    max_restarts: int = 3,
    restart_period: float = 5.0,
) -> Nursery:
    """Makes a nursery, as in `async with tractor_host.open_nursery() as nursery:`, in trio or asyncio.

    The block ends when all its actors are gone. When it ends without an error, actors that carry out one
    function (`run_in_actor`) are waited for, the others (`start_actor`) leave. When an actor fails, or the
    block does, all other actors and the block are cancelled, and all errors, with those that functions raise
    while they are cancelled, are raised as one `ExceptionGroup` (but for a `KeyboardInterrupt` or
    `SystemExit` of the block's, which is raised as it is). Cancelling the block cancels its actors; those
    that do not listen are ended by their ladders.

        >>> import asyncio, math
        >>> import tractor_host as th
        >>> async def main():
        ...     async with th.open_nursery() as nursery:
        ...         portal = await nursery.start_actor("worker")
        ...         return await portal.run(math.factorial, 20)
        >>> asyncio.run(main())
        2432902008176640000

    Args:
        backend: As for `spawn`, for each actor, as are those from `gil` to `cpu_quota`.
        runtime: What the actors run: an event loop, by default that of the caller, or `"sync"` for one call
            after the other in the main thread, which is what `run_in_actor` uses for a function that is not
            async.
        gil: Whether subinterpreters have one of their own.
        process: The process that `"subint_forkserver"` actors share.
        stdio: What actors write.
        env: The environment of process actors.
        cwd: Their working directory.
        ladder: The rungs in the place of both time-outs; `cancel_timeout` is for calls alone then.
        priority: The weight of each actor.
        cpu_quota: At most this part of a processor for each.
        cancel_timeout: Seconds that an actor has to end by itself, with all actors below it, when it is
            cancelled, and that a call has to end when its caller is cancelled; then it is killed. By default
            3, and in an actor half of what that has itself, so that a whole tree ends within one budget.
        kill_timeout: Seconds for all further rungs; by default 3, or a third of what the actor has itself.
        boot_timeout: Seconds that an actor may take to start, with the import of its modules.
        log_level: What actors log from this level on is logged here, by the logger of the same name, with the
            attribute `actor`; the handlers there are replaced. Records that find no room are lost, and
            counted in `lost_before` of the next one. By default nothing is done.
        restart: `"never"`; `"on-failure"` starts an actor again when it has died, or was killed for a call
            that did not end, or its one function has failed; `"always"` also when that has returned before
            the block ended. What was being called fails all the same.
        restart_delay: Seconds until then, twice as many each further time within the period.
        max_restarts: When more are due within the period, in all of the nursery, it fails.
        restart_period: Seconds, without those pauses.

    Raises:
        TypeError, ValueError: An argument can't be right; the text says which and why.
        ImportError: anyio is not installed.
    """
    own = _actor.current_actor()
    if own.budget is not None:
        cancel_share, kill_share = (own.budget * share for share in _SHARES)
    else:
        cancel_share, kill_share = 3.0, 3.0
    if type(max_restarts) is not int:
        raise TypeError(f"max_restarts must be an int, not {type(max_restarts).__name__}")
    if max_restarts < 0:
        raise ValueError(f"max_restarts must be at least 0, not {max_restarts}")
    options = _Options(
        None, backend, runtime, gil, process, stdio, env, cwd,
        cancel_share if cancel_timeout is None else cancel_timeout,
        kill_share if kill_timeout is None else kill_timeout,
        ladder, priority, cpu_quota, boot_timeout, log_level, restart, restart_delay,
    )  # fmt: skip
    return Nursery(_Core(max_restarts, budget("restart_period", restart_period)), options)


@dataclasses.dataclass(frozen=True, slots=True)
class _Options:
    """How an actor is started, and what becomes of it."""

    name: str | None
    backend: str | None
    runtime: Literal["sync", "trio", "asyncio"] | None
    gil: Literal["shared", "own", "auto"]
    process: str | None
    stdio: str | os.PathLike[str]
    env: Mapping[str, str] | None
    cwd: str | os.PathLike[str] | None
    cancel_timeout: float
    kill_timeout: float
    ladder: Mapping[str, float] | None
    priority: float
    cpu_quota: float | None
    boot_timeout: float
    log_level: int | str | None
    restart: Restart
    restart_delay: float

    def __post_init__(self) -> None:
        """Checks at once what `spawn` would refuse later, or would not know."""
        for name in ("cancel_timeout", "kill_timeout", "boot_timeout", "restart_delay"):
            object.__setattr__(self, name, budget(name, getattr(self, name)))
        if self.restart not in ("never", "on-failure", "always"):
            raise ValueError(f"restart must be 'never', 'on-failure' or 'always', not {self.restart!r}")
        resolve_backend(self.backend)
        if self.runtime not in (None, "sync", "trio", "asyncio"):
            raise ValueError(f"runtime must be 'sync', 'trio', 'asyncio' or None, not {self.runtime!r}")
        if self.name == "":
            raise ValueError("name must not be empty")
        check_options(
            name=self.name,
            gil=self.gil,
            process=self.process,
            stdio=self.stdio,
            env=self.env,
            cwd=self.cwd,
            ladder=self.ladder,
            priority=self.priority,
            cpu_quota=self.cpu_quota,
        )
        if self.log_level is not None:
            object.__setattr__(self, "log_level", _logs.level_of(self.log_level))


class Nursery:
    """What `open_nursery` returns: an async context manager, once, and what starts actors in its block."""

    def __init__(self, core: _Core, options: _Options) -> None:
        self._core = core
        self._options = options

    async def __aenter__(self) -> Self:
        await self._core.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        return await self._core.close(kind, error, traceback)

    def using(self, **options: Any) -> Nursery:
        """The same nursery with other options: `name`, or any of `open_nursery`'s for an actor.

            portal = await nursery.using(name="parser", backend="subint").run_in_actor(parse, text)

        Raises:
            TypeError, ValueError: There is no such option, or it can't be right.
        """
        known = [field.name for field in dataclasses.fields(_Options)]
        if not options.keys() <= set(known):
            raise TypeError(f"the options of an actor are {', '.join(known)}; not {', '.join(options)}")
        return Nursery(self._core, dataclasses.replace(self._options, **options))

    async def start_actor(
        self,
        name: str | None = None,
        *,
        enable_modules: Iterable[str] = (),
        backend: str | None = None,
        restart: Restart | None = None,
    ) -> Portal[None]:
        """Starts an actor that carries out calls, and waits until it can.

        It leaves when the block ends and nothing is being called any more, or by `Portal.cancel_actor`.

        Args:
            name: Its name, which no other actor of the nursery has.
            enable_modules: Modules that it imports first.
            backend: In the place of the nursery's.
            restart: In the place of the nursery's.

        Raises:
            BootTimeout: It was not ready in time, and was ended.
            WorkerDied: It died before.
            Exception: What the import of a module has raised.
            OSError: No process, thread or descriptor is to be had.
            RuntimeError: The nursery is not open, or not in this event loop.
        """
        changes = {"name": name, "backend": backend, "restart": restart}
        chosen = self.using(**{key: value for key, value in changes.items() if value is not None})._options
        if isinstance(enable_modules, str):
            raise TypeError("enable_modules takes a list of module names, not one name")
        actor = _Worker(self._core, chosen, chosen.name or "actor", tuple(enable_modules), None)
        await self._core.start(actor)
        return Portal(actor)

    @overload
    async def run_in_actor[**P, T](
        self, function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Portal[T]: ...

    @overload
    async def run_in_actor[**P, T](
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Portal[T]: ...

    async def run_in_actor(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Portal[Any]:
        """Starts an actor that carries out one call, and leaves; returns when it has begun.

        Its portal's `result` waits for the value. If the call fails, so does the nursery, whether anybody
        waits or not.

        Raises:
            TypeError: The function can't be called so in another interpreter; the text says why.
            BootTimeout, WorkerDied, OSError, RuntimeError: As for `start_actor`.
        """
        _check_callable(function)
        call = call_of(function, args, kwargs)
        chosen = self._options
        if chosen.runtime is None:
            chosen = dataclasses.replace(chosen, runtime=None if is_async(function) else "sync")
        name = chosen.name or self._core.free_name(_short(call[0].description))
        actor = _Worker(self._core, chosen, name, (), call)
        await self._core.start(actor)
        return Portal(actor)

    def cancel(self) -> None:
        """Cancels the block and all its actors; may be called again."""
        self._core.check_here()
        self._core.tasks.cancel_scope.cancel()

    def __repr__(self) -> str:
        return f"<Nursery of {len(self._core.actors)} actors>"


def _check_callable(function: object) -> None:
    if not callable(function):
        raise TypeError(f"what an actor is to call must be callable, not of type {type(function).__name__}")


def _short(description: str) -> str:
    return description.rpartition(":")[2].rpartition(".")[2].strip("<>") or "actor"


@final
class Portal[T]:
    """A way to an actor: made by `start_actor` and `run_in_actor`."""

    def __init__(self, actor: _Worker) -> None:
        self._actor = actor

    @property
    def name(self) -> str:
        """The actor's name."""
        return self._actor.name

    @property
    def worker(self) -> Worker | None:
        """Its worker just now; `None` between two lives, and once it is gone."""
        return self._actor.worker

    @overload
    async def run[**P, R](
        self, function: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...

    @overload
    async def run[**P, R](self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    async def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Has the actor call `function(*args, **kwargs)`, and returns what that returns.

        An async function runs in the actor's event loop, another one on a thread there (or, with
        `runtime="sync"`, in its main thread, one at a time). A time limit of the caller holds there too.

        When the caller is cancelled, the call is: an async one by its loop; a sync one is told so by
        `check_cancelled`. What it raises then is raised here. If it has not ended by `cancel_timeout`, the
        actor is killed; so is, at once, one with `runtime="sync"`.

        Raises:
            Exception: What the function raises, with the traceback there as its cause. What pickling the call
                or its result, or unpickling it, raises, with a note that says of what.
            RuntimeError: The function was left with `SystemExit` or the like, which is the cause.
            WorkerDied: The actor died meanwhile, or had before.
            WorkerKilled: It was cancelled, or killed.
            RuntimeError: It is not this event loop's, or its nursery's block has ended.
        """
        call = await self._actor.begin(_calls.CALL, function, args, kwargs)
        return await self._actor.finish(call)

    @overload
    def open_stream[**P](
        self,
        function: Callable[Concatenate[Stream, P], Coroutine[Any, Any, object]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> contextlib.AbstractAsyncContextManager[Stream]: ...

    @overload
    def open_stream[**P](
        self, function: Callable[P, AsyncGenerator[object]], /, *args: P.args, **kwargs: P.kwargs
    ) -> contextlib.AbstractAsyncContextManager[Stream]: ...

    @contextlib.asynccontextmanager
    async def open_stream(
        self, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Stream]:
        """Has the actor run a function that objects can be sent to and received from: `async with
        portal.open_stream(function, ...) as stream`.

        It is `async def function(stream, *args, **kwargs)`, or an async generator function
        `function(*args, **kwargs)`, whose items are sent here.

        Leaving the block closes the stream and waits for the function: for it, the stream has ended, and what
        it sends now raises `anyio.BrokenResourceError`, which it need not catch; a generator is cancelled.
        When an error leaves the block, the function is cancelled as in `run`.

        Raises:
            Exception: As for `run`; what the function raises, too, when the block is left.
        """
        call = await self._actor.begin(_calls.OPEN, function, args, kwargs)
        stream = call.stream
        assert stream is not None
        try:
            yield stream
            call.is_left = True
            await stream.aclose()
            await call.done.wait()
        except BaseException as error:
            await self._actor.stop(call)
            if isinstance(error, anyio.get_cancelled_exc_class()):
                call.check_raised()
            raise
        finally:
            self._actor.forget(call)
        if call.failure is not None:
            raise anew(call.failure)

    async def result(self) -> T:
        """Waits until the actor is gone; returns the value of its one function, or `None`.

        Raises:
            Exception: What that has raised.
            WorkerDied, WorkerKilled: How it has ended else.
        """
        return cast("T", await self._actor.result())

    async def cancel_actor(self) -> Exit:
        """Ends the actor, by its ladder if it does not listen, and waits until it is gone; not an error, but
        for what its one function raises while it ends.

        Does nothing to one that has ended.
        """
        return await self._actor.cancel()

    def __repr__(self) -> str:
        return f"<Portal of {self._actor!r}>"


class _Call:
    """One that an actor was sent."""

    __slots__ = (
        "done", "failure", "has_raised", "has_turn", "is_being_stopped", "is_forgotten", "is_left", "number",
        "patience", "stream", "value",
    )  # fmt: skip

    def __init__(self, number: int) -> None:
        self.number = number
        self.done = anyio.Event()
        self.failure: BaseException | None = None
        #: Whether that is what its function has raised; not if it was merely told to end.
        self.has_raised = False
        self.value: Any = None
        self.stream: Stream | None = None
        #: Whether its stream was left: what it has to say then is of no interest.
        self.is_left = False
        #: Whether no other call may be sent meanwhile.
        self.has_turn = False
        #: Whether it was told to end, or is about to be; whether nobody waits for it any more.
        self.is_being_stopped = self.is_forgotten = False
        #: How long it is waited for then.
        self.patience: anyio.CancelScope | None = None

    def settle(self, answer: Message | BaseException) -> None:
        """It is over, with this; the first time counts."""
        if self.done.is_set():
            return
        if isinstance(answer, BaseException):
            self.failure = answer
        elif answer.kind == _calls.CANCELLED:
            if not self.is_left:
                self.failure = TimeoutError("the call was cancelled there: it was over its deadline")
        else:
            good, value = _remote.answer(answer.content, returned=answer.kind == _calls.RETURNED)
            if good:
                self.value = value
            elif isinstance(value, Exception):
                self.failure = value
                self.has_raised = answer.kind == _calls.RAISED
            else:
                # What ends a program must not end this one.
                self.failure = RuntimeError(f"the call was left with {_remote.summary(value)}")
                self.failure.__cause__ = value
        self.done.set()
        if self.patience is not None:
            self.patience.cancel()
        if self.stream is not None:
            self.stream.finish()

    def check_raised(self) -> None:
        """Raises what its function has, in place of a cancellation, as where no border is in between."""
        if self.has_raised and self.failure is not None:
            raise anew(self.failure)

    async def wait(self) -> Any:
        await self.done.wait()
        if self.failure is not None:
            raise anew(self.failure)
        return self.value


#: The nurseries that the current task is in, from the outermost on.
_open: contextvars.ContextVar[tuple[_Core, ...]] = contextvars.ContextVar(
    "tractor_host_nurseries", default=()
)


class _Core:
    """A nursery, whatever its options."""

    def __init__(self, max_restarts: int, restart_period: float) -> None:
        self._max_restarts = max_restarts
        self._restart_period = restart_period
        #: When actors were started again, had there been no pauses since; until when there is one.
        self._restarts: list[float] = []
        self._paused_until = -math.inf
        self._state: Literal["new", "open", "closing", "closed"] = "new"
        self._home: tuple[int, int, object] = (0, 0, None)
        self.actors: dict[str, _Worker] = {}
        self.tasks: anyio.abc.TaskGroup

    def check_here(self) -> None:
        """Raises RuntimeError: it is not for the caller to use."""
        if self._state == "new":
            raise RuntimeError("the nursery is not open: use it as `async with open_nursery() as nursery`")
        pid, thread, loop = self._home
        if pid != os.getpid():
            raise RuntimeError(f"the nursery is that of process {pid}, of which this one is a forked copy")
        if thread != threading.get_ident():
            raise RuntimeError("the nursery is that of another thread; use its event loop's way to call it")
        if running_loop() is None or anyio.lowlevel.current_token() != loop:
            raise RuntimeError("the nursery is that of another event loop")

    async def open(self) -> None:
        if self._state != "new":
            raise RuntimeError("a nursery is opened once: make another one")
        self._home = (os.getpid(), threading.get_ident(), anyio.lowlevel.current_token())
        self.tasks = anyio.create_task_group()
        await self.tasks.__aenter__()
        self._state = "open"
        _open.set((*_open.get(), self))

    async def close(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.check_here()
        stack = _open.get()
        if not stack or stack[-1] is not self:
            # What it has started must not be lost with it.
            for actor in self.actors.values():
                actor.kill()
            where = (
                "one that was opened in it is still open"
                if self in stack
                else "it was opened by another task"
            )
            raise RuntimeError(f"the nursery can't be closed now: {where}; all its actors are ended")
        _open.set(stack[:-1])
        self._state = "closing"
        for actor in self.actors.values():
            actor.leave_when_idle()
        failed: BaseExceptionGroup[BaseException]
        try:
            return bool(await self.tasks.__aexit__(kind, error, traceback))
        except BaseExceptionGroup as group:
            failed = group
        finally:
            self._state = "closed"
        for error in failed.exceptions:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                # As in asyncio's task groups: whoever ends the program is not to be hidden in a group.
                raise error
        raise _without_twins(failed) from failed.__cause__

    def free_name(self, name: str) -> str:
        """This one, or one that is made of it."""
        found, count = name, 1
        while found in self.actors:
            count += 1
            found = f"{name}-{count}"
        return found

    async def start(self, actor: _Worker) -> None:
        self.check_here()
        check_main_is_made()
        if self._state != "open":
            raise RuntimeError("the nursery's block has ended: no more actors can be started")
        if actor.name in self.actors:
            raise ValueError(f"the nursery has an actor {actor.name!r} already")
        self.actors[actor.name] = actor
        await self.tasks.start(actor.supervise, name=f"actor {actor.name}")

    def restart_delay(self, first: float) -> float | None:
        """Seconds until an actor may be started again; `None` when there were too many.

        The time of such pauses is not counted: it would make room in the period for ever more.
        """
        now = time.monotonic()
        self._restarts = [then for then in self._restarts if then > now - self._restart_period]
        if len(self._restarts) >= self._max_restarts:
            return None
        self._restarts.append(now)
        delay = min(first * 2.0 ** min(len(self._restarts) - 1, 64), _LONGEST_DELAY)
        paused = max(0.0, now + delay - max(now, self._paused_until))
        self._paused_until = max(now + delay, self._paused_until)
        self._restarts = [then + paused for then in self._restarts]
        return delay

    @property
    def limit(self) -> str:
        """What there may be of those, for people."""
        return f"too many (max_restarts={self._max_restarts}, restart_period={self._restart_period})"


def _without_twins(group: BaseExceptionGroup[BaseException]) -> BaseExceptionGroup[BaseException]:
    """Each exception once: what one task raises is often what another one waits for. A group may have been
    made anew on its way; what is in it is the same. A death is known by its `exit`, which its copies share.
    """
    seen: set[object] = set()

    def is_new(error: BaseException) -> bool:
        if isinstance(error, BaseExceptionGroup):
            return False
        what = (
            (type(error), id(getattr(error, "exit", error))) if isinstance(error, WorkerError) else id(error)
        )
        if what in seen:
            return False
        seen.add(what)
        return True

    slim = group.subgroup(is_new)
    assert slim is not None, "the first one is new"
    return slim


class _Worker:
    """An actor, seen from its nursery."""

    def __init__(
        self,
        core: _Core,
        options: _Options,
        name: str,
        modules: tuple[str, ...],
        only: tuple[Target, list[str] | None] | None,
    ) -> None:
        self.name = name
        self.worker: Worker | None = None
        self._core = core
        self._options = options
        self._modules = modules
        #: The one call that it is there for, and what that has come to.
        self._only = only
        self._only_call: _Call | None = None
        self._runtime: str = options.runtime or running_loop() or "asyncio"
        self._number = 0
        self._calls: dict[int, _Call] = {}
        self._turn = anyio.Semaphore(1) if self._runtime == "sync" else None
        self._channel: Channel | None = None
        self._is_told = self._main_sent = False
        #: Set while it can be called.
        self._up = anyio.Event()
        #: Set when it is gone for good; why, if that is an error.
        self._over = anyio.Event()
        self._error: Exception | None = None
        self._exit: Exit | None = None
        self._last_death: WorkerError | None = None
        #: What it said that it should not have; what was wrong when it was told what it is.
        self._confusion: BaseException | None = None
        self._boot_error: BaseException | None = None
        #: Whether somebody wants it gone; whether this life was ended, for a call that did not end; whether
        #: it was told that nobody calls it any more.
        self._is_unwanted = self._is_ended = self._is_leaving = False
        self._is_to_leave = False
        self._patience = anyio.CancelScope()
        self._pause = anyio.CancelScope()

    def __repr__(self) -> str:
        how = self.worker or self._exit
        return f"<actor {self.name!r}>" if how is None else f"<actor {self.name!r}: {how!r}>"

    # -- its task ----------------------------------------------------------------------------------------

    async def supervise(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Sees to it from its start until it is gone; raises what it failed with."""
        is_started = False

        def started() -> None:
            nonlocal is_started
            if not is_started:
                is_started = True
                task_status.started()

        try:
            while True:
                try:
                    error = await self._live(started)
                except anyio.get_cancelled_exc_class():
                    self._is_unwanted = True
                    if self._only_call is not None:
                        self._only_call.check_raised()
                    raise
                if not is_started and error is None:
                    error = WorkerKilled(f"actor {self.name!r} was cancelled while it started", self._how())
                if not self._is_to_be_restarted(error, is_started=is_started):
                    break
                delay = self._core.restart_delay(self._options.restart_delay)
                if delay is None:
                    what = f"actor {self.name!r} was not started again: there were {self._core.limit}"
                    if error is None:
                        raise RuntimeError(what) from (self._last_death if self._is_ended else None)
                    error.add_note(what)
                    break
                with anyio.CancelScope() as self._pause:
                    await anyio.sleep(delay)
                if self._is_unwanted or (self._is_to_leave and self._only is None):
                    error = None  # it was about to be made good
                    break
            if error is not None:
                raise error
        except Exception as error:
            self._error = error
            raise
        finally:
            self._over.set()
            self._up.set()
            if self._core.actors.get(self.name) is self:
                del self._core.actors[self.name]

    def _is_to_be_restarted(self, error: BaseException | None, *, is_started: bool) -> bool:
        if self._is_unwanted or (self._is_to_leave and self._only is None) or not is_started:
            return False
        match self._options.restart:
            case "always":
                return error is not None or not self._is_to_leave
            case "on-failure":
                return error is not None or self._is_ended
            case _:
                return False

    async def _live(self, started: Callable[[], None]) -> BaseException | None:
        """One life of it. Returns what it failed with; it is gone then, whatever has happened."""
        self._only_call = None
        await anyio.lowlevel.checkpoint_if_cancelled()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, anyio.CancelScope(shield=True):
                self.worker = await in_thread(functools.partial(self._spawn, theirs), name="th-spawn")
        except BaseException:
            ours.close()
            raise
        worker = self.worker
        assert worker is not None
        if self._is_unwanted:  # since it was being started
            _native.kill(worker._key)
        self._confusion = self._boot_error = None
        self._is_told = self._main_sent = self._is_leaving = self._is_ended = False
        channel = self._channel = Channel(Link(ours))
        reading = anyio.CancelScope(shield=True)
        has_read = anyio.Event()
        is_late = False
        try:
            self._core.tasks.start_soon(
                self._read, channel, reading, has_read, started, name=f"actor {self.name}: hear"
            )
            with anyio.CancelScope(
                deadline=anyio.current_time() + self._options.boot_timeout
            ) as self._patience:
                await anyio.wait_readable(worker.fileno())
            is_late = self._patience.cancelled_caught and not self._up.is_set() and not self._is_leaving
        finally:
            with anyio.CancelScope(shield=True):
                if worker.exit is None:
                    # Whoever is told to leave, and does not, is not asked again.
                    is_deaf = self._is_leaving and self._patience.cancelled_caught
                    (_native.kill_deaf if is_deaf else _native.kill)(worker._key)
                    await anyio.wait_readable(worker.fileno())
                reading.cancel()
                await has_read.wait()
            if self._up.is_set():
                self._up = anyio.Event()
            self._read_rest(channel)
            channel.close()
            self._channel = None
            self._exit = worker.wait()
            death = self._last_death = self._death(worker)
            # The handle has a descriptor, which a portal or a traceback that somebody keeps must not have.
            self.worker = None
            del worker
            for call in list(self._calls.values()):
                call.settle(death)
            self._calls.clear()
        return self._failure(death, is_late=is_late)

    def _spawn(self, theirs: socket.socket) -> Worker:
        options = self._options
        budgets: dict[str, Any] = {"ladder": options.ladder}
        if options.ladder is None:
            budgets = {"cancel_timeout": options.cancel_timeout, "kill_timeout": options.kill_timeout}
        return spawn(
            _actor.serve_sync if self._runtime == "sync" else _actor.serve,
            theirs,
            name=self.name,
            backend=options.backend,
            runtime=cast("Any", self._runtime),
            gil=options.gil,
            process=options.process,
            stdio=options.stdio,
            env=options.env,
            cwd=options.cwd,
            priority=options.priority,
            cpu_quota=options.cpu_quota,
            **budgets,
        )

    def _death(self, worker: Worker) -> WorkerError:
        """What those are told who were calling it."""
        error = death_of(worker)
        if isinstance(self._confusion, ValueError):
            error.add_note(f"It had sent {self._confusion}.")
        elif self._confusion is not None:
            error.add_note(f"It was ended because what it said could not be taken here: {self._confusion!r}.")
        return error

    def _failure(self, death: WorkerError, *, is_late: bool) -> BaseException | None:
        """What it has failed with, if it has."""
        if self._boot_error is not None:
            return self._boot_error
        if self._only_call is not None and self._only_call.has_raised:
            return self._only_call.failure
        if is_late:
            what = f"actor {self.name!r} was not ready within {self._options.boot_timeout} s, and was ended"
            return BootTimeout(f"{what}: {death.exit.cause}", death.exit)
        if self._is_unwanted or self._is_ended:
            return None
        if self._only_call is not None and self._only_call.done.is_set():
            if self._only_call.failure is not None:
                return self._only_call.failure
            return None if self._is_leaving and not isinstance(death, RemoteError) else death
        if self._is_leaving and death.exit.kind in ("returned", "cancelled", "killed"):
            return None
        return death

    def _how(self) -> Exit:
        assert self._exit is not None, "it has lived"
        return self._exit

    # -- what it says ------------------------------------------------------------------------------------

    async def _read(
        self,
        channel: Channel,
        scope: anyio.CancelScope,
        has_read: anyio.Event,
        started: Callable[[], None],
    ) -> None:
        """Hears it, until its supervisor has no more use for that."""
        try:
            with scope:
                while True:
                    try:
                        message = await channel.receive()
                    except Incomplete as error:
                        self._incomplete(error)
                        continue
                    if message is None:
                        return  # its supervisor will hear of its end
                    self._heard(channel, message, started)
        except Exception as error:
            # It does not say what it should, or that can't be taken here: there is no way to go on.
            self._confusion = error
            if self.worker is not None:
                _native.kill(self.worker._key)
        finally:
            has_read.set()

    def _read_rest(self, channel: Channel) -> None:
        """What it had said before it ended."""
        while self._confusion is None:
            try:
                message = channel.link.receive(wait=False)
            except Incomplete as error:
                self._incomplete(error)
                continue
            except OSError, ValueError:
                return
            if message is None:
                return
            if message.kind in (_calls.RETURNED, _calls.RAISED, _calls.CANCELLED, _calls.ITEM, _calls.LOG):
                try:
                    self._heard(channel, message, lambda: None)
                except Exception as error:
                    self._confusion = error

    def _incomplete(self, error: Incomplete) -> None:
        call = self._calls.get(error.number)
        if call is None:
            return
        if error.kind == _calls.ITEM and call.stream is not None:
            call.stream.arrived(error)
        else:
            call.settle(error)
            if call is self._only_call:
                self.forget(call)
                self._leave()

    def _heard(self, channel: Channel, message: Message, started: Callable[[], None]) -> None:
        number = message.number
        match message.kind:
            case _calls.HELLO if not self._is_told:
                self._is_told = True
                if not channel.try_send(Datagram(_calls.SPEC, 0, 0.0, Packed(self._spec()))):
                    raise ValueError("its first word, and does not take the answer")
            case _calls.READY if self._is_told and not self._up.is_set():
                self._patience.deadline = math.inf
                self._up.set()
                if self._only is not None:
                    self._begin_only(channel)
                elif self._is_to_leave:
                    self._leave()
                started()
            case _calls.RAISED if number == 0 and self._is_told and not self._up.is_set():
                _, self._boot_error = _remote.answer(message.content, returned=False)
                assert self._boot_error is not None
                self._boot_error.add_note(f"raised while actor {self.name!r} started")
            case _calls.RETURNED | _calls.RAISED | _calls.CANCELLED:
                call = self._calls.get(number)
                if call is None or call.done.is_set():
                    raise ValueError("an answer that nobody has asked for")
                call.settle(message)
                if call is self._only_call:
                    self.forget(call)
                    self._leave()
            case _calls.ITEM | _calls.CREDIT | _calls.END | _calls.CLOSED:
                if (call := self._calls.get(number)) is not None and call.stream is not None:
                    call.stream.arrived(message)
            case _calls.LOG:
                _logs.take(message, "actor", self.name)
            case kind:
                raise ValueError(f"a message of kind {kind}, which is not expected from an actor")

    def _spec(self) -> dict[str, Any]:
        options = self._options
        return {
            "name": self.name,
            "path": (*_actor.current_actor().path, self.name),
            "backend": resolve_backend(options.backend),
            "runtime": self._runtime,
            "budget": options.cancel_timeout if options.ladder is None else options.ladder.get("cancel", 0.0),
            "log_level": options.log_level,
            "modules": self._modules,
            "main": main_module() if "__main__" in self._modules and not self._has_our_main() else None,
        }

    def _has_our_main(self) -> bool:
        return has_our_main(resolve_backend(self._options.backend))

    # -- calls -------------------------------------------------------------------------------------------

    def _next_call(self) -> _Call:
        self._number += 1
        call = _Call(self._number)
        self._calls[call.number] = call
        return call

    def _begin_only(self, channel: Channel) -> None:
        assert self._only is not None
        target, main = self._only
        call = self._only_call = self._next_call()
        try:
            datagrams = self._datagrams(channel.link, _calls.CALL, call, target, main, math.inf)
        except OSError as error:  # no memory or descriptor here
            call.settle(error)
            self.forget(call)
            self._leave()
            return
        try:
            if not all(channel.try_send(datagram) for datagram in datagrams):
                raise ValueError("its first word, and takes no call")
        finally:
            for datagram in datagrams:
                datagram.close()

    def _datagrams(
        self, link: Link, kind: int, call: _Call, target: Target, main: list[str] | None, seconds: float
    ) -> list[Datagram]:
        made = []
        if main is not None and not self._main_sent and not self._has_our_main():
            made.append(Datagram(_calls.MAIN, 0, 0.0, Packed(main)))
        made.append(Datagram(kind, call.number, seconds, target.packed, target.passed, link))
        return made

    async def begin(
        self, kind: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Call:
        """Sends a call, when it can be called."""
        self._core.check_here()
        _check_callable(function)
        if kind == _calls.OPEN and self._turn is not None:
            raise TypeError(f"actor {self.name!r} has no event loop (runtime='sync'), and so no streams")
        target, main = call_of(function, args, kwargs)
        await anyio.lowlevel.checkpoint_if_cancelled()
        if self._turn is not None:
            await self._turn.acquire()
        try:
            while self._channel is None or not self._up.is_set():
                if self._over.is_set():
                    raise self._gone()
                await self._up.wait()
            if self._is_leaving:
                raise RuntimeError(f"actor {self.name!r} is leaving: there is nothing more for it to do")
            channel = self._channel
            call = self._next_call()
            call.has_turn = self._turn is not None
            if kind == _calls.OPEN:
                call.stream = Stream(channel, call.number, call, self._core.check_here)
            seconds = anyio.current_effective_deadline() - anyio.current_time()
            datagrams: list[Datagram] = []
            try:
                datagrams = self._datagrams(channel.link, kind, call, target, main, seconds)
                for datagram in datagrams:
                    await channel.send(datagram)
                    self._main_sent |= datagram.kind == _calls.MAIN
            except ConnectionError:
                pass  # its end is about to be found out, and told to all calls
            except BaseException:
                call.has_turn = False
                call.done.set()  # before it has begun
                self.forget(call)
                raise
            finally:
                for datagram in datagrams:
                    datagram.close()
        except BaseException:
            if self._turn is not None:
                self._turn.release()
            raise
        return call

    async def finish(self, call: _Call) -> Any:
        """Waits for what the call comes to."""
        try:
            await call.done.wait()
        except BaseException as error:
            await self.stop(call)
            if isinstance(error, anyio.get_cancelled_exc_class()):
                call.check_raised()
            raise
        finally:
            self.forget(call)
        if isinstance(call.failure, TimeoutError):
            # If it is the deadline of the caller, that is what he is to be told.
            await anyio.lowlevel.checkpoint()
        return await call.wait()

    async def stop(self, call: _Call) -> None:
        """Has it end, and waits until it has; if it does not in time, its actor is killed.

        That is seen to by a task of the nursery's: asyncio can cancel the caller once more, shield or not.
        """
        if call.done.is_set():
            return
        if not call.is_being_stopped:
            call.is_being_stopped = True
            self._core.tasks.start_soon(self._see_off, call, name=f"actor {self.name}: stop a call")
        with anyio.CancelScope(shield=True):
            await call.done.wait()

    async def _see_off(self, call: _Call) -> None:
        with anyio.CancelScope(shield=True):
            if self._turn is None and self._channel is not None and not call.done.is_set():
                with anyio.move_on_after(self._options.cancel_timeout) as call.patience:
                    with contextlib.suppress(ConnectionError):  # its supervisor will settle all calls
                        await self._channel.send(Datagram(_calls.CANCEL, call.number))
                    await call.done.wait()
            if not call.done.is_set():
                self._is_ended |= self._end(deaf=self._turn is None)
                await call.done.wait()
        if call.is_forgotten:
            self.forget(call)

    def forget(self, call: _Call) -> None:
        """Nobody waits for it any more. One that is being stopped is kept until it has ended."""
        if not call.done.is_set():
            call.is_forgotten = True
            return
        if self._turn is not None and call.has_turn:
            call.has_turn = False
            self._turn.release()
        self._calls.pop(call.number, None)
        if self._is_to_leave and self._only is None and not self._calls:
            self._leave()

    # -- its end -----------------------------------------------------------------------------------------

    def leave_when_idle(self) -> None:
        """Nobody will call it any more."""
        self._is_to_leave = True
        if self._only is None:
            self._pause.cancel()
            if not self._calls and self._up.is_set():
                self._leave()

    def _leave(self) -> None:
        """Lets it go."""
        if self._is_leaving or self._channel is None:
            return
        self._is_leaving = True
        with contextlib.suppress(OSError):  # it has gone already
            self._channel.link.socket.shutdown(socket.SHUT_WR)
        self._patience.deadline = anyio.current_time() + self._options.cancel_timeout

    def kill(self) -> None:
        """Has it ended for good, by its ladder."""
        self._is_unwanted = True
        self._pause.cancel()
        self._end()

    def _end(self, *, deaf: bool = False) -> bool:
        """Ends this life of it, if that has not ended; without asking once more if it is deaf."""
        if self.worker is None or self.worker.exit is not None:
            return False
        (_native.kill_deaf if deaf else _native.kill)(self.worker._key)
        return True

    async def cancel(self) -> Exit:
        self._core.check_here()
        await anyio.lowlevel.checkpoint_if_cancelled()
        self.kill()
        await self._over.wait()
        return self._how()

    async def result(self) -> Any:
        self._core.check_here()
        await self._over.wait()
        if self._error is not None:
            raise anew(self._error)
        call = self._only_call
        if call is not None and call.done.is_set():
            return await call.wait()
        if self._is_unwanted or self._is_ended:
            raise self._gone()
        return None

    def _gone(self) -> BaseException:
        if isinstance(self._error, WorkerError):
            return anew(self._error)
        if self._last_death is not None:
            return anew(self._last_death)
        return RuntimeError(f"actor {self.name!r} was never started")
