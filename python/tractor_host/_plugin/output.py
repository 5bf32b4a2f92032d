"""What workers write, where pytest captures `sys.stdout` alone: it goes to a file, and into the report.

With --capture=fd they have the files that pytest reads, as the test has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import Any

import pytest

from tractor_host import _native, _own


class Output:
    """As a plugin: gives workers that would write to pytest's own stdout and stderr a file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._read = 0
        self._spawn: Callable[..., Any] = _native.spawn
        with open(path, "wb"):
            pass
        setattr(_native, "spawn", self._spawn_here)  # noqa: B010

    def close(self) -> None:
        """Leaves workers to themselves again."""
        setattr(_native, "spawn", self._spawn)  # noqa: B010

    def _spawn_here(self, request: dict[str, Any], *args: Any) -> Any:
        if request["stdio"] == "inherit":
            request["stdio"] = {"path": self._path}
        return self._spawn(request, *args)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        with open(self._path, "rb") as file:
            file.seek(self._read)
            text = file.read()
        self._read += len(text)
        if text:
            item.add_report_section(call.when, "workers", text.decode(errors="replace"))
        if self._read and not _own.workers():  # nobody writes
            os.truncate(self._path, 0)
            self._read = 0
        return (yield)
