"""Spawn Python workers that you can always kill.

    >>> import tractor_host as th
    >>> worker = th.spawn("math:factorial", 20)
    >>> worker.result(timeout=10)
    2432902008176640000

The names below are loaded when they are first used: a worker imports this package too, and starts
faster for what it does not load.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tractor_host import devx, to_worker
    from tractor_host._actor import Actor, check_cancelled, current_actor
    from tractor_host._aio import Stream
    from tractor_host._debug import breakpointhook
    from tractor_host._dump import dump
    from tractor_host._errors import (
        BootTimeout,
        Cancelled,
        RemoteError,
        TaskTimeout,
        WorkerAbandoned,
        WorkerCancelled,
        WorkerDied,
        WorkerError,
        WorkerKilled,
    )
    from tractor_host._events import Event, LogBridge, events, log_to_logging
    from tractor_host._guard import guard_ctrl_c, watch_gil
    from tractor_host._native import __version__
    from tractor_host._quarantine import Quarantined, StuckFrame, StuckThread, quarantine
    from tractor_host._share import Fd, Shared, share
    from tractor_host._spawn import BACKENDS, Statistics, preload, rungs, spawn, statistics, workers
    from tractor_host._target import Source
    from tractor_host._worker import Exit, Worker
    from tractor_host.executor import Executor
    from tractor_host.nursery import Nursery, Portal, open_nursery

__all__ = [
    "BACKENDS",
    "Actor",
    "BootTimeout",
    "Cancelled",
    "Event",
    "Executor",
    "Exit",
    "Fd",
    "LogBridge",
    "Nursery",
    "Portal",
    "Quarantined",
    "RemoteError",
    "Shared",
    "Source",
    "Statistics",
    "Stream",
    "StuckFrame",
    "StuckThread",
    "TaskTimeout",
    "Worker",
    "WorkerAbandoned",
    "WorkerCancelled",
    "WorkerDied",
    "WorkerError",
    "WorkerKilled",
    "__version__",
    "breakpointhook",
    "check_cancelled",
    "current_actor",
    "devx",
    "dump",
    "events",
    "guard_ctrl_c",
    "log_to_logging",
    "open_nursery",
    "preload",
    "quarantine",
    "rungs",
    "share",
    "spawn",
    "statistics",
    "to_worker",
    "watch_gil",
    "workers",
]

_HOMES = {
    "BACKENDS": "_spawn",
    "Actor": "_actor",
    "BootTimeout": "_errors",
    "Cancelled": "_errors",
    "Event": "_events",
    "Executor": "executor",
    "Exit": "_worker",
    "Fd": "_share",
    "LogBridge": "_events",
    "Nursery": "nursery",
    "Portal": "nursery",
    "Quarantined": "_quarantine",
    "RemoteError": "_errors",
    "Shared": "_share",
    "Source": "_target",
    "Statistics": "_spawn",
    "Stream": "_aio",
    "StuckFrame": "_quarantine",
    "StuckThread": "_quarantine",
    "TaskTimeout": "_errors",
    "Worker": "_worker",
    "WorkerAbandoned": "_errors",
    "WorkerCancelled": "_errors",
    "WorkerDied": "_errors",
    "WorkerError": "_errors",
    "WorkerKilled": "_errors",
    "__version__": "_native",
    "breakpointhook": "_debug",
    "check_cancelled": "_actor",
    "current_actor": "_actor",
    "dump": "_dump",
    "events": "_events",
    "guard_ctrl_c": "_guard",
    "log_to_logging": "_events",
    "open_nursery": "nursery",
    "preload": "_spawn",
    "quarantine": "_quarantine",
    "rungs": "_spawn",
    "share": "_share",
    "spawn": "_spawn",
    "statistics": "_spawn",
    "watch_gil": "_guard",
    "workers": "_spawn",
}


def __getattr__(name: str) -> Any:
    if name in ("devx", "to_worker"):
        return __import__(f"{__name__}.{name}", fromlist=[name])
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = __import__(f"{__name__}.{home}", fromlist=[name])
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
