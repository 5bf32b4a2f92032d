"""Workers of tractor-host as actors of tractor (https://github.com/goodboy/tractor).

    import tractor
    import tractor_host.tractor

    tractor_host.tractor.install()

    async with tractor.open_nursery(start_method="tractor_host") as nursery:
        ...

`install` enters our backends in tractor's registry of spawn methods, in the place of its own where those have
the same name. What tractor is told of an actor's process is a `Process`; all ways in which tractor ends an
actor lead to the worker's kill ladder.

tractor is imported by `install`, and not before; nothing else of this package needs it. For tractor's own
test suite this module is a pytest plugin: `-p tractor_host.tractor`. `python -m tractor_host.tractor PROGRAM`
runs a program that knows nothing of all this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tractor_host.tractor._process import Process

__all__ = ["SPAWN_METHODS", "STAND_IN", "Process", "install"]

#: tractor's names of spawn methods, and the backend of ours that each of them stands for.
SPAWN_METHODS: Final = {
    "tractor_host": "forkserver",
    "main_thread_forkserver": "fork",
    "subint_fork": "fork",
    "subint": "subint",
    "subint_forkserver": "subint_forkserver",
}

#: The environment variable that names the spawn method of ours that `trio` is to be, for programs and tests
#: that know that name alone.
STAND_IN: Final = "TRACTOR_HOST_TRIO"

#: For pytest, which is given the name of this module.
pytest_plugins = ("tractor_host.tractor._suite",)


def install() -> None:
    """Enters our backends in tractor's registry, under the names in `SPAWN_METHODS`.

    It may be called again, and must be before tractor's runtime is started with one of them. Workers that are
    actors have them installed.

    Raises:
        ImportError: tractor, or something that it needs, is not installed.
        ValueError: `TRACTOR_HOST_TRIO` names no spawn method of ours.
    """
    from tractor_host.tractor import _registry

    _registry.install()


def __getattr__(name: str) -> Any:
    if name == "Process":
        from tractor_host.tractor._process import Process

        return Process
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
