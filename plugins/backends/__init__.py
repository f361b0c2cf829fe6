"""Backends: what samples a policy's replies, or plays whole conversations. One file each."""

from __future__ import annotations

from ...protocols import Register, hookimpl


@hookimpl
def register_backends(register: Register) -> None:
    """Registers the backends of this package."""
    register("ray", "turnwise.plugins.backends.ray:Ray")
    register("vllm", "turnwise.plugins.backends.vllm:VLLM")
