"""A program of tractor's actors: `tractoring.py SCENARIO SPAWN_METHOD PORT`. It prints what it finds, as JSON.

A program of its own for each test: tractor's runtime leaves trio's threads and its own state in a process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tractor
import trio
from tractor.ipc._chan import _connect_chan
from tractor.msg.types import Start

import tractor_host as th
import tractor_host.tractor as adapter
from tractor_host.tractor import _supervise

PATIENCE = 40.0


# -- what actors do --------------------------------------------------------------------------------------


async def whoami() -> list[Any]:
    return [os.getpid(), tractor.current_actor().aid.name, __name__]


async def fails() -> None:
    raise ZeroDivisionError("over there")


async def echoes(text: str) -> str:
    return text


async def has_an_actor() -> list[Any]:
    async with tractor.open_nursery() as nursery:
        portal = await nursery.start_actor("below", enable_modules=[__name__])
        found = await portal.run(whoami)
        await nursery.cancel()
    return [await whoami(), found]


@tractor.context
async def keeps_an_actor(context: tractor.Context) -> None:
    async with tractor.open_nursery() as nursery:
        portal = await nursery.start_actor("below", enable_modules=[__name__])
        await context.started(await portal.run(whoami))
        await trio.sleep_forever()


@tractor.context
async def does_not_listen(context: tractor.Context) -> None:
    await context.started()
    while True:
        try:
            time.sleep(PATIENCE)
        except BaseException:
            continue


@tractor.context
async def counts(context: tractor.Context, most: int) -> None:
    await context.started()
    async with context.open_stream() as stream:
        for number in range(most):
            await stream.send(number)


async def environment(name: str) -> list[str | None]:
    return [os.environ.get(name), os.getcwd()]


async def takes_note_of_a_signal() -> None:
    with contextlib.suppress(ValueError):  # in a subinterpreter
        signal.signal(signal.SIGUSR1, lambda *_: os.environ.update(SIGNALLED="yes"))


async def title() -> str:
    return Path("/proc/self/cmdline").read_text().rstrip("\0")


async def asks_and_leaves(folder: str) -> None:
    """Asks the registrar something, and has left before that has read it."""
    actor = tractor.current_actor()
    async with _connect_chan(actor.reg_addrs[0]) as channel:
        await channel._do_handshake(aid=actor.aid)
        Path(folder, "connected").touch()
        with trio.fail_after(PATIENCE):
            while not Path(folder, "is deaf").exists():
                await trio.sleep(0.001)
        question = Start(cid="1", ns="self", func="find_actor", kwargs={"name": "x"}, uid=actor.aid.uid)
        await channel.send(question)
    Path(folder, "left").touch()


async def backend_here() -> str:
    return str(tractor.spawn._spawn._spawn_method)


# -- scenarios -------------------------------------------------------------------------------------------


async def life(nursery: Any) -> object:
    portal = await nursery.start_actor("first", enable_modules=[__name__])
    once = await nursery.run_in_actor(echoes, text="once")
    numbers = []
    async with portal.open_context(counts, most=5) as (context, _), context.open_stream() as stream:
        async for number in stream:
            numbers.append(number)
    found = [await portal.run(whoami), await portal.run(has_an_actor), await once.wait_for_result(), numbers]
    processes = [process for _, process, _ in nursery._children.values()]
    assert all(type(process) is adapter.Process and process.poll() is None for process in processes)
    await nursery.cancel()
    return found


async def failure(nursery: Any) -> object:
    portal = await nursery.start_actor("first", enable_modules=[__name__])
    try:
        await portal.run(fails)
    except tractor.RemoteActorError as error:
        return [error.boxed_type is ZeroDivisionError, "over there" in str(error)]
    finally:
        await nursery.cancel()


async def asyncio_inside(nursery: Any) -> object:
    portal = await nursery.start_actor("first", enable_modules=[__name__], infect_asyncio=True)
    found = await portal.run(whoami)
    await nursery.cancel()
    return found[1]


async def boot_death(nursery: Any) -> object:
    try:
        await nursery.start_actor("first", loglevel="no such level")
    except tractor._exceptions.ActorFailure as error:
        return str(error)


async def boot_cancelled(nursery: Any) -> object:
    with trio.CancelScope() as scope:
        nursery._da_nursery.start_soon(_cancel_when_spawned, scope)
        await nursery.start_actor("first", enable_modules=[__name__])
    return [scope.cancelled_caught, th.statistics().live]


async def _cancel_when_spawned(scope: trio.CancelScope) -> None:
    with trio.fail_after(PATIENCE):
        while not th.workers():
            await trio.lowlevel.checkpoint()
    scope.cancel()


async def deaf(nursery: Any) -> object:
    portal = await nursery.start_actor("first", enable_modules=[__name__])
    [(_, process, _)] = nursery._children.values()
    async with trio.open_nursery() as tasks:
        await tasks.start(_keep_open, portal, does_not_listen)
        begun = time.monotonic()
        await nursery.cancel()
        await process.wait()
        seconds = time.monotonic() - begun
        # tractor does not tell who is called by an actor that is gone.
        tasks.cancel_scope.cancel()
    return [process.exit.kind, process.exit.rung, seconds, process.returncode]


async def _keep_open(portal: Any, function: Any, task_status: Any) -> None:
    try:
        async with portal.open_context(function) as (_, first):
            task_status.started(first)
            await trio.sleep_forever()
    except tractor._exceptions.TransportClosed, trio.ClosedResourceError:
        return


async def options(nursery: Any) -> object:
    try:
        await nursery.start_actor("first", proc_kwargs={"pass_fds": (3,)})
    except TypeError as error:
        refused = str(error)
    given = {"env": {**os.environ, "TRACTORING": "yes"}, "cwd": "/"}
    portal = await nursery.start_actor("first", enable_modules=[__name__], proc_kwargs=given)
    found = await portal.run(environment, name="TRACTORING")
    await nursery.cancel()
    return [refused, found]


async def registered(nursery: Any) -> object:
    known = tractor.current_actor()._registry
    found = []
    for number in range(5):
        portal = await nursery.start_actor(f"actor {number}", enable_modules=[__name__])
        found.append(portal.channel.aid.uid in known)
    await nursery.cancel()
    return found


async def descriptors(nursery: Any) -> object:
    found = []
    for number in range(4):
        portal = await nursery.start_actor(f"actor {number}", enable_modules=[__name__])
        [(_, process, _)] = nursery._children.values()
        nursery._join_procs.set()
        await portal.cancel_actor()
        await process.wait()
        with trio.fail_after(PATIENCE):
            while nursery._children:
                await trio.sleep(0.01)
        found.append(len(os.listdir("/proc/self/fd")))
    # Connections that were made on the way out may still be being closed.
    with trio.move_on_after(5):
        while found[-1] > found[1]:
            await trio.sleep(0.01)
            found[-1] = len(os.listdir("/proc/self/fd"))
    return found


async def unanswered(nursery: Any) -> object:
    portal = await nursery.start_actor("first", enable_modules=[__name__])
    with tempfile.TemporaryDirectory() as folder:
        async with trio.open_nursery() as tasks:
            tasks.start_soon(functools.partial(portal.run, asks_and_leaves, folder=folder))
            with trio.fail_after(PATIENCE):
                while not Path(folder, "connected").exists():
                    await trio.sleep(0.001)
            Path(folder, "is deaf").touch()
            deadline = time.monotonic() + PATIENCE
            while not Path(folder, "left").exists():
                assert time.monotonic() < deadline
                time.sleep(0.001)
    found = await portal.run(echoes, text="here")
    await nursery.cancel()
    return found


async def has_title(nursery: Any) -> object:
    if tractor.devx._proctitle._stp is None:
        return None
    portal = await nursery.start_actor("first", enable_modules=[__name__])
    found = await portal.run(title)
    await nursery.cancel()
    return found


async def signalled(nursery: Any) -> object:
    portal = await nursery.start_actor("first", enable_modules=[__name__])
    [(_, process, _)] = nursery._children.values()
    assert isinstance(process, trio.Process)
    await portal.run(takes_note_of_a_signal)
    process.send_signal(signal.SIGUSR1)
    found = None
    with trio.move_on_after(1):
        while found is None:
            [found, _] = await portal.run(environment, name="SIGNALLED")
    await nursery.cancel()
    await process.wait()
    process.send_signal(signal.SIGUSR1)
    return found


async def stand_in(nursery: Any) -> object:
    portal = await nursery.start_actor("first", enable_modules=[__name__])
    [(_, process, _)] = nursery._children.values()
    assert type(process) is adapter.Process
    found = await portal.run(backend_here)
    await nursery.cancel()
    return found


async def sockets(nursery: Any) -> object:
    folder = Path(tractor.runtime._state.get_rt_dir())

    def names() -> list[str]:
        return sorted(path.name.partition("@")[0] for path in folder.glob("*.sock"))

    stays = await nursery.start_actor("stays", enable_modules=[__name__])
    portal = await nursery.start_actor("goes", enable_modules=[__name__])
    _, process, _ = nursery._children[portal.channel.aid.uid]
    async with trio.open_nursery() as tasks:
        await tasks.start(_keep_open, portal, keeps_an_actor)
        during = names()
        # As whoever does not ask.
        if process.pid is None:
            process.kill()
        else:
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        tasks.cancel_scope.cancel()
    nursery._join_procs.set()
    with trio.fail_after(PATIENCE):
        while portal.channel.aid.uid in nursery._children:
            await trio.sleep(0.01)
    after = names()
    assert await stays.run(echoes, text="here") == "here"
    await nursery.cancel()
    return [during, after]


async def main(scenario: str, key: str, port: int) -> None:
    uds = scenario == "sockets"
    registry = (str(tractor.runtime._state.get_rt_dir()), "registry@1.sock") if uds else ("127.0.0.1", port)
    with trio.fail_after(PATIENCE):
        async with tractor.open_nursery(
            start_method=key, registry_addrs=[registry], enable_transports=["uds" if uds else "tcp"]
        ) as nursery:
            found = await globals()[scenario](nursery)
    left = [worker.name for worker in th.workers()]
    print(json.dumps({"found": found, "left": left, "spawned": th.statistics().spawned}))


if __name__ == "__main__":
    adapter.install()
    adapter.install()  # again, which does nothing
    assert _supervise.supervise is tractor.spawn._spawn._methods["tractor_host"]
    trio.run(main, sys.argv[1], sys.argv[2], int(sys.argv[3]))
