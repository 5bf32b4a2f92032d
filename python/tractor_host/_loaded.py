"""Modules that are made use of only where they are loaded already. Workers load this too, so it imports
nothing that it can do without."""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def loaded(name: str) -> Any:
    """The module of that name, or `None`: also while it is being loaded.

    Another thread may be at that just now; then `sys.modules` has a module that lacks most of itself, and
    nobody has made anything of it yet.
    """
    module = sys.modules.get(name)
    # As the import system sees it itself. A stand-in for a module need not have a specification.
    if getattr(getattr(module, "__spec__", None), "_initializing", False):
        return None
    return module
