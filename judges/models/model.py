"""The interface of models that judge: prompts, replies, errors, and how models are named in a
config.

A model is anything with `ask(prompt) -> Reply`. Those here are `anthropic`, `openai` (Responses),
`openai-chat` (Chat Completions, and every endpoint that speaks it) and `local`; plugins add others
by the hook `register_models`. They make one request per `ask` and never retry: how often something
is asked is decided, and paid for, in one place (`judges/asking/calls.py`). (`openai-chat` alone
sends a request again at once that was refused for its form, when it learns how the server writes
it.)
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from ...protocols import PluginError, TurnwiseError
from ...running import Plugins
from ...tools import config_in_use, redacted


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to a model.

    Attributes:
        system: instructions and rubric. The same for every call of a judge, so that providers can
            cache it.
        user: what is judged, and under which ids.
        schema: JSON schema of the answer; the same for every call of a judge as far as it can be,
            since providers put it before everything else and a cached beginning ends where it
            differs.
        choices: field to what its strings may be in this call: ids. Checked by the judge.
        max_tokens: of the answer.
        top_logprobs: how many alternatives per token are wanted; 0: none. Models that cannot give
            them leave `Reply.tokens` empty.
    """

    system: str
    user: str
    schema: Mapping[str, Any]
    max_tokens: int = 1024
    top_logprobs: int = 0
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def bound(self) -> dict[str, Any]:
        """Returns the schema with the choices in it, and with as many characters for its free
        texts as there are tokens, for models in this process, which bind answers themselves and
        cache no schema. A weak model that repeats itself gets to the end of its answer so."""
        # Parts that were one object are several now.
        whole = json.loads(json.dumps(dict(self.schema)))
        for name, allowed in self.choices.items():
            place = whole["properties"][name]
            while place["type"] == "array":
                place = place["items"]
            place["enum"] = list(allowed)
        texts = list(_free_texts(whole))
        for text in texts:
            text["maxLength"] = max(1, self.max_tokens // len(texts))
        return whole


def _free_texts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the parts of a schema that any text fits."""
    if schema["type"] == "string" and "enum" not in schema:
        yield schema
    for part in (*schema.get("properties", {}).values(), *filter(None, [schema.get("items")])):
        yield from _free_texts(part)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request.

    `read` (from the provider's cache) and `written` (to it) are not part of `fresh`.
    """

    fresh: int = 0
    read: int = 0
    written: int = 0
    output: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.fresh + other.fresh,
            self.read + other.read,
            self.written + other.written,
            self.output + other.output,
        )


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer, and the alternatives to it: text to log-probability."""

    text: str
    alternatives: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's answer.

    Attributes:
        stop: why it ended. Only with "end" is there a text worth reading; "length" was cut off,
            "refused" and "filtered" were not given.
        text: the answer as it came, JSON that is not parsed yet.
        reason: the model's or provider's explanation of an end that is not "end".
        model: the model that answered, which may be a dated version of the one that was asked.
        request: the provider's id of the request.
        limits: seconds to wait before the next request, from its rate-limit headers; 0: none.
        tokens: with `top_logprobs`, the answer's tokens in order.
    """

    stop: Literal["end", "length", "refused", "filtered", "other"]
    text: str
    usage: Usage = field(default_factory=Usage)
    reason: str = ""
    model: str = ""
    request: str = ""
    limits: float = 0.0
    tokens: Sequence[Token] = field(default_factory=tuple)


class ModelError(TurnwiseError):
    """A request that got no answer.

    Attributes:
        kind: "busy" (rate limit, overload), "server", "timeout" and "connection" pass; "form", an
            answer of no known form, may pass, and is paid for: it is asked once more; "request" is
            this one's fault, asking the same again is no use; "account" (key, quota, billing,
            permission, no such model) would happen to every other request too; "filtered": the
            provider would not have this question answered, which is an answer of its own.
        status: HTTP status; 0: none came.
        after: seconds the server asks to wait.
        lost: an answer may have been made, and be paid for, that did not arrive.
        usage: tokens that the error says were used.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        status: int = 0,
        after: float | None = None,
        lost: bool = False,
        usage: Usage | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.status, self.after, self.lost, self.usage = (
            kind,
            status,
            after,
            lost,
            usage or Usage(),
        )

    @property
    def passes(self) -> bool:
        """Whether the same request may succeed later."""
        return self.kind in ("busy", "server", "timeout", "connection", "form")


class BatchFailed(ModelError):
    """A batch that brought no answer at all, in the provider's own words; what was in it may be
    sent again in another one."""


class Model:
    """The interface of a model that judges.

    Attributes:
        name: what verdicts and prices are filed under, e.g. "openai:gpt-5-mini".
        settings: what may change its answers, JSON data; part of every judge's version.
        at_once: how many requests it takes at a time; None: as many as the judge allows.
    """

    name: str = ""
    settings: Mapping[str, Any] = MappingProxyType({})
    at_once: int | None = None

    async def ask(self, prompt: Prompt) -> Reply:
        """Sends one request.

        Raises:
            ModelError: no answer came.
        """
        raise TypeError(f"{type(self).__name__} has no ask(prompt)")


Answers = Mapping[str, Reply | ModelError]


class BatchModel(Model):
    """Also answers large jobs in batches. All three methods raise `ModelError`."""

    async def submit(self, prompts: Mapping[str, Prompt]) -> str:
        """Sends prompts by id as one batch. Returns its id."""
        raise TypeError(f"{type(self).__name__} has no submit(prompts)")

    async def results(self, batch: str) -> Answers | None:
        """Returns answers by id; None while the batch is at work."""
        raise TypeError(f"{type(self).__name__} has no results(batch)")

    async def mine(
        self, since: float, ids: Sequence[str], results: Callable[[str], Awaitable[Answers]]
    ) -> str | None:
        """Finds the batch with these ids, sent at or after a time.

        Args:
            since: the time, in seconds since the epoch.
            ids: those of its requests.
            results: waits for a batch's answers, for models whose batches tell their ids only then.

        Returns:
            its id; None where there is none.
        """
        raise TypeError(f"{type(self).__name__} has no mine(since, ids, results)")


def make_model(spec: Any, plugins: Plugins | None = None) -> Model:
    """Makes a model from "provider:name" or from a mapping with `provider`, `model` and options; a
    model itself is returned as it is.

    Raises:
        PluginError: an unknown provider or option.
    """
    if not isinstance(spec, (str, Mapping)):
        if not isinstance(spec, Model):
            raise PluginError(
                f"{spec!r} is no model: derive its class from turnwise.judges.Model, with `name`,"
                " `settings` and `async ask(prompt)`"
            )
        return spec
    plugins = plugins or Plugins()
    if isinstance(spec, str):
        provider, _, name = spec.partition(":")
        options: dict[str, Any] = {}
    else:
        options = dict(spec)
        config_in_use(options)
        provider, name = str(options.pop("provider", "")), str(options.pop("model", ""))
    if isinstance(spec, Mapping) and not provider:
        raise PluginError(
            "a model given as a mapping needs `provider` in addition to `model`: one of"
            f" {', '.join(plugins.names('model'))}"
        )
    if not provider or not name:
        known = ", ".join(plugins.names("model"))
        raise PluginError(
            'a model is given as "provider:name" or as a mapping with provider and model, got'
            f" {redacted(spec)!r}. Providers: {known}"
        )
    made: Model = plugins.create("model", provider, name, **options)
    return made


def free_of(extra: Mapping[str, Any] | None, *taken: str) -> dict[str, Any]:
    """Returns further fields of a request's body; those that have options of their own are refused.

    Raises:
        ValueError: one of those is among them.
    """
    for name in set(taken) & set(extra or {}):
        raise ValueError(
            f"`extra` must not hold {name!r}: the judge's `max_tokens` says it, and the budget"
            " counts on that"
        )
    return dict(extra or {})
