"""What error messages suggest: near names where a name is not known, and how to install what is missing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import metadata

# What others call it, and what it may be here: the first whose name is known is meant.
SYNONYMS = {
    "learning_rate": ("lr", "optimizer: {lr: ...}"),
    "lr": ("optimizer: {lr: ...}",),
    "beta": ("kl", "optimizer: {kl: ...}"),
    "kl_coef": ("kl", "optimizer: {kl: ...}"),
    "num_generations": ("group_size",),
    "max_tokens": ("max_new_tokens",),
    "max_completion_length": ("max_new_tokens",),
    "environment": ("env",),
    "reward": ("feedback",),
    "reward_funcs": ("feedback",),
    "model": ("policy",),
    "train": ("run",),
    "steps": ("updates",),
}


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Those of the known names that may be meant, the nearest first: spelt alike, or called so by others."""
    names = sorted(known)
    meant = {other: other for other in names}
    for other, here in SYNONYMS.items():
        found = [own for own in here if own.partition(":")[0] in names]
        if other not in meant and found:
            meant[other] = found[0]
    turned = [other for other in names if other != name and sorted(other) == sorted(name)]
    near = [name] if name in meant else difflib.get_close_matches(name, meant, n=3, cutoff=0.6)
    return list(dict.fromkeys([*turned, *(meant[other] for other in near)]))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'? Known: ..." for error messages."""
    names = sorted(known)
    near = near_names(name, names)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{hint} Known: {', '.join(names) or '(none)'}."


def install(extra: str) -> str:
    """The command that installs what an extra of this package needs, however the package itself came here: the name `turnwise` is not on
    PyPI, so `pip install 'turnwise[...]'` would find nothing, or somebody else's."""
    needs = [line.partition(";") for line in metadata.requires("turnwise") or ()]
    packages = [name.strip() for name, _, marker in needs if f'extra == "{extra}"' in marker.replace("'", '"')]
    return f"pip install {' '.join(map(repr, packages))}"
