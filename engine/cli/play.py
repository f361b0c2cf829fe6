"""`turnwise evaluate`, `chat` and `envs`: policies and environments at work, without learning."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .app import KWARGS, MODULE, import_module, mapping

if TYPE_CHECKING:
    from ..records.episode import Episode

SEATS = typer.Option(
    help='Who replies in each seat, as JSON: {"0": "policy", "1": "random"}; "self" or'
    ' {"policy": FOLDER}, too.'
)

LIMIT = typer.Option(
    min=1, help="Of a reply; default: as in the run that trained the policy, else 256."
)


def evaluate(
    policy: Annotated[str, typer.Argument(help="A model's folder or hub name.")],
    env: Annotated[str, typer.Option(help="An environment's id.")],
    episodes: Annotated[int, typer.Option(min=1)] = 300,
    player: Annotated[
        list[str] | None, typer.Option(help="Also these players of the environment, e.g. expert.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int | None, LIMIT] = None,
    options: Annotated[str, typer.Option(help="Reset options as JSON.")] = "{}",
    kwargs: Annotated[str, KWARGS] = "{}",
    seats: Annotated[str, SEATS] = "{}",
    seed: Annotated[int, typer.Option(help="Of the starts.")] = 20_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    module: Annotated[str | None, MODULE] = None,
) -> None:
    """Plays a policy on starts of its own, next to scripted players; see --options for held-out
    content."""
    from ..pipeline.progress import quiet
    from ..policy.policy import Policy
    from ..records.sampling import Sampling
    from ..rollout.players import PolicyPlayer, ScriptPlayer
    from ..stages.environments import EnvConfig, check_envs
    from ..stages.evaluate import check_one_seat, play_held_out

    with _only_our_output() if as_json else contextlib.nullcontext():
        import_module(module)
        chosen = EnvConfig(
            id=env,
            options=mapping("--options", options),
            kwargs=mapping("--kwargs", kwargs),
            seats=mapping("--seats", seats),
        )
        check_envs([chosen], player or [], several_seats=True)
        check_one_seat(chosen)
        quiet()
        limit = max_new_tokens or _trained_limit(Path(policy))

        def of(folder: str) -> PolicyPlayer:
            return PolicyPlayer(Policy.from_pretrained(folder), Sampling(temperature, limit))

        players: dict[str, Any] = {"policy": of(policy)} | {
            name: ScriptPlayer(name) for name in player or []
        }
        others = {label: of(name) for label, name in chosen.other_policies.items()}
        played = {
            name: play_held_out(each, chosen, episodes, seed, others=others)
            for name, each in players.items()
        }
    _print_played(played, as_json)


def _print_played(played: Mapping[str, Sequence[Episode]], as_json: bool) -> None:
    """Prints what players' episodes came to, and how many failed."""
    from dataclasses import asdict

    from ..analysis.scores import score
    from ..report.scores import print_scores

    table = {name: asdict(score(found)) for name, found in played.items()}
    for name, found in played.items():
        if reasons := Counter(e.reason for e in found if e.ending == "failed"):
            [(reason, _)] = reasons.most_common(1)
            print(
                f"{reasons.total()} of {len(found)} episodes of {name!r} failed and are left out:"
                f" {reason}",
                file=sys.stderr,
            )
    if as_json:
        print(json.dumps(table, indent=2))
    else:
        print_scores(table)


def _trained_limit(policy: Path) -> int:
    """Returns the most tokens of a reply in the run that trained the policy, from its folder; 256
    where the folder does not say."""
    from ..pipeline.config import flat
    from ..pipeline.folder import read_config

    try:
        stages = [
            options or {}
            for stage in flat(read_config(policy.parent)["stages"])
            for options in stage.values()
        ]
        found = [
            int(options["max_new_tokens"]) for options in stages if "max_new_tokens" in options
        ]
    except (ConfigError, KeyError, TypeError, ValueError):
        found = []
    limit, where = (found[-1], f", as in {policy.parent / 'config.yaml'}") if found else (256, "")
    print(f"replies of at most {limit} tokens{where} (--max-new-tokens)", file=sys.stderr)
    return limit


@contextlib.contextmanager
def _only_our_output() -> Iterator[None]:
    """Sends what environments print, from C too, to standard error: standard output is for programs
    that read our JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def envs(
    check: Annotated[
        str | None,
        typer.Option(help="Plays whole episodes of this environment and lists what is wrong."),
    ] = None,
    kwargs: Annotated[str, KWARGS] = "{}",
    options: Annotated[str, typer.Option(help="Reset options as JSON.")] = "{}",
    episodes: Annotated[int, typer.Option(min=1, help="Starts to play.")] = 20,
    limit: Annotated[float, typer.Option(min=0.01, help="Seconds that one call may take.")] = 10.0,
    module: Annotated[str | None, MODULE] = None,
) -> None:
    """Lists dialogue environments, or checks one."""
    import gymnasium

    from ..environments.checker import check_environment
    from ..environments.registry import MISSING, dialogue_ids

    import_module(module)
    if check is None:
        for name in dialogue_ids():
            print(f"{name}  {gymnasium.registry[name].entry_point}")
        for name, why in MISSING.items():
            print(f"{name}  not here: {why}")
        return
    asked = mapping("--options", options)
    problems = check_environment(
        check, episodes=episodes, limit=limit, options=asked, **mapping("--kwargs", kwargs)
    )
    for problem in problems:
        print(f"- {problem}")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"{check}: {count if problems else 'nothing wrong'}")
    if problems:
        raise typer.Exit(1)


def chat(
    policy: Annotated[
        str | None,
        typer.Argument(help="A model's folder or hub name; none: you play the agent yourself."),
    ] = None,
    env: Annotated[
        str | None, typer.Option(help="Play this environment: the policy as the agent, or you.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system prompt, when you talk to the policy.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int | None, LIMIT] = None,
    options: Annotated[str, typer.Option(help="Reset options as JSON.")] = "{}",
    kwargs: Annotated[str, KWARGS] = "{}",
    seats: Annotated[str, SEATS] = "{}",
    seed: Annotated[int, typer.Option(help="Of replies and of the environment's start.")] = 0,
    module: Annotated[str | None, MODULE] = None,
) -> None:
    """Opens a chat with a policy, shows it at work in an environment, or lets you play an
    environment yourself."""
    from ..pipeline.progress import quiet
    from ..stages.environments import EnvConfig
    from . import chat as chat_command

    import_module(module)
    if policy is None and env is None:
        raise ConfigError(
            "name a policy to talk to, an --env to play yourself, or both to watch the policy play"
        )
    quiet()
    limit = max_new_tokens or (256 if policy is None else _trained_limit(Path(policy)))
    if env is None:
        assert policy is not None
        chat_command.with_policy(policy, system, temperature, limit, seed)
    else:
        chosen = EnvConfig(
            id=env,
            options=mapping("--options", options),
            kwargs=mapping("--kwargs", kwargs),
            seats=mapping("--seats", seats),
        )
        chat_command.in_environment(chosen, seed, policy, temperature, limit)
