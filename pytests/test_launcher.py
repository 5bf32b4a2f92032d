"""`tractor-host run` is `python3.14`: both are given the same program, side by side.

Each case runs under `python3.14` and under the launcher, in folders that look the same, and the exit
status, stdout, stderr and the files that the program wrote must be equal to the byte. With
`--main subint` too, but for what a subinterpreter cannot have; then the case says why not.
"""

from __future__ import annotations

import importlib.util
import json
import marshal
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

import tractor_host as th

pytestmark = pytest.mark.outside

PYTHON = Path(sys.executable).with_name("python3.14")
LAUNCHER = Path(os.environ.get("TRACTOR_HOST_LAUNCHER") or PYTHON.with_name("tractor-host"))
PLAIN = [str(LAUNCHER), "run"]
SUBINT = [str(LAUNCHER), "run", "--main", "subint"]
MODES = {"plain": PLAIN, "subint": SUBINT}
#: For one process; none takes a tenth of it.
LIMIT = 20.0
#: For programs that import it, wherever it is installed.
PACKAGE_PATH = str(Path(th.__file__).parents[1])

# -- the programs --------------------------------------------------------------------------------------

TELL = """
import sys
print(__name__, globals().get("__file__"), globals().get("__cached__"), __package__)
print(__spec__ and (__spec__.name, __spec__.origin), type(__loader__).__name__)
print(sys.argv, sys.path, sys.orig_argv[1:], sorted(globals()))
"""
SIGNALS_OF_A_CHILD = """
import subprocess, sys
status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
own = open("/proc/self/status").read()
for text in status, own:
    masks = dict(line.split(":") for line in text.splitlines() if line.startswith("Sig"))
    # Without those that the C library keeps for its threads.
    print([int(masks[name], 16) & 0x7fffffff for name in ("SigPnd", "SigBlk", "SigIgn", "SigCgt")])
"""
SPAWN = """
import multiprocessing as mp
import sys

def square(number):
    return number * number, __name__, sys.flags.dev_mode

if __name__ == "__main__":
    context = mp.get_context(sys.argv[1])
    with context.Pool(2) as pool:
        print(pool.map(square, range(4)), mp.parent_process())
"""
DAEMONS = """
import sys, threading, time

def wait():
    try:
        threading.Event().wait()
    finally:
        print("a daemon's finally")

def sleep():
    try:
        time.sleep(1000)
    except BaseException:
        print("a daemon's except")

def spin():
    while True:
        try:
            while True:
                pass
        except BaseException:
            print("a daemon's loop")

for function in wait, sleep, spin:
    threading.Thread(target=function, daemon=True).start()
print("main")
sys.exit(9)
"""
UNTIDY = """
import atexit, sys, threading, weakref

class Thing:
    def __init__(self, name):
        self.name = name
    def __del__(self):
        print("gone:", self.name)

thing = Thing("global")
thing.cycle = Thing("cycle")
thing.cycle.back = thing.cycle
sys.kept = Thing("of sys")
atexit.register(print, "first registered")
atexit.register(lambda: 1 / 0)
atexit.register(lambda: atexit.register(print, "registered late"))
weakref.finalize(thing.cycle, print, "finalized")
threading._register_atexit(print, "before the threads are joined")
file = open("unclosed", "w")
file.write("a buffer's content")
print("main")
"""
LONGER_THREAD = """
import atexit, threading
atexit.register(print, "atexit")
main_is_over = threading.main_thread().join
threading.Thread(target=lambda: (main_is_over(), print("thread", flush=True))).start()
print("main", flush=True)
"""
ENVIRONMENT = """
import gc, os, resource, signal, sys, threading, time
print(threading.current_thread() is threading.main_thread(), threading.get_native_id() == os.getpid())
print(threading.get_ident() == threading.main_thread().ident, threading.active_count())
print(sys.getrecursionlimit(), sys.getswitchinterval(), gc.get_threshold(), gc.isenabled())
print([resource.getrlimit(n) for n in range(16)], oct(os.umask(0o22)))
print(sys.stdin.encoding, sys.stdout.encoding, sys.stderr.errors, sys.getfilesystemencoding())
print(sys.getprofile(), sys.gettrace(), sys.get_asyncgen_hooks(), time.tzname, os.getcwd())
print(len(sys._current_frames()), sys._getframe().f_back)
print(sorted(os.listdir("/proc/self/fd"), key=int), signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
FLAGS = """
import sys
print(sys.flags, sys._xoptions, sys.warnoptions, __debug__, [p for p in sys.path if p != "\\0"])
print(sys.stdout.write_through, sys.stdout.line_buffering, sys.stderr.write_through)
"""
PREFIXES = """
import site, sys, sysconfig, pytest
print(sys.prefix, sys.exec_prefix, sys.base_prefix, sys.executable, sys._base_executable)
print(site.getsitepackages(), pytest.__file__, sysconfig.get_paths(), sys.version, sys.api_version)
"""
ERROR = """
def outer():
    try:
        inner()
    except ZeroDivisionError as error:
        raise ValueError("two lines\\nof text") from error

def inner():
    return 1 / 0

outer()
"""


def byte_code(source: str, name: str) -> bytes:
    """A .pyc, as `py_compile` makes it."""
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(compile(source, name, "exec"))


FILES: dict[str, str | bytes] = {
    "tell.py": TELL,
    "sub/tell.py": TELL,
    "package/__init__.py": "print('imported', __name__)\n",
    "package/__main__.py": TELL,
    "package/module.py": TELL,
    "namespace/module.py": TELL,
    "no_main/__init__.py": "",
    "folder/__main__.py": TELL + "import beside\nprint(beside.__file__)\n",
    "folder/beside.py": "",
    "compiled.pyc": byte_code(TELL, "tell.py"),
    "compiled": byte_code(TELL, "tell.py"),
    "broken.pyc": b"\x00" * 20,
    "error.py": ERROR,
    "uses_error.py": "import error\n",
    "syntax.py": "x = 1\ny = = 2\n",
    "indent.py": "def f():\nreturn 1\n",
    "latin.py": b"# no coding cookie\nname = '\xe9'\n",
    "cookie.py": b"# coding: latin-1\nprint(ascii('\xe9'))\n",
    "nul.py": b"x = 1\0\n",
    "crlf.py": b"print(1)\r\nprint(2)\r\n",
    "bang.py": "#!/bin/false is skipped by -x\nprint('ran', __file__)\n1 / 0\n",
    "bad_first_line.py": "this is no Python\nprint('ran')\n1 / 0\n",
    "spawn.py": SPAWN,
    "recursion.py": "def f():\n    f()\nf()\n",
    "warn.py": "import warnings\nwarnings.warn('old', DeprecationWarning)\nopen('warn.py')\n",
    "debugged.py": "x = 1\nprint('debugged', x)\n",
    "empty.py": "",
}


# -- the table -----------------------------------------------------------------------------------------


@dataclass
class Case:
    """A command line and what is around it."""

    name: str
    args: tuple[str | bytes, ...]
    #: Given as stdin; None is /dev/null.
    stdin: bytes | None = None
    env: dict[str, str] = field(default_factory=dict)
    #: A command that runs the rest of the command line.
    wrap: tuple[str, ...] = ()
    #: Where stdout goes: "pipe", "full" (no space left), "broken" (nobody reads), "stderr".
    stdout: str = "pipe"
    #: Files to compare afterwards.
    written: tuple[str, ...] = ()
    #: What differs from run to run, also under python3.14 alone.
    normalise: Callable[[bytes], bytes] = bytes
    #: Why a subinterpreter can't do the same.
    not_in_subint: str = ""


CASES: list[Case] = []


def case(name: str, *args: str | bytes, **options: Any) -> None:
    CASES.append(Case(name, args, **options))


def code(name: str, source: str, *args: str | bytes, options: tuple[str, ...] = (), **others: Any) -> None:
    """A case that is a program of its own."""
    case(name, *options, "-c", textwrap.dedent(source), *args, **others)


def shell(command: str) -> tuple[str, ...]:
    return ("sh", "-c", command, "sh")


def no_addresses(text: bytes) -> bytes:
    return re.sub(rb"0x[0-9a-f]+", b"0x", text)


def no_thread_names(text: bytes) -> bytes:
    """A thread's name is the process's, which is not Python's."""
    return re.sub(rb"thread 0x[0-9a-f]+ \[.*\]", b"thread", text)


SIGNALS = "CPython handles signals in the main interpreter alone"

# What is run, and what it sees of itself.
case("script", "tell.py", "one", "-two", "--three=3", "")
case("script in a folder", "sub/tell.py")
case("script behind ./", "./tell.py")
case("script after --", "--", "tell.py", "--", "-x")
case("script by absolute path", wrap=shell('exec "$@" "$PWD/tell.py"'))
case("script by symlink", "link.py", wrap=shell('ln -s sub/tell.py link.py && exec "$@"'))
case("folder", "folder", "argument")
case("archive", "archive.zip", "argument")
case("byte code", "compiled.pyc", "argument")
case("byte code without suffix", "compiled")
case("module", "-m", "package.module", "-c", "argument")
case("module of a namespace", "-m", "namespace.module")
case("package", "-m", "package", "argument")
case("module attached to its option", "-mpackage.module")
case("command", "-c", TELL, "-c", "argument")
case("command in a cluster", "-Bsc", TELL)
case(
    "indented command",
    "-c",
    "    if True:\n        print(1)\n \t \n    print('''\n      x\n    ''')\n    1 / 0\n",
)
case("command that is no text", "-c", b"print(ascii('\xff'))")
case("stdin by -", "-", "argument", stdin=TELL.encode())
case("stdin by default", stdin=TELL.encode() + b"print(input(), sys.stdin.read())\nrest\nof it\n")
case("empty stdin")
case("empty script", "empty.py")
case(
    "argument bytes that are no text",
    "-c",
    "import os, sys; print(*map(os.fsencode, sys.argv))",
    b"\xff\xfe",
    "é\n",
)
case("working directory that is gone", "-c", TELL, wrap=shell('mkdir x && cd x && rmdir ../x && exec "$@"'))
case("coding cookie", "cookie.py")
case("line ends of Windows", "crlf.py")
case("environment of the process", "-c", ENVIRONMENT)
case("prefixes and paths", "-c", PREFIXES)
case("python -m site", "-m", "site")
case("json.tool", "-m", "json.tool", stdin=b'{"b": [1, 2]}')
case("pdb", "-m", "pdb", "-c", "b 2", "-c", "c", "-c", "p x", "-c", "c", "-c", "q", "debugged.py")
case(
    "unittest",
    "-m",
    "unittest",
    "-q",
    "package.module",
    normalise=lambda text: re.sub(rb"[\d.]+s", b"s", text),
)
case(
    "modules at the start",
    "-c",
    "import sys; print(sorted(sys.modules), set(sys.builtin_module_names) - {'tractor_host._native'})",
    env={"PYTHONHASHSEED": "1"},
    not_in_subint="`_signal` is imported by the main interpreter alone",
)
case(
    "signal handlers at the start",
    "-c",
    "import signal; print([signal.getsignal(n) for n in sorted(signal.valid_signals())])",
)
case(
    "threads at the start",
    "-c",
    "import os; print(len(os.listdir('/proc/self/task')))",
    # The guard's thread has nothing to do with the program.
    env={"TRACTOR_HOST_CTRL_C": "off", "TRACTOR_HOST_WATCHDOG": "off"},
    not_in_subint="one more, which waits for Ctrl-C",
)

# Python's options and variables.
for number, options in enumerate(
    [
        ("-I",),
        ("-E",),
        ("-s", "-B", "-q"),
        ("-S",),
        ("-P",),
        ("-O",),
        ("-OO",),
        ("-u",),
        ("-bb",),
        ("-W", "error", "-Wignore::DeprecationWarning"),
        ("-X", "dev"),
        ("-Xutf8=0", "-X", "int_max_str_digits=1000", "-X", "own=value"),
        ("-X", "faulthandler", "-X", "tracemalloc=3", "-X", "no_debug_ranges"),
        ("--check-hash-based-pycs", "always"),
        ("-Ic",),
    ]
):
    arguments = (*options, FLAGS) if options[-1].endswith("c") else (*options, "-c", FLAGS)
    case(
        f"options {number}: {' '.join(options)}", *arguments, env={"PYTHONPATH": "here", "PYTHONOPTIMIZE": ""}
    )
for variable, value in {
    "PYTHONPATH": "here:/nowhere",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "error::UserWarning,ignore",
    "PYTHONOPTIMIZE": "2",
    "PYTHONUTF8": "1",
    "PYTHONIOENCODING": "latin-1:backslashreplace",
    "PYTHONSAFEPATH": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHONDEVMODE": "1",
    "PYTHONINTMAXSTRDIGITS": "700",
    "PYTHONPLATLIBDIR": "lib",
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "warn",
    "PYTHONFAULTHANDLER": "1",
}.items():
    case(f"variable {variable}", "-c", FLAGS + "print(ascii(sys.stdout), sys.stdout)", env={variable: value})
case("variable PYTHONHASHSEED", "-c", "print(hash('text'), {'a', 'b', 'c'})", env={"PYTHONHASHSEED": "7"})
case(
    "variable PYTHONDONTWRITEBYTECODE",
    "-c",
    "import folder.beside, os; print(os.listdir('folder'))",
    env={"PYTHONDONTWRITEBYTECODE": "1"},
    normalise=lambda text: bytes(sorted(text)),
)
case("byte code is written", "-c", "import folder.beside, os; print(os.listdir('folder/__pycache__'))")
case(
    "variable PYTHONHOME that is wrong",
    "-c",
    "pass",
    env={"PYTHONHOME": "/nowhere"},
    normalise=no_thread_names,
)
case("version", "-V")
case("version and more", "-VV")
case("unknown option", "-Z")
case("unknown long option", "--unknown")
case("option without its value", "-X")
case("module option without its value", "-m")
case("-x", "-x", "bad_first_line.py")
case("-x and a shebang", "-x", "bang.py")
case("-i", "-i", "-c", "x = 1", stdin=b"print(x + 1)\n", not_in_subint="it has no prompt")
case("warning under -W error", "-W", "error", "warn.py")
case("warnings under -X dev", "-X", "dev", "warn.py", normalise=no_addresses)

# Ways to end.
for value in ["0", "3", "None", "256", "-1", "True", "10**30", "'text'", "''", "[1, 'list']", "3.5", "1, 2"]:
    code(f"exit: {value}", f"import sys; sys.exit({value})")
case("exit from a script", "-", stdin=b"import sys\nprint('x')\nsys.exit(4)\n")
case("exit from a module", "-m", "timeit", "-n", "x")
code(
    "exit with an object that cannot be shown",
    """
    class Bad:
        def __str__(self):
            return 1 / 0
    raise SystemExit(Bad())
    """,
)
code("exit without a code", "error = SystemExit(3)\ndel error.code\nraise error")
code("exit without stderr", "import sys\nsys.stderr = None\nsys.exit('text')")
code(
    "exit in a thread",
    """
    import sys, threading
    threading.Thread(target=sys.exit, args=[5]).start()
    """,
)
code("exit at once", "import os\nprint('lost')\nos._exit(4)")
code("exit in a group", "raise BaseExceptionGroup('group', [SystemExit(3), ValueError(1)])")
code("exec of another program", "import os; os.execvp('echo', ['echo', 'other'])")
case("exception", "error.py")
case("exception in a command", "-c", ERROR)
case("exception in stdin", stdin=ERROR.encode())
case("exception in a module", "-m", "error")
case("exception in an imported module", "uses_error.py")
case(
    "exception with notes, in a group",
    "-c",
    "e = ValueError('x')\ne.add_note('a note')\nraise ExceptionGroup('group', [e, OSError(2, 'no')])",
)
case("recursion", "recursion.py")
case("syntax error", "syntax.py")
case("syntax error in a command", "-c", "x = = 1")
case("syntax error in a module", "-m", "syntax")
case("syntax error in stdin", stdin=b"x = = 1\n")
case("wrong indentation", "indent.py")
case("source that is no text", "latin.py")
case("NUL in the source", "nul.py")
case("byte code that is none", "broken.pyc")
case("missing script", "missing.py", "argument")
case("script that cannot be read", "secret.py", wrap=shell('ln -s /proc/1/mem secret.py && exec "$@"'))
case("missing module", "-m", "missing.module")
case("package without __main__", "-m", "no_main")
case("folder without __main__", "sub")
case("KeyboardInterrupt that nobody sent", "-c", "raise KeyboardInterrupt('text')")
case("keyboard interrupt within a script", "-", stdin=b"raise KeyboardInterrupt\n")
code("own excepthook", "import sys\nsys.excepthook = lambda *args: print(args[0], args[1])\n1 / 0")
code("excepthook that exits", "import sys\nsys.excepthook = lambda *args: sys.exit(7)\n1 / 0")
code("excepthook that fails", "import sys\nsys.excepthook = lambda: None\n1 / 0")
code("no excepthook", "import sys\ndel sys.excepthook\n1 / 0")
code(
    "last exception at exit",
    """
    import atexit, sys
    atexit.register(lambda: print(repr(sys.last_exc), sys.last_type, sys.last_value))
    1 / 0
    """,
)
code("no main module any more", "import sys\ndel sys.modules['__main__']\n1 / 0")
code("killed by SIGTERM", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
code(
    "killed by SIGINT without a handler",
    """
    import os, signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    """,
    not_in_subint=SIGNALS,
)
code(
    "own signal handler",
    """
    import os, signal
    signal.signal(signal.SIGUSR1, lambda number, frame: print("handled", number, frame.f_code.co_name))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.alarm(0)
    """,
    not_in_subint=SIGNALS,
)

# The end of a program.
case("atexit, finalizers, unclosed files", "-c", UNTIDY, written=("unclosed",), normalise=no_addresses)
case("the same in a script", "-", stdin=UNTIDY.encode(), written=("unclosed",), normalise=no_addresses)
case("thread that outlives the main one", "-c", LONGER_THREAD)
case("daemon threads", "-c", DAEMONS)
code(
    "exception in a thread",
    """
    import threading
    threading.Thread(target=lambda: 1 / 0, name="named").start()
    """,
)
code(
    "executor at exit",
    """
    import concurrent.futures as futures, time
    pool = futures.ThreadPoolExecutor(2)
    pool.submit(lambda: (time.sleep(0.05), print("done")))
    """,
)
code("output that nobody flushes", "import sys\nsys.stdout.write('text')\nsys.stderr.write('more')")
code(
    "stdout replaced",
    "import io, sys\nsys.stdout = io.StringIO()\nprint('lost')\nsys.__stdout__.write('seen')",
)
code("stdout closed by the program", "import sys\nsys.stdout.close()\nsys.exit(3)")
code("descriptor closed by the program", "import os\nprint('lost')\nos.close(1)")
code(
    "asyncio",
    """
    import asyncio
    async def main():
        print(await asyncio.gather(asyncio.sleep(0, 1), asyncio.to_thread(abs, -2)))
    asyncio.run(main())
    """,
)
code(
    "trio",
    """
    import trio
    async def main():
        print(await trio.to_thread.run_sync(abs, -2))
    trio.run(main)
    """,
)

# Standard streams.
REPORT = """
import sys
print(sys.stdin, sys.stdout, sys.stderr, file=open("report", "w"))
print("x")
sys.exit("y")
"""
for streams in ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"]:
    case(f"closed: {streams}", "-c", REPORT, wrap=shell(f'exec "$@" {streams}'), written=("report",))
case("closed stdin as the program", wrap=shell('exec "$@" <&-'))
case("closed streams and an error", "error.py", wrap=shell('exec "$@" 2>&-'))
case("stdin is a folder", "-c", "pass", wrap=shell('exec "$@" <.'), normalise=no_thread_names)
case("stdout without space", "-c", "print('x')", stdout="full")
case("stdout without space, and an exit code", "-c", "print('x')\nraise SystemExit(3)", stdout="full")
case("stdout that nobody reads", "-c", "print('x')", stdout="broken")
case("much to stdout that nobody reads", "-c", "print('x' * 100_000)", stdout="broken")
case(
    "stdout and stderr in order",
    "-c",
    "print('out')\nimport sys\nprint('err', file=sys.stderr)\n1 / 0",
    stdout="stderr",
)
case("script's stdout and stderr in order", "-", stdin=b"print('out')\n1 / 0\n", stdout="stderr")
case("input", "-c", "print(input('prompt: '), ascii(input()))", stdin=b"one\n\xff")
case("end of input", "-c", "input()")

# Other processes.
case("signals of a child", "-c", SIGNALS_OF_A_CHILD)
case("multiprocessing, spawn", "spawn.py", "spawn")
case("multiprocessing, forkserver, options passed on", "-X", "dev", "spawn.py", "forkserver")
case("multiprocessing, fork", "spawn.py", "fork", not_in_subint="CPython forks in the main interpreter alone")
code(
    "os.fork",
    """
    import os, sys, threading
    pid = os.fork()
    if not pid:
        print("child", threading.current_thread(), threading.active_count())
        sys.exit(3)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """,
    normalise=lambda text: re.sub(rb"started \d+", b"started", text),
    not_in_subint="CPython forks in the main interpreter alone",
)
code(
    "own executable again",
    """
    import subprocess, sys
    options = subprocess._args_from_interpreter_flags()
    command = [sys.executable, *options, "-c", "import sys; print(sys.flags)"]
    print(subprocess.run(command, capture_output=True).stdout)
    """,
    options=("-X", "dev", "-O", "-W", "error"),
)

assert len({case.name for case in CASES}) == len(CASES)


# -- running them --------------------------------------------------------------------------------------


def base_env() -> dict[str, str]:
    ours = ("PYTHON", "TRACTOR_HOST", "LC_", "LANG")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)} | {"LANG": "C.UTF-8"}


def lay_out(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        for name in ("__main__.py", "beside.py"):
            archive.write(folder / "folder" / name, name)


@contextmanager
def sink(kind: str) -> Iterator[int | IO[bytes]]:
    if kind == "full":
        with open("/dev/full", "wb", buffering=0) as file:
            yield file
    elif kind == "broken":
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "wb", buffering=0) as file:
            yield file
    else:
        yield subprocess.PIPE


def run(command: list[str], case: Case, folder: Path) -> dict[str, Any]:
    """Runs a case; everything that can be compared."""
    lay_out(folder)
    with sink(case.stdout) as stdout:
        result = subprocess.run(
            [*case.wrap, *command, *case.args],
            cwd=folder,
            env=base_env() | case.env,
            stdout=stdout,
            stderr=subprocess.STDOUT if case.stdout == "stderr" else subprocess.PIPE,
            timeout=LIMIT,
            **({"stdin": subprocess.DEVNULL} if case.stdin is None else {"input": case.stdin}),
        )
    return {
        "exit status": result.returncode,
        "stdout": case.normalise(result.stdout or b""),
        "stderr": case.normalise(result.stderr or b""),
        "written": {name: (folder / name).read_bytes() for name in case.written},
    }


#: What python3.14 made of the cases so far, by name.
EXPECTED: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all, because its path shows in what programs print."""
    return tmp_path_factory.mktemp("launcher") / "folder"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_as_python(case: Case, mode: str, folder: Path) -> None:
    if mode == "subint" and case.not_in_subint:
        pytest.skip(case.not_in_subint)
    if case.name not in EXPECTED:
        EXPECTED[case.name] = run([str(PYTHON)], case, folder)
    assert run(MODES[mode], case, folder) == EXPECTED[case.name]


# -- signals -------------------------------------------------------------------------------------------


class Started:
    """A program that has said `ready`."""

    def __init__(self, command: list[str], source: str, folder: Path, **options: Any) -> None:
        options.setdefault("stdin", subprocess.DEVNULL)
        self.process = subprocess.Popen(
            [*command, "-c", textwrap.dedent(source)],
            cwd=folder,
            env=base_env() | {"PYTHONPATH": PACKAGE_PATH},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,  # `communicate` does not see what `readline` has read ahead
            **options,
        )
        try:
            self.expect("ready")
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:
            pass

    def expect(self, line: str) -> None:
        assert self.process.stdout is not None
        found = self.process.stdout.readline()
        assert found == f"{line}\n".encode(), (found, self.process.poll())

    def blocked(self) -> Started:
        """Waits until its main thread is in a system call that lasts."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/syscall")
        deadline, before = time.monotonic() + LIMIT, "running"
        while (now := path.read_text()) != before or now.startswith("running"):
            assert time.monotonic() < deadline, now
            before = now
            time.sleep(0.02)
        return self

    def busy(self) -> Started:
        """Waits until it has worked for a while, on what it does last."""
        path = Path(f"/proc/{self.process.pid}/stat")
        deadline, before = time.monotonic() + LIMIT, None
        while before is None or self._ticks(path) < before + 5:
            before = before or self._ticks(path)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self

    def _ticks(self, path: Path) -> int:
        user, system = path.read_text().rpartition(")")[2].split()[11:13]
        return int(user) + int(system)

    def send(self, number: int) -> float:
        self.process.send_signal(number)
        return time.monotonic()

    def ended(self) -> tuple[int, bytes, bytes]:
        try:
            out, err = self.process.communicate(timeout=LIMIT)
        finally:
            self.end()
        return self.process.returncode, out, err


@dataclass
class Interruptible:
    source: str
    #: The exit status in a subinterpreter, where it can be another one.
    in_subint: int = -signal.SIGINT
    #: Whether it is blocked when it is interrupted, so that one knows in which line.
    blocks: bool = True


#: What a shell makes of a death by SIGINT.
FORCED = 128 + signal.SIGINT
INTERRUPTIBLE = {
    "sleep": Interruptible("import time; print('ready', flush=True); time.sleep(1000)"),
    "select": Interruptible("import select; print('ready', flush=True); select.poll().poll()"),
    "read": Interruptible(
        "import os; print('ready', flush=True); os.read(os.pipe()[0], 1)",
        # CPython goes on reading after a signal, where no handler can raise.
        in_subint=FORCED,
    ),
    "worker": Interruptible(
        """
        import tractor_host as th
        worker = th.spawn("time:sleep", 1000, backend="fork")
        print("ready", flush=True)
        worker.wait()
        """
    ),
    "lock": Interruptible("import threading; print('ready', flush=True); threading.Event().wait()"),
    "lock with a timeout": Interruptible(
        "import threading; print('ready', flush=True); threading.Event().wait(1000)"
    ),
    "queue": Interruptible("import queue; print('ready', flush=True); queue.SimpleQueue().get()"),
    "loop": Interruptible("print('ready', flush=True)\nwhile True: pass", blocks=False),
    "caught": Interruptible(
        """
        try:
            print("ready", flush=True)
            while True: pass
        except KeyboardInterrupt as error:
            print(type(error), error.args)
            raise SystemExit(5)
        """,
        in_subint=5,
        blocks=False,
    ),
    "cleaned up": Interruptible(
        """
        import atexit
        atexit.register(print, "at exit")
        try:
            print("ready", flush=True)
            while True: pass
        finally:
            print("finally")
        """,
        blocks=False,
    ),
    "asyncio": Interruptible(
        """
        import asyncio
        async def main():
            print("ready", flush=True)
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                print("cancelled")
                raise
        asyncio.run(main())
        """
    ),
    "bare event loop": Interruptible(
        """
        import asyncio
        loop = asyncio.new_event_loop()
        loop.call_soon(lambda: print("ready", flush=True))
        try:
            loop.run_forever()
        finally:
            print(loop.is_running())
            loop.close()
        """
    ),
    "trio": Interruptible(
        """
        import trio
        async def main():
            print("ready", flush=True)
            try:
                await trio.sleep_forever()
            finally:
                print("finally")
        trio.run(main)
        """
    ),
}


def interrupted(command: list[str], program: Interruptible, folder: Path) -> tuple[int, bytes, bytes]:
    with Started(command, program.source, folder) as started:
        if program.blocks:
            started.blocked()
        started.send(signal.SIGINT)
        return started.ended()


def last_line(text: bytes) -> bytes:
    return text.splitlines()[-1] if text else b""


@pytest.mark.parametrize("name", INTERRUPTIBLE)
def test_interrupt_is_pythons(name: str, tmp_path: Path) -> None:
    program = INTERRUPTIBLE[name]
    expected = interrupted([str(PYTHON)], program, tmp_path)
    found = interrupted(PLAIN, program, tmp_path)
    assert found[:2] == expected[:2], (found, expected)
    if program.blocks:
        assert found[2] == expected[2]
    assert last_line(found[2]) == last_line(expected[2])


@pytest.mark.parametrize("name", INTERRUPTIBLE)
def test_interrupt_in_a_subinterpreter(name: str, tmp_path: Path) -> None:
    program = INTERRUPTIBLE[name]
    _, stdout, stderr = interrupted([str(PYTHON)], program, tmp_path)
    found = interrupted(SUBINT, program, tmp_path)
    assert found[:2] == (program.in_subint, stdout), found
    if program.in_subint != FORCED:
        assert last_line(found[2]) == last_line(stderr)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
def test_other_signals_kill(mode: str, number: signal.Signals, tmp_path: Path) -> None:
    with Started(MODES[mode], INTERRUPTIBLE["sleep"].source, tmp_path) as started:
        started.send(number)
        assert started.ended() == (-number, b"", b"")


@pytest.mark.parametrize("mode", MODES)
def test_ignored_interrupt_stays_ignored(mode: str, tmp_path: Path) -> None:
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *MODES[mode]]
    source = "print('ready', flush=True); print(input())"
    with Started(ignoring, source, tmp_path, stdin=subprocess.PIPE) as started:
        started.blocked().send(signal.SIGINT)
        assert started.process.stdin is not None
        started.process.stdin.write(b"went on\n")
        started.process.stdin.flush()
        assert started.ended() == (0, b"went on\n", b"")


SWALLOWS = """
print("ready", flush=True)
while True:
    try:
        while True:
            pass
    except BaseException as error:
        print(repr(error), flush=True)
"""


def test_second_interrupt_ends_a_program_that_swallows_the_first(tmp_path: Path) -> None:
    with Started(SUBINT, SWALLOWS, tmp_path) as started:
        started.send(signal.SIGINT)
        started.expect("KeyboardInterrupt()")
        sent = started.send(signal.SIGINT)
        assert started.ended()[0] == FORCED
        assert time.monotonic() - sent < 3


ENDLESS_THREAD = """
import threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
print("ready", flush=True)
"""


@pytest.mark.parametrize(
    ("source", "bound", "there"),
    [
        (SWALLOWS, 5, Started.busy),
        ("print('ready', flush=True); sum(range(10**12))", 1, Started.busy),
        ("import os; print('ready', flush=True); os.read(os.pipe()[0], 1)", 1, Started.blocked),
        (
            "import atexit, os; atexit.register(os.read, os.pipe()[0], 1); print('ready', flush=True)",
            1,
            Started.blocked,
        ),
        (ENDLESS_THREAD, 1, Started.blocked),
    ],
    ids=["swallowed", "C code that holds the GIL", "blocked", "blocked at exit", "thread that is blocked"],
)
def test_one_interrupt_ends_a_subinterpreter_in_bounded_time(
    source: str, bound: float, there: Callable[[Started], Started], tmp_path: Path
) -> None:
    with Started(SUBINT, source, tmp_path) as started:
        sent = there(started).send(signal.SIGINT)
        assert started.ended()[0] == FORCED
        assert time.monotonic() - sent < bound + 3


def test_forced_end_flushes_what_it_can(tmp_path: Path) -> None:
    source = "import os, sys; print('ready', flush=True); sys.stdout.write('tail'); os.read(os.pipe()[0], 1)"
    with Started(SUBINT, source, tmp_path) as started:
        started.blocked().send(signal.SIGINT)
        assert started.ended() == (FORCED, b"tail", b"")


def test_thread_in_endless_c_code_does_not_hold_up_the_end(tmp_path: Path) -> None:
    source = """
    import hashlib, sys, threading
    endless = threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"x" * 200, b"", 2**31 - 1))
    endless.daemon = True
    endless.start()
    print("ready", flush=True)
    sys.stdout.write("tail")
    sys.exit(9)
    """
    for command in (PLAIN, SUBINT):
        with Started(command, source, tmp_path) as started:
            begun = time.monotonic()
            assert started.ended() == (9, b"tail", b"")
            assert time.monotonic() - begun < 1 + 3


# -- what is the launcher's own ------------------------------------------------------------------------


def launch(*words: str | bytes | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    options.setdefault("stdin", subprocess.DEVNULL)
    command: list[Any] = [options.pop("launcher", LAUNCHER), *words]
    env = base_env() | options.pop("env", {})
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT, **options)


def test_version_and_help() -> None:
    assert launch("--version").stdout == f"tractor-host {th.__version__}\n"
    for words in (["--help"], ["-h"], ["help"], ["doctor", "--help"]):
        found = launch(*words)
        assert (found.returncode, found.stderr) == (0, "")
        assert "usage: tractor-host run" in found.stdout
    for words in (["help", "run"], ["run", "--help"], ["help", "pytest"]):
        assert "--main subint" in launch(*words).stdout


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "no command was given"),
        (["nonsense"], "there is no command `nonsense`"),
        (["--nonsense"], "--nonsense"),
        (["help", "nonsense"], "there is no command `nonsense`"),
        (["doctor", "nonsense"], "nonsense"),
        (["run", "--main", "nonsense", "x.py"], "--main takes `plain` or `subint`, not `nonsense`"),
        (["run", "--main"], "--main"),
        (["run", "--backend"], "--backend"),
        (["run", "--main", "subint", "-i", "-c", "1"], "no prompt"),
    ],
)
def test_command_line_that_makes_no_sense(words: list[str], complaint: str) -> None:
    found = launch(*words)
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith("tractor-host: ")
    assert complaint in found.stderr


@pytest.mark.parametrize("mode", MODES)
def test_backend_is_told_to_the_program(mode: str) -> None:
    show = "import os, sys; print(os.environ.get('TRACTOR_HOST_BACKEND'), sys.argv, sys.flags.dev_mode)"
    own = ["--main", mode]
    for words in ([*own, "--backend=fork", "-X", "dev"], ["-X", "dev", "--backend", "fork", *own]):
        found = launch("run", *words, "-c", show, "--backend", "x")
        assert found.stdout == "fork ['-c', '--backend', 'x'] True\n"
    assert launch("run", *own, "-c", show).stdout == "None ['-c'] False\n"


@pytest.mark.parametrize("mode", MODES)
def test_native_module_is_built_in_for_every_interpreter(mode: str) -> None:
    source = """
    import _interpreters
    look = "import tractor_host._native as n; print(n.__spec__.origin, n.__loader__.__name__, flush=True)"
    exec(look)
    for config in "legacy", "isolated":
        made = _interpreters.create(config)
        assert _interpreters.exec(made, look) is None
        _interpreters.destroy(made)
    """
    found = launch("run", "--main", mode, "-c", source, env={"PYTHONPATH": PACKAGE_PATH})
    assert (found.returncode, found.stdout) == (0, "built-in BuiltinImporter\n" * 3), found.stderr


def test_main_interpreter_stays_as_it_was_started(tmp_path: Path) -> None:
    look = (
        "import sys; main = set(sys.modules['__main__'].__dict__) - {'sys'}; "
        "print(sorted(main), {'decimal', 'json', 'threading'} & set(sys.modules), flush=True)"
    )
    program = tmp_path / "program.py"
    program.write_text(
        "import _interpreters, decimal, json, threading\n"
        "name = 'of the program'\n"
        "assert _interpreters.get_current()[0] != 0\n"
        f"assert _interpreters.exec(0, {look!r}) is None\n"
    )
    found = launch("run", "--main", "subint", program)
    names = ["__builtins__", "__doc__", "__loader__", "__name__", "__package__", "__spec__"]
    assert (found.returncode, found.stdout) == (0, f"{names} set()\n"), found.stderr


@pytest.mark.parametrize("backend", ["subint", "forkserver", "fork", "exec"])
@pytest.mark.parametrize("mode", MODES)
def test_workers_of_a_program_end_with_it(mode: str, backend: str) -> None:
    source = f"""
    import tractor_host as th
    print(th.spawn("math:factorial", 5, backend={backend!r}).result(timeout=10))
    left = th.spawn("time:sleep", 1000, backend={backend!r})
    """
    found = launch("run", "--main", mode, "-c", source, env={"PYTHONPATH": PACKAGE_PATH})
    assert (found.returncode, found.stdout, found.stderr) == (0, "120\n", "")


@pytest.mark.parametrize("mode", MODES)
def test_a_program_waits_for_the_clean_up_of_its_workers(mode: str, tmp_path: Path) -> None:
    source = f"""
    import os, tractor_host as th
    sign = {str(tmp_path / "sign")!r}
    slow = (
        "import time\\n"
        "try:\\n"
        "    print('there', flush=True)\\n"
        "    open(args[0], 'w').close()\\n"
        "    time.sleep(1000)\\n"
        "finally:\\n"
        "    time.sleep(0.5)\\n"  # longer than the main thread waits in one go
        "    print('cleaned up', flush=True)\\n"
    )
    left = th.spawn(th.Source(slow), sign, backend="exec", stdio="/dev/stdout")
    while not os.path.exists(sign):
        pass
    """
    found = launch("run", "--main", mode, "-c", source, env={"PYTHONPATH": PACKAGE_PATH})
    assert (found.returncode, found.stdout, found.stderr) == (0, "there\ncleaned up\n", "")


SHOW_PREFIX = "import sys; print(sys.executable, sys.prefix)"


def test_python_is_the_one_beside_the_launcher(tmp_path: Path) -> None:
    """However the launcher is called."""
    expected = f"{PYTHON} {sys.prefix}\n"
    link = tmp_path / "link"
    link.symlink_to(LAUNCHER)
    gone = tmp_path / "gone"
    gone.mkdir()
    path = os.environ["PATH"]
    calls: dict[str, list[str]] = {
        "path": [str(LAUNCHER)],
        "link": [str(link)],
        "PATH": ["env", f"PATH={LAUNCHER.parent}:{path}", LAUNCHER.name],
        "link on PATH": ["env", f"PATH={tmp_path}:{path}", "link"],
        "no current directory": ["sh", "-c", f'cd {gone} && rmdir {gone} && "$@"', "sh", str(LAUNCHER)],
    }
    for name, (first, *words) in calls.items():
        assert launch(*words, "run", "-c", SHOW_PREFIX, launcher=first).stdout == expected, name
    for nonsense in ("nonsense", "/bin/nonsense"):
        found = launch("run", "-c", SHOW_PREFIX, launcher=nonsense, executable=LAUNCHER)
        assert found.stdout == expected, nonsense


@pytest.mark.parametrize(
    ("name", "version", "is_taken"),
    [
        ("python3.14", "", True),
        ("python", "version = 3.14.0", True),
        ("python", "version_info = 3.14.0.final.0", True),
        ("python", "version = 3.13.9", False),
        ("python3.13", "version = 3.14.0", False),
    ],
)
def test_virtual_environment_is_the_launchers(
    name: str, version: str, is_taken: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    launcher = shutil.copy(LAUNCHER, folder)
    base = Path(sys.base_prefix, "bin", "python3.14")
    (folder / name).symlink_to(base)
    (folder.parent / "pyvenv.cfg").write_text(f"home = {base.parent}\n{version}\n")
    found = launch("run", "-c", SHOW_PREFIX, launcher=launcher)
    assert found.returncode == 0, found.stderr
    assert (found.stdout == f"{folder / name} {folder.parent}\n") == is_taken, found.stdout


@pytest.mark.parametrize(("content", "status"), [("assert True", 0), ("assert 1 == 2", 1)])
def test_pytest_command(content: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(f"def test_it(): {content}\n")
    found = launch("pytest", "-q", "-p", "no:cacheprovider", tmp_path, cwd=tmp_path)
    assert found.returncode == status, found.stdout + found.stderr
    assert ("1 passed" in found.stdout) == (status == 0)


def test_child_starts_with_its_options_and_leaves_the_channel_alone(tmp_path: Path) -> None:
    package = tmp_path / "folder with a space" / "tractor_host"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "_child.py").write_text(
        "import json, os, stat, sys\n"
        "def exec_main():\n"
        "    socket = stat.S_ISSOCK(os.fstat(0).st_mode)\n"
        "    told = [sys.flags, sys.warnoptions, sys.path[0], sys.argv, socket, os.read(0, 100).decode()]\n"
        "    print(json.dumps(told))\n"
    )
    # The current directory must not shadow what the child imports.
    (tmp_path / "json.py").write_text("1 / 0")
    options = ["-X", "dev", "-W", "error", "-O", "-B"]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(b"message")
        found = launch("--child", package.parent, *options, stdin=theirs, cwd=tmp_path)
    assert found.stderr == ""
    flags, warnings, path, argv, is_socket, message = json.loads(found.stdout)
    show = "import json, sys; print(json.dumps([sys.flags, sys.warnoptions]))"
    python = subprocess.run(
        [PYTHON, *options, "-c", show], env=base_env(), capture_output=True, timeout=LIMIT
    )
    assert [flags, warnings] == json.loads(python.stdout)
    assert (path, argv, is_socket, message) == (str(package.parent), ["-c"], True, "message")


def test_doctor_says_what_is_missing(tmp_path: Path) -> None:
    found = launch("doctor", env={"PYTHONPATH": PACKAGE_PATH})
    assert found.stderr == ""
    assert found.returncode in (0, 1)
    assert ("everything is there" in found.stdout) == (found.returncode == 0)
    assert f"{th.__version__}\n" in found.stdout
    assert str(PYTHON) in found.stdout
    # A package of another version, as after half an upgrade.
    (tmp_path / "tractor_host.py").write_text("__version__ = '0.0.1'\n")
    found = launch("doctor", env={"PYTHONPATH": str(tmp_path)})
    assert found.returncode == 2
    assert "missing: tractor_host" in found.stdout
    assert "is version 0.0.1, not" in found.stdout
