"""`python -m tractor_host.tractor PROGRAM [ARG…]`: runs a program that uses tractor, on our backends."""

from __future__ import annotations

import os
import runpy
import sys

from tractor_host.tractor import install


def main() -> None:
    """Runs it as `python PROGRAM` does. `TRACTOR_SPAWN_METHOD` names the spawn method of programs that name
    none; `tractor_host` by default."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m tractor_host.tractor PROGRAM [ARG…]")
    install()
    os.environ.setdefault("TRACTOR_SPAWN_METHOD", "tractor_host")
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
