"""Has the kernel refuse calls, by a seccomp filter: for this process and all that it starts, until it ends.

For programs that tests start, and for what they preload. The numbers are x86_64's.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import sys

#: The exit code of a program on a machine that takes no filter.
NO_FILTER = 99

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_NUMBER, _FIRST_ARGUMENT = 0, 16
_CLONE, _FORK, _VFORK, _CLONE3 = 56, 57, 58, 435
_CLONE_THREAD = 0x10000


def calls(numbers: list[int], error: int) -> None:
    """Refuses these calls to every thread of this process."""
    last = len(numbers)
    _filter(
        (_LOAD, 0, 0, _NUMBER),
        *((_EQUAL, last - index, 0, number) for index, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERROR | error),
    )


def forks(error: int) -> None:
    """Refuses new processes, but not new threads, to every thread of this process."""
    _filter(
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 7, 0, _CLONE3),  # its flags are in memory, where no filter sees them
        (_EQUAL, 5, 0, _FORK),
        (_EQUAL, 4, 0, _VFORK),
        (_EQUAL, 0, 2, _CLONE),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERROR | error),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
    )


def _filter(*steps: tuple[int, int, int, int]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    # PR_SET_NO_NEW_PRIVS; seccomp(SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC).
    if libc.prctl(38, 1, 0, 0, 0) != 0 or libc.syscall(317, 1, 1, program) != 0:
        sys.exit(NO_FILTER)
