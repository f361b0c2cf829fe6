"""Curricula: which starts are played. One file each."""

from __future__ import annotations

from ...protocols import Register, hookimpl


@hookimpl
def register_curricula(register: Register) -> None:
    """Registers the curricula of this package."""
    register("uniform", "turnwise.plugins.curricula.uniform:Uniform")
    register("learnable", "turnwise.plugins.curricula.learnable:Learnable")
    register("staged", "turnwise.plugins.curricula.staged:Staged")
