"""The ways to start a worker that `bench spawn` compares, and the program that measures one of them.

That program runs in a process of its own, as `python -c MAIN` below has it: what it measures must find a
plain Python, so nothing of tractor_host is imported for the others, and there is no `__main__` with a file
that some of them would run again in every worker.

Requests are lines of JSON on stdin, replies on stdout, one for each; all times are in seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Final

#: What `python -c` runs; its arguments are this file, the contestant's name and the settings as JSON.
MAIN: Final = (
    "import importlib.util, sys; "
    "spec = importlib.util.spec_from_file_location('contestants', sys.argv[1]); "
    "module = importlib.util.module_from_spec(spec); "
    "spec.loader.exec_module(module); "
    "module.serve(*sys.argv[2:])"
)
#: Seconds that an idle worker sleeps, which nobody waits for: a bound, should all else have failed.
IDLE: Final = 3600


class Contestant:
    """One way to start workers.

    Attributes:
        needs: A module that it takes and that is not Python's own, or `None`.
    """

    needs: str | None = None
    #: Imports modules once, so that all workers to come have them; `None` where there is no such way.
    preload: Callable[[Sequence[str]], None] | None = None

    def reaped(self) -> None:
        """Starts a worker that does nothing, and waits for its end."""
        raise NotImplementedError

    def answered(self) -> float:
        """Starts a worker that answers one call, and waits for its end; when the answer was here."""
        raise NotImplementedError

    def hold(self, count: int) -> list[int]:
        """Starts so many more workers that stay and do nothing; the pids of those that are processes."""
        raise NotImplementedError

    def kill(self) -> None:
        """Ends all that are held at once; waits for the ends of those that are no processes."""
        raise NotImplementedError

    def kept(self) -> list[int]:
        """The pids of idle processes that are kept ready for later, and of who makes them."""
        return []


def import_here(modules: Sequence[str]) -> None:
    """Imports them in this process, which forks."""
    for name in modules:
        __import__(name)


class TractorHost(Contestant):
    """`tractor_host.spawn`. What is held is killed without the rung `cancel`."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.held: list[Any] = []
        ways = {
            "forkserver": self._preload_server,
            "subint_forkserver": self._preload_server,
            "fork": import_here,
        }
        self.preload = ways.get(options["backend"])

    @staticmethod
    def _preload_server(modules: Sequence[str]) -> None:
        import tractor_host as th

        th.preload(modules)

    def reaped(self) -> None:
        import tractor_host as th

        th.spawn("os:getpid", **self.options).wait()

    def answered(self) -> float:
        import tractor_host as th

        assert th.spawn("os:getpid", **self.options).result()
        return time.perf_counter()

    def hold(self, count: int) -> list[int]:
        import tractor_host as th

        more = []
        for _ in range(count):
            more.append(th.spawn("time:sleep", IDLE, cancel_timeout=0, kill_timeout=30, **self.options))
            self.held.append(more[-1])
        for worker in more:
            while worker.state == "booting":
                time.sleep(0.001)
            if worker.exit is not None:
                raise RuntimeError(f"an idle worker ended: {worker.exit}")
        return [worker.pid for worker in more if worker.pid is not None]

    def kill(self) -> None:
        from tractor_host import _native

        for worker in self.held:
            _native.kill(worker.id)  # `Worker.kill` waits for each of them
        kinds = [worker.wait().kind for worker in self.held]
        self.held.clear()
        if abandoned := kinds.count("abandoned"):
            raise RuntimeError(f"{abandoned} of {len(kinds)} workers could not be ended in time")

    def kept(self) -> list[int]:
        from tractor_host import _native

        return _native.fork_server_owns()["processes"]


class Fork(Contestant):
    """`os.fork` and `os._exit`."""

    preload = staticmethod(import_here)

    def __init__(self) -> None:
        self.held: list[int] = []

    def reaped(self) -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    def answered(self) -> float:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writing, b"%d" % os.getpid())
            os._exit(0)
        assert int(os.read(reading, 32)) == pid
        moment = time.perf_counter()
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)
        return moment

    def hold(self, count: int) -> list[int]:
        more = []
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                try:
                    time.sleep(IDLE)
                finally:
                    os._exit(0)
            more.append(pid)
            self.held.append(pid)
        return more

    def kill(self) -> None:
        for pid in self.held:
            os.kill(pid, signal.SIGKILL)
        for pid in self.held:
            os.waitpid(pid, 0)
        self.held.clear()


class Multiprocessing(Contestant):
    """`multiprocessing.Process`. None is closed: another thread's start may be looking at it."""

    def __init__(self, method: str) -> None:
        from multiprocessing import get_context

        self.context: Any = get_context(method)
        self.held: list[Any] = []
        ways: dict[str, Any] = {"fork": import_here, "forkserver": self.context.set_forkserver_preload}
        self.preload = ways.get(method)

    def reaped(self) -> None:
        process = self.context.Process(target=os.getpid)
        process.start()
        process.join()

    def answered(self) -> float:
        reading, writing = self.context.Pipe(duplex=False)
        process = self.context.Process(target=writing.send, args=(1,))
        process.start()
        assert reading.recv() == 1
        moment = time.perf_counter()
        process.join()
        reading.close()
        writing.close()
        return moment

    def hold(self, count: int) -> list[int]:
        more = []
        for _ in range(count):
            process = self.context.Process(target=time.sleep, args=(IDLE,))
            process.start()
            more.append(process.pid)
            self.held.append(process)
        return more

    def kill(self) -> None:
        for process in self.held:
            process.kill()
        for process in self.held:
            process.join()
        self.held.clear()


class Subprocess(Contestant):
    """`subprocess` with `python -S -c`."""

    def __init__(self) -> None:
        self.held: list[subprocess.Popen[bytes]] = []

    def reaped(self) -> None:
        subprocess.run([sys.executable, "-S", "-c", "pass"], check=True)

    def answered(self) -> float:
        command = [sys.executable, "-S", "-c", "import os; print(os.getpid())"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert int(process.stdout.read()) == process.pid
            return time.perf_counter()

    def hold(self, count: int) -> list[int]:
        command = [sys.executable, "-S", "-c", f"import time; time.sleep({IDLE})"]
        more = []
        for _ in range(count):
            process = subprocess.Popen(command)
            more.append(process.pid)
            self.held.append(process)
        return more

    def kill(self) -> None:
        for process in self.held:
            process.kill()
        for process in self.held:
            process.wait()
        self.held.clear()


class Interpreters(Contestant):
    """`concurrent.interpreters`. Nothing runs in those that are held: there is no way to end what does."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    def reaped(self) -> None:
        from concurrent import interpreters

        interpreter = interpreters.create()
        interpreter.exec("pass")
        interpreter.close()

    def answered(self) -> float:
        from concurrent import interpreters

        interpreter = interpreters.create()
        assert interpreter.call(os.getpid)
        moment = time.perf_counter()
        interpreter.close()
        return moment

    def hold(self, count: int) -> list[int]:
        from concurrent import interpreters

        for _ in range(count):
            self.held.append(interpreters.create())
            self.held[-1].exec("pass")
        return []

    def kill(self) -> None:
        for interpreter in self.held:
            interpreter.close()
        self.held.clear()


class ToProcess(Contestant):
    """`anyio.to_process`: each measurement in an event loop of its own, with whose end the worker ends."""

    needs = "anyio"

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.loops: list[Any] = []

    def reaped(self) -> None:
        import anyio.to_process

        anyio.run(anyio.to_process.run_sync, os.getpid)

    def answered(self) -> float:
        import anyio.to_process

        async def call() -> float:
            assert await anyio.to_process.run_sync(os.getpid)
            return time.perf_counter()

        return anyio.run(call)

    def hold(self, count: int) -> list[int]:
        import anyio.from_thread
        import anyio.to_process

        async def idle() -> None:
            limiter = anyio.CapacityLimiter(1)
            await anyio.to_process.run_sync(time.sleep, IDLE, cancellable=True, limiter=limiter)

        before = children()
        if not self.loops:
            self.loops.append(anyio.from_thread.start_blocking_portal())
            self.loops.append(self.loops[0].__enter__())
        more = [self.loops[1].start_task_soon(idle) for _ in range(count)]
        self.calls += more
        return wait_children(before, count)

    def kill(self) -> None:
        for call in self.calls:
            call.cancel()
        if self.loops:
            self.loops[0].__exit__(None, None, None)
        self.calls.clear()
        self.loops.clear()


class Loky(Contestant):
    """`loky.ProcessPoolExecutor`: each measurement with a pool of its own, of one worker."""

    needs = "loky"

    def __init__(self) -> None:
        self.pools: list[Any] = []

    def _pool(self, workers: int) -> Any:
        from importlib import import_module

        return import_module("loky").ProcessPoolExecutor(max_workers=workers)

    def reaped(self) -> None:
        self.answered()

    def answered(self) -> float:
        pool = self._pool(1)
        assert pool.submit(os.getpid).result()
        moment = time.perf_counter()
        pool.shutdown(wait=True)
        return moment

    def hold(self, count: int) -> list[int]:
        before = children()
        self.pools.append(self._pool(count))
        for _ in range(count):
            self.pools[-1].submit(time.sleep, IDLE)
        return wait_children(before, count)

    def kill(self) -> None:
        for pool in self.pools:
            # It forgets what it would have to wait for; whoever asked looks for the processes.
            pool.shutdown(wait=False, kill_workers=True)
        self.pools.clear()


#: What the others' medians are divided by.
YARDSTICK: Final = "os.fork"
CONTESTANTS: Final[Mapping[str, Callable[[], Contestant]]] = {
    "th subint": lambda: TractorHost(backend="subint"),
    "th subint, own GIL": lambda: TractorHost(backend="subint", gil="own"),
    "th forkserver": lambda: TractorHost(backend="forkserver"),
    "th subint_forkserver": lambda: TractorHost(backend="subint_forkserver"),
    "th fork": lambda: TractorHost(backend="fork"),
    "th exec": lambda: TractorHost(backend="exec"),
    YARDSTICK: Fork,
    "mp fork": lambda: Multiprocessing("fork"),
    "mp forkserver": lambda: Multiprocessing("forkserver"),
    "mp spawn": lambda: Multiprocessing("spawn"),
    "subprocess": Subprocess,
    "interpreters": Interpreters,
    "anyio.to_process": ToProcess,
    "loky": Loky,
}


# -- what /proc tells --------------------------------------------------------------------------------


def children() -> set[int]:
    """The pids of this process's children."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children") as file:
                found.update(map(int, file.read().split()))
        except OSError:  # the thread has ended
            continue
    return found


def wait_children(before: set[int], count: int) -> list[int]:
    """Waits until there are so many more than `before`, and returns their pids."""
    while len(more := children() - before) < count:
        time.sleep(0.005)
    return sorted(more)


def wait_idle(pids: Sequence[int]) -> None:
    """Waits until all of them have slept for a while: what they had to do is done."""
    last: list[str] = []
    same = 0
    while pids and same < 3:
        now = [activity(pid) for pid in pids]
        same = same + 1 if now == last and all(line.startswith("S") for line in now) else 0
        last = now
        time.sleep(0.01)


def activity(pid: int) -> str:
    """A process's state, and how often it was scheduled."""
    with open(f"/proc/{pid}/status") as file:
        fields = dict(line.split(":\t", 1) for line in file if ":\t" in line)
    return fields["State"] + fields["voluntary_ctxt_switches"] + fields["nonvoluntary_ctxt_switches"]


def private(pid: int) -> int:
    """The bytes of memory that it shares with nobody."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        lines = [line.split() for line in file]
    return 1024 * sum(int(words[1]) for words in lines if words[0] in ("Private_Clean:", "Private_Dirty:"))


def resident() -> int:
    """The bytes of memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


# -- the program -------------------------------------------------------------------------------------


class Server:
    """Measures one contestant, as it is asked to. Each public method is a request."""

    def __init__(self, contestant: Contestant) -> None:
        self._contestant = contestant
        self._pids: list[int] = []
        self._held = 0
        # Servers are started and modules imported by whoever comes first.
        contestant.reaped()
        contestant.answered()
        self._settle()
        self._resident = resident()
        self._children = children()

    def _settle(self) -> None:
        """Waits until what is kept ready is: others are not to be measured beside that."""
        wait_idle(self._contestant.kept())

    def reaped(self) -> float:
        """Seconds from the request until a worker that does nothing has ended and was waited for."""
        begun = time.perf_counter()
        self._contestant.reaped()
        seconds = time.perf_counter() - begun
        self._settle()
        return seconds

    def answered(self) -> float:
        """Seconds from the request until the value of one call in the worker is here."""
        begun = time.perf_counter()
        seconds = self._contestant.answered() - begun
        self._settle()
        return seconds

    def burst(self, jobs: int, count: int) -> float:
        """Seconds for `count` workers, which `jobs` threads start and reap."""
        tickets = iter(range(count))
        errors: list[BaseException] = []

        def work() -> None:
            try:
                for _ in tickets:
                    self._contestant.reaped()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(jobs)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begun
        if errors:
            raise errors[0]
        self._settle()
        return seconds

    def hold(self, count: int) -> float:
        """Has so many more idle workers, and returns the bytes of private memory that each of all takes."""
        more = self._contestant.hold(count)
        wait_idle(more)
        self._pids += more
        self._held += count
        if self._pids:
            return sum(map(private, self._pids)) / len(self._pids)
        return max(0, resident() - self._resident) / self._held

    def kill(self) -> float:
        """Seconds for ending all idle workers."""
        begun = time.perf_counter()
        self._contestant.kill()
        while any(os.path.exists(f"/proc/{pid}") for pid in self._pids):
            time.sleep(0.0005)
        return time.perf_counter() - begun

    def left(self) -> list[int]:
        """The pids of what should have ended and has not within 5 seconds."""
        deadline = time.monotonic() + 5
        while True:
            left = children() - self._children - set(self._contestant.kept())
            if not left or time.monotonic() > deadline:
                return sorted(left)
            time.sleep(0.005)


def touch(mib: int) -> Any:
    """So much memory of this process's own, in small pages, as most of Python's heap is."""
    import mmap

    ballast = mmap.mmap(-1, mib << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ballast.madvise(mmap.MADV_NOHUGEPAGE)
    for offset in range(0, mib << 20, mmap.PAGESIZE):
        ballast[offset] = 1
    return ballast


def serve(name: str, settings: str) -> None:
    """Answers requests until there are no more, each within the time limit: or else the process ends."""
    import resource
    import warnings

    asked = json.loads(settings)
    signal.alarm(asked["timeout"])
    # Forking beside threads of one's own is what the documentation warns of, and not measured here.
    warnings.simplefilter("ignore", DeprecationWarning)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024 + 8 * asked["live"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    contestant = CONTESTANTS[name]()
    try:
        ballast = touch(asked["ballast"]) if asked["ballast"] else None
        if asked["preload"]:
            assert contestant.preload is not None
            contestant.preload(asked["preload"])
        server = Server(contestant)
        reply(None)
        signal.alarm(0)
        for line in sys.stdin:
            signal.alarm(asked["timeout"])
            what, *arguments = json.loads(line)
            reply(getattr(server, what)(*arguments))
            signal.alarm(0)
        del ballast
    except Exception as error:
        # Only what the system lacks is nobody's fault.
        verdict = "refused" if isinstance(error, OSError | MemoryError) else "failed"
        reply({verdict: f"{type(error).__name__}: {error}"})
    signal.alarm(asked["timeout"])
    contestant.kill()


def reply(value: Any) -> None:
    """Answers a request. When nobody is there to hear it, the requests are at their end too."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{json.dumps(value)}\n".encode())
