"""Dumps: what every thread is doing, who holds the GILs, which workers and tasks there are."""

from __future__ import annotations

import os
from typing import Literal, Protocol

from tractor_host import _native


class Writable(Protocol):
    """What has a `write` that takes text."""

    def write(self, text: str, /) -> object:
        """Takes it."""


def dump(
    file: str | os.PathLike[str] | int | Writable | None = None,
    *,
    format: Literal["text", "json"] = "text",
    tree: bool = True,
) -> None:
    """Writes what this process, its workers and all other processes below it are doing.

    Each thread with its names, state, system call, what it waits for and its Python stack; who holds which
    GIL; the tasks of trio and asyncio; the workers with their states, ages and pids. It is read from outside:
    no thread is asked or waited for, so it makes no difference what they are stuck in. It takes some
    milliseconds and two seconds at most; what there was no time or no right to read is listed at the end.

    Args:
        file: A path (the file is replaced), a descriptor, or an object with a `write` that takes text.
            `None`: where dumps go, which is the file or the directory that `TRACTOR_HOST_DUMP` names, or
            else stderr (under the launcher the one that the program was started with, which pytest does not
            capture).
        format: `"text"` for people; `"json"` for tools: an object whose `schema` is 1. Its keys are those of
            `tractor-host dump --json`, which the README lists.
        tree: Also the processes below this one.

    Raises:
        ValueError: Another `format`.
        OSError: It could not be written.
    """
    text = _native.dump("asked for by tractor_host.dump()", format, tree)
    if format == "json":
        text += "\n"
    if file is None:
        _native.write_dump(text)
    elif isinstance(file, int):
        rest = text.encode()
        while rest:
            rest = rest[os.write(file, rest) :]
    elif isinstance(file, str | os.PathLike):
        with open(file, "w", encoding="utf-8") as opened:
            opened.write(text)
    else:
        file.write(text)
