"""The backends of tractor_host in tractor.

tractor is not needed for development. Install it with what it needs, or name a checkout of it:
`TRACTOR_SOURCE=path/to/tractor make test` (its dependencies must be there then too).
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import PATIENCE, Program, kill_session
from tractor_host import tractor as adapter

pytestmark = pytest.mark.outside

HERE = Path(__file__).parent
SOURCE = os.environ.get("TRACTOR_SOURCE")
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE), *([SOURCE] if SOURCE else []), *sys.path]),
    "PYTHON_COLORS": "0",
}


def what_is_missing() -> str | None:
    """Why there is no tractor."""
    done = subprocess.run(
        [sys.executable, "-c", "import tractor, tractor._child"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else None


MISSING = what_is_missing()
needs_tractor = pytest.mark.skipif(
    MISSING is not None,
    reason=f"there is no tractor here ({MISSING}): install it, or set TRACTOR_SOURCE to a checkout of it",
)


@pytest.fixture(params=adapter.SPAWN_METHODS)
def key(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def a_port() -> int:
    """One that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def run(scenario: str, key: str, tmp_path: Path, **environment: str) -> dict[str, Any]:
    """What a scenario of `tractoring` finds."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    process = subprocess.Popen(
        [sys.executable, HERE / "tractoring.py", scenario, key, str(a_port())],
        env={**ENVIRONMENT, "XDG_RUNTIME_DIR": str(folder), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=2 * PATIENCE)
    except BaseException:
        kill_session(process.pid)
        process.communicate()
        raise
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert found["left"] == []
    assert not list(folder.rglob("*.sock"))
    return found


# -- where there is none ---------------------------------------------------------------------------------


def test_without_tractor_the_module_can_be_imported_and_says_what_it_needs() -> None:
    code = (
        "import sys; sys.modules['tractor'] = None\n"
        "import tractor_host.tractor as adapter\n"
        "assert 'trio' not in sys.modules\n"
        "try:\n    adapter.install()\n"
        "except ImportError as error:\n    print(error.name, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tractor tractor_host.tractor is for programs that use tractor")


def test_every_spawn_method_stands_for_a_backend() -> None:
    import tractor_host as th

    assert set(adapter.SPAWN_METHODS.values()) <= set(th.BACKENDS)
    with pytest.raises(AttributeError, match="nonsense"):
        adapter.nonsense  # noqa: B018


# -- actors ----------------------------------------------------------------------------------------------


@needs_tractor
def test_actors_live_answer_and_have_actors_of_their_own(key: str, tmp_path: Path) -> None:
    found = run("life", key, tmp_path)
    [pid, name, module], [[middle, *_], [below, below_name, below_module]], once, numbers = found["found"]
    assert (name, below_name) == ("first", "below")
    # The function is one of the parent's `__main__`, made again in the actor.
    assert {module, below_module} <= {"__main__", "__mp_main__"}
    assert (once, numbers) == ("once", list(range(5)))
    assert pid == middle
    assert (pid == below) == (key == "subint")


@needs_tractor
def test_an_actor_that_has_been_started_is_registered(key: str, tmp_path: Path) -> None:
    assert run("registered", key, tmp_path)["found"] == [True] * 5


@needs_tractor
def test_actors_that_have_ended_have_left_no_descriptors(key: str, tmp_path: Path) -> None:
    _, second, *_, last = run("descriptors", key, tmp_path)["found"]
    assert last <= second


@needs_tractor
def test_signals_reach_actors_that_can_hear_of_them(key: str, tmp_path: Path) -> None:
    heard = run("signalled", key, tmp_path)["found"]
    assert heard == ("yes" if not key.startswith("subint") or key == "subint_fork" else None)


@needs_tractor
@pytest.mark.parametrize("key", ["tractor_host", "main_thread_forkserver", "subint_forkserver"])
def test_a_process_has_the_title_that_tractor_gives_it(key: str, tmp_path: Path) -> None:
    found = run("has_title", key, tmp_path)["found"]
    if found is None:
        pytest.skip("setproctitle is not installed")
    assert re.fullmatch(r"\w+\[first@\w+\]", found)


@needs_tractor
def test_ours_can_stand_in_for_trio(tmp_path: Path) -> None:
    found = run("stand_in", "trio", tmp_path, TRACTOR_HOST_TRIO="tractor_host")
    assert found["found"] == "tractor_host"


@needs_tractor
def test_nothing_else_can_stand_in_for_trio() -> None:
    code = "import tractor_host.tractor; tractor_host.tractor.install()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**ENVIRONMENT, "TRACTOR_HOST_TRIO": "trio"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ValueError: TRACTOR_HOST_TRIO is 'trio', not one of tractor_host, " in done.stderr


FRAMES = """
import inspect
from tractor_host.tractor import _frames
import tractor

assert tractor.log.stack is _frames.stack is not inspect.stack


def both():
    return inspect.stack(), _frames.stack()


def told(found):
    return [(one.frame, one.filename, one.function) for one in found]


theirs, ours = both()
assert told(theirs) == told(ours)
"""


@needs_tractor
def test_tractor_looks_at_frames_without_their_source(program: Callable[..., Program]) -> None:
    command = [sys.executable, program(FRAMES).path]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_tractor
def test_what_an_actor_raises_comes_back(key: str, tmp_path: Path) -> None:
    assert run("failure", key, tmp_path)["found"] == [True, True]


@needs_tractor
def test_who_leaves_before_it_is_answered_does_not_end_the_registrar(key: str, tmp_path: Path) -> None:
    assert run("unanswered", key, tmp_path)["found"] == "here"


@needs_tractor
def test_an_actor_can_run_in_asyncio(key: str, tmp_path: Path) -> None:
    assert run("asyncio_inside", key, tmp_path)["found"] == "first"


@needs_tractor
def test_an_actor_that_dies_before_it_has_connected_is_told_at_once(key: str, tmp_path: Path) -> None:
    text = run("boot_death", key, tmp_path)["found"]
    assert text.startswith("actor 'first' ended before it had connected to its parent: raised ValueError: ")
    assert "NO SUCH LEVEL" in text


@needs_tractor
def test_a_start_that_is_cancelled_leaves_nothing(key: str, tmp_path: Path) -> None:
    assert run("boot_cancelled", key, tmp_path)["found"] == [True, 0]


@needs_tractor
def test_an_actor_that_does_not_listen_is_ended_by_the_ladder(key: str, tmp_path: Path) -> None:
    kind, rung, seconds, code = run("deaf", key, tmp_path)["found"]
    assert kind == "killed"
    assert rung in ("unwind", "unblock", "destroy", "sigterm", "sigkill")
    assert code != 0
    # tractor waits half a second for an answer, and the ladder's first rung as long.
    assert seconds < 10


@needs_tractor
def test_the_socket_files_of_the_dead_are_removed_and_no_others(key: str, tmp_path: Path) -> None:
    during, after = run("sockets", key, tmp_path)["found"]
    assert during == ["below", "goes", "registry", "stays"]
    assert after == ["registry", "stays"]


@needs_tractor
@pytest.mark.parametrize("key", ["tractor_host", "main_thread_forkserver", "subint_forkserver"])
def test_options_of_spawn_are_options_of_a_start(key: str, tmp_path: Path) -> None:
    refused, found = run("options", key, tmp_path)["found"]
    assert re.match(rf"the spawn method '{key}' takes no 'pass_fds' in proc_kwargs", refused)
    assert found == ["yes", "/"]


# -- programs that know nothing of it --------------------------------------------------------------------

PROGRAM = """
import os
import sys
import tractor
import trio


async def whoami():
    return [os.getpid() != int(os.environ["PARENT"]), __name__]


async def main():
    os.environ["PARENT"] = str(os.getpid())
    async with tractor.open_nursery(registry_addrs=[("127.0.0.1", int(sys.argv[1]))]) as nursery:
        portal = await nursery.run_in_actor(whoami)
        print(await portal.wait_for_result(), tractor.spawn._spawn._spawn_method)


if __name__ == "__main__":
    trio.run(main)
"""


@needs_tractor
def test_a_program_that_knows_nothing_of_it_runs_on_our_backends(program: Callable[..., Program]) -> None:
    path = program(PROGRAM).path
    command = [sys.executable, "-m", "tractor_host.tractor", path, str(a_port())]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[True, '__mp_main__'] tractor_host\n"), done.stderr


@needs_tractor
def test_the_program_in_the_guide_prints_what_it_says(program: Callable[..., Program]) -> None:
    guide = (HERE.parent / "docs" / "guide" / "tractor.md").read_text()
    block = re.search(
        r"^\$ cat program.py\n(.*)^\$ python program.py\n(.*?)^```", guide, re.MULTILINE | re.DOTALL
    )
    assert block is not None
    # At the port that tractor takes by default, others may be.
    code = block[1].replace('start_method="', f'registry_addrs=[("127.0.0.1", {a_port()})], start_method="')
    command = [sys.executable, program(code).path]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout) == (0, block[2]), done.stderr


@needs_tractor
def test_the_program_must_be_named() -> None:
    command = [sys.executable, "-m", "tractor_host.tractor"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr[:6]) == (1, "usage:")


SUITE = """
import subprocess
import sys

import pytest
import tractor
import trio


@pytest.mark.skipon_spawn_backend("subint", "main_thread_forkserver", reason="not of ours")
def test_a_backend(start_method, reg_addr, is_forking_spawner):
    async def main():
        async with tractor.open_nursery(registry_addrs=[reg_addr]) as nursery:
            portal = await nursery.start_actor("a", enable_modules=["string"])
            [(_, process, _)] = nursery._children.values()
            assert type(process).__module__ == "tractor_host.tractor._process"
            await nursery.cancel()

    assert not is_forking_spawner
    trio.run(main)


def test_programs_that_a_test_starts_have_them_too():
    code = "import tractor; print('tractor_host' in tractor.spawn._spawn._methods)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\\n", done.stderr
"""


@needs_tractor
def test_the_plugin_runs_a_test_suite_of_tractor_on_our_backends(key: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SUITE)
    plugins = ("-p", "tractor._testing.pytest", "-p", "tractor_host.tractor", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, f"--spawn-backend={key}", "test_it.py"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


# -- the debugger ----------------------------------------------------------------------------------------

DEBUGGED = """
import os
import sys
import pdbp
import tractor
import trio


async def stops():
    where = "over there"
    pdbp.set_trace() if sys.argv[2] == "plain" else await tractor.pause()
    print("goes on:", where, flush=True)


async def main():
    async with tractor.open_nursery(
        registry_addrs=[("127.0.0.1", int(sys.argv[1]))], debug_mode=True, loglevel="critical"
    ) as nursery:
        await (await nursery.run_in_actor(stops)).wait_for_result()


if __name__ == "__main__":
    trio.run(main)
"""


@needs_tractor
def test_a_debugger_s_prompt_in_an_actor_has_the_terminal(key: str, program: Callable[..., Program]) -> None:
    path = program(DEBUGGED).path
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "tractor_host.tractor", str(path), str(a_port()), "plain"]
    pid = os.fork()
    if pid == 0:
        try:
            os.login_tty(slave)
            os.execve(command[0], command, {**ENVIRONMENT, "TRACTOR_SPAWN_METHOD": key})
        finally:
            os._exit(127)
    os.close(slave)
    seen = ""
    try:
        seen = _until(master, "(Pdb+)")
        os.write(master, b"p where.upper()\n")
        seen += _until(master, "'OVER THERE'")
        os.write(master, b"c\n")
        seen += _until(master, "goes on: over there")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, seen
    finally:
        kill_session(pid)
        os.close(master)


def _until(terminal: int, text: str) -> str:
    seen = ""
    deadline = time.monotonic() + PATIENCE
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {text!r} in {seen}"
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # whoever had it is gone
            piece = b""
        assert piece, f"no {text!r} in {seen}"
        seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", piece.decode(errors="replace"))
    return seen
