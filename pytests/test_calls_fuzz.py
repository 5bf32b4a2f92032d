"""What `Link.receive` makes of datagrams that no peer of ours would send: the same ones every time."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tractor_host import _calls, _native
from tractor_host._calls import LARGE, MOST_PASSED, Incomplete, Link

pytestmark = pytest.mark.outside

CASES = 20_000
HEAD = struct.Struct("=BBBBHxxQd")
LOAN = struct.Struct("=QQ")
HERE, FILE, LENT = range(3)
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Link]]:
    """Whoever sends, and whoever receives."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, Link(theirs)


def head(
    kind: int = _calls.CALL,
    place: int = HERE,
    count: int = 0,
    number: int = 1,
    value: float = 0.0,
    given_back: int = 0,
) -> bytes:
    return HEAD.pack(_calls.VERSION, kind, place, given_back, count, number, value)


def send(end: socket.socket, data: bytes, fds: list[int]) -> None:
    beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    end.sendmsg([data], beside)


def memory(size: int, seals: int = SEALS) -> int:
    """A file in memory; the larger ones have holes only."""
    fd = os.memfd_create("th-fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def written(size: int) -> int:
    """A file in memory that is no sealed one, and can't be."""
    fd = os.memfd_create("th-fuzz")
    os.write(fd, bytes(size))
    return fd


def pipe() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


#: What may come in place of the content, by what becomes of a message that has it there.
MAPPED: dict[str, Callable[[], int]] = {
    "a sealed file": lambda: memory(LARGE + 1),
    "a sealed file with a byte": lambda: memory(1),
}
REFUSED: dict[str, Callable[[], int]] = {
    "an empty file": lambda: memory(0),
    "a file that can shrink": lambda: memory(LARGE + 1, SEALS & ~fcntl.F_SEAL_SHRINK),
    "a file that can be written to": lambda: memory(LARGE + 1, SEALS & ~fcntl.F_SEAL_WRITE),
    "a file without seals": lambda: memory(LARGE + 1, 0),
    "a file that can't be sealed": lambda: written(100),
    "a pipe": pipe,
    "a socket": lambda: socket.socket().detach(),
    "a directory": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
    "only a path": lambda: os.open("/", os.O_PATH),
    "a device": lambda: os.open("/dev/zero", os.O_RDWR),
    "a file of the kernel's": lambda: os.open("/proc/self/stat", os.O_RDONLY),
    "a file on a disk": lambda: os.open(__file__, os.O_RDONLY),
    "an event": lambda: os.eventfd(0),
}
UNMAPPABLE: dict[str, Callable[[], int]] = {"a file larger than any address space": lambda: memory(1 << 60)}


def outcome(link: Link) -> str:
    """Receives once, in no time, and gives back all that has come with it."""
    try:
        message = link.receive(wait=False)
    except (ValueError, Incomplete, BlockingIOError) as error:
        return type(error).__name__
    if message is None:
        return "None"
    for fd in message.passed:
        os.fstat(fd)
        _native.fd_close(fd)
    assert _calls.READY <= message.kind <= _calls.LOG
    return "Message"


def test_whatever_comes_is_a_message_or_refused(ends: tuple[socket.socket, Link]) -> None:
    ours, link = ends
    chance = random.Random(20)
    seen: Counter[str] = Counter()
    with ExitStack() as stack:
        beside = []
        for make in (*MAPPED.values(), *REFUSED.values(), *UNMAPPABLE.values()):
            beside.append(make())
            stack.callback(os.close, beside[-1])
        assert outcome(link) == "BlockingIOError"
        before = os.listdir("/proc/self/fd")
        for _ in range(CASES):
            data, fds = _datagram(chance, beside)
            send(ours, data, fds)
            seen[outcome(link)] += 1
            assert outcome(link) == "BlockingIOError", "it took a datagram, and no more than that"
        assert os.listdir("/proc/self/fd") == before
    assert set(seen) == {"Message", "ValueError", "Incomplete", "None"}
    # Or else the inputs test nothing.
    assert min(seen["Message"], seen["ValueError"]) > CASES // 10, seen


def _datagram(chance: random.Random, beside: list[int]) -> tuple[bytes, list[int]]:
    """A message with something done to it, mostly."""
    fds = chance.choices(beside, k=chance.choice((0, 0, 0, 1, 1, 2, 3)))
    place = chance.choice((FILE, LENT)) if fds and chance.random() < 0.6 else HERE
    given_back = chance.choice((0, 0, 0, 1, 16))
    kind = chance.randint(_calls.READY, _calls.LOG)
    value = chance.choice((0.0, 1.5, -1.0, 1e300, float("inf"), float("nan")))
    data = bytearray(head(kind, place, len(fds), chance.getrandbits(64), value, given_back))
    data += struct.pack(
        f"={given_back}Q", *(chance.choice((1, 2, chance.getrandbits(64))) for _ in range(given_back))
    )
    if place == LENT:
        data += LOAN.pack(chance.getrandbits(64), chance.choice((1, 5000, LARGE + 1, 1 << 60, 0)))
    data += bytes(chance.choice((0, 0, 1, 100, 3000)))
    match chance.randrange(12):
        case 0:
            data[chance.randrange(HEAD.size)] ^= 1 << chance.randrange(8)
        case 1:
            data[chance.randrange(HEAD.size)] = chance.randrange(256)
        case 2:
            del data[chance.randrange(HEAD.size + 1) :]
        case 3:
            data[:] = chance.randbytes(chance.randrange(64))
        case 4:
            struct.pack_into("=H", data, 4, chance.choice((0, 1, len(fds) + 1, MOST_PASSED + 1, 0xFFFF)))
        case 5:
            fds = chance.choices(beside, k=chance.randint(0, 4))
        case 6 if chance.random() < 0.1:
            data += bytes(LARGE + chance.randint(-HEAD.size, 3) - len(data) + HEAD.size)
        case 7:
            data[3] = chance.choice((1, 16, 17, 255))
        case 8 if chance.random() < 0.05:
            fds = chance.choices(beside, k=chance.randint(MOST_PASSED, 253))
    return bytes(data), fds


@pytest.mark.parametrize("place", [FILE, LENT], ids=["in a file", "lent"])
@pytest.mark.parametrize("what", [*MAPPED, *REFUSED, *UNMAPPABLE])
def test_content_is_in_a_sealed_file_or_refused(
    ends: tuple[socket.socket, Link], what: str, place: int
) -> None:
    """Any other one could be cut short by its sender, and whoever reads it would die of SIGBUS."""
    ours, link = ends
    before = os.listdir("/proc/self/fd")
    fd = (MAPPED | REFUSED | UNMAPPABLE)[what]()
    data = head(place=place, count=3, number=7) + (LOAN.pack(5, 1 << 40) if place == LENT else b"")
    try:
        send(ours, data, [fd, 0, 1])
    finally:
        os.close(fd)
    # What is lent is written to again, once it was given back.
    if what in MAPPED or (place == LENT and what == "a file that can be written to"):
        message = link.receive(wait=False)
        assert message is not None
        assert (message.number, len(message.passed)) == (7, 2)
        assert len(message.content) <= LARGE + 1, "no more than there is"
        assert bytes(message.content[:1]) == b"\0"
        for passed in message.passed:
            _native.fd_close(passed)
        del message
        assert link.given_back() == ([5] if place == LENT else [])
    elif what in UNMAPPABLE:
        with pytest.raises(Incomplete) as caught:
            link.receive(wait=False)
        assert (caught.value.errno, caught.value.number) == (errno.ENOMEM, 7)
    else:
        with pytest.raises(ValueError, match="file"):
            link.receive(wait=False)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    "data",
    [
        head(given_back=17) + bytes(17 * 8),
        head(given_back=2) + bytes(15),
        head(place=LENT, count=1) + bytes(LOAN.size - 1),
        head(place=LENT, count=1) + LOAN.pack(1, 0),
        head(place=LENT) + LOAN.pack(1, 1),
        head(place=3, count=1),
    ],
    ids=["too many are given back", "fewer than said", "half a loan", "nothing lent", "no file", "nowhere"],
)
def test_what_is_said_of_segments_is_checked(ends: tuple[socket.socket, Link], data: bytes) -> None:
    ours, link = ends
    fds = [memory(100)]
    try:
        send(ours, data, fds if data[4] else [])
    finally:
        os.close(fds[0])
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError, match="something else than a message"):
        link.receive(wait=False)
    assert os.listdir("/proc/self/fd") == before


def test_what_is_too_long_is_not_taken_for_its_beginning(ends: tuple[socket.socket, Link]) -> None:
    ours, link = ends
    send(ours, head() + bytes(LARGE), [])
    message = link.receive(wait=False)
    assert message is not None
    assert len(message.content) == LARGE
    send(ours, head() + bytes(LARGE + 1), [])
    with pytest.raises(ValueError, match="something else than a message"):
        link.receive(wait=False)


def test_an_empty_datagram_leaves_no_descriptors(ends: tuple[socket.socket, Link]) -> None:
    ours, link = ends
    before = os.listdir("/proc/self/fd")
    send(ours, b"", [0, 1])
    with pytest.raises(ValueError, match="something else than a message"):
        link.receive(wait=False)
    assert os.listdir("/proc/self/fd") == before
    ours.close()
    assert link.receive(wait=False) is None
