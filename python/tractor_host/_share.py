"""What workers are given without a copy: descriptors, sockets, and objects in memory that all share."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, Self, final

from tractor_host import _native
from tractor_host._loaded import loaded
from tractor_host._parcel import Packed, mapped, unpack

if TYPE_CHECKING:
    import socket

    from tractor_host._parcel import Table

__all__ = ["Fd", "Shared", "share"]


class HasFileno(Protocol):
    """A file, a socket, or anything else with a descriptor."""

    def fileno(self) -> int:
        """Its number."""
        ...


@final
class Fd:
    """A descriptor, to be passed to a worker in the arguments of its spawn.

    Where it is made, it only refers to the file, socket or number that it is made of, which must be open when
    `spawn` is called. In the worker it is a new descriptor of the same open file, which belongs to it: closed
    by `close()`, by leaving a `with` block, or when it is dropped (with a `ResourceWarning`, as files do).

        >>> import os
        >>> import tractor_host as th
        >>> ours, theirs = os.pipe()
        >>> code = "with args[0] as fd: os.write(fd.fileno(), b'hello')"
        >>> th.spawn(th.Source("import os\\n" + code), th.Fd(theirs)).result(timeout=10)
        >>> os.read(ours, 10)
        b'hello'
        >>> os.close(ours), os.close(theirs)
        (None, None)
    """

    __slots__ = ("__weakref__", "_file", "_owns")

    _file: int | HasFileno | None
    _owns: bool

    def __init__(self, file: int | HasFileno) -> None:
        self._file = None
        self._owns = False
        if isinstance(file, bool) or not (isinstance(file, int) or hasattr(file, "fileno")):
            raise TypeError(f"an Fd is made of a descriptor's number or a file, not of {type(file).__name__}")
        if isinstance(file, int) and file < 0:
            raise ValueError(f"a descriptor's number is not negative: {file}")
        self._file = file

    @classmethod
    def _of(cls, number: int) -> Self:
        """Takes over a descriptor of `_native`'s."""
        made = cls(number)
        made._owns = True
        return made

    @property
    def closed(self) -> bool:
        """Whether it was closed or detached."""
        return self._file is None

    def fileno(self) -> int:
        """Its number.

        Raises:
            ValueError: It is closed.
        """
        if self._file is None:
            raise ValueError("this Fd is closed")
        number = self._file if isinstance(self._file, int) else self._file.fileno()
        if number < 0:
            raise ValueError(f"{self._file!r} is closed")
        return number

    def detach(self) -> int:
        """Gives its number away: whoever has it closes it. The `Fd` is closed from then on.

        Raises:
            ValueError: It is closed.
        """
        number = self.fileno()
        if self._owns:
            number = _native.fd_detach(number)
        self._file = None
        return number

    def close(self) -> None:
        """Closes the descriptor if it belongs to it; may be called again."""
        file, self._file = self._file, None
        if self._owns and isinstance(file, int):
            _native.fd_close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Fd can be pickled in the arguments of a spawn only")

    def __repr__(self) -> str:
        if self._file is None:
            return "<Fd (closed)>"
        return f"<Fd {self._file!r}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if getattr(self, "_owns", False) and self._file is not None:
            try:
                _warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            finally:
                self.close()


@final
class Shared[T]:
    """An object in memory that any number of workers read; made by `share` alone.

    It can be pickled in the arguments of a spawn, of a worker's own too, and costs each worker a descriptor.
    The memory is given back when the last process that has it, or anything out of it, has dropped it or has
    ended, however that came.
    """

    __slots__ = ("__weakref__", "_fd", "_home", "_loaded", "_nbytes")

    _fd: int
    _home: int
    _loaded: list[T]
    _nbytes: int

    def __init__(self) -> None:
        raise TypeError("a Shared is made by tractor_host.share()")

    @classmethod
    def _of(cls, fd: int) -> Self:
        """Takes over a descriptor of `_native`'s."""
        made = object.__new__(cls)
        made._fd = fd
        made._home = os.getpid()
        made._loaded = []
        made._nbytes = os.fstat(fd).st_size
        return made

    @property
    def nbytes(self) -> int:
        """How much memory it takes, once for all."""
        return self._nbytes

    def get(self) -> T:
        """The object; always the same one in one interpreter.

        Its buffers (a numpy array's data, say) lie in the shared memory and can't be written to. What it has
        besides them is this interpreter's own copy. So are `bytes` and `str`, which hold their data in
        themselves: share `memoryview(data)` to have none.

        Raises:
            OSError: It can't be mapped.
            Exception: Whatever unpickling it raises.
        """
        if not self._loaded:
            self._loaded.append(unpack(mapped(self._number(), private=False)))
        return self._loaded[0]

    def _number(self) -> int:
        if self._home != os.getpid():
            raise RuntimeError(
                f"this Shared belongs to process {self._home}, of which this one is a fork; pass it to a "
                "worker in the arguments of its spawn"
            )
        return self._fd

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Shared can be pickled in the arguments of a spawn only")

    def __repr__(self) -> str:
        return f"<Shared of {self._nbytes} bytes>"

    def __del__(self, _close: Any = _native.fd_close) -> None:
        fd = getattr(self, "_fd", None)
        if fd is not None:  # in a forked copy it is the parent's, and this does nothing
            _close(fd)


def share[T](obj: T) -> Shared[T]:
    """Puts a copy of an object into memory that workers can be given without another one.

    Args:
        obj: Anything that can be pickled, other than descriptors. What has its data in buffers that pickle
            can leave out (a numpy array, a `memoryview`, a data frame) is read by all from the same memory.

    Raises:
        OSError: There is no memory or descriptor to be had.
        Exception: Whatever pickling it raises.
    """
    return Shared._of(Packed(obj).memory("th-shared"))


class Passing:
    """The descriptors that a pickle refers to, by their place."""

    __slots__ = ("_kept", "numbers")

    def __init__(self) -> None:
        self.numbers: Final[list[int]] = []
        # What was made only to be pickled must not be closed before it is sent.
        self._kept: Final[list[object]] = []

    def table(self) -> Table:
        """How to pickle what has descriptors."""
        found: Table = {Fd: self._fd, Shared: self._shared}
        # There are no sockets where nobody has loaded them.
        if (module := loaded("socket")) is not None:
            found[module.socket] = self._socket
        return found

    def _place(self, owner: object, number: int) -> int:
        try:
            os.fstat(number)
        except OSError as error:
            raise ValueError(f"descriptor {number} is not open: {error.strerror}") from None
        self.numbers.append(number)
        self._kept.append(owner)
        return len(self.numbers) - 1

    def _fd(self, fd: Fd) -> tuple[Any, ...]:
        return _take_fd, (self._place(fd, fd.fileno()),)

    def _shared(self, shared: Shared[Any]) -> tuple[Any, ...]:
        return _take_shared, (self._place(shared, shared._number()),)

    def _socket(self, socket: socket.socket) -> tuple[Any, ...]:
        if socket.fileno() < 0:
            raise ValueError("the socket is closed")
        place = self._place(socket, socket.fileno())
        kind = int(socket.family), int(socket.type), socket.proto
        return _take_socket, (place, *kind, socket.gettimeout())


#: The descriptors that came with the call that is being unpickled; `None` during a spawn.
arrived: list[int] | None = None


def _take(place: int) -> int:
    return _native.child_take(place) if arrived is None else arrived[place]


def _take_fd(place: int) -> Fd:
    return Fd._of(_take(place))


def _take_shared(place: int) -> Shared[Any]:
    return Shared._of(_take(place))


def _take_socket(place: int, family: int, kind: int, proto: int, timeout: float | None) -> socket.socket:
    import socket

    number = _native.fd_detach(_take(place))
    try:
        made = socket.socket(family, kind, proto, number)
    except BaseException:
        os.close(number)
        raise
    # Whether it blocks is the open file's, which both have.
    made.settimeout(timeout)
    return made
