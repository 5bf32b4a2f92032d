"""Groups of tests in processes of their own: what ends one, ends the tests of no other group.

This process collects, reports and keeps the time. A group's process is a fork of it, made at the group's
first test, and ends with its last; if it ends earlier, or has to be ended, the next test gets another one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from socket import socket, socketpair
from typing import Any, Final, NoReturn

import pytest
from _pytest.runner import runtestprotocol

from tractor_host._plugin import covered, relay, tree
from tractor_host._plugin.limit import Channel
from tractor_host._plugin.watch import Gone, Observed, Overdue, Terms, Test, captured, overdue_report

#: What can be a group, and the nodes that are the same for all tests of one.
GROUPS: Final[dict[str, Any]] = {
    "test": pytest.Item,
    "class": pytest.Class,
    "module": pytest.Module,
}
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
#: Seconds that a group's process has to clean up and leave when there are no more tests for it.
_PATIENCE: Final = 10.0


class Isolation:
    """As a plugin: runs each group of tests in a process of its own."""

    def __init__(
        self,
        session: pytest.Session,
        by: str,
        terms: Terms,
        equip: Callable[[Channel], None],
    ) -> None:
        """As it begins.

        Args:
            session: Which has collected.
            by: The name of one of the `GROUPS`.
            terms: What the tests are held to.
            equip: Makes the plugins of a group's process, with the way to this one.
        """
        self._session = session
        self._by = by
        self._terms = terms
        self._equip = equip
        self._places = {item: place for place, item in enumerate(session.items)}
        self._group: object = None
        self._runner: _Runner | None = None
        self._child: _Child | None = None
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        if self._child is not None:
            self._child.run(item, nextitem)
            return True
        group = self._group_of(item)
        if self._runner is not None and (group is not self._group or self._runner.has_ended):
            self.finish()
        self._group = group
        last = nextitem is None or self._group_of(nextitem) is not group
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        if self._runner is None:
            self._runner = self._start()
        for message in self._runner.run(item, None if last else nextitem, self._places):
            relay.replay(item.config, message)
        if self._runner.is_gone:
            self._runner = None
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if last or self._session.shouldfail or self._session.shouldstop:
            self.finish()
        return True

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_set_timer(self, item: pytest.Item) -> bool | None:
        """pytest-timeout's timers are for the process that the test is in."""
        return True if self._child is None else None

    def finish(self) -> None:
        """Ends the process of the present group, if there is one: after its last test, or after Ctrl-C."""
        runner, self._runner = self._runner, None
        if runner is not None and self._child is None:
            runner.finish()
            covered.collect(self._terms.folder)

    def _group_of(self, item: pytest.Item) -> object:
        # A function of no class has its module for one, and what is no function its file.
        return item.getparent(GROUPS[self._by]) or item.parent

    def _start(self) -> _Runner:
        ours, theirs = socketpair()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        parent = os.getpid()
        with warnings.catch_warnings():
            # It is about threads that others of this process have made: there are none of ours.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid:
            theirs.close()
            return _Runner(self._session, pid, ours, self._terms)
        try:
            ours.close()
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(3)
            self._child = _Child(self._session, theirs)
            covered.begin(self._terms.folder)
            self._equip(self._child.channel)
            self._child.serve()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(3)


class _Runner:
    """A group's process, as the one who has made it sees it."""

    def __init__(self, session: pytest.Session, pid: int, channel: socket, terms: Terms) -> None:
        self.is_gone = False
        self._session = session
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._channel = channel
        self._observed = Observed(pid, self._pidfd, channel, terms)
        # What a process leaves behind becomes its subreaper's.
        self._others = [child for child in tree.children() if child != pid]

    @property
    def has_ended(self) -> bool:
        """Whether it is no more, though it has not been told to leave."""
        return tree.ended(self._pidfd, 0)

    def run(
        self, item: pytest.Item, nextitem: pytest.Item | None, places: dict[pytest.Item, int]
    ) -> Iterator[relay.Message]:
        """Has it run a test, and yields what it tells of it. If it comes to nothing, that is told too."""
        begun = time.monotonic()
        try:
            relay.send(self._channel, places[item], None if nextitem is None else places[nextitem])
            while True:
                message = self._observed.next()
                if message[0] == "exit":
                    pytest.exit(*message[1:])
                if message[0] == "interrupted":
                    raise KeyboardInterrupt
                if message[0] == "done":
                    self._session.shouldfail = message[1] or self._session.shouldfail
                    self._session.shouldstop = message[2] or self._session.shouldstop
                    return
                yield message
        except Overdue as overdue:
            self._end()
            report = overdue_report(overdue, "call", self._output())
        except Gone, BrokenPipeError, ConnectionResetError:
            test = Test(item.nodeid, item.location, time.monotonic() - begun)
            how = _how(self._end())
            report = overdue_report(Overdue(test, ""), "call", self._output())
            report.sections.pop()
            report.longrepr = f"the process of this test {how}"
        yield relay.pack_report(item.config, report)

    def finish(self) -> None:
        """Waits until it has left, or ends it."""
        self._channel.close()
        left = tree.ended(self._pidfd, _PATIENCE)
        status = self._end()
        if not left or status:
            how = _how(status) if left else "did not come to its end, and was ended"
            what = f"after its last test, the process of a group of tests {how}"
            warnings.warn(pytest.PytestWarning(what), stacklevel=2)

    def _end(self) -> int:
        """Ends it and all that is below it. Its status."""
        self.is_gone = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
        tree.end_below(self._pid)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        status = os.waitpid(self._pid, 0)[1]
        left = [pid for pid in tree.children() if pid not in self._others]
        tree.end_below(but=self._others)
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._channel.close()
        os.close(self._pidfd)
        return status

    def _output(self) -> list[tuple[str, str]]:
        """What its test has written: with --capture=fd the files that it writes to are shared with it."""
        return captured(self._session.config)


def _how(status: int) -> str:
    """How a process has ended, in words."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"left with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


class _Child:
    """A group's process, from inside."""

    def __init__(self, session: pytest.Session, channel: socket) -> None:
        self.channel = Channel(channel)
        self._session = session
        self._channel = channel
        self._inbox = relay.Inbox()
        for plugin in session.config.pluginmanager.get_plugins():
            if type(plugin).__name__ == "WorkerInteractor":
                # pytest-xdist's way to its controller, which is the other process's.
                session.config.pluginmanager.unregister(plugin)
        relay.Warnings(session.config, self.channel.tell)

    def serve(self) -> NoReturn:
        """Runs the tests that it is told to."""
        try:
            while (order := relay.receive(self._channel, self._inbox)) is not None:
                place, following = order
                items = self._session.items
                item, nextitem = items[place], None if following is None else items[following]
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
                self.channel.tell("done", self._session.shouldfail, self._session.shouldstop)
            self._session._setupstate.teardown_exact(None)
        except pytest.exit.Exception as error:
            self.channel.tell("exit", error.msg, error.returncode)
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):  # the other process may have heard of it, too
                relay.send(self._channel, "interrupted")
            with contextlib.suppress(Exception):
                self._session._setupstate.teardown_exact(None)
        if (spawning := sys.modules.get("tractor_host._spawn")) is not None:
            spawning.shut_down()
        covered.save()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def run(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Runs a test and sends its reports."""
        for report in runtestprotocol(item, log=False, nextitem=nextitem):
            self.channel.tell(*relay.pack_report(item.config, report))
