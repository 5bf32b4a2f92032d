"""The pytest plugin, against suites that misbehave: each is run by a pytest of its own, as a user would."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent
from xml.etree import ElementTree

import pytest

from conftest import kill_session
from helpers import until
from tractor_host import _native

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.outside

#: Longer than any run takes, and than what is stuck is given.
LIMIT = 60
#: What each run has, unless it says otherwise.
PLAIN = ("-p", "no:randomly", "-p", "no:cacheprovider")
#: Ways to be stuck that nothing but the end of the process ends.
STUCK = {
    "keeps-the-gil": "sum(range(10**12))",
    "c-without-gil": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)",
    "blocks-signals": """
        import signal, time
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))
        time.sleep(1000)
    """,
    "swallows-all": """
        while True:
            try:
                while True: pass
            except BaseException: pass
    """,
}


@pytest.fixture(autouse=True)
def no_process_is_left(pytester: pytest.Pytester) -> Iterator[None]:
    """Nothing that runs in the test's folder outlives its pytest."""
    yield
    try:
        until(lambda: not running_in(pytester.path), "the end of what a suite has started", 10)
    finally:
        for pid in running_in(pytester.path):
            os.kill(pid, signal.SIGKILL)


def running_in(folder: Path) -> list[int]:
    """The processes whose directory that is, this one and its fork server's left out."""
    found = []
    ours = {os.getpid(), *_native.fork_server_owns()["processes"]}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder and int(process.name) not in ours:
                found.append(int(process.name))
        except OSError:  # it has ended, or is a zombie
            continue
    return found


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    """The suite's run; its parts are in the report of a failed test."""
    return pytester.runpytest_subprocess(*PLAIN, *args, timeout=LIMIT)


def suite(pytester: pytest.Pytester, head: str = "", **tests: str) -> None:
    """A module with these tests, by the code of each."""
    functions = [
        f"def test_{name}(request):\n{indent(dedent(code), '    ')}\n" for name, code in tests.items()
    ]
    head = "import os, pytest, tractor_host as th\nkept = []\n" + head
    pytester.makepyfile(test_it=head + "\n" + "\n".join(functions))


def text_of(result: pytest.RunResult) -> str:
    return "\n".join([*result.outlines, *result.errlines])


def cases(path: Path) -> dict[str, str]:
    """What a junit report says of each test."""
    found = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        found[case.attrib["name"]] = " ".join(sorted({child.tag for child in case})) or "passed"
    return found


# -- quiet until asked -----------------------------------------------------------------------------------

QUIET = """
import os, signal, sys, threading

def test_nothing_is_there():
    loaded = {name for name in sys.modules if name.startswith("tractor_host")}
    assert loaded <= {"tractor_host", "tractor_host.pytest_plugin"}, loaded
    assert signal.getsignal(signal.SIGRTMAX - 1) == signal.SIG_DFL
    assert len(os.listdir("/proc/self/task")) == 1
    assert not [name for name in os.environ if name.startswith("TRACTOR_HOST")]
"""


def test_it_is_quiet_until_asked(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TRACTOR_HOST")]:
        monkeypatch.delenv(name)
    pytester.makepyfile(QUIET)
    result = run(pytester, "-v")
    result.assert_outcomes(passed=1)
    assert "tractor-host" in text_of(result)  # among the plugins
    run(pytester, "-p", "no:tractor_host").assert_outcomes(passed=1)
    left_out = run(pytester, "-p", "no:tractor_host", "--spawn-timeout=1")
    assert left_out.ret == pytest.ExitCode.USAGE_ERROR


# -- backends --------------------------------------------------------------------------------------------


def test_the_backend_is_that_of_every_spawn_that_names_none(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import tractor_host as th

        def test_it(spawn_backend):
            with th.spawn("os:getpid") as worker:
                print(f"backend {spawn_backend} {worker.backend}")
        """
    )
    for args, backend in (
        ((), "forkserver"),
        (("--spawn-backend=subint",), "subint"),
        (("--spawn-backend=trio",), "exec"),
    ):
        result = run(pytester, "-s", *args)
        result.assert_outcomes(passed=1)
        result.stdout.fnmatch_lines([f"*backend {backend} {backend}*"])
    pytester.makeini("[pytest]\nspawn_backend = fork")
    run(pytester, "-s").stdout.fnmatch_lines(["*backend fork fork*"])
    run(pytester, "-s", "--spawn-backend=subint").stdout.fnmatch_lines(["*backend subint subint*"])


@pytest.mark.parametrize(
    ("backend", "blanks", "why"),
    [
        ("nonsense", "1", "ERROR: --spawn-backend: unknown backend 'nonsense'; there are 'forkserver', *"),
        (
            "forkserver",
            "x",
            "ERROR: --spawn-backend: 'forkserver' is not available here: ValueError: TRACTOR_HOST_BLANKS must *",
        ),
    ],
)
def test_a_backend_that_is_not_available_is_a_usage_error(
    backend: str, blanks: str, why: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACTOR_HOST_BLANKS", blanks)
    suite(pytester, ok="pass")
    result = run(pytester, f"--spawn-backend={backend}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([why])
    assert "Traceback" not in text_of(result)


SKIPPED = """
import pytest
pytestmark = [pytest.mark.skipon_spawn_backend("subint", reason="of the module")]

def test_module(): pass

@pytest.mark.skipon_spawn_backend("fork", "subint", reason="of the function")
def test_function(): pass

@pytest.mark.skipon_spawn_backend("exec", "trio")
class TestClass:
    def test_class(self): pass

    @pytest.mark.skipon_spawn_backend("fork")
    def test_method(self): pass
"""


@pytest.mark.parametrize(
    ("backend", "skipped"),
    [
        ("subint", ["of the function", "of the module", "of the module", "of the module"]),
        ("subint_fork", ["not for --spawn-backend=fork", "of the function"]),
        ("exec", ["not for --spawn-backend=exec"] * 2),
        ("forkserver", []),
    ],
)
def test_the_nearest_marker_that_names_the_backend_skips(
    backend: str, skipped: list[str], pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(SKIPPED)
    result = run(pytester, f"--spawn-backend={backend}", "-rs", "-v")
    result.assert_outcomes(passed=4 - len(skipped), skipped=len(skipped))
    found = re.findall(r"SKIPPED \[(\d+)\] \S+ (.*)", text_of(result))
    assert sorted(reason for count, reason in found for _ in range(int(count))) == skipped


@pytest.mark.parametrize(
    ("marker", "why"),
    [
        ("skipon_spawn_backend('nonsense')", "*::test_ok: skipon_spawn_backend: unknown backend 'nonsense'*"),
        ("skipon_spawn_backend()", "*::test_ok: skipon_spawn_backend takes the names of backends*"),
        (
            "skipon_spawn_backend('subint', reson='why')",
            "*::test_ok: skipon_spawn_backend takes the names of backends*",
        ),
        (
            "allow_leaks('nonsense')",
            "*::test_ok: allow_leaks: unknown kind 'nonsense'; there are 'workers', *",
        ),
        ("allow_leaks(match='(')", "*::test_ok: allow_leaks: match='(' is no pattern*"),
        ("spawn_timeout()", "*::test_ok: spawn_timeout takes a number of seconds*"),
        ("spawn_timeout('soon')", "*::test_ok: spawn_timeout is a number of seconds, not 'soon'*"),
    ],
)
def test_a_wrong_marker_is_a_usage_error(marker: str, why: str, pytester: pytest.Pytester) -> None:
    suite(pytester, head=f"pytestmark = pytest.mark.{marker}", ok="pass")
    result = run(pytester, "--spawn-leaks")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {why}"])


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--spawn-timeout=soon",), "*--spawn-timeout is a number of seconds, not 'soon'"),
        (
            ("--spawn-timeout=-1",),
            "*--spawn-timeout is a number of seconds, not negative and not infinite: '-1'",
        ),
        (("--spawn-isolate=folder",), "*--spawn-isolate is `module`, `class` or `test`, not 'folder'"),
        (("-o", "spawn_leaks_allow=fish", "--spawn-leaks"), "*spawn_leaks_allow: unknown kind 'fish'*"),
    ],
)
def test_a_wrong_option_is_a_usage_error(args: tuple[str, ...], why: str, pytester: pytest.Pytester) -> None:
    suite(pytester, ok="pass")
    result = run(pytester, *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([why])


# -- fixtures --------------------------------------------------------------------------------------------

NURSERIES = """
import os, pytest

async def talk(nursery):
    portal = await nursery.run_in_actor(os.getpid)
    assert await portal.result() != os.getpid()

@pytest.mark.anyio
async def test_anyio(actor_nursery, anyio_backend):
    await talk(actor_nursery)
"""
FOR_ANYIO = """
@pytest.mark.anyio
async def test_short(nursery, anyio_backend):
    await talk(nursery)
"""
FOR_TRIO = """
import trio

@pytest.mark.trio
async def test_trio(actor_nursery, nursery):
    assert isinstance(nursery, trio.Nursery)
    await talk(actor_nursery)
"""


@pytest.mark.parametrize(("more", "args"), [(FOR_ANYIO, ("-p", "no:trio")), (FOR_TRIO, ())])
def test_nurseries_for_every_event_loop(more: str, args: tuple[str, ...], pytester: pytest.Pytester) -> None:
    pytester.makepyfile(NURSERIES + more)
    result = run(pytester, "--spawn-leaks", "--spawn-timeout=40", *args)
    result.assert_outcomes(passed=4 if more is FOR_ANYIO else 3)


def test_events_since_the_test_began(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import tractor_host as th

        def test_before():
            th.spawn("os:getpid", name="earlier").result(30)

        def test_events(tractor_host_events):
            assert tractor_host_events() == []
            th.spawn("os:getpid", name="later").result(30)
            assert [event.kind for event in tractor_host_events("exit", "spawn")] == ["spawn", "exit"]
            assert 0
        """
    )
    result = run(pytester)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*- tractor-host events -*", "spawn: worker `later` *"])
    assert "earlier" not in text_of(result)


# -- time limits -----------------------------------------------------------------------------------------

#: Ways to be stuck that an exception in the main thread ends.
LATE = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "without-sigalrm": """
        import signal, time
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGINT, signal.SIGTERM])
        time.sleep(1000)
    """,
    "lock": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "worker": "th.spawn('time:sleep', 1000, backend='subint', cancel_timeout=0).wait()",
    "process": "import subprocess; subprocess.run(['sleep', '1000'])",
    "trio": "import trio; trio.run(trio.sleep_forever)",
    "asyncio": "import asyncio; asyncio.run(asyncio.sleep(1000))",
}


@pytest.mark.parametrize("shape", LATE)
def test_a_late_test_fails_where_it_is_and_the_session_goes_on(shape: str, pytester: pytest.Pytester) -> None:
    suite(
        pytester,
        before="pass",
        late="print('its words')\n" + dedent(LATE[shape]),
        after="assert th.workers() == []; assert not open(f'/proc/self/task/{os.getpid()}/children').read()",
    )
    result = run(pytester, "--spawn-timeout=1.5", "--spawn-timeout-grace=30")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*Failed: time limit of 1.5 s exceeded",
            "*- Captured stdout call -*",
            "its words",
            "*- tractor-host dump -*",
            "*no end within 1.5 s",
            "*test_it.py:* in test_late",
            "FAILED test_it.py::test_late - *",
        ]
    )


@pytest.mark.parametrize("shape", STUCK)
def test_what_nothing_ends_ends_the_session_with_its_report_written(
    shape: str, pytester: pytest.Pytester
) -> None:
    start = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)\nos.write(1, b'its words')\n"
    suite(pytester, before="pass", stuck=start + dedent(STUCK[shape]), after="pass")
    result = run(pytester, "--spawn-timeout=0.5", "--spawn-timeout-grace=0.7", "--junit-xml=report.xml", "-v")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "test_it.py::test_before PASSED*",
            "test_it.py::test_stuck FAILED*",
            "time limit of 0.5 s exceeded, and it could not be made to end",
            "*- Captured stdout -*",
            "its words",
            "*- tractor-host dump -*",
            "*test_it.py:* in test_stuck",
            "FAILED test_it.py::test_stuck - *",
            "*! time limit of 0.5 s exceeded in test_it.py::test_stuck, which could not be made to end !*",
        ]
    )
    assert text_of(result).count("test_before PASSED") == 1
    assert cases(pytester.path / "report.xml") == {"test_before": "passed", "test_stuck": "failure"}


def test_trio_survives_a_limit_that_is_over_while_its_loop_runs(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import threading, anyio, pytest, trio

        def test_idle(): trio.run(trio.sleep_forever)
        def test_uninterruptible(): trio.run(trio.to_thread.run_sync, threading.Event().wait)
        def test_run(): trio.run(trio.sleep, 0)

        @pytest.fixture
        def anyio_backend(): return "trio"

        @pytest.mark.trio
        async def test_nursery():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                try: await trio.sleep_forever()
                finally: print("cleaned up")

        @pytest.mark.trio
        async def test_busy():
            while True: pass

        @pytest.mark.trio
        async def test_trio(): await trio.sleep(0)

        @pytest.mark.anyio
        async def test_guest(): await anyio.sleep_forever()

        @pytest.mark.anyio
        async def test_anyio(): await anyio.sleep(0)
        """
    )
    result = run(pytester, "-W", "error", "--spawn-timeout=0.5", "--spawn-timeout-grace=2", "-v")
    result.assert_outcomes(failed=5, passed=3)
    assert text_of(result).count("cleaned up\n") == 1
    for name in ("run", "trio", "anyio"):
        result.stdout.fnmatch_lines([f"*::test_{name} PASSED*"])


def test_a_limit_holds_where_no_handler_can_be_installed(pytester: pytest.Pytester) -> None:
    suite(pytester, before="pass", stuck="while True: pass", after="pass")
    pytester.makepyfile(
        in_a_thread="""
        import sys, threading, pytest
        threading.Thread(target=pytest.main, args=(sys.argv[1:],)).start()
        """
    )
    done = pytester.run(sys.executable, "in_a_thread.py", *PLAIN, "--spawn-timeout=0.5", timeout=LIMIT)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.assert_outcomes(passed=1, failed=1)


def test_a_limit_holds_where_its_handler_is_taken_away(pytester: pytest.Pytester) -> None:
    stuck = "import signal\nfor s in range(35, 65): signal.signal(s, signal.SIG_DFL)\nwhile True: pass"
    suite(pytester, before="pass", stuck=stuck, after="pass")
    run(pytester, "--spawn-timeout=0.5", "--junit-xml=report.xml").assert_outcomes(passed=1, failed=1)
    assert cases(pytester.path / "report.xml") == {"test_before": "passed", "test_stuck": "failure"}


def test_a_fork_that_runs_on_is_not_taken_for_the_session(pytester: pytest.Pytester) -> None:
    suite(
        pytester,
        forks="kept.append(os.fork())",
        after="if kept[0]: assert os.waitpid(kept[0], 0)[1] == 0",
        last="pass",
    )
    result = run(
        pytester, "--spawn-timeout=20", "--spawn-leaks", "-o", "spawn_leaks_allow=processes", "-W", "ignore"
    )
    assert result.ret == 0
    assert text_of(result).count("3 passed") == 2


@pytest.mark.parametrize("where", ["setup", "teardown"])
@pytest.mark.parametrize("how", ["while True: pass", STUCK["keeps-the-gil"]])
def test_fixtures_count_and_are_named(where: str, how: str, pytester: pytest.Pytester) -> None:
    code = [how, "yield"] if where == "setup" else ["yield", how]
    head = "@pytest.fixture\ndef slow():\n" + "".join(f"    {line}\n" for line in code)
    suite(pytester, head=head, it="request.getfixturevalue('slow')" if where == "teardown" else "pass")
    pytester.makeini("[pytest]\nusefixtures = slow\nspawn_timeout = 0.5\nspawn_timeout_grace = 0.7")
    result = run(pytester)
    result.assert_outcomes(errors=1, passed=1 if where == "teardown" else 0)
    result.stdout.fnmatch_lines([f"*ERROR at {where} of test_it*"])


@pytest.mark.parametrize(
    "how", [STUCK["keeps-the-gil"], STUCK["swallows-all"].strip()], ids=["gil", "swallows"]
)
def test_a_late_test_whose_teardown_does_not_end_ends_the_session(
    how: str, pytester: pytest.Pytester
) -> None:
    code = indent(
        dedent(f"""
        import time
        yield
        {indent(dedent(how), " " * 8).strip()}
    """),
        "    ",
    )
    suite(
        pytester,
        head=f"@pytest.fixture\ndef slow():{code}\n",
        late="request.getfixturevalue('slow')\nimport time; time.sleep(1000)",
        after="pass",
    )
    result = run(pytester, "--spawn-timeout=0.5", "--spawn-timeout-grace=1", "--junit-xml=report.xml")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1, errors=1)
    assert cases(pytester.path / "report.xml") == {"test_late": "error"}  # the later of the two


@pytest.mark.parametrize("args", [(), ("--spawn-isolate=module",)])
def test_a_test_that_has_stopped_its_process_goes_on_when_its_time_is_over(
    args: tuple[str, ...], pytester: pytest.Pytester
) -> None:
    stopped = "import signal, time\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(1000)"
    suite(pytester, stopped=stopped, after="pass")
    result = run(pytester, "--spawn-timeout=0.5", "--spawn-timeout-grace=30", *args)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*Failed: time limit of 0.5 s exceeded", "*test_it.py:* in test_stopped"])


def test_a_test_that_ends_late_by_itself_has_failed_all_the_same(pytester: pytest.Pytester) -> None:
    # The signal waits for the end of what is in C.
    suite(pytester, late="import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 3_000_000)", after="pass")
    result = run(pytester, "--spawn-timeout=0.2", "--spawn-timeout-grace=40")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        ["*- tractor-host dump -*", "FAILED test_it.py::test_late - *time limit of 0.2 s*"]
    )


def test_a_marker_has_the_last_word(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import time, pytest

        @pytest.mark.spawn_timeout(0)
        def test_none(): time.sleep(0.8)

        @pytest.mark.spawn_timeout(30)
        def test_long(): time.sleep(0.8)

        def test_late(): time.sleep(1000)
        """
    )
    run(pytester, "--spawn-timeout=0.4").assert_outcomes(passed=2, failed=1)
    pytester.makepyfile(
        "import pytest, time\n@pytest.mark.spawn_timeout(0.2)\ndef test_late(): time.sleep(1000)"
    )
    run(pytester).assert_outcomes(failed=1)


def test_its_own_tree_is_ended_and_nobody_else_s(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import subprocess, time, pytest
        import tractor_host as th

        @pytest.fixture(scope="module")
        def others():
            with th.spawn("time:sleep", 1000) as worker, subprocess.Popen(["sleep", "1000"]) as process:
                yield worker, process
                process.kill()

        mine = []

        def test_late(others):
            for backend in ("subint", "forkserver", "exec"):
                mine.append(th.spawn("time:sleep", 1000, backend=backend, cancel_timeout=0))
            mine.append(subprocess.Popen(["sleep", "1000"]))
            time.sleep(1000)

        def test_after(others):
            assert [worker.wait(30).kind for worker in mine[:-1]] == ["killed"] * 3
            assert mine[-1].wait(30) == -9
            assert others[0].exit is None
            assert others[1].poll() is None
        """
    )
    run(pytester, "--spawn-timeout=3", "--spawn-timeout-grace=30").assert_outcomes(passed=1, failed=1)


def test_the_leak_check_s_own_waiting_does_not_count(pytester: pytest.Pytester) -> None:
    threads = "import threading, time\nthreading.Thread(target=time.sleep, args=({},), daemon=True).start()"
    suite(pytester, leaks=threads.format(1000), fine=threads.format(2), after="pass")
    result = run(pytester, "--spawn-leaks", "--spawn-timeout=0.7", "--spawn-timeout-grace=0.5")
    result.assert_outcomes(passed=3, errors=1)
    assert "time limit" not in text_of(result)


AGAIN = """
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    for _ in range(2):
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    return True
"""


def test_a_test_that_is_run_once_more_has_its_limit_anew(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(AGAIN)
    suite(pytester, late_once="kept.append(0)\nimport time\ntime.sleep(1000 if len(kept) == 1 else 0.5)")
    result = run(pytester, "--spawn-timeout=0.8", "--spawn-timeout-grace=30")
    result.assert_outcomes(passed=1)
    suite(pytester, late_twice="kept.append(0)\nimport time\ntime.sleep(1000)")
    run(pytester, "--spawn-timeout=0.8", "--spawn-timeout-grace=30").assert_outcomes(failed=1)


def test_there_is_no_limit_in_a_debugger(pytester: pytest.Pytester) -> None:
    suite(
        pytester,
        it="import time; request.config.hook.pytest_enter_pdb(config=request.config, pdb=None); time.sleep(1)",
    )
    run(pytester, "--spawn-timeout=0.3").assert_outcomes(passed=1)


def test_a_fork_beside_the_timer_does_not_warn(pytester: pytest.Pytester) -> None:
    suite(
        pytester,
        forks="""
            for _ in range(20):
                if (pid := os.fork()) == 0:
                    os._exit(0)
                os.waitpid(pid, 0)
        """,
        late="if os.fork() == 0: os._exit(0)\nimport time; time.sleep(1000)",
    )
    result = run(pytester, "-W", "error", "--spawn-timeout=2")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*Failed: time limit of 2 s exceeded", "*test_it.py:* in test_late"])


def test_that_nobody_looks_any_more_is_told(pytester: pytest.Pytester) -> None:
    suite(
        pytester,
        kills="""
            import signal
            from pathlib import Path
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if (folder / "comm").read_text() == "th-watch\\n" and (folder / "cwd").readlink() == Path.cwd():
                        os.kill(int(folder.name), signal.SIGKILL)
                except OSError:  # it has ended, or is a zombie
                    pass
        """,
        after="pass",
        last="pass",
    )
    result = run(pytester, "--spawn-timeout=30")
    assert result.ret == 0
    assert text_of(result).count("the process that looks after the time limits is gone") >= 1


# -- groups in processes of their own --------------------------------------------------------------------

GROUPS = {
    "test_a": """
        import os, pytest, warnings

        @pytest.fixture(scope="session", autouse=True)
        def group():
            yield os.getpid()
            with open("groups", "a") as file:
                print("a group's end", file=file)

        def test_fine(group):
            assert group == os.getpid() != os.getppid()
            warnings.warn("its warning")

        def test_wrong(): assert [1, 2] == [1, 3]
        def test_skipped(): pytest.skip("so it is")

        @pytest.mark.xfail
        def test_expected(): assert 0
    """,
    "test_b": """
        import os, pytest, signal

        def test_first(): pass
        def test_segfault():
            os.write(1, b"its words")
            os.kill(os.getpid(), signal.SIGSEGV)
        def test_second(): pass
        def test_leaves(): os._exit(7)
        def test_stuck(): sum(range(10**12))
        def test_third(): pass
    """,
}


@pytest.mark.parametrize("args", [(), ("-n2",), ("--capture=sys",)])
def test_groups_go_on_whatever_becomes_of_one(args: tuple[str, ...], pytester: pytest.Pytester) -> None:
    pytester.makepyfile(**GROUPS)
    result = run(
        pytester,
        *("--spawn-isolate=module", "--spawn-timeout=2", "--spawn-timeout-grace=0.5"),
        *("--junit-xml=report.xml", "-p", "no:faulthandler", *args),
    )
    result.assert_outcomes(passed=4, failed=4, skipped=1, xfailed=1, warnings=1)
    text = text_of(result)
    for line in (
        "At index 1 diff: 2 != 3",
        "the process of this test was ended by SIGSEGV",
        "the process of this test left with exit code 7",
        "time limit of 2 s exceeded, and it could not be made to end",
        "UserWarning: its warning",
    ):
        assert line in text
    if not args:
        result.stdout.fnmatch_lines(["*- Captured stdout -*", "its words"])
    found = cases(pytester.path / "report.xml")
    assert found.pop("test_skipped") == found.pop("test_expected") == "skipped"
    failed = {"test_wrong", "test_segfault", "test_leaves", "test_stuck"}
    assert {name for name, how in found.items() if how == "failure"} == failed
    assert (pytester.path / "groups").read_text()


@pytest.mark.parametrize(("by", "count"), [("module", 1), ("class", 2), ("test", 4)])
def test_a_group_is_what_is_asked_for(by: str, count: int, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os

        def note():
            with open("pids", "a") as file:
                print(os.getpid(), file=file)

        def test_a(): note()
        def test_b(): note()

        class TestC:
            def test_c(self): note()
            def test_d(self): note()
        """
    )
    pytester.makeini(f"[pytest]\nspawn_isolate = {by}")
    run(pytester).assert_outcomes(passed=4)
    assert len(set((pytester.path / "pids").read_text().split())) == count


def test_the_end_of_an_isolated_session(pytester: pytest.Pytester) -> None:
    head = "@pytest.fixture(scope='module', autouse=True)\ndef f():\n    yield\n    open('torn_down', 'w').close()\n"
    suite(pytester, head=head, fails="assert 0", after="pass")
    result = run(pytester, "--spawn-isolate=module", "-x")
    result.assert_outcomes(failed=1, warnings=0)
    result.stdout.fnmatch_lines(["!*stopping after 1 failures !*"])
    assert (pytester.path / "torn_down").exists()
    suite(pytester, exits="pytest.exit('enough', returncode=9)", after="pass")
    result = run(pytester, "--spawn-isolate=module")
    assert result.ret == 9
    result.stdout.fnmatch_lines(["!*Exit: enough !*"])


def test_workers_of_an_isolated_test(pytester: pytest.Pytester) -> None:
    suite(
        pytester,
        works="for backend in ('subint', 'forkserver', 'fork', 'exec'): assert th.spawn(abs, -1, backend=backend).result(30) == 1",
        dies="import signal; kept.append(th.spawn('time:sleep', 1000)); "
        "__import__('subprocess').Popen(['sleep', '1000'], start_new_session=True); os.kill(os.getpid(), signal.SIGKILL)",
        after="assert th.workers() == []",
    )
    result = run(pytester, "--spawn-isolate=module", "--spawn-leaks")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["the process of this test was ended by SIGKILL"])


def test_a_conftest_that_spawns_is_in_the_way_of_no_group(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("import tractor_host as th\nth.preload(['json'])\nth.spawn('os:getpid').result()")
    suite(
        pytester,
        fine="pass",
        leaks="kept.append(open('/dev/null'))",
        late="while True: pass",
        spawns="with pytest.raises(RuntimeError, match='spawn from there'): th.spawn('os:getpid')",
    )
    result = run(pytester, "--spawn-isolate=module", "--spawn-leaks", "--spawn-timeout=2", "--capture=sys")
    result.assert_outcomes(passed=3, failed=1, errors=1)
    result.stdout.fnmatch_lines(["*- tractor-host dump -*", "*test_it.py:* in test_late"])
    result.stdout.fnmatch_lines(["left behind: fd *made at test_it.py:* in test_leaks"])


def test_a_second_session_of_a_process_has_groups_too(pytester: pytest.Pytester) -> None:
    suite(pytester, it="if len(os.environ['LATE']) == 2: import time; time.sleep(1000)")
    pytester.makepyfile(
        twice="""
        import os, sys, pytest
        os.environ["LATE"] = "1"
        assert pytest.main([*sys.argv[1:], "--spawn-timeout=20"]) == 0
        assert pytest.main([*sys.argv[1:], "--spawn-timeout=20", "--spawn-isolate=test"]) == 0
        os.environ["LATE"] = "12"
        sys.exit(pytest.main([*sys.argv[1:], "--spawn-timeout=0.5", "--spawn-isolate=test"]))
        """
    )
    done = pytester.run(sys.executable, "twice.py", *PLAIN, "test_it.py", timeout=LIMIT)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*Failed: time limit of 0.5 s exceeded"])


def test_isolated_tests_are_not_run_once_more_which_is_told(pytester: pytest.Pytester) -> None:
    # As pytest-rerunfailures does.
    pytester.makeconftest(
        """
        def pytest_addoption(parser): parser.addoption("--reruns", type=int)

        def pytest_configure(config): config.pluginmanager.register(object(), "rerunfailures")
        """
    )
    suite(pytester, it="pass")
    run(pytester, "--spawn-isolate=module").assert_outcomes(passed=1)
    result = run(pytester, "--spawn-isolate=module", "--reruns=2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--spawn-isolate can't run a test once more" in text_of(result)
    suite(pytester, head="pytestmark = pytest.mark.flaky(reruns=1)\n", it="pass")
    assert run(pytester, "--spawn-isolate=module").ret == pytest.ExitCode.USAGE_ERROR
    run(pytester, "--spawn-timeout=20", "--reruns=2").assert_outcomes(passed=1)


@pytest.mark.parametrize("more", [(), ("-x",)])
def test_coverage_has_what_groups_have_run(more: tuple[str, ...], pytester: pytest.Pytester) -> None:
    pytest.importorskip("coverage")
    pytester.makepyfile(measured="def f(first):\n    if first:\n        return 1\n    return 2\n")
    suite(
        pytester,
        head="import measured\n",
        first="assert measured.f(True)",
        second="assert not measured.f(False) == 2",
        third="pass",
    )
    measured = ("-m", "coverage", "run", "--include=measured.py", "-m", "pytest")
    args = ("-p", "no:faulthandler", "--spawn-isolate=module", *more)
    result = pytester.run(sys.executable, *measured, *PLAIN, *args, timeout=LIMIT)
    result.assert_outcomes(passed=1 if more else 2, failed=1)
    told = pytester.run(sys.executable, "-m", "coverage", "report", timeout=LIMIT)
    told.stdout.fnmatch_lines(["measured.py * 100%"])


# -- leaks -----------------------------------------------------------------------------------------------

#: What is left behind, by code, and how that is told.
LEAKS = {
    "worker": (
        "kept.append(th.spawn('time:sleep', 1000, backend='subint'))",
        "worker `sleep-*` (subint), made at {}",
    ),
    "process": (
        "import subprocess; kept.append(subprocess.Popen(['sleep', '1000']))",
        "process * (sleep 1000), made at {}",
    ),
    "orphan": (
        "import subprocess; subprocess.run('setsid sleep 1000 & :', shell=True)",
        "process * (sleep 1000)",
    ),
    "zombie": (
        "if (pid := os.fork()) == 0: os._exit(0)\nos.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)",
        "process * (*), which has ended and was not waited for, made at {}",
    ),
    "fd": ("os.open('/dev/null', os.O_RDONLY)", "fd * (/dev/null), made at {}"),
    "file": ("kept.append(open(__file__))", "fd * (*/test_it.py), made at {}"),
    "pipe": ("os.pipe()", "fd * (pipe:*), made at {}"),
    "thread": (
        "import threading, time; threading.Thread(target=time.sleep, args=(1000,), daemon=True, name='napper').start()",
        "daemon thread `napper`, made at {}",
    ),
    "interpreter": ("import _interpreters; _interpreters.create()", "interpreter *, made at {}"),
    "shm": (
        "from multiprocessing.shared_memory import SharedMemory; SharedMemory(create=True, size=9, track=False).close()",
        "shm segment /dev/shm/psm_*, made at {}",
    ),
    "socket": (
        "import socket; kept.append(socket.create_server(('127.0.0.1', 0)))",
        "socket fd * (AF_INET to ('127.0.0.1', *)), made at {}",
    ),
    "temp-file": (
        "import tempfile; tempfile.NamedTemporaryFile(delete=False).close()",
        "temp file */tmp*, made at {}",
    ),
    "temp-folder": ("import tempfile; tempfile.mkdtemp()", "temp file */tmp*, made at {}"),
}


@pytest.mark.parametrize("how", ["plain", "isolated"])
def test_the_guilty_test_fails_for_every_kind_of_leak(
    how: str, pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    leaks = LEAKS if how == "plain" else {kind: LEAKS[kind] for kind in ("process", "fd", "shm")}
    tests = {}
    for kind, (code, _) in leaks.items():
        tests[f"{kind}_leaks".replace("-", "_")] = code
        tests[f"{kind}_comes_after".replace("-", "_")] = "pass"
    suite(pytester, **tests)
    result = run(pytester, "--spawn-leaks", *(["--spawn-isolate=module"] if how == "isolated" else []))
    for name in [path.name for path in Path("/dev/shm").glob("psm_*")]:
        if name in text_of(result):
            Path("/dev/shm", name).unlink()
    result.assert_outcomes(passed=2 * len(leaks), errors=len(leaks))
    for kind, (_, told) in leaks.items():
        name = f"test_{kind}_leaks".replace("-", "_")
        where = f"test_it.py:* in {name}"
        result.stdout.fnmatch_lines(
            [f"*ERROR at teardown of {name} *", f"left behind: {told.format(where)}*"]
        )


def test_what_is_no_leak(pytester: pytest.Pytester) -> None:
    suite(
        pytester,
        spawns="for backend in th.BACKENDS: assert th.spawn(abs, -1, backend=backend).result(30) == 1",
        pool="with th.Executor(2) as pool: assert list(pool.map(abs, [-1, -2])) == [1, 2]",
        multiprocessing="""
            import multiprocessing
            from multiprocessing.shared_memory import SharedMemory
            block = SharedMemory(create=True, size=9)
            block.close()
            block.unlink()
            with multiprocessing.get_context("forkserver").Pool(1) as pool:
                assert pool.map(abs, [-1]) == [1]
            pool.join()
            multiprocessing.Value("i", 3)
        """,
        numpy="import numpy",
        loky="import joblib; assert joblib.Parallel(2)(joblib.delayed(abs)(i) for i in [-1, -2]) == [1, 2]",
        trio_threads="import trio; trio.run(trio.to_thread.run_sync, print)",
        asyncio_threads="import asyncio; asyncio.run(asyncio.to_thread(print))",
        files="(request.getfixturevalue('tmp_path') / 'x').write_text('')\nopen(__file__).close()",
        replaced="os.close(kept[0]) if kept else None; kept[:] = []",
        failed="file = open(__file__); assert 0",
        xfails="file = open(__file__); pytest.xfail()",
        skips="file = open(__file__); pytest.skip()",
    )
    run(pytester, "--spawn-leaks").assert_outcomes(passed=9, failed=1, xfailed=1, skipped=1)


@pytest.mark.parametrize("args", [("--basetemp=tmp/base",), ()])
def test_pytest_s_own_folder_is_no_leak_and_that_of_all_groups(
    args: tuple[str, ...], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite(pytester, first="request.getfixturevalue('tmp_path')", second="request.getfixturevalue('tmp_path')")
    (pytester.path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(pytester.path / "tmp"))
    monkeypatch.delenv("PYTEST_DEBUG_TEMPROOT", raising=False)
    for isolate in ((), ("--spawn-isolate=test",)):
        command = (sys.executable, "-m", "pytest", *PLAIN, "--spawn-leaks", *isolate, *args)
        result = pytester.run(*command, "-o", "tmp_path_retention_policy=all", timeout=LIMIT)
        result.assert_outcomes(passed=2)
    bases = [
        *(pytester.path / "tmp").glob("pytest-of-*/pytest-[0-9]*"),
        *(pytester.path / "tmp").glob("base"),
    ]
    assert [len([*base.glob("test_*[0-9]")]) for base in bases] == [2] * (1 if args else 2)


def test_a_leak_is_told_from_a_directory_that_is_gone(pytester: pytest.Pytester) -> None:
    leaks = """
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
        with pytest.raises(FileNotFoundError): open("relative", "w")
        kept.append(open("/dev/null"))
    """
    suite(pytester, head="HERE = os.getcwd()\n", leaks=leaks, back="os.chdir(HERE)")
    result = run(pytester, "--spawn-leaks")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["left behind: fd *(/dev/null), made at test_it.py:* in test_leaks"])


def test_a_test_may_clear_the_environment(pytester: pytest.Pytester) -> None:
    orphan = """
        import subprocess
        code = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"
        subprocess.run([os.sys.executable, "-c", code], env=kept[0])
    """
    suite(pytester, clears="kept.append(dict(os.environ))\nos.environ.clear()", leaks=orphan)
    result = run(pytester, "--spawn-leaks", "--spawn-timeout=30")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["left behind: process *sleep 1000*"])


def test_what_may_be_left_behind(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os, pytest

        @pytest.mark.allow_leaks("fds", match="/dev/null", reason="it is kept")
        def test_allowed(): os.open("/dev/null", os.O_RDONLY)

        @pytest.mark.allow_leaks
        def test_all_allowed(): os.open("/dev/null", os.O_RDONLY)

        @pytest.mark.allow_leaks("fds", match="/dev/zero")
        @pytest.mark.allow_leaks("threads")
        def test_not_allowed(): os.open("/dev/null", os.O_RDONLY)

        def test_allowed_for_all(): os.open("/dev/zero", os.O_RDONLY)
        """
    )
    pytester.makeini("[pytest]\nspawn_leaks = true\nspawn_leaks_allow =\n    fds: /dev/zero\n    threads")
    result = run(pytester)
    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_not_allowed*"])


def test_what_a_wider_fixture_has_made_is_its_own_until_it_ends(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_a="""
            import os, pytest

            @pytest.fixture(scope="module")
            def good():
                fd = os.open("/dev/null", os.O_RDONLY)
                yield
                os.close(fd)

            @pytest.fixture(scope="module")
            def bad():
                yield os.open("/dev/zero", os.O_RDONLY)

            def test_first(): pass
            def test_uses(good): pass
            def test_asks_late(request): request.getfixturevalue("bad")
            def test_last(): pass
        """,
        test_b="def test_after(): pass",
    )
    result = run(pytester, "--spawn-leaks")
    result.assert_outcomes(passed=5, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_last*",
            "left behind: fd * (/dev/zero), made by the module fixture `bad` at test_a.py:*",
        ]
    )


@pytest.mark.parametrize("option", ["--spawn-timeout=20", "--spawn-isolate=module"])
def test_a_subinterpreter_that_was_made_while_collecting_is_a_usage_error(
    option: str, pytester: pytest.Pytester
) -> None:
    suite(
        pytester,
        head="import concurrent.interpreters\nkept.append(concurrent.interpreters.create())\n",
        it="pass",
    )
    run(pytester, "--spawn-leaks").assert_outcomes(passed=1)
    result = run(pytester, option, "-p", "no:faulthandler")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "a subinterpreter was made while tests were collected" in text_of(result)
    # Once there was one of ours, forks survive.
    ours = "th.spawn(abs, -1, backend='subint').result()\nimport concurrent.interpreters\n"
    suite(pytester, head=ours + "kept.append(concurrent.interpreters.create())\n", it="pass")
    run(pytester, "--spawn-timeout=20").assert_outcomes(passed=1)


# -- output of workers -----------------------------------------------------------------------------------

FLOOD = """
FLOOD = th.Source("for _ in range(64): print('x' * 65536)\\nprint(f'last words of {args[0]}')")
"""


@pytest.mark.parametrize("capture", ["fd", "sys", "tee-sys"])
@pytest.mark.parametrize("more", [(), ("--spawn-isolate=module",)])
def test_a_flood_of_output_is_in_the_report_of_its_test(
    capture: str, more: tuple[str, ...], pytester: pytest.Pytester
) -> None:
    backends = ("subint", "forkserver", "fork", "exec")
    tests = {
        name: f"assert th.spawn(FLOOD, '{name}', backend='{name}').wait(40).kind == 'returned'; assert 0"
        for name in backends
    }
    suite(pytester, head=FLOOD, **tests)
    # Nobody reads what comes before this has ended.
    command = [
        sys.executable,
        "-m",
        "pytest",
        *PLAIN,
        f"--capture={capture}",
        "--spawn-backend=subint",
        *more,
    ]
    with subprocess.Popen(
        command,
        cwd=pytester.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=LIMIT)
        finally:
            kill_session(process.pid)
    reports = re.split(r"^_+ test_(\w+) _+$", text, flags=re.MULTILINE)[1:]
    found = dict(zip(reports[::2], reports[1::2], strict=True))
    assert set(found) == set(backends), text[-2000:]
    for name in backends:
        assert re.findall(r"^last words of (\w+)$", found[name], re.MULTILINE) == [name]
        assert len(found[name]) > 64 * 65536


# -- the end of pytest -----------------------------------------------------------------------------------


def outlived_by_nothing(command: list[str], folder: Path, output: Path) -> None:
    """Runs a pytest there until its test is ready, kills it, and waits until nothing runs there."""
    with (
        output.open("wb") as written,
        subprocess.Popen(
            command, cwd=folder, stdout=written, stderr=written, start_new_session=True
        ) as process,
    ):
        try:
            until((folder / "ready").exists, "the test")
            process.kill()
            until(lambda: not running_in(folder), "the end of all", 10)
        finally:
            kill_session(process.pid)


@pytest.mark.parametrize("how", [(), ("--spawn-isolate=module",), ("-n1",)])
def test_nothing_outlives_a_pytest_that_is_killed(
    how: tuple[str, ...], pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    suite(
        pytester,
        it="""
            import subprocess, time
            for backend in ("subint", "forkserver", "exec"):
                kept.append(th.spawn("time:sleep", 1000, backend=backend))
            subprocess.Popen(["sleep", "1000"], start_new_session=True)
            open("ready", "w").close()
            while True: pass
        """,
    )
    command = [sys.executable, "-m", "pytest", *PLAIN, "--spawn-timeout=50", "--spawn-leaks", *how]
    outlived_by_nothing(command, pytester.path, tmp_path / "stderr")
    until(lambda: not list((tmp_path / "temporary").glob("tractor-host-pytest-*")), "an empty folder")
    if how != ("--spawn-isolate=module",):
        assert "has ended during test_it.py::test_it\n" in (tmp_path / "stderr").read_text()


def test_nothing_of_a_session_within_a_test_outlives_the_outer_one(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    (pytester.path / "inner").mkdir()
    (pytester.path / "inner" / "test_inner.py").write_text(
        dedent("""
            import subprocess, time

            def test_it():
                subprocess.Popen(["sleep", "1000"], start_new_session=True)
                open("ready", "w").close()
                time.sleep(1000)
            """)
    )
    options = [*PLAIN, "--spawn-timeout=50"]
    suite(
        pytester,
        outer=f"import subprocess, sys; subprocess.run([sys.executable, '-m', 'pytest', *{options}, 'inner'])",
    )
    command = [sys.executable, "-m", "pytest", *options, "test_it.py"]
    outlived_by_nothing(command, pytester.path, tmp_path / "output")


@pytest.mark.parametrize("how", [(), ("--spawn-isolate=module",)])
def test_ctrl_c_is_pytest_s(how: tuple[str, ...], pytester: pytest.Pytester) -> None:
    suite(pytester, it="open('ready', 'w').close()\nimport time; time.sleep(1000)", after="pass")
    command = [sys.executable, "-m", "pytest", *PLAIN, "--spawn-timeout=50", "--spawn-leaks", *how]
    with subprocess.Popen(
        command, cwd=pytester.path, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            until((pytester.path / "ready").exists, "the test")
            os.killpg(process.pid, signal.SIGINT)
            text, _ = process.communicate(timeout=LIMIT)
        finally:
            kill_session(process.pid)
    assert process.returncode == pytest.ExitCode.INTERRUPTED, text
    assert "KeyboardInterrupt" in text


@pytest.mark.parametrize("how", [(), ("--spawn-isolate=module",)])
def test_an_interrupt_of_the_test_s_own_ends_the_session(
    how: tuple[str, ...], pytester: pytest.Pytester
) -> None:
    suite(pytester, before="pass", it="raise KeyboardInterrupt", after="pass")
    result = run(pytester, "--spawn-timeout=50", *how)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.assert_outcomes(passed=1)


# -- beside other plugins --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["c-without-gil", "keeps-the-gil"])
def test_under_xdist_the_worker_is_replaced(how: str, pytester: pytest.Pytester) -> None:
    suite(
        pytester, before="pass", stuck=STUCK[how], after="pass", late="while True: pass", leaks=LEAKS["fd"][0]
    )
    result = run(
        pytester,
        *("-n2", "--spawn-timeout=1", "--spawn-timeout-grace=0.5", "--spawn-leaks", "--spawn-backend=subint"),
        *("--junit-xml=report.xml",),
    )
    result.assert_outcomes(passed=3, failed=2, errors=1)
    text = text_of(result)
    assert "crashed while running 'test_it.py::test_stuck'" in text
    path = re.search(
        r"tractor-host: test_it.py::test_stuck: time limit of 1 s exceeded; the dump is in (\S+)", text
    )
    assert path
    assert "in test_stuck" in Path(path[1]).read_text()
    Path(path[1]).unlink()
    assert "Failed: time limit of 1 s exceeded" in text
    assert "left behind: fd" in text
    assert cases(pytester.path / "report.xml")["test_stuck"] != "passed"


@pytest.mark.parametrize("method", ["signal", "thread"])
@pytest.mark.parametrize("more", [(), ("--spawn-isolate=module",)])
def test_beside_pytest_timeout(method: str, more: tuple[str, ...], pytester: pytest.Pytester) -> None:
    suite(pytester, fine="pass", late="while True: pass", after="pass")
    options = ("--spawn-leaks", f"--timeout-method={method}", *more)
    # Ours first.
    run(pytester, "--spawn-timeout=0.5", "--timeout=40", *options).assert_outcomes(passed=2, failed=1)
    # Theirs first: by a thread it ends the process.
    result = run(pytester, "--spawn-timeout=40", "--timeout=0.5", *options)
    text = text_of(result)
    assert "Timeout" in text
    if method == "signal" or more:
        result.assert_outcomes(passed=2, failed=1)


def test_in_a_shuffled_order_without_a_cache(pytester: pytest.Pytester) -> None:
    suite(
        pytester,
        late="while True: pass",
        leaks=LEAKS["fd"][0],
        **{f"fine_{number}": "pass" for number in range(8)},
    )
    for seed in ("1", "2"):
        for more in ((), ("--spawn-isolate=test",)):
            args = (
                "-p",
                "no:cacheprovider",
                f"--randomly-seed={seed}",
                "--spawn-timeout=0.7",
                "--spawn-leaks",
                *more,
            )
            result = pytester.runpytest_subprocess(*args, timeout=LIMIT)
            result.assert_outcomes(passed=9, failed=1, errors=1)


def test_in_the_embedded_interpreter(launcher: Path, pytester: pytest.Pytester) -> None:
    suite(pytester, before="pass", stuck=STUCK["keeps-the-gil"], after="pass")
    command = [
        launcher,
        "pytest",
        *PLAIN,
        "--spawn-timeout=0.5",
        "--spawn-timeout-grace=0.5",
        "--spawn-backend=subint",
    ]
    done = subprocess.run(
        command, cwd=pytester.path, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "in test_stuck" in done.stdout
