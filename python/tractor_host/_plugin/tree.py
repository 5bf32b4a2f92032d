"""The processes below one: to find them, and to end them all."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Collection
from typing import Final

#: Between the values of a variable that marks processes.
SEPARATOR: Final = ":"
#: Seconds that killed processes have to be gone.
_PATIENCE = 5.0


def children(pid: int | str = "self") -> list[int]:
    """The pids of a process's children, zombies included."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has just ended
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    return found


def descendants(pid: int | str = "self", *, but: Collection[int] = ()) -> list[int]:
    """The pids of all processes below one, the nearest first; but for these, and what is below them."""
    found = []
    level = [child for child in children(pid) if child not in but]
    while level:
        found += level
        level = [child for parent in level for child in children(parent) if child not in but]
    return found


def end_below(pid: int | str = "self", *, but: Collection[int] = ()) -> list[int]:
    """Kills all processes below one, and waits until they have ended, within limits.

    They are all stopped first: one that is killed leaves its children to somebody else, and who runs on could
    make more.

    Returns:
        The pids of those that are still there.
    """
    held: dict[int, int] = {}
    deadline = time.monotonic() + _PATIENCE
    try:
        while time.monotonic() < deadline:
            new = [found for found in descendants(pid, but=but) if found not in held]
            if not new:
                break
            for found in new:
                with contextlib.suppress(ProcessLookupError):
                    held[found] = os.pidfd_open(found)
                    signal.pidfd_send_signal(held[found], signal.SIGSTOP)
        for pidfd in held.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return [found for found, pidfd in held.items() if not ended(pidfd, deadline - time.monotonic())]
    finally:
        for pidfd in held.values():
            os.close(pidfd)


def ended(pidfd: int, timeout: float) -> bool:
    """Waits until a process has ended, for at most `timeout` seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(timeout, 0) * 1000))


def describe(pid: int) -> str:
    """What a process is: its pid and its command line, or its name where it has none."""
    text = ""
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            text = file.read().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        if not text:
            with open(f"/proc/{pid}/comm") as file:
                text = f"[{file.read().strip()}]"
    return f"process {pid} ({text if len(text) <= 100 else text[:99] + '…'})"


def is_marked(pid: int | str, variable: str, value: str) -> bool:
    """Whether a process was started with this variable in its environment, and this among its values."""
    mark = f"{variable}=".encode()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        for entry in file.read().split(b"\0"):
            if entry.startswith(mark):
                return value in os.fsdecode(entry[len(mark) :]).split(SEPARATOR)
    return False


def marked(variable: str, value: str) -> list[int]:
    """The pids of all processes but this one that are so marked."""
    names = [name for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
    return [int(name) for name in names if is_marked(name, variable, value)]


def end_marked(variable: str, value: str) -> None:
    """Kills all processes, but this one, that are so marked."""
    deadline = time.monotonic() + _PATIENCE
    while (found := marked(variable, value)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
