"""The public surface, and that a worker loads no more of it than it needs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import tractor_host as th
from tractor_host import _native

PUBLIC = {
    "Actor", "BACKENDS", "BootTimeout", "Cancelled", "Event", "Executor", "Exit", "Fd", "LogBridge", "Nursery", "Portal",
    "Quarantined", "RemoteError", "Shared", "Source", "Statistics", "Stream",
    "StuckFrame", "StuckThread", "TaskTimeout", "Worker", "WorkerAbandoned", "WorkerCancelled", "WorkerDied", "WorkerError",
    "WorkerKilled", "__version__", "breakpointhook", "check_cancelled", "current_actor", "devx", "dump", "events", "guard_ctrl_c", "log_to_logging", "open_nursery", "preload",
    "quarantine", "rungs", "share", "spawn", "statistics", "to_worker", "watch_gil", "workers",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert set(th.__all__) == PUBLIC
    assert set(th.__all__) <= set(dir(th))
    for name in th.__all__:
        assert getattr(th, name) is not None


def test_every_public_object_is_documented() -> None:
    for name in th.__all__:
        thing = getattr(th, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing):
            for attribute, value in vars(thing).items():
                if not attribute.startswith("_") and (callable(value) or isinstance(value, property)):
                    assert inspect.getdoc(value), f"{name}.{attribute}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(th, "nonsense")


def test_the_package_is_typed_and_of_one_version() -> None:
    root = Path(th.__file__).parent
    assert (root / "py.typed").exists()
    cargo = (root.parent.parent / "Cargo.toml").read_text()
    assert re.search(r'^version = "(.*)"', cargo, re.MULTILINE)[1] == th.__version__  # type: ignore[index]


def test_native_functions_say_what_they_take() -> None:
    for name, function in vars(_native).items():
        if callable(function) and not name.startswith("__"):
            assert inspect.getdoc(function), name
            inspect.signature(function)  # raises without one


def test_a_worker_loads_little() -> None:
    heavy = "{'pickle', 'json', 're', 'asyncio', 'trio', 'threading', 'dataclasses', 'inspect', 'typing'}"
    code = (
        "import sys; before = set(sys.modules); import tractor_host._child; "
        f"print(({heavy} - before) & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert ran.stdout.strip() in ("set()", "{'typing'}"), ran.stdout
