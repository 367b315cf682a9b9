"""Makes the modules of `imports.py`, so that `from nanoflow.sampling_params import SamplingParams` works.

They have no files: each name is fetched from its home on access. Importing a module of vLLM that nanoflow lacks raises
an ImportError with the reason. Real modules take precedence.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from nanoflow.compat.imports import MISSING, MISSING_MODULES, MODULES


def fetch(home: str, name: str) -> Any:
    """A name from its home: a module, or `module:name`."""
    module, _, other = home.partition(":")
    return getattr(importlib.import_module(module), other or name)


def missing(name: str) -> ImportError | None:
    """The error for a name of vLLM that nanoflow lacks; None for other names."""
    return ImportError(f"nanoflow has no {name}: {MISSING[name]}", name=name) if name in MISSING else None


def install() -> None:
    """Register the finder, once, after all others."""
    if not any(isinstance(finder, FamiliarFinder) for finder in sys.meta_path):
        sys.meta_path.append(FamiliarFinder())


class FamiliarFinder(MetaPathFinder):
    """Finds the modules of the table, and raises the reason for those that nanoflow lacks."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`.

        Raises:
            ImportError: The module is one of vLLM that nanoflow lacks.
        """
        if fullname in MODULES:
            is_package = any(other.startswith(fullname + ".") for other in (*MODULES, *MISSING_MODULES))
            return ModuleSpec(fullname, _FamiliarLoader(), is_package=is_package)
        for name, reason in MISSING_MODULES.items():
            if fullname == name or fullname.startswith(name + "."):
                raise ModuleNotFoundError(f"there is no {fullname}: {reason}", name=fullname)
        return None


class _FamiliarLoader(Loader):
    """Gives a module a `__getattr__` that fetches its names."""

    def create_module(self, spec: ModuleSpec) -> None:
        """See `importlib.abc.Loader`."""

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        homes = MODULES[module.__name__]

        def get(name: str) -> Any:
            if name in homes:
                return fetch(homes[name], name)
            error = missing(name)
            if error is not None:
                raise error
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        vars(module).update(__getattr__=get, __all__=sorted(homes), __doc__="Names of vLLM; see nanoflow.compat.")
