"""The worker's side: what an actor does before it is tractor's, and what differs for it in a subinterpreter.

The fork server imports it, with tractor, once for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from tractor_host.tractor import _frames  # noqa: F401  # before tractor

# isort: split
import tractor._child
import tractor.devx
import trio
from tractor.devx import _proctitle
from tractor.devx.debug import _tty_lock
from tractor.ipc import _uds
from tractor.runtime import _state
from tractor.spawn import _entry, _spawn
from tractor.trionics import _mngrs

from tractor_host import _child, _native
from tractor_host._backends import _trio
from tractor_host.tractor._sockets import Record

if TYPE_CHECKING:
    from tractor_host._share import Fd

__all__ = ["Boot", "is_worker", "main", "record"]

#: Whether this interpreter is an actor's.
is_worker = False
#: Where an actor takes down what sockets it binds, for those that it starts too; `None` in the program.
record: Record | None = None
_keeps: Fd | None = None
#: tractor's own, which a copy of an actor has in its place already.
_async_main, _start_listener = _entry.async_main, _uds.start_listener


@dataclasses.dataclass(frozen=True)
class Boot:
    """What an actor has to know before it can ask.

    Attributes:
        uid: Its name and its number.
        loglevel: Its level of logging.
        parent_addr: Where its parent listens.
        infect_asyncio: Whether its loop is asyncio's, with trio as a guest.
        key: The spawn method that it came by, and starts its own actors by.
        in_group: The process group that it joins, if it is to read from the program's terminal.
    """

    uid: tuple[str, str]
    loglevel: str | None
    parent_addr: Any
    infect_asyncio: bool
    key: str
    in_group: int | None


def main(boot: Boot, sockets: Fd, stdin: Fd | None, up: Fd) -> None:
    """Is the actor. `up` is written to when its parent's registrar knows it, and it answers."""
    global is_worker, record, _keeps
    from tractor_host.tractor import SPAWN_METHODS, install

    is_worker = True
    # In a subinterpreter it is closed with the worker, however that ends.
    _keeps = sockets
    record = Record(sockets.fileno())
    backend = SPAWN_METHODS[boot.key]
    if backend == "fork":
        forget()
        _log_to_own_streams()
    else:
        # As `python -m` has it, which is how tractor starts its own.
        folder = os.getcwd()
        if folder not in sys.path:
            sys.path.insert(0, folder)
    _take_stdin(stdin)
    if boot.in_group is not None and backend != "subint":
        os.setpgid(0, boot.in_group)
    install()
    _spawn.try_set_start_method(boot.key)
    # The fork server's may be another one.
    _uds.UDSAddress.def_bindspace = _state.get_rt_dir()
    _take_down_sockets(boot.uid[1])
    _prepare_runtime(up)
    if not _native.is_main_interpreter():
        _leave_signals_alone()
    if backend == "subint":
        # The title would be that of the whole program.
        _proctitle._stp = None
    try:
        tractor._child._actor_child_main(
            uid=boot.uid,
            loglevel=boot.loglevel,
            parent_addr=boot.parent_addr,
            infect_asyncio=boot.infect_asyncio,
            # So that it is sent what it is to be over its channel, and makes its parent's `__main__` again.
            spawn_method="trio",
        )
    except SystemExit:
        raise
    except BaseException as error:
        # As Python ends a program.
        sys.excepthook(type(error), error, error.__traceback__)
        raise


def _take_stdin(stdin: Fd | None) -> None:
    if stdin is not None:
        with stdin:
            os.dup2(stdin.fileno(), 0)
    try:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    except OSError:  # the program has none
        sys.stdin = io.StringIO()


class _Status:
    """The status of its runtime's task, as tractor sees it."""

    def __init__(self, fd: Fd) -> None:
        self._fd = fd

    def started(self, value: object = None) -> None:
        """Is called when the actor is registered."""
        # The parent may have given up.
        with self._fd, contextlib.suppress(BrokenPipeError):
            os.write(self._fd.fileno(), b"\0")


def _prepare_runtime(up: Fd) -> None:
    """Has the first rung of the ladder cancel the runtime, from wherever in its life it is; and has that tell
    when it is up."""

    async def async_main(*args: Any, **kwargs: Any) -> Any:
        with up, trio.CancelScope() as scope:
            _child.set_canceller(_trio.canceller(scope))
            try:
                return await _async_main(*args, task_status=_Status(up), **kwargs)
            finally:
                _child.set_canceller(None)

    _entry.async_main = async_main


def _take_down_sockets(owner: str) -> None:

    async def start_listener(addr: Any, **kwargs: Any) -> Any:
        assert record is not None, "an actor has one"
        record.add(owner, str(addr.sockpath))
        return await _start_listener(addr, **kwargs)

    _uds.start_listener = start_listener


def _leave_signals_alone() -> None:
    """Signals are the main interpreter's: no other may set a handler."""

    def enable_stack_on_sig(*args: object, **kwargs: object) -> None:
        return

    def is_main_trio_thread(cls: object) -> bool:
        return trio.lowlevel.in_trio_run()

    def shield(cls: object) -> None:
        return

    tractor.devx.enable_stack_on_sig = enable_stack_on_sig
    status = _tty_lock.DebugStatus
    status.is_main_trio_thread = classmethod(is_main_trio_thread)
    status.shield_sigint = classmethod(shield)
    status.unshield_sigint = classmethod(shield)


# -- in a copy of a process that was an actor ------------------------------------------------------------


def _plain(owner: type) -> dict[str, Any]:
    """A class's own data, of those that tractor keeps the state of a process in."""
    found = {}
    for name, value in vars(owner).items():
        if (
            name.startswith("__")
            or callable(value)
            or isinstance(value, classmethod | staticmethod | property)
        ):
            continue
        found[name] = value.copy() if isinstance(value, dict | set) else value
    return found


#: As it is before any runtime: taken when tractor is imported.
_RUNTIME_VARS = {
    name: value.copy() if isinstance(value, list) else value for name, value in _state._runtime_vars.items()
}
_CLASSES = [(owner, _plain(owner)) for owner in (_tty_lock.Lock, _tty_lock.DebugStatus, _mngrs._Cache)]


def forget() -> None:
    """Makes tractor what it was when it was imported. A copy of a parent has that one's runtime in it, which
    is of no loop that runs here."""
    _state._runtime_vars.clear()
    for name, value in _RUNTIME_VARS.items():
        _state._runtime_vars[name] = value.copy() if isinstance(value, list) else value
    _state._current_actor = None
    _state._last_actor_terminated = None
    for owner, plain in _CLASSES:
        for name, value in plain.items():
            setattr(owner, name, value.copy() if isinstance(value, dict | set) else value)
    _tty_lock.Lock._debug_lock = trio.StrictFIFOLock()


def _log_to_own_streams() -> None:
    """Has the parent's handlers of logging write to our stdout and stderr, which are other objects."""
    _, *theirs = _child._abandoned_streams[-5:]  # after those of the parent's parent
    ours = (sys.stdout, sys.stderr) * 2
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            for stream, own in zip(theirs, ours, strict=True):
                if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                    handler.stream = own  # not by its method, which would flush what is not ours
