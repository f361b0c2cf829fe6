"""The application that commands are registered with, and what several of them share."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer.core

from ..errors import ConfigError, PluginError
from ..pipeline.plugins import Plugins
from ..util.suggest import did_you_mean

if TYPE_CHECKING:
    from ..pipeline.config import RunConfig


class Commands(typer.core.TyperGroup):
    """The commands; an unknown one is answered with a list of those that exist."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Returns the command of this name, or fails with near names."""
        if args and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"no command {args[0]!r}.{did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands, help="Aligns multi-turn agents on whole conversations.", no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        from ... import __version__

        print(f"turnwise {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    pass


MODULE = typer.Option(
    help="Import this module first, which registers environments; `run` takes its hooks too."
)
KWARGS = typer.Option(help="What the environment is made with (gymnasium.make), as JSON.")
SETTINGS = typer.Option(
    "--set",
    metavar="KEY=VALUE",
    help="Sets a key of the config by its place, as in stages.rl.optimizer.lr=3e-6; the value is"
    " YAML. May be given several times.",
)
LEDGER = typer.Option(help="The ledger's URL, where the one in the config had a password.")


def import_module(module: str | None, plugins: Plugins | None = None) -> None:
    """Imports the module that `--module` names, from the current folder or installed; where it has
    hooks it is a plugin too."""
    if module and (module.endswith(".py") or "/" in module):
        raise PluginError(
            f"--module {module}: name it as `import` does, such as {Path(module).stem}; it is"
            " looked for in this folder"
        )
    try:
        if module:
            found = importlib.import_module(module)
            if plugins is not None:
                plugins.adopt(module, found)
    except ImportError as error:
        raise PluginError(f"--module {module}: {error}") from error


def load_config(files: Sequence[Path], settings: Sequence[str] | None) -> RunConfig:
    """Reads a pipeline: the first file, with further files and settings laid over it."""
    from ..pipeline.config import RunConfig, setting

    return RunConfig.load(*files, *map(setting, settings or ()))


def mapping(name: str, text: str) -> dict[str, Any]:
    """Parses an option that is a JSON object.

    Raises:
        ConfigError: it is not.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f'{name} must be a JSON object such as {{"size": 5}}, got {text}')
    return value
