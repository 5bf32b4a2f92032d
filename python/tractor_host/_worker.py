"""The handle to a worker, and how it ended. Knows no event loop."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, final

from tractor_host import _native
from tractor_host._errors import (
    RemoteError,
    WorkerAbandoned,
    WorkerCancelled,
    WorkerDied,
    WorkerError,
    WorkerKilled,
)

if TYPE_CHECKING:
    from tractor_host._quarantine import StuckThread

Kind = Literal["returned", "raised", "cancelled", "killed", "signalled", "exited", "abandoned"]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Exit:
    """How a worker ended.

    Attributes:
        kind: `"returned"` and `"raised"`: the target did. `"cancelled"`: it was asked to stop and did.
            `"killed"`: a later rung of the kill ladder ended it. `"signalled"`: a signal that the
            supervisor did not send. `"exited"`: it left with an exit code and without a result.
            `"abandoned"`: it could not be ended.
        rung: The rung that ended it: `"cancel"`, `"interrupt"`, for a subinterpreter `"unwind"`,
            `"unblock"` or `"destroy"`, for a process `"sigterm"` or `"sigkill"`; `"abandoned"` when none
            did; `None` when it ended by itself.
        code: Its exit code, where there was one. `None` when a signal ended it.
        signal: The number of the signal that ended its process, or `None`.
        cause: What happened, for people.
        stderr: If it died: the end of what it wrote to stderr as far as that was recorded (always during
            its boot; later with `stdio="pipe"`), and where in Python it crashed.
        stuck: If it did not listen: what its threads were in when the ladder came to `"unblock"`,
            `"destroy"` or `"sigkill"` from an earlier rung (empty otherwise; where hundreds are killed at
            once, only some are looked at). As in `quarantine`.
        elapsed: Seconds from the first request to end it until its end; `None` when nobody asked.
        lifetime: Seconds from its spawn to its end.
    """

    kind: Kind
    rung: str | None
    code: int | None
    signal: int | None
    cause: str
    stderr: str
    elapsed: float | None
    lifetime: float
    stuck: tuple[StuckThread, ...] = ()


def _exit(found: dict[str, Any]) -> Exit:
    if found["stuck"]:
        from tractor_host._quarantine import threads_of

        found = {**found, "stuck": threads_of(found["stuck"])}
    else:
        found = {**found, "stuck": ()}
    return Exit(**found)


@final
class Worker:
    """A worker that was spawned; made by `spawn` and `workers` alone.

    It is a context manager: leaving the block kills it. A handle that is dropped lets the worker run
    on; it is ended with the program at the latest.
    """

    __slots__ = ("__weakref__", "_host", "_info", "_loaded", "_warns")

    _info: dict[str, Any]
    _host: int
    _loaded: tuple[bool, Any] | None
    _warns: bool

    def __init__(self) -> None:
        raise TypeError("a Worker is made by tractor_host.spawn()")

    @classmethod
    def _of(cls, info: dict[str, Any], *, warns: bool) -> Self:
        """Takes over one counted handle; `warns` if it is the one that has to be waited for."""
        worker = object.__new__(cls)
        worker._info = info
        worker._host = os.getpid()
        worker._loaded = None
        worker._warns = warns
        return worker

    @property
    def id(self) -> int:
        """Unique in the process that spawned it."""
        return int(self._info["id"])

    @property
    def _key(self) -> int:
        """The id, for the supervisor of this process: not in a forked copy of the host."""
        if self._host != os.getpid():
            raise RuntimeError(
                f"this process was forked by os.fork() from process {self._host}, to which worker "
                f"{self.name!r} belongs; only that one can wait for it or end it"
            )
        return self.id

    @property
    def name(self) -> str:
        """Its name, which `ps` shows too."""
        return str(self._info["name"])

    @property
    def backend(self) -> str:
        """The backend that it runs on."""
        return str(self._info["backend"])

    @property
    def target(self) -> str:
        """What it runs, in words."""
        return str(self._info["target"])

    @property
    def pid(self) -> int | None:
        """Its process id; `None` for a subinterpreter."""
        pid = self._info["pid"]
        return None if pid is None else int(pid)

    @property
    def parent(self) -> int | None:
        """The id of the worker that asked for it; `None` when the program did."""
        parent = self._info["parent"]
        return None if parent is None else int(parent)

    @property
    def ladder(self) -> dict[str, float]:
        """The rungs that `kill` climbs, in order, and the seconds for each."""
        return dict(self._info["ladder"])

    @property
    def state(self) -> str:
        """`"booting"`, `"running"`, `"cancelling"`, `"killing"` or `"ended"`."""
        return str(_native.info(self._key)["state"])

    @property
    def exit(self) -> Exit | None:
        """How it ended; `None` while it has not."""
        found = _native.exit(self._key)
        return None if found is None else _exit(found)

    def wait(self, timeout: float | None = None) -> Exit:
        """Waits for its end.

        Args:
            timeout: Seconds; `None` waits without a bound. Signals (Ctrl-C) are handled meanwhile.

        Raises:
            TimeoutError: It has not ended by then. It runs on.
        """
        if not _native.wait(self._key, finite("timeout", timeout)):
            raise TimeoutError(f"worker {self.name!r} has not ended within {timeout} s; it runs on")
        found = self.exit
        assert found is not None, "a worker that has ended has an exit"
        return found

    def result(self, timeout: float | None = None) -> Any:
        """Waits for its end and returns its target's value.

        Of a value over 1 MiB, the buffers (a numpy array's data, say) lie where the worker has put them: they
        are not copied. They can be written to, and are freed with the last object that refers to them.

        Raises:
            RemoteError: The target raised; the exception is `__cause__`.
            WorkerDied: It ended without a result, and nobody had asked for that.
            WorkerKilled: It was ended on request (`WorkerCancelled`: cleanly; `WorkerAbandoned`: not even).
            TimeoutError: It has not ended by then. It runs on.
            OSError: There was no descriptor left here for a large value.
        """
        found = self.wait(timeout)
        what = f"worker {self.name!r} ({self.backend}, {self.target})"
        match found.kind:
            case "returned" | "raised":
                return self._value(found, what)
            case "signalled" | "exited":
                last = f"\n\nThe last of its stderr:\n{found.stderr.rstrip()}" if found.stderr else ""
                raise WorkerDied(f"{what} died: {found.cause}{last}", found)
            case "cancelled":
                raise WorkerCancelled(f"{what}: {found.cause}", found)
            case "abandoned":
                raise WorkerAbandoned(f"{what}: {found.cause}", found)
            case "killed":
                raise WorkerKilled(f"{what}: {found.cause}", found)

    def _value(self, found: Exit, what: str) -> Any:
        if self._loaded is None:
            from tractor_host import _parcel, _remote

            payload = _native.outcome(self._key)
            assert payload is not None, "a worker that returned or raised sent something"
            self._loaded = _remote.load(_parcel.opened(payload), raised=found.kind == "raised")
        good, value = self._loaded
        if good:
            return value
        raised, traceback = value
        how = found.cause if found.kind == "raised" else "returned a value that does not unpickle here"
        raise RemoteError(f"{what} {how}", found, traceback) from raised

    def cancel(self) -> None:
        """Asks it to stop, and returns at once.

        A trio or asyncio target is cancelled by its loop; a sync target gets `Cancelled` raised in it.
        Nothing forces it to comply: that is `kill`.
        """
        _native.cancel(self._key)

    def kill(self) -> Exit:
        """Ends it, and waits until it is gone: `cancel` first, then rung by rung.

        Bounded by `cancel_timeout + kill_timeout` (and a second at least for SIGKILL) of its spawn.
        Does nothing to a worker that has ended.
        """
        _native.kill(self._key)
        return self.wait()

    @property
    def paused(self) -> bool:
        """Whether `pause` was called last, and not `resume`; `False` once it is to end."""
        return bool(_native.info(self._key)["paused"])

    def pause(self) -> None:
        """Has it stand still, with the workers that it has spawned, and returns.

        A process is stopped with everything below it (SIGSTOP), and has stopped then. Each thread of a
        subinterpreter waits before its next instruction of Python, without the GIL; what it does in C code,
        as in a system call, it ends first.

        Its `timeout` goes on counting. `cancel` and `kill` resume it. Does nothing to a worker that is
        paused, is being killed or has ended.

        Raises:
            TimeoutError: The supervisor did not come round to it.
        """
        _native.pause(self._key, True)

    def resume(self) -> None:
        """Lets it go on, with the workers that it has spawned, but for those that are paused themselves.

        Everything below its process is continued (SIGCONT), also what was stopped before. Does nothing to a
        worker that is not paused.

        Raises:
            TimeoutError: The supervisor did not come round to it.
        """
        _native.pause(self._key, False)

    def fileno(self) -> int:
        """An fd that polls readable once the worker has ended.

        It belongs to the worker: don't read from it and don't close it.
        """
        return _native.fileno(self._key)

    @property
    def stdout(self) -> bytes:
        """What it has written to stdout so far; with `stdio="pipe"` only."""
        return _native.output(self._key, False)

    @property
    def stderr(self) -> bytes:
        """What it has written to stderr so far; with `stdio="pipe"` only."""
        return _native.output(self._key, True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Worker cannot be pickled or copied: it is a handle of this process")

    def __repr__(self) -> str:
        if self._host != os.getpid():
            return f"<Worker {self.name!r} of process {self._host}>"
        found = self.exit
        state = self.state if found is None else f"{found.kind}: {found.cause.partition(chr(10))[0]}"
        pid = "" if self.pid is None else f" pid={self.pid}"
        return f"<Worker {self.id} {self.name!r} {self.backend}{pid} {state}>"

    # A handle can outlive the names of this module, at the interpreter's end.
    def __del__(
        self,
        getpid: Callable[[], int] = os.getpid,
        exit_of: Callable[[int], object] = _native.exit,
        release: Callable[[int], None] = _native.release,
    ) -> None:
        info = getattr(self, "_info", None)
        if info is None or self._host != getpid():
            return
        try:
            running = exit_of(info["id"]) is None
        except Exception:  # the process was forked behind our back: its workers are not ours
            return
        release(info["id"])
        if running and self._warns and warnings is not None:
            warnings.warn(
                f"worker {info['name']!r} is still running and nobody waits for it: use it as a context "
                "manager, or wait() for it",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


def death_of(worker: Worker) -> WorkerError:
    """Why it has ended, of all things. What it said may be lost, for want of memory or descriptors here."""
    try:
        worker.result(0)
    except WorkerError as error:
        # Its traceback, and that of what is being handled just now, would keep the handle, and with it a
        # descriptor.
        error.__context__ = None
        return error.with_traceback(None)
    except Exception as error:
        from tractor_host import _remote

        found, lost = worker.wait(), _remote.summary(error)
        return WorkerDied(f"worker {worker.name!r} left: {found.cause}; what it said is lost: {lost}", found)
    return WorkerDied(f"worker {worker.name!r} left: {worker.wait().cause}", worker.wait())


#: Longer than anybody waits, and short enough for every clock.
_ENDLESS = 1e9


def finite(name: str, seconds: float | None) -> float | None:
    """A bound in seconds, or none, as the supervisor takes it.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative or NaN.
    """
    return None if seconds is None else budget(name, seconds)


def budget(name: str, seconds: float) -> float:
    """A bound in seconds as the supervisor takes it.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative or NaN.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(seconds).__name__}")
    if seconds != seconds or seconds < 0:  # NaN differs from itself
        raise ValueError(f"{name} must be a number of seconds, at least 0, not {seconds}")
    return _ENDLESS if seconds > _ENDLESS else float(seconds)
