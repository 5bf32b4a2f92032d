"""The one who looks: at the process that runs tests, from another one, which nothing that a test does stops.

It hears when a test begins and ends. What is over its limit is first made to fail where it is, by a signal
whose handler raises; what does not end by that, `Overdue` tells. A whole session is looked at by a process
that is forked from it before its first test, and that writes the report in its place if need be.
"""

from __future__ import annotations

import _interpreters
import contextlib
import dataclasses
import os
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from socket import MSG_DONTWAIT, socket, socketpair
from typing import Any, Final, NoReturn

import pytest

from tractor_host._plugin import relay, tree

#: What makes a test fail where it is. Nobody else uses it: SIGALRM is pytest-timeout's, or the test's own.
SIGNAL: Final = signal.SIGRTMAX - 1
#: The variable that all processes below a test run have, with the run's name, after those of the runs that it
#: is a part of.
VARIABLE: Final = "TRACTOR_HOST_TEST_RUN"
#: Seconds within which a dump is written, with much to spare.
_DUMP_TIME: Final = 10.0
#: Seconds between two signals to a test that has caught the exception.
_AGAIN: Final = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Terms:
    """What a run is held to.

    Attributes:
        folder: Where its files are, which goes with it.
        grace: Seconds that a test has to end once it has failed by its limit.
    """

    folder: str
    grace: float

    @property
    def name(self) -> str:
        """The run's."""
        return os.path.basename(self.folder)

    @property
    def dump(self) -> str:
        """The file that dumps are written to."""
        return os.path.join(self.folder, "dump")


@dataclasses.dataclass(frozen=True, slots=True)
class Test:
    """A test that runs.

    Attributes:
        nodeid: Its name.
        location: Where it is.
        seconds: Its limit.
        has_dump: There will be a dump when that is over.
        has_signal: The signal makes it fail.
    """

    __test__ = False

    nodeid: str
    location: tuple[str, int | None, str]
    seconds: float
    has_dump: bool = False
    has_signal: bool = False


class Overdue(Exception):
    """A test has not ended, whatever was done."""

    def __init__(self, test: Test, dump: str) -> None:
        super().__init__(exceeded(test.seconds))
        self.test = test
        self.dump = dump


class Gone(Exception):
    """The process that runs tests has ended."""


def exceeded(seconds: float) -> str:
    """What is told of a test that took longer."""
    return f"time limit of {seconds:g} s exceeded"


def read_dump(path: str) -> tuple[str, bool]:
    """What is written of a dump, and whether that is all of it."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
        return text, text.rpartition("\n==== end of the dump ")[1] != ""
    return "", False


class Observed:
    """A process that runs tests, as seen by the one who looks at it."""

    def __init__(
        self, pid: int, pidfd: int, channel: socket, terms: Terms, *, master: int | None = None
    ) -> None:
        """As it is before its first test.

        Args:
            pid: The process.
            pidfd: A descriptor of it.
            channel: What it says.
            terms: What its tests are held to.
            master: A descriptor of a process that it is not to outlive.
        """
        self.pidfd = pidfd
        self._master = master
        self.test: Test | None = None
        self._pid = pid
        self._channel = channel
        self._terms = terms
        self._inbox = relay.Inbox()
        self._waiting: deque[relay.Message] = deque()
        self._due = self._signal = self._end = 0.0
        self._dump: str | None = None
        self._poll = select.poll()
        for source in (channel.fileno(), pidfd, master):
            if source is not None:
                self._poll.register(source, select.POLLIN)

    @property
    def descriptors(self) -> set[int]:
        """What it takes to look."""
        return {self.pidfd, self._channel.fileno(), *([] if self._master is None else [self._master])}

    def next(self) -> relay.Message:
        """Waits for what it has to say, and holds its test to its limit meanwhile.

        Raises:
            Overdue: The test has not ended by its limit, nor by what was done about it.
            Gone: It has ended, and has nothing more to say.
        """
        while True:
            while self._waiting:
                message = self._waiting.popleft()
                if message[0] == "begin":
                    self.test = Test(*message[1:])
                    self._due, self._dump = time.monotonic() + self.test.seconds, None
                elif message[0] == "late":
                    self._let_go_on()
                elif message[0] == "end":
                    self.test = None
                    if message[1]:
                        self._let_go_on()
                else:
                    return message
            left = self._act()
            ready = {fd for fd, _ in self._poll.poll(None if left is None else left * 1000 + 1)}
            if ready and not self._read() and self.pidfd in ready:
                raise Gone
            if self._master in ready:
                self._poll.unregister(self._master)
                self._send(signal.SIGKILL)

    def _let_go_on(self) -> None:
        """It waits for leave, so as not to report what is reported in its place."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            relay.send(self._channel, "go on")

    def _read(self) -> bool:
        """Takes in what is there. Whether there was anything."""
        try:
            data = self._channel.recv(1 << 16, MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        if not data:  # its end comes by the other descriptor
            with contextlib.suppress(KeyError):
                self._poll.unregister(self._channel.fileno())
            return False
        self._waiting.extend(self._inbox.feed(data))
        return True

    def _act(self) -> float | None:
        """Does what is due. Seconds until something is; `None` if nothing will be."""
        if self.test is None:
            return None
        now = time.monotonic()
        if now < self._due:
            return self._due - now
        if self._dump is None:
            if _is_stopped(self._pid):  # by itself, and can do nothing
                self._send(signal.SIGCONT)
            text, whole = read_dump(self._terms.dump)
            if self.test.has_dump and not whole and now < self._due + _DUMP_TIME:
                return 0.01
            grace = self._terms.grace if self.test.has_signal else 0
            self._dump, self._signal, self._end = text, now, now + grace
        if now >= self._end:
            raise Overdue(self.test, self._dump)
        if now >= self._signal:
            if not _catches_signal(self._pid):  # which would end it, with no report
                raise Overdue(self.test, self._dump)
            self._send(SIGNAL)
            self._signal = now + min(_AGAIN, self._terms.grace / 5)
        return min(self._signal, self._end) - now

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, which is seen elsewhere
            signal.pidfd_send_signal(self.pidfd, number)


def _catches_signal(pid: int) -> bool:
    """Whether a process has a handler for the signal."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (SIGNAL - 1) & 1)
    return True  # it has ended, which is seen elsewhere


def _is_stopped(pid: int) -> bool:
    """Whether a process stands still, by SIGSTOP or the like."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"
    return False


# -- the watcher of a session ----------------------------------------------------------------------------


def start_watcher(session: pytest.Session, terms: Terms, *, reports: bool) -> tuple[socket, int]:
    """Forks the process that looks at this one until this one ends.

    It is nobody's child that a test could wait for, and has no part in Ctrl-C.

    Args:
        session: As it is before the first test.
        terms: What its tests are held to.
        reports: It writes the report if this process can't. Otherwise it keeps nothing of the session open.

    Returns:
        The channel on which it wants to hear of all tests, and a descriptor from which the exit code comes
        that this process is to leave with, if it can't come to its end.
    """
    pid, pidfd = os.getpid(), os.pidfd_open(os.getpid())
    # A worker of pytest-xdist's that is stuck would not notice that its controller is gone.
    master = os.pidfd_open(os.getppid()) if hasattr(session.config, "workerinput") else None
    ours, theirs = socketpair()
    told, teller = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Of threads that the child does not have: it does nothing that any of them could be needed for.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            if os.fork():
                os._exit(0)
            os.close(told)
            ours.close()
            observed = Observed(pid, pidfd, theirs, terms, master=master)
            _Watcher(session, observed, terms, teller).run(pid, reports)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    theirs.close()
    os.close(teller)
    os.close(pidfd)
    if master is not None:
        os.close(master)
    if os.WIFSIGNALED(status) and len(_interpreters.list_all()) > 1:
        what = "a subinterpreter was made while tests were collected (by their modules, or a conftest.py)"
        why = "beside one, a fork of this process crashes (cpython#139759)"
        raise pytest.UsageError(f"{what}: {why}, so there is no --spawn-timeout and no --spawn-isolate")
    if status:
        raise RuntimeError("the process that is to look after the time limits could not be forked")
    return ours, told


class _Watcher:
    def __init__(self, session: pytest.Session, observed: Observed, terms: Terms, teller: int) -> None:
        self.session = session
        self.observed = observed
        self.terms = terms
        self.teller = teller

    def run(self, pid: int, reports: bool) -> NoReturn:
        """Looks on until there is nothing left to look at."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, SIGNAL):
            signal.signal(number, signal.SIG_IGN)
        with open("/proc/self/comm", "w") as name:
            name.write("th-watch")
        if not reports:
            _close_all_but(2, self.teller, *self.observed.descriptors)
        journal = []
        try:
            while (message := self.observed.next())[0] != "bye":
                if reports:
                    journal.append(message)
            os._exit(0)
        except Gone:
            # It was killed. What is below it would live on, and its files too.
            tree.end_marked(VARIABLE, self.terms.name)
            if self.observed.test is not None:
                text = f"tractor-host: pytest (pid {pid}) has ended during {self.observed.test.nodeid}\n"
                with contextlib.suppress(OSError):  # nobody reads it
                    os.write(2, text.encode())
        except Overdue as overdue:
            self.end(pid, overdue, journal if reports else None)
        shutil.rmtree(self.terms.folder, ignore_errors=True)
        os._exit(0)

    def end(self, pid: int, overdue: Overdue, journal: list[relay.Message] | None) -> None:
        """Ends all that is below the process, writes the report in its place, and has it leave."""
        code = int(pytest.ExitCode.TESTS_FAILED)
        tree.end_below(pid)
        try:
            if journal is not None:
                self.report(overdue, journal)
            else:
                path = shutil.move(self.terms.dump, f"{self.terms.folder}.dump")
                text = f"tractor-host: {overdue.test.nodeid}: {overdue}; the dump is in {path}\n"
                os.write(2, text.encode())
        except BaseException:
            traceback.print_exc()
            code = int(pytest.ExitCode.INTERNAL_ERROR)
        with contextlib.suppress(BrokenPipeError):
            os.write(self.teller, bytes([code]))
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.observed.pidfd, signal.SIGCONT)
        if not tree.ended(self.observed.pidfd, 5):
            signal.pidfd_send_signal(self.observed.pidfd, signal.SIGKILL)

    def report(self, overdue: Overdue, journal: list[relay.Message]) -> None:
        """Ends the session as that process would, with what it has told, and the test that has not ended."""
        config = self.session.config
        with _muted():  # all of it has been shown
            for message in journal:
                relay.replay(config, message)
        # With --capture=fd the files that tests write to are shared with the process.
        sections = captured(config)
        report = overdue_report(overdue, _phase(overdue.test, journal), sections)
        config.hook.pytest_runtest_logreport(report=report)
        config.hook.pytest_runtest_logfinish(nodeid=overdue.test.nodeid, location=overdue.test.location)
        self.session.shouldfail = f"{overdue} in {overdue.test.nodeid}, which could not be made to end"
        self.session.exitstatus = pytest.ExitCode.TESTS_FAILED
        config.hook.pytest_sessionfinish(session=self.session, exitstatus=self.session.exitstatus)
        config.hook.pytest_unconfigure(config=config)
        sys.stdout.flush()
        sys.stderr.flush()


def captured(config: pytest.Config) -> list[tuple[str, str]]:
    """What tests have written since that was asked last, by the titles that pytest gives it."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    if capture is None or not capture.is_globally_capturing():
        return []
    titles = ("Captured stdout", "Captured stderr")
    return list(zip(titles, capture.read_global_capture(), strict=True))


def overdue_report(overdue: Overdue, when: str, sections: list[tuple[str, str]]) -> pytest.TestReport:
    """The report of a test that could not be made to fail where it was."""
    return pytest.TestReport(
        nodeid=overdue.test.nodeid,
        location=overdue.test.location,
        keywords={},
        outcome="failed",
        longrepr=f"{overdue}, and it could not be made to end",
        when=when,  # type: ignore[arg-type]
        sections=[*((name, text) for name, text in sections if text), dump_section(overdue.dump)],
        duration=overdue.test.seconds,
    )


def dump_section(text: str) -> tuple[str, str]:
    """A dump as a part of a report."""
    return ("tractor-host dump", text or "there is none: it could not be written")


def _phase(test: Test, journal: list[relay.Message]) -> str:
    """Which part of a test runs, after those that it has told of."""
    told = [m[1]["when"] for m in journal if m[0] == "report" and m[1]["nodeid"] == test.nodeid]
    return {"setup": "call", "call": "teardown"}.get(told[-1] if told else "", "setup")


@contextlib.contextmanager
def _muted() -> Any:
    """Nothing that is written to stdout and stderr gets there meanwhile."""
    kept = {number: os.dup(number) for number in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in kept:
        os.dup2(nowhere, number)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, fd in kept.items():
            os.dup2(fd, number)
            os.close(fd)
        os.close(nowhere)


def _close_all_but(*kept: int) -> None:
    """Closes every descriptor but these; what is a standard stream leads nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in {0, 1, 2}.difference(kept):
        os.dup2(nowhere, number)
    for number in [int(name) for name in os.listdir("/proc/self/fd")]:
        if number > 2 and number not in kept:
            with contextlib.suppress(OSError):  # the one that was used to look
                os.close(number)
