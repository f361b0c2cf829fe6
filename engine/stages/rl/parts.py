"""Make and check the parts of an RL stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...feedback.sources import Sources, learners
from ...pipeline.parts import component
from ...pipeline.plugins import Plugins
from .experience import Parts


def make_combiner(plugins: Plugins, spec: Any, sources: Sources) -> Any:
    """The combiner; its `aggregator`, where it has one, is looked up by name too.

    Raises:
        ConfigError: the aggregator cannot read what a source gives.
    """
    if isinstance(spec, Mapping) and "aggregator" in spec:
        aggregator = component(plugins, "aggregator", spec["aggregator"])
        reads = getattr(aggregator, "reads", None)
        for source in sources.sources:
            gives = "comparisons" if source.kind == "group" else "scores"
            if source.weight and reads is not None and gives not in reads:
                known = plugins.names("aggregator")
                fit = [repr(n) for n in known if gives in getattr(plugins.factory("aggregator", n), "reads", ())]
                raise ConfigError(
                    f"aggregator {part_name(spec['aggregator'])!r} reads {' and '.join(sorted(reads))}, but source {source.name!r} gives {gives}: "
                    f"use {' or '.join(fit)}, or another task for the source"
                )
        spec = {**spec, "aggregator": aggregator}
    return component(plugins, "combiner", spec, weights=sources.weights)


def part_name(spec: Any) -> str:
    if isinstance(spec, Mapping):
        return str(spec.get("name"))
    return spec if isinstance(spec, str) else type(spec).__name__


def with_option(plugins: Plugins, *consumes: str) -> list[str]:
    names = plugins.names("optimizer")
    return [repr(n) for n in names if set(consumes) & set(getattr(plugins.factory("optimizer", n), "consumes", ()))]


def learning_parts(parts: Parts) -> dict[str, Any]:
    """All parts that have a state, by name."""
    named = {"optimizer": parts.optimizer, "credit": parts.credit}
    named |= {f"combiner-{i}": c for i, c in enumerate(parts.combiners)}
    return {name: part for name, part in named.items() if hasattr(part, "state_dict")} | learners(parts.sources)
