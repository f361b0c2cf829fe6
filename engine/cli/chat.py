"""Conversations in the terminal: a person and a policy, a policy and an environment, or a person
and an environment."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..records.episode import Message
from ..report.transcript import printable
from ..rollout.conversation import LiveEpisode, Where
from ..rollout.players import PolicyPlayer, ScriptPlayer
from ..rollout.rollout import rollout
from ..stages.environments import EnvConfig, check_envs
from ..stages.evaluate import check_one_seat

HELP = "An empty line or Ctrl-D ends it."


def with_policy(
    policy: str, system: str | None, temperature: float, max_new_tokens: int, seed: int
) -> None:
    """Runs a conversation with a policy until the person ends it."""
    from ..policy.policy import Policy

    console = Console()
    model = Policy.from_pretrained(policy)
    messages = [Message("system", system)] if system else []
    console.print(f"[dim]{escape(policy)}. {HELP}[/dim]")
    while (line := _ask("you")) is not None:
        messages.append(Message("user", line))
        reply = model.reply(
            messages,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed + len(messages),
        )
        messages.append(Message("assistant", reply))
        _say(console, "policy", reply)


def in_environment(
    env: EnvConfig,
    seed: int,
    policy: str | None,
    temperature: float,
    max_new_tokens: int,
) -> None:
    """Plays one episode: the policy as the agent, or the person, who is shown what the policy
    would be: the system prompt and the tools. Where there are several seats they have that of the
    policy."""
    from ..policy.policy import Policy
    from ..records.sampling import Sampling

    console = Console()
    check_envs([env], several_seats=True)
    check_one_seat(env)
    shown = 0

    def person(conversation: Sequence[Message]) -> str:
        nonlocal shown
        for message in conversation[shown:]:
            if message.role != "assistant":
                _say(console, message.role, message.content)
        shown = len(conversation)
        line = _ask("you")
        if line is None:
            print("Left the conversation.", file=sys.stderr)
            raise SystemExit(0)
        return line

    def of(folder: str) -> PolicyPlayer:
        return PolicyPlayer(Policy.from_pretrained(folder), Sampling(temperature, max_new_tokens))

    if policy is None:
        seat = f", in seat {env.trained[0]}" if env.seats else ""
        console.print(f"[dim]You are the agent in {escape(env.id)}{seat}. {HELP}[/dim]")
    player: Any = _Person(person) if policy is None else of(policy)
    others = {label: of(name) for label, name in env.other_policies.items()}
    [episode] = rollout(player, [(start, 0) for start in env.starts(seed, 1)], others=others)
    for message in episode.messages[
        0 if policy else len(episode.messages) - (1 if episode.final else 0) :
    ]:
        _say(console, "policy" if message.role == "assistant" else message.role, message.content)
    ended = episode.ending + (f" ({episode.reason})" if episode.reason else "")
    success = (
        "" if episode.success is None else f", {'success' if episode.success else 'no success'}"
    )
    if episode.ending == "failed":
        raise SystemExit(ended)
    console.print(f"{escape(ended)}; return {episode.env_return:g}{success}", style="bold")


class _Person(ScriptPlayer):
    """A person at the terminal."""

    def begin(self, live: LiveEpisode, where: Where) -> None:
        """Shows what the environment says before its first words."""
        assert live.reset is not None
        console = Console()
        if live.reset.system is not None:
            _say(console, "system", live.reset.system)
        for tool in live.reset.tools:
            _say(console, "tool", json.dumps(tool))
        if live.reset.tools:
            form = '<tool_call>{"name": NAME, "arguments": {...}}</tool_call>'
            console.print(f"A call is written as {form}", style="dim", markup=False)


def _ask(who: str) -> str | None:
    """Reads a line from the person; None when they are done."""
    try:
        line = input(f"{who}> ").strip()
    except EOFError:
        return None
    return line or None


def _say(console: Console, who: str, text: str) -> None:
    console.print(f"[bold]{escape(who)}[/bold]  {escape(printable(text))}", highlight=False)
