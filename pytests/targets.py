"""What the tests have workers run. Workers import it by its name, subinterpreters anew each time: so
what a target needs is imported by the target.

A target that is about to get stuck says so first, see `helpers.ready`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
import time
from typing import Any, NoReturn

#: Longer than any test.
FOR_EVER = 1e6


def say(text: str = "ready") -> None:
    print(text, flush=True)


# -- that end well -----------------------------------------------------------------------------------


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


def add(a: float, b: float) -> float:
    return a + b


def echo(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def give(value: Any) -> Any:
    return value


def length(data: bytes) -> int:
    return len(data)


def zeros(count: int) -> bytes:
    return bytes(count)


async def which_loop() -> str:
    import sniffio

    return sniffio.current_async_library()


async def add_soon(a: float, b: float) -> float:
    import sniffio

    if sniffio.current_async_library() == "trio":
        import trio

        await trio.sleep(0)
    else:
        import asyncio

        await asyncio.sleep(0)
    return a + b


async def boom_soon() -> None:
    raise ValueError("soon")


class Adder:
    """Has state, so that a bound method must take its object along."""

    def __init__(self, start: float = 0) -> None:
        self.start = start

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adder) and other.start == self.start

    __hash__ = None  # type: ignore[assignment]

    def add(self, more: float) -> float:
        return self.start + more

    async def add_soon(self, more: float) -> float:
        return await add_soon(self.start, more)

    def __call__(self, more: float) -> float:
        return self.start + more

    @classmethod
    def made(cls, start: float) -> Adder:
        return cls(start)

    @staticmethod
    def twice(value: float) -> float:
        return 2 * value

    class Inner:
        @staticmethod
        def thrice(value: float) -> float:
            return 3 * value


def surroundings() -> dict[str, Any]:
    with open(f"/proc/self/task/{threading.get_native_id()}/comm", errors="backslashreplace") as file:
        comm = file.read()[:-1]
    return {
        "argv": sys.argv,
        "path": sys.path,
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "comm": comm,
        "is_main_thread": threading.current_thread() is threading.main_thread(),
        "threads": [thread.name for thread in threading.enumerate()],
    }


def who() -> Any:
    import tractor_host as th

    return th.current_actor()


async def who_soon() -> Any:
    return who()


def who_below(backend: str) -> Any:
    import tractor_host as th

    return th.spawn(who, backend=backend, name="below").result(timeout=30)


def environment() -> dict[str, str]:
    return dict(os.environ)


def spawn_again(backends: list[str]) -> list[int]:
    """Spawns a worker that spawns a worker..., and returns their process ids from here on."""
    if not backends:
        return [os.getpid()]
    import tractor_host as th

    with th.spawn(spawn_again, backends[1:], backend=backends[0], name=f"deep-{len(backends)}") as worker:
        return [os.getpid(), *worker.result(timeout=60)]


def hang_in_a_chain(backends: list[str]) -> None:
    """As `spawn_again`, and the last one hangs."""
    if not backends:
        time.sleep(1000)
    import tractor_host as th

    with th.spawn(hang_in_a_chain, backends[1:], backend=backends[0], name=f"deep-{len(backends)}") as worker:
        worker.result()


def leave_a_sleeper(backend: str) -> int:
    """Spawns a worker that sleeps, sees it run and leaves without it."""
    import tractor_host as th

    worker = th.spawn("time:sleep", 1000, backend=backend)
    while worker.state != "running":
        time.sleep(0.001)
    _left_behind.append(worker)
    assert worker.pid is not None
    return worker.pid


_left_behind: list[object] = []


def spawn_and_forget(backend: str, target: str) -> int | None:
    """Spawns a worker and returns without it; its pid."""
    import warnings

    import tractor_host as th

    warnings.simplefilter("ignore")
    return th.spawn(target, backend=backend, stdio="null").pid


# -- that fail ---------------------------------------------------------------------------------------


def exit_now(code: int) -> NoReturn:
    os._exit(code)


def exit_at_exit(value: Any, code: int) -> Any:
    """Returns, and dies at once after that."""
    import atexit

    atexit.register(os._exit, code)
    return value


def die_at_exit(value: Any, number: int) -> Any:
    import atexit

    atexit.register(kill_itself, number)
    return value


def exit_from_thread(code: int) -> None:
    threading.Thread(target=os._exit, args=(code,)).start()
    time.sleep(FOR_EVER)


def kill_itself(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(FOR_EVER)


def segfault() -> None:
    import ctypes

    ctypes.string_at(0)


def abort() -> NoReturn:
    os.abort()


def sys_exit(code: Any) -> NoReturn:
    sys.exit(code)


def raise_keyboard_interrupt() -> NoReturn:
    raise KeyboardInterrupt


def raise_base_group() -> NoReturn:
    raise BaseExceptionGroup("several", [KeyboardInterrupt(), ValueError("one of them")])


def write_and_die(text: str, code: int) -> NoReturn:
    print(text, file=sys.stderr, flush=True)
    os._exit(code)


def unpicklable() -> Any:
    return lambda: None


class Grenade:
    """Explodes when it is unpickled in another process (or interpreter) than it was made in."""

    def __init__(self, kind: str = "ValueError") -> None:
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return _explode, (self.kind,)


def _explode(kind: str) -> NoReturn:
    import builtins

    raise getattr(builtins, kind)("exploded while unpickled")


def grenade(kind: str = "ValueError") -> Grenade:
    return Grenade(kind)


class Unreducible(Exception):
    def __reduce__(self) -> NoReturn:
        raise RuntimeError("no __reduce__ today")


class TwoArguments(Exception):
    """Pickles, and does not unpickle: its `args` do not fit its `__init__`."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class NoText(Exception):
    def __str__(self) -> NoReturn:
        raise RuntimeError("no text today")


class WithState(Exception):
    def __init__(self, text: str, number: int) -> None:
        super().__init__(text, number)
        self.number = number
        self.extra = "kept"


def raise_unreducible() -> NoReturn:
    raise Unreducible("a text")


def raise_two_arguments() -> NoReturn:
    raise TwoArguments("one", "other")


def raise_no_text() -> NoReturn:
    raise NoText


def raise_with_state() -> NoReturn:
    raise WithState("a text", 42)


def raise_with_notes() -> NoReturn:
    error = ValueError("noted", 1)
    error.add_note("first note")
    error.add_note("second note")
    raise error


def raise_from_cause() -> NoReturn:
    try:
        raise KeyError("the cause")
    except KeyError as cause:
        raise ValueError("the effect") from cause


def raise_in_context() -> NoReturn:
    try:
        raise KeyError("the context")
    except KeyError:
        raise ValueError("the second")  # noqa: B904 - that is the point


def raise_from_none() -> NoReturn:
    try:
        raise KeyError("hidden")
    except KeyError:
        raise ValueError("shown") from None


def raise_group() -> NoReturn:
    try:
        raise OSError(2, "No such file", "name")
    except OSError as error:
        known = error
    inner = ExceptionGroup("inner", [TypeError("deep"), known])
    inner.add_note("a note of the inner group")
    raise ExceptionGroup("outer", [inner, raised_unreducible()])


def raised_unreducible() -> Exception:
    return Unreducible("in a group")


def raise_cycle() -> NoReturn:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__ = second
    second.__cause__ = first
    raise first


def raise_long_chain(length: int) -> NoReturn:
    error: ValueError | None = None
    for number in range(length):
        newer = ValueError(number)
        newer.__context__ = error
        error = newer
    assert error is not None
    raise error


class OwnGroup(ExceptionGroup[Exception]):
    """With an argument of its own, as its class must have then: __new__, derive, __reduce__."""

    code: int

    def __new__(cls, message: str, exceptions: list[Exception], code: int) -> OwnGroup:
        self = super().__new__(cls, message, exceptions)
        self.code = code
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnGroup, (self.message, list(self.exceptions), self.code)


def raise_own_group() -> NoReturn:
    inside = ValueError("inside")
    inside.add_note("of a member")
    inside.__cause__ = KeyError("of a member")
    raise OwnGroup("mine", [inside], 7)


class PickledAsANumber(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return int, ()


def raise_pickled_as_a_number() -> NoReturn:
    raise PickledAsANumber


class ExitWhenUnpickled(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, ("text",)


def raise_exit_when_unpickled() -> NoReturn:
    raise ExitWhenUnpickled


class SlowToPickle(Exception):
    """Can be cancelled while it is being reported."""

    def __reduce__(self) -> tuple[Any, ...]:
        say("reporting")
        time.sleep(0.3)
        return SlowToPickle, ()


def raise_slow_to_pickle() -> NoReturn:
    raise SlowToPickle


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    number: int

    def __reduce__(self) -> tuple[Any, ...]:
        return Frozen, (self.number,)


class Hostile(Exception):
    """Whatever it is asked, it raises something that ends programs."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where

    def __getattribute__(self, name: str) -> Any:
        if name in ("__notes__", "add_note", "__cause__", "__context__"):
            raise SystemExit(f"no {name}")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("__"):
            raise KeyboardInterrupt(f"no {name}")
        super().__setattr__(name, value)

    def __str__(self) -> str:
        if self.where == "text":
            raise SystemExit(3)
        return self.where

    def __reduce__(self) -> tuple[Any, ...]:
        if self.where == "reduce":
            raise KeyboardInterrupt("while it was pickled")
        if self.where == "unpickled":
            return _explode, ("KeyboardInterrupt",)
        return Hostile, (self.where,)


def raise_frozen(from_cause: bool) -> NoReturn:
    if from_cause:
        raise Frozen(3) from KeyError("the cause")
    raise Frozen(3)


def raise_hostile(where: str) -> NoReturn:
    raise Hostile(where) from KeyError("the cause")


class HostileWhenUnpickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return _raise_hostile_elsewhere, (os.getpid(), threading.get_ident())


def _raise_hostile_elsewhere(pid: int, thread: int) -> object:
    if (pid, thread) == (os.getpid(), threading.get_ident()):
        return None
    raise Hostile("here")


def hostile_when_unpickled() -> object:
    return HostileWhenUnpickled()


# -- that do not end: the stuck shapes of adversaries.md -----------------------------------------------


def spin() -> NoReturn:
    say()
    while True:
        pass


def spin_and_swallow() -> NoReturn:
    said = False
    while True:
        try:
            if not said:
                said = True
                say()
            while True:
                pass
        except BaseException:
            pass


def spin_in_finally() -> NoReturn:
    try:
        say()
        while True:
            pass
    finally:
        say("cleaning up")
        while True:
            pass


def sleep() -> None:
    say()
    time.sleep(FOR_EVER)


def sleep_and_swallow() -> NoReturn:
    said = False
    while True:
        try:
            if not said:
                said = True
                say()
            time.sleep(FOR_EVER)
        except BaseException:
            pass


def resist() -> NoReturn:
    """As `sleep_and_swallow`, and SIGTERM is ignored where that can be."""
    import signal

    with contextlib.suppress(ValueError):  # not in a subinterpreter
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep_and_swallow()


def wait_for_event() -> None:
    say()
    threading.Event().wait()


def wait_for_condition() -> None:
    condition = threading.Condition()
    with condition:
        say()
        condition.wait()


def get_from_queue() -> None:
    import queue

    say()
    queue.Queue[None]().get()


def get_from_simple_queue() -> None:
    import queue

    say()
    queue.SimpleQueue[None]().get()


def wait_again_and_again() -> NoReturn:
    event = threading.Event()
    say()
    while True:
        event.wait(1.0)


def lock_twice() -> None:
    lock = threading.Lock()
    lock.acquire()
    say()
    lock.acquire()


def lock_cycle() -> None:
    """This thread has one lock and wants the other's, and the other way round."""
    mine, theirs = threading.Lock(), threading.Lock()
    both = threading.Barrier(2)

    def other() -> None:
        with theirs:
            both.wait()
            mine.acquire()

    mine.acquire()
    threading.Thread(target=other).start()
    both.wait()
    say()
    theirs.acquire()


def join_spinning_thread(daemon: bool) -> None:
    thread = threading.Thread(target=_spin, daemon=daemon)
    thread.start()
    say()
    thread.join()


def many_threads() -> None:
    """Ten helpers, daemon and not, each of them stuck in another way."""
    import queue

    lock = threading.Lock()
    lock.acquire()
    stuck: list[Any] = [_spin, threading.Event().wait, queue.Queue[None]().get, lock.acquire, _sleep]
    threads = [threading.Thread(target=shape, daemon=daemon) for shape in stuck for daemon in (True, False)]
    for thread in threads:
        thread.start()
    say()
    for thread in threads:
        thread.join()


def _spin() -> NoReturn:
    while True:
        pass


def _sleep() -> None:
    time.sleep(FOR_EVER)


def receive() -> None:
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        say()
        ours.recv(1)


def accept() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        say()
        server.accept()


def use_select() -> None:
    import select

    say()
    select.select([], [], [])


def use_poll() -> None:
    import select

    say()
    select.poll().poll()


def use_epoll() -> None:
    import select

    with select.epoll() as epoll:
        say()
        epoll.poll()


def read_a_byte(fd: int) -> None:
    """From a descriptor of this process."""
    say()
    os.read(fd, 1)


def read_empty_pipe() -> None:
    reader, _writer = os.pipe()
    say()
    os.read(reader, 1)


def write_full_pipe() -> None:
    _reader, writer = os.pipe()
    say()
    os.write(writer, bytes(1 << 20))


def run_subprocess() -> None:
    import subprocess

    say()
    subprocess.run(["sh", "-c", "echo child $$; exec sleep 1000"])


def wait_for_child() -> None:
    import subprocess

    process = subprocess.Popen(["sleep", "1000"])
    say(f"child {process.pid}")
    say()
    os.waitpid(process.pid, 0)


async def trio_sleep() -> None:
    import trio

    say()
    await trio.sleep_forever()


async def trio_shielded() -> None:
    import trio

    with trio.CancelScope(shield=True):
        say()
        await trio.sleep_forever()


async def asyncio_sleep() -> None:
    import asyncio

    say()
    await asyncio.sleep(FOR_EVER)


async def asyncio_swallow() -> NoReturn:
    import asyncio

    say()
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass


async def spin_soon() -> NoReturn:
    """An event loop that never gets to turn."""
    say()
    while True:
        pass


def hog_in_c() -> NoReturn:
    said = False
    while True:
        try:
            if not said:
                said = True
                say()
            sum(range(10**12))
        except BaseException:  # before it was in there
            pass


def hog_in_c_for(seconds: float) -> None:
    """Holds its GIL for at least `seconds`, in one call."""
    start = time.monotonic()
    sum(range(10**6))
    cost = (time.monotonic() - start) / 10**6
    say()
    sum(range(int(seconds / cost)))


def hog_in_c_and_go_on(seconds: float) -> None:
    hog_in_c_for(seconds)
    while True:
        pass


def backtrack() -> None:
    import re

    say()
    re.match(r"(a+)+$", "a" * 64 + "b")


def hash_for_ever() -> NoReturn:
    import hashlib

    said = False
    while True:
        try:
            if not said:
                said = True
                say()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        except BaseException:  # before it was in there
            pass


def ignore_signals() -> NoReturn:
    import signal

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    spin_and_swallow()


def block_signals() -> NoReturn:
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    spin_and_swallow()


def stop_itself() -> None:
    import signal

    say()
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(FOR_EVER)


def ignore_and_stop_itself() -> NoReturn:
    import signal

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    stopped = False
    while True:
        try:
            if not stopped:
                stopped = True
                say()
                os.kill(os.getpid(), signal.SIGSTOP)
            while True:
                pass
        except BaseException:
            continue


def fork_many(count: int) -> None:
    for _ in range(count):
        if os.fork() == 0:
            time.sleep(FOR_EVER)
            os._exit(0)
    say()
    time.sleep(FOR_EVER)


def grandchildren(swallow: bool) -> None:
    """A child and its child, both deaf to SIGTERM and in this process's group."""
    import subprocess

    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0: print('child', os.getpid(), flush=True); time.sleep(1000)\n"
        "os.wait()"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", code])
    say(f"child {process.pid}")
    say()
    if swallow:
        spin_and_swallow()
    time.sleep(FOR_EVER)


#: A child in a session of its own, a grandchild in another one whose parent has ended, all of them deaf.
_DAEMONS = """
import os, signal, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.setsid()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setpgid(0, 0)
        os.write(1, b"child %d\\n" % os.getpid())
        time.sleep(1000)
    os._exit(0)
os.wait()
os.write(1, b"child %d\\n" % os.getpid())
time.sleep(1000)
"""


def daemons(then: str) -> None:
    """Starts processes that leave its session and its group, and then does as it is told."""
    import subprocess

    process = subprocess.Popen([sys.executable, "-S", "-c", _DAEMONS])
    say("started")
    while then == "return" and not _has_said("child", 2):
        time.sleep(0.001)
    if then == "return":
        process.returncode = 0  # it is meant to be left
        return
    if then == "swallow":
        spin_and_swallow()
    if then == "ignore":
        ignore_signals()
    time.sleep(FOR_EVER)


def _has_said(word: str, times: int) -> bool:
    """Whether that is in what this process and those it started have written."""
    with open("/proc/self/fd/1", "rb") as written:
        return written.read().count(word.encode()) >= times


def grow(count: int, then: str) -> None:
    """Has ever more children, each in a session of its own and with a child in another one."""
    say()
    for _ in range(count):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.setsid()
            time.sleep(FOR_EVER)
            os._exit(0)
        time.sleep(0.002)
    if then == "ignore":
        ignore_signals()
    time.sleep(FOR_EVER)


def close_all_fds(stay: bool) -> None:
    say()
    os.closerange(0, 1 << 16)
    if stay:
        time.sleep(FOR_EVER)


def write_garbage() -> None:
    """To every socket that it has."""
    say()
    for fd in _sockets():
        with contextlib.suppress(
            BrokenPipeError
        ):  # who has read the garbage in the first one has closed the next
            os.write(fd, b"GET / HTTP/1.1\r\n\r\n")
    time.sleep(FOR_EVER)


def write_half_a_frame() -> None:
    """Claims more than it sends, and leaves."""
    for fd in _sockets():
        os.write(fd, b"TH\0\x01" + (2).to_bytes(4, "little") + (4 << 30).to_bytes(8, "little") + b"{}")
    os._exit(0)


def stop_the_host_send_garbage_and_leave() -> NoReturn:
    import signal

    host = os.getppid()
    say(str(os.getpid()))
    os.kill(host, signal.SIGSTOP)
    while not all(
        _state(f"/proc/{host}/task/{task}/stat") == "T" for task in os.listdir(f"/proc/{host}/task")
    ):
        time.sleep(0.001)
    for fd in _sockets():
        os.write(fd, b"GET / HTTP/1.1\r\n\r\n")
    os._exit(7)


def _state(path: str) -> str:
    with open(path) as file:
        return file.read().rpartition(")")[2].split()[0]


def flood(message: str) -> None:
    """Says the same again and again, as fast as it is taken."""
    frame = _frame(message) * 1000
    say()
    while True:
        for fd in _sockets():
            _write_all(fd, frame)


def flood_by_orphans(message: str) -> None:
    """Leaves behind who holds its channel and floods it, somewhere else than in its process group."""
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            say(f"child {os.getpid()}")
            flood(message)
    while not _has_said("ready", 3):
        time.sleep(0.001)
    os.kill(os.getpid(), 9)


def close_channel(how: str) -> None:
    import socket

    for fd in _sockets():
        if how == "close":
            os.close(fd)
        else:
            socket.socket(fileno=fd).shutdown(socket.SHUT_WR)
    say()
    time.sleep(FOR_EVER)


def _frame(message: str) -> bytes:
    text = message.encode()
    return b"TH\0\x01" + len(text).to_bytes(4, "little") + bytes(8) + text


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _sockets() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.append(int(name))
        except OSError:
            continue
    return found


# -- that clean up ---------------------------------------------------------------------------------------


def sleep_then_clean_up() -> None:
    from tractor_host import Cancelled

    try:
        say()
        while True:
            time.sleep(0.01)
    except Cancelled:
        say("cancelled")
        raise
    finally:
        say("cleaned up")


def clean_up_after_both() -> None:
    """Lets an interrupt and a cancellation through once both have come."""
    import signal

    both = {signal.SIGINT, signal.SIGRTMIN + 12}
    signal.pthread_sigmask(signal.SIG_BLOCK, both)
    try:
        say()
        while not both <= signal.sigpending():
            time.sleep(0.001)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        time.sleep(FOR_EVER)
    finally:
        for _ in range(1000):
            pass
        say("cleaned up")


async def trio_clean_up() -> None:
    import trio

    try:
        say()
        await trio.sleep_forever()
    except trio.Cancelled:
        say("cancelled")
        raise
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(0.01)
        say("cleaned up")


async def asyncio_clean_up() -> None:
    import asyncio

    try:
        say()
        await asyncio.sleep(FOR_EVER)
    except asyncio.CancelledError:
        say("cancelled")
        raise
    finally:
        await asyncio.sleep(0.01)
        say("cleaned up")


def return_when_cancelled(value: Any) -> Any:
    from tractor_host import Cancelled

    try:
        say()
        while True:
            time.sleep(0.01)
    except Cancelled:
        return value


def count_cancellations() -> int:
    """How many come in the half second after the first one."""
    from tractor_host import Cancelled

    count = 0
    has_said = False
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if not has_said:
                has_said = True
                say()  # where what comes of it is caught
            while time.monotonic() < until:
                time.sleep(0.01)
        except Cancelled:
            if not count:
                until = time.monotonic() + 0.5
            count += 1
    return count


# -- that write --------------------------------------------------------------------------------------------


def write_everywhere() -> None:
    print("out by print")
    print("err by print", file=sys.stderr)
    print("no newline at the end", end="")


def write_raw() -> None:
    os.write(1, b"out by fd\n")
    os.write(2, b"err by fd\n")


_calls_so_far = 0


def count_calls() -> int:
    global _calls_so_far
    _calls_so_far += 1
    return _calls_so_far


def write_much(count: int) -> None:
    line = "x" * 1023 + "\n"
    for _ in range(count // 1024):
        sys.stdout.write(line)
        sys.stderr.write(line)


def read_stdin() -> tuple[str, bytes]:
    return sys.stdin.read(), os.read(0, 1)


def print_line(text: str) -> None:
    print(text)


def names_in(fd: int) -> list[str] | None:
    """What is in a directory that is open; `None` where it is no such thing."""
    try:
        return os.listdir(fd)
    except OSError:
        return None


# -- that want too much ------------------------------------------------------------------------------------


def eat_memory(cgroup: str | None = None) -> str:
    """Takes more memory than its cgroup may have, the first to go; moves to `cgroup` before."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if cgroup:
        with open(f"{cgroup}/cgroup.procs", "w") as file:
            file.write("0")
    eaten = [b"x" * (1 << 20) for _ in range(1024)]
    return f"{len(eaten)} MB and still alive"


def without_fds(then: str, how: str) -> str:
    """Leaves itself no descriptor to open; starts what leaves its session and its group before."""
    import resource
    import subprocess

    process = subprocess.Popen([sys.executable, "-S", "-c", _DAEMONS])
    while not _has_said("child", 2):
        time.sleep(0.001)
    process.returncode = 0  # it is meant to be left
    if how == "forbidden":
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        while True:
            try:
                os.dup(1)
            except OSError:
                break
    say()
    if then == "sleep":
        time.sleep(FOR_EVER)
    if then == "ignore":
        ignore_signals()
    if then == "raise":
        raise ValueError("without descriptors")
    return "without descriptors"


# -- for pools ---------------------------------------------------------------------------------------------


def return_after(seconds: float, value: Any) -> Any:
    time.sleep(seconds)
    return value


def return_when_there(path: str, value: Any) -> Any:
    while not os.path.exists(path):
        time.sleep(0.002)
    return value


def divide_or_wait(how: str, value: Any) -> float:
    if value == 0:
        return 1 / 0 if how == "raise" else 0.0
    return float(return_when_there(str(value), 1))


def sleep_for(seconds: float) -> None:
    time.sleep(seconds)


def use_up_fds() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with contextlib.suppress(OSError):
        while True:
            os.dup(0)


def fork_and_return(value: Any) -> tuple[int, Any]:
    """In both."""
    return os.fork(), value


def print_soon(value: object) -> None:
    time.sleep(0.1)
    print(value, flush=True)


def send_over(file: Any, data: bytes) -> None:
    with file:
        os.write(file.fileno(), data)


def size_of_shared(shared: Any) -> int:
    return len(shared.get())


_remembered: list[Any] = []


def remember(value: Any) -> int:
    _remembered.append(value)
    return len(_remembered)


def remembered() -> list[Any]:
    return _remembered


def map_in_pool(backend: str, values: list[Any]) -> list[Any]:
    from tractor_host import Executor

    with Executor(2, backend) as pool:
        return list(pool.map(give, values))


def close_calls_and_sleep() -> None:
    """The socket that its calls come by, which is the one for datagrams."""
    import socket

    for fd in _sockets():
        with socket.socket(fileno=os.dup(fd)) as found:
            if found.type == socket.SOCK_SEQPACKET:
                os.close(fd)
    time.sleep(FOR_EVER)


def be_late_below(backend: str) -> tuple[str, str, int]:
    """What comes of a task that is late in a pool of this worker's own, and of the next one."""
    import tractor_host as th

    with th.Executor(1, backend, task_timeout=0.2, cancel_timeout=0.1) as pool:
        error = pool.submit(sleep).exception(30)
        return type(error).__name__, str(error).partition(",")[0], pool.submit(abs, -3).result(30)


# -- that log ----------------------------------------------------------------------------------------


def log(*texts: str) -> None:
    import logging

    for text in texts:
        logging.getLogger("targets.some").warning("said %s", text)
    logging.getLogger("targets").debug("not this")


def log_a_flood(count: int, told: str) -> None:
    """Logs so many records of more than 1 KiB, then makes a file."""
    import logging

    for number in range(count):
        logging.getLogger("targets.flood").info("%d %s", number, "x" * 1024)
    with open(told, "w"):
        pass


def log_and_die() -> None:
    log("this")
    os._exit(3)
