"""An actor's side of a nursery: it is told what it is, then carries out calls until nobody calls any more.

And what code that runs in one can ask for: who it is, and whether it is to stop.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import TYPE_CHECKING, Any, Final, final

from tractor_host import _calls, _child, _native
from tractor_host._calls import HELLO, RAISED, READY, SPEC, Datagram, Incomplete, Link, Message
from tractor_host._errors import Cancelled
from tractor_host._loaded import loaded
from tractor_host._parcel import unpack
from tractor_host._spawn import running_loop

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    import anyio.abc

    from tractor_host._aio import Channel, Stream


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Actor:
    """Who some code runs as.

    Attributes:
        name: As it was started; `"main"` for the program.
        path: The names from the program's down to its own.
        backend: What it runs on; `"host"` for the program.
        runtime: `"trio"`, `"asyncio"` or `"sync"`; `None` for the program, which may run anything.
        budget: Seconds that it is given to end by itself, with all actors below it, once it is to;
            `None` for what is no actor of a nursery.
    """

    name: str
    path: tuple[str, ...]
    backend: str
    runtime: str | None
    budget: float | None

    @property
    def parent(self) -> str | None:
        """The name of the one that started it."""
        return self.path[-2] if len(self.path) > 1 else None


_PROGRAM: Final = Actor("main", ("main",), "host", None, None)
_current = _PROGRAM


def current_actor() -> Actor:
    """Who the calling code runs as: an actor of a nursery, another worker, or the program itself.

    >>> import tractor_host as th
    >>> th.current_actor().name
    'main'
    """
    return _worker_here() if _current is _PROGRAM else _current


def _worker_here() -> Actor:
    """A pool's or `spawn`'s, or the program."""
    try:
        spec = _native.child_spec()
    except RuntimeError:
        return _PROGRAM
    runtime = spec["runtime"] or running_loop() or "sync"
    return Actor(spec["name"], (*spec["ancestors"], spec["name"]), spec["wall"], runtime, None)


class _Call(threading.local):
    """What the calling thread carries out, of an actor that runs an event loop."""

    is_cancelled: Callable[[], bool] | None = None


_call = _Call()


def check_cancelled() -> None:
    """Has sync code that runs for long, and calls this now and then, end when it is to.

    That is when its call was cancelled or is over its deadline, or when its worker is to end. Code that runs
    in no worker is never told to stop.

    Raises:
        Cancelled: It is to end. A `BaseException`, so that `except Exception` lets it through.
    """
    if _child.was_cancelled() or (_call.is_cancelled is not None and _call.is_cancelled()):
        raise Cancelled


# -- serving -------------------------------------------------------------------------------------------------


def serve_sync(socket: socket.socket) -> None:
    """The target of an actor without an event loop: one call after the other, each in its main thread."""
    link = Link(socket)
    try:
        link.send(HELLO, 0)
        message = link.receive()
        if message is not None:
            answer = _begin(link, message)
            answer.send(socket)
            if answer.kind == READY:
                _calls.serve_calls(link)
    except BrokenPipeError, ConnectionResetError:
        return  # who has asked for it is gone
    finally:
        _calls.finish_logs()
        link.close()


async def serve(socket: socket.socket) -> None:
    """The target of an actor with an event loop: as many calls at a time as there are."""
    from tractor_host._aio import Channel

    link = Link(socket)
    channel = Channel(link)
    try:
        await channel.send(Datagram(HELLO, 0))
        message = await channel.receive()
        if message is None:
            return
        answer = _begin(link, message)
        await channel.send(answer)
        if answer.kind == READY:
            serving = _Serving(channel)
            try:
                await serving.run()
            finally:
                serving.threads.close()
    except BrokenPipeError, ConnectionResetError:
        return
    finally:
        _calls.finish_logs()
        channel.close()


def _begin(link: Link, message: Message) -> Datagram:
    """It is told what it is; says what has come of that."""
    global _current
    if message.kind != SPEC:
        raise ValueError(
            f"an actor is told what it is before anything else, not a message of kind {message.kind}"
        )
    try:
        spec = unpack(message.content)
        _current = Actor(spec["name"], tuple(spec["path"]), spec["backend"], spec["runtime"], spec["budget"])
        if spec["log_level"] is not None:
            from tractor_host import _logs

            _logs.send_from_now_on(link, spec["log_level"])
        if spec["main"] is not None:
            _child.make_main(*spec["main"])
        for name in spec["modules"]:
            __import__(name)
    except Exception as error:
        return Datagram.of_bytes(RAISED, 0, _calls.dumped(error))
    return Datagram(READY, 0)


class _Serving:
    """What an actor with an event loop is carrying out."""

    def __init__(self, channel: Channel) -> None:
        from tractor_host._aio import Threads

        self.threads = Threads()
        self._channel = channel
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._streams: dict[int, Stream] = {}
        #: The streams that only generators send to.
        self._generators: set[int] = set()
        self._mains: list[bytes | memoryview] = []
        self._is_ending: Callable[[], bool] = lambda: False

    async def run(self) -> None:
        """Until nobody calls any more."""
        import anyio

        async with anyio.create_task_group() as tasks:
            self._is_ending = lambda: tasks.cancel_scope.cancel_called
            while True:
                try:
                    message = await self._channel.receive()
                except Incomplete as error:
                    await self._incomplete(error)
                    continue
                if message is None:
                    break
                self._take(message, tasks)
            # Whoever asked for what is left is gone.
            tasks.cancel_scope.cancel()

    async def _incomplete(self, error: Incomplete) -> None:
        if (stream := self._streams.get(error.number)) is not None:
            stream.arrived(error)
        elif error.kind in (_calls.CALL, _calls.OPEN):
            await self._channel.send(Datagram.of_bytes(RAISED, error.number, _calls.dumped(error)))
        else:
            raise error

    def _take(self, message: Message, tasks: anyio.abc.TaskGroup) -> None:
        import anyio

        number = message.number
        match message.kind:
            case _calls.CALL | _calls.OPEN:
                if number in self._scopes:
                    raise ValueError(f"call {number} came twice")
                self._scopes[number] = anyio.CancelScope()
                if message.kind == _calls.OPEN:
                    from tractor_host._aio import Stream

                    self._streams[number] = Stream(self._channel, number, None)
                tasks.start_soon(self._carry_out, message)
            case _calls.CANCEL:
                if (scope := self._scopes.get(number)) is not None:
                    scope.cancel()
            case _calls.ITEM | _calls.CREDIT | _calls.END | _calls.CLOSED:
                # One that is over has nobody to take it.
                if (stream := self._streams.get(number)) is not None:
                    stream.arrived(message)
                    if message.kind == _calls.CLOSED and number in self._generators:
                        self._scopes[number].cancel()
            case _calls.MAIN:
                self._mains = [message.content]
            case kind:
                raise ValueError(f"an actor is not sent messages of kind {kind}")

    async def _carry_out(self, message: Message) -> None:
        import anyio

        number = message.number
        scope, stream = self._scopes[number], self._streams.get(number)
        scope.deadline = anyio.current_time() + message.value
        cancelled = anyio.get_cancelled_exc_class()
        answer: Datagram | None = None
        try:
            with scope:
                value = await self._perform(message, scope, stream)
                packed = _calls.packed_result(value)
                answer = Datagram(_calls.RETURNED, number, 0.0, packed, link=self._channel.link)
            if answer is None:
                answer = Datagram(_calls.CANCELLED, number)
        except BaseException as error:
            if isinstance(error, cancelled) and not self._is_its_own(error):
                raise
            if isinstance(error, BaseExceptionGroup):
                # What it has raised beside being cancelled, with all that is here, is told.
                _, rest = error.split(cancelled)
                if rest is None:
                    raise
                error = rest
            if isinstance(error, Cancelled) and _child.was_cancelled():
                raise
            has_left = stream is not None and stream.is_deserted
            is_over = scope.cancel_called or anyio.current_time() >= scope.deadline
            if (isinstance(error, anyio.BrokenResourceError) and has_left) or (
                isinstance(error, Cancelled) and is_over
            ):
                # It had more to say to somebody who has left, or was told so by `check_cancelled`.
                answer = Datagram(_calls.CANCELLED, number)
            else:
                answer = Datagram.of_bytes(RAISED, number, _calls.dumped(error))
        finally:
            del self._scopes[number]
            self._generators.discard(number)
            if self._streams.pop(number, None) is not None and stream is not None:
                stream.finish()
        try:
            with anyio.CancelScope(shield=True):
                await self._channel.send(answer)
        except BrokenPipeError, ConnectionResetError:
            return  # which is found out by whoever reads
        except OSError as error:
            # The answer could not be sent: that one is short.
            await self._channel.send(Datagram.of_bytes(RAISED, number, _calls.dumped(error)))

    def _is_its_own(self, error: BaseException) -> bool:
        """Whether a call was left with asyncio's `CancelledError` though nobody has cancelled it.

        It has waited for something else that was.
        """
        asyncio = loaded("asyncio")
        if asyncio is None or not isinstance(error, asyncio.CancelledError):
            return False
        task = asyncio.current_task()
        return not (_child.was_cancelled() or self._is_ending() or task is None or task.cancelling())

    async def _perform(self, message: Message, scope: anyio.CancelScope, stream: Stream | None) -> Any:
        import inspect

        function, args, kwargs = _calls.unpacked(message, self._mains)
        if stream is not None:
            if inspect.isasyncgenfunction(function):
                self._generators.add(message.number)
                if stream.is_deserted:
                    return None
                return await _stream_out(function(*args, **kwargs), stream)
            if not _child.is_async(function):
                raise TypeError(
                    f"{_name_of(function)} is no async function: open_stream is for an async function whose "
                    "first argument is the stream, or for an async generator function"
                )
            return await function(stream, *args, **kwargs)
        if inspect.isasyncgenfunction(function):
            raise TypeError(f"{_name_of(function)} is an async generator function: that is for open_stream")
        if _child.is_async(function):
            return await function(*args, **kwargs)
        return await self._in_thread(function, args, kwargs, scope)

    async def _in_thread(self, function: Any, args: Any, kwargs: Any, scope: anyio.CancelScope) -> Any:
        import anyio

        from tractor_host._aio import in_thread

        late = time.monotonic() + scope.deadline - anyio.current_time()
        to_stop = threading.Event()

        def call() -> Any:
            _call.is_cancelled = lambda: to_stop.is_set() or time.monotonic() >= late
            try:
                return function(*args, **kwargs)
            finally:
                _call.is_cancelled = None

        name = f"call:{_name_of(function)}"
        return await in_thread(call, name=name, on_cancel=to_stop.set, threads=self.threads)


async def _stream_out(generator: Any, stream: Stream) -> None:
    from contextlib import aclosing

    async with aclosing(generator):
        async for item in generator:
            await stream.send(item)


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)
