"""The command `turnwise options`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigError
from ..util.suggest import did_you_mean
from .options import count, every_part, options_of
from .plugins import Plugins


def options(
    names: Annotated[
        list[str] | None, typer.Argument(help="Stages, optimizers, judges, ...: by name.")
    ] = None,
) -> None:
    """Lists what a config can name and how many options each has, or the options of some."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    parts = list(every_part(Plugins()))
    console = Console()
    if not names:
        overview = Table("part", "options", "keys")
        for part, factory in parts:
            keys = [key for option in options_of(factory) for key in option.keys]
            overview.add_row(part, str(len(keys)), ", ".join(keys))
        console.print(overview)
        total, written = count(parts)
        console.print(f"{total} options of {len(parts)} parts, declared in {written} places.")
        return
    known = sorted({part.rpartition(" ")[2] for part, _ in parts})
    for name in names:
        if name not in known:
            raise ConfigError(f"no part is called {name!r}.{did_you_mean(name, known)}")
    for part, factory in parts:
        if part.rpartition(" ")[2] in names:
            table = Table("key", "default", "what it is", title=part, title_justify="left")
            for option in options_of(factory):
                cells = ("\n".join(option.keys), "\n".join(option.defaults), option.text)
                table.add_row(*map(escape, cells))
            console.print(table)
