"""What an actor and its nursery do alike in an event loop: messages, streams, and calls of what blocks.

By anyio, so that there is one of each for trio and asyncio.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copy
import errno
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol, final

try:
    import anyio
    import anyio.abc
    import anyio.lowlevel
except ImportError as error:
    raise ImportError(
        "tractor_host's nurseries need anyio: pip install 'tractor-host[nursery]'", name="anyio"
    ) from error

from tractor_host import _calls, _native, _remote
from tractor_host._calls import Datagram, Incomplete, Link, Message
from tractor_host._errors import Cancelled, WorkerError
from tractor_host._parcel import Packed

if TYPE_CHECKING:
    from collections.abc import Awaitable

__all__ = ["Stream"]

#: So many messages in a row are read before others get their turn.
_BATCH: Final = 64
#: So many items of a stream are on their way, or wait for their receiver, at most.
WINDOW: Final = 64
#: Seconds that a thread waits for another call.
_IDLE: Final = 10.0


#: What goes before all else that waits for room: the other end waits for it, or would be ended for not
#: having heard it. None of it has to come after what was to be sent before.
_URGENT: Final = frozenset({_calls.CANCEL, _calls.CREDIT})


class _Sender:
    """One who waits until what he has to say can be sent."""

    __slots__ = ("kind", "turn")

    def __init__(self, kind: int) -> None:
        self.kind = kind
        #: Set when he may look again.
        self.turn = anyio.Event()


class Channel:
    """One end of the way between an actor and its nursery."""

    def __init__(self, link: Link) -> None:
        link.socket.setblocking(False)
        self.link = link
        #: Those who have something to send that there was no room for, in their order.
        self._queue: collections.deque[_Sender] = collections.deque()
        #: Whether one of them waits for room.
        self._is_watched = self._is_closed = False
        self._in_a_row = 0
        #: What who waits for a message wakes up by.
        self._nap: anyio.CancelScope | None = None

    def try_send(self, datagram: Datagram) -> bool:
        """Sends it and closes it, if there is room just now; whether there was.

        Raises:
            OSError: There is nobody at the other end (EPIPE, ECONNRESET), or no memory left.
        """
        try:
            if self._is_closed:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            datagram.send(self.link.socket)
        except BlockingIOError:
            return False
        except BaseException:
            datagram.close()
            raise
        datagram.close()
        self._wake_to_trim()
        return True

    async def send(self, datagram: Datagram) -> None:
        """Sends it, when there is room, and closes it. Cancelled: it was not sent.

        After all those who wait already, but for what has to be heard in time: that goes before them.

        Raises:
            OSError: As for `try_send`; EPIPE, too, when it is closed here meanwhile.
        """
        try:
            if (datagram.kind in _URGENT or not self._queue) and self.try_send(datagram):
                return
            await self._send_in_turn(datagram)
        finally:
            datagram.close()

    async def _send_in_turn(self, datagram: Datagram) -> None:
        me = _Sender(datagram.kind)
        if me.kind in _URGENT:
            self._queue.insert(sum(sender.kind in _URGENT for sender in self._queue), me)
        else:
            self._queue.append(me)
        try:
            while True:
                if self._queue[0] is not me or self._is_watched:
                    await me.turn.wait()
                    me.turn = anyio.Event()
                elif self.try_send(datagram):
                    return
                else:
                    await self._room()
        finally:
            self._queue.remove(me)
            self._call_next()

    async def _room(self) -> None:
        """Waits for room; it may be for somebody else, who has come meanwhile and goes before."""
        self._is_watched = True
        try:
            with contextlib.suppress(anyio.ClosedResourceError):  # which `try_send` tells
                await anyio.wait_writable(self.link.socket)
        finally:
            self._is_watched = False
            self._call_next()

    def _call_next(self) -> None:
        if self._queue:
            self._queue[0].turn.set()

    def close(self) -> None:
        """Lets the other end know that nothing more will come; who waits for room here is told, too."""
        if not self._is_closed:
            self._is_closed = True
            anyio.notify_closing(self.link.socket)
            self.link.close()

    async def receive(self) -> Message | None:
        """The next message; `None` when there is nobody at the other end any more.

        Raises:
            Incomplete, ValueError: As for `Link.receive`.
        """
        self._in_a_row += 1
        if self._in_a_row >= _BATCH:
            self._in_a_row = 0
            await anyio.lowlevel.checkpoint()
        while True:
            try:
                return self.link.receive(wait=False)
            except BlockingIOError:
                self._in_a_row = 0
                await self._wait()
            except ConnectionResetError:
                return None

    async def _wait(self) -> None:
        """Until something comes; meanwhile frees what was kept for long enough."""
        while True:
            with anyio.CancelScope() as self._nap:
                self._wake_to_trim()
                return await anyio.wait_readable(self.link.socket)

    def _wake_to_trim(self) -> None:
        due = self.link.trim()
        if due is not None and self._nap is not None:
            self._nap.deadline = anyio.current_time() + max(0.0, due - _native.clock())


#: What a thread carries out. It calls what it is given before it tells that it has.
_Job = Callable[[Callable[[], None]], None]


@final
class Threads:
    """Threads for an actor's calls: one that has carried out a call waits for the next one, for some time.

    An interrupt between two instructions can have one wait in vain for as long, and no call be lost.
    """

    def __init__(self) -> None:
        #: Who becomes idle last is taken first. One that was taken may still be there.
        self.idle: list[_Turn] = []
        self.is_closed = False

    def start(self, job: _Job, name: str) -> None:
        """Has one carry it out.

        Raises:
            RuntimeError: There is no thread to be had.
        """
        while True:
            try:
                turn = self.idle[-1]
            except IndexError:
                _Hand(self, job, name).start()
                return
            call = (job, name)
            is_ours = turn.taken.setdefault(None, call) is call
            self._unlist(turn)
            if is_ours:
                turn.is_over.release()
                return

    def retire(self, turn: _Turn) -> tuple[_Job, str] | None:
        """What it was taken for; if it was not, it can't be any more."""
        call = turn.taken.setdefault(None, None)
        self._unlist(turn)
        return call

    def _unlist(self, turn: _Turn) -> None:
        with contextlib.suppress(ValueError):  # somebody else has seen that it was taken
            self.idle.remove(turn)

    def close(self) -> None:
        """No thread is left when this returns, but for those that are carrying out something."""
        self.is_closed = True
        while True:
            try:
                turn = self.idle.pop()
            except IndexError:
                return
            if self.retire(turn) is None:
                turn.is_over.release()
                turn.hand.join()


class _Turn:
    """A thread waits for a call; whoever comes first says which, or that there is none."""

    __slots__ = ("hand", "is_over", "taken")

    def __init__(self, hand: _Hand) -> None:
        self.hand = hand
        self.taken: dict[None, tuple[_Job, str] | None] = {}
        self.is_over = threading.Lock()
        self.is_over.acquire()


class _Hand(threading.Thread):
    """One of the threads."""

    def __init__(self, threads: Threads, job: _Job, name: str) -> None:
        super().__init__(name=name)
        self._threads = threads
        self._turn = _Turn(self)
        self._turn.taken[None] = (job, name)
        self._turn.is_over.release()

    def run(self) -> None:
        while (call := self._next()) is not None:
            job, self.name = call
            # As a thread of its own would have it.
            inherits = sys.flags.thread_inherit_context
            context = contextvars.copy_context() if inherits else contextvars.Context()
            context.run(job, self._rest)
            del call, job, context

    def _rest(self) -> None:
        self.name = "th-idle"
        self._turn = _Turn(self)
        self._threads.idle.append(self._turn)

    def _next(self) -> tuple[_Job, str] | None:
        """What there is to do; `None` if it has waited for long enough."""
        turn = self._turn
        turn.is_over.acquire(timeout=0 if self._threads.is_closed else _IDLE)
        return self._threads.retire(turn)


async def in_thread[T](
    function: Callable[[], T],
    *,
    name: str,
    on_cancel: Callable[[], object] | None = None,
    threads: Threads | None = None,
) -> T:
    """Calls it on one of the threads, or else on one of its own, which has ended when this returns.

    Where the caller is cancelled, `on_cancel` is called, and the function is waited for all the same.

    Raises:
        OSError: There is no thread or descriptor to be had.
        Exception: What it raises.
    """
    outcome: list[Callable[[], T]] = []
    to_call: list[Callable[[], T]] = [function]
    del function
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def run(rest: Callable[[], None] | None = None) -> None:
        try:
            value = to_call[0]()
            outcome.append(lambda: value)
        except BaseException as error:
            raised = error
            outcome.append(lambda: _reraise(raised))
        finally:
            to_call.clear()
            if rest is not None:
                rest()
            os.eventfd_write(event, 1)

    thread = threading.Thread(target=run, name=name) if threads is None else None
    try:
        try:
            if threads is not None:
                threads.start(run, name)
            elif thread is not None:
                thread.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, f"{os.strerror(errno.EAGAIN)}: {error}") from error
        try:
            await anyio.wait_readable(event)
        except BaseException:
            if on_cancel is not None:
                on_cancel()
            with anyio.CancelScope(shield=True):
                await anyio.wait_readable(event)
            if thread is not None:
                thread.join()
            with contextlib.suppress(Cancelled):  # which is how it obeys
                outcome[0]()
            raise
        if thread is not None:
            thread.join()
        return outcome[0]()
    finally:
        outcome.clear()
        os.close(event)


def _reraise(error: BaseException) -> Any:
    raise error


def anew(error: BaseException) -> BaseException:
    """What is raised not for the first time, maybe: without the frames of those who were told before.

    Of a death, each has a copy of his own.
    """
    if not isinstance(error, WorkerError):
        return error.with_traceback(None)
    made = copy.copy(error)
    made.__cause__, made.__suppress_context__ = error.__cause__, error.__suppress_context__
    if "__notes__" in made.__dict__:
        made.__notes__ = [*made.__notes__]
    return made


class Ending(Protocol):
    """What a stream belongs to: a call."""

    @property
    def failure(self) -> BaseException | None:
        """What it has failed with."""
        ...

    def wait(self) -> Awaitable[Any]:
        """Waits for what it returns."""
        ...


@final
class Stream(anyio.abc.ObjectStream[Any]):
    """Both ends of what `Portal.open_stream` opens: objects that go either way, in order, while a call runs.

    An object is pickled when it is sent. At most 64 of them wait for their receiver; then `send` waits.
    Iterating ends, and `receive` raises `anyio.EndOfStream`, when the other end will send no more: it has
    said so (`send_eof`), was closed, or its function has returned. Where that has failed, its exception is
    raised. The end that `open_stream` returns is for the event loop of its nursery: elsewhere, all of this
    raises `RuntimeError`.
    """

    def __init__(
        self,
        channel: Channel,
        number: int,
        call: Ending | None,
        check_here: Callable[[], None] = lambda: None,
    ) -> None:
        self._check_here = check_here
        self._channel = channel
        self._number = number
        self._call = call
        self._items: collections.deque[Message | Incomplete] = collections.deque()
        #: So many more may be sent, and so many were taken for which no others were asked for yet.
        self._credit = WINDOW
        self._taken = 0
        #: Set, and replaced, when any of this changes.
        self._news = anyio.Event()
        #: Nothing more will come; nobody takes what is sent.
        self._is_over = self._is_deaf = False
        #: No more is sent from here, or taken.
        self._has_ended = self._is_closed = False

    # -- for its owner -----------------------------------------------------------------------------------

    def arrived(self, message: Message | Incomplete) -> None:
        """Takes in what has come for it."""
        match message.kind:
            case _calls.ITEM if not self._is_closed:
                self._items.append(message)
            case _calls.CREDIT if isinstance(message, Message):
                self._credit += int(message.value)
            case _calls.END:
                self._is_over = True
            case _calls.CLOSED:
                self._is_over = self._is_deaf = True
        self._tell()

    def finish(self) -> None:
        """The call is over."""
        self._is_over = self._is_deaf = True
        self._tell()

    @property
    def is_deserted(self) -> bool:
        """Whether nobody takes what is sent."""
        return self._is_deaf

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    # -- for people --------------------------------------------------------------------------------------

    async def send(self, item: Any) -> None:
        """Sends an object, when there is room for it.

        Raises:
            anyio.ClosedResourceError: The stream was closed here, or `send_eof` was called.
            anyio.BrokenResourceError: Nobody takes it: the other end was closed, or the call is over.
            Exception: It can't be pickled.
        """
        self._check_here()
        packed = Packed(item)
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._check_sending()
        while self._credit <= 0:
            await self._news.wait()
            self._check_sending()
        self._credit -= 1
        try:
            await self._channel.send(
                Datagram(_calls.ITEM, self._number, 0.0, packed, link=self._channel.link)
            )
        except ConnectionError as error:
            raise anyio.BrokenResourceError from error
        except BaseException:
            self._credit += 1
            raise

    def _check_sending(self) -> None:
        if self._has_ended:
            raise anyio.ClosedResourceError
        if self._is_deaf:
            raise anyio.BrokenResourceError

    async def receive(self) -> Any:
        """The next object.

        Raises:
            anyio.ClosedResourceError: The stream was closed here.
            anyio.EndOfStream: There will be none.
            Exception: What the function at the other end has raised; or what unpickling it raises.
        """
        self._check_here()
        await anyio.lowlevel.checkpoint_if_cancelled()
        while not self._items:
            if self._is_closed:
                raise anyio.ClosedResourceError
            if self._is_over:
                raise self._end()
            if self._taken:
                taken = self._taken
                await self._tell_peer(Datagram(_calls.CREDIT, self._number, taken))
                self._taken -= taken
            else:
                await self._news.wait()
        message = self._items.popleft()
        if isinstance(message, Incomplete):
            raise message
        self._taken += 1
        # Nothing is waited for from here on: the object would be lost if that were cancelled.
        if self._taken >= WINDOW // 2 and not self._is_deaf:
            try:
                if self._channel.try_send(Datagram(_calls.CREDIT, self._number, self._taken)):
                    self._taken = 0
            except ConnectionError:
                self._is_deaf = True
        good, value = _remote.answer(message.content, returned=True)
        if not good:
            raise value
        return value

    def _end(self) -> BaseException:
        failure = None if self._call is None else self._call.failure
        return anyio.EndOfStream() if failure is None else anew(failure)

    async def _tell_peer(self, datagram: Datagram) -> None:
        try:
            await self._channel.send(datagram)
        except ConnectionError:
            self._is_over = self._is_deaf = True

    async def send_eof(self) -> None:
        """Says that nothing more will be sent; what the other end sends can still be received."""
        self._check_here()
        await anyio.lowlevel.checkpoint_if_cancelled()
        if not self._has_ended:
            self._has_ended = True
            if not self._is_deaf:
                await self._tell_peer(Datagram(_calls.END, self._number))

    async def aclose(self) -> None:
        """Neither sends nor takes any more; may be called again."""
        self._check_here()
        if self._is_closed:
            return
        self._is_closed = self._has_ended = True
        self._items.clear()
        self._tell()
        if not self._is_deaf:
            await self._tell_peer(Datagram(_calls.CLOSED, self._number))

    async def result(self) -> Any:
        """What the function returns; for whoever has opened the stream.

        Raises:
            Exception: What it raises.
            RuntimeError: This is the other end.
        """
        if self._call is None:
            raise RuntimeError("the result of a stream's function is for whoever has opened the stream")
        self._check_here()
        return await self._call.wait()
