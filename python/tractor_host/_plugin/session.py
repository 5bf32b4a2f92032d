"""What of the plugin a session needs, put together and taken apart again."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tractor_host._plugin import relay, tree
from tractor_host._plugin.leaks import Allowed, Leaks
from tractor_host._plugin.limit import Channel, Limit
from tractor_host._plugin.output import Output
from tractor_host._plugin.watch import VARIABLE, Terms, start_watcher

if TYPE_CHECKING:
    from tractor_host.pytest_plugin import Settings


class Parts:
    """The plugins of a session whose tests run in this process, or in those that it forks.

    A context manager, which takes them apart.
    """

    def __init__(
        self,
        session: pytest.Session,
        settings: Settings,
        limit_of: Callable[[pytest.Item], float | None] | None,
    ) -> None:
        self._pid = os.getpid()
        self._session = session
        self._config = session.config
        self._settings = settings
        self._limit_of = limit_of
        self._allowed = [_allowed(line) for line in self._config.getini("spawn_leaks_allow")]
        for item in session.items:
            for mark in item.iter_markers("allow_leaks"):
                _check(item.nodeid, mark)
        self._terms = Terms("", settings.grace)
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._undo:
            self._set_up()
            self._undo = self._undo.pop_all()

    def __exit__(self, *exc_info: object) -> None:
        if self._pid == os.getpid():  # and not in a test's fork that has run on
            self._undo.close()

    def _set_up(self) -> None:
        folder = tempfile.mkdtemp(prefix="tractor-host-pytest-")
        self._undo.callback(shutil.rmtree, folder, ignore_errors=True)
        self._terms = Terms(folder, self._settings.grace)
        outer = os.environ.get(VARIABLE)
        self._undo.callback(_restore, outer)
        os.environ[VARIABLE] = tree.SEPARATOR.join(filter(None, (outer, self._terms.name)))

        channel, isolate = None, self._settings.isolate
        if self._settings.leaks or isolate is not None:
            # pytest makes it for the first test that wants it: here it is no test's, and that of all groups.
            with contextlib.suppress(AttributeError, OSError):
                self._config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        if self._limit_of is not None or isolate is not None:
            # pytest-xdist reports by itself that one of its workers is gone.
            reports = isolate is None and not hasattr(self._config, "workerinput")
            channel = Channel(*start_watcher(self._session, self._terms, reports=reports))
            self._undo.callback(channel.close)
            if reports:
                teller = relay.Relay(self._config, channel.tell)
                self._undo.callback(self._config.pluginmanager.unregister, teller)
        if isolate is None:
            self._equip(channel)
        else:
            _refuse_reruns(self._session)
            from tractor_host._plugin.isolate import Isolation

            isolation = Isolation(self._session, isolate, self._terms, self._equip)
            self._undo.callback(isolation.finish)
            self._register(isolation)

    def _equip(self, channel: Channel | None) -> None:
        """Makes the plugins of a process that runs tests. `channel` leads to who looks at it."""
        if self._config.getoption("capture", "no") in ("sys", "tee-sys"):
            output = Output(os.path.join(self._terms.folder, f"output-{os.getpid()}"))
            self._undo.callback(output.close)
            self._register(output)
        if channel is not None and self._limit_of is not None:
            limit = Limit(channel, self._terms, self._limit_of)
            self._undo.callback(limit.close)
            self._register(limit)
        if self._settings.leaks:
            leaks = Leaks(self._allowed, self._config.rootpath, self._terms.name)
            self._undo.callback(leaks.close)
            self._register(leaks)

    def _register(self, plugin: object) -> None:
        self._config.pluginmanager.register(plugin)
        self._undo.callback(self._config.pluginmanager.unregister, plugin)


def _refuse_reruns(session: pytest.Session) -> None:
    """pytest-rerunfailures runs a test's protocol itself, which is not what a group's process does."""
    config = session.config
    asked = getattr(config.option, "reruns", None) or any(
        item.get_closest_marker("flaky") for item in session.items
    )
    if config.pluginmanager.hasplugin("rerunfailures") and asked:
        raise pytest.UsageError("--spawn-isolate can't run a test once more: pytest-rerunfailures is in use")


def _restore(value: str | None) -> None:
    if value is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = value


def _allowed(line: str) -> Allowed:
    kind, _, pattern = line.partition(":")
    try:
        return Allowed.of([kind.strip()], pattern.strip())
    except ValueError as error:
        raise pytest.UsageError(f"spawn_leaks_allow: {error}") from None


def _check(nodeid: str, mark: pytest.Mark) -> None:
    try:
        Allowed.of(mark.args, **mark.kwargs)
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"{nodeid}: allow_leaks: {error}") from None
