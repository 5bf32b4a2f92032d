"""The time limit of a test, in the process that runs it: it tells who looks (`watch`) when a test begins and
ends, has a dump written when the time is over, and fails the test where it is."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator
from socket import socket
from types import FrameType
from typing import Any

import pytest

from tractor_host import _native, _own
from tractor_host._plugin import in_trio, relay, tree
from tractor_host._plugin.watch import SIGNAL, Terms, dump_section, exceeded, read_dump

#: Seconds that one who takes a test's report over has for that.
_PATIENCE = 60.0


#: Seconds that a fork waits for the timer's thread to be gone.
_TO_STEP_ASIDE = 0.02


class Channel:
    """The way to who looks at this process. If there is nobody any more, that is told once.

    Attributes:
        told: A descriptor from which an exit code comes, if this process is to leave at once.
    """

    def __init__(self, channel: socket, told: int | None = None) -> None:
        self.told = told
        self._channel = channel
        self._pid = os.getpid()
        self._lost = False

    @property
    def is_ours(self) -> bool:
        """Not in a test's fork that runs on as if it were the session."""
        return self._pid == os.getpid()

    def tell(self, *message: Any) -> None:
        """Sends a message."""
        if self._lost or not self.is_ours:
            return
        try:
            relay.send(self._channel, *message)
        except OSError as error:
            self._lost = True
            what = (
                f"the process that looks after the time limits is gone ({error}): none is in force any more"
            )
            warnings.warn(pytest.PytestWarning(what), stacklevel=2)

    def wait_for_leave(self) -> None:
        """Waits until this process may go on, if it may: its report may be written by another by now."""
        if self._lost or not self.is_ours:
            return
        self._channel.settimeout(_PATIENCE)
        with contextlib.suppress(OSError):
            self._channel.recv(1 << 16)
        self._channel.settimeout(None)

    def close(self) -> None:
        """Says that there is nothing more to look at."""
        self.tell("bye")
        self._channel.close()
        if self.told is not None:
            os.close(self.told)


class Limit:
    """As a plugin: holds each test to its time limit."""

    def __init__(
        self, channel: Channel, terms: Terms, limit_of: Callable[[pytest.Item], float | None]
    ) -> None:
        self._channel = channel
        self._terms = terms
        self._limit_of = limit_of
        self._item: pytest.Item | None = None
        #: The test that has ended, too late.
        self._late: pytest.Item | None = None
        self._seconds = self._deadline = 0.0
        self._number: int | None = None
        self._phase: str | None = None
        self._failed_in: str | None = None
        self._told = False
        self._was_there: tuple[set[int], set[int]] = (set(), set())
        #: The loops of trio's that the exception has left.
        self._left: list[Any] = []
        self._handler: Any = None
        self._is_aside = False
        self._is_ending = False
        # Elsewhere no handler can be installed: there is only the other process.
        self._has_signal = threading.current_thread() is threading.main_thread()
        if self._has_signal:
            self._handler = signal.signal(SIGNAL, self._expired)
        _beside_forks.append(self)

    def close(self) -> None:
        """Gives the signal back."""
        _beside_forks.remove(self)
        if self._has_signal:
            signal.signal(SIGNAL, signal.SIG_DFL if self._handler is None else self._handler)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        seconds = self._limit_of(item)
        if seconds is None or not self._channel.is_ours:
            return (yield)
        self._begin(item, seconds)
        try:
            return (yield)
        finally:
            self._end()

    def _begin(self, item: pytest.Item, seconds: float) -> None:
        self._was_there = _there()
        self._failed_in, self._told, self._late = None, False, None
        self._item, self._seconds, self._deadline = item, seconds, time.monotonic() + seconds
        try:
            self._arm(seconds)
        except OSError as error:  # an earlier test may have used up what it takes
            warnings.warn(
                pytest.PytestWarning(f"there can be no dump of {item.nodeid}: {error}"), stacklevel=2
            )
        has_dump = self._number is not None
        self._channel.tell("begin", item.nodeid, item.location, seconds, has_dump, self._has_signal)

    def _end(self) -> None:
        if self._item is None:
            return
        over = time.monotonic() >= self._deadline
        self._item, self._late = None, self._item if over else None
        self._channel.tell("end", over)
        if over:
            self._channel.wait_for_leave()
        self._disarm()

    def _arm(self, seconds: float) -> None:
        # Its thread is also the one that leaves when that is told, so there is one as long as the test runs.
        path = os.devnull if self._told else self._terms.dump
        with contextlib.suppress(RuntimeError):  # in a fork of a process that has such a timer
            self._number = _native.hang_arm(os.fsencode(path), seconds, self._channel.told)

    def _disarm(self) -> None:
        number, self._number = self._number, None
        if number is not None:
            _native.hang_disarm(number)

    def pytest_enter_pdb(self) -> None:
        """Whoever looks into a test has all the time of the world."""
        self._end()

    # -- forks -------------------------------------------------------------------------------------------

    def step_aside(self) -> None:
        """Before a fork: CPython warns who forks beside other threads, and the timer's must not be why."""
        self._is_aside = self._number is not None and _count_threads() == 2
        if self._is_aside:
            self._disarm()
            # The kernel counts it a moment longer.
            deadline = time.monotonic() + _TO_STEP_ASIDE
            while _count_threads() == 2 and time.monotonic() < deadline:
                os.sched_yield()

    def come_back(self) -> None:
        """After it."""
        if self._is_aside:
            self._arm(max(self._deadline - time.monotonic(), 0))

    # -- the end of a test that is late ------------------------------------------------------------------

    def _expired(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signal: the dump is written."""
        __tracebackhide__ = True
        problem = ""
        if self._item is None or self._phase is None or time.monotonic() < self._deadline:
            return  # it has just ended
        if self._failed_in is None:
            self._failed_in = self._phase
            self._is_ending = True
            try:
                self._end_tree()
            except OSError as error:  # the test may have used up what it takes
                problem = f"; what it has started could not be ended: {error}"
            finally:
                self._is_ending = False
        if (
            self._failed_in == self._phase and not self._is_ending
        ):  # what comes after it has its chance to clean up
            failure = pytest.fail.Exception(exceeded(self._seconds) + problem)
            time_left = self._deadline + self._terms.grace / 2 - time.monotonic()
            if time_left > 0 and in_trio.deliver(frame, failure):
                return
            self._left = in_trio.loops(frame)
            raise failure

    def _end_tree(self) -> None:
        """Ends what the test has started: its workers by their ladders, other processes at once."""
        workers, processes = self._was_there
        now = _own.workers()
        mine = [info["id"] for info in now if info["id"] not in workers]
        for worker in mine:
            _native.kill(worker)
        pids = {info["pid"] for info in now}
        tree.end_below(but={*processes, *pids, *_own.of_fork_server()["processes"]})
        deadline = time.monotonic() + self._terms.grace / 2
        for worker in mine:
            with contextlib.suppress(LookupError):  # it has ended, and nobody has a handle
                _native.wait(worker, max(deadline - time.monotonic(), 0))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        """What a fixture of a wider scope has started is not the test's."""
        if fixturedef.scope == "function":
            return (yield)
        before = _there()
        result = yield
        for others, earlier, now in zip(self._was_there, before, _there(), strict=True):
            others |= now - earlier
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        seconds = self._limit_of(item)
        if item is not self._item and seconds is not None and self._channel.is_ours:
            self._begin(item, seconds)  # it is run once more
        return (yield from self._in("setup"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        return (yield from self._in("call"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        try:
            return (yield from self._in("teardown"))
        finally:
            self._end()

    def _in(self, phase: Any) -> Generator[None, object, object]:
        self._phase = phase
        try:
            return (yield)
        finally:
            self._phase = None
            in_trio.abandon(self._left)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        is_late = item is self._item and time.monotonic() >= self._deadline
        if is_late:
            self._channel.tell("late")
            self._channel.wait_for_leave()
        report = yield
        if (is_late or item is self._late) and not self._told:
            self._told = True
            if is_late:
                self._disarm()  # which waits for a dump that has begun
                with contextlib.suppress(OSError):
                    self._arm(0)
            if report.passed:
                report.outcome = "failed"
                report.longrepr = f"{exceeded(self._seconds)}, if not for long"
            report.sections.append(dump_section(read_dump(self._terms.dump)[0]))
        return report


def _there() -> tuple[set[int], set[int]]:
    """The workers and the child processes that there are."""
    return {info["id"] for info in _own.workers()}, set(tree.children())


def _count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


#: Those whose timers step aside while this process forks. What is told of forks is told for ever.
_beside_forks: list[Limit] = []


def _before_fork() -> None:
    for limit in _beside_forks:
        limit.step_aside()


def _after_fork() -> None:
    for limit in _beside_forks:
        limit.come_back()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_beside_forks.clear)
