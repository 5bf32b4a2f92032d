"""`breakpoint()` in a worker: pdb at the program's terminal, which one thread of the tree has at a time.

While one has it, the supervisors end nobody: see `breakpointhook`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pdb
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from types import FrameType
from typing import IO, Any, cast, final, override

from tractor_host import _child, _native

#: What Ctrl-C sends, and Ctrl-D.
_INTERRUPT, _END = b"\x03", b""
#: A terminal hands over a line at a time, and has no longer ones.
_LINE = 1 << 12
#: Is not stepped into.
_OURS = ["tractor_host._debug"]


def breakpointhook(*args: Any, **kwargs: Any) -> object:
    """What `breakpoint()` does in a worker: pdb, at the terminal that the program was started from.

    One thread of the whole tree has the terminal at a time, from its first prompt until it goes on
    (`continue`, `quit`) or ends; others that come to a breakpoint wait for that, in the order in which they
    came. Until then nobody in the tree is cancelled or killed, time limits stand still, and what was asked
    for meanwhile is done afterwards. Exempt are the workers of the one that is debugged, what follows from
    a death, and a program that has to end because of a signal. Ctrl-C at the prompt cancels the line; while
    the debugged code runs (`next`) it is a signal to that process, which for the code of a `subint` worker
    is the program's. `quit` raises `bdb.BdbQuit`.

    Workers have it from the start. For breakpoints of the program itself to stand in the same line:
    `sys.breakpointhook = tractor_host.breakpointhook`. As always, `PYTHONBREAKPOINT=0` passes over them all,
    and the name of another function there is called instead, without any of this.

    Args:
        *args: For such a function.
        **kwargs: The same; or `header`, a line to begin with, and `commands`, commands of pdb's to run first.

    Raises:
        RuntimeError: There is no terminal, or the program runs in its background.
        TypeError: pdb takes no such arguments.
    """
    asked = "" if sys.flags.ignore_environment else os.environ.get("PYTHONBREAKPOINT", "")
    if asked == "0":
        return None
    if asked not in ("", "pdb.set_trace"):
        return sys.__breakpointhook__(*args, **kwargs)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") == "tractor_host._child":
        frame = frame.f_back
    _stop(frame, *args, **kwargs)
    return None


def _stop(
    frame: FrameType | None, /, *, header: str | None = None, commands: list[str] | None = None
) -> None:
    debugger = getattr(_mine, "debugger", None)
    if debugger is None or debugger.quitting:
        turn = _Turn()
        # Before anything is asked for: the debugger and what it has traced refer to one another.
        _mine.end = _End(turn)
        debugger = _mine.debugger = _Debugger(turn)
    debugger.begin(header)
    debugger.set_trace(frame, commands=commands)


#: The debugger of each thread: it keeps its breakpoints.
_mine = threading.local()


@final
class _Turn:
    """The terminal, while it is this thread's."""

    def __init__(self) -> None:
        self._ticket: int | None = None
        self._fd: int | None = None
        self._usual: list[Any] = []

    def take(self) -> int:
        """Waits for the terminal, unless it is here; returns its descriptor."""
        if self._fd is None:
            self._ticket = _native.terminal_ask()
            try:
                self._fd = _native.terminal_wait(self._ticket)
                self._usual = termios.tcgetattr(self._fd)
            except BaseException:
                self.give_back()
                raise
        return self._fd

    def prompt(self, prompts: bool) -> None:
        """Has Ctrl-C end a line as Enter does, so that it is no signal; or has all as it was."""
        fd = self.take()
        modes = [*self._usual[:6], list(self._usual[6])]
        # While code runs that was not started from a shell, nobody would let it go on after a Ctrl-Z.
        modes[6][termios.VSUSP] = b"\0"
        if prompts:
            modes[0] |= termios.ICRNL
            modes[3] = (modes[3] | termios.ICANON | termios.ECHO) & ~termios.ISIG
            modes[6][termios.VEOL] = _INTERRUPT
        # Where it is another program's by now, it is not touched.
        with _not_stopped():
            if os.tcgetpgrp(fd) == os.getpgrp():
                termios.tcsetattr(fd, termios.TCSANOW, modes)

    def give_back(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            _native.fd_close(fd)
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            _native.terminal_back(ticket)


@final
class _End:
    """Is dropped at the end of its thread, which then does not need the terminal any more."""

    def __init__(self, turn: _Turn) -> None:
        self._turn = turn

    def __del__(self) -> None:
        # What CPython itself still runs on this thread is not stopped in any more.
        sys.settrace(None)
        self._turn.give_back()


@contextlib.contextmanager
def _not_stopped() -> Iterator[None]:
    """A terminal that is not ours says so, and does not stop the process."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTIN, signal.SIGTTOU])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Stream(io.TextIOBase):
    """The terminal, of which pdb has one of each kind."""

    def __init__(self, turn: _Turn) -> None:
        self._turn = turn

    @override
    def fileno(self) -> int:
        return self._turn.take()

    @override
    def isatty(self) -> bool:
        return True


@final
class _Keyboard(_Stream):
    @override
    def readable(self) -> bool:
        return True

    @override
    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        """A line; an empty one is the end.

        Raises:
            KeyboardInterrupt: It ends with Ctrl-C.
        """
        fd = self._turn.take()
        try:
            with _not_stopped():
                line = os.read(fd, _LINE)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # It is gone, or another program's by now.
            line = _END
        if line.endswith(_INTERRUPT):
            os.write(fd, b"\n")
            raise KeyboardInterrupt
        return line.decode(errors="replace")


@final
class _Screen(_Stream):
    encoding = "utf-8"

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, text: str, /) -> int:
        fd = self._turn.take()
        rest = text.encode(errors="backslashreplace")
        while rest:
            rest = rest[os.write(fd, rest) :]
        return len(text)


@final
class _Debugger(pdb.Pdb):
    """pdb that has the terminal from its first prompt until the debugged code goes on by itself."""

    def __init__(self, turn: _Turn) -> None:
        self._turn = turn
        self._goes_on = False
        name = _worker_name()
        if name is None and threading.current_thread() is threading.main_thread() and sys.stdin.isatty():
            # The program itself has the terminal as it is, with an editor of lines.
            super().__init__(skip=_OURS, nosigint=True, backend="settrace", colorize=True)
            return
        turn.take()
        try:
            with _without_readline():
                super().__init__(
                    stdin=cast(IO[str], _Keyboard(turn)),
                    stdout=cast(IO[str], _Screen(turn)),
                    skip=_OURS,
                    nosigint=True,
                    backend="settrace",
                    colorize=True,
                )
        except BaseException:
            turn.give_back()
            raise
        if name is not None:
            self.prompt = f"(Pdb {name}) "

    def begin(self, header: str | None) -> None:
        self._turn.take()
        thread = threading.current_thread()
        if name := _worker_name():
            where = "" if thread.ident == _child.main_thread else f", thread {thread.name}"
            self.message(f"\n{name} (pid {os.getpid()}{where}) is at a breakpoint")
        if header is not None:
            self.message(header)

    @override
    def interaction(self, frame: FrameType | None, tb_or_exc: Any) -> None:
        self._turn.take()
        self._goes_on = False
        try:
            self._prompt(True)
            super().interaction(frame, tb_or_exc)
        except BaseException:
            self._goes_on = True
            raise
        finally:
            if self._goes_on:
                self._turn.give_back()
            else:
                self._prompt(False)

    @override
    def onecmd(self, line: str) -> bool:
        # What it does is interrupted by Ctrl-C as any code is.
        self._prompt(False)
        try:
            return super().onecmd(line)
        finally:
            self._prompt(True)

    def _prompt(self, prompts: bool) -> None:
        if not self.use_rawinput:
            self._turn.prompt(prompts)

    @override
    def set_continue(self) -> None:
        self._goes_on = True
        super().set_continue()

    @override
    def set_quit(self) -> None:
        self._goes_on = True
        super().set_quit()

    @override
    def do_interact(self, arg: str) -> None:
        before = sys.stdin, sys.stdout
        sys.stdin, sys.stdout = self.stdin, self.stdout
        try:
            super().do_interact(arg)
        finally:
            sys.stdin, sys.stdout = before


@contextlib.contextmanager
def _without_readline() -> Iterator[None]:
    """It is of no use here, and what it sets up in a subinterpreter is the whole process's."""
    if "readline" in sys.modules or _native.is_main_interpreter():
        yield
        return
    sys.modules["readline"] = cast(Any, None)
    try:
        yield
    finally:
        del sys.modules["readline"]


def _worker_name() -> str | None:
    try:
        return str(_native.child_spec()["name"])
    except RuntimeError:  # it is no worker
        return None
