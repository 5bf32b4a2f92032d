"""A backend of joblib's: its calls are carried out by a `tractor_host.Executor`.

tractor_host.joblib.register()
with joblib.parallel_config("tractor_host", n_jobs=2):
    joblib.Parallel()(joblib.delayed(f)(i) for i in range(10))
"""

# What methods without types return is inferred.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import inspect
import os
import pickle
import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any, Final, final

try:
    import cloudpickle  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import joblib
    from joblib._parallel_backends import (
        AutoBatchingMixin,
        FallbackToBackend,
        ParallelBackendBase,
        SequentialBackend,
    )
except ImportError as error:
    raise ImportError(
        "tractor_host.joblib is for programs that use joblib: pip install 'tractor-host[joblib]'",
        name="joblib",
    ) from error

from tractor_host._by_value import ByValue
from tractor_host._future import Future
from tractor_host._remote import RemoteTraceback, UnpicklableError, summary
from tractor_host._spawn import resolve_backend
from tractor_host._target import describe
from tractor_host.executor import Executor

__all__ = ["Backend", "register"]

#: What joblib itself hands to every backend.
_JOBLIBS: Final = {"context", "max_nbytes", "mmap_mode", "prefer", "require", "temp_folder", "verbose"}
#: Seconds after which a worker that has nothing to do leaves.
_IDLE: Final = 60.0
_OPTIONS: Final = {
    "spawn_backend", *(inspect.signature(Executor).parameters.keys() - {"max_workers", "backend"})
}  # fmt: skip


def register() -> None:
    """Has joblib know the backend `"tractor_host"`."""
    joblib.register_parallel_backend("tractor_host", Backend)


class Backend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """What `joblib.Parallel` has its calls carried out by.

    Its workers are there for the next call, too. They leave when there is none for a while, and end with the
    backend: when the block of `joblib.parallel_config` that has made it is left.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True

    def __init__(
        self, nesting_level: int | None = None, inner_max_num_threads: int | None = None, **options: Any
    ) -> None:
        """Makes one; joblib does so.

        Args:
            nesting_level: joblib's.
            inner_max_num_threads: joblib's: threads that numpy and the like may have in a worker.
            options: Of `Executor`, but for `max_workers`, which is `n_jobs`; its `backend` is called
                `spawn_backend`. A `task_timeout` is for each call, unless a `batch_size` says that several
                share it.

        Raises:
            TypeError, ValueError: There is no such option, or it can't be right.
        """
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads, **options)
        # joblib would tell of it only when it has begun.
        Executor(1, **_executor_options(options))
        self._pool: Executor | None = None
        self._wanted: tuple[int, dict[str, Any]] | None = None
        self._lock = threading.Lock()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many workers `n_jobs` stands for."""
        if n_jobs is None:
            return 1
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        return n_jobs if n_jobs > 0 else max(joblib.cpu_count() + 1 + n_jobs, 1)

    def configure(
        self,
        n_jobs: int | None = 1,
        parallel: Any = None,
        prefer: str | None = None,
        require: str | None = None,
        **options: Any,
    ) -> int:
        """At the beginning of a call of Parallel, or of its block; how many workers there will be.

        Raises:
            FallbackToBackend: For one, joblib needs none.
            TypeError, ValueError: An option can't be right.
        """
        count = self.effective_n_jobs(n_jobs)
        if count == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        own = {key: value for key, value in options.items() if key not in _JOBLIBS}
        chosen = _executor_options({"idle_timeout": _IDLE, **self.backend_kwargs, **own})
        if resolve_backend(chosen.get("backend")) != "subint":
            base = os.environ if chosen.get("env") is None else chosen["env"]
            chosen["env"] = {**base, **self._prepare_worker_env(n_jobs=count)}
        elif self.inner_max_num_threads is not None:
            raise ValueError("inner_max_num_threads is for processes: 'subint' shares this one's environment")
        with self._lock:
            old = None
            if (count, chosen) != self._wanted:
                old, self._pool = self._pool, None
            if self._pool is None:
                self._pool = Executor(count, **chosen)
            self._wanted = count, chosen
        if old is not None:
            # A generator that uses it goes on in the new one, with what it has not submitted yet.
            old.shutdown(wait=False)
        # That has this one: no loop, which would end the workers some time later.
        self.parallel = weakref.proxy(parallel)
        return count

    def submit(self, func: Any, callback: Callable[[Future[Any]], object] | None = None) -> Future[Any]:
        """Has a worker carry out a batch."""
        pool = self._pool
        if pool is None:
            raise RuntimeError("this joblib.Parallel was aborted, and its workers have been ended")
        first, *others = [describe(call[0]) for call in func.items]
        what = f"{first} and {len(others)} more" if others else first
        future = pool.submit(ByValue(_Batch(func), what))
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """What came of a batch."""
        try:
            result = out.result()
        except CancelledError:
            what = "another joblib.Parallel that uses the same backend was aborted, which ended its workers"
            raise CancelledError(what) from None
        if isinstance(result, _Failure):
            error = result.load()
            error.__cause__ = RemoteTraceback(result.traceback)
            raise error
        return result

    def compute_batch_size(self) -> int:
        """How many calls make a batch, where joblib is not told."""
        if self._wanted is not None and self._wanted[1].get("task_timeout") is not None:
            return 1
        return int(super().compute_batch_size())

    def terminate(self) -> None:
        """At the end of a call of Parallel, or of its block."""
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """A call has failed, is late, or is not waited for any more: ends all workers."""
        with self._lock:
            pool, self._pool = self._pool, None
            if ensure_ready and self._wanted is not None:
                count, chosen = self._wanted
                self._pool = Executor(count, **chosen)
        if pool is not None:
            pool.terminate_workers()

    def get_nested_backend(self) -> tuple[ParallelBackendBase, int | None]:
        """What a Parallel in a call uses, unless it is told: threads, and below them none."""
        chosen = {} if self._wanted is None else self._wanted[1]
        if resolve_backend(chosen.get("backend")) in ("subint", "subint_forkserver"):
            # joblib's are daemon threads, which a subinterpreter can't have.
            return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None
        nested: tuple[ParallelBackendBase, int | None] = super().get_nested_backend()
        return nested


def _executor_options(options: dict[str, Any]) -> dict[str, Any]:
    unknown = options.keys() - _OPTIONS
    if unknown:
        raise TypeError(
            f"the joblib backend 'tractor_host' has no option {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(_OPTIONS))}"
        )
    return {"backend" if key == "spawn_backend" else key: value for key, value in options.items()}


@final
class _Batch:
    """Calls of joblib's, in the worker."""

    def __init__(self, calls: Callable[[], list[Any]]) -> None:
        self._calls = calls

    def __call__(self) -> Any:
        # For calls that use it by its name.
        register()
        try:
            return ByValue(self._calls(), "results")
        except Exception as error:
            if _comes_back(error, pickle.dumps) or not _comes_back(error, cloudpickle.dumps):
                raise
            text = "".join(traceback.format_exception(error))
            return _Failure(cloudpickle.dumps(error), summary(error), text)


@final
class _Failure:
    """An exception that can be sent by value alone: its class is the main module's, say."""

    def __init__(self, data: bytes, summary: str, text: str) -> None:
        self._data = data
        self._summary = summary
        self.traceback = text

    def load(self) -> Exception:
        """The exception, or one that says what it was."""
        try:
            error: Exception = pickle.loads(self._data)
        except Exception as broken:
            return UnpicklableError(f"{self._summary} (it does not unpickle here: {summary(broken)})")
        return error


def _comes_back(error: Exception, dumps: Callable[[object], bytes]) -> bool:
    """Whether it is what comes of it once it is pickled."""
    try:
        return type(pickle.loads(dumps(error))).__name__ == type(error).__name__
    except Exception:
        return False
