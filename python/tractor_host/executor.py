"""A pool of workers as a `concurrent.futures.Executor`: `tractor_host.Executor`.

The executor, its futures and one thread share a `_Pool`. Whoever submits sends the call to an idle worker at
once; the thread hears the answers, starts workers and buries them. Each worker has a socket of its own, so
that none can hold up another one, whatever becomes of it.

There is no lock, for the reasons in `_future`: a Ctrl-C may interrupt a caller between any two instructions,
and the garbage collector may have one close the pool. What the pool is, its thread alone changes. Everybody
else leaves something in its inbox and rings, or takes an idle worker's turn; either is one call in C. What he
was interrupted in before he had sent it, the thread sends: it may come twice, and is carried out once.

What the thread calls of the user's (done-callbacks, what unpickles results) can hold it up, and no exception
of that ends it. So who cancels a task that runs, or kills the workers, has them ended himself: a turn is a
worker's last one if he says so before the thread gives it the next. Time limits are kept by the supervisor.
"""

from __future__ import annotations

import _thread
import collections
import concurrent.futures
import contextlib
import functools
import itertools
import os
import select
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, InvalidStateError
from concurrent.futures._base import LOGGER
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, final

# `_share` is for `_target`, which would import it while a task is submitted: a Ctrl-C in the middle of that
# can leave a lock of importlib's taken.
from tractor_host import _calls, _logs, _native, _remote, _share  # noqa: F401
from tractor_host._by_value import ByValue
from tractor_host._child import check_main_is_made
from tractor_host._errors import RemoteError, TaskTimeout, WorkerDied
from tractor_host._future import Future, Request, Signal
from tractor_host._parcel import Packed
from tractor_host._remote import RemoteTraceback
from tractor_host._spawn import check_options, has_our_main, resolve_backend, spawn
from tractor_host._target import Target, call_of, describe
from tractor_host._worker import death_of, finite

if TYPE_CHECKING:
    from tractor_host._worker import Worker

__all__ = ["Executor", "RemoteTraceback"]

#: So many workers in a row that end while they start make it useless to start more.
_MOST_STILLBORN: Final = 3
#: Seconds until another worker is started, when the machine had no room for one.
_AGAIN: Final = 1.0
#: Seconds that a worker has for its end, once nobody calls it any more.
_LEAVE: Final = 5.0
#: Seconds until the thread does what a caller has begun, who may have been interrupted.
_GRACE: Final = 0.05
#: Seconds that the thread sleeps at most: the kernel counts milliseconds in 32 bits.
_LONGEST_SLEEP: Final = 86400.0


class Executor(concurrent.futures.Executor):
    """A pool of workers that carry out calls, each one at a time.

    It does what `concurrent.futures.ProcessPoolExecutor` does, on any backend, and besides: a task that is
    running can be cancelled, and can have a time limit. A worker that dies fails its own task alone
    (`WorkerDied`), and is replaced. Lambdas and closures are sent by cloudpickle where that is installed.

    Leaving its `with` block waits for all tasks, as does the end of the program; a `KeyboardInterrupt` that
    leaves it ends them.

        >>> import tractor_host as th
        >>> with th.Executor(2) as pool:
        ...     print(list(pool.map(abs, [-1, 2, -3])))
        [1, 2, 3]
    """

    def __init__(
        self,
        max_workers: int | None = None,
        backend: str | None = None,
        *,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        max_tasks_per_child: int | None = None,
        task_timeout: float | None = None,
        idle_timeout: float | None = None,
        memory_limit: int | None = None,
        name: str = "pool",
        gil: Literal["shared", "own", "auto"] = "shared",
        stdio: str | os.PathLike[str] = "inherit",
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        cancel_timeout: float = 3.0,
        kill_timeout: float = 3.0,
        ladder: Mapping[str, float] | None = None,
        priority: float = 1.0,
        cpu_quota: float | None = None,
        log_level: int | str | None = None,
    ) -> None:
        """Makes a pool. Its workers are started when they are needed.

        Args:
            max_workers: The most workers that there are at a time; by default as many as there are
                processors that may be used.
            backend: As for `spawn`.
            initializer: Called in each worker, with `initargs`, before its first task. If it raises, the pool
                is broken. Sent as what is submitted is.
            max_tasks_per_child: A worker that has carried out so many is replaced.
            task_timeout: Seconds that each task may take; then its worker is ended and its future has a
                `TaskTimeout`. `with_timeout` gives other limits.
            idle_timeout: Seconds after which a worker that has nothing to do leaves. By default it stays.
            memory_limit: Bytes of memory of its own (RLIMIT_DATA) that a worker process may have. A task that
                wants more has a `MemoryError`.
            name: The workers' names begin so.
            initargs: The initializer's arguments.
            gil: As for `spawn`, for each worker, as are the following.
            stdio: What the workers write.
            env: The environment of process workers.
            cwd: Their working directory.
            cancel_timeout: Seconds that a task gets to end by itself when it is cancelled or late.
            kill_timeout: Seconds for all further rungs.
            ladder: In the place of these two.
            priority: The weight of each worker.
            cpu_quota: At most this part of a processor for each.
            log_level: What workers log from this level on is logged here, by the pool's thread and the logger
                of the same name, with the attribute `worker`; the handlers there are replaced. Records that
                find no room are lost, and counted in `lost_before` of the next one. By default nothing is
                done.

        Raises:
            TypeError, ValueError: An argument can't be right; the text says which and why.
        """
        if max_workers is None:
            max_workers = os.process_cpu_count() or 1
        _check_count("max_workers", max_workers)
        if max_tasks_per_child is not None:
            _check_count("max_tasks_per_child", max_tasks_per_child)
        wall = resolve_backend(backend)
        if memory_limit is not None:
            _check_count("memory_limit", memory_limit)
            if wall == "subint":
                raise ValueError(
                    "memory_limit is for processes: the workers of 'subint' share this one's memory"
                )
            # Whatever the environment says later on.
            backend = wall
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        check_options(
            wall, name=name, gil=gil, stdio=stdio, env=env, cwd=cwd, cancel_timeout=cancel_timeout,
            kill_timeout=kill_timeout, ladder=ladder, priority=priority, cpu_quota=cpu_quota,
        )  # fmt: skip
        options = {
            "backend": backend, "gil": gil, "stdio": stdio, "env": env, "cwd": cwd,
            "cancel_timeout": cancel_timeout, "kill_timeout": kill_timeout, "ladder": ladder,
            "priority": priority, "cpu_quota": cpu_quota,
        }  # fmt: skip
        level = None if log_level is None else _logs.level_of(log_level)
        serving = (*_sendable(initializer, tuple(initargs)), memory_limit, level)
        self._max_workers = max_workers
        self._pool = _Pool(
            max_workers, name, serving,
            {key: value for key, value in options.items() if value is not None},
            max_tasks_per_child, finite("idle_timeout", idle_timeout),
        )  # fmt: skip
        self._task_timeout = finite("task_timeout", task_timeout)
        # When nobody has it any more, the pool ends with its last task.
        weakref.finalize(self, self._pool.close, cancel=False).atexit = False

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Has a worker call `fn(*args, **kwargs)`; returns the future of that.

        Besides what the function raises, the future can have: what pickling or unpickling the call or its
        result raises, with a note that says of what; `WorkerDied`, when the worker died of it;
        `WorkerKilled`, when the pool was told to kill its workers; `TaskTimeout`; `OSError`, when no worker
        could be started or sent the call to.

        Raises:
            RuntimeError: After `shutdown`, or in a forked copy of the process.
            BrokenExecutor: The initializer has raised, or workers die while they start.
        """
        return self._pool.submit(self._task_timeout, fn, args, kwargs)

    def map[T](
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """As `map(fn, *iterables)`, by the workers; the results come in order.

        What has not begun is cancelled when a call has raised, or nobody asks for results any more (the
        generator is closed); by a `KeyboardInterrupt` that comes out of it, also what runs.

        Args:
            fn: What to call.
            iterables: Its arguments, one of each for a call.
            timeout: Seconds from now; waiting for a result after that raises `TimeoutError`.
            chunksize: So many calls are sent to a worker at once, and share a `task_timeout`.
            buffersize: So many calls, or chunks, are submitted before their results are asked for; by default
                all of them at once.

        Raises:
            TypeError, ValueError: An argument can't be right.
        """
        return _map(self, self._task_timeout, fn, iterables, timeout, chunksize, buffersize)

    def with_timeout(self, seconds: float | None) -> concurrent.futures.Executor:
        """The same pool with another time limit for tasks; `None` for none. It is not to be shut down."""
        return _Limited(self, finite("seconds", seconds))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more tasks. Nothing happens in a forked copy of the process.

        Args:
            wait: Return when all tasks are done and all workers are gone.
            cancel_futures: Cancel the tasks that no worker has begun.
        """
        self._pool.close(cancel=cancel_futures)
        if wait:
            self._pool.join()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Executor cannot be pickled or copied: it is of this process")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Who presses Ctrl-C does not want to wait for what may never end.
        if isinstance(error, KeyboardInterrupt):
            self.terminate_workers()
        else:
            self.shutdown(wait=True)

    def terminate_workers(self) -> None:
        """Ends all workers by their ladders, and the pool; what they were doing fails with `WorkerKilled`.

        What has not begun is cancelled. Returns when the workers are gone and their futures know; where a
        done-callback does not return, they know when it does, and this waits for that no longer than 5 s.
        """
        self._pool.end()

    def kill_workers(self) -> None:
        """The same: a ladder ends in SIGKILL within its bounds."""
        self.terminate_workers()

    def workers(self) -> list[Worker]:
        """Its workers just now."""
        return self._pool.workers()


@final
class _Limited(concurrent.futures.Executor):
    """An executor's pool, with another time limit."""

    def __init__(self, executor: Executor, seconds: float | None) -> None:
        self._executor = executor
        self._seconds = seconds

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return self._executor._pool.submit(self._seconds, fn, args, kwargs)

    def map[T](
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        return _map(self._executor, self._seconds, fn, iterables, timeout, chunksize, buffersize)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: the pool is the executor's."""


def _sendable(
    initializer: Callable[..., object] | None, initargs: tuple[Any, ...]
) -> tuple[Callable[..., object] | None, tuple[Any, ...]]:
    """The initializer and its arguments, by cloudpickle where pickle can't send them.

    Raises:
        TypeError: Nothing can.
    """
    if initializer is None:
        return None, initargs
    try:
        Target.of_call(initializer, initargs, {})
    except Exception as error:
        whole = ByValue(functools.partial(initializer, *initargs), describe(initializer))
        try:
            Packed(whole)
        except Exception:
            raise TypeError(f"the initializer or its arguments can't be sent to a worker: {error}") from error
        return whole, ()
    return initializer, initargs


def _check_count(what: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{what} must be an integer, not {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{what} must be greater than 0")


def _map(
    executor: Executor,
    task_timeout: float | None,
    fn: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    timeout: float | None,
    chunksize: int,
    buffersize: int | None,
) -> Generator[Any]:
    if chunksize < 1:
        raise ValueError("chunksize must be >= 1.")
    if buffersize is not None and not isinstance(buffersize, int):
        raise TypeError("buffersize must be an integer or None")
    if buffersize is not None and buffersize < 1:
        raise ValueError("buffersize must be None or > 0")
    until = None if timeout is None else time.monotonic() + timeout
    calls: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
    if chunksize > 1:
        fn = functools.partial(_call_each, fn)
        calls = ((chunk,) for chunk in itertools.batched(calls, chunksize, strict=False))
    submit = executor._pool.submit
    futures: collections.deque[Future[Any]] = collections.deque()
    try:
        for args in itertools.islice(calls, buffersize):
            futures.append(submit(task_timeout, fn, args, {}))
    except BaseException:  # nobody will ask for them
        for future in futures:
            future.cancel()
        raise

    def submit_next() -> None:
        # It refers to the executor, whose pool stays open for as long.
        if buffersize is not None and (args := next(calls, None)) is not None:
            futures.append(executor._pool.submit(task_timeout, fn, args, {}))

    results = _results(futures, submit_next if buffersize is not None else None, until)
    return results if chunksize == 1 else _flat(results)


def _results(
    futures: collections.deque[Future[Any]], submit_next: Callable[[], None] | None, until: float | None
) -> Generator[Any]:
    try:
        while futures:
            if submit_next is not None:
                submit_next()
            yield _take(futures, None if until is None else until - time.monotonic())
    finally:
        is_interrupted = isinstance(sys.exception(), KeyboardInterrupt)
        for future in futures:
            if is_interrupted or not future.running():
                future.cancel()
        # An exception would refer to itself by way of this frame.
        futures.clear()


def _take(futures: collections.deque[Future[Any]], timeout: float | None) -> Any:
    value = futures[0].result(timeout)
    futures.popleft()
    return value


def _flat(chunks: Generator[list[Any]]) -> Generator[Any]:
    try:
        for chunk in chunks:
            chunk.reverse()
            while chunk:
                yield chunk.pop()
    except KeyboardInterrupt as error:
        chunks.throw(error)  # which ends what runs
    finally:
        chunks.close()


def _call_each[T](fn: Callable[..., T], chunk: Iterable[tuple[Any, ...]]) -> list[T]:
    return [fn(*args) for args in chunk]


class _Task:
    """A call that somebody waits for."""

    __slots__ = ("future", "is_begun", "is_second", "main", "target", "timeout")

    def __init__(
        self, future: Future[Any], timeout: float | None, target: Target, main: list[str] | None
    ) -> None:
        self.future = future
        #: Seconds after which its worker is ended, unless it has answered.
        self.timeout = timeout
        #: Whether its future counts as running: a worker is being started for it.
        self.is_begun = False
        #: Whether it is sent for the second time: the first worker died before it had read it.
        self.is_second = False
        self.target = target
        #: What to make the main module of before.
        self.main = main

    def begin(self) -> bool:
        """Has its future count as running; whether nobody has cancelled it."""
        if not self.is_begun or self.future.cancelled():
            try:
                self.is_begun = self.future.set_running_or_notify_cancel()
            except RuntimeError:  # somebody else has said so, or what has come of it
                self.is_begun = not self.future.done()
        return self.is_begun


class _Turn:
    """An idle worker's next call; whoever comes first says which."""

    __slots__ = ("_last", "_taken", "is_late", "is_sent", "number", "seen", "slot")

    def __init__(self, slot: _Slot, number: int) -> None:
        self.slot = slot
        self.number = number
        self._taken: dict[None, _Task | None] = {}
        #: Who comes first says by `setdefault` whether it is the worker's last one.
        self._last: dict[None, bool] = {}
        #: Whether it was sent, for all that is known.
        self.is_sent = False
        #: When the thread has first seen that it was not; whether whoever has taken it can't send it.
        self.seen = 0.0
        self.is_late = False

    def take(self, task: _Task | None) -> bool:
        """Whether it is this one's from now on; with `None`, whether it is nobody's."""
        return self._taken.setdefault(None, task) is task

    def end_worker(self) -> None:
        """Ends its worker, by whoever has cancelled the task; not if that has a next one already."""
        if self._last.setdefault(None, True):
            _native.kill(self.slot.worker._key)

    def may_follow(self) -> bool:
        """Whether its worker can have another one."""
        return not self._last.setdefault(None, False)

    @property
    def task(self) -> _Task | None:
        return self._taken.get(None)


class _Slot:
    """A worker of the pool."""

    __slots__ = (
        "confusion", "deadline", "done", "end", "has_main", "is_unread", "is_unsure", "link", "number",
        "ready", "since", "turn", "worker",
    )  # fmt: skip

    def __init__(self, worker: Worker, link: _calls.Link) -> None:
        self.worker = worker
        self.link = link
        #: Whether it has said so.
        self.ready = False
        #: Whether it has made the main module.
        self.has_main = False
        #: Its call, or what the next one can be put in.
        self.turn: _Turn | None = None
        #: When it is to be ended, if it does not leave.
        self.deadline: float | None = None
        self.since = _native.clock()
        self.done = 0
        #: Of its last call.
        self.number = 0
        #: Whether it has not read its last call; whether that can't be told, because one may come twice.
        self.is_unread = self.is_unsure = False
        #: What was wrong with what it said last.
        self.confusion: str | None = None
        #: Why it ends: it was told to, or can't speak any more, or has died.
        self.end: Literal["cancel", "timeout", "kill", "leave", "mute", "dead"] | None = None

    @property
    def task(self) -> _Task | None:
        return None if self.turn is None else self.turn.task


class _Closing:
    """Somebody's wish that the pool ends."""

    __slots__ = ("cancel", "kill")

    def __init__(self, *, cancel: bool, kill: bool) -> None:
        self.cancel = cancel
        self.kill = kill


class _Bell:
    """What wakes the thread. Its descriptor is closed when nobody has it who could ring."""

    __slots__ = ("fd",)

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ring(self) -> None:
        os.eventfd_write(self.fd, 1)

    def __del__(self) -> None:
        if hasattr(self, "fd"):  # it could be had
            os.close(self.fd)


class _Founding:
    """One who needs the thread waits for it."""

    __slots__ = ("error", "is_over")

    def __init__(self) -> None:
        self.is_over = Signal()
        #: Why there is none.
        self.error: BaseException | None = None


#: The pools of this process, for the end of the program.
_pools: weakref.WeakSet[_Pool] = weakref.WeakSet()
_registered: int | None = None
_is_over = False


def _close_all() -> None:
    global _is_over
    _is_over = True
    for pool in list(_pools):
        pool.close(cancel=False)
    for pool in list(_pools):
        pool.join()


class _Pool:
    """What the executor, its thread and its futures share."""

    def __init__(
        self,
        max_workers: int,
        name: str,
        serving: tuple[Any, ...],
        options: dict[str, Any],
        max_tasks: int | None,
        idle_timeout: float | None,
    ) -> None:
        self._home = os.getpid()
        self._max_workers = max_workers
        self._name = name
        self._serving = serving
        self._options = options
        self._max_tasks = max_tasks
        self._idle_timeout = idle_timeout
        # Everybody's.
        self._inbox: collections.deque[_Task | Request | _Closing] = collections.deque()
        #: Turns to be taken, of whoever became idle last first. One that was taken may still be there.
        self._idle: list[_Turn] = []
        #: Who makes the thread.
        self._elected: dict[None, _Founding] = {}
        # The thread's, for everybody to see.
        self._slots: dict[int, _Slot] = {}
        self._thread: threading.Thread | None = None
        self._bell: _Bell | None = None
        #: Whether it can do nothing about one more task, until it hears from a worker.
        self._is_full = False
        #: Whether it looks into the inbox no more.
        self._is_sealed = False
        self._broken: BaseException | None = None
        #: Whether that is what has ended the thread.
        self._has_failed = False
        #: Set by anybody, for good.
        self._closing = False
        # The thread's own.
        self._waiting: collections.OrderedDict[Future[Any], _Task] = collections.OrderedDict()
        #: Whether what comes late is cancelled.
        self._is_refusing = False
        #: Who may have been interrupted before all were called back.
        self._requests: list[Request] = []
        self._places: dict[int, tuple[_Slot, bool]] = {}
        self._stillborn = 0
        #: When to try again to start a worker.
        self._not_before = 0.0
        self._numbers = itertools.count(1)

    # -- called by anybody, who may be interrupted anywhere ------------------------------------------------

    def submit(self, timeout: float | None, fn: Any, args: Any, kwargs: dict[str, Any]) -> Future[Any]:
        self.check_home()
        check_main_is_made()
        try:
            target, main = call_of(fn, args, kwargs)
        except Exception as error:
            self._check()
            return self._failed(error)
        self._check()
        future: Future[Any] = Future(self)
        task = _Task(future, timeout, target, main)
        if self._thread is None:
            self._found_thread()
        try:
            turn = self._take_turn(task)
            if turn is None:
                self._inbox.append(task)
                if self._is_sealed and self._take_back(task):
                    self._check()
                    raise RuntimeError("cannot schedule new futures after shutdown")
                if not self._is_full:
                    self._ring()
            else:
                try:
                    self._send(turn, task)
                    turn.is_sent = True
                except Exception:
                    turn.is_late = True  # the thread finds out what is wrong
                    self._ring()
        except BaseException:  # a Ctrl-C, say: nobody will ask for it
            future.cancel()
            raise
        return future

    def _failed(self, error: Exception) -> Future[Any]:
        """The future of what can't be sent. No frame of the error's refers to it."""
        future: Future[Any] = Future(self)
        future.set_running_or_notify_cancel()
        future.set_exception(error)
        return future

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken_error()
        if self._closing:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if _is_over:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    def _take_turn(self, task: _Task) -> _Turn | None:
        """A worker's that has nothing to do, unless somebody waits for one already."""
        while self._idle and not self._inbox:
            try:
                turn = self._idle[-1]
            except IndexError:
                break
            # What the thread is to find in it. Nobody else knows the future yet.
            task.is_begun = True
            task.future.suppose(is_running=True)
            is_ours = turn.take(task)
            self._unlist(turn)
            if is_ours:
                return turn
            task.future.suppose(is_running=False)
            task.is_begun = False
        return None

    def _unlist(self, turn: _Turn) -> None:
        """It was taken."""
        try:
            self._idle.remove(turn)
        except ValueError:
            return  # somebody else has seen that, too

    def _take_back(self, task: _Task) -> bool:
        try:
            self._inbox.remove(task)
        except ValueError:
            return False  # the thread has it
        return True

    def cancel(self, request: Request) -> None:
        """Ends the worker that runs this, or has none run it."""
        if self._home == os.getpid():
            self._inbox.append(request)
            self._ring()

    def stop(self, future: Future[Any]) -> None:
        """Ends the worker that runs what was cancelled, whatever the thread is busy with."""
        if self._home != os.getpid():
            return
        for slot in list(self._slots.values()):
            turn = slot.turn
            task = None if turn is None else turn.task
            if turn is not None and task is not None and task.future is future:
                turn.end_worker()

    def check_home(self) -> None:
        """Nothing can be had of it in a forked copy of its process.

        Raises:
            RuntimeError: This is one.
        """
        if self._home == os.getpid():
            return
        try:
            _native.workers()
            advice = "make one here"
        except RuntimeError:
            advice = "and os.fork() makes processes that can have no workers"
        raise RuntimeError(
            f"this Executor belongs to process {self._home}, of which this one is a fork; {advice}"
        )

    def is_here(self) -> bool:
        """Whether this is its thread."""
        return self._thread is threading.current_thread()

    def close(self, *, cancel: bool, kill: bool = False) -> None:
        """Takes no more tasks."""
        if self._home != os.getpid():
            return
        self._closing = True
        self._inbox.append(_Closing(cancel=cancel, kill=kill))
        self._ring()

    def join(self) -> None:
        """Waits until all is over."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread() and self._home == os.getpid():
            thread.join()

    def end(self) -> None:
        """Ends all workers, whatever the thread is busy with, and waits until all is over, within bounds."""
        self.close(cancel=True, kill=True)
        thread = self._thread
        if thread is None or thread is threading.current_thread() or self._home != os.getpid():
            return
        for worker in self.workers():
            _native.kill(worker._key)
        for worker in self.workers():
            worker.wait()
        # It may be in somebody's callback; or it was starting a worker, and ends that.
        thread.join(_LEAVE)
        for worker in self.workers():
            worker.wait()

    def workers(self) -> list[Worker]:
        return [slot.worker for slot in list(self._slots.values())]

    def _ring(self) -> None:
        """Has the thread look around. Where it has no bell yet, or no more, it is about to, or has."""
        bell = self._bell
        if bell is not None:
            bell.ring()

    def _found_thread(self) -> None:
        """Has there be a thread.

        It is started by another one, from which no interrupt can take a lock of `threading`'s.
        """
        global _registered
        if _registered != os.getpid():
            # Before the threads of the program are joined, which this one is among.
            try:
                threading._register_atexit(_close_all)  # type: ignore[attr-defined]
            except RuntimeError as error:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown") from error
            _registered = os.getpid()
        _pools.add(self)
        while self._thread is None:
            founding = _Founding()
            _thread.start_joinable_thread(functools.partial(self._found, founding), daemon=False)
            founding.is_over.wait()
            if founding.error is not None:
                raise founding.error

    def _found(self, founding: _Founding) -> None:
        try:
            _thread.set_name(f"th-{self._name}")
            if self._elected.setdefault(None, founding) is founding:
                try:
                    self._bell = bell = _Bell()
                    args = (bell, select.epoll())
                    thread = threading.Thread(target=self._run, args=args, name=f"th-{self._name}")
                    thread.start()
                except BaseException:
                    self._bell = None
                    self._elected.clear()
                    raise
                self._thread = thread
        except BaseException as error:
            founding.error = error
        finally:
            founding.is_over.set()

    # -- a call ------------------------------------------------------------------------------------------

    def _send(self, turn: _Turn, task: _Task) -> None:
        """By whoever has taken the turn, or the thread for him.

        Raises:
            Exception: It can't be sent. But that it has died, the thread will hear.
        """
        slot = turn.slot
        if task.timeout is not None:
            _native.limit(slot.worker._key, task.timeout)
        try:
            if task.main is not None and not slot.has_main and not has_our_main(slot.worker.backend):
                slot.link.send(_calls.MAIN, 0, Packed(task.main))
                slot.has_main = True
            slot.link.send(_calls.CALL, turn.number, task.target.packed, task.target.passed)
        except ConnectionError:
            slot.is_unread = True

    # -- the thread --------------------------------------------------------------------------------------

    def _run(self, bell: _Bell, poller: select.epoll) -> None:
        with poller:
            try:
                poller.register(bell.fd, select.EPOLLIN)
                while not self._is_sealed:
                    due = self._tend(poller)
                    if self._closing and not self._waiting and not self._slots and not self._requests:
                        self._is_sealed = True
                        # Who has put something in since takes it back, or finds it taken.
                        self._is_sealed = not self._inbox
                        continue
                    self._is_full = not self._idle and self._all_busy() and not self._has_room()
                    if self._inbox:
                        continue
                    for fd, _ in poller.poll(due):
                        if fd == bell.fd:
                            os.eventfd_read(fd)
                        elif fd in self._places:
                            slot, is_end = self._places[fd]
                            (self._bury if is_end else self._hear)(slot, poller)
            except BaseException as error:
                self._fail(error, poller)
                raise
            finally:
                self._bell = None

    def _fail(self, error: BaseException, poller: select.epoll) -> None:
        """Nobody is to wait for what no thread sees to any more."""
        self._broken, self._has_failed = error, True
        self._is_sealed = True
        slots = list(self._slots.values())
        for slot in slots:
            slot.end = "kill"
            with contextlib.suppress(Exception):
                _native.kill(slot.worker._key)
        for slot in slots:
            try:
                slot.worker.wait()
                self._bury(slot, poller)
            except Exception:
                self._slots.pop(slot.worker.id, None)
                slot.link.close()
                if slot.task is not None:
                    _settle(slot.task.future, self._broken_error())
        self._fail_waiting(self._broken_error)
        for request in self._requests:
            request.future.call_back()

    def _tend(self, poller: select.epoll) -> float | None:
        """Does what is due; seconds until something else is."""
        self._take_in()
        self._hand_out()
        while self._wants_worker() and self._start(poller):
            pass
        now = _native.clock()
        due: list[float | None] = []
        requests: list[Request] = []
        for request in self._requests:
            if (later := self._call_back(request, now)) is not None:
                due.append(later)
                requests.append(request)
        self._requests = requests
        is_over = self._closing and not self._waiting
        for slot in list(self._slots.values()):
            if slot.deadline is not None and slot.deadline <= now:
                slot.deadline = None
                _native.kill(slot.worker._key)
            if slot.task is not None:
                due.append(self._watch(slot, now))
            elif slot.ready and slot.end is None:
                spent = None if self._idle_timeout is None else slot.since + self._idle_timeout
                if (is_over or (spent is not None and spent <= now)) and self._withdraw(slot):
                    self._dismiss(slot)
                else:
                    due.append(spent)
            due += (slot.deadline, slot.link.trim())
        if self._waiting and self._not_before:
            due.append(self._not_before)
        dates = [date for date in due if date is not None]
        if not dates:
            return None
        left = min(dates) - _native.clock()
        # The clock may stand still.
        return 0.0 if left <= 0 else min(max(left, 0.001), _LONGEST_SLEEP)

    def _take_in(self) -> None:
        """Has a look at what others have left."""
        while True:
            try:
                item = self._inbox.popleft()
            except IndexError:
                return
            if isinstance(item, _Task):
                self._accept(item)
            elif isinstance(item, Request):
                self._cancel(item)
            else:
                self._close(item)

    def _accept(self, task: _Task) -> None:
        if self._broken is not None:
            if task.begin():
                _settle(task.future, self._broken_error())
        elif self._is_refusing:
            self._drop(task)
        else:
            if self._all_busy() or task.begin():
                self._waiting[task.future] = task

    def _all_busy(self) -> bool:
        """Whether there are as many tasks as there may be workers."""
        busy = sum(slot.task is not None for slot in self._slots.values())
        return busy + len(self._waiting) >= self._max_workers

    def _cancel(self, request: Request) -> None:
        future = request.future
        if future.done() and not future.cancelled():
            return
        if not future.decide_to_cancel():
            return  # its worker is being ended for another reason
        slots = self._slots.values()
        slot = next((it for it in slots if it.task is not None and it.task.future is future), None)
        if slot is None:
            self._waiting.pop(future, None)
            future.note_cancelled()
        else:
            future.wake()
            if slot.end is None:
                slot.end = "cancel"
                _native.kill(slot.worker._key)
        request.seen = _native.clock()
        self._requests.append(request)

    def _call_back(self, request: Request, now: float) -> float | None:
        """In the place of who has cancelled it, if he was interrupted; when to look again."""
        if not request.is_over:
            if now < request.seen + _GRACE:
                return request.seen + _GRACE
            request.future.call_back()
        return None

    def _close(self, closing: _Closing) -> None:
        self._is_refusing = self._is_refusing or closing.cancel
        waiting = self._waiting.values()
        dropped = [task for task in waiting if closing.cancel and (closing.kill or not task.is_begun)]
        for task in dropped:
            del self._waiting[task.future]
        if closing.kill:
            for slot in self._slots.values():
                if slot.end in (None, "leave", "mute"):
                    if slot.task is not None and _is_late(slot, slot.task):
                        slot.end = "timeout"
                        continue
                    if slot.task is not None:
                        slot.task.future.claim()
                    else:
                        # It waits for a call, where a subinterpreter hears of no cancelling: it reads this.
                        slot.link.socket.shutdown(socket.SHUT_WR)
                    slot.end = "kill"
                    _native.kill(slot.worker._key)
        for task in dropped:
            self._drop(task)

    def _drop(self, task: _Task) -> None:
        """It is not carried out any more."""
        if task.is_begun:
            _settle(task.future, BrokenExecutor("the pool was told to kill its workers"))
        elif task.future.decide_to_cancel():
            task.future.note_cancelled()
            task.future.call_back()

    def _hand_out(self) -> None:
        """Has those that wait be called for by those that are idle."""
        while self._waiting and self._idle:
            try:
                turn = self._idle.pop()
            except IndexError:
                break  # somebody has taken the last one
            if turn.take(None):
                self._free(turn.slot)

    def _watch(self, slot: _Slot, now: float) -> float | None:
        """Sees to it that it was called; when to look again."""
        turn, task = slot.turn, slot.task
        if turn is None or task is None or turn.is_sent or slot.end is not None:
            return None
        turn.seen = turn.seen or now
        if not turn.is_late and now < turn.seen + _GRACE:
            return turn.seen + _GRACE
        slot.is_unsure = slot.is_unsure or not turn.is_late
        if not self._begin(turn, task):
            self._free(slot)
        return None

    def _begin(self, turn: _Turn, task: _Task) -> bool:
        """Sends it; whether that went well."""
        turn.is_sent = True
        try:
            self._send(turn, task)
        except Exception as error:
            turn.slot.turn = None
            self._conclude(turn)
            _settle(task.future, error)
            return False
        return True

    def _free(self, slot: _Slot) -> None:
        """It has nothing to do any more."""
        if slot.turn is not None:
            self._conclude(slot.turn)
        while True:
            slot.turn = None
            if not self._waiting:
                self._take_in()
            if slot.end is not None:
                return
            if self._max_tasks is not None and slot.done >= self._max_tasks:
                self._dismiss(slot)
                return
            task = self._next()
            slot.number += 1
            turn = _Turn(slot, slot.number)
            if task is None:
                slot.since = _native.clock()
                slot.turn = turn
                self._idle.append(turn)
                return
            turn.take(task)
            slot.turn = turn
            if task.future.cancelled():
                turn.end_worker()  # whoever has cancelled it may have looked before that
            if self._begin(turn, task):
                return

    def _conclude(self, turn: _Turn) -> None:
        """Its worker can have another one, unless somebody ends it for this one."""
        slot, task = turn.slot, turn.task
        is_late = task is not None and _is_late(slot, task)
        if not turn.may_follow() or is_late:
            slot.end = slot.end or "cancel"
            # It waits for a call, where a subinterpreter hears of no cancelling: it reads this.
            slot.link.socket.shutdown(socket.SHUT_WR)
            # Who was to do so may have been interrupted.
            _native.kill(slot.worker._key)

    def _next(self) -> _Task | None:
        """The first one that nobody has cancelled; it counts as running from now on."""
        while self._waiting:
            _, task = self._waiting.popitem(last=False)
            if task.begin():
                return task
        return None

    def _withdraw(self, slot: _Slot) -> bool:
        """Has nobody call it from now on; whether nobody has."""
        turn = slot.turn
        if turn is None:
            return True
        is_free = turn.take(None)
        self._unlist(turn)
        return is_free

    def _dismiss(self, slot: _Slot) -> None:
        """Lets it go."""
        slot.end = "leave"
        slot.deadline = _native.clock() + _LEAVE
        # It reads the end of the file; the socket is closed later.
        slot.link.socket.shutdown(socket.SHUT_WR)

    def _has_room(self) -> bool:
        """Whether there may be one more. Those that are on their way out do not count, within reason."""
        stay = sum(slot.end is None for slot in self._slots.values())
        return stay < self._max_workers and len(self._slots) < 2 * self._max_workers

    def _wants_worker(self) -> bool:
        starting = sum(slot.end is None and not slot.ready for slot in self._slots.values())
        return len(self._waiting) > starting and self._has_room() and _native.clock() >= self._not_before

    def _start(self, poller: select.epoll) -> bool:
        """Starts a worker; whether it could."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                with theirs:
                    worker = spawn(
                        _calls.serve, theirs, *self._serving, runtime="sync",
                        name=f"{self._name}-{next(self._numbers)}", **self._options,
                    )  # fmt: skip
            except BaseException:
                ours.close()
                raise
        except Exception as error:
            self._not_started(error)
            return False
        self._not_before = 0.0
        slot = _Slot(worker, _calls.Link(ours))
        self._slots[worker.id] = slot
        for fd, is_end in ((ours.fileno(), False), (worker.fileno(), True)):
            self._places[fd] = (slot, is_end)
            poller.register(fd, select.EPOLLIN)
        return True

    def _not_started(self, error: Exception) -> None:
        """Where the machine has no room for another one, those that there are go on."""
        if not isinstance(error, OSError):
            self._break(error)
        elif self._slots:
            self._not_before = _native.clock() + _AGAIN
        else:
            self._fail_waiting(lambda: error)

    def _fail_waiting(self, error: Callable[[], Exception]) -> None:
        """Has all that wait for a worker fail."""
        self._take_in()
        dropped, self._waiting = self._waiting, collections.OrderedDict()
        for task in dropped.values():
            if task.begin():
                _settle(task.future, error())

    def _hear(self, slot: _Slot, poller: select.epoll) -> bool:
        """It has said something, or can't any more; whether there may be more of that."""
        try:
            message = slot.link.receive(wait=False)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            # It has ended without having read all that it was sent.
            slot.is_unread = True
            message = None
        except OSError as error:
            # Of this process's, which the worker has nothing to do with.
            self._answered(slot, error)
            return isinstance(error, _calls.Incomplete)
        except ValueError as error:
            self._distrust(slot, str(error))
            return False
        if message is None:
            self._forget(slot.link.fileno(), poller)
            if slot.end is None:
                slot.end = "mute"
                slot.deadline = _native.clock() + _LEAVE
                self._withdraw(slot)
            return False
        if message.kind == _calls.LOG:
            _take_record(message, slot.worker.name)
        elif message.kind == _calls.READY and not slot.ready:
            if slot.end is None:  # else it was no use
                self._stillborn = 0
                slot.ready = True
                self._free(slot)
        elif slot.task is None or message.number != slot.number:
            self._distrust(slot, "an answer that nobody has asked for")
            return False
        elif message.kind == _calls.RAISED and _is_being_ended(slot):
            return True  # it is that which has raised something; its end says why
        else:
            self._answered(slot, message)
        return True

    def _distrust(self, slot: _Slot, confusion: str) -> None:
        """It does not say what it should."""
        slot.end = slot.end or "mute"
        slot.confusion = confusion
        self._withdraw(slot)
        _native.kill(slot.worker._key)

    def _answered(self, slot: _Slot, answer: _calls.Message | Exception) -> None:
        task = slot.task
        if task is None:
            return
        slot.done += 1
        # Before anybody is told, who may submit the next one from there.
        self._free(slot)
        if isinstance(answer, Exception):
            _settle(task.future, answer)
        else:
            _settle_answer(task.future, answer)

    def _forget(self, fd: int, poller: select.epoll) -> None:
        if self._places.pop(fd, None) is not None:
            poller.unregister(fd)

    def _bury(self, slot: _Slot, poller: select.epoll) -> None:
        """It has ended."""
        self._take_in()  # perhaps somebody has ended it
        slot.end = slot.end or "dead"
        self._withdraw(slot)
        while slot.link.fileno() in self._places and self._hear(slot, poller):
            pass  # what it said last
        self._forget(slot.link.fileno(), poller)
        self._forget(slot.worker.fileno(), poller)
        slot.link.close()
        del self._slots[slot.worker.id]
        task, slot.turn = slot.task, None
        if slot.end in ("dead", "mute") and task is not None and _is_late(slot, task):
            slot.end = "timeout"
        if (
            task is not None and slot.is_unread and not slot.is_unsure
            and slot.end in ("dead", "mute") and not task.is_second
        ):  # fmt: skip
            # It died while it waited for one, of something else.
            task.is_second = True
            self._waiting[task.future] = task
            self._waiting.move_to_end(task.future, last=False)
            task = None
        error = death_of(slot.worker)
        if not slot.ready and slot.end in ("dead", "mute"):
            self._stillborn += 1
            if isinstance(error, RemoteError) or self._stillborn >= _MOST_STILLBORN:
                self._break(error)
        if task is None:
            return
        if slot.confusion is not None and slot.end == "mute":
            # Nobody has asked for that end.
            error = WorkerDied(str(error), error.exit)
        # It is named after what it was carrying out, and not after what every worker of a pool runs.
        error.args = (str(error.args[0]).replace(slot.worker.target, task.target.description, 1),)
        error.add_note(f"It was carrying out {task.target.description}.")
        if slot.confusion is not None:
            error.add_note(f"It had sent {slot.confusion}.")
        if slot.end == "timeout":
            late = f"{task.target.description} took longer than {task.timeout} s"
            what = f"{late}, and worker {slot.worker.name!r} was ended: {error.exit.cause}"
            error = TaskTimeout(what, error.exit)
        _settle(task.future, error)

    def _break(self, error: BaseException) -> None:
        """Nothing can be done any more."""
        self._broken = self._broken or error
        self._fail_waiting(self._broken_error)

    def _broken_error(self) -> BrokenExecutor:
        what = "the workers of the pool can't be started"
        if self._has_failed:
            what = "the pool's thread has failed"
        error = BrokenExecutor(f"{what}: {self._broken}")
        error.__cause__ = self._broken
        return error


def _is_late(slot: _Slot, task: _Task) -> bool:
    """Whether the supervisor ends its worker for it, or has; if not, it has no time limit any more."""
    return task.timeout is not None and _native.limit(slot.worker._key, None)


def _is_being_ended(slot: _Slot) -> bool:
    """Whether its worker climbs the ladder, or has ended by it."""
    if slot.end is not None:
        return True
    found = slot.worker.exit
    return slot.worker.state == "killing" if found is None else found.rung is not None


def _take_record(message: _calls.Message, worker: str) -> None:
    try:
        _logs.take(message, "worker", worker)
    except BaseException:
        # The pool's thread is not a handler's to end, by sys.exit() say.
        LOGGER.exception("a handler has left the thread of a pool, which goes on")


def _settle(future: Future[Any], error: BaseException) -> None:
    """The task has failed; unless it was cancelled meanwhile."""
    if future.claim():
        # Somebody else may have said what has come of it.
        with contextlib.suppress(InvalidStateError):
            future.set_exception(error)
    else:
        _settle_cancelled(future)


def _settle_cancelled(future: Future[Any]) -> None:
    """Who waits for several of them is told of that only now: the worker is gone."""
    future.note_cancelled()
    future.call_back()


def _settle_answer(future: Future[Any], answer: _calls.Message) -> None:
    try:
        good, value = _remote.answer(answer.content, returned=answer.kind == _calls.RETURNED)
    except BaseException as error:
        # Nothing of a task's ends the thread, which no signal reaches.
        good, value = False, RuntimeError(f"the answer can't be taken in: {_remote.summary(error)}")
    if not good:
        _settle(future, value)
    elif future.claim():
        with contextlib.suppress(InvalidStateError):
            future.set_result(value)
    else:
        _settle_cancelled(future)
