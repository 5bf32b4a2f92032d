"""What this process has of the library's own, to look at.

A fork of a process that has some has none of it, and can't have any: there nothing is to be seen.
"""

from __future__ import annotations

from typing import Any

from tractor_host import _native


def workers() -> list[dict[str, Any]]:
    """Its workers."""
    try:
        return _native.workers()
    except RuntimeError:
        return []


def of_fork_server() -> dict[str, list[int]]:
    """The `processes` of its fork server, and the `fds` that it takes to keep them."""
    try:
        return _native.fork_server_owns()
    except RuntimeError:
        return {"processes": [], "fds": []}
