"""Running an async target under trio, in the worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from tractor_host import _child
from tractor_host._errors import Cancelled


def canceller(scope: trio.CancelScope) -> Callable[[], None]:
    """What cancels a scope of the running loop from another thread; nothing, once the loop is over."""
    token = trio.lowlevel.current_trio_token()

    def cancel() -> None:
        try:
            token.run_sync_soon(scope.cancel)
        except trio.RunFinishedError:
            return

    return cancel


def run(target: Any, args: Any, kwargs: Any) -> Any:
    """Runs `target` under `trio.run`; the supervisor's cancellation cancels the scope around it."""

    async def main() -> Any:
        with trio.CancelScope() as scope:
            _child.set_canceller(canceller(scope))
            return await target(*args, **kwargs)
        raise Cancelled

    return trio.run(main)
