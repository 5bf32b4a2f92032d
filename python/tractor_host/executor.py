"""A pool of workers as a `concurrent.futures.Executor`: `tractor_host.Executor`.

The executor, its futures and one thread share a `_Pool`. Whoever submits sends the call to an idle worker at
once; the thread hears the answers, starts workers and buries them. Each worker has a socket of its own, so
that none can hold up another one, whatever becomes of it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, final

from tractor_host import _calls, _native, _remote
from tractor_host._errors import RemoteError, TaskTimeout
from tractor_host._parcel import Packed
from tractor_host._remote import RemoteTraceback
from tractor_host._spawn import has_our_main, resolve_backend, spawn
from tractor_host._target import call_of
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


@final
class Future[T](concurrent.futures.Future[T]):
    """What `Executor.submit` returns: `cancel` also ends a task that is running."""

    _pool: _Pool | None = None

    def cancel(self) -> bool:
        """Has the task not run, or not run on; whether that is so.

        The worker of a task that is running is ended by its ladder, and replaced; nothing else is touched.
        `result` raises `CancelledError` from now on. `concurrent.futures.wait` and `as_completed` count it as
        done when the worker is gone.
        """
        if super().cancel():
            return True
        return self._pool is not None and self._pool.cancel(self)


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
    ) -> None:
        """Makes a pool. Its workers are started when they are needed.

        Args:
            max_workers: The most workers that there are at a time; by default as many as there are
                processors that may be used.
            backend: As for `spawn`.
            initializer: Called in each worker, with `initargs`, before its first task. If it raises, the pool
                is broken.
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
        options = {
            "backend": backend, "gil": gil, "stdio": stdio, "env": env, "cwd": cwd,
            "cancel_timeout": cancel_timeout, "kill_timeout": kill_timeout, "ladder": ladder,
            "priority": priority, "cpu_quota": cpu_quota,
        }  # fmt: skip
        self._max_workers = max_workers
        self._pool = _Pool(
            max_workers, name, (initializer, tuple(initargs), memory_limit),
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
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout, buffersize=buffersize)
        chunks = itertools.batched(zip(*iterables, strict=False), chunksize, strict=False)
        results = super().map(
            functools.partial(_call_each, fn), chunks, timeout=timeout, buffersize=buffersize
        )
        return itertools.chain.from_iterable(results)

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

        What has not begun is cancelled.
        """
        self._pool.close(cancel=True, kill=True)
        self._pool.join()

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

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: the pool is the executor's."""


def _check_count(what: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{what} must be an integer, not {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{what} must be greater than 0")


def _call_each[T](fn: Callable[..., T], chunk: Iterable[tuple[Any, ...]]) -> list[T]:
    return [fn(*args) for args in chunk]


class _Task:
    """A call that somebody waits for."""

    __slots__ = ("future", "is_begun", "is_second", "main", "target", "timeout")

    def __init__(
        self, future: Future[Any], timeout: float | None, fn: Any, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Packs it.

        Raises:
            Exception: It can't be pickled.
        """
        self.future = future
        self.timeout = timeout
        #: Whether its future counts as running: a worker is being started for it.
        self.is_begun = False
        #: Whether it is sent for the second time: the first worker died before it had read it.
        self.is_second = False
        self.target, self.main = call_of(fn, args, kwargs)

    def begin(self) -> bool:
        """Has its future count as running; whether nobody has cancelled it."""
        if not self.is_begun:
            self.is_begun = self.future.set_running_or_notify_cancel()
        return self.is_begun


class _Slot:
    """A worker of the pool."""

    __slots__ = (
        "confusion", "deadline", "done", "end", "has_main", "is_unread", "link", "number", "ready", "since",
        "task", "worker",
    )  # fmt: skip

    def __init__(self, worker: Worker, link: _calls.Link) -> None:
        self.worker = worker
        self.link = link
        #: Whether it has said so.
        self.ready = False
        #: Whether it has made the main module.
        self.has_main = False
        self.task: _Task | None = None
        #: When it is to be ended, unless it has answered.
        self.deadline: float | None = None
        self.since = time.monotonic()
        self.done = 0
        #: Of its last call.
        self.number = 0
        #: Whether it has not read its last call.
        self.is_unread = False
        #: What was wrong with what it said last.
        self.confusion: str | None = None
        #: Why it ends: it was told to, or can't speak any more, or has died.
        self.end: Literal["cancel", "timeout", "kill", "leave", "mute", "dead"] | None = None


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
        # The garbage collector can have the executor's end told, by `close`, wherever memory is allocated.
        self._lock = threading.RLock()
        # Guarded by the lock.
        self._waiting: collections.deque[_Task] = collections.deque()
        self._slots: dict[int, _Slot] = {}
        #: By the worker's id; who became idle last is taken first.
        self._idle: dict[int, _Slot] = {}
        self._closing = False
        self._broken: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._wake: int | None = None
        # The thread's own.
        self._places: dict[int, tuple[_Slot, bool]] = {}
        self._stillborn = 0
        #: When to try again to start a worker.
        self._not_before = 0.0
        self._numbers = itertools.count(1)

    # -- called by anybody -------------------------------------------------------------------------------

    def submit(self, timeout: float | None, fn: Any, args: Any, kwargs: dict[str, Any]) -> Future[Any]:
        if self._home != os.getpid():
            raise RuntimeError(
                f"this Executor belongs to process {self._home}, of which this one is a fork; make one here"
            )
        future: Future[Any] = Future()
        future._pool = self
        try:
            task = _Task(future, timeout, fn, args, kwargs)
        except Exception as error:
            self._check()
            future.set_running_or_notify_cancel()
            future.set_exception(error)
            return future
        try:
            with self._lock:
                self._check()
                self._ensure_thread()
                slot = self._idle.popitem()[1] if self._idle else None
                if slot is not None:
                    task.begin()
                    self._begin(slot, task)
                else:
                    busy = sum(slot.task is not None for slot in self._slots.values())
                    if busy + len(self._waiting) < self._max_workers:
                        task.begin()
                    self._waiting.append(task)
            if slot is not None:
                self._send(slot, task)
            if slot is None or timeout is not None:
                self._alarm()
        except BaseException:  # a Ctrl-C, say: nobody will ask for it
            future.cancel()
            raise
        return future

    def _check(self) -> None:
        with self._lock:
            if self._broken is not None:
                raise self._broken_error()
            if self._closing:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if _is_over:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    def cancel(self, future: Future[Any]) -> bool:
        """Ends the worker that runs this."""
        with self._lock:
            waits = next((task for task in self._waiting if task.future is future), None)
            slots = self._slots.values()
            slot = next((it for it in slots if it.task is not None and it.task.future is future), None)
            if waits is not None:
                self._waiting.remove(waits)
            elif slot is None or slot.end is not None:
                # It has just been done, or is being ended for another reason.
                return False
            else:
                slot.end = "cancel"
                _native.kill(slot.worker._key)
            # Of what is in either place nobody else ends the future.
            with future._condition:
                future._state = "CANCELLED"
                future._condition.notify_all()
        if waits is not None:
            future.set_running_or_notify_cancel()
        future._invoke_callbacks()  # type: ignore[attr-defined]
        return True

    def close(self, *, cancel: bool, kill: bool = False) -> None:
        """Takes no more tasks."""
        if self._home != os.getpid():
            return
        with self._lock:
            self._closing = True
            dropped = [task for task in self._waiting if cancel and (kill or not task.is_begun)]
            for task in dropped:
                self._waiting.remove(task)
            if kill:
                for slot in self._slots.values():
                    if slot.end in (None, "leave", "mute"):
                        slot.end = "kill"
                        _native.kill(slot.worker._key)
        for task in dropped:
            if task.is_begun:
                _settle(task.future, BrokenExecutor("the pool was told to kill its workers"))
            elif task.future.cancel():
                task.future.set_running_or_notify_cancel()
        self._alarm()

    def join(self) -> None:
        """Waits until all is over."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread() and self._home == os.getpid():
            thread.join()

    def workers(self) -> list[Worker]:
        with self._lock:
            return [slot.worker for slot in self._slots.values()]

    def _ensure_thread(self) -> None:
        global _registered
        if self._thread is not None:
            return
        if _registered != os.getpid():
            # Before the threads of the program are joined, which this one is among.
            try:
                threading._register_atexit(_close_all)  # type: ignore[attr-defined]
            except RuntimeError as error:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown") from error
            _registered = os.getpid()
        wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        thread = threading.Thread(target=self._run, name=f"th-{self._name}")
        self._wake = wake
        try:
            thread.start()
        except BaseException:
            self._wake = None
            os.close(wake)
            raise
        self._thread = thread
        _pools.add(self)

    def _alarm(self) -> None:
        """Has the thread look around."""
        with self._lock:
            if self._wake is not None:
                os.eventfd_write(self._wake, 1)

    # -- a call ------------------------------------------------------------------------------------------

    def _begin(self, slot: _Slot, task: _Task) -> None:
        """Its next task is this; with the lock."""
        slot.task = task
        slot.number += 1
        slot.since = time.monotonic()
        slot.deadline = None if task.timeout is None else slot.since + task.timeout

    def _send(self, slot: _Slot, task: _Task) -> None:
        """Without the lock: large arguments take their time."""
        try:
            if task.main is not None and not slot.has_main and not has_our_main(slot.worker.backend):
                slot.has_main = True
                slot.link.send(_calls.MAIN, 0, Packed(task.main))
            slot.link.send(_calls.CALL, slot.number, task.target.packed, task.target.passed)
        except ConnectionError:
            return  # it has died, which the thread will hear of
        except Exception as error:
            with self._lock:
                if slot.task is not task:  # it has died meanwhile
                    return
                slot.task, slot.deadline = None, None
            _settle(task.future, error)
            self._free(slot)

    def _free(self, slot: _Slot) -> None:
        """It has nothing to do any more."""
        with self._lock:
            if slot.end is not None:
                return
            if self._max_tasks is not None and slot.done >= self._max_tasks:
                self._dismiss(slot)
                return
            task = self._next()
            if task is None:
                slot.since = time.monotonic()
                self._idle[slot.worker.id] = slot
                return
            self._begin(slot, task)
        self._send(slot, task)

    def _next(self) -> _Task | None:
        """The first one that nobody has cancelled; it counts as running from now on. With the lock."""
        while self._waiting:
            task = self._waiting.popleft()
            if task.begin():
                return task
        return None

    def _dismiss(self, slot: _Slot) -> None:
        """Lets it go; with the lock."""
        slot.end = "leave"
        slot.deadline = time.monotonic() + _LEAVE
        # It reads the end of the file; the thread closes the socket.
        slot.link.socket.shutdown(socket.SHUT_WR)

    # -- the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        wake = self._wake
        assert wake is not None
        with select.epoll() as poller:
            poller.register(wake, select.EPOLLIN)
            try:
                while self._tend(poller):
                    for fd, _ in poller.poll(self._patience()):
                        if fd == wake:
                            os.eventfd_read(fd)
                        elif fd in self._places:
                            slot, is_end = self._places[fd]
                            (self._bury if is_end else self._hear)(slot, poller)
            except BaseException as error:
                # Nobody is to wait for what no thread sees to any more.
                self._break(error)
                for slot in list(self._slots.values()):
                    slot.worker.kill()
                    self._bury(slot, poller)
                raise
            finally:
                with self._lock:
                    self._wake = None
                os.close(wake)

    def _tend(self, poller: select.epoll) -> bool:
        """Does what is due; whether there is anything left to wait for."""
        now = time.monotonic()
        with self._lock:
            for slot in self._slots.values():
                if slot.deadline is not None and slot.deadline <= now:
                    slot.deadline = None
                    slot.end = slot.end or "timeout"
                    _native.kill(slot.worker._key)
            over = self._closing and not self._waiting
            for slot in self._slots.values():
                spent = self._idle_timeout is not None and slot.since + self._idle_timeout <= now
                if slot.ready and slot.task is None and slot.end is None and (over or spent):
                    self._idle.pop(slot.worker.id, None)
                    self._dismiss(slot)
        while self._wants_worker() and self._start(poller):
            pass
        with self._lock:
            return bool(not self._closing or self._waiting or self._slots)

    def _patience(self) -> float | None:
        """Seconds until something is due."""
        with self._lock:
            due = [slot.deadline for slot in self._slots.values() if slot.deadline is not None]
            if self._idle_timeout is not None:
                due += [slot.since + self._idle_timeout for slot in self._idle.values()]
            if self._waiting and self._not_before:
                due.append(self._not_before)
        return None if not due else max(0.0, min(due) - time.monotonic())

    def _wants_worker(self) -> bool:
        with self._lock:
            stay = [slot for slot in self._slots.values() if slot.end is None]
            starting = sum(not slot.ready for slot in stay)
            # Those that are on their way out do not count, within reason.
            room = len(stay) < self._max_workers and len(self._slots) < 2 * self._max_workers
            return room and len(self._waiting) > starting and time.monotonic() >= self._not_before

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
        with self._lock:
            self._slots[worker.id] = slot
        for fd, is_end in ((ours.fileno(), False), (worker.fileno(), True)):
            self._places[fd] = (slot, is_end)
            poller.register(fd, select.EPOLLIN)
        return True

    def _not_started(self, error: Exception) -> None:
        """Where the machine has no room for another one, those that there are go on."""
        if not isinstance(error, OSError):
            self._break(error)
            return
        with self._lock:
            if self._slots:
                self._not_before = time.monotonic() + _AGAIN
                return
        self._fail_waiting(lambda: error)

    def _fail_waiting(self, error: Callable[[], Exception]) -> None:
        """Has all that wait for a worker fail."""
        with self._lock:
            dropped, self._waiting = self._waiting, collections.deque()
        for task in dropped:
            if task.begin():
                _settle(task.future, error())

    def _hear(self, slot: _Slot, poller: select.epoll) -> None:
        """It has said something, or can't any more."""
        try:
            message = slot.link.receive(wait=False)
        except BlockingIOError:
            return
        except ConnectionResetError:
            # It has ended without having read all that it was sent.
            slot.is_unread = True
            message = None
        except OSError as error:
            # Of this process's, which the worker has nothing to do with.
            self._answered(slot, error)
            return
        except ValueError as error:
            self._distrust(slot, str(error))
            return
        if message is None:
            self._forget(slot.link.fileno(), poller)
            with self._lock:
                if slot.end is None:
                    slot.end = "mute"
                    slot.deadline = time.monotonic() + _LEAVE
                    self._idle.pop(slot.worker.id, None)
        elif message.kind == _calls.READY:
            self._stillborn = 0
            slot.ready = True
            self._free(slot)
        elif slot.task is None or message.number != slot.number:
            self._distrust(slot, "an answer that nobody has asked for")
        elif message.kind == _calls.RAISED and _is_being_ended(slot):
            return  # it is that which has raised something; its end says why
        else:
            self._answered(slot, message)

    def _distrust(self, slot: _Slot, confusion: str) -> None:
        """It does not say what it should."""
        with self._lock:
            slot.end = slot.end or "mute"
            slot.confusion = confusion
            self._idle.pop(slot.worker.id, None)
            _native.kill(slot.worker._key)

    def _answered(self, slot: _Slot, answer: _calls.Message | Exception) -> None:
        with self._lock:
            task, slot.task, slot.deadline = slot.task, None, None
            slot.done += 1
        if task is not None:
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
        with self._lock:
            slot.end = slot.end or "dead"
            self._idle.pop(slot.worker.id, None)
        while slot.task is not None and slot.link.fileno() in self._places:
            before = slot.task
            self._hear(slot, poller)  # what it said last
            if slot.task is before:
                break
        self._forget(slot.link.fileno(), poller)
        self._forget(slot.worker.fileno(), poller)
        slot.link.close()
        with self._lock:
            del self._slots[slot.worker.id]
            task, slot.task = slot.task, None
            if task is not None and slot.is_unread and slot.end in ("dead", "mute") and not task.is_second:
                # It died while it waited for one, of something else.
                task.is_second = True
                self._waiting.appendleft(task)
                task = None
        error = death_of(slot.worker)
        if not slot.ready and slot.end in ("dead", "mute"):
            self._stillborn += 1
            if isinstance(error, RemoteError) or self._stillborn >= _MOST_STILLBORN:
                self._break(error)
        if task is None:
            return
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
        with self._lock:
            self._broken = self._broken or error
        self._fail_waiting(self._broken_error)

    def _broken_error(self) -> BrokenExecutor:
        error = BrokenExecutor(f"the workers of the pool can't be started: {self._broken}")
        error.__cause__ = self._broken
        return error


def _is_being_ended(slot: _Slot) -> bool:
    """Whether its worker climbs the ladder, or has ended by it."""
    if slot.end is not None:
        return True
    found = slot.worker.exit
    return slot.worker.state == "killing" if found is None else found.rung is not None


def _settle(future: Future[Any], error: BaseException) -> None:
    """The task has failed; unless it was cancelled meanwhile."""
    try:
        future.set_exception(error)
    except concurrent.futures.InvalidStateError:
        # Who waits for several of them is told of that only now: the worker is gone.
        future.set_running_or_notify_cancel()


def _settle_answer(future: Future[Any], answer: _calls.Message) -> None:
    good, value = _remote.answer(answer.content, returned=answer.kind == _calls.RETURNED)
    if not good:
        _settle(future, value)
        return
    try:
        future.set_result(value)
    except concurrent.futures.InvalidStateError:
        future.set_running_or_notify_cancel()
