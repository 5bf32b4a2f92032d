"""A worker as tractor's supervision sees one: as a process of trio's."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final, final

import trio

from tractor_host import _native

if TYPE_CHECKING:
    from tractor_host._worker import Exit, Worker

__all__ = ["Process"]

#: The backends whose actors run in the main interpreter of a process of their own.
_SIGNALLED: Final = ("forkserver", "fork")


@final
class Process:
    """An actor's worker, with as much of `trio.Process` as supervisors use.

    It has no streams: what it is asked and what it answers goes over tractor's own transports.
    """

    stdin: None = None
    stdout: None = None
    stderr: None = None

    def __init__(self, worker: Worker) -> None:
        self._worker: Worker | None = worker
        self._name = worker.name
        self._backend = worker.backend
        self._pid = worker.pid
        self._exit: Exit | None = None
        # trio lets one task wait for a descriptor.
        self._turn = trio.Lock()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What `isinstance` goes by: tractor passes signals on to what is a process of trio's."""
        return trio.Process

    @property
    def pid(self) -> int | None:
        """Its process id; `None` for a subinterpreter of this process."""
        return self._pid

    @property
    def worker(self) -> Worker | None:
        """The worker; `None` once its end has been taken note of."""
        return self._worker

    @property
    def exit(self) -> Exit | None:
        """How it ended, as tractor-host tells it; `None` while it has not."""
        if self._exit is None and self._worker is not None:
            self._exit = self._worker.exit
        return self._exit

    @property
    def returncode(self) -> int | None:
        """0 if it ended as it should, its exit code, or minus the signal's number; `None` while it runs."""
        found = self.exit
        if found is None:
            return None
        if found.signal is not None:
            return -found.signal
        if found.code is not None:
            return found.code
        return 0 if found.kind in ("returned", "cancelled") else 1

    def poll(self) -> int | None:
        """The return code, if it has ended."""
        return self.returncode

    async def wait(self) -> int:
        """Waits for its end; any number of tasks may."""
        async with self._turn:
            if self.exit is None:
                assert self._worker is not None, "a worker that is given up has ended"
                await trio.lowlevel.wait_readable(self._worker.fileno())
        code = self.returncode
        assert code is not None, "a worker whose descriptor is readable has ended"
        return code

    def terminate(self) -> None:
        """Has it climb its whole ladder: its runtime is cancelled first. Does not wait."""
        if self._worker is not None and self.exit is None:
            _native.kill(self._worker._key)

    def kill(self) -> None:
        """Has it climb its ladder without being asked first. Does not wait."""
        if self._worker is not None and self.exit is None:
            _native.kill_deaf(self._worker._key)

    def send_signal(self, number: int) -> None:
        """Sends it, if it runs. A subinterpreter hears of no signals, and its process would not survive those
        that are for tractor; so it is sent none."""
        if self._pid is not None and self._backend in _SIGNALLED and self.exit is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def close(self) -> None:
        """Gives up the worker's handle, which has a descriptor. It has ended, and nobody waits."""
        if self.exit is not None:
            self._worker = None

    def __repr__(self) -> str:
        if self._worker is not None:
            return f"<Process of {self._worker!r}>"
        cause = "" if self._exit is None else f" {self._exit.cause.partition(chr(10))[0]}"
        return f"<Process of worker {self._name!r} {self._backend} returncode={self.returncode}:{cause}>"
