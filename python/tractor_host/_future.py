"""The futures of `tractor_host.Executor`: no interrupt can leave one locked, because they have no lock.

The `KeyboardInterrupt` of a Ctrl-C rises between two instructions of the main thread: also between the two
steps of `with lock:` (CPython 3.14 can do that at any such block, gh-148874, and a `threading.Condition` is
entered and left by Python code), and in the middle of what a lock guards. Whoever needs that lock then waits
for ever: the thread of a pool would, with all its tasks.

So everything that counts here is one call of a method of `dict`, `list`, `deque` or `SimpleQueue`. Those are
in C, run no Python code, and keep the GIL: they have happened, or they have not. After each of them the whole
is right, and what an interrupted caller has not come to is done by the pool's thread, which gets no signals.
Who has to wait sleeps on a lock of his own, which others only ever release.
"""

from __future__ import annotations

import _thread
import concurrent.futures
import functools
import queue
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, InvalidStateError
from concurrent.futures._base import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    LOGGER,
    PENDING,
    RUNNING,
)
from typing import Any, Final, NoReturn, Protocol, final

#: What a future's fate can be.
_CANCEL: Final = "cancel"
_TELL: Final = "tell"
#: `wait` and `as_completed` count these as done.
_NOTED: Final = (FINISHED, CANCELLED_AND_NOTIFIED)
#: Seconds: longer than anybody waits, and short enough for every clock.
_LONGEST: Final = 1e9


@final
class Signal:
    """Happens once. As `threading.Event`, without its lock."""

    __slots__ = ("_sleepers", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._sleepers: list[_thread.LockType] = []

    def set(self) -> None:
        """May be done again, and by several at once: by whoever stands in for one who was interrupted."""
        self.is_set = True
        for sleeper in self._sleepers.copy():
            try:
                sleeper.release()
            except RuntimeError:
                continue  # it is awake

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it has happened within so many seconds."""
        if self.is_set:
            return True
        sleeper = _thread.allocate_lock()
        sleeper.acquire()
        self._sleepers.append(sleeper)
        # From here on it is seen by `set`, or sees what that has done.
        try:
            if not self.is_set:
                if timeout is None:
                    sleeper.acquire()
                elif timeout > 0:
                    sleeper.acquire(True, min(timeout, _LONGEST))
        finally:
            self._sleepers.remove(sleeper)
        return self.is_set


class Request:
    """Somebody's `Future.cancel`, which the pool sees to as well."""

    __slots__ = ("future", "is_over", "seen")

    def __init__(self, future: Future[Any]) -> None:
        self.future = future
        #: Whether who has asked for it has come to his end with it.
        self.is_over = False
        #: When the pool has seen to it.
        self.seen = 0.0


class Canceller(Protocol):
    """What carries out what futures are of."""

    def cancel(self, request: Request) -> None:
        """Has the task not run, or not run on, soon."""
        ...

    def stop(self, future: Future[Any]) -> None:
        """Ends the worker of a task that was cancelled, if one runs it, and does not wait for anybody."""
        ...

    def check_home(self) -> None:
        """Says so, by a `RuntimeError`, where nothing will come of its tasks: in a fork of its process."""
        ...

    def is_here(self) -> bool:
        """Whether the calling thread is the one that says what has come of tasks."""
        ...


@final
class Future[T](concurrent.futures.Future[T]):
    """What `Executor.submit` returns: `cancel` also ends a task that is running.

    One thread, the pool's, says that it has begun and what has come of it.
    """

    def __init__(self, canceller: Canceller | None = None) -> None:
        # Not that of the base, which is for its locks.
        self._canceller = canceller
        #: Of PENDING, RUNNING and what is noted.
        self._stage: str = PENDING
        #: Who comes first decides, by `setdefault`, whether it is cancelled.
        self._fate: dict[None, str] = {}
        self._result: T | None = None
        self._exception: BaseException | None = None
        self._over = Signal()
        self._done_callbacks: list[Callable[[Future[T]], object]] = []

    #: Those who wait for several, where there is anybody.
    _watched: _Watched | None = None

    # -- for its owner -----------------------------------------------------------------------------------

    def claim(self) -> bool:
        """Whether it can't be cancelled from now on."""
        return self._fate.setdefault(None, _TELL) is _TELL

    def decide_to_cancel(self) -> bool:
        """Whether it is cancelled from now on."""
        return self._fate.setdefault(None, _CANCEL) is _CANCEL

    def suppose(self, *, is_running: bool) -> None:
        """Has it count as running, or not, before anybody else knows it."""
        self._stage = RUNNING if is_running else PENDING

    def wake(self) -> None:
        """Has those that wait for its result see that it is cancelled."""
        self._over.set()

    def note_cancelled(self) -> None:
        """Tells those that wait for it, now that its task does not run any more; but calls nobody back."""
        self._stage = CANCELLED_AND_NOTIFIED
        self._over.set()
        self._tell_watchers()

    def set_running_or_notify_cancel(self) -> bool:
        """Whether it is to be carried out: nobody has cancelled it."""
        if self._fate.get(None) is _CANCEL:
            self.note_cancelled()
            self._invoke_callbacks()
            return False
        if self._stage != PENDING:
            raise RuntimeError("Future in unexpected state")
        self._stage = RUNNING
        return True

    def set_result(self, result: T) -> None:
        """What came of it.

        Raises:
            InvalidStateError: It was cancelled, or is finished.
        """
        self._check_unfinished()
        self._result = result
        self._finish()

    def set_exception(self, exception: BaseException | None) -> None:
        """Why nothing came of it.

        Raises:
            InvalidStateError: As for `set_result`.
        """
        self._check_unfinished()
        self._exception = exception
        self._finish()

    def _check_unfinished(self) -> None:
        if not self.claim() or self._stage == FINISHED:
            raise InvalidStateError(f"{self._now()}: {self!r}")

    def _finish(self) -> None:
        self._stage = FINISHED
        self._over.set()
        self._tell_watchers()
        self._invoke_callbacks()

    def _tell_watchers(self) -> None:
        if self._watched is not None:
            self._watched.tell(self)

    def tell_when_over(self, waiter: Any) -> None:
        """Has `waiter.event.post(self)` called once, when the task does not run any more; at once if so."""
        waiting = self._watchers().waiting
        waiting.append(waiter)
        if self._stage in _NOTED:
            try:
                waiting.remove(waiter)
            except ValueError:
                return  # it was told
            waiter.event.post(self)

    def call_back(self) -> None:
        """Calls those that were not called yet."""
        self._invoke_callbacks()

    def _invoke_callbacks(self) -> None:
        while True:
            try:
                callback = self._done_callbacks.pop(0)
            except IndexError:
                return
            self._call(callback)

    def _call(self, callback: Callable[[Future[T]], object]) -> None:
        try:
            callback(self)
        except BaseException as error:
            # The pool's thread is not the callback's to end, by sys.exit() say.
            is_ours = self._canceller is not None and self._canceller.is_here()
            if not isinstance(error, Exception) and not is_ours:
                raise
            LOGGER.exception("exception calling callback for %r", self)

    def _now(self) -> str:
        """Its state."""
        stage = self._stage
        if stage not in _NOTED and self._fate.get(None) is _CANCEL:
            return CANCELLED
        return stage

    # -- for people --------------------------------------------------------------------------------------

    def cancel(self) -> bool:
        """Has the task not run, or not run on; whether that is so.

        The worker of a task that is running is ended by its ladder, and replaced; nothing else is touched.
        `result` raises `CancelledError` from now on. `concurrent.futures.wait` and `as_completed` count it as
        done when the worker is gone.
        """
        if self._stage in _NOTED or self._fate.get(None) is _TELL:
            return self._stage == CANCELLED_AND_NOTIFIED
        # The pool does all of this too, if this thread is interrupted.
        request = Request(self)
        if self._canceller is not None:
            self._canceller.cancel(request)
        is_cancelled = self.decide_to_cancel()
        if is_cancelled:
            self._over.set()
            if self._canceller is not None and self._stage == RUNNING:
                self._canceller.stop(self)
            self._invoke_callbacks()
        request.is_over = True
        return is_cancelled

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._fate.get(None) is _CANCEL

    def running(self) -> bool:
        """Whether its task is carried out just now."""
        return self._now() == RUNNING

    def done(self) -> bool:
        """Whether it was cancelled or is finished."""
        return self._stage == FINISHED or self._fate.get(None) is _CANCEL

    def __reduce__(self) -> NoReturn:
        raise TypeError("the Future of an Executor cannot be pickled or copied: it is of this process")

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Has `fn(future)` called when it is done, by whoever finishes it; at once if it is."""
        if not self.done():
            # An object of its own, that is equal to no other.
            callback = functools.partial(fn)
            self._done_callbacks.append(callback)
            if not self.done():
                return
            try:
                self._done_callbacks.remove(callback)
            except ValueError:
                return  # whoever has finished it meanwhile calls it
        self._call(fn)

    def result(self, timeout: float | None = None) -> T:
        """What the call returns.

        Raises:
            CancelledError: It was cancelled.
            TimeoutError: It was not finished within so many seconds.
            RuntimeError: It was not when this process was forked, by `os.fork()` say, from the pool's.
            Exception: What the call raised.
        """
        try:
            if not self._has_finished(timeout):
                raise TimeoutError
            if self._exception is not None:
                raise self._exception
            return self._result  # type: ignore[return-value]
        finally:
            # The exception would refer to itself by way of this frame.
            self = None  # type: ignore[assignment]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the call raises; `None` if it returns.

        Raises:
            CancelledError, TimeoutError: As for `result`.
        """
        if not self._has_finished(timeout):
            raise TimeoutError
        return self._exception

    def _has_finished(self, timeout: float | None) -> bool:
        if not self._over.is_set and not self.done():
            if self._canceller is not None:
                self._canceller.check_home()
            self._over.wait(timeout)
        if self._stage == FINISHED:
            return True
        if self.cancelled():
            raise CancelledError
        return False

    # -- for `concurrent.futures.wait` and `as_completed` ------------------------------------------------

    def _watchers(self) -> _Watched:
        found: _Watched = self.__dict__.setdefault("_watched", _Watched())
        return found

    @property
    def _condition(self) -> _Look:  # type: ignore[override]
        return _Look(self)

    @property
    def _state(self) -> str:  # type: ignore[override]
        watched = self._watched
        shown = None if watched is None else watched.shown.get(_thread.get_ident())
        return shown[-1] if shown else self._now()

    @property
    def _waiters(self) -> _Waiters:  # type: ignore[override]
        return _Waiters(self)


class _Watched:
    """Who waits for a future, among others."""

    __slots__ = ("shown", "waiting")

    def __init__(self) -> None:
        #: The states that threads are shown while they look, the last one last. What an interrupted one has
        #: left there does no harm: it is shown another one when it looks again.
        self.shown: dict[int, list[str]] = {}
        #: Those that are to be told. Who takes one out tells it.
        self.waiting: list[Any] = []

    def tell(self, future: Future[Any]) -> None:
        while True:
            try:
                waiter = self.waiting.pop(0)
            except IndexError:
                return
            waiter.event.post(future)


@final
class _Look:
    """What `wait` holds while it looks at a future: the same state is shown to it for as long."""

    __slots__ = ("_future",)

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        future = self._future
        shown = future._watchers().shown.setdefault(_thread.get_ident(), [])
        shown.append(future._now())
        return True

    def release(self) -> None:
        shown = self._future._watchers().shown
        own = _thread.get_ident()
        shown[own].pop()
        if not shown[own]:
            del shown[own]

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


@final
class _Waiters:
    """Where `wait` enters itself, while it looks."""

    __slots__ = ("_future",)

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def append(self, waiter: Any) -> None:
        future = self._future
        if not isinstance(waiter.event, _Post):
            waiter.event = _Post(waiter)
        if future._state in _NOTED:
            return  # which it has seen
        # It may have become so since it was shown.
        future.tell_when_over(waiter)

    def remove(self, waiter: Any) -> None:
        try:
            self._future._watchers().waiting.remove(waiter)
        except ValueError:
            return  # it was told, or did not need to be


@final
class _Post:
    """In the place of a waiter's event, whose lock the pool must not need: futures are put in its letter box.

    It is the thread that waits which takes them out and counts them.
    """

    __slots__ = ("_box", "_is_set", "_waiter")

    def __init__(self, waiter: Any) -> None:
        self._waiter = weakref.ref(waiter)
        self._box: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
        self._is_set = False

    def post(self, future: Future[Any]) -> None:
        self._box.put(future)

    def set(self) -> None:
        """By the waiter, once it has counted enough; futures of other executors have it do so elsewhere."""
        self._is_set = True
        self._box.put(None)

    def clear(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        until = None if timeout is None else time.monotonic() + timeout
        while not self._is_set:
            left = None if until is None else max(0.0, until - time.monotonic())
            try:
                future = self._box.get(True, left if left is None else min(left, _LONGEST))
            except queue.Empty:
                break
            waiter = self._waiter()
            if future is None or waiter is None:
                continue
            if future.cancelled():
                waiter.add_cancelled(future)
            elif future._exception is not None:
                waiter.add_exception(future)
            else:
                waiter.add_result(future)
        return self._is_set
