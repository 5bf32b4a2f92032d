"""What joblib has workers call, in a module that subinterpreters can import too (numpy is not for them)."""

from __future__ import annotations

import os
from typing import Any


def fail_at(number: int, bad: int) -> int:
    if number == bad:
        raise LookupError(f"no {number}")
    return number


def crash_at(number: int, bad: int) -> int:
    if number == bad:
        os.abort()
    return number


def inner(count: int) -> tuple[str, int]:
    from joblib import Parallel, delayed

    parallel = Parallel(n_jobs=2)
    return type(parallel._backend).__name__, sum(parallel(delayed(abs)(number) for number in range(count)))


def inner_by_name(count: int) -> list[int]:
    from joblib import Parallel, delayed

    found: list[int] = Parallel(n_jobs=2, backend="tractor_host")(delayed(abs)(one) for one in range(count))
    return found


def write(array: Any) -> Any:
    array[0] = 7
    return array
