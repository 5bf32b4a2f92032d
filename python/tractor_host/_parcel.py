"""What goes from one interpreter to another: a pickle, and the large buffers that it leaves out.

Small, it is bytes, which are copied from hand to hand. Large, it is written once, into a sealed file in
memory, and mapped by whoever unpacks it. Workers load this too, so it imports nothing that it can do without.

Without buffers it is the pickle as it is. With them it is an index (`_MAGIC`, then how many parts there are,
then the offset and length of each, in words of 8 bytes), the buffers, and the pickle, the first of the parts.
"""

import _pickle as pickle
import copyreg
import sys

from tractor_host import _native
from tractor_host._loaded import loaded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    Table = dict[type, Callable[[Any], tuple[Any, ...]]]

#: Bytes. What is larger goes by a file in memory: below, that costs more than the copies that it saves.
LARGE: Final = 1 << 20
#: Bytes. What is smaller stays in the pickle. Where that is mapped, such a buffer is copied out of it.
_APART: Final = 1 << 16
#: Where buffers begin: at a multiple of what any vector instruction wants.
_ALIGNMENT: Final = 64
_MAGIC: Final = b"th-parts"
#: How every pickle of ours begins.
_PICKLE: Final = 0x80
#: Pieces for one system call, of which the kernel takes 1024.
_BATCH: Final = 1024


class Packed:
    """A pickle in pieces, and the buffers that it leaves out.

    Those, and large pieces, belong to what was packed: they have not been copied yet.
    """

    __slots__ = ("_buffers", "_pickle")

    def __init__(self, value: object, table: Table | None = None) -> None:
        """Pickles `value`; `table` is how objects of some types are.

        Raises:
            Exception: Whatever pickling it raises.
        """
        self._pickle: list[Any] = []
        self._buffers: list[memoryview] = []
        pickler = pickle.Pickler(_Sink(self._pickle), 5, buffer_callback=self._leave_out)
        pickler.dispatch_table = {
            **_of_proxies(),
            **copyreg.dispatch_table,
            memoryview: _reduce_view,
            **(table or {}),
        }
        pickler.dump(value)

    def _leave_out(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether it stays in the pickle."""
        try:
            view = buffer.raw()
        except BufferError:  # pickle says what it thinks of that
            return True
        if view.nbytes < _APART:
            return True
        self._buffers.append(view)
        return False

    def names(self, text: bytes) -> bool:
        """Whether the pickle has this text, other than in large data."""
        return any(text in piece for piece in self._pickle if len(piece) < 4 * _APART)

    def content(self, name: str, large: int = LARGE) -> tuple[bytes, int | None]:
        """All of it: as bytes; or, if it is larger than so many, in a sealed file in memory with this name,
        by a descriptor that is the caller's (`_native.fd_close`).

        Raises:
            OSError: There is no memory left for it (ENOMEM).
        """
        if not self._buffers and len(self._pickle) == 1 and len(whole := self._pickle[0]) <= large:
            return whole, None
        pieces, size = self.pieces()
        if size > large:
            try:
                return b"", written(name, pieces)
            except OSError as error:
                from errno import ENOMEM

                if error.errno == ENOMEM:
                    raise
                # Such files may be forbidden here, or limited (RLIMIT_FSIZE); or there is no descriptor left.
        return b"".join(pieces), None

    def memory(self, name: str) -> int:
        """A sealed file in memory with all of it, however small, as its descriptor.

        Raises:
            OSError: There is none to be had.
        """
        return written(name, self.pieces()[0])

    def pieces(self) -> tuple[list[Any], int]:
        """What to write, in order, and how many bytes that is."""
        size = sum(map(len, self._pickle))
        if not self._buffers:
            return list(self._pickle), size
        offset = _aligned(len(_MAGIC) + 8 + 16 * (1 + len(self._buffers)))
        index = []
        pieces: list[Any] = [b""]
        for view in self._buffers:
            index += [offset, view.nbytes]
            end = _aligned(offset + view.nbytes)
            pieces += [view, bytes(end - offset - view.nbytes)]
            offset = end
        words = [len(index) // 2 + 1, offset, size, *index]
        head = _MAGIC + b"".join(word.to_bytes(8, sys.byteorder) for word in words)
        pieces[0] = head.ljust(_aligned(len(head)), b"\0")
        return pieces + self._pickle, offset + size


class _Sink:
    """A file that keeps what is written to it, piece by piece: pickle hands on large ones as they are."""

    __slots__ = ("write",)

    def __init__(self, pieces: list[Any]) -> None:
        self.write = pieces.append


def unpack(data: bytes | memoryview) -> Any:
    """What was packed. Its large buffers lie in `data`, or in a copy if `data` is bytes, and keep it.

    Raises:
        Exception: Whatever unpickling it raises, or that it is nothing that was packed.
    """
    if data[0] == _PICKLE:
        return pickle.loads(data)
    # A copy: what was written to where it came from can be written to here.
    view = memoryview(bytearray(data)) if isinstance(data, bytes) else data
    begin = len(_MAGIC) + 8
    if bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise ValueError("neither a pickle nor an index of one")
    parts = int.from_bytes(view[len(_MAGIC) : begin], sys.byteorder)
    index = view[begin : begin + 16 * parts].cast("Q").tolist()
    first, *others = [view[at : at + size] for at, size in zip(index[::2], index[1::2], strict=True)]
    return pickle.loads(first, buffers=others)


def opened(content: bytes | int) -> bytes | memoryview:
    """What there is to unpack: bytes as they are, or a file in memory, mapped; its descriptor is closed.

    What is mapped can be written to, and nobody else sees that: it is private, page by page, from then on.

    Raises:
        OSError: It can't be mapped.
    """
    if isinstance(content, bytes):
        return content
    try:
        return mapped(content, private=True)
    finally:
        _native.fd_close(content)


def mapped(fd: int, *, private: bool) -> memoryview:
    """A whole file in memory. It stays mapped for as long as anything refers to that.

    Raises:
        OSError: It can't be mapped.
    """
    import mmap

    flags, access = mmap.MAP_SHARED, mmap.PROT_READ
    if private:
        # Most of it is never written to.
        flags, access = mmap.MAP_PRIVATE | mmap.MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    return memoryview(mmap.mmap(fd, 0, flags=flags, prot=access, trackfd=False))


def written(name: str, pieces: list[Any], *, is_lent: bool = False) -> int:
    """A sealed file in memory with these pieces in it; only its size is, if it is lent."""
    from posix import writev

    fd = _native.memory_create(name)
    try:
        left = pieces[::-1]
        while left:
            count = writev(fd, left[: -_BATCH - 1 : -1])
            while left and count >= len(left[-1]):
                count -= len(left.pop())
            if count:  # not all of this one
                left.append(memoryview(left.pop())[count:])
        _native.memory_seal(fd, is_lent)
    except BaseException:
        _native.fd_close(fd)
        raise
    return fd


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _reduce_view(view: memoryview) -> tuple[Any, ...]:
    if not view.c_contiguous:
        raise TypeError("a memoryview that is not contiguous cannot be pickled")
    _make_view(view, view.format, view.shape)  # not every format can be made
    return _make_view, (pickle.PickleBuffer(view), view.format, view.shape)


def _of_proxies() -> Table:
    """For each type of `multiprocessing`'s proxies, where there are any."""
    managers: Any = loaded("multiprocessing.managers")
    found: Table = {}
    todo = [] if managers is None else [managers.BaseProxy]
    while todo:
        proxy = todo.pop()
        found[proxy] = _reduce_proxy
        todo += proxy.__subclasses__()
    return found


def _reduce_proxy(proxy: Any) -> tuple[Any, ...]:
    """With the key of its manager, which it leaves out itself: workers of ours do not inherit that."""
    reduced: tuple[Any, ...] = proxy.__reduce_ex__(5)
    if reduced[0] is not sys.modules["multiprocessing.managers"].RebuildProxy:
        return reduced  # a type of somebody's, who says how
    rebuild, (*others, options) = reduced
    return rebuild, (*others, {**options, "authkey": bytes(proxy._authkey)})


def _make_view(buffer: Any, form: Any, shape: Any) -> memoryview:
    """A `memoryview` of a format and a shape, of a buffer of bytes."""
    view = memoryview(buffer).cast("B")
    return view.cast(form, shape) if len(shape) > 1 else view.cast(form)
