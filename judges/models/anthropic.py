"""The model `anthropic:NAME`: Claude by the Messages API.

The system prompt is marked for the provider's cache: it holds instructions and rubric, the same in
every call, and comes first. The answer is bound to a schema by `output_config`. The body is read as
it came, with the stop reason first: the SDK's own `parse()` throws a refusal or a cut-off answer
away together with its usage.

Not tried against the live service: whether a schema of ours is ever refused there, how short a
prompt is still cached, the rate-limit headers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from ...protocols import PluginError
from ...tools import in_use, install, url_in_use
from .model import BatchModel, ModelError, Prompt, Reply, Usage, free_of
from .wire import address_of, called, client_of, count, envelope, error_within, key_of, part

_STOPS = {
    "end_turn": "end",
    "stop_sequence": "end",
    "max_tokens": "length",
    "refusal": "refused",
}


class Anthropic(BatchModel):
    """A model behind the Messages API.

    Args:
        model: as the provider names it.
        api_key: default: the environment's ANTHROPIC_API_KEY.
        url: another server that speaks the Messages API.
        effort: "low" to "max", where the model knows it.
        cache: whether the instructions are marked for the provider's cache, which keeps them for
            five minutes after their last use.
        extra: further fields of the request's body, e.g. {temperature: 0} where the model takes it.
    """

    def __init__(
        self,
        model: str,
        *,
        api_key: str | None = None,
        url: str | None = None,
        effort: str | None = None,
        cache: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import anthropic
            import httpx2
        except ModuleNotFoundError as error:
            raise PluginError(
                f"judges by Anthropic's API need its SDK: {install('judges')}"
            ) from error
        self.name = f"anthropic:{model}"
        self._model, self._effort, self._extra, self._cache = (
            model,
            effort,
            dict(extra or {}),
            cache,
        )
        self._sdk, self._http = anthropic, httpx2
        address = address_of(url, "ANTHROPIC_BASE_URL", self.name)
        key = key_of(api_key, "ANTHROPIC_API_KEY", self.name)
        self._client = client_of(
            partial(anthropic.AsyncAnthropic, api_key=key), anthropic, httpx2, address, self.name
        )
        in_use(self._client.api_key, self._client.auth_token)
        url_in_use(self._client.base_url)
        self.settings = {
            "effort": effort,
            "extra": free_of(extra, "max_tokens"),
            "url": str(self._client.base_url),
        }
        if not (self._client.api_key or self._client.auth_token):
            raise PluginError(
                f"{self.name} needs a key: set ANTHROPIC_API_KEY (any text will do for --dry-run,"
                " which sends nothing); a judge may have `api_key`"
            )

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """Returns the body of a request."""
        system: dict[str, Any] = {"type": "text", "text": prompt.system}
        if self._cache:
            system["cache_control"] = {"type": "ephemeral"}
        output: dict[str, Any] = {"format": {"type": "json_schema", "schema": dict(prompt.schema)}}
        if self._effort:
            output["effort"] = self._effort
        return {
            "model": self._model, "max_tokens": prompt.max_tokens, "system": [system],
            "messages": [{"role": "user", "content": prompt.user}], "output_config": output,
            **self._extra,
        }  # fmt: skip

    async def ask(self, prompt: Prompt) -> Reply:
        """Asks the Messages API; the reply holds the limits that its headers state."""
        body = self.body(prompt)
        extra = {key: body.pop(key) for key in self._extra}
        raw = await self._call(
            self._client.messages.with_raw_response.create(**body, extra_body=extra or None)
        )
        reply = read_message(envelope(raw.http_response), raw.headers.get("request-id", ""))
        return replace(reply, limits=_limits(raw.headers))

    # Large jobs: `judges/asking/batches.py`.

    async def submit(self, prompts: Mapping[str, Prompt]) -> str:
        """Sends many questions as one batch; returns its id."""
        requests: Any = [
            {"custom_id": id_, "params": self.body(prompt)} for id_, prompt in prompts.items()
        ]
        return str((await self._call(self._client.messages.batches.create(requests=requests))).id)

    async def results(self, batch: str) -> dict[str, Reply | ModelError] | None:
        """Returns a batch's answers by custom id; None while it is at work."""
        if (
            await self._call(self._client.messages.batches.retrieve(batch))
        ).processing_status != "ended":
            return None
        return await self._call(self._results(batch))

    async def _results(self, batch: str) -> dict[str, Reply | ModelError]:
        answers: dict[str, Reply | ModelError] = {}
        async for line in await self._client.messages.batches.results(batch):
            result: Any = line.result.to_dict()
            if result["type"] == "succeeded":
                try:
                    answers[line.custom_id] = read_message(result["message"])
                except ModelError as error:
                    answers[line.custom_id] = error
            elif result["type"] == "errored":
                answers[line.custom_id] = error_within(result.get("error"))
            else:
                answers[line.custom_id] = ModelError(
                    "server", f"the batch's request was {result['type']}"
                )
        if not answers:
            raise ModelError("server", f"the results of the batch {batch} came back empty")
        return answers

    async def mine(
        self,
        since: float,
        ids: Sequence[str],
        results: Callable[[str], Awaitable[Mapping[str, Any]]],
    ) -> str | None:
        """Finds the batch with these custom ids, sent at or after a time; None where there is none.

        For a process that was killed between sending a batch and writing down its id. A batch tells
        its custom ids only with its results, so those at work are waited for.
        """
        wanted, likely = set(ids), []
        async for batch in self._listed():
            if batch.created_at.timestamp() < since - 60:
                break
            if sum(batch.request_counts.to_dict().values()) == len(wanted):
                likely.append(batch.id)
        for id_ in likely:
            if wanted & set(await results(id_)):
                return str(id_)
        return None

    async def _listed(self) -> AsyncIterator[Any]:
        """Yields all batches, the newest first."""
        page = await self._call(self._client.messages.batches.list(limit=100))
        while True:
            for batch in page.data:
                yield batch
            if not page.has_next_page():
                return
            page = await self._call(page.get_next_page())

    async def _call(self, call: Any) -> Any:
        return await called(call, self._sdk, self._http)


def read_message(body: Mapping[str, Any], request: str = "") -> Reply:
    """Reads a message of the API.

    Raises:
        ModelError: it is none.
    """
    used, found = part(body, "usage"), body.get("content")
    usage = Usage(
        count(used.get("input_tokens")), count(used.get("cache_read_input_tokens")),
        count(used.get("cache_creation_input_tokens")), count(used.get("output_tokens")),
    )  # fmt: skip
    if body.get("type") == "error" or (body.get("error") and not found):
        raise error_within(body, usage)
    why = str(body.get("stop_reason") or "end_turn")
    stop: Any = _STOPS.get(why, "other")
    if body.get("type", "message") != "message" or not (
        isinstance(found, list) or stop == "refused"
    ):
        raise ModelError("form", f"the answer is no message: {str(body)[:200]}", usage=usage)
    blocks = [block for block in found or () if isinstance(block, Mapping)]
    text = "".join(str(block.get("text") or "") for block in blocks if block.get("type") == "text")
    details = part(body, "stop_details")
    reason = (
        " ".join(str(details.get(k)) for k in ("category", "explanation") if details.get(k)) or why
    )
    return Reply(
        stop, text, usage, "" if stop == "end" else reason, str(body.get("model") or ""), request
    )


def _limits(headers: Mapping[str, str]) -> float:
    """Returns the seconds until there is room again, where the headers tell of none now."""
    waits = [0.0]
    for name in ("requests", "tokens", "input-tokens", "output-tokens"):
        if headers.get(f"anthropic-ratelimit-{name}-remaining") == "0":
            try:
                reset = datetime.fromisoformat(
                    headers.get(f"anthropic-ratelimit-{name}-reset", "").replace("Z", "+00:00")
                )
                waits.append((reset - datetime.now(UTC)).total_seconds())
            except (ValueError, TypeError):
                continue
    return max(waits)
