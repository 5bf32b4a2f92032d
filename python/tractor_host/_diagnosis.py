"""What this Python offers, for `tractor-host doctor`. It imports what it asks about."""

from __future__ import annotations

import os
from typing import Any

from tractor_host import _native

#: Extension modules that many programs have. Only those that are here count.
_ASKED = (
    "_ctypes",
    "_decimal",
    "_datetime",
    "_json",
    "_socket",
    "_sqlite3",
    "_ssl",
    "curses",
    "numpy",
    "pandas",
)


def of_python() -> dict[str, Any]:
    """The ladder's rungs, and what else was looked at: `what` came of it, and whether that is `good`."""
    return {
        "rungs": _native.rungs("subint"),
        "layout": _layout(),
        "own_gil": _own_gil(),
        "preload": _preload(),
    }


def _layout() -> dict[str, Any]:
    missing = _native.layout()
    return {"good": missing is None, "what": missing or "the private structures of this Python are known"}


def _own_gil() -> dict[str, Any]:
    """Which extension modules take a GIL of their own, found out by importing them in such an interpreter."""
    import _interpreters
    from importlib.util import find_spec

    refused: list[str] = []
    taken: list[str] = []
    interpreter = _interpreters.create("isolated", reqrefs=False)
    try:
        for name in _ASKED:
            if find_spec(name) is None:
                continue
            failed = _interpreters.exec(interpreter, f"import {name}")
            (taken if failed is None else refused).append(name)
    finally:
        _interpreters.destroy(interpreter)
    # It says something about the modules, and nothing is wrong with the machine.
    what = f"taken by {', '.join(taken) or 'none'}; refused by {', '.join(refused) or 'none'}"
    return {"good": True, "what": what}


def _preload() -> dict[str, Any]:
    """Whether the modules that the environment has the fork server import are there."""
    from importlib.util import find_spec

    names = [name.strip() for name in os.environ.get("TRACTOR_HOST_PRELOAD", "").split(",") if name.strip()]
    missing = []
    for name in names:
        try:
            found = find_spec(name) is not None
        except ImportError, ValueError:
            found = False
        if not found:
            missing.append(name)
    if missing:
        return {
            "good": False,
            "what": f"TRACTOR_HOST_PRELOAD names {', '.join(missing)}, which are not there",
        }
    return {"good": True, "what": ", ".join(names) or "nothing (TRACTOR_HOST_PRELOAD)"}
