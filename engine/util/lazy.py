"""Lazy public modules: names are listed once, in a stub, and imported when they are first used."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def from_stub(module: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` of a module or package whose names are those that the
    `.pyi` file of the same name imports.

    Type checkers read the same stub, so that a name stands in one place only.

    Args:
        module, file: `__name__` and `__file__` of the module.
    """
    package = module if Path(file).stem == "__init__" else module.rpartition(".")[0]
    homes = {
        alias.name: "." * node.level + (node.module or alias.name)
        for node in ast.parse(Path(file).with_suffix(".pyi").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def resolve(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = import_module(homes[name], package)
        if homes[name].lstrip(".") != name:  # else it is a module itself
            value = getattr(value, name)
        vars(sys.modules[module])[name] = value
        return value

    return resolve, lambda: sorted(homes)
