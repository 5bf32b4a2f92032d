"""What happens to workers, as events: a look at the last ones, and the bridge to `logging`."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from typing import Any, Final, Self, final

from tractor_host import _native

#: The level of `logging` for each of the supervisor's.
_LEVELS: Final = {
    "ERROR": logging.ERROR,
    "WARN": logging.WARNING,
    "INFO": logging.INFO,
    "DEBUG": logging.DEBUG,
    "TRACE": logging.DEBUG // 2,
}


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        number: Counts from 1 in this process. The last 1,024 are kept.
        monotonic: When, in seconds, by the clock of `time.monotonic()`.
        time: When, in seconds since 1970, as `time.time()` has it.
        level: A level of `logging`.
        logger: `"tractor_host.worker"`, `"tractor_host.ladder"`, `"tractor_host.zygote"` or
            `"tractor_host.supervisor"`.
        kind: What, in a word: `"spawn"`, `"started"`, `"told"` (how the target went), `"cancel"`, `"kill"`,
            `"rung"`, `"signal"`, `"reap"`, `"exit"`, `"quarantine"`, `"reclaim"`, `"refusal"`,
            `"debug"` (it has the terminal, or gives it back);
            `"zygote_start"`, `"zygote_ready"`, `"zygote_lost"`, `"zygote_end"` of the fork server;
            `"supervisor_start"`, `"supervisor_end"`, `"guard"` (what `guard_ctrl_c` and `watch_gil` have to
            say), `"fault"`.
        worker: The id of the worker that it happened to, or `None`.
        name: That worker's name, or `None`.
        backend: Its backend, or `None`.
        pid: The process that it happened to, or `None`.
        fields: The rest, by name; plain data. A text of over 200 bytes is cut off.
        text: All of it in words.
    """

    number: int
    monotonic: float
    time: float
    level: int
    logger: str
    kind: str
    worker: int | None
    name: str | None
    backend: str | None
    pid: int | None
    fields: dict[str, Any]
    text: str


def events(after: int = 0) -> list[Event]:
    """The last events of this process that are kept, at most 1,024, oldest first.

    Args:
        after: Only those with a higher number. A gap between this and the first number returned is what is
            not kept any more.
    """
    return [_event(told) for told in _native.events(after)]


def _event(told: dict[str, Any]) -> Event:
    monotonic, time = told.pop("monotonic_ns") / 1e9, told.pop("time_ns") / 1e9
    level = _LEVELS[told.pop("level")]
    return Event(monotonic=monotonic, time=time, level=level, **told)


@final
class LogBridge:
    """Passes events on to `logging`; made by `log_to_logging`. Leaving it as a context manager closes it."""

    def __init__(self) -> None:
        self._host = os.getpid()
        self._closing = False
        self._seen = _native.events_last()
        self._thread = threading.Thread(target=self._run, name="th-logging", daemon=True)
        self._thread.start()
        _native.events_taken(True)

    def close(self) -> None:
        """Passes on what has happened by now, and stops."""
        global _bridge
        if self._closing or self._host != os.getpid():
            return
        self._closing = True
        if _bridge is self:
            _bridge = None
        _native.events_taken(False)
        self._thread.join()
        self._pass_on(_native.events(self._seen))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing:
            self._pass_on(_native.events_wait(self._seen, 1.0))

    def _pass_on(self, found: list[dict[str, Any]]) -> None:
        for told in found:
            event = _event(told)
            missing = event.number - self._seen - 1
            if missing:
                logging.getLogger("tractor_host").warning("%d events were not passed on in time", missing)
            self._seen = event.number
            logger = logging.getLogger(event.logger)
            if logger.isEnabledFor(event.level):
                logger.handle(_record(event))


def _record(event: Event) -> logging.LogRecord:
    record = logging.LogRecord(event.logger, event.level, __file__, 0, event.text, (), None, event.kind)
    record.created = event.time
    record.msecs = int(event.time % 1 * 1000) + 0.0
    record.threadName = "th-supervisor"
    record.thread = None
    record.event = event
    record.kind = event.kind
    record.worker = event.worker
    record.worker_name = event.name
    record.backend = event.backend
    record.worker_pid = event.pid
    record.fields = event.fields
    return record


_bridge: LogBridge | None = None


def log_to_logging() -> LogBridge:
    """Has events passed on to `logging`, from now on.

    A daemon thread of Python takes them over as they come and hands each to its logger, with the level and
    the time that it has. No supervisor waits for it: what it is late for by more than 1,024 events is counted
    in a warning. Each record has the attributes `kind`, `worker` (the id), `worker_name`, `backend`,
    `worker_pid`, `fields` and `event` (all of it, an `Event`).

    While it is on, the warnings that the supervisor writes to stderr unasked are left to `logging`, but for
    errors; those that `TRACTOR_HOST_LOG` asks for are not.

    Returns:
        The bridge: `close()` it, or leave it as a context manager, to have it stop. The end of the program
        does so too. A second call returns the same.

    Raises:
        RuntimeError: In an interpreter that may have no daemon threads.
    """
    global _bridge
    if _bridge is None or _bridge._host != os.getpid():
        from tractor_host import _spawn

        _bridge = LogBridge()
        # Workers are ended at exit, which is passed on too.
        _spawn.at_exit["logging"] = close_at_exit
        _spawn.end_workers_at_exit()
    return _bridge


def close_at_exit() -> None:
    """Passes on the last of it."""
    if _bridge is not None:
        _bridge.close()
