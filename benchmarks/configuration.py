"""Writes the tables of docs/configuration.md from the fields and docstrings of the code.

    python benchmarks/configuration.py

The page's own words stay; between `<!-- options: NAME -->` and `<!-- end -->` stands the table of
NAME: "run", "policy", "env", "feedback"; a part, such as "stage rl" or "stage rl.gold"; a block of
options that parts share; or all parts of a kind, such as "every optimizer". What stands nowhere by
name is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import turnwise
from turnwise.engine.feedback.specs import SETTINGS, Source
from turnwise.engine.pipeline.config import PolicyConfig, RunConfig
from turnwise.engine.pipeline.options import KINDS, Option, every_part, options_of, table, tables
from turnwise.engine.stages.environments import EnvConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
REGION = re.compile(r"(<!-- options: ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def sections(plugins: turnwise.Plugins) -> dict[str, str]:
    """Returns what can stand between the marks, by name."""
    parts = list(every_part(plugins))
    found = tables(parts)
    usual = {"name": ("the judge's",), "weight": ("1; 0 where not required",)}
    judge = 'a registered name, "package.module:function", or in Python an object or a function.'
    asked = [Option("Source", ("judge",), ("needed",), judge)] + [
        Option(option.owner, option.keys, usual.get(option.keys[0], option.defaults), option.text)
        for option in options_of(Source)
        if {*option.keys} <= {*SETTINGS}
    ]
    found |= {
        "run": table(options_of(RunConfig)),
        "policy": table(options_of(PolicyConfig)),
        "env": table(options_of(EnvConfig)),
        "feedback": table(asked),
    }
    for kind in KINDS:
        found[f"every {kind}"] = "\n\n".join(
            f"### `{name.removeprefix(kind).strip()}`\n\n{summary(factory)}\n\n{found.pop(name)}"
            for name, factory in parts
            if kind != "stage" and name.startswith(f"{kind} ")
        )
    return {name: text for name, text in found.items() if text}


def summary(factory: Callable[..., Any]) -> str:
    """Returns the first paragraph of a part's docstring, in one line."""
    paragraph = inspect.cleandoc(factory.__doc__ or "").split("\n\n")[0]
    return " ".join(paragraph.split())


def page(text: str, found: dict[str, str]) -> str:
    """Returns the page with every table as it should be.

    Raises:
        ValueError: a mark that names nothing, or something that no mark names.
    """
    marks = [mark for _, mark, _ in REGION.findall(text)]
    odd = sorted({*marks} ^ {*found}) + sorted({m for m in marks if marks.count(m) > 1})
    if odd:
        raise ValueError(f"{PAGE.name}: {odd} must stand in exactly one mark")
    return REGION.sub(lambda m: f"{m[1]}\n{found[m[2]]}\n\n{m[3]}", text)


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(PAGE.read_text(), sections(turnwise.Plugins())))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
