"""The run's config, from a YAML file or the arguments of `turnwise.train`.

Unknown keys are refused, with near ones named.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, field_validator

from ..errors import ConfigError
from ..protocols import Learns
from ..util.section import WHOLE, Section
from .overlay import lay_over, named_after


class Loader(yaml.SafeLoader):
    """A YAML loader that reads `1e-3` as a number, not a string, and refuses a key that a mapping
    has twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns a mapping; raises `ConstructorError`, with the place, where a key comes again."""
        seen = set()
        for key, _ in node.value:  # what `<<` brings in may be overridden
            if (key.tag, str(key.value)) in seen:
                again = f"the key {key.value!r} is there already"
                raise yaml.constructor.ConstructorError(None, None, again, key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


class PolicyConfig(Section):
    """The model to align, see `Policy.from_pretrained`.

    Attributes:
        model: folder or hub name, or one of `turnwise model get`; safetensors, or a GGUF file.
        gguf: the GGUF file in it, whose weights are made plain; needs the package `gguf`.
        lora: options of `peft.LoraConfig`: adapters are trained instead of all weights.
        quantize: "nf4" or "int8": weights in 4 or 8 bits, on which adapters (`lora`) are trained;
            needs the package `bitsandbytes`.
        dtype: of the weights: "float32", "bfloat16", "float16" or "auto" (as saved); half precision
            is trained through float32 copies, which need as much memory as float32 weights do.
        precision: "bf16" computes in bfloat16 over float32 weights.
        device: "cpu", "cuda" or "mps"; default: what there is.
        attention: "sdpa", "eager" or "flash_attention_2".
        chat_template: a Jinja template, for models that have none, or "chatml", the one that is
            built in; default: the tokenizer's.
        trust_remote_code: run the Python files that come with the model; a model that needs them is
            refused otherwise.
    """

    called: ClassVar[str] = "policy"

    model: str
    gguf: str | None = None
    lora: dict[str, Any] | None = None
    quantize: Literal["nf4", "int8"] | None = None
    dtype: str = "float32"
    precision: str = "no"
    device: str | None = None
    attention: str = "sdpa"
    chat_template: str | None = None
    trust_remote_code: bool = False


def _with_classes(value: Any) -> Any:
    """Returns a config in which parts that were given as objects stand as their class and options:
    pydantic alone would write the options, and forget whose they are."""
    if isinstance(value, Learns) and isinstance(value, Section):
        kind = type(value)
        return {f"<{kind.__module__}.{kind.__qualname__}>": value.model_dump(exclude_defaults=True)}
    if isinstance(value, Mapping):
        return {key: _with_classes(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_classes(each) for each in value]
    return value


class RunConfig(Section):
    """The config of a whole run.

    Attributes:
        policy: a model's folder or hub name, a mapping of the options below, or in Python a
            `Policy`.
        stages: each a mapping with the stage's name as its one key.
        seed: everything random derives from it.
        name: of the run; default: the file's, or the folder's.
        folder: where config, ledger, metrics and checkpoints go; default: `runs/<name>`.
        ledger: an SQLAlchemy URL; default: SQLite in the folder.
        threads: torch's threads; default: as many as torch finds, or one where that is clearly
            faster, which is measured when the policy is loaded; a resumed run keeps its number.
        shard: divide weights, gradients and the optimizer's moments among the processes that train
            together, instead of all of them in each; see docs/scale.md.
        checkpoint_every: updates between checkpoints; the end of every stage is one too.
        keep_checkpoints: how many of the latest to keep; the one the present stage began from is
            kept besides.
        trackers: "tensorboard", "wandb", or another that accelerate knows; each must be installed.
    """

    called: ClassVar[str] = WHOLE

    policy: Any
    stages: list[dict[str, Any]] = Field(min_length=1)
    seed: int = 0
    name: str = ""
    folder: Path | None = None
    ledger: str | None = None
    shard: bool = False
    threads: int | None = Field(default=None, ge=1)
    checkpoint_every: int = Field(default=10, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    trackers: list[str] = []

    @field_serializer("stages", mode="wrap")
    def _named(self, stages: list[Any], handler: SerializerFunctionWrapHandler) -> Any:
        return handler(_with_classes(stages))

    @field_validator("stages", mode="before")
    @classmethod
    def _list(cls, stages: Any) -> Any:
        if isinstance(stages, (str, Mapping)):
            names = [stages] if isinstance(stages, str) else list(stages)
            raise ValueError(
                "it must be a list, one entry per stage with its name and its options, as in"
                f" `stages: [{{{names[0] if names else 'rl'}: {{...}}}}]`, or in lines of their own"
                " that begin with `- `; got"
                f" {'a mapping' if isinstance(stages, Mapping) else 'a name'}"
            )
        return stages

    @field_validator("stages")
    @classmethod
    def _one_key(cls, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for i, stage in enumerate(flat(stages)):
            if not isinstance(stage, Mapping) or len(stage) != 1:
                shown = list(stage) if isinstance(stage, Mapping) else stage
                raise ValueError(
                    f"stage {i + 1} must have one key, its name, as in `- rl: {{updates: 50}}`; got"
                    f" {shown}"
                )
            for place, value in _numbers(stage):
                if not math.isfinite(value):
                    raise ValueError(f"{place} must be a finite number, got {value}")
        return stages

    @field_validator("policy")
    @classmethod
    def _policy(cls, policy: Any) -> Any:
        if isinstance(policy, (str, Path)):
            return PolicyConfig(model=str(policy))
        return PolicyConfig(**policy) if isinstance(policy, Mapping) else policy

    @classmethod
    def load(cls, path: str | Path, *overlays: str | Path | Mapping[str, Any]) -> RunConfig:
        """Reads a YAML file. Relative model folders are looked for in the file's folder first.

        Args:
            path: of the file.
            overlays: further files, and settings as plain data, which take the places of what was
                there before, see `lay_over`; the run's name, where none is given, tells them.

        Raises:
            ConfigError: no such file, not YAML, or a config that is wrong.
        """
        data, others = _read(Path(path)), []
        name = str(data.get("name") or Path(path).stem)
        for each in overlays:
            laid = dict(each) if isinstance(each, Mapping) else _read(Path(each), further=True)
            others.append(("" if isinstance(each, Mapping) else Path(each).stem, laid))
            if isinstance(laid.get("stages"), list) and not isinstance(each, Mapping):
                warnings.warn(
                    f"{each} has a list of stages, which takes the place of all that were there; to"
                    " change one, write `stages: {rl: {...}}`",
                    stacklevel=2,
                )
            data = lay_over(data, laid)
        if not any("name" in laid for _, laid in others):
            data["name"] = name + named_after(others)
        config = cls(**data)
        if not isinstance(config.policy, PolicyConfig):
            raise ConfigError(
                f"{path}: policy must be a model's folder or hub name, or a mapping with `model`,"
                f" got {config.policy!r}"
            )
        return config


def setting(text: str) -> dict[str, Any]:
    """Returns what `--set KEY=VALUE` lays over a config; the value is read as YAML.

    Raises:
        ConfigError: it has no key, or the value is not YAML.
    """
    key, equals, written = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"--set takes a key with its place and a value, as in stages.rl.optimizer.lr=3e-6;"
            f" got {text!r}"
        )
    try:
        value = yaml.load(written, Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML: {error}") from error
    for step in reversed(key.split(".")):
        value = {step: value}
    return value


def _read(path: Path, *, further: bool = False) -> dict[str, Any]:
    """Reads a file of a config, or a further one that is laid over it.

    Raises:
        ConfigError: no such file, not YAML, or no mapping.
    """
    if path.is_dir():
        own = path / "config.yaml"
        raise ConfigError(
            f"{path} is a folder, and a run is made from a config, a file in YAML."
            + (
                " To go on with the run that it holds, give the config it was started with,"
                f" folder={str(path)!r} and resume=True (where it was plain data, {own} is that"
                f" config); to look at it, use `turnwise report {path}`, or"
                f" turnwise.PastRun({str(path)!r}) in Python."
                if own.is_file()
                else ""
            )
        )
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        where = str(error).replace('in "<unicode string>", ', "")
        raise ConfigError(f"{path} is not valid YAML: {where}") from error
    if not isinstance(data, dict):
        what = "the settings that it changes" if further else "`policy` and `stages`"
        raise ConfigError(f"{path} must hold a mapping with {what}, not {type(data).__name__}")
    odd = [key for key in data if not isinstance(key, str)]
    if odd:
        raise ConfigError(f"{path}: keys must be words, got {odd[0]!r}")
    policy = data.get("policy")
    model = policy.get("model") if isinstance(policy, dict) else policy
    if isinstance(model, str) and (local := path.parent / model).is_dir():
        data["policy"] = {**policy, "model": str(local)} if isinstance(policy, dict) else str(local)
    return data


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Yields every float in plain data, and its place."""
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _numbers(each, f"{place}.{key}" if place else str(key))


def flat(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns stages with every `repeat: {times: 3, stages: [...]}` written out.

    Raises:
        ValueError: a repetition without a positive number of times or without stages.
    """
    result: list[dict[str, Any]] = []
    for stage in stages:
        if isinstance(stage, Mapping) and list(stage) == ["repeat"]:
            loop = stage["repeat"]
            if (
                not isinstance(loop, Mapping)
                or set(loop) != {"times", "stages"}
                or not isinstance(loop["times"], int)
                or loop["times"] < 1
            ):
                raise ValueError(
                    "repeat needs `times`, at least 1, and `stages`, as in `- repeat: {times: 3,"
                    f" stages: [...]}}`; got {loop!r}"
                )
            result += flat(loop["stages"]) * loop["times"]
        else:
            result.append(stage)  # type: ignore[arg-type]
    return result
