"""The worker's side: from its first line of Python to its last. Every backend ends up in `main`.

It is imported by every worker, so it imports nothing that it can do without.
"""

import _pickle as pickle
import _thread
import sys

from tractor_host import _native
from tractor_host._errors import Cancelled
from tractor_host._loaded import is_being_loaded
from tractor_host._parcel import Packed, opened, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Message = dict[str, Any]

#: What `cancel` does while a target runs; whoever runs the target sets it.
_canceller: Callable[[], object] | None = None
_cancelled = False
#: Whether `Cancelled` has risen in the target of a process.
_delivered = False
#: The thread that the target runs on.
main_thread: int | None = None
#: For the one that sets `_canceller` and the one that calls it.
_lock = _thread.allocate_lock()


def main() -> None:
    """Does what this interpreter was asked to do and tells how that went.

    In a process it does not return; in a subinterpreter its thread ends the interpreter afterwards.
    """
    spec = _native.child_spec()
    is_process = spec["wall"] != "subint"
    code = 1
    try:
        if spec["wall"] == "subint_forkserver" and _native.is_main_interpreter():
            _prepare_process()
            _native.child_apart(spec["gil"])  # it does not return
        _prepare(spec)
        if spec["wall"] == "house":
            _native.child_send({"type": "started"}, b"", None)
            _native.child_house()  # it does not return
        code = _work(spec)
        _wind_up(is_process)
    except SystemExit:
        raise  # what the supervisor makes rise in code that must end
    except BaseException as error:
        # Not the target's failure but ours, or the channel's; the supervisor records stderr.
        sys.excepthook(type(error), error, error.__traceback__)
        raise
    finally:
        # However it comes to that: a process must not run on into what it was forked from.
        if is_process:
            _native.child_leave(code)


def exec_main() -> None:
    """`main` for a process that was started afresh; or it is a fork server, and `main` for its workers."""
    if _native.child_enter():
        from tractor_host import _zygote

        _zygote.main()
        _prepare_blank()
        _native.child_enter()
    main()


#: What else a blank does before it has a task; entered by modules that are preloaded.
rehearsals: list[Callable[[], object]] = []
#: What `_prepare_blank` has done.
_is_prepared = False
#: What the environment of a blank is, as in a specification.
_environment: str | None = None


def _prepare_blank() -> None:
    """In a child of the fork server that has no task yet: does what does not depend on one, and rehearses
    the rest. What is written to for the first time after a fork must be copied, and code that is run must be
    mapped; most of that is done by then."""
    global _is_prepared, _environment
    import os

    is_main = _native.is_main_interpreter()
    _open_own_stdio()
    if is_main:
        _prepare_process()
    _is_prepared = True
    environment = b"\0".join([key + b"=" + value for key, value in os.environb.items()]).decode("latin-1")
    spec = {
        "wall": "forkserver" if is_main else "subint_forkserver",
        "runtime": None,
        "caller": None,
        "ancestors": ["main"],
        "argv": [os.fsencode(text).decode("latin-1") for text in sys.argv],
        "path": [os.fsencode(text).decode("latin-1") for text in sys.path],
        "env": environment,
        "main": None,
    }
    spec = _native.child_rehearse(spec)
    _prepare(spec)
    _, reference, args, kwargs = pickle.loads(pickle.dumps(("name", "os:getpid", (), {}), 5))
    target = _find(reference)
    _runner(spec, target)
    _dump(target(*args, **kwargs))
    for rehearse in rehearsals:
        rehearse()
    _flush()
    _environment = environment
    if is_main:
        _native.child_rehearse_apart()
        import signal

        # Until it has a task, a SIGINT ends it as any other signal does.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _hook_breakpoints() -> None:
    """Has `breakpoint()` ask for the program's terminal, unless somebody has said what it is to do."""
    global main_thread
    main_thread = _thread.get_ident()
    if sys.breakpointhook is sys.__breakpointhook__:
        sys.breakpointhook = _breakpoint


def _breakpoint(*args: Any, **kwargs: Any) -> object:
    from tractor_host import _debug

    return _debug.breakpointhook(*args, **kwargs)


def cancel() -> None:
    """Asks the running target to stop; called by the supervisor on a thread of its own."""
    global _cancelled
    with _lock:
        first, _cancelled = not _cancelled, True
        # Under the lock: once `set_canceller(None)` has returned, nothing reaches a target any more.
        again = first and _canceller is not None and _canceller() is True
    # A signal that comes in the moment before a thread blocks does not wake it: it is sent until seen.
    while again:
        from time import sleep

        sleep(0.01)
        with _lock:
            again = not _delivered and _canceller is not None and _canceller() is True


def set_canceller(canceller: Callable[[], object] | None) -> None:
    """Says what `cancel` is to do from now on. A cancellation that came before is made up for."""
    global _canceller
    with _lock:
        _canceller = canceller
        if _cancelled and canceller is not None:
            canceller()


def was_cancelled() -> bool:
    """Whether the supervisor has asked this worker to stop."""
    return _cancelled


# -- before the target -------------------------------------------------------------------------------


def _prepare(spec: dict[str, Any]) -> None:
    wall = spec["wall"]
    if wall == "subint":
        # The process's stdin is the host's to read.
        from _io import StringIO

        sys.stdin = StringIO()
        _open_stdio(_native.child_stdio())
    else:
        if wall == "fork":
            _begin_imports_anew(spec["thread"])
            _leave_the_parent_behind()
        if wall != "exec":
            if _is_prepared:
                # What it is was not known before.
                _set_stream("stdout", 1, "surrogateescape")
            else:
                _open_own_stdio()
            if spec["env"] is not None:
                _replace_environment(spec["env"])
        if wall != "subint_forkserver":
            _prepare_process()
    _hook_breakpoints()
    if wall != "fork":
        sys.argv = list(map(_fs_decode, spec["argv"]))
    if wall in ("exec", "forkserver", "subint_forkserver", "house"):
        sys.path[:] = map(_fs_decode, spec["path"])


def _begin_imports_anew(spawner: int) -> None:
    """Takes back the imports that other threads of the parent were in the middle of: nobody here will end
    them, and CPython keeps whoever needs such a module waiting for ever.

    What the thread that spawned was importing stays, as far as it is.
    """
    bootstrap: Any = sys.modules["_frozen_importlib"]
    locks = {name: reference() for name, reference in bootstrap._module_locks.items()}
    bootstrap._module_locks.clear()
    bootstrap._blocking_on.clear()
    for name, lock in locks.items():
        if lock is None or lock.owner in (None, spawner):
            continue
        if is_being_loaded(name):
            for module in [module for module in sys.modules if f"{module}.".startswith(f"{name}.")]:
                del sys.modules[module]


def _leave_the_parent_behind() -> None:
    """Drops what a forked copy of the parent's interpreter must not do in its stead."""
    import _signal  # type: ignore[import-not-found]
    import atexit
    import signal

    atexit._clear()
    if (threading := sys.modules.get("threading")) is not None:
        # The parent's executors have their threads woken by these, over descriptors that are gone.
        threading._threading_atexits.clear()
    signal.set_wakeup_fd(-1)
    # The kernel has them at their defaults already; Python must know.
    for number in range(1, 65):
        try:
            if _signal.getsignal(number) not in (None, _signal.SIG_DFL):
                _signal.signal(number, _signal.SIG_DFL)
        except OSError, ValueError:  # not for everybody
            continue


def _open_own_stdio() -> None:
    """Streams of its own, for a copy of another process."""
    # That one's buffers may hold what it is going to write itself.
    _abandoned_streams.extend([sys.stdin, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__])
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    _open_stdio([1, 2])


def _replace_environment(env: str) -> None:
    import os

    if env == _environment:
        return
    pairs = [pair.partition("=") for pair in env.split("\0") if pair]
    wanted = {_fs_decode(key): _fs_decode(value) for key, _, value in pairs}
    if os.environ == wanted:
        return
    zone = os.environ.get("TZ")
    os.environ.clear()
    os.environ.update(wanted)
    if wanted.get("TZ") != zone:
        from time import tzset

        tzset()


#: Streams that must not be flushed, which is what their end would do.
_abandoned_streams: list[object] = []


def _prepare_process() -> None:
    import faulthandler
    import os
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if _is_prepared:
        return
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(_cancel_signal(), _on_cancel_signal)
    # A copy of fd 2 as it is during the boot: the supervisor's record, which it reads when we crash.
    faulthandler.disable()
    faulthandler.enable(os.dup(2), c_stack=False)


def _cancel_signal() -> int:
    import signal

    return int(signal.SIGRTMIN) + 12


def _on_cancel_signal(number: int, frame: object) -> None:
    global _delivered
    # Late ones, for a target that is over, are of no use to anyone; and one is enough.
    if _canceller is not None and not _delivered:
        _delivered = True
        # One that came together with an interrupt must not rise in the clean-up that follows from that.
        if not isinstance(sys.exception(), KeyboardInterrupt):
            raise Cancelled


def _open_stdio(fds: list[int] | None) -> None:
    if fds is None:
        return
    # The fds are only lent: nobody but their owner closes them. (A stream that owns its fd also warns
    # when it is dropped unclosed; as the last thing that happens in an interpreter with a GIL of its
    # own, that leaks all of its memory.)
    _set_stream("stdout", fds[0], "surrogateescape")
    _set_stream("stderr", fds[1], "backslashreplace")


def _set_stream(name: str, fd: int, errors: str) -> None:
    encoding = getattr(sys.__stdout__, "encoding", None) or "utf-8"
    # Open for as long as the interpreter lives: it is its standard stream.
    stream = open(fd, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
    stream.reconfigure(line_buffering=name == "stderr" or stream.isatty())
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def _fs_decode(text: str) -> str:
    return text.encode("latin-1").decode(sys.getfilesystemencoding(), "surrogateescape")


# -- the target --------------------------------------------------------------------------------------


def _work(spec: dict[str, Any]) -> int:
    """Runs the target and reports. Returns the exit code that a process should leave with."""
    booted = False
    try:
        target, args, kwargs = _load(spec)
        run = _runner(spec, target)
        _native.child_send({"type": "started"}, b"", None)
        booted = True
        try:
            value = run(target, args, kwargs)
        finally:
            set_canceller(None)
            _take_late_cancellation()
        payload, memory = _dump(value)
    except Cancelled as error:
        if not _cancelled:
            return _report_raised(error, boot=not booted)
        _native.child_send({"type": "cancelled"}, b"", None)
        return 0
    except SystemExit as error:
        code = _exit_code(error)
        _native.child_send({"type": "exited", "code": code}, b"", None)
        return code
    except BaseException as error:
        return _report_raised(error, boot=not booted)
    message = {"type": "returned" if memory is None else "returned_in_memory"}
    _native.child_send(message, payload, memory)
    return 0


def _take_late_cancellation() -> None:
    """Lets what was raised a moment too late rise here, where it does no harm: the target is over."""
    try:
        for _ in range(8):
            pass
    except Cancelled:
        return


def _load(spec: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if spec["main"] is not None:
        make_main(*spec["main"])
    kind, reference, args, kwargs = unpack(opened(_native.child_payload()))
    if kind == "name":
        return _find(reference), args, kwargs
    if kind == "source":
        return _SourceTarget(*reference), args, kwargs
    return reference, args, kwargs


def _find(name: str) -> Any:
    """The object at `module:qualname`."""
    module, _, path = name.partition(":")
    __import__(module)
    found: Any = sys.modules[module]
    for part in path.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"the target {name!r} is not callable: it is of type {type(found).__qualname__}")
    return found


class _SourceTarget:
    """Source text that is called: runs in `__main__`, returns the value of its last expression."""

    def __init__(self, code: str, filename: str) -> None:
        import ast

        tree = ast.parse(code, filename)
        last = tree.body[-1] if tree.body else None
        self.value = None
        if isinstance(last, ast.Expr):
            tree.body.pop()
            self.value = compile(ast.Expression(last.value), filename, "eval")
        self.body = compile(tree, filename, "exec")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        namespace = _new_main().__dict__
        namespace.update(args=args, kwargs=kwargs)
        exec(self.body, namespace)
        return None if self.value is None else eval(self.value, namespace)


def _new_main() -> Any:
    main = type(sys)("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    return main


#: What this interpreter's main module was made of; `None` where it is none of ours.
made_of: list[str] | None = None
#: The thread that is making it just now.
_maker: int | None = None


def check_main_is_made() -> None:
    """Nothing can be started by the main module's own code, which does not run to start more of itself.

    Raises:
        RuntimeError: It runs again just now.
    """
    if _maker is not None and _maker == _thread.get_ident():
        raise RuntimeError(
            "a worker was asked for while this worker runs the program's main module again, to find what is "
            "defined there; guard what only the program is to do by: if __name__ == '__main__':"
        )


def make_main(kind: str, value: str) -> None:
    """Runs the parent's main program again, as a module by the name that multiprocessing uses for
    that: what it guards by `__name__ == "__main__"` does not run."""
    global made_of, _maker
    import runpy

    main = type(sys)("__mp_main__")
    # Already there while it runs: a program that spawns without a guard must find itself.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    _maker = _thread.get_ident()
    try:
        if kind == "module":
            content = runpy.run_module(value, run_name="__mp_main__", alter_sys=True)
        elif kind == "path":
            content = runpy.run_path(_fs_decode(value), run_name="__mp_main__")
        else:
            content = {"__name__": "__mp_main__"}
            exec(compile(value, "<string>", "exec"), content)
    finally:
        _maker = None
    main.__dict__.update(content)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    made_of = [kind, value]


def _runner(spec: dict[str, Any], target: Any) -> Callable[[Any, Any, Any], Any]:
    runtime = spec["runtime"]
    awaited = is_async(target)
    if runtime is None:
        runtime = (spec["caller"] or "asyncio") if awaited else "sync"
    if (runtime != "sync") != awaited:
        what = "is not an async function" if runtime != "sync" else "is an async function"
        raise TypeError(f"runtime={runtime!r} does not fit: the target {what}")
    if runtime == "trio":
        from tractor_host._backends._trio import run
    elif runtime == "asyncio":
        from tractor_host._backends._asyncio import run
    else:
        # Only a main interpreter hears of signals.
        return _run_in_process if _native.is_main_interpreter() else _run_in_thread
    return run


def is_async(target: Any) -> bool:
    """Whether calling it gives a coroutine."""
    while type(target).__module__ == "functools" and hasattr(target, "func"):
        target = target.func
    inner = getattr(target, "__func__", target)
    if not hasattr(inner, "__code__"):
        inner = type(target).__call__
    code = getattr(inner, "__code__", None)
    return bool(getattr(code, "co_flags", 0) & 0x80)  # CO_COROUTINE


def _run_in_process(target: Any, args: Any, kwargs: Any) -> Any:
    # A signal reaches a target that is blocked too: CPython's waits look at those.
    import signal

    thread = _thread.get_ident()

    def canceller() -> bool:
        signal.pthread_kill(thread, _cancel_signal())
        return True

    set_canceller(canceller)
    return target(*args, **kwargs)


def _run_in_thread(target: Any, args: Any, kwargs: Any) -> Any:
    thread = _thread.get_ident()
    set_canceller(lambda: _native.child_raise_cancelled(thread))
    return target(*args, **kwargs)


# -- after the target --------------------------------------------------------------------------------


def _dump(value: object) -> tuple[bytes, int | None]:
    # Most results are one of these; in a fresh process every function that is not called saves pages of it.
    if type(value) in _PLAIN:
        return pickle.dumps(value, 5), None
    try:
        packed = Packed(value)
    except Exception as error:
        raise TypeError(
            f"the result of type {type(value).__qualname__} cannot be pickled: {error}"
        ) from error
    return packed.content("th-result")


#: Types without parts, of which no value is large to speak of.
_PLAIN = (type(None), bool, int, float)


def _exit_code(error: SystemExit) -> int:
    """What CPython makes of it, with the text on stderr."""
    code = error.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(2**63) <= code < 2**63 else 0xFF
    print(code, file=sys.stderr)
    return 1


def _report_raised(error: BaseException, *, boot: bool) -> int:
    from tractor_host import _remote

    message = {
        "type": "raised",
        "summary": _remote.summary(error),
        "boot": boot,
        "refused": refuses_own_gil(error),
    }
    _native.child_send(message, _remote.dump(error), None)
    return 1


def refuses_own_gil(error: BaseException) -> bool:
    """Whether it says that an extension module does not load in an interpreter with a GIL of its own."""
    return isinstance(error, ImportError) and "does not support loading in subinterpreters" in str(error)


def _wind_up(is_process: bool) -> None:
    """What the end of a Python program does, while the supervisor can still end it."""
    threading = sys.modules.get("threading")
    if threading is not None:
        threading._shutdown()
    import atexit

    atexit._run_exitfuncs()
    _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError, ValueError:  # closed by the target, or nobody reads it any more
            continue
