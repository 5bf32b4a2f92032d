"""Tractor's own test suite on our backends: `pytest -p tractor_host.tractor --spawn-backend=NAME`.

Where the suite knows a backend of tractor's own by that name, it skips tests that fail with it, or asks less
of them. Ours are held to what it expects of `trio`. Some tests are for that name alone: where the environment
variable `TRACTOR_HOST_TRIO` names a spawn method of ours, `--spawn-backend=trio` is that.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tractor_host import _native
from tractor_host.tractor import SPAWN_METHODS, STAND_IN, install

#: Has the programs that a test starts install our backends, and where they find this package.
_FOLDERS: Final = (Path(__file__).with_name("_site"), Path(__file__).parents[2])


def _is_ours(config: pytest.Config) -> bool:
    key = getattr(config.option, "spawn_backend", None)
    return key in SPAWN_METHODS or (key == "trio" and STAND_IN in os.environ)


def _adapt() -> None:
    """Has the suite's plugin know the names, and nothing of tractor's own backends that have them."""
    install()
    suite: Any = sys.modules.get("tractor._testing.pytest")
    if suite is None or hasattr(suite, "_tractor_host"):
        return
    suite._tractor_host = True
    suite._CAPSYS_REQUIRED_SPAWNERS = frozenset(suite._CAPSYS_REQUIRED_SPAWNERS) - SPAWN_METHODS.keys()
    is_forking_spawner = suite._is_forking_spawner
    suite._is_forking_spawner = lambda key: key not in SPAWN_METHODS and is_forking_spawner(key)
    # After a test it ends all children of pytest; the fork server is to stay.
    from tractor._testing import _reap

    find_descendants = _reap.find_descendants
    _reap.find_descendants = lambda parent: [
        pid for pid in find_descendants(parent) if pid not in _native.fork_server_owns()["processes"]
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Before the suite's plugin takes the name of the backend."""
    _adapt()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """The suite's plugin may have been loaded after this one."""
    _adapt()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """What the suite starts has the backends too."""
    if _is_ours(config):
        folders = [*map(str, _FOLDERS), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(folders))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drops marks that are about tractor's own backends."""
    if _is_ours(config):
        for item in items:
            for node in item.listchain():
                node.own_markers[:] = [
                    mark for mark in node.own_markers if mark.name != "skipon_spawn_backend"
                ]
