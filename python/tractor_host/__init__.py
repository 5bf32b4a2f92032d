"""Spawn Python workers that you can always kill.

    >>> import tractor_host as th
    >>> worker = th.spawn("math:factorial", 20)
    >>> worker.result(timeout=10)
    2432902008176640000

The names below are loaded when they are first used: a worker imports this package too, and starts
faster for what it does not load.
"""

from typing import TYPE_CHECKING, Any

from tractor_host._native import __version__

if TYPE_CHECKING:
    from tractor_host._errors import (
        Cancelled,
        RemoteError,
        WorkerAbandoned,
        WorkerCancelled,
        WorkerDied,
        WorkerError,
        WorkerKilled,
    )
    from tractor_host._quarantine import Quarantined, StuckFrame, StuckThread, quarantine
    from tractor_host._share import Fd, Shared, share
    from tractor_host._spawn import BACKENDS, Statistics, preload, rungs, spawn, statistics, workers
    from tractor_host._target import Source
    from tractor_host._worker import Exit, Worker

__all__ = [
    "BACKENDS",
    "Cancelled",
    "Exit",
    "Fd",
    "Quarantined",
    "RemoteError",
    "Shared",
    "Source",
    "Statistics",
    "StuckFrame",
    "StuckThread",
    "Worker",
    "WorkerAbandoned",
    "WorkerCancelled",
    "WorkerDied",
    "WorkerError",
    "WorkerKilled",
    "__version__",
    "preload",
    "quarantine",
    "rungs",
    "share",
    "spawn",
    "statistics",
    "workers",
]

_HOMES = {
    "BACKENDS": "_spawn",
    "Cancelled": "_errors",
    "Exit": "_worker",
    "Fd": "_share",
    "Quarantined": "_quarantine",
    "RemoteError": "_errors",
    "Shared": "_share",
    "Source": "_target",
    "Statistics": "_spawn",
    "StuckFrame": "_quarantine",
    "StuckThread": "_quarantine",
    "Worker": "_worker",
    "WorkerAbandoned": "_errors",
    "WorkerCancelled": "_errors",
    "WorkerDied": "_errors",
    "WorkerError": "_errors",
    "WorkerKilled": "_errors",
    "preload": "_spawn",
    "quarantine": "_quarantine",
    "rungs": "_spawn",
    "share": "_share",
    "spawn": "_spawn",
    "statistics": "_spawn",
    "workers": "_spawn",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = __import__(f"{__name__}.{home}", fromlist=[name])
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
