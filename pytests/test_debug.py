"""`breakpoint()` in workers: whole programs at terminals of their own, with real key presses."""

import contextlib
import os
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import helpers
from conftest import Program, kill_session
from helpers import PATIENCE

pytestmark = pytest.mark.outside

Make = Callable[..., Program]

CTRL_C = "\x03"
#: Without colours and cursor movements.
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")

HEAD = """
import os, sys, time
import tractor_host as th

def stop(value):
    doubled = value * 2
    breakpoint()
    return doubled

def show(name, worker):
    exit = worker.wait(timeout=60)
    print(f"<{name} {exit.kind} {worker.result() if exit.kind == 'returned' else exit.cause}>", flush=True)

"""


class AtTerminal:
    """A program whose controlling terminal is ours to type at."""

    def __init__(self, program: Program, *args: str, shell: str | None = None, **options: Any) -> None:
        self.keys, self.inner = os.openpty()
        above = [] if shell is None else ["sh", "-c", shell, "sh"]
        command = ["setsid", "--ctty", *above, *program.command, *args]
        self.process = subprocess.Popen(
            command, stdin=self.inner, stdout=self.inner, stderr=self.inner, **options
        )
        self.before = termios.tcgetattr(self.inner)
        self.raw = b""
        self.said = self.log = ""

    def __enter__(self) -> AtTerminal:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in (self.process.pid, *helpers.descendants(self.process.pid)):
            kill_session(process)
        with self.process:
            self.process.kill()
        os.close(self.keys)
        os.close(self.inner)

    @property
    def leader(self) -> int:
        """The program's process: `setsid` forks where it leads a group, which it does not."""
        return self.process.pid

    def until(self, text: str) -> str:
        """What it has said up to and with this, from the last such call on."""
        return self.match(re.escape(text)).string

    def match(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.said)):
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} within {PATIENCE} s: {self.said}"
            if select.select([self.keys], [], [], left)[0]:
                self.raw += os.read(self.keys, 4096)
                # As a person sees it; the last few bytes may be the begin of something.
                self.said = ESCAPES.sub(b"", self.raw.replace(b"\r", b"")).decode(errors="replace")
        self.raw = self.said[found.end() :].encode()
        match = re.search(pattern, self.said[: found.end()])
        self.said = self.said[found.end() :]
        assert match is not None
        self.log += match.string
        return match

    def prompt(self) -> str:
        """Waits for the next prompt; whose it is."""
        return self.match(r"\(Pdb ([\w-]+)\) ")[1]

    def type(self, text: str) -> None:
        os.write(self.keys, text.encode())

    def command(self, text: str, prompt: str = "(Pdb") -> str:
        """Types a line at a prompt; what comes before the next one."""
        self.type(text + "\n")
        return self.until(prompt)

    @property
    def is_as_before(self) -> bool:
        """Its modes, and who is in the foreground."""
        group, _session, _terminal, foreground = (
            Path(f"/proc/{self.leader}/stat").read_text().rpartition(")")[2].split()[2:6]
        )
        return termios.tcgetattr(self.inner) == self.before and group == foreground


@pytest.fixture
def at_terminal(program: Make) -> Iterator[Callable[..., AtTerminal]]:
    running: list[AtTerminal] = []

    def start(source: str, *args: str, launcher: str = "python", **options: Any) -> AtTerminal:
        running.append(AtTerminal(program(HEAD + source, launcher=launcher), *args, **options))
        return running[-1]

    yield start
    for one in running:
        one.__exit__()


TWO = """
if __name__ == "__main__":
    workers = [th.spawn(stop, n, backend=sys.argv[1], name=f"w{n}", stdio="null") for n in (1, 2)]
    for worker in workers:
        show(worker.name, worker)
    input("<over>")
"""


def test_one_after_the_other_has_the_terminal(at_terminal: Callable[..., AtTerminal], backend: str) -> None:
    one = at_terminal(TWO, backend)
    found = one.match(r"\(Pdb ([\w-]+)\) ")
    first, seen = found[1], found.string
    second = {"w1": "w2", "w2": "w1"}[first]
    assert re.search(rf"{first} \(pid \d+\) is at a breakpoint\n", seen)
    assert "breakpoint()" in seen
    assert second not in one.command("p doubled", f"(Pdb {first})")
    assert not one.is_as_before or backend == "subint"
    one.type("c\n")
    assert f"\n{second} (pid" in one.until(f"(Pdb {second}) ")
    assert f"{int(second[1]) * 2}\n" in one.command("p doubled")
    one.type("c\n")
    one.until("<over>")
    assert "<w1 returned 2>" in one.log
    assert "<w2 returned 4>" in one.log
    assert one.is_as_before
    one.type("\n")
    assert one.process.wait(timeout=PATIENCE) == 0


@pytest.mark.parametrize("launcher", ["python", "tractor-host"])
def test_ctrl_c_at_the_prompt_cancels_the_line(
    at_terminal: Callable[..., AtTerminal], backend: str, launcher: str
) -> None:
    one = at_terminal(TWO, backend, launcher=launcher)
    first = one.prompt()
    one.type("raise SystemExit" + CTRL_C)
    for _ in range(2):
        one.until("--KeyboardInterrupt--")
        assert one.prompt() == first
        one.type(CTRL_C)
    one.until("--KeyboardInterrupt--")
    one.type("c\n")
    assert one.prompt() == first
    assert one.prompt() != first
    one.type("c\n")
    one.until("<w2 returned 4>")
    assert "<w1 returned 2>" in one.log


def test_ctrl_c_while_a_command_runs_is_the_debugged_process_s(
    at_terminal: Callable[..., AtTerminal], signalled_backend: str
) -> None:
    one = at_terminal(TWO, signalled_backend)
    one.prompt()
    one.type("import time; print('z' * 3); time.sleep(60)\n")
    one.until("zzz\n")
    one.type(CTRL_C)
    one.until("KeyboardInterrupt")
    one.prompt()
    one.type("c\n")
    one.prompt()
    one.type("c\n")
    one.until("<w2 returned 4>")
    assert "<w1 returned 2>" in one.log


LATE = """
def nap():
    for _ in range(6000):
        time.sleep(0.01)

if __name__ == "__main__":
    import threading
    backend, others, fifo = sys.argv[1:]
    debugged = th.spawn(stop, 1, backend=backend, name="debugged", timeout=1.5, stdio="null")
    late, wanted, called = (
        th.spawn(nap, backend=others, timeout=timeout, cancel_timeout=0.1, kill_timeout=1)
        for timeout in (1.5, None, None)
    )
    def end():
        with open(fifo):  # when the debugged one has its prompt
            pass
        called.cancel()
        wanted.kill()
    ender = threading.Thread(target=end)
    ender.start()
    show("debugged", debugged)
    for name, worker in (("wanted", wanted), ("called", called), ("late", late)):
        show(name, worker)
        assert worker.exit.lifetime > 2, worker.exit
    ender.join()
    print("<over>", flush=True)
"""


@pytest.mark.parametrize(
    ("backend", "others"),
    [
        ("forkserver", "subint"),
        ("subint", "forkserver"),
        ("subint_forkserver", "subint_forkserver"),
        ("fork", "exec"),
        ("exec", "fork"),
    ],
)
def test_nobody_is_ended_while_somebody_debugs(
    at_terminal: Callable[..., AtTerminal], backend: str, others: str, tmp_path: Path
) -> None:
    """For longer than any time limit that there is, by what the debugged one does at its prompt."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    one = at_terminal(LATE, backend, others, str(fifo))
    one.until("(Pdb debugged) ")
    one.command(f"open({str(fifo)!r}, 'w').close(); import time; time.sleep(2.5)")
    assert "2\n" in one.command("p doubled")
    one.type("c\n")
    one.until("<debugged returned 2>")
    one.match("<wanted (cancelled|killed) killed, (stopped|ended)")
    one.match("<called cancelled cancelled>")
    one.match("<late (cancelled|killed) ran longer than its timeout of 1.5 s, (stopped|ended)")
    one.until("<over>")
    assert one.process.wait(timeout=PATIENCE) == 0


def test_a_debugged_process_that_is_killed_gives_the_terminal_back(
    at_terminal: Callable[..., AtTerminal], process_backend: str
) -> None:
    one = at_terminal(TWO, process_backend)
    first, pid = one.match(r"(w[12]) \(pid (\d+)").groups()
    assert one.prompt() == first
    os.kill(int(pid), signal.SIGKILL)
    assert one.prompt() != first
    one.type("c\n")
    one.until("<over>")
    assert f"<{first} signalled its process was ended by SIGKILL" in one.log
    assert one.log.count(" returned ") == 1
    assert one.is_as_before


def test_a_program_that_is_killed_takes_its_debugged_workers_along(
    at_terminal: Callable[..., AtTerminal], backend: str
) -> None:
    one = at_terminal(TWO, backend)
    one.until("(Pdb ")
    workers = helpers.descendants(one.leader)
    os.kill(one.leader, signal.SIGKILL)
    helpers.until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), "their end")


def test_sigterm_ends_a_program_whose_worker_is_at_a_prompt(
    at_terminal: Callable[..., AtTerminal], backend: str
) -> None:
    one = at_terminal(TWO, backend)
    one.until("(Pdb ")
    os.kill(one.leader, signal.SIGTERM)
    assert one.process.wait(timeout=PATIENCE) in (-signal.SIGTERM, 128 + signal.SIGTERM)


FORCED = """
import signal

if __name__ == "__main__":
    th.guard_ctrl_c(end_timeout=60)
    signal.signal(signal.SIGINT, lambda *_: print("<pressed>", flush=True))
    th.spawn(stop, 1, backend=sys.argv[1], name="debugged", stdio="null").wait()
    print("<over>")
    time.sleep(60)
"""
#: Started by this, a program leaves the terminal to somebody. (Who is in the background can't read from it.)
SHELL = '"$@"; echo "<left $?>"; until read line; do sleep 0.1; done; echo "<read $line>"; read line'


def test_a_program_that_is_forced_out_leaves_the_terminal_as_it_was(
    at_terminal: Callable[..., AtTerminal], backend: str
) -> None:
    one = at_terminal(FORCED, backend, shell=SHELL)
    one.prompt()
    assert not one.is_as_before
    program = helpers.descendants(one.leader)
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):  # three are enough, unless two come as one
            os.kill(program[0], signal.SIGINT)
            time.sleep(0.02)
    one.until("<left 130>")
    assert one.is_as_before
    helpers.until(
        lambda: not any(os.path.exists(f"/proc/{pid}") for pid in program),
        "the end of all that could read a line",
    )
    one.type("hello\n")
    one.until("<read hello>")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_at_a_prompt_gives_the_terminal_back_when_its_program_is_killed(
    at_terminal: Callable[..., AtTerminal], process_backend: str, number: signal.Signals
) -> None:
    one = at_terminal(FORCED, process_backend, shell=SHELL)
    one.prompt()
    assert not one.is_as_before
    program = helpers.descendants(one.leader)
    os.kill(program[0], number)
    one.until(f"<left {128 + number}>")
    helpers.until(
        lambda: not any(os.path.exists(f"/proc/{pid}") for pid in program),
        "the end of all that could read a line",
    )
    assert one.is_as_before
    one.type("hello\n")
    one.until("<read hello>")


NESTED = """
def below(backend):
    worker = th.spawn(stop, 4, backend=backend, name="below", stdio="null")
    return worker.result(timeout=60)

if __name__ == "__main__":
    import threading
    fifo = sys.argv[3]
    middle = th.spawn(below, sys.argv[2], backend=sys.argv[1], name="middle", cancel_timeout=0.1, kill_timeout=1)
    def end():
        with open(fifo):
            pass
        middle.kill()
    ender = threading.Thread(target=end)
    ender.start()
    show("middle", middle)
    ender.join()
"""


@pytest.mark.parametrize(
    ("backend", "inner"),
    [
        ("forkserver", "subint"),
        ("forkserver", "forkserver"),
        ("subint", "forkserver"),
        ("subint", "subint"),
        ("subint_forkserver", "subint_forkserver"),
        ("fork", "exec"),
        ("forkserver", "fork"),
        ("fork", "fork"),
        ("exec", "subint"),
    ],
)
def test_a_worker_s_worker_holds_the_kill_of_what_is_above_it(
    at_terminal: Callable[..., AtTerminal], backend: str, inner: str, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    one = at_terminal(NESTED, backend, inner, str(fifo))
    one.until("(Pdb below) ")
    one.command(f"open({str(fifo)!r}, 'w').close(); import time; time.sleep(1.5)")
    assert "8\n" in one.command("p doubled")
    one.type("c\n")
    # It is cancelled or killed now, unless it was quicker.
    seen = one.until(">")
    assert re.search("<middle (cancelled killed, stopped|killed killed, ended|returned 8)", seen), seen


def test_a_worker_that_fills_the_line_is_refused(
    at_terminal: Callable[..., AtTerminal], backend: str
) -> None:
    one = at_terminal(
        """
def flood():
    from tractor_host import _native
    tickets = [_native.terminal_ask() for _ in range(200)]
    refused = set()
    for ticket in tickets[1 + 64:]:
        try:
            _native.terminal_wait(ticket)
        except RuntimeError as error:
            refused.add(str(error))
        _native.terminal_back(ticket)
    for ticket in tickets[:1 + 64]:
        _native.terminal_back(ticket)
    return refused

if __name__ == "__main__":
    show("flood", th.spawn(flood, backend=sys.argv[1]))
    show("next", th.spawn(stop, 1, backend=sys.argv[1], name="next"))
""",
        backend,
    )
    assert one.prompt() == "next"
    one.type("c\n")
    one.until("<next returned 2>")
    assert "<flood returned {'breakpoint(): 64 threads of this worker, or of its workers, are in" in one.log


def test_a_line_that_is_full_takes_nobody(at_terminal: Callable[..., AtTerminal], backend: str) -> None:
    one = at_terminal(
        """
if __name__ == "__main__":
    from tractor_host import _native
    tickets = [_native.terminal_ask() for _ in range(1 + 1024)]
    late = th.spawn(stop, 1, backend=sys.argv[1]).wait(timeout=60)
    print(f"<late {late.cause}>", flush=True)
    for ticket in tickets:
        _native.terminal_back(ticket)
    show("next", th.spawn(stop, 1, backend=sys.argv[1], name="next"))
""",
        backend,
    )
    one.until(
        "<late raised RuntimeError: breakpoint(): 1024 threads are in the line for the terminal already"
    )
    assert one.prompt() == "next"
    one.type("c\n")
    one.until("<next returned 2>")


def test_a_pool_s_time_limits_stand_still(at_terminal: Callable[..., AtTerminal], backend: str) -> None:
    one = at_terminal(
        """
if __name__ == "__main__":
    with th.Executor(2, backend=sys.argv[1], task_timeout=2, cancel_timeout=0.1, kill_timeout=1) as pool:
        pool.submit(len, "").result()
        debugged = pool.submit(stop, 1)
        print(f"<debugged {debugged.result()}>", flush=True)
        late = pool.submit(time.sleep, 60)
        print(f"<late {late.exception()!r}>", flush=True)
""",
        backend,
    )
    one.prompt()
    one.type("import time; time.sleep(2.5)\n")
    one.prompt()
    one.type("c\n")
    one.until("<debugged 2>")
    one.until("<late TaskTimeout(")


def test_a_time_limit_goes_on_where_it_stood(at_terminal: Callable[..., AtTerminal], backend: str) -> None:
    one = at_terminal(
        """
if __name__ == "__main__":
    with th.Executor(2, backend=sys.argv[1], cancel_timeout=0.1, kill_timeout=1) as pool:
        late = pool.with_timeout(2).submit(time.sleep, 60)
        debugged = pool.submit(stop, 1)
        assert debugged.result() == 2
        begin = time.monotonic()
        print(f"<late {late.exception()!r}>", flush=True)
        print(f"<within {time.monotonic() - begin < 4}>", flush=True)
""",
        backend,
    )
    one.prompt()
    one.type("import time; time.sleep(6)\n")
    one.prompt()
    one.type("c\n")
    one.until("<late TaskTimeout(")
    one.until("<within True>")


def test_what_the_debugged_one_has_started_is_its_own_to_end(
    at_terminal: Callable[..., AtTerminal], process_backend: str
) -> None:
    one = at_terminal(
        """
def nap():
    time.sleep(60)

def parent():
    child = th.spawn(nap, stdio="null")
    breakpoint()
    return child.exit.kind

if __name__ == "__main__":
    show("parent", th.spawn(parent, backend=sys.argv[1], name="parent", stdio="null"))
""",
        process_backend,
    )
    one.until("(Pdb parent) ")
    assert re.search("cancelled|killed", one.command("child.kill()"))
    one.type("c\n")
    one.match("<parent returned (cancelled|killed)>")


THREADS = """
import _thread, threading

def stop_in_threads():
    def body():
        breakpoint()
        over.release()
    over = threading.Semaphore(0)
    for _ in range(2):
        _thread.start_new_thread(body, ())  # below which there is no frame
    for _ in range(2):
        over.acquire()
    # Not as long as one of them has the terminal.
    other = th.spawn(time.sleep, 60, timeout=0.1, stdio="null")
    return other.wait(timeout=30).kind

if __name__ == "__main__":
    show("worker", th.spawn(stop_in_threads, backend=sys.argv[1], name="w", stdio="null"))
"""


@pytest.mark.parametrize("how", ["c", "a thread that ends"])
def test_threads_of_one_worker_line_up(
    at_terminal: Callable[..., AtTerminal], backend: str, how: str
) -> None:
    one = at_terminal(THREADS, backend)
    for turn in range(2):
        one.prompt()
        assert len(re.findall(r"w \(pid \d+, thread \S+\) is at", one.log)) == turn + 1
        if how == "c":
            one.type("c\n")
        else:
            # There is no `continue`: the thread ends.
            one.command("n", "(Pdb w) ")
            assert "--Return--" in one.command("n", "(Pdb w) ")
            one.type("n\n")
            # What CPython's own code does at the end of a thread is traced too.
            while "Pdb" in one.match(r"\(Pdb w\) |at a breakpoint|<worker")[0]:
                one.type("n\n")
            if turn == 1:
                break
    one.match(" returned (cancelled|killed)>")


def test_quit_raises_in_the_debugged_code(at_terminal: Callable[..., AtTerminal], backend: str) -> None:
    one = at_terminal(TWO, backend)
    for _ in range(2):
        one.prompt()
        one.type("q\n")
    one.until("<over>")
    assert one.log.count("raised raised BdbQuit") == 2
    assert one.is_as_before


def test_end_of_file_quits(at_terminal: Callable[..., AtTerminal], backend: str) -> None:
    one = at_terminal(TWO, backend)
    for _ in range(2):
        one.prompt()
        one.type("\x04")
    one.until("<over>")
    assert one.log.count("raised raised BdbQuit") == 2


def test_it_steps(at_terminal: Callable[..., AtTerminal], backend: str) -> None:
    """The terminal stays with the one that steps, and comes back to it at a breakpoint of its own."""
    one = at_terminal(
        """
def steps():
    breakpoint()
    first = 1
    second = 2
    for turn in range(3):
        first += turn
    return first + second

if __name__ == "__main__":
    workers = [th.spawn(steps, backend=sys.argv[1], name=f"w{n}", stdio="null") for n in (1, 2)]
    for worker in workers:
        show(worker.name, worker)
""",
        backend,
    )
    first = one.prompt()
    assert "first = 1" in one.command("n", f"(Pdb {first}) ")
    assert "second = 2" in one.command("n", f"(Pdb {first}) ")
    line = one.command("w", f"(Pdb {first}) ")
    number = re.search(r"program.py\((\d+)\)steps\(\)\n-> second", line)
    assert number is not None, line
    one.command(f"b {int(number[1]) + 2}", f"(Pdb {first}) ")
    one.type("c\n")
    turns = 0
    for _ in range(4):
        if one.prompt() == first:
            assert f"\n{turns}\n" in one.command("p turn", f"(Pdb {first}) ")
            turns += 1
        one.type("c\n")
    assert turns == 3
    one.until("<w2 returned 6>")
    assert "<w1 returned 6>" in one.log


def test_interact_reads_from_the_terminal(at_terminal: Callable[..., AtTerminal], backend: str) -> None:
    one = at_terminal(TWO, backend)
    one.prompt()
    one.type("interact\n")
    one.until(">>> ")
    one.type("doubled * 1000\n")
    assert re.search(r"\n[24]000\n", one.until(">>> "))
    one.type("\x04")
    one.until("(Pdb ")


ONE = """
if __name__ == "__main__":
    show("worker", th.spawn(stop, 1, backend=sys.argv[1], name="w"))
    print("<over>", flush=True)
"""


def test_without_a_terminal_it_says_so(program: Make, backend: str) -> None:
    ended = program(HEAD + ONE).run(backend)
    assert "RuntimeError: breakpoint() needs a terminal, and this program has none" in ended.stdout
    assert ended.stdout.endswith("<over>\n")


def test_in_the_background_it_says_so(at_terminal: Callable[..., AtTerminal], backend: str) -> None:
    one = at_terminal(
        """
if __name__ == "__main__":
    if len(sys.argv) == 2:
        # A job of a shell's, and in the background.
        import subprocess
        sys.exit(subprocess.run([sys.executable, *sys.argv, "again"], process_group=0).returncode)
    show("worker", th.spawn(stop, 1, backend=sys.argv[1], name="w"))
    print("<over>", flush=True)
""",
        backend,
    )
    assert "RuntimeError: breakpoint() needs the terminal, and this program runs in its b" in one.until(
        "<over>"
    )


@pytest.mark.parametrize(
    ("said", "expected"), [("0", "<worker returned 2>"), ("builtins.print", "\n<worker")]
)
def test_pythonbreakpoint(
    program: Make, backend: str, said: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONBREAKPOINT", said)
    ended = program(HEAD + ONE).run(backend)
    assert expected in ended.stdout
    assert "<worker returned 2>" in ended.stdout


def test_a_hook_of_the_program_s_own_stays(program: Make) -> None:
    ended = program(
        HEAD
        + """
if __name__ == "__main__":
    sys.breakpointhook = lambda: print("mine", flush=True)
    show("worker", th.spawn(stop, 1, backend="fork"))
"""
    ).run()
    assert ended.stdout == "mine\n<worker returned 2>\n"


def test_the_program_itself_can_stand_in_the_line(
    at_terminal: Callable[..., AtTerminal], backend: str
) -> None:
    one = at_terminal(
        """
if __name__ == "__main__":
    sys.breakpointhook = th.breakpointhook
    worker = th.spawn(stop, 1, backend=sys.argv[1], name="w", stdio="null")
    while not any(event.kind == "debug" for event in th.events()):
        time.sleep(0.01)
    breakpoint()
    show("worker", worker)
    show("late", late)
""",
        backend,
    )
    one.until("(Pdb w) ")
    one.type("c\n")
    one.until("(Pdb) ")
    one.command("late = th.spawn(time.sleep, 60, timeout=0.2, cancel_timeout=0.1, kill_timeout=1)", "(Pdb) ")
    one.command("time.sleep(1)", "(Pdb) ")
    assert "\nNone\n" in one.command("p late.exit", "(Pdb) ")
    one.type("c\n")
    one.until("<worker returned 2>")
    one.match("<late (cancelled|killed) ran longer than its timeout of 0.2 s, (stopped|ended)")


def test_bad_arguments(program: Make, backend: str) -> None:
    ended = program(
        """
import tractor_host as th

def wrong():
    breakpoint(1)

if __name__ == "__main__":
    import sys
    print(th.spawn(wrong, backend=sys.argv[1]).wait(timeout=60).cause)
"""
    ).run(backend)
    assert "raised TypeError: _stop() takes 1 positional argument but 2 were given" in ended.stdout
