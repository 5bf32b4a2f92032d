"""`spawn` and what tells of the workers: requests are checked and put together here, and carried
out by the supervisor in `_native`."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import math
import os
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, final

from tractor_host import _native
from tractor_host._loaded import loaded
from tractor_host._target import Source, Target, fs_text, main_module
from tractor_host._worker import Worker, budget, finite

#: The backends by name, aliases included, and what each of them is.
BACKENDS: Final[Mapping[str, str]] = {
    "forkserver": "a process forked from a clean one",
    "subint": "a subinterpreter on a thread of this process",
    "subint_forkserver": "a subinterpreter in a process forked from a clean one",
    "fork": "a process forked from this one",
    "exec": "a process started afresh",
    "main_thread_forkserver": "fork",
    "subint_fork": "fork",
    "trio": "exec",
}
_ALIASES = {"main_thread_forkserver": "fork", "subint_fork": "fork", "trio": "exec"}
#: Those whose workers the fork server forks.
_ZYGOTE = ("forkserver", "subint_forkserver")
_DEFAULT = "forkserver"
#: Seconds: the default of `cancel_timeout` and of `kill_timeout`.
_BUDGET: Final = 3.0


def spawn(
    target: str | Source | Callable[..., Any],
    *args: Any,
    backend: str | None = None,
    name: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    runtime: Literal["sync", "trio", "asyncio"] | None = None,
    gil: Literal["shared", "own", "auto"] = "shared",
    process: str | None = None,
    stdio: str | os.PathLike[str] = "inherit",
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    cancel_timeout: float = _BUDGET,
    kill_timeout: float = _BUDGET,
    ladder: Mapping[str, float] | None = None,
    promote: bool = False,
    priority: float = 1.0,
    cpu_quota: float | None = None,
) -> Worker:
    """Starts a worker that runs `target(*args, **kwargs)`, and returns its handle.

    Args:
        target: `"module:qualname"`, a callable that can be imported by its name (from `__main__` too;
            `async def` too), or a `Source`. It is imported and called in the worker.
        args: Its arguments; pickled.
        backend: `"forkserver"`, `"subint"`, `"subint_forkserver"`, `"fork"` or `"exec"`; by default
            `$TRACTOR_HOST_BACKEND`, else `"forkserver"` (or `"fork"`, for what is defined in a `__main__`
            that no other process can run again, as in an interactive session). tractor's names `"trio"`,
            `"main_thread_forkserver"` and `"subint_fork"` are taken too.
        name: Shown in `ps` and in every message; made of the target's name by default.
        kwargs: Its keyword arguments; pickled.
        runtime: What runs an `async def` target; by default what the caller runs in, else asyncio.
        gil: For `"subint"` and `"subint_forkserver"`: `"shared"` takes any extension module, `"own"` runs in
            parallel, `"auto"` tries its own and *starts the target again* with the shared one when an
            extension module refuses to load; it is remembered for that target.
        process: For `"subint_forkserver"`: a name. Workers that name the same live in one process, each in a
            subinterpreter of its own there; it is made for the first of them, with the environment and the
            directory of that moment, and ends with the last. One that the ladder cannot end takes the others
            along (`"killed"`), and so does one that crashes (`"signalled"`).
        stdio: stdout and stderr: `"inherit"`, `"null"`, `"pipe"` (collected in memory, see
            `Worker.stdout`; the worker never waits for a reader) or the path of a file to append to.
            stdin is empty.
        env: The whole environment of a process worker; this process's by default.
        cwd: The working directory of a process worker; this process's by default.
        timeout: Seconds that it may run from now; then it is killed.
        cancel_timeout: Seconds it gets to end by itself when it is killed; 0 leaves that rung out.
        kill_timeout: Seconds for all further rungs.
        ladder: In the place of these two: the rungs to climb and the seconds for each, in order, as
            `{"cancel": 1, "unwind": 0.1, "unblock": 5}`. `rungs(backend)` tells which there are; what is
            left out is not climbed, and what follows the last one is `"abandoned"`. A process's must end
            with `"sigkill"`.
        promote: Run a target that once had to be abandoned in a subinterpreter in a process instead.
        priority: Its weight, from 0.01 to 100. Of the subinterpreters that compete for one GIL, one with 2
            gets twice the time of one with 1. A process gets the nice value that comes nearest (a step is a
            factor of 1.25); above 1 that takes the right to lower it.
        cpu_quota: At most this part of one processor, above 0, for all its threads together; for
            subinterpreters in this process or in one that has a name (`process=`). It counts time in C code
            too, but that is not cut short.

    Raises:
        TypeError, ValueError: An argument can't be right; the text says which and why. Nothing was started.
        OSError: No process, thread or fd to be had (EAGAIN, EMFILE). Nothing was left behind.
        RuntimeError: After shutdown; in a process that was made by `os.fork()` behind our back; or in a
            worker that runs the main module again (what spawns there lacks an `if __name__ == "__main__"`).

    A target that can't be imported, or arguments that do not unpickle there, are the worker's failure:
    its exit is `"raised"` and `Worker.result()` raises `RemoteError`.
    """
    _check_main_is_made()
    wall = resolve_backend(backend)
    if runtime not in (None, "sync", "trio", "asyncio"):
        raise ValueError(f"runtime must be 'sync', 'trio', 'asyncio' or None, not {runtime!r}")
    _check_gil(gil)
    for what, text in (("name", name), ("process", process)):
        if text is not None:
            _check_name(what, text)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a mapping, not {type(kwargs).__name__}")
    packed = Target(target, args, kwargs or {})
    main = None
    if packed.needs_main:
        # What a worker makes of our main program comes back under this name, as with multiprocessing.
        sys.modules.setdefault("__mp_main__", sys.modules["__main__"])
        if not has_our_main(wall):
            main = main_module()
            if main is None and wall != "fork":
                if backend is not None or "TRACTOR_HOST_BACKEND" in os.environ:
                    raise ValueError(
                        "the target or an argument is defined in __main__, and this __main__ has no file "
                        "that a worker could run again (an interactive session?); define it in a module, or "
                        "use backend='fork'"
                    )
                wall = "fork"
    if wall == "fork" and _native.is_main_interpreter():  # which is what is forked
        _import_for_forks()
    rungs_asked = None if ladder is None else _ladder(wall, ladder, cancel_timeout, kill_timeout)
    environment = None if env is None else [list(_variable(*pair)) for pair in env.items()]
    spec: dict[str, Any] = {
        "wall": wall,
        "gil": gil,
        "runtime": runtime,
        "caller": running_loop(),
        "ancestors": _ancestors(),
        "thread": threading.get_ident(),
        "argv": list(map(fs_text, sys.argv)),
        "path": [] if wall == "fork" else _sys_path(),
        "env": None,
        "main": main,
    }
    if wall in _ZYGOTE and environment is None:
        spec["env"] = _environment()
    elif environment is not None and wall in ("fork", *_ZYGOTE):
        spec["env"] = "\0".join([f"{key}={value}" for key, value in environment])
    request = {
        "name": name,
        "backend": wall,
        "gil": gil,
        "process": process,
        "target": packed.description,
        "stdio": _stdio(stdio),
        "env": environment,
        "cwd": None if cwd is None else fs_text(os.fspath(cwd)),
        "timeout": finite("timeout", timeout),
        "cancel_timeout": budget("cancel_timeout", cancel_timeout),
        "kill_timeout": budget("kill_timeout", kill_timeout),
        "ladder": rungs_asked,
        "promote": bool(promote),
        "priority": _number("priority", priority),
        "cpu_quota": None if cpu_quota is None else _number("cpu_quota", cpu_quota),
        "command": _command() if wall == "exec" or wall in _ZYGOTE else [],
        "preload": _modules_to_preload(_preloads) if wall in _ZYGOTE else [],
        "blanks": _blanks(_asked_blanks) if wall in _ZYGOTE else None,
        "spec": spec,
    }
    end_workers_at_exit()
    payload, memory = packed.packed.content("th-arguments")
    try:
        info = _native.spawn(request, payload, memory, packed.passed)
    finally:
        if memory is not None:
            _native.fd_close(memory)
    worker = Worker._of(info, warns=True)
    if wall in _ZYGOTE:
        for module, traceback in _native.preload_failures():
            warnings.warn(
                f"{module!r} could not be preloaded; workers will import it themselves\n{traceback}",
                RuntimeWarning,
                stacklevel=2,
            )
    return worker


def check_options(
    wall: str | None = None,
    *,
    name: str | None,
    gil: str,
    process: str | None = None,
    stdio: str | os.PathLike[str],
    env: Mapping[str, str] | None,
    cwd: str | os.PathLike[str] | None,
    ladder: Mapping[str, float] | None,
    priority: float,
    cpu_quota: float | None,
    cancel_timeout: float = _BUDGET,
    kill_timeout: float = _BUDGET,
) -> None:
    """Whether `spawn` takes these, for whoever spawns with them later; without a `wall`, which is one of
    `BACKENDS`, each for itself alone.

    Raises:
        TypeError, ValueError: One of them can't be right.
    """
    _check_gil(gil)
    for what, text in (("name", name), ("process", process)):
        if text is not None:
            _check_name(what, text)
            if "\0" in text:
                raise ValueError(f"the {what} {text!r} has a NUL, which no process can be called by")
    _stdio(stdio)
    for what, mapping in (("env", env), ("ladder", ladder)):
        if mapping is not None and not isinstance(mapping, Mapping):
            raise TypeError(f"{what} must be a mapping, not {type(mapping).__name__}")
    for pair in (env or {}).items():
        _variable(*pair)
    if cwd is not None:
        fs_text(os.fspath(cwd))
    budget("cancel_timeout", cancel_timeout)
    budget("kill_timeout", kill_timeout)
    if ladder is not None and wall is not None:
        there = dict(_native.rungs(wall))
        for rung, _ in _ladder(wall, ladder, cancel_timeout, kill_timeout):
            if rung not in there:
                raise ValueError(f"{wall!r} has no rung {rung!r}; there are {', '.join(map(repr, there))}")
    elif ladder is not None:
        for step, seconds in ladder.items():
            if not isinstance(step, str):
                raise TypeError(f"the rungs of a ladder are strings, not {type(step).__name__}")
            budget(f"the budget of {step!r} in the ladder", seconds)
    if not 0.01 <= _number("priority", priority) <= 100.0:
        raise ValueError(f"priority must be from 0.01 to 100, not {priority}")
    if cpu_quota is not None and _number("cpu_quota", cpu_quota) <= 0.0:
        raise ValueError(f"cpu_quota must be a part of one processor, above 0, not {cpu_quota}")


def _check_gil(gil: str) -> None:
    if gil not in ("shared", "own", "auto"):
        raise ValueError(f"gil must be 'shared', 'own' or 'auto', not {gil!r}")


def _check_main_is_made() -> None:
    """As `_child`'s, which only a worker has loaded."""
    child = loaded("tractor_host._child")
    if child is not None:
        child.check_main_is_made()


def _ancestors() -> list[str]:
    """The names from the program's down to this interpreter's."""
    try:
        spec = _native.child_spec()
    except RuntimeError:
        return ["main"]
    return [*spec["ancestors"], spec["name"]]


def has_our_main(wall: str) -> bool:
    """Whether workers there are a copy of the calling interpreter, with its main module: not if that is a
    subinterpreter, whose forks are of the main one."""
    return wall == "fork" and bool(_native.is_main_interpreter())


def preload(modules: Iterable[str], *, blanks: int | None = None) -> None:
    """Starts the fork server anew, with modules that it imports once for all workers to come.

    Workers that are there are not touched. `$TRACTOR_HOST_PRELOAD`, a comma-separated list, names modules
    that are always preloaded.

    Args:
        modules: Their names, in the place of those that an earlier call named. What they import must start
            no thread, which a fork would not copy.
        blanks: How many idle processes the fork server keeps ready for workers to come, of each kind that
            is spawned; 0 for none, at most 64. By default `$TRACTOR_HOST_BLANKS`, else 1, in a worker 0.

    Raises:
        TypeError, ValueError: An argument can't be right, or `$TRACTOR_HOST_BLANKS`.
        ImportError: One of them could not be imported; its traceback is in the text. The fork server runs
            without it.
        OSError, RuntimeError: The fork server could not be started.
    """
    global _preloads, _asked_blanks
    count = _blanks(blanks)
    if isinstance(modules, str):
        raise TypeError("preload takes a list of module names, not one name")
    names = tuple(modules)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"a module's name is a str, not {type(name).__name__}")
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"no module can be called {name!r}")
    spec = {"path": _sys_path(), "argv": list(map(fs_text, sys.argv))}
    _native.preload(_command(), _modules_to_preload(names), spec, count)
    end_workers_at_exit()
    _preloads, _asked_blanks = names, blanks
    failures = _native.preload_failures()
    if failures:
        texts = "\n".join(traceback for _, traceback in failures)
        names_failed = ", ".join(repr(module) for module, _ in failures)
        raise ImportError(f"failed to preload {names_failed}\n{texts}", name=failures[0][0])


#: What `preload` was given last.
_preloads: tuple[str, ...] = ()
_asked_blanks: int | None = None
#: The most blanks that can be asked for.
_MOST_BLANKS: Final = 64


def _blanks(asked: int | None) -> int | None:
    """How many blanks to keep ready: as asked, as in the environment, or `None` for the default."""
    if asked is None:
        text = os.environ.get("TRACTOR_HOST_BLANKS", "").strip()
        if not text:
            return None
        if not (text.isascii() and text.isdecimal() and len(text) < 4 and int(text) <= _MOST_BLANKS):
            raise ValueError(f"TRACTOR_HOST_BLANKS must be a number from 0 to {_MOST_BLANKS}, not {text!r}")
        return int(text)
    if isinstance(asked, bool) or not isinstance(asked, int):
        raise TypeError(f"blanks must be an int, not {type(asked).__name__}")
    if not 0 <= asked <= _MOST_BLANKS:
        raise ValueError(f"blanks must be from 0 to {_MOST_BLANKS}, not {asked}")
    return asked


def _modules_to_preload(names: tuple[str, ...]) -> list[str]:
    """These and those of the environment, each once."""
    always = os.environ.get("TRACTOR_HOST_PRELOAD", "").split(",")
    modules = dict.fromkeys([*(name.strip() for name in always), *names])
    modules.pop("", None)
    return list(modules)


def _environment() -> str:
    """That of this process, as `_child` takes it."""
    return b"\0".join([key + b"=" + value for key, value in os.environb.items()]).decode("latin-1")


def rungs(backend: str | None = None) -> dict[str, str | None]:
    """The rungs of a backend's kill ladder, in order: `None`, or the reason why this machine lacks it.

    Args:
        backend: A name of `BACKENDS`; by default the one that `spawn` takes by default.
    """
    return dict(_native.rungs(resolve_backend(backend)))


def workers() -> list[Worker]:
    """Handles to the workers of this process that have not ended, oldest first.

    Those of its workers, and of theirs, are among them; `Worker.parent` tells whose each is. In a worker:
    its own.
    """
    found = []
    for info in _native.workers():
        try:
            found.append(Worker._of(_native.hold(info["id"]), warns=False))
        except LookupError:  # it ended just now, and nobody else had a handle
            continue
    return found


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Statistics:
    """Counts since the process started, with the workers that it has started for its workers.

    Attributes:
        spawned: Workers that were made.
        live: Workers that have not ended.
        returned, raised, cancelled, killed, signalled, exited, abandoned: How the others ended.
        quarantined: Abandoned workers that are still there.
        reclaimed: Abandoned workers that ended after all.
        blanks: Idle processes that are kept ready for workers to come, just now.
    """

    spawned: int
    live: int
    returned: int
    raised: int
    cancelled: int
    killed: int
    signalled: int
    exited: int
    abandoned: int
    quarantined: int
    reclaimed: int
    blanks: int


def statistics() -> Statistics:
    """Counts of this process's workers."""
    return Statistics(**_native.statistics())


def resolve_backend(asked: str | None) -> str:
    """Which backend that is, of those that are no aliases; by default the environment's, else ours.

    Raises:
        TypeError, ValueError: There is none.
    """
    name = asked if asked is not None else os.environ.get("TRACTOR_HOST_BACKEND", _DEFAULT)
    if not isinstance(name, str):
        raise TypeError(f"backend must be a str, not {type(name).__name__}")
    if name not in BACKENDS:
        source = "" if asked is not None else " (from TRACTOR_HOST_BACKEND)"
        raise ValueError(f"unknown backend {name!r}{source}; there are {', '.join(map(repr, BACKENDS))}")
    return _ALIASES.get(name, name)


def _ladder(
    wall: str, ladder: Mapping[str, float], cancel_timeout: float, kill_timeout: float
) -> list[tuple[str, float]]:
    if not isinstance(ladder, Mapping):
        raise TypeError(f"ladder must be a mapping of rungs to seconds, not {type(ladder).__name__}")
    if (cancel_timeout, kill_timeout) != (_BUDGET, _BUDGET):
        raise ValueError("give either a ladder or cancel_timeout and kill_timeout, not both")
    there = dict(_native.rungs(wall))
    for rung in ladder:
        if not isinstance(rung, str):
            raise TypeError(f"the rungs of a ladder are strings, not {type(rung).__name__}")
        if (reason := there.get(rung)) is not None:
            raise ValueError(f"the rung {rung!r} is missing here: {reason}")
    return [(rung, budget(f"the budget of {rung!r}", seconds)) for rung, seconds in ladder.items()]


def _number(what: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} must be a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, not {value}")
    return float(value)


def _import_for_forks() -> None:
    """Imports here, once, what every forked worker would have to import for itself."""
    from importlib import import_module

    # Also where it is in `sys.modules`: another thread may be importing it just now.
    for name in ("atexit", "faulthandler", "signal", "tractor_host._child"):
        import_module(name)


def _stdio(policy: str | os.PathLike[str]) -> str | dict[str, str]:
    if isinstance(policy, str) and policy in ("inherit", "null", "pipe"):
        return policy
    if isinstance(policy, str | os.PathLike):
        path = os.fspath(policy)
        if path:
            return {"path": fs_text(os.path.abspath(path))}
    raise ValueError(f"stdio must be 'inherit', 'null', 'pipe' or the path of a file, not {policy!r}")


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a str, not {type(name).__name__}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the {what} {name!r} has lone surrogates, which no process can be called by"
        ) from None


def _variable(key: str, value: str) -> tuple[str, str]:
    for text in (key, value):
        if not isinstance(text, str):
            raise TypeError(f"env must hold strings, not {type(text).__name__}")
        if "\0" in text:
            raise ValueError(f"env has a NUL in {key!r}")
    if not key or "=" in key:
        raise ValueError(f"env has a variable that cannot be called {key!r}")
    return fs_text(key), fs_text(value)


#: Where this package was found; a worker must find the same.
_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _sys_path() -> list[str]:
    entries = [entry or os.getcwd() for entry in sys.path]
    if _HOME not in entries:
        entries.append(_HOME)
    return list(map(fs_text, entries))


@functools.cache
def _command() -> list[str]:
    """The command that starts a fresh worker: the launcher, or this Python where it is not installed."""
    from subprocess import _args_from_interpreter_flags  # type: ignore[attr-defined]

    flags: list[str] = _args_from_interpreter_flags()
    for folder in (os.path.dirname(sys.executable), sysconfig.get_path("scripts")):
        launcher = os.path.join(folder, "tractor-host")
        if os.access(launcher, os.X_OK):
            return [*map(fs_text, [launcher, "--child", _HOME]), *map(fs_text, flags)]
    code = (
        f"import sys; sys.path.insert(0, {_HOME!r}); from tractor_host._child import exec_main; exec_main()"
    )
    return [*map(fs_text, [sys.executable, *flags, "-c", code])]


def running_loop() -> str | None:
    """What the calling thread runs in just now."""
    if (asyncio := loaded("asyncio.events")) is not None and asyncio._get_running_loop() is not None:
        return "asyncio"
    if (trio := loaded("trio")) is not None and trio.lowlevel.in_trio_run():
        return "trio"
    return None


_registered_in: int | None = None


#: What is done once all workers are ended at exit.
at_exit: dict[str, Callable[[], None]] = {}


def end_workers_at_exit() -> None:
    """Has all workers ended before the process is. An interpreter's that ends before are ended with it."""
    global _registered_in
    if _registered_in != os.getpid() and _native.owns_process():
        _registered_in = os.getpid()
        atexit.register(_shut_down)


def shut_down() -> None:
    """What is done at exit, in a process that leaves by another way."""
    if _registered_in == os.getpid():
        _shut_down()


def _shut_down() -> None:
    left = _native.shutdown()
    for last in at_exit.values():
        last()
    if left and _native.is_main_interpreter():
        _native.leave_behind()
