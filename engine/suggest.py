"""What error messages suggest: near names where a name is not known, and how to install what is missing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import metadata


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'? Known: ..." for error messages."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{hint} Known: {', '.join(names) or '(none)'}."


def install(extra: str) -> str:
    """The command that installs what an extra of this package needs, however the package itself came here: the name `turnwise` is not on
    PyPI, so `pip install 'turnwise[...]'` would find nothing, or somebody else's."""
    needs = [line.partition(";") for line in metadata.requires("turnwise") or ()]
    packages = [name.strip() for name, _, marker in needs if f'extra == "{extra}"' in marker.replace("'", '"')]
    return f"pip install {' '.join(map(repr, packages))}"
