"""The options of every part, read from its signature and its docstring: what the command `turnwise
options` shows and docs/configuration.md holds."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

from ..protocols import Combiner
from ..util.section import Section
from ..util.wording import name_of
from .plugins import Plugins

KINDS = (
    "stage",
    "optimizer",
    "credit method",
    "combiner",
    "aggregator",
    "curriculum",
    "backend",
    "judge",
    "model",
)

# The options that name a part, and the kind of part that it is.
PARTS = {
    "optimizer": "optimizer", "credit": "credit method", "combiner": "combiner",
    "curriculum": "curriculum", "backend": "backend", "aggregator": "aggregator",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One entry of a docstring: a key, or keys that are explained together.

    Attributes:
        owner: the class that declares them; a block of options that several parts share is a class.
        keys: their names.
        defaults: as a config would write them; "needed" where there is none.
        text: what they mean.
    """

    owner: str
    keys: tuple[str, ...]
    defaults: tuple[str, ...]
    text: str


def options_of(factory: Callable[..., Any]) -> list[Option]:
    """Returns the options of a part, its own ones first, then those of its base classes.

    A key without a word on it has an empty text.
    """
    section = inspect.isclass(factory) and issubclass(factory, Section)
    # By the engine, and not by a config.
    given = set() if section else {"plugins", "policy"}
    if inspect.isclass(factory) and issubclass(factory, Combiner):
        given.add("weights")  # of the sources: theirs
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(factory).parameters.items()
        if name not in given
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    defaults = {name: _default(factory, p) for name, p in parameters.items()}
    owners = factory.__mro__ if inspect.isclass(factory) else [factory]
    found: list[Option] = []
    known: set[str] = set()
    for owner in owners:
        own = []
        for keys, text in entries(inspect.cleandoc(owner.__doc__ or "")):
            mine = tuple(key for key in keys if key in defaults and key not in known)
            if mine:
                own.append(Option(owner.__name__, mine, tuple(defaults[k] for k in mine), text))
                known.update(mine)
        found += own
    name = name_of(factory)
    bare = [
        Option(name, (key,), (value,), "") for key, value in defaults.items() if key not in known
    ]
    return found + bare


def entries(doc: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the entries of a docstring's sections "Args" and "Attributes": the names, and their
    explanation in one line."""
    names: tuple[str, ...] = ()
    text: list[str] = []
    inside = False
    for line in [*doc.splitlines(), "End:"]:
        indent = len(line) - len(line.lstrip())
        entry = re.match(r"    ([a-z_0-9]+(?:, [a-z_0-9]+)*):(?: (.*))?$", line) if inside else None
        if names and (entry or (line.strip() and indent < 8)):
            yield names, " ".join(text).strip()
            names, text = (), []
        if not indent and line.strip():
            inside = line in ("Args:", "Attributes:")
        elif entry:
            names, text = tuple(entry[1].split(", ")), [entry[2] or ""]
        elif names:
            text.append(line.strip())


def _default(factory: Callable[..., Any], parameter: inspect.Parameter) -> str:
    value = parameter.default
    if dataclasses.is_dataclass(factory):
        field = {f.name: f for f in dataclasses.fields(factory)}.get(parameter.name)
        if field is not None and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
    if value is parameter.empty:
        return "needed"
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return re.sub(r"e([-+])0*", r"e\1", f"{value:g}")
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"[{', '.join(map(str, value))}]"
    return str(value) if str(value) else "empty"


def nested(kind: Any) -> Iterator[tuple[str, type[Section]]]:
    """Yields the options of a section that are sections themselves, by name."""
    for name, field in kind.model_fields.items():
        for each in (field.annotation, *get_args(field.annotation)):
            if inspect.isclass(each) and issubclass(each, Section):
                yield name, each


def every_part(plugins: Plugins) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yields all that a config can name, as "kind name", and what makes it."""
    for kind in KINDS:
        for name in plugins.names(kind):
            yield f"{kind} {name}", plugins.factory(kind, name)


def count(parts: Iterable[tuple[str, Callable[..., Any]]]) -> tuple[int, int]:
    """Returns how many options these parts have in all, and how many of these are written down:
    blocks that parts share are written once."""
    options = [option for _, factory in parts for option in options_of(factory)]
    return (
        sum(len(option.keys) for option in options),
        len({(option.owner, key) for option in options for key in option.keys}),
    )


def table(options: Sequence[Option]) -> str:
    """Returns the Markdown table of options."""
    rows = ["| key | default | what it is |", "| --- | --- | --- |"]
    for option in options:
        keys = ", ".join(f"`{key}`" for key in option.keys)
        text = option.text.replace("|", "\\|")
        rows.append(f"| {keys} | {', '.join(option.defaults)} | {text} |")
    return "\n".join(rows)


def tables(parts: Iterable[tuple[str, Callable[..., Any]]]) -> dict[str, str]:
    """Returns a Markdown table for every part, and for every block of options that several parts
    share, by name.

    A part's text names the blocks it has, and where its defaults are others. Sections that stand in
    a part (`gold` of `rl`) have tables of their own.
    """
    known = [(name, factory, options_of(factory)) for name, factory in parts]
    homes = {factory: name.split(" ", 1)[-1] for name, factory, _ in known}
    times = Counter(owner for _, _, options in known for owner in {o.owner for o in options})
    found: dict[str, str] = {}
    for name, factory, options in known:
        blocks = [
            kind
            for kind in reversed(inspect.getmro(factory)[1:] if inspect.isclass(factory) else ())
            if times[kind.__name__] > 1 and any(o.owner == kind.__name__ for o in options)
        ]
        shared = {kind.__name__ for kind in blocks}
        own = [option for option in options if option.owner not in shared]
        lines = [table(own)] if own else []
        if blocks:
            names = [homes.get(kind, kind.__name__) for kind in blocks]
            links = ", ".join(f"[{each}](#{each.lower()})" for each in names)
            other = _other_defaults(options, blocks)
            lines.append(f"{'Also' if own else 'Its options:'} {links}{other}.")
        found[name] = "\n\n".join(lines) or "It has no options."
        found |= {k.__name__: table(_of_block(k)) for k in blocks if k not in homes}
        if inspect.isclass(factory) and issubclass(factory, Section):
            for key, inner in nested(factory):
                found[f"{name}.{key}"] = table(options_of(inner))
    return found


def _of_block(kind: type) -> list[Option]:
    return [option for option in options_of(kind) if option.owner == kind.__name__]


def _other_defaults(options: Sequence[Option], blocks: Sequence[type]) -> str:
    """Returns which defaults of a part are not those of its blocks, as a clause."""
    usual = {
        key: default
        for kind in blocks
        for option in _of_block(kind)
        for key, default in zip(option.keys, option.defaults, strict=True)
    }
    given = {
        key: default
        for option in options
        for key, default in zip(option.keys, option.defaults, strict=True)
    }
    other = [f"`{key}` {given[key]}" for key in usual if key in given and given[key] != usual[key]]
    return f"; here {', '.join(other)}" if other else ""
