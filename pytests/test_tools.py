"""`tractor-host ps` and `reap`, from outside: what they show and do, and what nobody can do to a host by its socket."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from conftest import Program, Running, kill_session, pid_is_gone
from helpers import PATIENCE, blocked, thread_names, until

pytestmark = pytest.mark.outside

NOBODY = 65534
#: A program that spawns nothing but what makes it a host.
IDLE = """
    import sys
    import tractor_host as th
    if __name__ == "__main__":
        th.statistics()
        th.spawn("os:getpid", backend="subint").result()
        print("ready", flush=True)
        sys.stdin.read()
"""


class Stage:
    """A runtime folder of a test's own, hosts that use it, and the tools."""

    def __init__(
        self, folder: Path, launcher: Path, program: Callable[..., Program], stack: ExitStack
    ) -> None:
        self.folder = folder
        self.launcher = launcher
        self.program = program
        self.stack = stack
        self.started = 0

    def env(self, **more: str) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
        return {**inherited, "TRACTOR_HOST_CONTROL": str(self.folder), **more}

    def host(self, source: str = IDLE, launcher: str = "python", **env: str) -> Running:
        """Starts a program, which runs until its stdin is closed, and waits until it says that it is ready."""
        self.started += 1
        made = self.program(source, name=f"host_{self.started}.py", launcher=launcher)
        running = made.start(stdin=subprocess.PIPE, env=self.env(**env))
        self.stack.callback(self.end, running)
        assert running.stdout is not None
        line = running.stdout.readline()
        assert line == "ready\n", line + (running.stderr.read() if running.stderr and not line else "")
        return running

    def end(self, running: Running) -> None:
        """Sees to it that nothing of a host is left."""
        if running.poll() is None:
            kill_session(running.pid)
        running.communicate()

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [self.launcher, *words]
        return subprocess.run(
            command,
            env=self.env(**env),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
        )

    def ps(self) -> dict[str, Any]:
        found = self.run("ps", "--json")
        assert (found.returncode, found.stderr) == (0, "")
        view = json.loads(found.stdout)
        assert isinstance(view, dict)
        return view

    def hosts(self) -> dict[int, dict[str, Any]]:
        return {host["pid"]: host for host in self.ps()["hosts"]}

    def reap(self, *words: str) -> tuple[int, dict[str, Any]]:
        found = self.run("reap", "--json", *words)
        assert found.stderr == ""
        return found.returncode, json.loads(found.stdout)

    def files(self) -> list[str]:
        return sorted(os.listdir(self.folder)) if self.folder.exists() else []

    def socket(self) -> str:
        (name,) = [name for name in self.files() if name.endswith(".sock")]
        return str(self.folder / name)


@pytest.fixture
def stage(tmp_path: Path, launcher: Path, program: Callable[..., Program]) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(tmp_path / "run", launcher, program, stack)


def start_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def frame(request: bytes, payload: int = 0) -> bytes:
    return b"TH\0\x01" + struct.pack("<IQ", len(request), payload) + request


def connect(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(PATIENCE)
    made.connect(path)
    return made


def answer(client: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    with suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


STATUS = frame(b'{"type": "status"}')


def forge(
    folder: Path,
    pid: int,
    start: int,
    processes: list[tuple[int, int]],
    files: Sequence[Path] = (),
    **head: Any,
) -> Path:
    """A record as a host writes it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    own = [
        {"path": str(path), "device": os.lstat(path).st_dev, "inode": os.lstat(path).st_ino} for path in files
    ]
    text = json.dumps(
        {
            "version": 1,
            "pid": pid,
            "start": start,
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "namespace": os.readlink("/proc/self/ns/pid"),
            "executable": "/bin/forged",
            "argv": ["forged", "host"],
            "files": own,
            **head,
        }
    )
    lines = [f"{text:<4095}\n"]
    lines += [f"{f'{pid} {start} forkserver worker-{pid}':<127}\n" for pid, start in processes]
    record = folder / f"{pid}-{start}.host"
    record.write_text("".join(lines))
    record.chmod(0o600)
    return record


@pytest.fixture
def sleeper() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Makes a process that does nothing, and runs some code before that."""
    with ExitStack() as stack:

        def make(before: str = "") -> subprocess.Popen[bytes]:
            code = f"import signal, sys, time\n{before}\nprint('up', flush=True)\ntime.sleep(1000)"
            made = stack.enter_context(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
            stack.callback(made.kill)
            assert made.stdout is not None
            assert made.stdout.readline() == b"up\n"
            # Python does not notice a signal that comes in the moment before it begins to sleep.
            blocked(Path(f"/proc/{made.pid}/task/{made.pid}"))
            return made

        yield make


def a_dead_host() -> tuple[int, int]:
    """The process id and start of one that has been and gone."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        found = process.pid, start_of(process.pid)
        process.kill()
    return found


def test_nothing_runs(stage: Stage) -> None:
    shown = stage.run("ps")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "no host is running\n", "")
    assert stage.ps()["hosts"] == []
    told = stage.run("reap")
    assert (told.returncode, told.stdout, told.stderr) == (
        0,
        "nothing is left of any host that is gone\n",
        "",
    )
    # Who only looks makes nothing.
    assert not stage.folder.exists()


TREE = """
    import sys, time
    import tractor_host as th

    def middle():
        inner = th.spawn("time:sleep", 1000, backend="exec", name="below")
        copy = th.spawn("time:sleep", 1000, backend="fork", name="copied")
        time.sleep(1000)

    def spin_here():
        while True:
            pass

    if __name__ == "__main__":
        held = [
            th.spawn(middle, name="middle"),
            th.spawn(spin_here, backend="subint", name="busy"),
            th.spawn("time:sleep", 1000, backend="subint_forkserver", name="apart"),
            th.spawn("time:sleep", 1000, backend="fork", name="bad \\x1b[31m name"),
        ]
        while len(th.workers()) < 6 or any(worker.state == "booting" for worker in th.workers()):
            time.sleep(0.01)
        print("ready", flush=True)
        sys.stdin.read()
"""

HOST_KEYS = {
    "pid",
    "argv",
    "executable",
    "state",
    "problem",
    "process",
    "call",
    "wait",
    "statistics",
    "workers",
}
WORKER_KEYS = {
    "id",
    "parent",
    "name",
    "target",
    "backend",
    "pid",
    "thread",
    "state",
    "age",
    "process",
    "call",
    "wait",
}


@pytest.mark.parametrize("launcher_name", ["python", "tractor-host"])
def test_a_tree(stage: Stage, launcher_name: str) -> None:
    running = stage.host(TREE, launcher=launcher_name)
    view = stage.ps()
    assert (view["version"], view["problems"]) == (1, [])
    assert abs(view["time"] - time.time()) < PATIENCE
    (host,) = view["hosts"]
    assert set(host) == HOST_KEYS
    assert (host["pid"], host["state"], host["problem"]) == (running.pid, "up", None)
    assert host["argv"][-1].endswith("host_1.py")
    # What a worker runs by itself is not counted here.
    assert host["statistics"]["live"] == 5
    assert host["call"]["file"].endswith("host_1.py")
    assert host["call"]["function"] == "<module>"
    assert set(host["process"]) == {"state", "age", "rss", "cpu"}
    workers = {worker["name"]: worker for worker in host["workers"]}
    assert all(set(worker) == WORKER_KEYS for worker in workers.values())
    assert set(workers) == {"middle", "below", "copied", "busy", "apart", "bad \x1b[31m name"}
    assert workers["below"]["parent"] == workers["copied"]["parent"] == workers["middle"]["id"]
    assert workers["middle"]["parent"] is None
    assert {worker["state"] for worker in workers.values()} == {"running"}
    busy = workers.pop("busy")
    assert (busy["pid"], busy["call"]["function"]) == (None, "spin_here")
    assert f"th:{busy['name']}\n" == Path(f"/proc/{running.pid}/task/{busy['thread']}/comm").read_text()
    assert busy["process"]["rss"] is None
    for worker in workers.values():
        assert worker["process"]["rss"] > 1 << 20, worker
        assert start_of(worker["pid"]) > 0

    text = stage.run("ps").stdout
    lines = [re.sub(r"  +\(?(\d+|PID)\b.*", "", line) for line in text.splitlines()]
    assert lines[0] == "HOST / WORKER"
    assert [line for line in lines if "below" in line or "copied" in line] == [
        "│  ├─ below",
        "│  └─ copied",
    ], text
    assert "├─ middle" in lines
    assert "└─ bad ?[31m name" in lines
    assert "\x1b" not in text
    assert "spin_here" in text
    assert f"({busy['thread']})" in text


def test_text_is_cut_to_the_width(stage: Stage) -> None:
    stage.host(TREE)
    for width in (200, 80, 40, 10, 1):
        lines = stage.run("ps", COLUMNS=str(width)).stdout.splitlines()
        assert len(lines) == 8
        assert max(map(len, lines)) <= width, lines


def test_many_hosts_and_what_is_none(stage: Stage) -> None:
    """A worker process is not a host of its own, whatever it spawns; a program that it starts is one."""
    source = """
        import subprocess, sys, time
        import tractor_host as th

        def middle():
            th.spawn("time:sleep", 1000, backend="fork", name="below").wait()

        if __name__ == "__main__":
            worker = th.spawn(middle, name="middle")
            while len(th.workers()) < 2:
                time.sleep(0.01)
            print("ready", flush=True)
            sys.stdin.read()
    """
    running = [stage.host(source), stage.host(source), stage.host()]
    found = stage.hosts()
    assert set(found) == {host.pid for host in running}
    assert {host["state"] for host in found.values()} == {"up"}
    assert [len(found[host.pid]["workers"]) for host in running] == [2, 2, 0]
    assert len(stage.files()) == 6


def test_a_host_whose_gil_is_held(stage: Stage) -> None:
    source = """
        import tractor_host as th
        if __name__ == "__main__":
            worker = th.spawn("time:sleep", 1000, name="worker")
            print("ready", flush=True)
            sum(range(10**15))  # held
    """
    running = stage.host(source)
    until(lambda: (stage.hosts()[running.pid]["call"] or {}).get("line") == 6, "the call")
    host = stage.hosts()[running.pid]
    assert (host["state"], [worker["name"] for worker in host["workers"]]) == ("up", ["worker"])


def test_a_stopped_host_is_shown_by_its_record(stage: Stage) -> None:
    running = stage.host(TREE)
    known = {
        worker["name"]: worker["pid"] for worker in stage.hosts()[running.pid]["workers"] if worker["pid"]
    }
    os.kill(running.pid, signal.SIGSTOP)
    until(lambda: stage.hosts()[running.pid]["state"] == "stopped")
    host = stage.hosts()[running.pid]
    assert host["statistics"] is None
    assert host["process"]["state"] == "T"
    found = {worker["name"]: worker["pid"] for worker in host["workers"]}
    assert known.items() <= {**found, "bad \x1b[31m name": found["bad ?[31m name"]}.items()
    # Those of the fork server are its processes too.
    assert {worker["backend"] for worker in host["workers"]} >= {"fork-server", "forkserver", "exec", "fork"}
    os.kill(running.pid, signal.SIGCONT)
    until(lambda: stage.hosts()[running.pid]["state"] == "up")


def test_a_host_that_does_not_answer(stage: Stage) -> None:
    """It is waited for, but not for long."""
    me = os.getpid()
    record = forge(stage.folder, me, start_of(me), [(me, start_of(me))])
    with record.open("r+") as file, socket.socket(socket.AF_UNIX) as listener:
        fcntl.lockf(file, fcntl.LOCK_EX)
        listener.bind(str(record.with_suffix(".sock")))
        listener.listen()
        (host,) = stage.ps()["hosts"]
        assert (host["pid"], host["state"], host["problem"]) == (me, "silent", "it does not answer")
        assert [worker["pid"] for worker in host["workers"]] == [me]
        assert stage.reap("--force")[0] == 0
        assert record.exists()


def test_modes_and_removal(stage: Stage) -> None:
    running = stage.host()
    modes = {name.rpartition(".")[2]: (stage.folder / name).lstat().st_mode for name in stage.files()}
    assert stat.S_IMODE(stage.folder.stat().st_mode) == 0o700
    assert {kind: stat.S_IMODE(mode) for kind, mode in modes.items()} == {"sock": 0o600, "host": 0o600}
    assert stat.S_ISSOCK(modes["sock"])
    assert stage.files() == [f"{running.pid}-{start_of(running.pid)}.{kind}" for kind in ("host", "sock")]
    _out, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, err, stage.files()) == (0, "", [])


ENDINGS = {
    "exit": "sys.exit(3)",
    "error": "raise RuntimeError",
    "interrupt": "raise KeyboardInterrupt",
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "words", [["python"], ["tractor-host", "run"], ["tractor-host", "run", "--main", "subint"]]
)
def test_it_goes_with_the_host(stage: Stage, words: list[str], ending: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import os, sys\nimport tractor_host as th\n"
        "if __name__ == '__main__':\n"
        "    th.spawn('os:getpid').result()\n"
        "    print(len(os.listdir(os.environ['TRACTOR_HOST_CONTROL'])), flush=True)\n"
        f"    {ENDINGS[ending]}\n"
    )
    program = str(Path(sys.executable).with_name(words[0]))
    command = [program, *words[1:], str(script)]
    ended = subprocess.run(command, env=stage.env(), capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.stdout, stage.files()) == ("2\n", [])


def test_a_program_that_replaces_itself(stage: Stage) -> None:
    """The process is the same, so its files have the same names."""
    source = """
        import os, sys
        import tractor_host as th
        if __name__ == "__main__":
            th.spawn("os:getpid").result()
            if len(sys.argv) == 1:
                os.execv(sys.executable, [sys.executable, __file__, "again"])
            print("ready", flush=True)
            sys.stdin.read()
    """
    running = stage.host(source)
    assert stage.hosts()[running.pid]["argv"][-1] == "again"
    assert len(stage.files()) == 2


def test_it_can_be_declined(stage: Stage) -> None:
    running = stage.host(TRACTOR_HOST_CONTROL="0")
    assert not any("socket" in os.readlink(f) for f in Path(f"/proc/{running.pid}/fd").iterdir())
    assert stage.ps()["hosts"] == []


def _of_somebody_else(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)


def _open_to_others(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)


def _a_link(folder: Path) -> None:
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)


def _a_file(folder: Path) -> None:
    folder.write_text("")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
@pytest.mark.parametrize("spoil", [_of_somebody_else, _open_to_others, _a_link, _a_file])
def test_a_folder_that_cannot_be_trusted(stage: Stage, spoil: Callable[[Path], None]) -> None:
    """It is not used, the program is none the worse, and one line says so."""
    spoil(stage.folder)
    running = stage.host()
    assert not stage.folder.is_dir() or not list(stage.folder.iterdir())
    _out, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 0
    assert err.count("\n") == 1
    assert "will not see this program" in err
    assert str(stage.folder) in err
    for tool in ("ps", "reap"):
        shown = stage.run(tool)
        assert str(stage.folder) in shown.stderr
    assert shown.returncode == 1


def test_no_folder_can_be_made(stage: Stage) -> None:
    running = stage.host(TRACTOR_HOST_CONTROL="/proc/there/is/none")
    _out, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, err.count("\n")) == (0, 1)


def test_the_usual_places(stage: Stage, tmp_path: Path) -> None:
    """The user's runtime folder, if it is the user's."""
    env = {key: value for key, value in stage.env().items() if key != "TRACTOR_HOST_CONTROL"}
    base = tmp_path / ("a-runtime-folder-with-a-name-that-is-longer-than-any-address-of-a-socket-" + "x" * 60)
    base.mkdir(mode=0o700)
    made = stage.program(IDLE, name="usual.py")
    command = [str(stage.launcher), "ps", "--json"]
    for user in (os.geteuid(), NOBODY):
        os.chown(base, user, -1)
        env["XDG_RUNTIME_DIR"] = str(base)
        running = made.start(stdin=subprocess.PIPE, env=env)
        stage.stack.callback(stage.end, running)
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
        hosts = {host["pid"]: host["state"] for host in json.loads(found.stdout)["hosts"]}
        assert hosts[running.pid] == "up"
        names = sorted(os.listdir(base / "tractor-host"))
        assert any(name.startswith(f"{running.pid}-") for name in names) == (user == os.geteuid())
        running.communicate(timeout=PATIENCE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_other_users_are_not_answered(stage: Stage) -> None:
    running = stage.host()
    path = stage.socket()
    for place in (*Path(path).parents[:5],):
        if place != Path("/"):
            stage.stack.callback(place.chmod, stat.S_IMODE(place.stat().st_mode))
            place.chmod(stat.S_IMODE(place.stat().st_mode) | 0o011)
    code = """
import os, socket, sys
client = socket.socket(socket.AF_UNIX)
if sys.argv[2] != "0":
    os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
try:
    client.connect(sys.argv[1])
    client.sendall(bytes.fromhex(sys.argv[3]))
    print(len(client.recv(100)))
except OSError as error:
    print(error.errno)
"""

    def ask(user: int) -> int:
        words = [sys.executable, "-I", "-S", "-c", code, path, str(user), STATUS.hex()]
        return int(subprocess.run(words, capture_output=True, check=True, timeout=PATIENCE).stdout)

    assert ask(0) == 100
    # By the mode of the socket's file,
    assert ask(NOBODY) == errno.EACCES
    # and, were that lost, by what the kernel says of who connects.
    os.chmod(path, 0o666)
    assert ask(NOBODY) in (0, errno.EPIPE, errno.ECONNRESET)
    assert ask(0) == 100
    assert running.poll() is None


BAD = {
    "nothing": b"",
    "garbage": b"GET / HTTP/1.1\r\n\r\n" * 1000,
    "half a frame": STATUS[:9],
    "a long claim": b"TH\0\x01" + struct.pack("<IQ", 1 << 24, 1 << 34) + b"x" * 100_000,
    "too long a claim": b"TH\0\x01" + struct.pack("<IQ", (1 << 32) - 1, (1 << 64) - 1),
    "no JSON": frame(b"{"),
    "unknown": frame(b'{"type": "nonsense"}'),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_requests(stage: Stage, what: str) -> None:
    running = stage.host()
    with connect(stage.socket()) as client:
        with suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(BAD[what])
            client.shutdown(socket.SHUT_WR)
        told = answer(client)
    assert b'"refused"' in told if what in ("no JSON", "unknown") else told == b""
    assert stage.hosts()[running.pid]["state"] == "up"


def test_a_flood_of_clients_who_do_nothing(stage: Stage) -> None:
    """They are sent away, the others are served, and the host holds only so many."""
    running = stage.host()
    fds = Path(f"/proc/{running.pid}/fd")
    before = len(list(fds.iterdir()))
    path = stage.socket()
    with ExitStack() as stack:
        for _ in range(300):
            client = socket.socket(socket.AF_UNIX)
            stack.callback(client.close)
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect(path)
            assert len(list(fds.iterdir())) < before + 16
        assert until(lambda: stage.hosts()[running.pid]["state"] == "up")
    until(lambda: len(list(fds.iterdir())) == before, "all descriptors given back")


def test_clients_who_dawdle(stage: Stage) -> None:
    """One that asks byte by byte and ones that never read: each has its time, and no more."""
    source = IDLE.replace(
        "th.statistics()", 'held = [th.spawn("time:sleep", 1000, name="n" * 4000) for _ in range(80)]'
    )
    running = stage.host(source)
    fds = Path(f"/proc/{running.pid}/fd")
    before = len(list(fds.iterdir()))
    path = stage.socket()
    with ExitStack() as stack:
        deaf = [stack.enter_context(connect(path)) for _ in range(4)]
        for client in deaf:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.sendall(STATUS)
        slow = stack.enter_context(connect(path))
        ended = False
        for byte in STATUS[:-1] + b" " * 10_000:
            try:
                slow.send(bytes([byte]))
            except BrokenPipeError, ConnectionResetError:
                ended = True
                break
            assert stage.hosts()[running.pid]["state"] == "up"
        assert ended
        until(lambda: len(list(fds.iterdir())) == before, "all descriptors given back")
        assert all(len(answer(client)) > 0 for client in deaf)


def test_a_host_without_descriptors(stage: Stage) -> None:
    """It is shown by its record, and does not turn in circles."""
    source = """
        import os, resource, sys
        import tractor_host as th
        if __name__ == "__main__":
            th.spawn("os:getpid").result()
            top = os.open("/dev/null", os.O_RDONLY)
            resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            held = []
            try:
                while True:
                    held.append(os.dup(top))
            except OSError:
                pass
            if not held:
                held.append(top)
            print("ready", flush=True)
            sys.stdin.readline()
            os.close(held[0])
            print("again", flush=True)
            sys.stdin.readline()
            for fd in held[1:]:
                os.close(fd)
    """
    running = stage.host(source)
    assert running.stdin is not None
    assert running.stdout is not None
    assert stage.hosts()[running.pid]["state"] == "silent"
    tasks = {(task / "comm").read_text(): task for task in Path(f"/proc/{running.pid}/task").iterdir()}
    status = (tasks["th-control\n"] / "status").read_text()
    (turns,) = re.findall(r"^voluntary_ctxt_switches:\t(\d+)", status, re.MULTILINE)
    assert int(turns) < 20
    print("go on", file=running.stdin, flush=True)
    assert running.stdout.readline() == "again\n"
    until(lambda: stage.hosts()[running.pid]["state"] == "up")
    _out, err = running.communicate("\n", timeout=PATIENCE)
    assert (running.returncode, err) == (0, "")


def test_whoever_serves_goes_when_nobody_asks(stage: Stage) -> None:
    running = stage.host()
    for _ in range(2):
        assert "th-control" not in thread_names(running.pid)
        stage.ps()
        # It waits some seconds for the next one who asks.
        assert "th-control" in thread_names(running.pid)
        until(lambda: "th-control" not in thread_names(running.pid), "its end")


def test_forked_children_neither_serve_nor_remove(stage: Stage) -> None:
    source = """
        import os, sys
        import tractor_host as th
        if __name__ == "__main__":
            th.spawn("os:getpid", backend="fork").result()
            for leave in (os._exit, sys.exit):
                child = os.fork()
                if not child:
                    leave(0)
                os.waitpid(child, 0)
            os.makedirs(sys.argv[1] if len(sys.argv) > 1 else "/tmp", exist_ok=True)
            child = os.fork()
            if not child:
                sys.stdin.read()
                os._exit(0)
            print("ready", flush=True)
            sys.stdin.read()
            os.waitpid(child, 0)
    """
    running = stage.host(source)
    assert [host["state"] for host in stage.hosts().values()] == ["up"]
    # A child that outlives its parent holds the socket, and nobody serves it.
    os.kill(running.pid, signal.SIGKILL)
    running.wait(timeout=PATIENCE)
    (host,) = stage.ps()["hosts"]
    assert (host["pid"], host["state"]) == (running.pid, "dead")
    code, told = stage.reap("--force")
    assert (code, told["left"], stage.files()) == (0, False, [])


def record_of(running: Running, stage: Stage) -> dict[int, tuple[int, str]]:
    text = (stage.folder / f"{running.pid}-{start_of(running.pid)}.host").read_text()
    lines = [line.split() for line in text[4096:].splitlines() if line.strip()]
    return {int(line[0]): (int(line[1]), line[2]) for line in lines}


def test_the_record_is_kept(stage: Stage) -> None:
    source = """
        import sys, time
        import tractor_host as th
        if __name__ == "__main__":
            print("ready", flush=True)
            for line in sys.stdin:
                options = {"cancel_timeout": 0}
                workers = [th.spawn("time:sleep", 1000, backend=wall, **options) for wall in line.split()]
                print(*(worker.pid for worker in workers), flush=True)
                sys.stdin.readline()
                for worker in workers:
                    worker.kill()
                print("over", flush=True)
    """
    running = stage.host(source)
    assert running.stdin is not None
    assert running.stdout is not None
    backends = ["forkserver", "fork", "exec", "subint_forkserver"]
    for _ in range(3):
        print(*backends, *backends, file=running.stdin, flush=True)
        pids = [int(pid) for pid in running.stdout.readline().split()]
        expected = {pid: (start_of(pid), kind) for pid, kind in zip(pids, backends * 2, strict=True)}
        # An idle process is noted as such, until the supervisor has seen what it has become.
        until(lambda expected=expected: expected.items() <= record_of(running, stage).items(), "the record")
        print("kill", file=running.stdin, flush=True)
        assert running.stdout.readline() == "over\n"
        until(lambda: {kind for _, kind in record_of(running, stage).values()} <= {"fork-server", "blank"})
    # Lines are used again.
    assert (stage.folder / f"{running.pid}-{start_of(running.pid)}.host").stat().st_size < 4096 + 30 * 128


def test_a_killed_host_is_reaped(stage: Stage) -> None:
    running = stage.host(TREE)
    alive = stage.host()
    pids = list(record_of(running, stage))
    os.kill(running.pid, signal.SIGKILL)
    running.wait(timeout=PATIENCE)
    assert all(pid_is_gone(pid) for pid in pids)
    assert stage.hosts()[running.pid]["state"] == "dead"
    assert "dead" in stage.run("ps").stdout

    before = stage.files()
    for _ in range(2):
        code, told = stage.reap()
        (dead,) = told["hosts"]
        assert (code, told["forced"], told["left"], dead["pid"]) == (1, False, True, running.pid)
        assert (dead["processes"], len(dead["files"])) == ([], 2)
        assert stage.files() == before
    assert "--force" in stage.run("reap").stdout
    done = stage.run("reap", "--force")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing is left" in done.stdout
    assert set(stage.hosts()) == {alive.pid}
    assert stage.reap() == (0, {"version": 1, "forced": False, "hosts": [], "problems": [], "left": False})


def test_the_next_host_removes_the_files_of_a_dead_one(stage: Stage) -> None:
    running = stage.host()
    os.kill(running.pid, signal.SIGKILL)
    running.wait(timeout=PATIENCE)
    assert len(stage.files()) == 2
    alive = stage.host()
    assert all(name.startswith(f"{alive.pid}-") for name in stage.files())


def test_what_is_left_is_ended(
    stage: Stage, sleeper: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    quick, stubborn, stopped = sleeper(), sleeper("signal.signal(signal.SIGINT, signal.SIG_IGN)"), sleeper()
    os.kill(stopped.pid, signal.SIGSTOP)
    processes = [(process.pid, start_of(process.pid)) for process in (quick, stubborn, stopped)]
    shm = Path(f"/dev/shm/th-test-{os.getpid()}")
    shm.write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    gone = tmp_path / "gone"
    gone.write_text("")
    replaced = tmp_path / "replaced"
    replaced.write_text("")
    record = forge(stage.folder, *a_dead_host(), processes, [shm, empty, gone, replaced])
    gone.unlink()
    replaced.rename(tmp_path / "moved")
    replaced.write_text("of somebody else")

    # The next host leaves it to the user to end processes.
    stage.host()
    code, told = stage.reap()
    (dead,) = told["hosts"]
    assert (code, [process["outcome"] for process in dead["processes"]]) == (1, ["found"] * 3)
    assert dead["files"] == [str(shm), str(empty), str(record)]
    assert all(process.poll() is None for process in (quick, stubborn, stopped))
    text = stage.run("reap").stdout
    assert f"process {quick.pid} (forkserver `worker-{quick.pid}`): is still there" in text

    code, told = stage.reap("--force", "--grace", "5")
    (dead,) = told["hosts"]
    outcomes = {process["pid"]: process["outcome"] for process in dead["processes"]}
    assert outcomes == {
        quick.pid: "ended by SIGINT",
        stubborn.pid: "ended by SIGKILL",
        stopped.pid: "ended by SIGINT",
    }
    assert (code, told["left"]) == (0, False)
    assert [process.wait(timeout=PATIENCE) for process in (quick, stubborn, stopped)] == [-2, -9, -2]
    assert not any(path.exists() for path in (shm, empty, record))
    assert replaced.read_text() == "of somebody else"


def test_strangers_are_not_ended(stage: Stage, sleeper: Callable[..., subprocess.Popen[bytes]]) -> None:
    """The number alone does not say that it is the process that was made."""
    stranger, above, ours = sleeper(), sleeper(), sleeper()
    start = start_of(stranger.pid)
    records = [
        forge(stage.folder, *a_dead_host(), [(stranger.pid, start - 1), (above.pid, start + 10**6)]),
        # Of another boot, when the same times meant others; and of another container.
        forge(stage.folder, 2, 3, [(stranger.pid, start)], boot="another"),
        forge(stage.folder, 4, 5, [(stranger.pid, start)], namespace="pid:[1]"),
    ]
    # One whose process is there has not lost its right to its own, whatever has become of its lock.
    kept = forge(stage.folder, ours.pid, start_of(ours.pid), [(above.pid, start_of(above.pid))])
    code, told = stage.reap("--force")
    assert (code, [host["processes"] for host in told["hosts"]]) == (0, [[], [], []])
    assert all(process.poll() is None for process in (stranger, above, ours))
    assert not any(record.exists() for record in records)
    assert kept.exists()


def test_what_is_no_record(stage: Stage) -> None:
    stage.folder.mkdir(mode=0o700)
    for name, text in {"1-1.host": "", "2-2.host": "{}" * 5000, "3-3.host": "\0" * 10_000}.items():
        (stage.folder / name).write_text(text)
    (stage.folder / "4-4.host").symlink_to("/etc/passwd")
    os.mkfifo(stage.folder / "5-5.host")
    (stage.folder / "6-6.host").mkdir()
    assert len(stage.ps()["problems"]) == 6
    code, told = stage.reap("--force")
    assert (code, len(told["problems"]), len(stage.files())) == (1, 6, 6)
    running = stage.host()
    assert stage.hosts()[running.pid]["state"] == "up"


def test_a_line_that_is_no_process(stage: Stage) -> None:
    record = forge(stage.folder, *a_dead_host(), [])
    with record.open("a") as file:
        file.write(f"{'0 1 forkserver zero':<127}\n{'-1 1 forkserver all':<127}\n{'x':<127}\n{'1':<127}\n")
    _code, told = stage.reap()
    assert told["hosts"][0]["problems"] == ["4 lines of its record cannot be read"]
    assert stage.reap("--force")[0] == 0
    assert stage.files() == []


class Watched:
    """`ps --watch` in a terminal."""

    def __init__(self, stage: Stage, *words: str, rows: int = 24, columns: int = 80, **env: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(slave)
        self.shown = b""
        self.slave = slave
        command = [stage.launcher, "ps", "--watch", *words]
        environment = {**stage.env(TERM="xterm", **env)}
        # Its terminal is this one, so that its keys are signals.
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self) -> None:
        while select.select([self.master], [], [], 0)[0]:
            self.shown += os.read(self.master, 1 << 16)

    def sees(self, what: bytes) -> None:
        """Waits until it has been drawn since the last time."""

        def drawn() -> bool:
            self.read()
            return what in self.shown

        until(drawn, f"{what!r} in {self.shown!r}")
        self.shown = self.shown[self.shown.rindex(what) + len(what) :]

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait(self) -> int:
        """Its exit code; and the terminal is as it was."""

        def ended() -> bool:
            self.read()
            return self.process.poll() is not None

        until(ended, "its end")
        self.read()
        assert self.shown.endswith(b"\x1b[?7h\x1b[?25h\x1b[?1049l"), self.shown
        assert termios.tcgetattr(self.slave) == self.before
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def watch(stage: Stage) -> Iterator[Callable[..., Watched]]:
    with ExitStack() as stack:

        def make(*words: str, **options: Any) -> Watched:
            watched = Watched(stage, *words, **options)
            stack.callback(watched.close)
            return watched

        yield make


def test_watch_until_q(stage: Stage, watch: Callable[..., Watched]) -> None:
    running = stage.host(TREE)
    watched = watch("--interval", "0.1")
    watched.sees(b"\x1b[?1049h\x1b[?25l")
    watched.sees(b"1 host, 6 workers")
    watched.sees(b"q quit")
    # Raw: what is typed is not shown, and comes at once.
    assert not termios.tcgetattr(watched.slave)[3] & (termios.ECHO | termios.ICANON)
    assert termios.tcgetattr(watched.slave)[3] & termios.ISIG
    running.communicate(timeout=PATIENCE)
    watched.sees(b"0 hosts, 0 workers")
    watched.press(b"q")
    assert watched.wait() == 0


@pytest.mark.parametrize("leave", ["ctrl-c", "SIGTERM", "SIGHUP"])
def test_watch_until_it_is_interrupted(watch: Callable[..., Watched], leave: str) -> None:
    watched = watch("--interval", "1000")
    watched.sees(b"no host is running")
    if leave == "ctrl-c":
        watched.press(b"\x03")
    else:
        watched.process.send_signal(signal.Signals[leave])
    assert watched.wait() == {"ctrl-c": 130, "SIGTERM": 143, "SIGHUP": 129}[leave]


def test_watch_is_suspended_and_continued(watch: Callable[..., Watched]) -> None:
    watched = watch("--interval", "1000")
    watched.sees(b"no host is running")
    watched.press(b"\x1a")
    watched.sees(b"\x1b[?1049l")
    until(lambda: " T " in Path(f"/proc/{watched.process.pid}/stat").read_text(), "the stop")
    assert termios.tcgetattr(watched.slave) == watched.before
    watched.process.send_signal(signal.SIGCONT)
    watched.sees(b"\x1b[?1049h")
    watched.sees(b"no host is running")
    watched.press(b"q")
    assert watched.wait() == 0


def test_watch_follows_the_size_and_scrolls(stage: Stage, watch: Callable[..., Watched]) -> None:
    stage.host(TREE)
    watched = watch("--interval", "1000", rows=6, columns=40, NO_COLOR="1")
    # Three lines of the list fit; four are below.
    watched.sees("↑↓ 0 above, 4 below".encode())
    watched.press(b"j")
    watched.sees("↑↓ 1 above, 3 below".encode())
    watched.press(b"\x1b[6~")
    watched.sees("↑↓ 4 above, 0 below".encode())
    watched.press(b"\x1b[5~")
    watched.sees("↑↓ 1 above, 3 below".encode())
    watched.press(b"k")
    watched.sees("↑↓ 0 above, 4 below".encode())
    for line in watched.shown.decode().splitlines():
        assert len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)) <= 40
    watched.resize(24, 120)
    watched.sees("└─ bad ?[31m name".encode())
    watched.resize(1, 1)
    watched.sees(b"\x1b[J")
    watched.resize(24, 80)
    watched.sees(b"q quit")
    watched.press(b"q")
    assert watched.wait() == 0
    assert not re.search(rb"\x1b\[[1-9][0-9;]*m", watched.shown)


def test_colours_are_for_terminals_that_want_them(stage: Stage, watch: Callable[..., Watched]) -> None:
    stage.host()
    coloured = watch()
    coloured.sees(b"\x1b[7mHOST / WORKER")
    plain = watch(NO_COLOR="1")
    plain.sees(b"HOST / WORKER")
    assert b"\x1b[7m" not in plain.shown
    for watched in (coloured, plain):
        watched.press(b"q")
        assert watched.wait() == 0


def test_watch_into_a_pipe(stage: Stage) -> None:
    running = stage.host()
    command = [stage.launcher, "ps", "--watch", "--json", "--interval", "0.1"]
    with subprocess.Popen(command, env=stage.env(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            (host,) = json.loads(process.stdout.readline())["hosts"]
            assert host["pid"] == running.pid
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(timeout=PATIENCE) == 130


@pytest.mark.parametrize(
    "words",
    [
        ["ps", "--nonsense"],
        ["ps", "more"],
        ["ps", "--interval"],
        ["ps", "--interval", "0"],
        ["ps", "--interval", "nan"],
        ["reap", "--grace", "-1"],
        ["reap", "123"],
    ],
)
def test_misuse(stage: Stage, words: list[str]) -> None:
    shown = stage.run(*words)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "tractor-host help" in shown.stderr


def diagnosis(stage: Stage, **env: str) -> tuple[int, dict[str, Any]]:
    found = stage.run("doctor", "--json", **env)
    assert found.stderr == ""
    told = json.loads(found.stdout)
    assert set(told) == {"version", "verdict", "findings"}
    findings = {finding.pop("name"): finding for finding in told["findings"]}
    assert all(set(finding) == {"verdict", "what", "cost"} for finding in findings.values())
    assert all((finding["cost"] is None) == (finding["verdict"] == "good") for finding in findings.values())
    assert {"good": 0, "degraded": 1, "unusable": 2}[told["verdict"]] == found.returncode
    return found.returncode, findings


def test_doctor_for_programs(stage: Stage, tmp_path: Path) -> None:
    _, findings = diagnosis(stage)
    assert {"python", "ladder", "layout", "kernel", "pidfd", "clone3", "cgroup", "seccomp"} < set(findings)
    assert findings["python"]["what"].startswith("3.14.")
    assert findings["runtime folder"] == {"verdict": "good", "what": str(stage.folder), "cost": None}
    assert findings["layout"]["verdict"] == "good"
    assert "_json" in findings["own GIL"]["what"]
    # What is missing, and that it costs something.
    code, findings = diagnosis(stage, TRACTOR_HOST_CONTROL="0", TRACTOR_HOST_PRELOAD="json,there_is_none")
    assert code == 1
    assert "there_is_none" in findings["preload"]["what"]
    assert "json" not in findings["preload"]["what"]
    assert findings["runtime folder"]["verdict"] == "degraded"
    text = stage.run("doctor", TRACTOR_HOST_CONTROL="0").stdout
    assert "so: `tractor-host ps`" in text
    # What it can't do without.
    (tmp_path / "tractor_host.py").write_text("__version__ = '0.0.1'\n")
    code, findings = diagnosis(stage, PYTHONPATH=str(tmp_path))
    assert (code, findings["tractor_host"]["verdict"]) == (2, "unusable")


def test_doctor_sees_limits(stage: Stage) -> None:
    limits = ["sh", "-c", 'ulimit -n 200; exec "$0" doctor --json', str(stage.launcher)]
    found = subprocess.run(limits, env=stage.env(), capture_output=True, text=True, timeout=PATIENCE)
    findings = {finding["name"]: finding for finding in json.loads(found.stdout)["findings"]}
    assert (found.returncode, findings["descriptors"]["verdict"]) == (1, "degraded")
    assert "200" in findings["descriptors"]["what"]
