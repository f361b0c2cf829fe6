"""`turnwise fits`: how much memory a model takes in play and in training, and what would fit."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from ..errors import ConfigError

UNITS = {
    f"{letter}{rest}": 2.0**power
    for letter, power in (("M", 20), ("G", 30), ("T", 40))
    for rest in ("", "B", "IB")
}


def size_of(text: str) -> float:
    """Reads a size such as "24GB", in bytes; a GB is 1024 MB here, as memory is sold.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS or not float(found[1]):
        raise ConfigError(f"--memory must be a size such as 24GB or 800MB, got {text!r}")
    return float(found[1]) * UNITS[found[2].upper()]


def fits(
    model: Annotated[str, typer.Argument(help="A model's folder, hub name or short name.")],
    gguf: Annotated[str | None, typer.Option(help="The GGUF file in the folder.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="What there is, such as 24GB; default: this machine's.")
    ] = None,
    groups: Annotated[int, typer.Option(min=1, help="In an update.")] = 4,
    group_size: Annotated[int, typer.Option(min=1, help="Conversations in each.")] = 8,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of a conversation, in the end; default: 512, or the context."),
    ] = None,
    kl: Annotated[bool, typer.Option(help="With a KL penalty, which needs a reference.")] = True,
) -> None:
    """Predicts the memory that playing and training a model take, in one process, by setting, and
    says which fit. Weights are not loaded."""
    import psutil
    from rich.console import Console
    from rich.table import Table

    from ..pipeline.progress import quiet
    from ..policy.fitting import Setting, Shape, ways

    quiet()
    conversations = groups * group_size
    room = size_of(memory) if memory else float(psutil.virtual_memory().total)
    shape = Shape(model, gguf)
    tokens = min(512, shape.context) if tokens is None else tokens
    if tokens > shape.context:
        raise ConfigError(f"--tokens {tokens}: the context of {model} has {shape.context}")
    settings = ways(Setting(conversations, tokens, reference=kl))
    table = Table("setting", "play", "update", "fits", box=None, pad_edge=False)
    fitting = []
    for name, setting in settings.items():
        peaks = shape.peaks(setting)
        good = max(peaks.play, peaks.update) <= room
        fitting += [name] * good
        table.add_row(
            name,
            f"{peaks.play / 2**30:.1f} GiB",
            f"{'' if setting.activation_memory else 'about '}{peaks.update / 2**30:.1f} GiB",
            "yes" if good else "no",
        )
    console = Console()
    console.print(
        f"{model}: {shape.parameters:,} parameters. {conversations} conversations of"
        f" {tokens} tokens, in {room / 2**30:.1f} GiB:"
    )
    console.print(table)
    console.print(
        f"Turn on: {fitting[0]}"
        if fitting
        else "None fits: fewer conversations (`groups`, `group_size`, `rows` of the backend),"
        " shorter ones (`max_turns`, `max_new_tokens`), or a smaller model"
    )
    console.print(
        "A stage `evaluate` after training plays the policy as it began too, which holds its"
        f" weights once more: {4 * shape.parameters / 2**30:.1f} GiB in float32 (`before: false`"
        " leaves it out)."
    )
