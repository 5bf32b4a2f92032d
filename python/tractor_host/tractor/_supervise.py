"""What tractor calls to have an actor: starts it, sees it through its boot, and sees to its end."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import trio
from tractor._exceptions import ActorFailure
from tractor.devx import debug
from tractor.log import get_logger
from tractor.msg import types as messages
from tractor.runtime import _state
from tractor.runtime._portal import Portal
from tractor.spawn import _spawn

from tractor_host import _native
from tractor_host import _spawn as spawning
from tractor_host._share import Fd
from tractor_host._worker import death_of
from tractor_host.tractor import SPAWN_METHODS, _actor
from tractor_host.tractor._process import Process
from tractor_host.tractor._sockets import Record

if TYPE_CHECKING:
    from tractor_host._worker import Worker

__all__ = ["supervise"]

log = get_logger("tractor")

#: What `proc_kwargs` may name: options of our `spawn`.
_OPTIONS: Final = (
    "name", "gil", "process", "stdio", "env", "cwd", "timeout", "cancel_timeout", "kill_timeout", "ladder",
    "priority", "cpu_quota",
)  # fmt: skip
#: Seconds that an actor's runtime gets to end when its process is to, and for all rungs after that. It has
#: been asked by its parent before, over tractor's own channel.
_CANCEL_TIMEOUT: Final = 0.5
_KILL_TIMEOUT: Final = 3.0
#: SIGINT would be asking a third time.
_PROCESS_LADDER: Final = {"cancel": _CANCEL_TIMEOUT, "sigterm": 0.25, "sigkill": _KILL_TIMEOUT}
#: What the fork server imports, so that no actor has to.
_PRELOADED: Final = ("tractor_host.tractor._warm",)


async def supervise(
    name: str,
    actor_nursery: Any,
    subactor: Any,
    errors: dict[tuple[str, str], Exception],
    bind_addrs: list[Any],
    parent_addr: Any,
    _runtime_vars: dict[str, Any],
    *,
    infect_asyncio: bool = False,
    task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    proc_kwargs: Mapping[str, Any] = {},
) -> None:
    """An entry of tractor's registry: has an actor from its start until it is gone.

    Raises:
        ActorFailure: It ended before it had connected.
        TypeError, ValueError, OSError: It could not be started; see `tractor_host.spawn`.
    """
    key = _spawn._spawn_method
    unknown = [option for option in proc_kwargs if option not in _OPTIONS]
    if unknown:
        raise TypeError(
            f"the spawn method {key!r} takes no {', '.join(map(repr, unknown))} in proc_kwargs: there are "
            f"{', '.join(map(repr, _OPTIONS))}"
        )
    uid = subactor.aid.uid
    is_in_debug = bool(_runtime_vars.get("_debug_mode"))
    boot = _actor.Boot(
        uid=uid,
        loglevel=subactor.loglevel,
        parent_addr=parent_addr,
        infect_asyncio=infect_asyncio,
        key=key,
        in_group=os.getpgrp() if is_in_debug else None,
    )
    inherited = _actor.record
    record = Record.create() if inherited is None else inherited
    process: Process | None = None
    has_booted = False
    server = actor_nursery._actor.ipc_server
    # The server's own `wait_for_peer` waits for ever if the actor is there before it is called.
    has_connected = server._peer_connected.setdefault(uid, trio.Event())
    is_up = -1  # a pipe, which the actor writes to
    try:
        await trio.lowlevel.checkpoint_if_cancelled()
        is_up, up = os.pipe2(os.O_CLOEXEC)
        try:
            worker = await _in_thread(functools.partial(_start, boot, record, up, dict(proc_kwargs)))
        finally:
            os.close(up)
        process = Process(worker)
        log.runtime(f"Started {process!r}\n")
        channel = await _connected(server, has_connected, uid, process)
        portal = Portal(channel)
        actor_nursery._children[uid] = (subactor, process, portal)
        has_booted = True
        await channel.send(
            messages.SpawnSpec(
                _parent_main_data=subactor._parent_main_data,
                enable_modules=subactor.enable_modules,
                reg_addrs=subactor.reg_addrs,
                bind_addrs=bind_addrs,
                _runtime_vars=_runtime_vars,
            )
        )
        _state.current_actor()._actoruid2nursery[uid] = actor_nursery
        # It registers itself meanwhile. Programs look an actor up once the next one has started, by when one
        # of `trio` has long been there.
        await _either(functools.partial(trio.lowlevel.wait_readable, is_up), process.wait)
        os.close(is_up)
        is_up = -1
        task_status.started(portal)

        # The nursery's end, or its cancellation, which wants to be in order.
        with trio.CancelScope(shield=True):
            await actor_nursery._join_procs.wait()
        async with trio.open_nursery() as tasks:
            if portal in actor_nursery._cancel_after_result_on_exit:
                tasks.start_soon(_spawn.cancel_on_completion, portal, subactor, errors)
            await _spawn.soft_kill(process, Process.wait, portal)
            tasks.cancel_scope.cancel()
    finally:
        if is_up >= 0:
            os.close(is_up)
        if process is not None:
            with trio.CancelScope(shield=True):
                await _end(process, uid, has_booted=has_booted, is_in_debug=is_in_debug)
            process.close()
            removed = record.sweep(uid[1] if inherited is not None else None)
            if removed:
                log.runtime(f"Removed the socket files of {process!r}: {removed}\n")
        if inherited is None:
            record.close()
        if has_booted:
            actor_nursery._children.pop(uid, None)
        else:
            server._peer_connected.pop(uid, None)


def _start(boot: _actor.Boot, record: Record, up: int, options: dict[str, Any]) -> Worker:
    """Spawns the worker. It blocks, the first time for as long as it takes to start the fork server."""
    backend = SPAWN_METHODS[boot.key]
    if backend in ("forkserver", "subint_forkserver"):
        _preload()
    if (
        backend in ("forkserver", "fork")
        and not {"ladder", "cancel_timeout", "kill_timeout"} & options.keys()
    ):
        options["ladder"] = _PROCESS_LADDER
    elif "ladder" not in options:
        options.setdefault("cancel_timeout", _CANCEL_TIMEOUT)
        options.setdefault("kill_timeout", _KILL_TIMEOUT)
    options.setdefault("name", f"{boot.uid[0]}@{boot.uid[1][:8]}")
    # A debugger's prompt reads from what tractor's program reads from.
    stdin = Fd(0) if backend != "subint" and _is_open(0) else None
    return spawning.spawn(_actor.main, boot, Fd(record.fileno()), stdin, Fd(up), backend=backend, **options)


def _preload() -> None:
    """Has the program's fork server import tractor. That of a worker is the program's."""
    if _actor.is_worker or not _native.owns_process():
        return
    with _preloading:
        missing = [module for module in _PRELOADED if module not in spawning._preloads]
        if missing:
            try:
                spawning.preload([*spawning._preloads, *missing], blanks=spawning._asked_blanks)
            except ImportError as error:
                # Each actor tries by itself, and tells what comes of it.
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)


_preloading = threading.Lock()


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


async def _in_thread[T](function: Callable[[], T]) -> T:
    """Calls it on a thread of its own, which has ended when this returns. It is not cut short: what it starts
    must be known to whoever ends it."""
    outcome: list[Callable[[], T]] = []
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def run() -> None:
        try:
            value = function()
            outcome.append(lambda: value)
        except BaseException as error:
            raised = error

            def reraise() -> T:
                raise raised

            outcome.append(reraise)
        finally:
            token.run_sync_soon(done.set)

    thread = threading.Thread(target=run, name="th-spawn")
    thread.start()
    with trio.CancelScope(shield=True):
        await done.wait()
    thread.join()
    try:
        return outcome[0]()
    finally:
        outcome.clear()  # its traceback refers to this frame


async def _either(*waits: Callable[[], Awaitable[object]]) -> list[Any]:
    """Calls all of them at once, until the first returns; what that has returned is among the result."""
    found: list[Any] = []

    async def run(wait: Callable[[], Awaitable[object]]) -> None:
        found.append(await wait())
        tasks.cancel_scope.cancel()

    async with trio.open_nursery() as tasks:
        for wait in waits:
            tasks.start_soon(run, wait)
    return found


async def _connected(server: Any, has_connected: trio.Event, uid: tuple[str, str], process: Process) -> Any:
    """The channel that the actor has opened to us.

    Raises:
        ActorFailure: It ended instead.
    """

    async def peer() -> Any:
        await has_connected.wait()
        return server._peers[uid][-1]

    async def end() -> None:
        await process.wait()

    found = await _either(peer, end)
    for channel in found:
        if channel is not None:
            return channel
    assert process.worker is not None, "nobody has given it up"
    death = death_of(process.worker)
    last = f"\n\nThe last of its stderr:\n{death.exit.stderr.rstrip()}" if death.exit.stderr else ""
    raise ActorFailure(
        f"actor {uid[0]!r} ended before it had connected to its parent: {death.exit.cause}{last}"
    ) from death


async def _end(process: Process, uid: tuple[str, str], *, has_booted: bool, is_in_debug: bool) -> None:
    """Sees to it that it is gone, once whoever debugs it is done."""
    if not has_booted and is_in_debug and _state.current_actor(err_on_no_runtime=False) is not None:
        # Its prompt may be on its way.
        async with debug.acquire_debug_lock(subactor_uid=uid):
            with trio.move_on_after(_CANCEL_TIMEOUT):
                await process.wait()
    await debug.maybe_wait_for_debugger(
        child_in_debug=is_in_debug, header_msg="The end of an actor waits for the debugger\n"
    )
    if process.poll() is None and not has_booted:
        # There is no way yet on which it could be asked.
        process.terminate()
        await process.wait()
    elif process.poll() is None:
        await _spawn.hard_kill(process)
