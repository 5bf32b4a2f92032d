"""What a type checker is told of calls by portals: what comes back, and that wrong arguments are errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.outside

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60

PROGRAM = """
from collections.abc import AsyncGenerator
from typing import assert_type

import tractor_host as th


def sync(value: int) -> str:
    return str(value)


async def later(value: int) -> str:
    return str(value)


async def talk(stream: th.Stream, value: int) -> None:
    await stream.send(value)


async def count(to: int) -> AsyncGenerator[int]:
    for number in range(to):
        yield number


async def main() -> None:
    async with th.open_nursery() as nursery:
        portal = await nursery.start_actor("a")
        assert_type(await portal.run(sync, 1), str)
        assert_type(await portal.run(later, value=1), str)
        assert_type(await (await nursery.run_in_actor(sync, 1)).result(), str)
        assert_type(await (await nursery.run_in_actor(later, 1)).result(), str)

        async with portal.open_stream(talk, 1) as stream:
            assert_type(stream, th.Stream)
        async with portal.open_stream(count, to=1) as stream:
            pass

        await portal.run(sync, "1")  # wrong
        await portal.run(later, "1")  # wrong
        await portal.run(later)  # wrong
        await nursery.run_in_actor(sync, "1")  # wrong
        await nursery.run_in_actor(later, 1, 2)  # wrong
        assert_type(await portal.run(sync, 1), int)  # wrong
        portal.open_stream(talk, "1")  # wrong
        portal.open_stream(count)  # wrong
        portal.open_stream(sync, 1)  # wrong
"""


def test_mypy_knows_what_a_call_takes_and_returns(tmp_path: Path) -> None:
    program = tmp_path / "calls.py"
    program.write_text(PROGRAM)
    # The cache is the test's own: a run of mypy that goes on beside it would write to the same files.
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
    command += ["--cache-dir", tmp_path / "cache", "--hide-error-context", "--no-pretty", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {int(line) for line in re.findall(r"^.*calls\.py:(\d+): error:", done.stdout, re.MULTILINE)}
    wrong = {number for number, line in enumerate(PROGRAM.split("\n"), 1) if line.endswith("# wrong")}
    assert found == wrong, done.stdout
    assert f"Found {len(wrong)} errors in 1 file" in done.stdout, done.stdout
