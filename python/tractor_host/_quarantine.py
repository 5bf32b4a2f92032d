"""What could not be ended: subinterpreter workers in C code that does not come back."""

from __future__ import annotations

import dataclasses
from typing import Any, final

from tractor_host import _native


@final
@dataclasses.dataclass(frozen=True, slots=True)
class StuckFrame:
    """One call of a Python function.

    Attributes:
        file: The file that it was compiled from.
        line: The line that it is at; `None` where the compiler noted none.
        function: The function's qualified name.
    """

    file: str
    line: int | None
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class StuckThread:
    """One thread.

    Attributes:
        native_id: The kernel's id of it.
        syscall: The number of the system call that it is in; `None` when it runs.
        frames: Its Python frames, innermost first.
    """

    native_id: int
    syscall: int | None
    frames: tuple[StuckFrame, ...]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Quarantined:
    """A worker that was given up and is still there.

    Attributes:
        id: The worker's id.
        name: Its name.
        target: What it runs, in words.
        age: Seconds since it was spawned.
        threads: What its threads are stuck in, as far as that could be read.
    """

    id: int
    name: str
    target: str
    age: float
    threads: tuple[StuckThread, ...]


def quarantine() -> list[Quarantined]:
    """The subinterpreter workers that could not be ended, oldest first.

    The supervisor goes on trying: one that comes back after all is ended then, leaves this list and is
    counted in `statistics().reclaimed`. Their stacks are read from outside, without their GIL.
    """
    return [_quarantined(entry) for entry in _native.quarantine()]


def _quarantined(entry: dict[str, Any]) -> Quarantined:
    worker, threads = entry["worker"], entry["threads"]
    return Quarantined(
        id=worker["id"],
        name=worker["name"],
        target=worker["target"],
        age=worker["age"],
        threads=threads_of(threads),
    )


def threads_of(threads: list[dict[str, Any]]) -> tuple[StuckThread, ...]:
    """What the supervisor tells of threads."""
    return tuple(
        StuckThread(
            native_id=thread["thread"],
            syscall=thread["syscall"],
            frames=tuple(StuckFrame(**frame) for frame in thread["frames"]),
        )
        for thread in threads
    )
