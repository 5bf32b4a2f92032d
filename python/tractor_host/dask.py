"""Tasks of dask's in workers that can be killed, on every machine of a cluster: `Plugin` for `distributed`.

    client.register_plugin(tractor_host.dask.Plugin(task_timeout=60))

A worker of dask's hands each task to an executor. The plugin gives it one of ours, and a task that nobody
wants any more, which dask itself would let run on, is ended.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, final

try:
    from dask._task_spec import GraphNode
    from distributed import Reschedule, WorkerPlugin
    from distributed.core import error_message
except ImportError as error:
    raise ImportError(
        "tractor_host.dask is for programs that use dask.distributed: pip install 'tractor-host[dask]'",
        name=error.name,
    ) from error

from tractor_host._by_value import ByValue
from tractor_host._errors import WorkerCancelled, WorkerKilled
from tractor_host._remote import summary
from tractor_host._spawn import preload as preload_modules
from tractor_host._target import describe
from tractor_host._worker import finite
from tractor_host.executor import Executor

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["Plugin"]

#: What a worker of dask's calls what it is doing.
_RUNNING: Final = ("executing", "long-running")


class Plugin(WorkerPlugin):  # type: ignore[misc]
    """Has dask workers carry out tasks in workers of their own, each of which can be killed.

    A task that takes too long, crashes or is cancelled costs its own worker alone, which is replaced; the
    worker of dask's lives on.
    """

    def __init__(
        self,
        *,
        executor: str = "default",
        max_workers: int | None = None,
        task_timeout: float | None = None,
        preload: Iterable[str] = (),
        **options: Any,
    ) -> None:
        """Makes one, for `Client.register_plugin`.

        Args:
            executor: For which tasks: all (`"default"`), or those of `dask.annotate(executor=...)` with this
                name. The threads that dask had for all are the executor `"threads"` then.
            max_workers: As many at a time; by default as the worker of dask's has threads.
            task_timeout: Seconds that each task may take; `dask.annotate(task_timeout=...)` says otherwise.
            preload: Modules for `tractor_host.preload`, in each worker of dask's.
            options: Of `tractor_host.Executor`.

        Raises:
            TypeError, ValueError: An argument can't be right; the text says which and why.
        """
        if not isinstance(executor, str):
            raise TypeError(f"executor must be a name, not {type(executor).__name__}")
        if isinstance(preload, str):
            raise TypeError("preload takes a list of module names, not one name")
        self.name = "tractor_host" if executor == "default" else f"tractor_host-{executor}"
        self._executor = executor
        self._preload = list(preload)
        self._options = {"name": "dask", **options, "max_workers": max_workers, "task_timeout": task_timeout}
        # What is wrong is to be told here.
        Executor(**self._options)
        self._tasks: _Tasks | None = None
        self._replaced: concurrent.futures.Executor | None = None

    async def setup(self, worker: Worker) -> None:
        """Dask's: gives it the executor."""
        if self._preload:
            await asyncio.to_thread(preload_modules, self._preload)
        options = dict(self._options)
        if options["max_workers"] is None:
            options["max_workers"] = worker.state.nthreads
        self._tasks = _Tasks(worker, Executor(**options))
        self._replaced = worker.executors.get(self._executor)
        worker.executors[self._executor] = self._tasks
        if self._executor == "default" and self._replaced is not None:
            # It goes on with what it has begun, and dask shuts down what stands there.
            worker.executors.setdefault("threads", self._replaced)

    async def teardown(self, worker: Worker) -> None:
        """Dask's: ends all that is left."""
        tasks, self._tasks = self._tasks, None
        if tasks is None:
            return
        if worker.executors.get(self._executor) is tasks:
            del worker.executors[self._executor]
            if self._replaced is not None:
                worker.executors[self._executor] = self._replaced
        if self._replaced is not None and worker.executors.get("threads") is self._replaced:
            del worker.executors["threads"]
        await asyncio.to_thread(tasks.shutdown)

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        """Dask's: ends a task that is not wanted any more."""
        if start in _RUNNING and finish in ("cancelled", "released", "forgotten") and self._tasks is not None:
            self._tasks.cancel(key)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tasks": None, "_replaced": None}


@final
class _Tasks(concurrent.futures.Executor):
    """What a worker of dask's submits its tasks to, from its event loop."""

    def __init__(self, worker: Worker, pool: Executor) -> None:
        self._worker = worker
        self._pool = pool
        self._max_workers = pool._max_workers
        self._running: dict[Any, concurrent.futures.Future[Any]] = {}
        self._is_over = False

    def submit[**P, T](
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        """Has it carried out. Its future fails with what dask understands."""
        node = args[0] if args else None
        pool: concurrent.futures.Executor = self._pool
        key, what = None, describe(fn)
        if isinstance(node, GraphNode):
            key, what = node.key, f"{node.key}"
            task = self._worker.state.tasks.get(key)
            limit = None if task is None else (task.annotations or {}).get("task_timeout")
            if limit is not None:
                pool = self._pool.with_timeout(finite("task_timeout", limit))
        inner = pool.submit(ByValue(_Call(fn, args, kwargs), what))
        # Not running, so that it can be cancelled by the loop.
        outer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        if key is not None:
            self._running[key] = inner
        outer.add_done_callback(lambda _: inner.cancel() if outer.cancelled() else None)
        inner.add_done_callback(functools.partial(self._done, key, outer))
        return outer

    def _done(
        self,
        key: Any,
        outer: concurrent.futures.Future[Any],
        inner: concurrent.futures.Future[Any],
    ) -> None:
        if self._running.get(key) is inner:
            del self._running[key]
        if not outer.set_running_or_notify_cancel():
            return
        error = None if inner.cancelled() else inner.exception()
        if inner.cancelled() or (self._is_over and type(error) in (WorkerKilled, WorkerCancelled)):
            outer.set_result(_put_back())
        elif error is None:
            outer.set_result(inner.result())
        elif isinstance(error, Exception):
            outer.set_exception(error)
        else:
            # What ends a program must not end the worker of dask's.
            wrapped = RuntimeError(f"the task was left with {summary(error)}")
            wrapped.__cause__ = error
            outer.set_exception(wrapped)

    def cancel(self, key: Any) -> None:
        """Ends a task, if it is carried out here."""
        future = self._running.get(key)
        if future is not None:
            future.cancel()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends all workers: dask waits for no task any more, or carries it out elsewhere."""
        self._is_over = True
        self._pool.terminate_workers()


@final
class _Call:
    """A task, in the worker that can be killed."""

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._fn = fn
        self._args = args
        self._kwargs = kwargs

    def __call__(self) -> ByValue:
        result = self._fn(*self._args, **self._kwargs)
        if isinstance(result, dict) and result.get("op") == "task-erred":
            error = result["actual_exception"]
            if not isinstance(error, Exception):
                # dask catches all of them, and no client of it gets over one. `Cancelled` ends the task.
                raise error
            if not isinstance(error, Reschedule):
                # It is there in bytes, too, whatever it is; this one may be such that it can't be pickled.
                result["actual_exception"] = RuntimeError(result["exception_text"])
        return ByValue(result, "a result")


def _put_back() -> dict[str, Any]:
    """As if the task had asked for being carried out again: dask sees to that if it is wanted, or was asked
    for once more meanwhile, and else forgets it.
    """
    error = Reschedule("its worker was ended")
    return {**error_message(error), "op": "task-erred", "actual_exception": error, "thread": None}
