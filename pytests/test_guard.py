"""Ctrl-C whatever state Python is in, and the watch over the GILs: from outside, as a user meets them."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import helpers
import tractor_host as th
from conftest import Program, kill_session
from helpers import PATIENCE

pytestmark = pytest.mark.outside

LAUNCHERS = ("python", "tractor-host")
#: What a shell makes of a death by SIGINT.
FORCED = 128 + signal.SIGINT
#: Beside the stated bound of 5 s: for the machine.
SLACK = 5.0
#: In a plain Python it is one call.
GUARDED = "import tractor_host as th; th.guard_ctrl_c()\n"


class Guarded:
    """A guarded program that has said `ready`, on a terminal of its own or not."""

    def __init__(self, program: Program, *, terminal: bool = False, **options: Any) -> None:
        self.errors = program.path.with_suffix(".stderr")
        command = program.command
        self.terminal: int | None = None
        self.said = b""
        inner = None
        if terminal:
            self.terminal, inner = os.openpty()
            command = ["setsid", "--ctty", "--wait", *command]
        options.setdefault("stdin", inner if terminal else subprocess.DEVNULL)
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, start_new_session=not terminal, **options
            )
        if inner is not None:
            os.close(inner)
        self.until("ready")

    def __enter__(self) -> Guarded:
        return self

    def __exit__(self, *exception: object) -> None:
        kill_session(self.process.pid)
        for child in helpers.descendants(self.process.pid):
            kill_session(child)
        with self.process:
            self.process.kill()
        if self.terminal is not None:
            os.close(self.terminal)

    def until(self, line: str, count: int = 1) -> None:
        """Waits until it has written a line so many times."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while self.said.splitlines().count(line.encode()) < count:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self.process.stdout], [], [], left)[0]
            assert ready, (self.said, self.stderr)
            chunk = os.read(self.process.stdout.fileno(), 4096)
            assert chunk, (self.said, self.stderr)
            self.said += chunk

    @property
    def stderr(self) -> str:
        return self.errors.read_text()

    @property
    def pid(self) -> int:
        """The program's own: `setsid` may have forked it."""
        children = helpers.descendants(self.process.pid) if self.terminal is not None else []
        return children[0] if children else self.process.pid

    def press(self) -> float:
        if self.terminal is None:
            self.process.send_signal(signal.SIGINT)
        else:
            os.write(self.terminal, b"\x03")
        return time.monotonic()

    def settled(self) -> Guarded:
        """Waits until its main thread stays in one system call, or has worked for a while."""
        folder = Path(f"/proc/{self.pid}/task/{self.pid}")

        def ticks() -> int:
            user, system = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
            return int(user) + int(system)

        begun, calls = ticks(), [""]

        def is_settled() -> bool:
            calls.append((folder / "syscall").read_text())
            blocked = len(set(calls[-10:])) == 1 and len(calls) > 10 and "running" not in calls[-1]
            return blocked or ticks() >= begun + 20

        helpers.until(is_settled, "the program's last act")
        return self

    def ended(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.fixture(params=LAUNCHERS)
def guarded(request: pytest.FixtureRequest, program: Callable[..., Program]) -> Callable[..., Guarded]:
    def make(source: str, **options: Any) -> Guarded:
        head = GUARDED if request.param == "python" else ""
        return Guarded(program(head + source, launcher=request.param), **options)

    return make


STUCK = {
    "C code that holds the GIL": "print('ready', flush=True); sum(range(10**12))",
    "C code without the GIL": """
import hashlib
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"x", b"", 2**31 - 1)
""",
    "trio in C code": """
import trio
async def main():
    print("ready", flush=True)
    sum(range(10**12))
trio.run(main)
""",
    "asyncio in C code": """
import asyncio
async def main():
    await asyncio.sleep(0)
    print("ready", flush=True)
    sum(range(10**12))
asyncio.run(main())
""",
    "C code at exit": """
import atexit
atexit.register(lambda: (print("ready", flush=True), sum(range(10**12))))
""",
    "a worker that holds the shared GIL": """
import tractor_host as th, time
th.spawn(th.Source("print('ready', flush=True); sum(range(10**12))"), backend="subint")
time.sleep(1000)
""",
}


@pytest.mark.parametrize("name", STUCK)
def test_one_ctrl_c_ends_a_program_that_can_not_heed_it(name: str, guarded: Callable[..., Guarded]) -> None:
    with guarded(STUCK[name]) as running:
        pressed = running.settled().press()
        assert running.ended() == FORCED
        assert time.monotonic() - pressed < 5 + SLACK
        assert "Ctrl-C is not heeded" in running.stderr
        assert "leaving with exit code 130" in running.stderr


HEEDING = {
    "sleep": "import time\nprint('ready', flush=True); time.sleep(1000)",
    "a lock": "import threading\nlock = threading.Lock(); lock.acquire()\nprint('ready', flush=True); lock.acquire()",
    "a join": """
import threading, time
thread = threading.Thread(target=time.sleep, args=(1000,), daemon=True)
thread.start()
print("ready", flush=True)
thread.join()
""",
    "C code that starts its call again": """
import ctypes
wait = ctypes.CDLL(None).sem_wait
semaphore = ctypes.create_string_buffer(64)
print("ready", flush=True)
while True:
    wait(semaphore)
""",
    "25 busy subinterpreters": """
import tractor_host as th, time
for _ in range(25):
    th.spawn(th.Source("while True: pass"), backend="subint")
print("ready", flush=True)
time.sleep(1000)
""",
    "a full wake-up pipe": """
import signal, socket, time
ours, theirs = socket.socketpair()
ours.setblocking(False)
while True:
    try:
        ours.send(bytes(4096))
    except BlockingIOError:
        break
signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
print("ready", flush=True)
time.sleep(1000)
""",
    "a spawn": """
import tractor_host as th
print("ready", flush=True)
while True:
    with th.spawn("time:sleep", 1000, backend="exec"):
        pass
""",
    "a wait for a worker": """
import tractor_host as th
worker = th.spawn("time:sleep", 1000)
print("ready", flush=True)
worker.wait()
""",
    "trio": """
import trio
async def main():
    print("ready", flush=True)
    await trio.sleep_forever()
trio.run(main)
""",
    "asyncio": """
import asyncio
async def main():
    print("ready", flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
""",
    "another thread hears it": """
import signal, threading, time
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print("ready", flush=True)
time.sleep(1000)
""",
}


@pytest.mark.parametrize("terminal", [False, True], ids=["kill", "key"])
@pytest.mark.parametrize("name", HEEDING)
def test_the_first_ctrl_c_is_pythons(name: str, terminal: bool, guarded: Callable[..., Guarded]) -> None:
    with guarded(HEEDING[name], terminal=terminal) as running:
        running.settled()
        running.press()
        # What a shell makes of a death by SIGINT is what `setsid` makes of it.
        assert running.ended() in (-signal.SIGINT, FORCED)
        assert running.stderr.rstrip().endswith("KeyboardInterrupt")
        assert "leaving with" not in running.stderr


SWALLOWS = """
import time
print("ready", flush=True)
while True:
    try:
        while True:
            time.sleep(1000)
    except BaseException as error:
        print(repr(error), flush=True)
"""


def test_a_program_that_swallows_the_first_is_ended_by_the_second(guarded: Callable[..., Guarded]) -> None:
    with guarded(SWALLOWS) as running:
        running.settled().press()
        running.until("KeyboardInterrupt()")
        pressed = running.settled().press()
        assert running.ended() == FORCED
        assert time.monotonic() - pressed < 5 + SLACK
        assert "Ctrl-C for the second time" in running.stderr


def test_a_third_ends_it_at_once(guarded: Callable[..., Guarded]) -> None:
    source = (
        """
import tractor_host as th
th.guard_ctrl_c(end_timeout=1000)
"""
        + SWALLOWS
    )
    with guarded(source) as running:
        running.settled()
        for count in (1, 2):
            running.settled().press()
            running.until("KeyboardInterrupt()", count)
        helpers.until(lambda: "for the second time" in running.stderr)
        running.settled().press()
        assert running.ended() == FORCED


def test_the_second_ends_all_workers_and_lets_the_program_clean_up(guarded: Callable[..., Guarded]) -> None:
    source = """
import tractor_host as th
worker = th.spawn("time:sleep", 1000)
print("ready", flush=True)
try:
    worker.wait()
except KeyboardInterrupt:
    print("first", flush=True)
    found = worker.wait()
    print(found.cause, flush=True)
    raise SystemExit(7)
"""
    with guarded(source) as running:
        running.settled().press()
        running.until("first")
        running.settled().press()
        # The second interrupts the wait in the program, too, if it is quicker than the worker's end.
        assert running.ended() in (7, -signal.SIGINT)
        assert running.process.stdout is not None
        assert b"killed by Ctrl-C" in running.process.stdout.read() or running.process.returncode != 7


def test_a_signal_that_is_blocked_for_good_is_a_ctrl_c_too(guarded: Callable[..., Guarded]) -> None:
    source = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print("ready", flush=True)
while True:
    pass
"""
    with guarded(source) as running:
        running.settled().press()
        assert running.ended() == FORCED
        assert "Ctrl-C is not heeded" in running.stderr


def test_it_is_the_programs_own_handler_that_is_called(guarded: Callable[..., Guarded]) -> None:
    source = """
import signal
seen = []
signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
print("ready", flush=True)
while not seen:
    signal.pause()
print(seen, signal.getsignal(signal.SIGINT).__name__, flush=True)
"""
    with guarded(source) as running:
        running.settled().press()
        running.until("[2] <lambda>")
        assert running.ended() == 0
        assert running.stderr == ""


def test_a_handler_that_is_set_later_is_guarded_too(guarded: Callable[..., Guarded]) -> None:
    """Event loops set handlers at their start and end."""
    source = """
import asyncio, signal, trio
async def nothing():
    pass
asyncio.run(nothing())
trio.run(nothing)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGINT, lambda number, frame: None)
print("ready", flush=True)
sum(range(10**12))
"""
    with guarded(source) as running:
        running.settled().press()
        assert running.ended() == FORCED


@pytest.mark.parametrize("how", ["SIG_IGN", "SIG_DFL"])
def test_what_the_program_does_not_want_handled_is_left_alone(
    how: str, guarded: Callable[..., Guarded]
) -> None:
    source = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.{how})
print("ready", flush=True)
sys.stdin.readline()
print("went on", flush=True)
"""
    with guarded(source, stdin=subprocess.PIPE) as running:
        running.settled().press()
        if how == "SIG_DFL":
            assert running.ended() == -signal.SIGINT
        else:
            assert running.process.stdin is not None
            running.process.stdin.write(b"\n")
            running.process.stdin.flush()
            running.until("went on")
            assert running.ended() == 0
        assert running.stderr == ""


def test_a_prompt_lives_on_through_many(program: Callable[..., Program]) -> None:
    running = program("import sys; sys.ps1 = '>>> '; print('ready', flush=True)", launcher="tractor-host")
    running.command.insert(2, "-i")
    environment = os.environ | {"PYTHON_BASIC_REPL": "1", "TERM": "dumb"}
    with Guarded(running, terminal=True, env=environment) as prompt:
        assert prompt.terminal is not None
        for count in range(1, 6):
            # One on the way to the read is noticed by CPython with the next line only.
            prompt.settled().press()
            helpers.until(lambda count=count: prompt.stderr.count("KeyboardInterrupt") == count)
        os.write(prompt.terminal, b"print(6 * 7, flush=True)\n")
        prompt.until("42")
        os.write(prompt.terminal, b"raise SystemExit(5)\n")
        # CPython remembers that a KeyboardInterrupt was not caught, and dies by the signal.
        assert prompt.ended() in (5, -signal.SIGINT, FORCED)


def test_a_debugger_lives_on_through_many(guarded: Callable[..., Guarded]) -> None:
    # The prompt is without a newline.
    source = """
import pdb
debugger = pdb.Pdb()
debugger.prompt = "prompt\\n"
print("ready", flush=True)
debugger.set_trace()
print("over", flush=True)
"""
    with guarded(source, terminal=True, env=os.environ | {"TERM": "dumb"}) as running:
        assert running.terminal is not None
        for count in range(1, 6):
            running.until("prompt", count)
            running.settled().press()
        running.until("prompt", 6)
        os.write(running.settled().terminal, b"continue\n")
        running.until("over")
        assert running.ended() == 0


def test_children_inherit_neither_mask_nor_handler(guarded: Callable[..., Guarded]) -> None:
    source = """
import subprocess, sys
show = "print([line.split()[1] for line in open('/proc/self/status') if line[:6] in ('SigBlk', 'SigIgn')])"
print("ready", flush=True)
print(subprocess.run([sys.executable, "-ISc", show], capture_output=True, text=True).stdout, flush=True)
"""
    # Python itself ignores SIGPIPE and SIGXFSZ; this process has been started with more, perhaps.
    plain = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=PATIENCE)
    ignored = plain.stdout.splitlines()[1]
    assert ignored.startswith("['0000000000000000', ")
    assert ignored.endswith("1001000']")
    with guarded(source) as running:
        running.until(ignored)
        assert running.ended() == 0


def test_a_fork_is_not_warned_of_and_leaves_the_guard_standing(program: Callable[..., Program]) -> None:
    source = """
import os, warnings
warnings.simplefilter("error")
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
print("ready", flush=True)
sum(range(10**12))
"""
    with Guarded(program(source, launcher="tractor-host")) as running:
        running.settled().press()
        assert running.ended() == FORCED
        assert "Warning" not in running.stderr


@pytest.mark.parametrize("capture", ["fd", "sys", "no"])
def test_a_test_that_is_stuck_does_not_keep_pytest(capture: str, program: Callable[..., Program]) -> None:
    test = "def test_it():\n    import os\n    os.write(OUT, b'ready\\n')\n    sum(range(10**12))\n"
    running = program("import os\nOUT = int(os.environ['OUT'])\n" + test, name="test_stuck.py")
    launcher = Path(sys.executable).with_name("tractor-host")
    running.command = [str(launcher), "pytest", "-q", "-p", "no:cacheprovider", f"--capture={capture}"]
    running.command += ["--rootdir", str(running.path.parent), str(running.path)]
    command = " ".join(["exec", *running.command, "9>&1"])
    running.command = ["sh", "-c", command]
    with Guarded(running, env=os.environ | {"OUT": "9"}) as stuck:
        stuck.settled().press()
        assert stuck.ended() == FORCED


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_can_count_as_one(name: str, program: Callable[..., Program]) -> None:
    for stuck in (False, True):
        last = "sum(range(10**12))" if stuck else "import time; time.sleep(1000)"
        source = f"""
import atexit
import tractor_host as th
th.guard_ctrl_c(signals=[{name!r}])
atexit.register(print, "cleaned up", flush=True)
print("ready", flush=True)
{last}
"""
        number = getattr(signal, name)
        with Guarded(program(source)) as running:
            running.settled().process.send_signal(number)
            if stuck:
                assert running.ended() == 128 + number
            else:
                running.until("cleaned up")
                assert running.ended() == -signal.SIGINT


def test_sigquit_tells_what_all_threads_do(program: Callable[..., Program]) -> None:
    source = """
import tractor_host as th
th.guard_ctrl_c(signals=["SIGQUIT"])
def deep():
    print("ready", flush=True)
    sum(range(10**12))
deep()
"""
    with Guarded(program(source)) as running:
        running.settled().process.send_signal(signal.SIGQUIT)
        helpers.until(
            lambda: f"{program('', name='x').path.with_name('program.py')}:6 in deep" in running.stderr
        )
        assert running.process.poll() is None


def test_the_launcher_takes_its_orders_from_the_environment(program: Callable[..., Program]) -> None:
    for name, value, said in (
        ("TRACTOR_HOST_CTRL_C", "maybe", "`on` or `off`"),
        ("TRACTOR_HOST_SIGNALS", "SIGKILL", "only SIGTERM, SIGHUP, SIGQUIT can"),
        ("TRACTOR_HOST_WATCHDOG", "bark", "`kill-worker`"),
    ):
        found = program("print('ran')", launcher="tractor-host").run(env=os.environ | {name: value})
        assert found.returncode != 0
        assert said in found.stderr
        assert found.stdout == ""


@pytest.mark.parametrize(
    "call",
    [
        lambda: th.guard_ctrl_c(react_timeout=-1),
        lambda: th.guard_ctrl_c(end_timeout=float("nan")),
        lambda: th.watch_gil(warn=-1),
        lambda: th.watch_gil(policy="shout"),  # type: ignore[arg-type]
    ],
    ids=["react_timeout", "end_timeout", "warn", "policy"],
)
def test_bad_input(call: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match="seconds|policy"):
        call()


def test_handlers_of_the_programs_own_are_not_taken_over(program: Callable[..., Program]) -> None:
    source = """
import signal, tractor_host as th
signal.signal(signal.SIGTERM, lambda *_: None)
for name in ("SIGTERM", "SIGUSR1"):
    try:
        th.guard_ctrl_c(signals=[name])
    except (RuntimeError, ValueError) as error:
        print(type(error).__name__, error)
"""
    lines = program(source).run().stdout.splitlines()
    assert lines[0].startswith("RuntimeError SIGTERM is ignored, or the program has a handler")
    assert lines[1].startswith("ValueError SIGUSR1 can't be guarded")


def test_it_can_be_ended(program: Callable[..., Program]) -> None:
    source = """
import signal, tractor_host as th
from helpers import thread_names, until
th.guard_ctrl_c()
th.watch_gil()
until(lambda: "th-guard" in thread_names())
th.guard_ctrl_c(False)
th.watch_gil(False)
until(lambda: "th-guard" not in thread_names())
th.guard_ctrl_c()
until(lambda: "th-guard" in thread_names())
th.guard_ctrl_c(False)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("python's")
"""
    found = program(source).run(env=helpers.importable())
    assert (found.returncode, found.stdout, found.stderr) == (0, "python's\n", "")


# -- the watch over the GILs -------------------------------------------------------------------------------------

HOGS = {
    "the program": (
        """
th.spawn("time:sleep", 1000, backend="subint")
def hog():
    print("ready", flush=True)
    sum(range(10**12))
hog()
""",
        "the program, thread ",
        " in hog has kept",
    ),
    "a worker with the shared GIL": (
        """
th.spawn(th.Source("def hog():\\n print('ready', flush=True)\\n sum(range(10**12))\\nhog()"), backend="subint", name="greedy")
time.sleep(1000)
""",
        "worker 1 (greedy), thread ",
        "th:greedy, at <source>:3 in hog has kept the GIL",
    ),
    "a worker with a GIL of its own": (
        """
th.spawn(th.Source("def hog():\\n print('ready', flush=True)\\n sum(range(10**12))\\nhog()"), backend="subint", gil="own", name="greedy")
time.sleep(1000)
""",
        "worker 1 (greedy), thread ",
        "th:greedy, at <source>:3 in hog has kept the GIL",
    ),
}


@pytest.mark.parametrize("policy", ["warn", "dump", "exit"])
@pytest.mark.parametrize("name", HOGS)
def test_who_keeps_a_gil_is_named(name: str, policy: str, program: Callable[..., Program]) -> None:
    source, who, where = HOGS[name]
    head = f"import time, tractor_host as th\nth.watch_gil(warn=0.3, limit=0.6, policy={policy!r})\n"
    with Guarded(program(head + source)) as running:
        helpers.until(lambda: "nobody else can run Python" in running.stderr, "the warning")
        warning = next(line for line in running.stderr.splitlines() if "nobody else" in line)
        assert who in warning
        assert where in warning
        if policy == "exit":
            assert running.ended() == 86
        elif policy == "dump":
            helpers.until(lambda: "this is what all threads do" in running.stderr, "the dump")
            assert running.process.poll() is None
        # A dump has it among the last events.
        said = [line for line in running.stderr.splitlines() if line.startswith("tractor-host: ")]
        assert sum("nobody else can run Python" in line for line in said) == 1


def test_a_worker_that_keeps_the_gil_is_ended_when_it_gives_it_back(program: Callable[..., Program]) -> None:
    source = """
import targets, tractor_host as th
th.watch_gil(warn=0.2, limit=0.5, policy="kill-worker")
worker = th.spawn(targets.hog_in_c_and_go_on, 2.0, backend="subint", stdio="null")
found = worker.wait()
print(found.kind, found.cause)
"""
    found = program(source).run(env=helpers.importable())
    assert "killed because it held the GIL for 0.5 s" in found.stdout, found


def test_busy_python_code_is_no_hog(program: Callable[..., Program]) -> None:
    source = """
import time, tractor_host as th
th.watch_gil(warn=0.5, limit=1)
busy = th.Source("while True: pass")
workers = [th.spawn(busy, backend="subint") for _ in range(3)]
workers.append(th.spawn(busy, backend="subint", gil="own"))
end = time.monotonic() + 3
while time.monotonic() < end:
    pass
print("over")
"""
    found = program(source).run()
    assert (found.returncode, found.stdout, found.stderr) == (0, "over\n", "")


def test_the_launcher_watches_where_workers_share_the_gil(program: Callable[..., Program]) -> None:
    source = """
import ctypes, tractor_host as th
th.spawn("time:sleep", 1000, backend="subint")
ctypes.PyDLL(None).usleep(1_000_000)  # it does not release the GIL
ctypes.PyDLL(None).sleep(2)
print("over")
"""
    found = program(source, launcher="tractor-host").run()
    assert found.stdout == "over\n"
    assert "the program, thread " in found.stderr
    assert "has kept the GIL for" in found.stderr
    source = "import ctypes\nctypes.PyDLL(None).sleep(2)\nprint('over')"
    alone = program(source, launcher="tractor-host").run()
    assert (alone.stdout, alone.stderr) == ("over\n", "")
