"""The fork server: imports what workers need, then does nothing but fork.

It runs in a process of its own, in one thread. What it forks are children of the host.
"""

import sys

from tractor_host import _native
from tractor_host._child import _fs_decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: What every worker imports sooner or later.
_ALWAYS = ("atexit", "faulthandler", "os", "signal", "runpy", "ast", "threading", "tractor_host._remote")


def main(template: dict[str, Any]) -> None:
    """Does the fork server's work. Returns in forked workers only."""
    sys.path[:] = map(_fs_decode, template["spec"]["path"])
    sys.argv = list(map(_fs_decode, template["spec"]["argv"]))
    for name in _ALWAYS:
        __import__(name)
    failures = []
    for name in template["preload"]:
        try:
            __import__(name)
        except BaseException as error:
            import traceback

            text = "".join(traceback.format_exception(error))
            failures.append({"module": name, "traceback": text[-_LONGEST:]})
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    import gc

    # What is there stays: a collection in a worker would write to, and so copy, every page of it.
    gc.collect()
    gc.freeze()
    _native.zygote_serve(failures)


#: Characters of a traceback that are passed on: its end.
_LONGEST = 16_000
