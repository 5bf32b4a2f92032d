"""Running an async target under trio, in the worker."""

from __future__ import annotations

from typing import Any

import trio

from tractor_host import _child
from tractor_host._errors import Cancelled


def run(target: Any, args: Any, kwargs: Any) -> Any:
    """Runs `target` under `trio.run`; the supervisor's cancellation cancels the scope around it."""

    async def main() -> Any:
        token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as scope:

            def cancel() -> None:
                try:
                    token.run_sync_soon(scope.cancel)
                except trio.RunFinishedError:
                    return

            _child.set_canceller(cancel)
            return await target(*args, **kwargs)
        raise Cancelled

    return trio.run(main)
