"""The public signatures, as others write against them: a change of one is a decision,
and shows here.

After a change that is meant:  python tests/test_public_api.py > tests/public_api.json
"""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import turnwise
from turnwise.engine import hookspecs

PINNED = Path(__file__).parent / "public_api.json"


def signature(value: Any) -> str:
    """What one writes to call it, without annotations: these may become more exact."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    plain = [
        parameter.replace(
            annotation=inspect.Parameter.empty,
            default=parameter.default
            if isinstance(parameter.default, (str, int, float, bool, tuple, type(None)))
            or parameter.default is inspect.Parameter.empty
            else "...",
        )
        for parameter in found.parameters.values()
    ]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def api() -> dict[str, Any]:
    """Every public name: how it is called, and of a class its public methods."""
    found: dict[str, Any] = {}
    names = [(name, getattr(turnwise, name)) for name in turnwise.__all__ if name != "judges"]
    names += [
        (f"judges.{name}", getattr(turnwise.judges, name)) for name in turnwise.judges.__all__
    ]
    for name, value in names:
        if inspect.isclass(value):
            methods = {
                method: signature(function)
                for method, function in inspect.getmembers(value, inspect.isfunction)
                if not method.startswith("_") and function.__module__.startswith("turnwise.")
            }
            found[name] = {"": signature(value), **methods}
        else:
            found[name] = signature(value) if callable(value) else type(value).__name__
    for module in ("protocols", "learning", "judging", "running", "tools"):
        found[module] = dir(import_module(f"turnwise.{module}"))
    hooks = {n: signature(f) for n, f in vars(hookspecs).items() if hasattr(f, "turnwise_spec")}
    return {**found, "hooks": hooks}


def test_public_signatures_are_those_that_others_write_against() -> None:
    pinned, now = json.loads(PINNED.read_text()), api()
    assert now.keys() == pinned.keys()
    for name, value in now.items():
        assert value == pinned[name], f"{name} is called otherwise than before"


if __name__ == "__main__":
    print(json.dumps(api(), indent=1, sort_keys=True))
