"""What is put into tractor so that it knows our backends. None of its files is touched."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from typing import Any, Literal, get_args

try:
    # isort: off
    from tractor_host.tractor import _frames  # before tractor
    import tractor
    import tractor._root
    from tractor import log
    from tractor._exceptions import TransportClosed
    from tractor.devx import _frame_stack
    from tractor.runtime import _rpc
    from tractor.spawn import _spawn
    # isort: on
except ImportError as error:
    raise ImportError(
        f"tractor_host.tractor is for programs that use tractor, which cannot be imported: {error}",
        name=error.name,
    ) from error

from tractor_host.tractor import SPAWN_METHODS, STAND_IN
from tractor_host.tractor._supervise import supervise

__all__ = ["install"]

_log = log.get_logger("tractor")


def install() -> None:
    """See `tractor_host.tractor.install`."""
    registry: Any = _spawn
    registry._methods.update(dict.fromkeys(SPAWN_METHODS, supervise))
    registry.SpawnMethodKey = Literal[*dict.fromkeys((*get_args(registry.SpawnMethodKey), *SPAWN_METHODS))]
    suite: Any = sys.modules.get("tractor._testing.pytest")
    if suite is not None:
        suite.SpawnMethodKey = registry.SpawnMethodKey
    compatible = tractor._root._DEBUG_COMPATIBLE_BACKENDS
    tractor._root._DEBUG_COMPATIBLE_BACKENDS = (
        *compatible,
        *(key for key in SPAWN_METHODS if key not in compatible),
    )
    if not hasattr(_spawn.try_set_start_method, "_tractor_host"):
        stand_in = os.environ.get(STAND_IN)
        if stand_in is not None and stand_in not in SPAWN_METHODS:
            raise ValueError(f"{STAND_IN} is {stand_in!r}, not one of {', '.join(SPAWN_METHODS)}")
        _spawn.try_set_start_method = _setter(_spawn.try_set_start_method, stand_in)
        if registry._spawn_method == "trio" and stand_in is not None:
            registry._spawn_method = stand_in
        _look_at_frames_only()
        _survive_those_who_left()


def _setter(original: Any, stand_in: str | None) -> Any:
    @functools.wraps(original)
    def try_set_start_method(key: str) -> Any:
        if key == "trio" and stand_in is not None:
            key = stand_in
        if key not in SPAWN_METHODS:
            return original(key)
        # Theirs refuses what it does not know, and asks of some names what ours do not need.
        _spawn._ctx = None
        _spawn._spawn_method = key
        return None

    try_set_start_method._tractor_host = True  # type: ignore[attr-defined]
    return try_set_start_method


def _look_at_frames_only() -> None:
    """Has tractor look at stacks as `_frames` does; see there."""

    class Inspect:
        stack = staticmethod(_frames.stack)

        def __getattr__(self, name: str) -> Any:
            return getattr(inspect, name)

    _frame_stack.inspect = Inspect()
    log.stack = _frames.stack


def _survive_those_who_left() -> None:
    """Has an actor outlive who asks something of its runtime and leaves before the answer.

    An actor that unregisters itself waits for half a second; where the registrar took longer, its answer
    found nobody, and that ended the registrar: what is handled there are errors of sockets, and not the
    `TransportClosed` that they have become.
    """
    original = _rpc._invoke_non_context

    @functools.wraps(original)
    async def invoke(
        actor: Any, scope: Any, ctx: Any, cid: str, chan: Any, func: Any, *args: Any, **kwargs: Any
    ) -> None:
        try:
            await original(actor, scope, ctx, cid, chan, func, *args, **kwargs)
        except TransportClosed as error:
            if getattr(func, "__self__", None) is not actor or not _is_of(chan, error):
                raise
            _log.warning(f"{chan.aid.reprol()} left before it was answered: {error}")

    _rpc._invoke_non_context = invoke


def _is_of(chan: Any, error: BaseException) -> bool:
    """Whether it was raised by a method of that channel.

    Whether that is still connected would not tell: it is not seen before something is read from it.
    """
    return any(frame.f_locals.get("self") is chan for frame, _ in traceback.walk_tb(error.__traceback__))
