"""`turnwise new KIND NAME`: writes a package of a plugin that passes its own tests at once."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..hookspecs import VERSION
from ..pipeline.plugins import REGISTRIES, Plugins
from ..util import files

TEXTS = Path(__file__).parent / "packages"


class Kind(StrEnum):
    """What a package may begin with."""

    JUDGE = "judge"
    FEEDBACK_SOURCE = "feedback-source"
    ENVIRONMENT = "environment"
    CREDIT = "credit"
    OPTIMIZER = "optimizer"
    COMBINER = "combiner"


def new(
    context: typer.Context,
    kind: Annotated[Kind, typer.Argument(help="What the package adds.")],
    name: Annotated[str, typer.Argument(help="Its name, such as acme-polite.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where it goes; default: a folder of its name.")
    ] = None,
) -> None:
    """Writes a package of a plugin: code, tests, metadata, a workflow; it passes its tests at
    once."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(
            f"a package's name is of small letters, digits and single hyphens, such as"
            f" acme-polite; got {name!r}"
        )
    if problem := _taken(name, context.obj):
        raise ConfigError(f"a package cannot be called {name!r}: {problem}")
    target = folder or Path(name)
    if target.exists():
        raise ConfigError(f"{target} is there already: choose another name or --folder")
    for path, text in package(kind, name).items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        files.write(target / path, text)
    print(
        f"{target} holds a package that adds the {kind} {name!r}.\n\n"
        f"  cd {target}\n"
        "  pip install -e '.[test]' && pytest     # it passes; now make it yours\n"
        f"  turnwise plugins                       # lists it\n"
        "  python -m build                        # the wheel that others install"
    )


def _taken(name: str, plugins: Plugins) -> str:
    """Returns why a package's module, class or part cannot be called so; empty where it can."""
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or keyword.iskeyword(module.capitalize()):
        return "it is a word of Python"
    if module in sys.stdlib_module_names or importlib.util.find_spec(module) is not None:
        return "there is a module of this name, which it would hide"
    taken = [kind for kind in REGISTRIES.values() if name in plugins.names(kind)]
    return f"there is a {taken[0]} of this name" if taken else ""


def package(kind: Kind, name: str) -> dict[str, str]:
    """Returns the files of a package, by path."""
    module = name.replace("-", "_")
    cls = "".join(part.capitalize() for part in name.split("-"))
    words = {
        "NAME": name, "MODULE": module, "CLASS": cls, "KIND": kind.value, "A_KIND": CALLED[kind],
        "ENV": f"{module}/{cls}-v0", "API": str(VERSION),
    }  # fmt: skip
    words["HOOK"], words["USE"] = PARTS[kind]
    plugin = "plugin_environment" if kind is Kind.ENVIRONMENT else "plugin"
    found = {
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "README.md",
        ".github/workflows/test.yml": "test.yml",
        f"src/{module}/__init__.py": f"{plugin}.py.txt",
        f"src/{module}/part.py": f"{kind.value}.py.txt",
        f"tests/test_{module}.py": f"test_{kind.value}.py.txt",
    }
    texts = {path: (TEXTS / name).read_text("utf-8") for path, name in found.items()}
    texts[f"src/{module}/py.typed"] = ""
    return {path: _filled(text, words) for path, text in texts.items()}


def _filled(text: str, words: Mapping[str, str]) -> str:
    """Returns a text with `<WORD>` replaced; what takes a word's place may hold others."""
    for word in ("USE", *words):
        text = text.replace(f"<{word}>", words[word])
    return text


CALLED: Mapping[Kind, str] = {
    Kind.JUDGE: "A judge", Kind.FEEDBACK_SOURCE: "A feedback source",
    Kind.ENVIRONMENT: "An environment", Kind.CREDIT: "A credit method",
    Kind.OPTIMIZER: "An optimizer", Kind.COMBINER: "A combiner",
}  # fmt: skip
RL = "stages:\n  - rl: {env: turnwise/SupportDesk-v0, "
# The hook that registers a kind, and how a config uses it.
PARTS: Mapping[Kind, tuple[str, str]] = {
    Kind.JUDGE: (
        "register_judges", RL + "feedback: [environment, {judge: <NAME>, weight: 0.2}]}",
    ),
    Kind.FEEDBACK_SOURCE: (
        "register_judges", RL + "feedback: [{judge: <NAME>, deadline: 86400}]}",
    ),
    Kind.ENVIRONMENT: ("register_envs", "stages:\n  - rl: {env: <ENV>}"),
    Kind.CREDIT: ("register_credit", RL + "credit: {name: <NAME>, gamma: 0.9}}"),
    Kind.OPTIMIZER: ("register_optimizers", RL + "optimizer: {name: <NAME>, lr: 1.0e-6}}"),
    Kind.COMBINER: ("register_combiners", RL + "combiner: <NAME>}"),
}  # fmt: skip
