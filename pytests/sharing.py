"""What the tests of sharing have workers run, and ways to see who holds a file in memory.

As `targets`: workers import it by its name, and what a target needs is imported by the target.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import tractor_host as th

#: Bytes: more than what goes in a pickle.
LARGE = 4 << 20


def block(size: int = LARGE) -> memoryview:
    """Writable, and no two pages alike."""
    data = bytearray(size)
    for place in range(0, size, 4096):
        data[place : place + 4] = place.to_bytes(4, "little")
    return memoryview(data)


def is_block(view: Any, size: int = LARGE) -> bool:
    return len(view) == size and all(
        view[place : place + 4] == place.to_bytes(4, "little") for place in range(0, size, 4096)
    )


def describe(view: Any) -> tuple[bool, str, bool]:
    """Whether it is a block, whose memory it lies in, and whether it can be written to."""
    return is_block(view), type(view.obj).__name__, not view.readonly


def overwrite(view: Any) -> bytes:
    view[:4] = b"mine"
    return bytes(view[:4])


def die_with(view: Any) -> NoReturn:
    os.kill(os.getpid(), 9)
    raise AssertionError("it lives")


def give_block(size: int = LARGE) -> memoryview:
    return block(size)


def read_fd(fd: th.Fd) -> tuple[bytes, bool]:
    with fd:
        data = os.read(fd.fileno(), 100)
    return data, fd.closed


def drop_fd(fd: th.Fd) -> list[str]:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drop = [fd]
        del fd
        number = drop[0].fileno()
        # The arguments' own reference: the supervisor's, in `_child`, is beyond reach.
        drop[0].__del__()  # type: ignore[attr-defined]
        drop.clear()
    try:
        os.fstat(number)
    except OSError:
        return [str(warning.message) for warning in caught if warning.category is ResourceWarning]
    return ["still open"]


def detach_fd(fd: th.Fd) -> bytes:
    number = fd.detach()
    try:
        return os.read(number, 100)
    finally:
        os.close(number)


def wait_for_byte(fd: th.Fd, *args: Any) -> Any:
    """Says that it is ready; ends when it can read a byte."""
    print("ready", flush=True)
    with fd:
        os.read(fd.fileno(), 1)
    return args[0] if args else None


def hold_and_spin(*args: Any) -> NoReturn:
    print("ready", flush=True)
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass


def answer(socket: Any) -> tuple[float | None, int]:
    with socket:
        socket.sendall(b"got " + socket.recv(100))
        return socket.gettimeout(), socket.family


def shared_block(shared: th.Shared[memoryview], again: th.Shared[memoryview]) -> tuple[Any, ...]:
    view = shared.get()
    return (*describe(view), shared is again, shared.get() is view, shared.nbytes)


def shared_below(shared: th.Shared[memoryview], backends: list[str]) -> list[Any]:
    """What workers of this worker see, from the outermost in."""
    found: list[Any] = [describe(shared.get())]
    if backends:
        first, *rest = backends
        found += th.spawn(shared_below, shared, rest, backend=first).result(timeout=30)
    return found


def holders(inode: int) -> set[int]:
    """The processes that have a file in memory open, or mapped."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            maps = (folder / "maps").read_text()
            mapped = any(line.split()[4] == str(inode) for line in maps.splitlines() if "/memfd:th-" in line)
            if mapped or any(_is(inode, link) for link in (folder / "fd").iterdir()):
                found.add(int(folder.name))
        except OSError:  # it ended just now
            continue
    return found


def _is(inode: int, link: Path) -> bool:
    try:
        return "/memfd:th-" in os.readlink(link) and link.stat().st_ino == inode
    except OSError:
        return False


def use_msgspec(fd: th.Fd, view: Any, socket: Any) -> tuple[bytes, bool, bytes]:
    """Where it has its own GIL, the import is refused and it starts again."""
    import msgspec.json

    with fd, socket:
        return msgspec.json.encode(1) + os.read(fd.fileno(), 100), is_block(view), socket.recv(100)


def return_unsealed(seal: bool, truncate: bool) -> NoReturn:
    """What no worker does that is not hostile."""
    from tractor_host import _native

    fd = _native.memory_create("th-evil")
    os.write(fd, b"\x80" + bytes(8191))
    if seal:
        _native.memory_seal(fd, False)
    ours = os.dup(fd)  # what is sent is the channel's from then on
    _native.child_send({"type": "returned_in_memory"}, b"", fd)
    if truncate:
        os.ftruncate(ours, 0)
    hold_and_spin()


def return_nothing_in_memory() -> NoReturn:
    from tractor_host import _native

    _native.child_send({"type": "returned_in_memory"}, b"", None)
    hold_and_spin()


def send_descriptors(count: int) -> NoReturn:
    """Beside a message that takes none."""
    import socket

    for number in range(3, 100):
        try:
            with socket.socket(fileno=os.dup(number)) as channel:
                # A frame's first byte, and more to come.
                socket.send_fds(channel, [b"T"], [0] * count)
        except OSError:
            continue
    hold_and_spin()


class Returned:
    """Tells where its memory is once it has been pickled."""

    def __reduce__(self) -> Any:
        print("ready", flush=True)
        return bytes, ()


def give_much(size: int) -> Any:
    return bytearray(size), Returned()


if __name__ == "__main__":
    sys.exit("this is no program")
