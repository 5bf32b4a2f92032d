"""Records for the log: from `logging` in a worker to `logging` in who has started it."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from tractor_host import _calls, _remote
from tractor_host._calls import Datagram
from tractor_host._parcel import Packed, unpack

if TYPE_CHECKING:
    from tractor_host._calls import Link, Message


def level_of(asked: int | str) -> int:
    """A level of `logging`'s; one that has a name only here can be used there, too.

    Raises:
        TypeError, ValueError: It is none.
    """
    if isinstance(asked, str):
        level = logging.getLevelNamesMapping().get(asked)
        if level is None:
            raise ValueError(f"log_level must be a level of logging's, not {asked!r}")
        return level
    if isinstance(asked, bool) or not isinstance(asked, int):
        raise TypeError(f"log_level must be an int or a str, not {type(asked).__name__}")
    return int(asked)


def take(message: Message, attribute: str, who: str) -> None:
    """Logs here what `who` has logged there. What it has from a worker of its own keeps that one's name.

    Args:
        message: What has come.
        attribute: What of the record is to say who it was.
        who: That.
    """
    try:
        record = logging.makeLogRecord({attribute: who, **unpack(message.content)})
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    except Exception:  # a filter's: whoever has logged it has nothing to do with that
        logging.getLogger("tractor_host").exception("a record of %s %r could not be logged", attribute, who)


def send_from_now_on(link: Link, level: int) -> None:
    """Has all that is logged here, from that level on, told to whoever started this."""
    global _sender
    _sender = _Sender(link)
    logging.root.handlers[:] = [_sender]
    logging.root.setLevel(level)


def finish() -> None:
    """Has the records counted that were lost after the last one that was not."""
    if _sender is not None:
        _sender.finish()


class _Sender(logging.Handler):
    """It waits for nobody: what finds no room is lost, and counted in the next record that does."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link
        self._home = os.getpid()
        #: So many have found no room since the last one that did. `Handler.lock` is for it.
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        if os.getpid() != self._home:
            return
        try:
            content = _content_of(record)
            content["lost_before"] = self._lost
            datagram = Datagram(_calls.LOG, 0, 0.0, Packed(content))
            try:
                datagram.send(self._link.socket, wait=False)
                self._lost = 0
            except BlockingIOError:
                self._lost += 1
            finally:
                datagram.close()
        except OSError:
            return  # nobody listens any more
        except Exception:
            self.handleError(record)

    def finish(self) -> None:
        if self._lost:
            what = "the last %d records of it were lost: there was no room for them"
            self.handle(
                logging.LogRecord("tractor_host", logging.WARNING, __file__, 0, what, (self._lost,), None)
            )


_sender: _Sender | None = None


def _content_of(record: logging.LogRecord) -> dict[str, Any]:
    """A record without what can't be sent, or unpickled there: its text is made here."""
    content: dict[Any, Any] = {_plain(key): _plain(value) for key, value in list(record.__dict__.items())}
    try:
        text = record.getMessage()
    except Exception as error:
        text = f"{_plain(record.msg)} (its arguments do not fit: {_remote.summary(error)})"
    content["message"] = content["msg"] = _plain(text)
    content["args"] = None
    if record.exc_info:
        content["exc_text"] = logging.Formatter().formatException(record.exc_info)
        content["exc_info"] = None
    return content


def _plain(value: object) -> str | int | float | bool | None:
    """The value, if it is one of these and of no type of its own; else what it is of them, or its text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    try:
        return str.__str__(value if isinstance(value, str) else str(value))
    except Exception as error:
        return f"<{type(value).__qualname__} that has no text: {_remote.summary(error)}>"
