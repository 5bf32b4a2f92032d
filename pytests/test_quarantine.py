"""What can't be ended in a subinterpreter: counted, shown, reclaimed when it comes back, and no obstacle
at the end of the program."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from conftest import Program
from helpers import importable

#: Gets a worker abandoned and tells what is known of it.
ABANDON = """
    import json, os, sys
    import tractor_host as th
    from tractor_host import testing

    def main(shape, gil, end):
        found = None
        while found is None or found.kind != "abandoned":  # one can be killed on its way into the C code
            worker = th.spawn(
                "tractor_host.testing:stuck", shape, backend="subint", gil=gil, stdio="pipe",
                cancel_timeout=0, kill_timeout=0.2, name="sticky",
            )
            testing.wait_ready(worker)
            found = worker.kill()
        counts = th.statistics()
        (stuck,) = th.quarantine()
        print(json.dumps({
            "kind": found.kind, "rung": found.rung, "elapsed": found.elapsed,
            "quarantined": counts.quarantined, "abandoned": counts.abandoned,
            "stuck": [str(frame) for thread in found.stuck for frame in thread.frames],
            "name": stuck.name, "frames": [str(frame) for frame in stuck.threads[0].frames],
        }), flush=True)
        if end == "raise":
            raise ZeroDivisionError
        sys.exit(int(end))

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""

RECLAIM = """
    import helpers
    import tractor_host as th

    assert helpers.stuck_for_a_while(gil="own").kill().kind == "abandoned"
    assert len(th.quarantine()) == 1
    helpers.until(lambda: th.statistics().reclaimed, "the end of an abandoned worker")
    assert th.quarantine() == []
    assert th.statistics().quarantined == 0
    print("reclaimed")
"""


@pytest.mark.parametrize("launcher", ["python", "tractor-host"])
@pytest.mark.parametrize("end", ["0", "7", "raise"])
@pytest.mark.parametrize(
    ("shape", "gil"),
    [("c-without-gil", "shared"), ("c-without-gil", "own"), ("hog-sum", "own"), ("hog-regex", "own")],
)
def test_it_is_counted_and_shown_and_the_program_ends_with_its_own_code(
    program: Callable[..., Program], shape: str, gil: str, end: str, launcher: str
) -> None:
    ran = program(ABANDON, launcher=launcher).run(shape, gil, end)
    told = json.loads(ran.stdout)
    assert (told["kind"], told["rung"]) == ("abandoned", "abandoned")
    assert told["elapsed"] < 2
    assert (told["quarantined"], told["abandoned"]) == (1, 1)
    assert told["name"] == "sticky"
    function = {"c-without-gil": "_c_without_gil", "hog-sum": "_hog_sum", "hog-regex": "_hog_regex"}[shape]
    assert any(f"testing.py:{_line_of(function)} in {function}" in frame for frame in told["frames"]), told
    assert told["stuck"] == told["frames"]
    assert ran.returncode == (1 if end == "raise" else int(end)), ran.stderr
    lines = ran.stderr.splitlines()
    assert lines[0] == "tractor-host: worker `sticky` (subint) could not be ended and is abandoned"
    assert (lines[1:] == []) == (end != "raise"), ran.stderr


def _line_of(function: str) -> int:
    """The line of the call that gets stuck: the last one of the function."""
    import inspect

    from tractor_host import testing

    lines, first = inspect.getsourcelines(getattr(testing, function))
    return first + len(lines) - 1


def test_what_comes_back_is_reclaimed(program: Callable[..., Program]) -> None:
    ran = program(RECLAIM).run(env=importable())
    assert (ran.returncode, ran.stdout) == (0, "reclaimed\n"), ran.stderr
    assert ran.stderr.splitlines()[-1].endswith("has ended after all")


def test_promotion_runs_it_in_a_process_from_then_on(program: Callable[..., Program]) -> None:
    ran = program(
        """
        import tractor_host as th
        from tractor_host import testing

        def spawn():
            worker = th.spawn(
                "tractor_host.testing:stuck", "hog-sum", backend="subint", gil="own", stdio="pipe",
                cancel_timeout=0, kill_timeout=0.2, promote=True,
            )
            testing.wait_ready(worker)
            return worker.backend, worker.kill().kind

        import atexit, os

        here = os.getpid()
        atexit.register(lambda: print("ended", os.getpid() == here))
        first = spawn()
        while first == ("subint", "killed"):  # on its way into the C code
            first = spawn()
        print(first, spawn())
        """
    ).run()
    assert (ran.returncode, ran.stdout) == (
        0,
        "('subint', 'abandoned') ('fork', 'killed')\nended True\n",
    ), ran.stderr
