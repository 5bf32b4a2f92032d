"""Which actor has made which socket file, so that those of the dead can be removed, and no others.

The record is a file in memory, one for each actor that the program's process has started, which that has in
common with all below it: each of them writes a line before it binds. It outlives whoever is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from typing import Final, final

__all__ = ["Record"]

#: Bytes that are read at once.
_CHUNK: Final = 65_536


@final
class Record:
    """The record; a descriptor, which belongs to it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def create(cls) -> Record:
        """A new one.

        Raises:
            OSError: There is no descriptor to be had.
        """
        fd = os.memfd_create("th-tractor-sockets", os.MFD_CLOEXEC)
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        return cls(fd)

    def fileno(self) -> int:
        """Its number."""
        return self._fd

    def close(self) -> None:
        """Closes it; may be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def add(self, owner: str, path: str) -> None:
        """Takes down that an actor is about to bind a socket there."""
        os.write(self._fd, os.fsencode(f"{owner}\t{os.path.abspath(path)}\0"))

    def paths(self, owner: str | None) -> list[str]:
        """What an actor has bound, or, with `None`, all of them."""
        content, at = b"", 0
        while chunk := os.pread(self._fd, _CHUNK, at):
            content += chunk
            at += len(chunk)
        # A line that its writer was killed in is none.
        pairs = [line.partition("\t") for line in os.fsdecode(content).split("\0")[:-1]]
        return [path for name, _, path in pairs if owner is None or name == owner]

    def sweep(self, owner: str | None) -> list[str]:
        """Removes the socket files of an actor that has ended, or of all where none of them is left, and
        returns their paths. A socket that is still bound is not touched: somebody else has that name now."""
        found = [path for path in self.paths(owner) if _is_socket(path)]
        if not found:
            return []
        bound = _bound()
        removed = []
        for path in found:
            if path not in bound:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                    removed.append(path)
        return removed


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:  # gone, as it should be, or in a folder that is
        return False


def _bound() -> set[str]:
    """The paths of all sockets that are bound just now."""
    with open("/proc/net/unix", encoding=None, errors="surrogateescape") as file:
        columns = [line.rstrip("\n").split(maxsplit=7) for line in file]
    return {found[7] for found in columns if len(found) == 8}
