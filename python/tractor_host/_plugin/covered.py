"""What coverage measures in a group's process: it goes to the process that reports it.

coverage saves at the end of Python, which such a process does not come to.
"""

from __future__ import annotations

import glob
import os
import sys
import warnings
from typing import Any

import pytest

from tractor_host._loaded import loaded


def begin(folder: str) -> None:
    """In a process that was just forked: keeps what is measured from now on in a file of its own."""
    data = getattr(_current(), "_data", None)
    if data is not None:
        # Who has it sees by itself that it is in a fork, and opens a new file; by these.
        data._basename, data._suffix = os.path.join(folder, "coverage"), str(os.getpid())


def save() -> None:
    """At its end: writes that."""
    measured = _current()
    if measured is not None:
        measured.stop()
        measured.save()


def collect(folder: str) -> None:
    """In the process that has forked it: takes over what was written."""
    measured = _current()
    for path in glob.glob(os.path.join(glob.escape(folder), "coverage.*")):
        try:
            if measured is not None:
                data = sys.modules["coverage"].CoverageData(path)
                data.read()
                measured.get_data().update(data)
                data.close()
        except Exception as error:
            what = f"what coverage has measured in a group's process can't be read: {error}"
            warnings.warn(pytest.PytestWarning(what), stacklevel=2)
        os.unlink(path)


def _current() -> Any:
    """The measurement that is under way, if there is one."""
    module = loaded("coverage")
    return None if module is None else module.Coverage.current()
