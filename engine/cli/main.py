"""The command line: `turnwise run | evaluate | report | compare | chat | export | plugins | envs |
fits | new | config | model`, and whatever commands plugins add (`turnwise demo`).

Exit statuses: 0 done; 1 failed, and the message gives the reason; 2 the command line is wrong; 3
paused until a decision is made; 4 finished, and nothing was learned; 130 ended by Ctrl-C, 143 by
SIGTERM, with everything saved.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path

from ..pipeline.plugins import Plugins
from ..util.secrets import redact
from ..util.wording import one_line
from . import play, results
from .app import app
from .config import config
from .fits import fits
from .model import model
from .new import new
from .run import run

for command in (
    run,
    play.evaluate,
    results.report,
    results.compare,
    play.chat,
    results.export,
    results.plugins,
    play.envs,
    fits,
    new,
):
    app.command()(command)
app.add_typer(model, name="model")
app.add_typer(config, name="config")


def main() -> None:
    """Runs the command line; an error that the user can fix is printed as one message, not as a
    traceback."""
    sys.path.insert(0, os.getcwd())  # the user's own environments and judges, as with `python -m`
    others, ours = warnings.formatwarning, str(Path(__file__).parents[2])
    warnings.formatwarning = lambda message, category, filename, *more: (
        f"turnwise: {redact(str(message))}\n"
        if filename.startswith(ours)
        else redact(others(message, category, filename, *more))
    )
    try:
        plugins = Plugins()
        plugins.call_commands(app)
        app.info.context_settings = {**(app.info.context_settings or {}), "obj": plugins}
        app()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        whole = "\n".join((str(error), *vars(error).get("__notes__", ())))
        lines = redact(whole).splitlines()  # it may quote an environment or a server
        print("turnwise: " + "\n".join(map(one_line, lines)), file=sys.stderr)
        sys.exit(1)


def _is_for_the_user(error: Exception) -> bool:
    """Returns whether an error is one of ours, which says what to do; any other is a bug and keeps
    its traceback."""
    return type(error).__module__.startswith("turnwise.") or (
        isinstance(error, LookupError) and not isinstance(error, (KeyError, IndexError))
    )
