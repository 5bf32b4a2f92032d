"""Running an async target under asyncio, in the worker."""

from __future__ import annotations

import asyncio
from typing import Any

from tractor_host import _child
from tractor_host._errors import Cancelled


def run(target: Any, args: Any, kwargs: Any) -> Any:
    """Runs `target` under `asyncio.run`; the supervisor's cancellation cancels its task."""

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None, "asyncio.run runs its coroutine as a task"

        def cancel() -> None:
            try:
                loop.call_soon_threadsafe(task.cancel)
            except RuntimeError:  # the loop is closed: it is over
                return

        _child.set_canceller(cancel)
        return await target(*args, **kwargs)

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if _child.was_cancelled():
            raise Cancelled from None
        raise
