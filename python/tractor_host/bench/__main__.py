"""`tractor-host bench NAME [OPTION…]`: runs one of the measurements beside this file."""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = ("calls", "ctrl-c", "fairness", "kill", "share", "spawn")


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(f"usage: tractor-host bench {{{','.join(NAMES)}}} [--help] [OPTION…]")
        return 0 if arguments else 2
    if arguments[0] not in NAMES:
        print(f"tractor-host bench: unknown measurement {arguments[0]!r}; there is {', '.join(NAMES)}")
        return 2
    code: int = import_module(f"tractor_host.bench.{arguments[0].replace('-', '_')}").main(arguments[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
