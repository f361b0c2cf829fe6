"""Makes the parts that a config names."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, PluginError
from ..protocols import (
    Aggregator,
    Combiner,
    CreditAssigner,
    Curriculum,
    Optimizer,
    RunView,
)
from ..util.section import Section
from ..util.wording import numbered
from .claim import plain_config
from .config import PolicyConfig, RunConfig, flat
from .options import PARTS
from .plugins import Plugins
from .stage import Stage

if TYPE_CHECKING:
    from ..policy.policy import Policy

CONTRACTS: Mapping[str, type] = {
    "optimizer": Optimizer,
    "credit method": CreditAssigner,
    "combiner": Combiner,
    "aggregator": Aggregator,
    "curriculum": Curriculum,
}


def component(plugins: Plugins, kind: str, spec: Any, **more: Any) -> Any:
    """Returns a part from what the config says: a registered name, a mapping with `name` and
    options, or the object itself.

    Raises:
        PluginError: an unknown name or option, or a part that is not of its kind.
    """
    if isinstance(spec, str):
        part = plugins.create(kind, spec, **more)
    elif isinstance(spec, Mapping):
        options = dict(spec)
        if "name" not in options:
            raise PluginError(
                f"a {kind} given as a mapping needs `name` and its options, got {dict(spec)}"
            )
        part = plugins.create(kind, options.pop("name"), **more, **options)
    else:
        part = spec
    contract = CONTRACTS.get(kind, object)  # backends have none: they stand below the contracts
    if not isinstance(part, contract):
        named = spec if isinstance(spec, (str, Mapping)) else type(spec).__name__
        raise PluginError(
            f"the {kind} {named!r} is a {type(part).__name__}: derive its class from"
            f" turnwise.{contract.__name__}"
        )
    return part


def declared(plugins: Plugins, kind: str, name: str) -> Any:
    """Returns the class that a name stands for, to read what it declares; where a function makes
    the part, the base class of its kind, which declares nothing."""
    factory = plugins.factory(kind, name)
    return factory if inspect.isclass(factory) else CONTRACTS[kind]


def load_policy(config: RunConfig) -> Policy:
    """Returns the policy that a run begins with: loaded, or the object that was given."""
    import torch

    from ..policy.policy import Policy

    given = config.policy
    use_threads(config.threads)
    if not isinstance(given, PolicyConfig):
        return given
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # new LoRA adapters are drawn
        return Policy.from_pretrained(given.model, **given.model_dump(exclude={"model"}))


def use_threads(number: int | None) -> None:
    """Gives torch this number of threads, where it is stated."""
    import torch

    if number is not None:
        torch.set_num_threads(number)


def choose_threads() -> None:
    """Gives torch a single thread where that is faster than those it has, and warns; who set
    OMP_NUM_THREADS has chosen."""
    import torch

    from ..policy.threads import faster_threads

    if "OMP_NUM_THREADS" in os.environ:
        return
    number, times = faster_threads()
    if number < (before := torch.get_num_threads()):
        torch.set_num_threads(number)
        factor = f"{times:.1f} times" if times < 10 else "many times"
        warnings.warn(
            f"one thread is {factor} as fast here as torch's {before} (another process"
            " keeps a core busy, or the machine has fewer than it seems): this run uses one. Set"
            f" `threads: {before}` in the config, or OMP_NUM_THREADS, to have it otherwise",
            stacklevel=2,
        )


def make_stages(entries: Any, plugins: Plugins) -> list[tuple[str, Stage]]:
    """Makes the stages of a config, each under a label of its own: its name, with a number where
    the name comes again.

    Raises:
        ConfigError, PluginError: an entry that is no stage, or options that it does not take.
    """
    made: list[tuple[str, Stage]] = []
    stages = [next(iter(entry.items())) for entry in flat(entries)]
    for label, (name, options) in zip(numbered([n for n, _ in stages]), stages, strict=True):
        if options is not None and not isinstance(options, Mapping):
            raise ConfigError(
                f"stage {name!r} must be a mapping of its options, got {type(options).__name__}"
            )
        stage = plugins.create("stage", name, **(options or {}))
        if not isinstance(stage, Stage):
            raise PluginError(
                f"stage {name!r} is a {type(stage).__name__}: derive its class from turnwise.Stage"
            )
        made.append((label, stage))
    return made


def whole_config(run: RunView) -> dict[str, Any]:
    """Returns a run's config, its stages and their parts with all their defaults, as plain data,
    secrets hidden."""
    names = [next(iter(stage)) for stage in flat(run.config.stages)]
    stages = [
        {name: {k: _whole_part(run.plugins, k, value) for k, value in stage.model_dump().items()}}
        for name, (_, stage) in zip(names, run.stages, strict=True)
    ]
    return plain_config({**run.config.model_dump(), "stages": stages})


def _whole_part(plugins: Plugins, key: str, value: Any) -> Any:
    """Returns a part that is named, with the defaults of its options; as it is where it does not
    declare them in a `Section`."""
    name = value.get("name") if isinstance(value, Mapping) else value
    if key not in PARTS or not isinstance(name, str):
        return value
    kind = plugins.factory(PARTS[key], name)
    if not (inspect.isclass(kind) and issubclass(kind, Section)):
        return value
    return {"name": name, **component(plugins, PARTS[key], value).model_dump()}
