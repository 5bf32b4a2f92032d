"""The pytest plugin: backends by option, time limits that hold, leaks told by the test that made them.

It is there as soon as the package is installed, and does nothing before it is asked: by an option, its twin
in the ini file, a marker or a fixture. `-p no:tractor_host` leaves it out altogether. The guide's page "Test
with pytest" tells what there is.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from tractor_host import Event, Nursery

#: Seconds that a test has to end once it has failed by its limit.
_GRACE = 5.0
#: Seconds for a trial of a backend.
_TRIAL = 60.0

_MARKERS = (
    "skipon_spawn_backend(*names, reason=None): skip the test where --spawn-backend is one of these; the "
    "nearest marker that names it wins",
    "spawn_timeout(seconds): the test's time limit in the place of --spawn-timeout; 0 for none",
    "allow_leaks(*kinds, match='', reason=None): what the test may leave behind: all, or of these kinds, "
    "where the text has the pattern `match`",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tractor_host", "workers that you can always kill (tractor-host)")

    def add(name: str, help: str, type: Literal["string", "float", "bool"] = "string", **how: Any) -> None:
        group.addoption(f"--{name}", default=None, help=help, **how)
        parser.addini(name.replace("-", "_"), help, type=type, default=None)

    add("spawn-backend", "the backend of `tractor_host.spawn` where a test names none", metavar="NAME")
    add(
        "spawn-timeout",
        "seconds that a test may take, with its fixtures, whatever it does",
        "float",
        metavar="SECONDS",
    )
    add(
        "spawn-timeout-grace",
        f"seconds that a test has to end once it has failed by its limit; {_GRACE:g} by default",
        "float",
        metavar="SECONDS",
    )
    add("spawn-leaks", "fail a test that leaves something behind", "bool", action="store_true")
    add(
        "spawn-isolate",
        "run each group of tests in a process of its own: `module`, `class` or `test`",
        metavar="GROUP",
    )
    parser.addini(
        "spawn_leaks_allow",
        "what any test may leave behind: a kind a line, with `: PATTERN` after it for some of them",
        type="linelist",
        default=[],
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    if not config.pluginmanager.hasplugin("trio"):  # pytest-trio, whose fixture of this name stays its own
        config.pluginmanager.register(_Nursery(), "tractor_host_nursery")
    name = _asked(config, "spawn-backend")
    if name is not None:
        before = os.environ.get("TRACTOR_HOST_BACKEND")
        os.environ["TRACTOR_HOST_BACKEND"] = _checked(config, name)
        config.add_cleanup(lambda: _restore("TRACTOR_HOST_BACKEND", before))
    settings = Settings(config)
    config.stash[_SETTINGS] = settings


class Settings:
    """What is asked for by options and by the ini file.

    Attributes:
        timeout: Seconds, or None.
        grace: Seconds.
        leaks: Whether to check for them.
        isolate: A group, or None.

    Raises:
        pytest.UsageError: Something can't be right.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.timeout = _seconds("--spawn-timeout", _asked(config, "spawn-timeout")) or None
        self.grace = _seconds("--spawn-timeout-grace", _asked(config, "spawn-timeout-grace"), _GRACE)
        self.leaks = bool(_asked(config, "spawn-leaks"))
        self.isolate = _asked(config, "spawn-isolate")
        if self.isolate is not None and self.isolate not in ("module", "class", "test"):
            raise pytest.UsageError(f"--spawn-isolate is `module`, `class` or `test`, not {self.isolate!r}")


_SETTINGS = pytest.StashKey[Settings]()


def _asked(config: pytest.Config, name: str) -> Any:
    """What an option says, or else the ini file, or else None."""
    key = name.replace("-", "_")
    value = config.getoption(key)
    value = config.getini(key) if value is None else value
    return None if value == "" else value


def _seconds(what: str, value: Any, default: float = 0.0) -> float:
    if value is None:
        return default
    try:
        seconds = float(value)
    except TypeError, ValueError:
        raise pytest.UsageError(f"{what} is a number of seconds, not {value!r}") from None
    if not 0 <= seconds < 1e9:
        raise pytest.UsageError(f"{what} is a number of seconds, not negative and not infinite: {value!r}")
    return seconds


def _restore(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


# -- backends --------------------------------------------------------------------------------------------


def _checked(config: pytest.Config, name: str) -> str:
    """The name of a backend that workers can be spawned with, which a trial shows.

    Raises:
        pytest.UsageError: There is none, or why not.
    """
    import subprocess
    import sys

    from tractor_host import _spawn

    try:
        _spawn.resolve_backend(name)
    except ValueError as error:
        raise pytest.UsageError(f"--spawn-backend: {error}") from None
    if hasattr(config, "workerinput") or config.option.help or config.option.version:
        return name  # pytest-xdist's controller has tried it
    # In another process: here it would start what stays.
    code = f"import sys; sys.path[:] = {sys.path!r}; import tractor_host; "
    code += f"tractor_host.spawn('os:getpid', backend={name!r}).result(timeout=30)"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TRIAL,
            check=False,
        )
        why = tried.stderr.strip().rpartition("\n")[2] or f"exit code {tried.returncode}"
        if tried.returncode == 0:
            return name
    except subprocess.TimeoutExpired:
        why = f"a worker that does nothing has not ended within {_TRIAL:g} s"
    raise pytest.UsageError(f"--spawn-backend: {name!r} is not available here: {why}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("skipon_spawn_backend"):
            reason = _reason_to_skip(item, marker)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
                break


def _reason_to_skip(item: pytest.Item, marker: pytest.Mark) -> str | None:
    from tractor_host import _spawn

    backend = _spawn.resolve_backend(None)
    if not marker.args or marker.kwargs.keys() - {"reason"}:
        what = "takes the names of backends, and a reason, and nothing else"
        raise pytest.UsageError(f"{item.nodeid}: skipon_spawn_backend {what}")
    try:
        names = {_spawn.resolve_backend(name) for name in marker.args}
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"{item.nodeid}: skipon_spawn_backend: {error}") from None
    if backend not in names:
        return None
    return marker.kwargs.get("reason") or f"not for --spawn-backend={backend}"


# -- fixtures --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def spawn_backend() -> str:
    """The backend that `tractor_host.spawn` takes where none is named: `--spawn-backend`, or the default."""
    from tractor_host import _spawn

    return _spawn.resolve_backend(None)


@pytest.fixture
async def actor_nursery(spawn_backend: str) -> AsyncGenerator[Nursery]:
    """An open nursery for actors, for the async tests of pytest-trio, anyio and pytest-asyncio."""
    from tractor_host import open_nursery

    async with open_nursery(spawn_backend) as nursery:
        yield nursery


class _Nursery:
    """As a plugin: `actor_nursery` by its short name."""

    @pytest.fixture
    async def nursery(self, spawn_backend: str) -> AsyncGenerator[Nursery]:
        """An open nursery for actors: `actor_nursery`. Beside pytest-trio, its own has this name."""
        from tractor_host import open_nursery

        async with open_nursery(spawn_backend) as nursery:
            yield nursery


@pytest.fixture
def tractor_host_events(request: pytest.FixtureRequest) -> Iterator[Callable[..., list[Event]]]:
    """What has happened to workers since the test began: `tractor_host_events()`, or
    `tractor_host_events("rung", "exit")` for those kinds only. A test that fails has them in its report."""
    from tractor_host import _native, events

    begun = _native.events_last()

    def since(*kinds: str) -> list[Event]:
        return [event for event in events(begun) if not kinds or event.kind in kinds]

    request.node.stash[_EVENTS] = since
    yield since
    del request.node.stash[_EVENTS]


_EVENTS = pytest.StashKey[Callable[..., "list[Event]"]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    since = item.stash.get(_EVENTS, None)
    if since is not None and report.failed:
        report.sections.append(("tractor-host events", "\n".join(event.text for event in since())))
    return report


# -- what is started for a session -----------------------------------------------------------------------


def _limit_of(item: pytest.Item) -> float | None:
    """The time limit of a test: its marker's, or else that of all."""
    marker = item.get_closest_marker("spawn_timeout")
    if marker is None:
        return item.config.stash[_SETTINGS].timeout
    if len(marker.args) != 1 or marker.kwargs:
        raise pytest.UsageError(f"{item.nodeid}: spawn_timeout takes a number of seconds and nothing else")
    return _seconds(f"{item.nodeid}: spawn_timeout", marker.args[0]) or None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    config = session.config
    settings = config.stash[_SETTINGS]
    limits = [_limit_of(item) for item in session.items]
    if config.option.collectonly or config.pluginmanager.hasplugin("dsession"):
        return (yield)  # no test runs in pytest-xdist's controller
    limited = any(limits)
    asked = limited or settings.leaks or settings.isolate is not None or _asked(config, "spawn-backend")
    if not asked and not any(_uses_fixtures(item) for item in session.items):
        return (yield)
    from tractor_host._plugin.session import Parts

    with Parts(session, settings, _limit_of if limited else None):
        return (yield)


def _uses_fixtures(item: pytest.Item) -> bool:
    names = getattr(item, "fixturenames", ())
    return "spawn_backend" in names or "tractor_host_events" in names
