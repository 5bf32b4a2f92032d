"""What the fork server imports, so that no actor has to: all that one needs, and an actor's life, run once.

A process that is forked has what its parent has worked out: caches of types, of codecs and of source files,
and code that is specialised. So the fork server is an actor itself for a moment, and calls itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from typing import Final

from tractor_host.tractor import _frames  # noqa: F401  # before tractor

# isort: split
import tractor
import tractor.to_asyncio
import tractor.trionics.patches
import trio
from tractor.devx import _proctitle
from tractor.ipc import Channel
from tractor.runtime._portal import open_portal
from tractor.spawn import _spawn

from tractor_host import _child
from tractor_host.tractor import _actor, _registry

__all__ = ["answer"]

#: Seconds that the rehearsal may take.
_PATIENCE: Final = 10.0


async def answer(number: int) -> int:
    """What is called."""
    return number


async def _live(address: tuple[str, int]) -> None:
    """The life of an actor that is its own registrar."""
    with trio.fail_after(_PATIENCE):
        async with (
            tractor.open_root_actor(
                name="rehearsal",
                registry_addrs=[address],
                enable_transports=["tcp"],
                enable_modules=[__name__],
                loglevel="critical",
            ),
            open_portal(await Channel.from_addr(address)) as portal,
        ):
            assert await portal.run(answer, number=1) == 1


def _rehearse() -> None:
    logger = logging.getLogger("tractor")
    level, handlers = logger.level, logger.handlers[:]
    method, hook = _spawn._spawn_method, sys.breakpointhook
    override = {name: os.environ.pop(name, None) for name in ("TRACTOR_LOGLEVEL", "TRACTOR_SPAWN_METHOD")}
    # At 127.0.0.1 somebody else might have taken the port by then, and be asked in earnest.
    host = ".".join(["127", *(str(1 + number % 254) for number in os.urandom(3))])
    with socket.create_server((host, 0)) as free:
        address = free.getsockname()
    try:
        trio.run(_live, address)
    finally:
        os.environ.update({name: value for name, value in override.items() if value is not None})
        _spawn._spawn_method, sys.breakpointhook = method, hook
        logger.setLevel(level)
        logger.handlers[:] = handlers
        _actor.forget()


def _rehearse_in_a_blank() -> None:
    """What is written to for the first time after a fork must be copied; that is done by then."""
    # One that was not rehearsed, for want of time or a port, starts more slowly and no worse.
    with contextlib.suppress(Exception):
        _rehearse()


if _proctitle._stp is not None:
    # It looks for the place of a process's title where the environment was when the process was executed; an
    # actor may have been given another one by then.
    _proctitle._stp.getproctitle()
_registry.install()
tractor.trionics.patches.apply_all()
_rehearse()
_child.rehearsals.append(_rehearse_in_a_blank)
