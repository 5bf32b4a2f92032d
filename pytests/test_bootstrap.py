"""scripts/bootstrap, without a network: what it refuses, what it says, what it leaves alone.

Each test runs a copy of the script in a folder of its own, with a cache of its own and a PATH that
holds nothing but the basic tools it needs, so neither the machine's Pythons nor its package
managers are seen unless a test puts stand-ins there.
"""

import fcntl
import os
import select
import shutil
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.outside

ROOT = Path(__file__).resolve().parent.parent
# Not sys.executable: inside the launcher that is not a plain interpreter.
PYTHON = str(ROOT / ".venv" / "bin" / "python")
BASIC_TOOLS = [
    *("awk", "bash", "cat", "cut", "dirname", "env", "find", "flock", "grep", "mkdir", "mktemp"),
    *("mv", "rm", "sed", "sh", "sha256sum", "sleep", "sort", "tail", "timeout", "touch", "wc"),
]
WAYS = ["1. TRACTOR_HOST_PYTHON", "2. python3.14 on PATH", "3. uv", "4. Debian's packages"]
LIMIT = 60


class Sandbox:
    """A repository with nothing but the script, and an environment that finds nothing."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in BASIC_TOOLS:
            tool = shutil.which(name)
            assert tool, f"this test needs {name}"
            (self.bin / name).symlink_to(tool)
        self.repo = folder / "repo"
        (self.repo / "scripts").mkdir(parents=True)
        self.script = shutil.copy(ROOT / "scripts" / "bootstrap", self.repo / "scripts")
        # No requirements: pip has nothing to ask the network for.
        self.requirements = self.repo / "scripts" / "requirements-dev.txt"
        self.requirements.write_text("# none\n")
        self.venv = self.repo / ".venv"
        self.stamp = self.venv / ".bootstrap-stamp"
        self.cache = folder / "cache" / "tractor-host"
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(self.cache.parent),
            "PIP_NO_INDEX": "1",
        }

    def tool(self, name: str, script: str) -> str:
        """Puts a stand-in on PATH."""
        path = self.bin / name
        path.unlink(missing_ok=True)  # or else it would be written through the link
        path.write_text("#!/bin/sh\n" + textwrap.dedent(script))
        path.chmod(0o755)
        return str(path)

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.script, *args],
            env=self.env | env,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        with self.start(*args, **env) as process:
            try:
                out, err = process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def reasons(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The failure message's reasons by way; asserts that it is the one message."""
    assert result.returncode == 1
    assert result.stdout == ""
    _, _, message = result.stderr.partition("bootstrap: no usable CPython 3.14:\n")
    listed, _, advice = message.partition("What to do: ")
    assert "set TRACTOR_HOST_PYTHON" in advice
    assert "no usable" not in advice
    return dict(line.strip().split(": ", 1) for line in listed.splitlines())


def test_all_ways_failing_is_one_message_with_each_reason(sandbox: Sandbox) -> None:
    found = reasons(sandbox.run())
    assert list(found) == WAYS
    assert list(found.values()) == [
        "not set",
        "no python3.14 on PATH",
        "no uv on PATH",
        "no apt-get on PATH",
    ]
    assert not sandbox.venv.exists()


def test_what_a_failing_tool_says_becomes_the_reason(sandbox: Sandbox) -> None:
    sandbox.tool("python3.14", "echo 'shim: 3.14 is not installed' >&2; exit 127")
    sandbox.tool(
        "uv",
        """
        [ "$2" = install ] && { echo 'error: the download failed' >&2; echo 'more' >&2; }
        exit 2
        """,
    )
    found = reasons(sandbox.run("--print-python"))
    assert found[WAYS[1]].endswith("bin/python3.14 does not run: shim: 3.14 is not installed")
    assert found[WAYS[2]] == "uv python install 3.14: error: the download failed"


def test_debian_mirrors_come_from_the_machines_apt_sources(sandbox: Sandbox) -> None:
    """Both formats are read; other people's repositories and trusted=yes are not taken over."""
    etc = sandbox.repo / "etc"
    (etc / "parts").mkdir(parents=True)
    (etc / "sources.list").write_text(
        "# deb http://commented.invalid/debian sid main\n"
        "deb-src http://source.invalid/debian sid main\n"
        "deb [arch=amd64 trusted=yes signed-by=/no/such.gpg] http://a.invalid/debian/ sid main\n"
        "deb [trusted=yes] http://vendor.invalid/debian vendor-sid main\n"
        "deb http://contrib.invalid/debian sid contrib\n"
    )
    (etc / "parts" / "some.sources").write_text(
        "Types: deb deb-src\n# a comment\nURIs: http://b.invalid/mirror\n http://c.invalid/debian\n"
        "Suites: bookworm\n bookworm-updates\nComponents: main\nTrusted: yes\n"
        "\n"
        "Types: deb\nURIs: http://security.invalid/debian\nSuites: bookworm-security\n"
        "Components: main\n"
    )
    (etc / "parts" / "off.sources").write_text(
        "Enabled: no\nTypes: deb\nURIs: http://off.invalid/debian\nSuites: sid\nComponents: main\n"
    )
    sandbox.tool("dpkg", "echo amd64")
    sandbox.tool("dpkg-deb", "exit 1")
    sandbox.tool(
        "apt-config",
        f"""
        if [ "$1" = shell ]; then
            echo "lists='{etc}/sources.list'; parts='{etc}/parts/'"
        else
            echo 'Acquire::Retries "1";'
            echo 'Acquire::AllowInsecureRepositories "1";'
            echo 'APT::Update::Post-Invoke:: "touch {etc}/hooked";'
        fi
        """,
    )
    sandbox.tool(
        "apt-get",
        """
        cat "${APT_CONFIG%/*}/sources/debian.sources" >>"$HOME/asked"
        cat "$APT_CONFIG" >"$HOME/apt.conf"
        echo 'E: no network in this test'
        exit 100
        """,
    )
    found = reasons(sandbox.run("--print-python"))
    assert found[WAYS[3]].startswith("apt-get update (forky): E: no network in this test; ")

    home = Path(sandbox.env["HOME"])
    asked = (home / "asked").read_text()
    lines = asked.splitlines()
    uris = [line.removeprefix("URIs: ") for line in lines if line.startswith("URIs: ")]
    mirrors = ["http://a.invalid/debian/", "http://c.invalid/debian", "http://b.invalid/mirror"]
    assert uris == [uri for uri in mirrors for _ in ("forky", "sid")]
    assert "trusted" not in asked.lower()
    config = (home / "apt.conf").read_text()
    assert "hooked" not in config
    assert 'AllowInsecureRepositories "1"' not in config


def test_a_prefix_without_its_marker_is_not_used(sandbox: Sandbox) -> None:
    """That is what an interrupted unpacking leaves."""
    sandbox.tool("dpkg", "echo amd64")
    for name in ("apt-get", "apt-config", "dpkg-deb"):
        sandbox.tool(name, "exit 1")
    recipe = next(
        line.removeprefix("RECIPE=")
        for line in Path(sandbox.script).read_text().splitlines()
        if line.startswith("RECIPE=")
    )
    prefix = sandbox.cache / f"debian-amd64-r{recipe}"
    (prefix / "usr" / "bin").mkdir(parents=True)
    python = prefix / "usr" / "bin" / "python3.14"
    python.symlink_to(PYTHON)
    assert list(reasons(sandbox.run("--print-python"))) == WAYS

    (prefix / ".complete").touch()
    assert sandbox.run("--print-python").stdout.strip() == str(python)


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ("sys.version_info = (3, 13, 1, 'final', 0)", "is cpython 3.13.1, not CPython 3.14"),
        ("sys.implementation.name = 'pypy'", "not CPython 3.14"),
        ("config['Py_GIL_DISABLED'] = 1", "free-threaded"),
        ("config['INSTSONAME'] = 'libpython3.14.a'", "no shared libpython (it was built with lib"),
        ("config['LIBDIR'] = '/no/such'", "libpython3.14.so.1.0 is not in /no/such"),
        (
            "sysconfig.get_path = lambda _: '/no/such'; config['INCLUDEPY'] = None",
            "no headers: no Python.h in /no/such",
        ),
    ],
)
def test_an_unusable_named_interpreter_is_an_error(sandbox: Sandbox, patch: str, reason: str) -> None:
    named = sandbox.tool(
        "named",
        f"""
        exec {PYTHON} -I -c "
        import sys, sysconfig
        config = sysconfig.get_config_vars()
        {patch}
        $3"
        """.replace("\n        ", "\n"),
    )
    # A usable one beside it is not put in its place.
    (sandbox.bin / "python3.14").symlink_to(PYTHON)
    found = reasons(sandbox.run(TRACTOR_HOST_PYTHON=named))
    assert list(found) == WAYS[:1]
    assert reason in found[WAYS[0]]


@pytest.mark.parametrize("named", ["/no/such/python", "/", "/bin/true"])
def test_a_named_interpreter_that_is_no_python_is_an_error(sandbox: Sandbox, named: str) -> None:
    found = reasons(sandbox.run("--print-python", TRACTOR_HOST_PYTHON=named))
    assert list(found) == WAYS[:1]
    assert found[WAYS[0]].startswith(f"{named} does not ")


def test_the_base_interpreter_alone(sandbox: Sandbox) -> None:
    """The first hit on PATH may be a broken shim; stdout has the path and nothing else."""
    shim = sandbox.tool("python3.14", "exit 127")
    second = Path(sandbox.env["HOME"]) / "second"
    second.mkdir()
    (second / "python3.14").symlink_to(PYTHON)
    result = sandbox.run("--print-python", PATH=f"{sandbox.bin}:{second}")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{second / 'python3.14'}\n"
    assert not sandbox.venv.exists()
    assert Path(shim).exists()


def test_the_environment_is_made_once_and_again_when_its_inputs_change(sandbox: Sandbox) -> None:
    first = sandbox.run(TRACTOR_HOST_PYTHON=PYTHON)
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{sandbox.venv / 'bin' / 'python'}\n"
    made = sandbox.stamp.stat()

    again = sandbox.run(TRACTOR_HOST_PYTHON=PYTHON)
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    assert sandbox.stamp.stat() == made

    # An error leaves it alone, and is not hidden by it.
    assert list(reasons(sandbox.run(TRACTOR_HOST_PYTHON="/no/such"))) == WAYS[:1]
    assert sandbox.stamp.stat() == made

    sandbox.requirements.write_text("# still none\n")
    changed = sandbox.run(TRACTOR_HOST_PYTHON=PYTHON)
    assert changed.returncode == 0, changed.stderr
    assert sandbox.stamp.stat().st_mtime_ns > made.st_mtime_ns


def test_killed_half_way_the_next_run_succeeds(sandbox: Sandbox) -> None:
    # Every slow command runs under timeout, so a stand-in for it knows the moment.
    moment = Path(sandbox.env["HOME"]) / "moment"
    os.mkfifo(moment)
    real = (sandbox.bin / "timeout").readlink()
    sandbox.tool(
        "timeout",
        f"""
        case "$*" in *"-m venv"*)
            mkdir "{sandbox.venv}"
            echo now >"{moment}"
            exec sleep {LIMIT}
        esac
        exec {real} "$@"
        """,
    )
    reader = os.open(moment, os.O_RDONLY | os.O_NONBLOCK)
    with sandbox.start(TRACTOR_HOST_PYTHON=PYTHON) as process:
        try:
            ready, _, _ = select.select([reader], [], [], LIMIT)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            os.close(reader)
    assert ready
    assert sandbox.venv.exists()
    assert not sandbox.stamp.exists()

    (sandbox.bin / "timeout").unlink()
    (sandbox.bin / "timeout").symlink_to(real)
    result = sandbox.run(TRACTOR_HOST_PYTHON=PYTHON)
    assert result.returncode == 0, result.stderr
    assert sandbox.stamp.exists()


def test_a_second_run_waits_for_the_first_but_not_for_ever(sandbox: Sandbox) -> None:
    sandbox.cache.mkdir(parents=True)
    with (sandbox.cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = sandbox.run(TRACTOR_HOST_PYTHON=PYTHON, TRACTOR_HOST_LOCK_WAIT="0.2")
        assert result.returncode == 1
        assert "another bootstrap still holds" in result.stderr
        assert not sandbox.venv.exists()

        with sandbox.start(TRACTOR_HOST_PYTHON=PYTHON, TRACTOR_HOST_LOCK_WAIT="60") as process:
            try:
                assert process.stderr
                assert select.select([process.stderr], [], [], LIMIT)[0]
                assert "waiting for another bootstrap" in process.stderr.readline()
                fcntl.flock(lock, fcntl.LOCK_UN)
                process.communicate(timeout=LIMIT)
            finally:
                process.kill()
        assert process.returncode == 0
    assert sandbox.stamp.exists()


def test_help_and_wrong_options(sandbox: Sandbox) -> None:
    asked = sandbox.run("--help")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.startswith("Usage: scripts/bootstrap")
    for args in (["--no-such"], ["--print-python", "more"]):
        wrong = sandbox.run(*args)
        assert (wrong.returncode, wrong.stdout) == (2, "")
