"""What a stage will play and ask, in lines, for `turnwise run --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..feedback.sources import Sources
from .environments import EnvConfig


def played(
    env: Sequence[EnvConfig], starts: int, size: int, turns: int | None, tokens: int
) -> Iterator[str]:
    """Yields what is played in each environment of a mixture.

    Args:
        env: the mixture.
        starts: how many in all.
        size: conversations of each.
        turns: of a conversation at most; None: the environment's own limit.
        tokens: of a reply at most.
    """
    total = sum(each.weight for each in env)
    limit = "" if turns is None else f" {turns:,} turns each,"
    for each in env:
        share = starts * each.weight / total
        yield (
            f"plays {share * size:,.0f} conversations of {share:,.0f} starts in {each.id}, at"
            f" most{limit} of {tokens} tokens"
        )


def asked(sources: Sources, env: Sequence[EnvConfig], starts: int, size: int) -> Iterator[str]:
    """Yields what each source of each environment is asked; arguments as in `played`."""
    total = sum(each.weight for each in env)
    for each, own, weight in zip(env, sources.of_env, sources.env_weights, strict=True):
        where = f" in {each.id}" if len(env) > 1 else ""
        if weight is not None:
            yield f"is rewarded by the environment{where}, weight {weight:g}"
        for source in own:
            groups = starts * each.weight / total * source.share
            number, what = (
                (groups, "groups") if source.kind == "group" else (groups * size, "conversations")
            )
            times = f", {source.raters} times each" if source.raters > 1 else ""
            waits = "" if source.required else "; no update waits for it"
            yield f"asks {source.name} about {number:,.0f} {what}{where}{times}{waits}"
