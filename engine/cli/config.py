"""`turnwise config`: a commented pipeline to begin with, and the schema for editors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..util import files
from .app import MODULE, import_module

config = typer.Typer(
    help="Writes a pipeline to begin with, or the schema that editors complete pipelines by.",
    no_args_is_help=True,
)

PIPELINE = """\
# A pipeline of Turnwise. Try it:   turnwise run {file} --dry-run
# Every option of a part:           turnwise options rl {optimizer}
policy:
  model: {model}    # a folder, a name on the hub, or one of `turnwise model get`
{lora}
stages:
{sft}  - rl:
      env: {env}
      # how the policy learns; the KL to the policy it began as keeps its language
      optimizer: {{name: {optimizer}, lr: {lr}{kl}}}
{credit}      # whose opinion counts: the environment's own reward, and judges (docs/judges.md)
      feedback: {feedback}
      updates: {updates}
      groups: 16         # starts per update
      group_size: 8      # conversations of each start
      max_new_tokens: 128
      max_turns: 20
  - evaluate:
      # other starts than those trained on; the policy as it came plays them too
      env: {env}
      episodes: 200
      max_new_tokens: 128
"""
SFT = """\
  - sft:
      data: {data}    # conversations, one JSON object with `messages` per line
      epochs: 2
      lr: {lr}
"""
CREDIT = """\
      # which turn earned the outcome (docs/credit.md)
      credit: {}
"""
LORA = "  lora: {r: 16, lora_alpha: 32}    # adapters are trained, and not all weights"


@config.command()
def new(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="The file to write.")] = Path("pipeline.yaml"),
    model: Annotated[str | None, typer.Option(help="The policy to align.")] = None,
    env: Annotated[str | None, typer.Option(help="The environment to play in.")] = None,
    optimizer: Annotated[str, typer.Option(help="grpo, ppo, or a plugin's.")] = "grpo",
    judge: Annotated[
        list[str] | None, typer.Option(help="A judge in addition to the environment's reward.")
    ] = None,
    demonstrations: Annotated[
        Path | None, typer.Option(help="Conversations to imitate before.")
    ] = None,
    lora: Annotated[bool, typer.Option(help="Train adapters.")] = True,
    updates: Annotated[int, typer.Option(min=1, help="Of the stage rl.")] = 100,
    module: Annotated[str | None, MODULE] = None,
) -> None:
    """Writes a commented pipeline; asks for what is not given, on a terminal."""
    import yaml

    from ..pipeline.config import Loader
    from ..pipeline.options import options_of
    from ..pipeline.parts import declared
    from ..pipeline.run import Run

    import_module(module, context.obj)
    if out.exists():
        raise ConfigError(f"{out} is there already: give another name, or remove it")
    model = model or _asked("--model", "Which model", "Qwen/Qwen2.5-0.5B-Instruct")
    env = env or _asked("--env", "Which environment", "turnwise/SupportDesk-v0")
    made = context.obj.factory("optimizer", optimizer)
    known = {key for option in options_of(made) for key in option.keys}
    kind = declared(context.obj, "optimizer", optimizer)
    credit = ""
    if "advantages" in kind.consumes:
        credit = "{name: gae, lam: 0.95}" if "values" in kind.provides else "turn-returns"
    feedback: list[Any] = ["environment", *(judge or ())]
    text = PIPELINE.format(
        file=out, model=json.dumps(model), env=json.dumps(env),
        lora=LORA if lora else "", optimizer=optimizer, lr="1.0e-5" if lora else "1.0e-6",
        kl=", kl: 0.02" if "kl" in known else "",
        credit=CREDIT.format(credit) if credit else "",
        feedback=json.dumps(feedback), updates=updates,
        sft=SFT.format(data=json.dumps(str(demonstrations)), lr="1.0e-4" if lora else "1.0e-5")
        if demonstrations else "",
    )  # fmt: skip
    Run(yaml.load(text, Loader), plugins=context.obj)  # checks all of it
    files.write(out, text)
    print(f"{out} is written. What it would do:  turnwise run {out} --dry-run")


def _asked(option: str, question: str, default: str) -> str:
    if not sys.stdin.isatty():
        raise ConfigError(f"give {option}, such as {option} {default}")
    return str(typer.prompt(question, default=default))


@config.command()
def schema(
    context: typer.Context,
    out: Annotated[Path | None, typer.Argument(help="A file; default: print it.")] = None,
    module: Annotated[str | None, MODULE] = None,
) -> None:
    """Writes the JSON schema of pipelines, as the installed plugins make it.

    For editors with the YAML language server the first line of a pipeline says where it is: `#
    yaml-language-server: $schema=turnwise.schema.json`.
    """
    from .schema import config_schema

    import_module(module, context.obj)
    text = json.dumps(config_schema(context.obj), indent=1) + "\n"
    if out is None:
        print(text, end="")
        return
    files.write(out, text)
    print(f"{out} is written. Begin a pipeline with:  # yaml-language-server: $schema={out}")
