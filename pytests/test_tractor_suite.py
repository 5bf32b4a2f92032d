"""`benches/tractor_suite.py`, with a suite of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.outside

PROGRAM = Path(__file__).resolve().parents[1] / "benches" / "tractor_suite.py"

CONFTEST = """
import pytest


def pytest_addoption(parser):
    parser.addoption("--spawn-backend", dest="spawn_backend")


@pytest.fixture
def key(request):
    return request.config.option.spawn_backend


def pytest_generate_tests(metafunc):
    if "named" in metafunc.fixturenames:
        key = metafunc.config.option.spawn_backend
        metafunc.parametrize("named", [key], ids="start_method={}".format)
"""

SUITE = """
import os
import pathlib
import subprocess
import time

import pytest


def test_passes(named):
    pass


def test_fails(key):
    assert key == "trio"


def test_fails_at_first(key):
    first = pathlib.Path(f"{key} was here")  # in the checkout
    if not first.exists():
        first.touch()
        assert key == "trio"


def test_hangs(key):
    if key == "other":
        time.sleep(1000)


def test_kills_its_process(key):
    if key == "other":
        os._exit(3)


def test_is_skipped():
    pytest.skip("for a reason")


@pytest.mark.xfail(strict=True)
def test_is_expected_to_fail():
    assert False


def test_leaves_a_process(key):
    if key == "other":
        subprocess.Popen(["sleep", "1000"], start_new_session=True)


def test_comes_last():
    pass
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(CONFTEST)
    (tmp_path / "tests" / "test_it.py").write_text(SUITE)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest]\n")
    return tmp_path


def run(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    output = checkout / "output"
    return subprocess.run(
        [sys.executable, PROGRAM, checkout, sys.executable, "--output", output, "--test-limit", "5", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_tells_what_became_of_each_test_and_what_was_left_behind(checkout: Path) -> None:
    ran = run(checkout, "--run", "own:trio", "--run", "own:other", "--json")
    found: list[dict[str, Any]] = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [one["name"] for one in found] == ["own:trio", "own:other"], ran.stderr
    trio, other = ({test.partition("::")[2]: what for test, what in one["outcomes"].items()} for one in found)
    common = {
        "test_is_skipped": "skipped",
        "test_is_expected_to_fail": "xfailed",
        "test_comes_last": "passed",
    }
    names = ("fails", "fails_at_first", "leaves_a_process", "hangs", "kills_its_process")
    assert trio == {
        "test_passes[start_method=…]": "passed",
        **{f"test_{name}": "passed" for name in names},
        **common,
    }
    assert other == {
        "test_passes[start_method=…]": "passed",
        "test_fails": "failed",
        "test_fails_at_first": "failed",
        "test_leaves_a_process": "passed",
        "test_hangs": "hung",
        "test_kills_its_process": "hung",
        **common,
    }
    assert found[0]["left"] == []
    assert found[1]["left"] == ["sleep: sleep 1000"]
    assert [test.partition("::")[2] for test in found[1]["passed_again"]] == ["test_fails_at_first"]


def test_it_ends_when_the_last_one_hangs(checkout: Path) -> None:
    ran = run(checkout, "--run", "own:other", "--json", "--", "-k", "passes or hangs", "tests")
    found = json.loads(ran.stdout)
    assert sorted(found["outcomes"].values()) == ["hung", "passed"]
    assert found["end"] == ""


def test_the_table_says_what_trio_makes_of_what_failed(checkout: Path) -> None:
    ran = run(checkout, "--run", "own:trio", "--run", "own:other", "--", "-k", "fails or skipped", "tests")
    head, first, second, *rest = ran.stdout.splitlines()
    assert head.split()[:4] == ["run", "passed", "failed", "hung"], ran.stderr
    assert first.split()[:5] == ["own:trio", "2", "0", "0", "1"]
    assert second.split()[:5] == ["own:other", "0", "2", "0", "1"]
    assert "  failed, passed with trio: tests/test_it.py::test_fails" in rest


@pytest.mark.parametrize("name", ["own:", "a b"])
def test_a_run_that_there_cannot_be_is_refused(checkout: Path, name: str) -> None:
    ran = run(checkout, "--run", name)
    assert (ran.returncode, "--run" in ran.stderr) == (2, True)
