"""Where things were made: noted while it happens, and asked for when they are left behind.

Most are told by Python's audit events. What has none is made by functions that are wrapped meanwhile.
"""

from __future__ import annotations

import _imp
import contextlib
import functools
import os
import sys
import sysconfig
import tempfile
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

#: A frame: file, line, function.
Frame = tuple[str, int, str]

#: Functions that make something: where they are looked up when they are called, and what they make.
_MAKERS: Final = (
    *(("os", name, "fds") for name in ("dup", "pipe", "pipe2", "openpty", "eventfd", "memfd_create")),
    *(("os", name, "fds") for name in ("timerfd_create", "pidfd_open")),
    *(("os", name, "processes") for name in ("posix_spawn", "posix_spawnp")),
    ("_posixsubprocess", "fork_exec", "processes"),
    ("subprocess", "_fork_exec", "processes"),
    ("_interpreters", "create", "interpreters"),
    ("_posixshmem", "shm_open", "shm"),
    ("tractor_host._native", "spawn", "workers"),
)
_STDLIB: Final = (sysconfig.get_path("stdlib"), "<frozen ")
#: Where the frames of a test end.
_ROOTS: Final = ("pytest_pyfunc_call", "call_fixture_func", "pytest_fixture_setup")
_DEEPEST: Final = 60


class Sites:
    """A record of where things were made, since it was cleared. Paths are told as seen from `root`."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.made: dict[tuple[str, object], list[Frame]] = {}
        self.sockets: list[tuple[weakref.ref[Any], list[Frame]]] = []
        self.threads: list[tuple[weakref.ref[Any], list[Frame]]] = []
        self.opened: dict[str, list[Frame]] = {}
        #: Paths of files that were made directly below these folders, by what they are.
        self.files: dict[str, tuple[str, list[Frame]]] = {}
        self.folders = {tempfile.gettempdir(): "temp files", "/dev/shm": "shm"}
        #: The threads that modules in C have started while they were imported, for all of the program.
        self.of_imports: set[int] = set()
        #: Called before a worker is spawned, with its backend.
        self.before_spawn: Callable[[str], None] = lambda backend: None
        self._undo: list[tuple[Any, str, Any]] = []
        self._pid = os.getpid()

    def clear(self) -> None:
        """Forgets all."""
        for record in (self.made, self.sockets, self.threads, self.opened, self.files):
            record.clear()

    # -- what is asked for -------------------------------------------------------------------------------

    def of(self, kind: str, key: object) -> str:
        """Where a thing was made, in words; empty if that is not known."""
        return self._show(self.made.get((kind, key), []))

    def of_fd(self, fd: int, target: str) -> str:
        """Where a descriptor was made, by its number, or by the file that it is of."""
        if frames := self.made.get(("fds", fd)):
            return self._show(frames)
        for reference, frames in self.sockets:
            with contextlib.suppress(OSError, AttributeError):
                if (found := reference()) is not None and found.fileno() == fd:
                    return self._show(frames)
        for path, frames in self.opened.items():
            with contextlib.suppress(OSError):  # a path that is seen from a directory that is gone
                if path == target or os.path.realpath(path) == target:
                    return self._show(frames)
        return ""

    def of_thread(self, native_id: int) -> str:
        """Where a thread was started."""
        for reference, frames in self.threads:
            if (found := reference()) is not None and found.native_id == native_id:
                return self._show(frames)
        return ""

    def of_file(self, path: str) -> str:
        """Where a file was made."""
        return self._show(self.files[path][1]) if path in self.files else ""

    def files_left(self) -> list[tuple[str, str]]:
        """The files that were made and are still there, each with its kind."""
        return [(path, kind) for path, (kind, _) in list(self.files.items()) if os.path.lexists(path)]

    def _show(self, frames: list[Frame]) -> str:
        """The innermost of them that are neither ours nor the standard library's, as text."""
        frames = [frame for frame in frames if not frame[0].startswith(_HERE)]
        told = [f for f in frames if not f[0].startswith(_STDLIB) or "site-packages" in f[0]]
        return " < ".join(
            f"{os.path.relpath(path, self._root) if os.path.isabs(path) else path}:{line} in {name}"
            for path, line, name in (told or frames)[:3]
        )

    # -- what is noted -----------------------------------------------------------------------------------

    def install(self) -> None:
        """Begins to note."""
        global _active
        if _active is None and not _hooked:
            _hooked.append(True)
            sys.addaudithook(_audit)
        for module, name, kind in _MAKERS:
            __import__(module)
            owner = sys.modules[module]
            function = getattr(owner, name)
            self._undo.append((owner, name, function))
            setattr(owner, name, self._wrapped(function, kind))
        for name in ("create_dynamic", "exec_dynamic"):
            function = getattr(_imp, name)
            self._undo.append((_imp, name, function))
            setattr(_imp, name, self._importing(function))
        self._undo.append((None, "", _active))
        _active = self

    def uninstall(self) -> None:
        """Ends that; the audit hook stays, which can't be taken back, and has nothing to do."""
        global _active
        _active = self._undo.pop()[2]
        while self._undo:
            owner, name, function = self._undo.pop()
            setattr(owner, name, function)

    def _wrapped(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        if kind == "workers":

            @functools.wraps(function)
            def spawn(request: dict[str, Any], *args: Any) -> Any:
                if self._pid == os.getpid():
                    self.before_spawn(request["backend"])
                info = function(request, *args)
                self.made[kind, info["id"]] = frames_here()
                return info

            return spawn

        @functools.wraps(function)
        def make(*args: Any, **kwargs: Any) -> Any:
            frames = frames_here()
            if kind == "shm":
                path, *flags = args
                if (flags[0] if flags else kwargs["flags"]) & os.O_CREAT:
                    self._file(f"/dev/shm/{path.lstrip('/')}", frames)
            result = function(*args, **kwargs)
            for key in result if isinstance(result, tuple) else (result,):
                self.made["fds" if kind == "shm" else kind, key] = frames
            return result

        return make

    def _importing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def load(*args: Any) -> Any:
            before = _tasks()
            try:
                return function(*args)
            finally:
                python = {thread.native_id for thread in threading.enumerate()}
                self.of_imports |= _tasks() - before - python

        return load

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Takes an event."""
        if event == "open":
            path, _, flags = args
            if isinstance(path, int):
                return
            name = os.fsdecode(path)
            frames = self.opened[name] = frames_here()
            if flags & os.O_CREAT:
                self._file(name, frames)
        elif event == "socket.__new__":
            with contextlib.suppress(TypeError):  # of a class that has no weak references
                self.sockets.append((weakref.ref(args[0]), frames_here()))
        elif event in ("_thread.start_new_thread", "_thread.start_joinable_thread"):
            owner = getattr(args[0], "__self__", None)
            if owner is not None and hasattr(owner, "native_id"):
                self.threads.append((weakref.ref(owner), frames_here()))
        elif event in ("tempfile.mkstemp", "tempfile.mkdtemp", "os.mkdir"):
            self._file(os.fsdecode(args[0]), frames_here())
        elif event == "socket.bind" and isinstance(args[1], str | bytes):
            self._file(os.fsdecode(args[1]), frames_here())

    def _file(self, path: str, frames: list[Frame]) -> None:
        with contextlib.suppress(FileNotFoundError):  # the directory is gone, and it can't be made either
            path = os.path.abspath(path)
        kind = self.folders.get(os.path.dirname(path))
        if kind is not None and path not in self.files and not os.path.lexists(path):
            self.files[path] = (kind, frames)


def _tasks() -> set[int]:
    return set(map(int, os.listdir("/proc/self/task")))


_active: Sites | None = None
_hooked: list[bool] = []
_EVENTS: Final = frozenset(
    (
        *("open", "os.mkdir", "tempfile.mkstemp", "tempfile.mkdtemp", "socket.__new__", "socket.bind"),
        *("_thread.start_new_thread", "_thread.start_joinable_thread"),
    )
)


def _audit(event: str, args: tuple[Any, ...], events: frozenset[str] = _EVENTS) -> None:
    if event in events and _active is not None:
        _active.audit(event, args)


def _forked() -> None:
    """After a fork, in the parent: os.fork itself is not wrapped, for its warning names who has called it."""
    if _active is not None:
        with open("/proc/thread-self/children") as file:  # the youngest comes last
            _active.made["processes", int(file.read().split()[-1])] = frames_here()


os.register_at_fork(after_in_parent=_forked)


def frames_here() -> list[Frame]:
    """The frames of whoever has called, the innermost first, up to the test or the fixture."""
    found: list[Frame] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < _DEEPEST:
        code = frame.f_code
        if code.co_name in _ROOTS:
            break
        found.append((code.co_filename, frame.f_lineno, code.co_qualname))
        frame = frame.f_back
    return found


_HERE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
