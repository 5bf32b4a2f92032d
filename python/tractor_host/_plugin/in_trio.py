"""Time limits in a program of trio's: its loop does not survive what rises in the middle of it.

As trio does with Ctrl-C, what would rise in the loop itself is raised in its main task instead. All of this
is private to trio: where it looks different, the exception rises where the thread is.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator
from types import FrameType
from typing import Any

from tractor_host._loaded import loaded


def deliver(frame: FrameType | None, error: BaseException) -> bool:
    """Has it raised in the main task, if this thread runs a loop of trio's and is in none of the tasks.

    For a handler of a signal. The main task may not be in a state for it just now: nothing comes of it then.

    Returns:
        Whether it is to be raised there.
    """
    with contextlib.suppress(
        AttributeError, RuntimeError
    ):  # no loop runs, or not for long; or it is another trio
        runner = _module("_run").GLOBAL_RUN_CONTEXT.runner
        if _module("_ki").ki_protection_enabled(frame):
            runner.entry_queue.run_sync_soon(_raise_in_main, runner, error)
            return True
    return False


def _raise_in_main(runner: Any, error: BaseException) -> None:
    def abort() -> None:
        raise error

    task = runner.main_task
    if task is not None and task._abort_func is not None:
        task._attempt_abort(abort)


def loops(frame: FrameType | None) -> list[Generator[Any, Any, Any]]:
    """The loops that run in this thread, the innermost first."""
    found = []
    with contextlib.suppress(AttributeError):
        code = _module("_run").run.__code__
        while frame is not None:
            if frame.f_code is code:
                found.append(frame.f_locals.get("gen"))
            frame = frame.f_back
    return [loop for loop in found if loop is not None]  # it may not be made yet


def abandon(left: list[Generator[Any, Any, Any]]) -> None:
    """Ends loops that an exception has left in the middle: trio takes them to run still."""
    while left:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that this has happened
            with contextlib.suppress(ValueError):  # one that the tests themselves run in, and runs on
                left.pop(0).close()


def _module(name: str) -> Any:
    return loaded(f"trio._core.{name}")
