"""Messages between the process that runs tests and the one that looks: tuples of plain data, and what is told
of tests, as hooks."""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Callable, Iterator
from socket import socket
from typing import Any

import pytest

Message = tuple[Any, ...]
_HEAD = struct.Struct("!I")


def send(channel: socket, *message: Any) -> None:
    """Sends one.

    Raises:
        OSError: Nobody is there any more.
    """
    data = pickle.dumps(message)
    channel.sendall(_HEAD.pack(len(data)) + data)


class Inbox:
    """Puts messages together from what comes in."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole by now. What is cut off when its sender dies is not one."""
        self._data += data
        while len(self._data) >= _HEAD.size:
            end = _HEAD.size + _HEAD.unpack_from(self._data)[0]
            if len(self._data) < end:
                break
            data = bytes(self._data[_HEAD.size : end])
            del self._data[:end]
            yield pickle.loads(data)


def receive(channel: socket, inbox: Inbox) -> Message | None:
    """Waits for the next message of a channel on which one comes at a time; `None` at its end."""
    while data := channel.recv(1 << 16):
        for message in inbox.feed(data):
            return message
    return None


# -- what is told of tests -------------------------------------------------------------------------------


def pack_report(config: pytest.Config, report: pytest.TestReport) -> Message:
    """A report as a message."""
    data = config.hook.pytest_report_to_serializable(config=config, report=report)
    try:
        pickle.dumps(data)
    except Exception as error:
        # Somebody has put something into it that stays in its process; pytest's own is all plain.
        data["user_properties"] = [("not sent", repr(error))]
        data = {key: value for key, value in data.items() if _plain(value)}
    return ("report", data)


def _plain(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


def pack_warning(
    warning: warnings.WarningMessage, when: str, nodeid: str, location: tuple[str, int, str] | None
) -> Message:
    """A recorded warning as a message."""
    told, category = warning.message, warning.category
    if not _plain((told, category)):
        told, category = UserWarning(f"{category.__name__}: {told}"), UserWarning
    return ("warning", (told, category, warning.filename, warning.lineno), when, nodeid, location)


def replay(config: pytest.Config, message: Message) -> None:
    """Calls the hook that a message stands for; those that stand for none are passed over."""
    kind, *content = message
    if kind == "report":
        report = config.hook.pytest_report_from_serializable(config=config, data=content[0])
        config.hook.pytest_runtest_logreport(report=report)
    elif kind == "logstart":
        config.hook.pytest_runtest_logstart(nodeid=content[0], location=content[1])
    elif kind == "logfinish":
        config.hook.pytest_runtest_logfinish(nodeid=content[0], location=content[1])
    elif kind == "warning":
        about, when, nodeid, location = content
        warning = warnings.WarningMessage(*about)
        config.hook.pytest_warning_recorded.call_historic(
            kwargs={"warning_message": warning, "when": when, "nodeid": nodeid, "location": location}
        )


class Warnings:
    """A plugin that registers itself: sends on the warnings of tests in this process."""

    def __init__(self, config: pytest.Config, tell: Callable[..., None]) -> None:
        self._config = config
        self._tell = tell
        config.pluginmanager.register(self)
        # A plugin that is registered is told of all earlier warnings at once: those are known.
        self._is_new = False

    _is_new = True

    def pytest_warning_recorded(
        self,
        warning_message: warnings.WarningMessage,
        when: str,
        nodeid: str,
        location: tuple[str, int, str] | None,
    ) -> None:
        if when == "runtest" and not self._is_new:
            self._tell(*pack_warning(warning_message, when, nodeid, location))


class Relay(Warnings):
    """A plugin that registers itself: sends on all that is told of tests in this process."""

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._tell("logstart", nodeid, location)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._tell(*pack_report(self._config, report))

    def pytest_runtest_logfinish(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._tell("logfinish", nodeid, location)
