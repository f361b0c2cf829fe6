"""Writes the commands of docs/commands.md from the command line itself, plugins' commands too.

    python benchmarks/commands.py

The page's own words, above the mark, stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import turnwise
import turnwise.engine.cli.main  # it gives the application its commands
import typer
from turnwise.engine.cli.app import app
from typer.cli import get_docs_for_click

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
MARK = "<!-- the rest is written by benchmarks/commands.py -->\n"


def page(text: str) -> str:
    """Returns the page with every command as it is."""
    turnwise.Plugins().call_commands(app)
    program: Any = typer.main.get_command(app)
    _whole(program)
    written = get_docs_for_click(obj=program, ctx=typer.Context(program), name="turnwise")
    commands = written.partition("**Commands**:\n\n")[2].replace("\n#", "\n\n#")
    return text.partition(MARK)[0] + MARK + "\n" + commands.replace("\n\n\n", "\n\n").strip() + "\n"


def _whole(command: Any) -> None:
    """Has the list of commands show the first paragraph of each one's help, not its beginning."""
    for each in getattr(command, "commands", {}).values():
        each.short_help = " ".join((each.help or "").split("\n\n")[0].split())
        _whole(each)


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(PAGE.read_text()))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
