"""Memory that large content of messages is sent in again and again: segments.

The first touch of a fresh file in memory, page by page, takes longer than to copy into it what is to be
sent. So the two ends of a `_calls.Link` keep theirs for a while. Who sends something large writes it into a
segment and lends that to the other end, which maps it, and gives it back when nothing refers to it any more:
the segment's number goes beside the next message. One that does not come back in time is forgotten: it is
freed with the last mapping.

What is mapped is a private copy of the borrower's, page by page, once it writes to it; but the pages that
it has not written to are the lender's. So it does not give back what a fork's child may have, too.

There is no lock, for the reasons in `_future`.
"""

import itertools
import mmap
import os
import weakref

from tractor_host import _native
from tractor_host._parcel import written

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Iterable
    from typing import Any, Final

#: Seconds that a segment is kept for what comes next; also one that is lent.
KEPT: Final = 2.0
#: Bytes. What is larger is sent in a file of its own.
LARGEST: Final = 1 << 28
#: A link has so many segments at most, and so many bytes in them.
_MOST: Final = 4
_MOST_BYTES: Final = 1 << 29
#: Bytes that are copied while no other thread has a turn.
_CHUNK: Final = 1 << 20


class Segment:
    """A file in memory of a size that can't change; its descriptor is its own."""

    __slots__ = ("_map", "fd", "number", "since", "size")

    def __init__(self, name: str, number: int, pieces: list[Any], size: int) -> None:
        """Makes one of these pieces, which are so many bytes.

        Raises:
            OSError: There is no memory or descriptor left.
        """
        #: How it is called between the two ends.
        self.number = number
        self.size = size
        #: Since when it is lent, or is not.
        self.since = _native.clock()
        self._map: mmap.mmap | None = None
        self.fd = written(name, pieces, is_lent=True)

    def fill(self, pieces: list[Any]) -> None:
        """Writes them in place of what was in it; there is room.

        Raises:
            OSError: It can't be mapped.
        """
        if self._map is None:
            # As the pages are there already, this is a matter of tables.
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._map = mmap.mmap(self.fd, self.size, flags=flags, trackfd=False)
        at = 0
        with memoryview(self._map) as memory:
            for piece in pieces:
                source = memoryview(piece)
                for begin in range(0, len(source), _CHUNK):
                    chunk = source[begin : begin + _CHUNK]
                    memory[at : at + len(chunk)] = chunk
                    at += len(chunk)

    def __del__(self, _close: Any = _native.fd_close) -> None:
        fd = getattr(self, "fd", None)
        if fd is not None:
            _close(fd)

    def abandon(self) -> None:
        """In a fork's child: it is the parent's."""
        self._map = None
        os.close(self.fd)
        del self.fd


class Loan:
    """A segment that is lent, or is about to be; so many bytes in it are what it is lent for."""

    __slots__ = ("_segments", "segment", "size")

    def __init__(self, segments: Segments, segment: Segment, size: int) -> None:
        self._segments = segments
        self.segment = segment
        self.size = size

    def take_back(self) -> None:
        """It was not sent."""
        self._segments.take_back([self.segment.number])


class Segments:
    """Those of one end of a link."""

    __slots__ = ("__weakref__", "_free", "_lent", "_numbers")

    def __init__(self) -> None:
        self._free: list[Segment] = []
        self._lent: dict[int, Segment] = {}
        self._numbers = itertools.count(1)
        _all.add(self)

    def lend(self, name: str, pieces: list[Any], size: int) -> Loan | None:
        """One that is lent, with these pieces in it, which are so many bytes; `None` if they are too many.

        Raises:
            OSError: There is no memory or descriptor left.
        """
        if size > LARGEST:
            return None
        segment = self._take(size)
        if segment is None:
            segment = Segment(name, next(self._numbers), pieces, size)
            self._make_room(segment.size)
        else:
            segment.fill(pieces)
        segment.since = _native.clock()
        self._lent[segment.number] = segment
        return Loan(self, segment, size)

    def _take(self, size: int) -> Segment | None:
        """The smallest one that is large enough, and not much too large."""
        fits = [it for it in self._free.copy() if size <= it.size <= 2 * size]
        for segment in sorted(fits, key=lambda it: it.size):
            try:
                self._free.remove(segment)
            except ValueError:
                continue  # somebody else has
            return segment
        return None

    def _make_room(self, size: int) -> None:
        """Forgets the oldest ones."""
        kept = sorted([*self._free.copy(), *self._lent.copy().values()], key=lambda it: it.since)
        left = sum(segment.size for segment in kept) + size
        while kept and (len(kept) >= _MOST or left > _MOST_BYTES):
            left -= kept[0].size
            self._forget(kept.pop(0))

    def take_back(self, numbers: Iterable[int]) -> None:
        """They were given back, or were not sent; one that is not lent is passed over."""
        for number in numbers:
            segment = self._lent.pop(number, None)
            if segment is not None:
                segment.since = _native.clock()
                self._free.append(segment)

    def trim(self) -> float | None:
        """Forgets those that were kept for long enough; when there is more to forget."""
        kept = [*self._free.copy(), *self._lent.copy().values()]
        if not kept:
            return None
        now = _native.clock()
        due = [segment for segment in kept if segment.since + KEPT <= now]
        for segment in due:
            self._forget(segment)
        left = [segment.since + KEPT for segment in kept if segment not in due]
        return min(left, default=None)

    def _forget(self, segment: Segment) -> None:
        self._lent.pop(segment.number, None)
        try:
            self._free.remove(segment)
        except ValueError:
            return  # it was lent

    def abandon(self) -> None:
        """In a fork's child: they are the parent's."""
        for segment in [*self._free, *self._lent.values()]:
            segment.abandon()
        self._free.clear()
        self._lent.clear()


#: Those of this interpreter.
_all: weakref.WeakSet[Segments] = weakref.WeakSet()


def _abandon_all() -> None:
    for segments in list(_all):
        segments.abandon()


os.register_at_fork(after_in_child=_abandon_all)


class Borrowed(mmap.mmap):
    """A segment of the other end's, mapped; when nothing refers to it any more, it is given back."""

    _forks: int
    _number: int
    _returns: deque[int]

    @classmethod
    def of(cls, fd: int, number: int, returns: deque[int]) -> memoryview:
        """All of it; `returns` is where its number is put in the end.

        Raises:
            OSError: It can't be mapped.
        """
        # Before it is mapped: a fork in between is one too many.
        forks = _native.forks()
        flags, access = mmap.MAP_PRIVATE | mmap.MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        made = cls(fd, 0, flags=flags, prot=access, trackfd=False)
        made._number, made._returns, made._forks = number, returns, forks
        return memoryview(made)

    def __del__(self, _count: Any = _native.forks) -> None:
        if getattr(self, "_forks", None) == _count():
            self._returns.append(self._number)
