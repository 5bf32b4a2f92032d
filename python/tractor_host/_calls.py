"""Calls to a worker that stays: what it and whoever calls it say to each other.

A message is one datagram: a head, and a pickle. A large pickle is in a file in memory, sealed or lent
(`_lending`), and whose descriptor comes beside the datagram, as do those that the call refers to. So nobody
ever waits in the middle of a message, and whoever dies in one has not sent it.

Workers load this too, so it imports nothing that it can do without.
"""

import _socket
import struct
from posix import _exit, getpid
from time import monotonic

from tractor_host import _native
from tractor_host._errors import Cancelled, add_note
from tractor_host._loaded import loaded
from tractor_host._parcel import Packed, opened, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Sequence
    from typing import Any, Final

    from tractor_host._lending import Loan, Segments

#: Of what is said here. Both sides must speak the same.
VERSION: Final = 2
#: The version; what it is; where its content is; how many segments are given back with it; how many
#: descriptors come beside it; the number of the call; seconds that it has, or how many. There follow the
#: numbers of those segments; of a segment that it is in, the number, and how many bytes; or else the content.
_HEAD: Final = struct.Struct("=BBBBHxxQd")
#: Where content can be: in the datagram, in a sealed file, in a segment that is lent.
_HERE, _FILE, _LENT = range(3)
_NUMBER: Final = struct.Struct("=Q")
_LOAN: Final = struct.Struct("=QQ")
#: Bytes. What is larger goes by a file in memory. Some of these fit into any socket's buffer.
LARGE: Final = 1 << 16
#: The most descriptors that can go beside a call; the kernel takes 253, one is for the content.
MOST_PASSED: Final = 250
_SPACE: Final = _socket.CMSG_SPACE(4 * (MOST_PASSED + 1))
#: The most segments that are given back with one message.
_MOST_RETURNED: Final = 16
_LONGEST: Final = _HEAD.size + _MOST_RETURNED * _NUMBER.size + _LOAN.size + LARGE
#: Seconds. Who did not wait for longer than this for a message may be sent the next one soon.
_SOON: Final = 200e-6

#: The worker is ready; a main module to make before the next call; a call; what it returned; what it raised.
READY, MAIN, CALL, RETURNED, RAISED = range(1, 6)
#: An actor is there; what it is to be; a call with a stream; a call is to end; it has, for that.
HELLO, SPEC, OPEN, CANCEL, CANCELLED = range(6, 11)
#: Of a stream: an item; so many more may come; no more will; nobody takes any. And a record for the log.
ITEM, CREDIT, END, CLOSED, LOG = range(11, 16)


class Message:
    """What was received.

    Attributes:
        kind: `READY` and so on.
        number: The call's.
        value: Seconds that it may take, or a count.
        content: What there is to unpack.
        passed: The descriptors that it refers to, this interpreter's by now.
    """

    __slots__ = ("content", "kind", "number", "passed", "value")

    def __init__(
        self, kind: int, number: int, value: float, content: bytes | memoryview, passed: list[int]
    ) -> None:
        self.kind = kind
        self.number = number
        self.value = value
        self.content = content
        self.passed = passed


class Incomplete(OSError):
    """A message's descriptors could not be had (EMFILE), or its content can't be mapped."""

    kind: int
    number: int


class Datagram:
    """A message that is ready to be sent, and again if there was no room. It has its file in memory."""

    __slots__ = ("_beside", "_loan", "_memory", "_parts", "kind")

    def __init__(
        self,
        kind: int,
        number: int,
        value: float = 0.0,
        packed: Packed | None = None,
        passed: Sequence[int] = (),
        link: Link | None = None,
    ) -> None:
        """Puts it together. With the `link` that it is for, large content is in a segment of that.

        Raises:
            OSError: There is no memory or descriptor left.
            ValueError: It refers to too many descriptors.
        """
        if len(passed) > MOST_PASSED:
            raise ValueError(f"a call can pass {MOST_PASSED} descriptors at most, not {len(passed)}")
        payload, memory = b"", None
        self._loan = None if packed is None or link is None else link.lend(packed)
        if self._loan is not None:
            payload = _LOAN.pack(self._loan.segment.number, self._loan.size)
        elif packed is not None:
            payload, memory = packed.content("th-call", LARGE)
        self._fill(kind, number, value, payload, memory, passed, link)

    @classmethod
    def of_bytes(cls, kind: int, number: int, payload: bytes) -> Datagram:
        """The same, of what is pickled already."""
        made = cls.__new__(cls)
        made._loan = memory = None
        if len(payload) > LARGE:
            from tractor_host._parcel import written

            payload, memory = b"", written("th-call", [payload])
        made._fill(kind, number, 0.0, payload, memory, ())
        return made

    def _fill(
        self,
        kind: int,
        number: int,
        value: float,
        payload: bytes,
        memory: int | None,
        passed: Sequence[int],
        link: Link | None = None,
    ) -> None:
        if len(payload) > LARGE:  # no file for it could be had
            from errno import EMFILE
            from os import strerror

            raise OSError(EMFILE, f"{strerror(EMFILE)}: a large value needs a file in memory")
        self.kind = kind
        self._memory = memory
        place, fds = _HERE, [*passed]
        if self._loan is not None:
            place, fds = _LENT, [self._loan.segment.fd, *passed]
        elif memory is not None:
            place, fds = _FILE, [memory, *passed]
        self._beside: list[Any] = []
        if fds:
            self._beside = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))]
        back = [] if link is None else link.given_back()
        head = _HEAD.pack(VERSION, kind, place, len(back), len(fds), number, value)
        self._parts = [head, *map(_NUMBER.pack, back), payload]

    def send(self, socket: _socket.socket, *, wait: bool = True) -> None:
        """Sends it.

        Raises:
            BlockingIOError: There is no room, and it, or the socket, is not to wait.
            OSError: There is nobody at the other end (EPIPE, ECONNRESET), or no memory left.
        """
        flags = _socket.MSG_NOSIGNAL | (0 if wait else _socket.MSG_DONTWAIT)
        socket.sendmsg(self._parts, self._beside, flags)
        self._loan = None

    def close(self) -> None:
        """Closes its file, and has its segment back, if it was not sent; may be called again."""
        memory, self._memory = self._memory, None
        if memory is not None:
            _native.fd_close(memory)
        loan, self._loan = self._loan, None
        if loan is not None:
            loan.take_back()


class Link:
    """One end of the way between them."""

    __slots__ = ("_is_brisk", "_returns", "_segments", "socket")

    def __init__(self, socket: _socket.socket) -> None:
        self.socket = socket
        #: Whether the next message may come soon.
        self._is_brisk = True
        #: Where large content is sent in, once there is any.
        self._segments: Segments | None = None
        #: The segments of the other end that were given back, if there ever was one.
        self._returns: deque[int] | None = None

    def send(self, kind: int, number: int, packed: Packed | None = None, passed: Sequence[int] = ()) -> None:
        """Sends it. There is room for it: nobody sends more than one message that is not asked for.

        Raises:
            OSError: There is nobody at the other end (EPIPE, ECONNRESET), or no memory or descriptor left.
            ValueError: It refers to too many descriptors.
        """
        self._send(Datagram(kind, number, 0.0, packed, passed, self))

    def send_bytes(self, kind: int, number: int, payload: bytes) -> None:
        """The same, for what is pickled already."""
        self._send(Datagram.of_bytes(kind, number, payload))

    def _send(self, datagram: Datagram) -> None:
        try:
            datagram.send(self.socket)
        finally:
            datagram.close()

    def receive(self, *, wait: bool = True) -> Message | None:
        """The next message; `None` when there is nobody at the other end any more.

        Raises:
            BlockingIOError: None has come, and it is not to wait.
            Incomplete: A descriptor that came beside it could not be had, or it can't be mapped.
            OSError: The other end has died without having read all that it was sent (ECONNRESET).
            ValueError: It is none of ours.
        """
        flags = _socket.MSG_CMSG_CLOEXEC | (0 if wait else _socket.MSG_DONTWAIT)
        begin = monotonic()
        if wait:
            self._rest()
        data, beside, seen, _ = self.socket.recvmsg(_LONGEST, _SPACE, flags)
        if wait:
            self._is_brisk = monotonic() - begin < _SOON
        fds: list[int] = []
        for _, _, rights in beside:
            fds += struct.unpack(f"={len(rights) // 4}i", rights[: len(rights) // 4 * 4])
        for fd in fds:
            _native.fd_adopt(fd)
        if not data and not fds:
            return None
        try:
            return self._read(data, fds, seen)
        except BaseException:
            _close(fds)
            raise

    def _read(self, data: bytes, fds: list[int], seen: int) -> Message:
        """What has come, with these descriptors. It takes the one of its content out of them."""
        if len(data) < _HEAD.size or seen & _socket.MSG_TRUNC:
            raise _malformed(data)
        version, kind, place, back, count, number, value = _HEAD.unpack_from(data)
        if version != VERSION or not READY <= kind <= LOG or place > _LENT or back > _MOST_RETURNED:
            raise _malformed(data)
        beside = int(place != _HERE)
        begin = _HEAD.size + back * _NUMBER.size
        loan_end = begin + (_LOAN.size if place == _LENT else 0)
        if len(data) < loan_end or len(data) - loan_end > LARGE:
            raise _malformed(data)
        loan = _LOAN.unpack_from(data, begin) if place == _LENT else (0, 1)
        if not loan[1]:
            raise _malformed(data)
        if not beside <= count <= MOST_PASSED + beside or len(fds) > count:
            raise _malformed(data)
        if back and self._segments is not None:
            self._segments.take_back(struct.unpack_from(f"={back}Q", data, _HEAD.size))
        if seen & _socket.MSG_CTRUNC or len(fds) < count:
            from errno import EMFILE
            from os import strerror

            what = f"{strerror(EMFILE)}: not all descriptors of a message could be received"
            raise _incomplete(OSError(EMFILE, what), kind, number)
        if place == _HERE:
            return Message(kind, number, value, data[begin:], fds)
        # Who made another one could crash whoever maps it.
        _native.memory_check(fds[0], place == _LENT)
        try:
            fd = fds.pop(0)
            content = opened(fd) if place == _FILE else self._borrowed(fd, *loan)
        except OSError as error:
            raise _incomplete(error, kind, number) from error
        return Message(kind, number, value, content, fds)

    def _rest(self) -> None:
        """Waits for the next message, or leaves that to whoever receives it."""
        while (due := self.trim()) is not None or self._is_brisk:
            asleep = 0.0 if due is None else max(0.0, due - _native.clock())
            if _native.readable(self.socket.fileno(), self._is_brisk, asleep):
                return
            self._is_brisk = False

    # -- segments ----------------------------------------------------------------------------------------

    def lend(self, packed: Packed) -> Loan | None:
        """What is large, in a segment that is to be sent; `None` if it is not, or there is none to be had."""
        pieces, size = packed.pieces()
        if size <= LARGE:
            return None
        if self._segments is None:
            from tractor_host._lending import Segments

            self._segments = Segments()
        try:
            return self._segments.lend("th-call", pieces, size)
        except OSError:
            return None  # a file of its own may do; or else that says why not

    def _borrowed(self, fd: int, number: int, size: int) -> memoryview:
        from tractor_host._lending import Borrowed

        if self._returns is None:
            from collections import deque

            self._returns = deque()
        try:
            return Borrowed.of(fd, number, self._returns)[:size]
        finally:
            _native.fd_close(fd)

    def given_back(self) -> list[int]:
        """Segments of the other end's that nobody refers to any more: it is told now, or never."""
        found: list[int] = []
        while self._returns and len(found) < _MOST_RETURNED:
            try:
                found.append(self._returns.popleft())
            except IndexError:
                break
        return found

    def trim(self) -> float | None:
        """Frees what was kept for long enough; when there is more to free, by `_native.clock`."""
        return None if self._segments is None else self._segments.trim()

    def fileno(self) -> int:
        """Its descriptor; -1 once it is closed."""
        return self.socket.fileno()

    def close(self) -> None:
        """Lets the other end know that nothing more will come."""
        self.socket.close()
        self._segments = None


def _malformed(data: bytes) -> ValueError:
    return ValueError(f"something else than a message of version {VERSION}: {data[:40]!r}")


def _incomplete(error: OSError, kind: int, number: int) -> Incomplete:
    made = Incomplete(error.errno, error.strerror)
    made.kind, made.number = kind, number
    return made


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        _native.fd_close(fd)


# -- the worker's side ---------------------------------------------------------------------------------------


def serve(
    socket: _socket.socket,
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
    memory_limit: int | None,
    log_level: int | None,
) -> None:
    """A worker's target: carries out one call after the other, until there is nobody left to call."""
    if memory_limit is not None:
        import resource

        _import_what_refuses()
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
    link = Link(socket)
    try:
        if log_level is not None:
            from tractor_host import _logs

            _logs.send_from_now_on(link, log_level)
        if initializer is not None:
            initializer(*initargs)
        link.send(READY, 0)
        if _native.is_main_interpreter():
            _import_what_refuses()
        serve_calls(link, once=True)
    finally:
        finish_logs()
        link.close()


def finish_logs() -> None:
    """Has all told that there is to tell of what was logged here."""
    if (logs := loaded("tractor_host._logs")) is not None:
        logs.finish()


def _import_what_refuses() -> None:
    """What says that there is no descriptor or memory left could not be imported then."""
    try:
        from tractor_host import _lending, _remote, _share  # noqa: F401
    except Exception:  # there is none already
        return


def serve_calls(link: Link, *, once: bool = False) -> None:
    """Carries out one call after the other, until there is nobody left to call.

    `once`: their numbers rise, and one that comes again is passed over.
    """
    last = 0
    # What to make the main module of, until that is done.
    mains: list[bytes | memoryview] = []
    while True:
        try:
            message = link.receive()
        except Incomplete as error:
            if error.kind != CALL:
                raise
            if not once or error.number > last:
                last = error.number
                _refuse(link, error)
            continue
        if message is None:
            return
        if message.kind == MAIN:
            mains = [message.content]
            continue
        if once and message.number <= last:
            _close(message.passed)
            continue
        last = message.number
        try:
            _answer(link, message, mains)
        except BrokenPipeError, ConnectionResetError:
            return  # who has asked is gone


def _refuse(link: Link, error: Incomplete) -> None:
    """There is no memory or descriptor left here for a call."""
    from errno import ENOMEM

    kind = MemoryError if error.errno == ENOMEM else OSError
    refusal = kind(error.errno, error.strerror)
    add_note(refusal, "raised while a call was received in its worker")
    link.send_bytes(RAISED, error.number, dumped(refusal))


def _answer(link: Link, message: Message, mains: list[bytes | memoryview]) -> None:
    """Calls, and says what has come of that. Nothing of it stays here, where the next call may never come."""
    home = getpid()
    answer = _carry_out(message, mains)
    if getpid() != home:
        # It has forked, and this is the child: the parent answers.
        _exit(0 if isinstance(answer, Packed) else 1)
    try:
        if isinstance(answer, Packed):
            link.send(RETURNED, message.number, answer)
        else:
            link.send_bytes(RAISED, message.number, answer)
    except ConnectionError:
        raise
    except OSError as error:
        # The answer could not be sent: that one is short.
        link.send_bytes(RAISED, message.number, dumped(error))


def _carry_out(message: Message, mains: list[bytes | memoryview]) -> Packed | bytes:
    """Calls; returns the packed value, or what it raised."""
    try:
        function, args, kwargs = unpacked(message, mains)
        value = function(*args, **kwargs)
        del function, args, kwargs
        return packed_result(value)
    except BaseException as error:
        if isinstance(error, Cancelled) and _is_cancelled():
            raise
        return dumped(error)


def packed_result(value: object) -> Packed:
    """What a call has returned.

    Raises:
        Exception: It can't be pickled, which a note says.
    """
    try:
        return Packed(value)
    except Exception as error:
        add_note(error, f"the result of type {type(value).__qualname__} cannot be pickled")
        raise


def unpacked(message: Message, mains: list[bytes | memoryview]) -> Any:
    """What a call is: a function, its arguments, and those by name. `mains` is what to make first."""
    try:
        if mains:
            from tractor_host import _child

            # Two calls at a time may have brought it; and an argument of the spawn may have needed it.
            if _child.made_of is None:
                _child.make_main(*unpack(mains[0]))
            mains.clear()
        # What is in a segment can be given back with the answer.
        content, message.content = message.content, b""
        if not message.passed:
            return unpack(content)
        from tractor_host import _share

        _share.arrived = message.passed
        try:
            return unpack(content)
        except BaseException:
            _close(message.passed)
            raise
        finally:
            _share.arrived = None
    except Cancelled:
        raise
    except BaseException as error:
        add_note(error, "raised while a call was unpickled in its worker")
        raise


def _is_cancelled() -> bool:
    """Whether the worker itself is to end, and not only somebody in it."""
    child = loaded("tractor_host._child")
    return child is None or bool(child.was_cancelled())


def dumped(error: BaseException) -> bytes:
    """What was raised, as `RAISED` has it."""
    from tractor_host import _remote

    return _remote.dump(error)
