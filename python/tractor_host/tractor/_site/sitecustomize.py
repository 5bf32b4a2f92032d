"""Found by programs that a test suite starts, in its `PYTHONPATH`: has our backends installed in tractor when
that is imported."""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class _Finder(importlib.abc.MetaPathFinder):
    """Finds tractor as anybody else would, once, and has it loaded by a `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "tractor":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads it, and installs the backends."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What reads a package's files looks for its loader.
        assert module.__spec__ is not None, "the import system sets it"
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        from tractor_host.tractor import install

        install()


sys.meta_path.insert(0, _Finder())

# The one that this stands before, if there is one, is run in its place.
_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != _here]
_other = importlib.machinery.PathFinder.find_spec("sitecustomize")
if _other is not None and _other.loader is not None:
    _other.loader.exec_module(importlib.util.module_from_spec(_other))
