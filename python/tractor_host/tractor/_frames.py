"""A stack as tractor looks at it: its frames, and nothing of the files that their code is in.

For each of its loggers, and for each call, on both sides, tractor asks `inspect.stack` for all frames, and
takes one. To find their source is half of what its import takes, and more than all else that a call does.
Who imports this before tractor has it imported with a `stack` that does not.
"""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

__all__ = ["stack"]


def stack(context: int = 1) -> list[inspect.FrameInfo]:
    """As `inspect.stack`, without lines of source."""
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        found.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return found


if "tractor" not in sys.modules:
    _inspect: Any = inspect
    _original = _inspect.stack
    _inspect.stack = stack
    try:
        import tractor  # noqa: F401
    finally:
        _inspect.stack = _original
