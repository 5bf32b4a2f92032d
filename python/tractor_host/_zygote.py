"""The fork server: imports what workers need, then does nothing but fork.

It runs in a process of its own, in one thread. What it forks are children of the host. For workers whose code
runs in a second interpreter it has one of those too, for each kind of GIL that was asked for.
"""

import sys

from tractor_host import _native
from tractor_host._child import _fs_decode, refuses_own_gil

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: What every worker imports sooner or later; the first of them in the main interpreter only.
_ALWAYS = ("faulthandler", "atexit", "os", "signal", "runpy", "ast", "threading", "tractor_host._remote")


def main() -> None:
    """Does the fork server's work. Returns in forked workers only."""
    order = _native.zygote_order()
    sys.path[:] = map(_fs_decode, order["spec"]["path"])
    _prepare(order)
    _native.zygote_serve()


def prepare_apart() -> None:
    """In a second interpreter, which workers are to adopt: imports what the first has imported."""
    import os

    register = os.register_at_fork

    def register_and_note(**callbacks: Callable[[], object]) -> None:
        register(**callbacks)
        if "after_in_child" in callbacks:
            _after_in_child.append(callbacks["after_in_child"])

    # CPython calls those of the interpreter that forks, and has no way to call those of another.
    os.register_at_fork = register_and_note  # type: ignore[assignment]
    try:
        _prepare(_native.zygote_order())
    finally:
        os.register_at_fork = register


#: What modules of a second interpreter want done in a forked child.
_after_in_child: list[Callable[[], object]] = []


def after_fork() -> None:
    """In a second interpreter that a forked worker has adopted: what is due in a child."""
    for callback in _after_in_child:
        try:
            callback()
        except Exception as error:
            if isinstance(error, ValueError) and "set_wakeup_fd" in str(error):
                continue  # asyncio's, which takes one back; no second interpreter has one
            sys.excepthook(type(error), error, error.__traceback__)  # as CPython does


def _prepare(order: dict[str, Any]) -> None:
    sys.argv = list(map(_fs_decode, order["spec"]["argv"]))
    for name in _ALWAYS[not _native.is_main_interpreter() :]:
        __import__(name)
    failures = []
    for name in order["preload"]:
        try:
            __import__(name)
        except BaseException as error:
            if refuses_own_gil(error):
                continue  # if a worker needs it, that will be its failure, or it has a way round
            import traceback

            text = "".join(traceback.format_exception(error))
            failures.append({"module": name, "traceback": text[-_LONGEST:]})
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    import gc

    # What is there stays: a collection in a worker would write to, and so copy, every page of it.
    gc.collect()
    gc.freeze()
    _native.zygote_prepared(failures)


#: Characters of a traceback that are passed on: its end.
_LONGEST = 16_000
