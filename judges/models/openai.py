"""The models `openai:NAME` by the Responses API and `openai-chat:NAME` by Chat Completions: OpenAI,
and by `url` every server that speaks the latter (vLLM, `transformers serve`, Ollama, proxies).

Instructions and rubric come first and are the same in every call, which is what the provider's
prompt cache needs. The answer is bound to a schema, strictly. The body is read as it came, with
status and finish reason first: the SDK's own `parse()` takes a cut-off answer for a wrong one, and
in Responses would read a model's commentary as part of its answer.

Not tried against the live services: whether a schema of ours is ever refused, the rate-limit
headers, batches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ...protocols import PluginError
from ...tools import in_use, install, url_in_use
from .model import BatchModel, ModelError, Prompt, Reply, Usage, free_of
from .openai_answers import batch_failure, rate_limits, read_completion, read_response
from .wire import (
    address_of,
    called,
    client_of,
    envelope,
    error_within,
    http_error,
    key_of,
)

_LIMITS = ("max_completion_tokens", "max_tokens")
_UNKNOWN = re.compile(
    r"extra|unsupported|not.{0,12}support|unrecogni[sz]ed|unknown|unexpected|not"
    r" permitted|forbidden",
    re.IGNORECASE,
)
_NO_SYSTEM = re.compile(
    r"(?:system|developer)['\"]?"
    r" ?(?:role|message|prompt|instruction)s?\b.{0,40}\b(?:not|never|isn't|doesn't)\b"
    r"|(?:not|n't) support.{0,20}(?:system|developer)|messages\[0\]\.role|roles must alternate"
    r"|only user and assistant roles",
    re.IGNORECASE | re.DOTALL,
)


class OpenAI(BatchModel):
    """A model behind the Responses API.

    Args:
        model: as the server names it.
        api_key: default: the environment's OPENAI_API_KEY; servers of one's own often need none.
        url: another server, e.g. http://localhost:8000/v1.
        effort: of reasoning, "none" to "max", where the model knows it.
        extra: further fields of the request's body, e.g. {temperature: 0} where the model takes it.
        schema: "strict" binds the answer to the schema; "prompt" only tells the model of it, for
            servers that cannot do the former.
    """

    path = "/v1/responses"

    def __init__(
        self,
        model: str,
        *,
        api_key: str | None = None,
        url: str | None = None,
        effort: str | None = None,
        extra: Mapping[str, Any] | None = None,
        schema: str = "strict",
    ) -> None:
        try:
            import httpx2
            import openai
        except ModuleNotFoundError as error:
            raise PluginError(
                f"judges by OpenAI's APIs need their SDK: {install('judges')}"
            ) from error
        if schema not in ("strict", "prompt"):
            raise ValueError(f"schema must be 'strict' or 'prompt', got {schema!r}")
        self.name = f"{'openai' if self.path == OpenAI.path else 'openai-chat'}:{model}"
        self._model, self._effort, self._extra, self._schema = (
            model,
            effort,
            dict(extra or {}),
            schema,
        )
        self._sdk, self._http = openai, httpx2
        address = address_of(url, "OPENAI_BASE_URL", self.name)
        key = key_of(api_key, "" if url else "OPENAI_API_KEY", self.name) or (
            "none" if url else None
        )
        try:
            self._client = client_of(
                partial(openai.AsyncOpenAI, api_key=key), openai, httpx2, address, self.name
            )
        except openai.OpenAIError as error:
            raise PluginError(
                f"{self.name} needs a key: set OPENAI_API_KEY (any text will do for --dry-run,"
                " which sends nothing), or name a `url` of your own; a judge may have `api_key`"
            ) from error
        in_use(self._client.api_key)
        url_in_use(self._client.base_url)
        self.settings: Mapping[str, Any] = {
            "effort": effort, "extra": free_of(extra, "max_output_tokens", "max_completion_tokens",
                "max_tokens"),
            "url": str(self._client.base_url), "schema": schema,
        }  # fmt: skip

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """Returns the body of a request."""
        body: dict[str, Any] = {
            "model": self._model, "instructions": self._instructions(prompt),
            "input": [{"role": "user", "content": prompt.user}],
            "max_output_tokens": prompt.max_tokens, "store": False, "stream": False,
        }  # fmt: skip
        if self._schema == "strict":
            body["text"] = {
                "format": {
                    "type": "json_schema",
                    "name": "verdict",
                    "strict": True,
                    "schema": dict(prompt.schema),
                }
            }
        if self._effort:
            body["reasoning"] = {"effort": self._effort}
        if prompt.top_logprobs:
            body |= {
                "top_logprobs": prompt.top_logprobs,
                "include": ["message.output_text.logprobs"],
            }
        return body | self._extra

    def _instructions(self, prompt: Prompt) -> str:
        if self._schema == "strict":
            return prompt.system
        return (
            f"{prompt.system}\n\nAnswer with one JSON object of this schema and nothing"
            f" else:\n{json.dumps(prompt.schema)}"
        )

    async def ask(self, prompt: Prompt) -> Reply:
        """Sends one request and reads its answer."""
        body = self.body(prompt)
        extra = {key: body.pop(key) for key in self._extra}
        raw = await self._call(
            self._client.responses.with_raw_response.create(**body, extra_body=extra or None)
        )
        return self.read(envelope(raw.http_response), raw.headers)

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
        """Reads the body and headers of a response."""
        return read_response(body, headers.get("x-request-id", ""), rate_limits(headers))

    # Large jobs: `judges/asking/batches.py`.

    async def submit(self, prompts: Mapping[str, Prompt]) -> str:
        """Sends many questions as one batch; returns its id."""
        lines = [
            {"custom_id": id_, "method": "POST", "url": self.path, "body": self.body(p)}
            for id_, p in prompts.items()
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = await self._call(
            self._client.files.create(file=("verdicts.jsonl", text), purpose="batch")
        )
        first = min(prompts)
        batch = await self._call(
            self._client.batches.create(
                input_file_id=file.id, endpoint=self.path, completion_window="24h",
                metadata={"turnwise": first},
            )
        )  # fmt: skip
        return str(batch.id)

    async def results(self, batch: str) -> dict[str, Reply | ModelError] | None:
        """Returns a batch's answers by custom id; None while it is at work."""
        state = await self._call(self._client.batches.retrieve(batch))
        if state.status not in ("completed", "failed", "expired", "cancelled"):
            return None
        if not (state.output_file_id or state.error_file_id):
            raise batch_failure(batch, state.to_dict())
        answers: dict[str, Reply | ModelError] = {}
        for file in filter(None, (state.output_file_id, state.error_file_id)):
            text = (await self._call(self._client.files.content(file))).text
            if not text.strip():
                raise ModelError("server", f"the batch's file {file} came back empty")
            try:
                answers |= {
                    line["custom_id"]: self._line(line)
                    for line in map(json.loads, filter(None, text.split("\n")))
                }
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(
                    "server", f"the batch's file {file} cannot be read: {error}"
                ) from error
        return answers

    def _line(self, line: Mapping[str, Any]) -> Reply | ModelError:
        response, error = line.get("response") or {}, line.get("error")
        try:
            if error or int(response.get("status_code") or 0) != 200:
                status = int(response.get("status_code") or 0)
                raise (
                    http_error(status, response.get("body"), {})
                    if status >= 400
                    else error_within(error or "no answer")
                )
            return self.read(response.get("body") or {}, {})
        except ModelError as failed:
            return failed

    async def mine(self, since: float, ids: Sequence[str], results: Any = None) -> str | None:
        """Finds the batch with these custom ids; None where there is none. For a process that was
        killed between sending a batch and writing down its id."""
        page = await self._call(self._client.batches.list(limit=100))
        while True:
            for batch in page.data:
                if batch.created_at < since - 60:
                    return None
                if (batch.metadata or {}).get("turnwise") == min(ids):
                    return str(batch.id)
            if not page.has_next_page():
                return None
            page = await self._call(page.get_next_page())

    async def _call(self, call: Any) -> Any:
        return await called(call, self._sdk, self._http)


class OpenAIChat(OpenAI):
    """A model behind the Chat Completions API, for servers without the Responses API.

    Servers write a few things in their own way. A request that is refused for one of them is sent
    again in the other way at once, and all further ones are sent so; batches, which cost when they
    are tried, need the options.

    Args:
        others: those of `OpenAI`.
        limit: the name of the answer's limit, "max_completion_tokens" or "max_tokens". Servers that
            ignore the one that they do not know answer without a limit.
        system: whether the instructions are a system message; False: they begin the user's.
    """

    path = "/v1/chat/completions"

    def __init__(
        self,
        model: str,
        *,
        api_key: str | None = None,
        url: str | None = None,
        effort: str | None = None,
        extra: Mapping[str, Any] | None = None,
        schema: str = "strict",
        limit: str = "max_completion_tokens",
        system: bool = True,
    ) -> None:
        super().__init__(model, api_key=api_key, url=url, effort=effort, extra=extra, schema=schema)
        if limit not in _LIMITS:
            raise ValueError(f"limit must be one of {', '.join(_LIMITS)}, got {limit!r}")
        if not isinstance(system, bool):
            raise ValueError(f"system must be true or false, got {system!r}")
        self._limit, self._system = limit, system
        self.settings = {**self.settings, "system": system}

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """Returns the body of a request."""
        instructions = self._instructions(prompt)
        messages = [
            {"role": "system", "content": instructions},
            {"role": "user", "content": prompt.user},
        ]
        if not self._system:
            messages = [{"role": "user", "content": f"{instructions}\n\n{prompt.user}"}]
        body: dict[str, Any] = {
            "model": self._model,
            self._limit: prompt.max_tokens,
            "messages": messages,
            "stream": False,
        }
        if self._schema == "strict":
            form = {"name": "verdict", "strict": True, "schema": dict(prompt.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        if self._effort:
            body["reasoning_effort"] = self._effort
        if prompt.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": prompt.top_logprobs}
        return body | self._extra

    async def ask(self, prompt: Prompt) -> Reply:
        """Sends one request and reads its answer."""
        learned: set[str] = set()
        while True:
            body = self.body(prompt)
            extra = {key: body.pop(key) for key in self._extra}
            try:
                raw = await self._call(
                    self._client.chat.completions.with_raw_response.create(
                        **body, extra_body=extra or None
                    )
                )
                return self.read(envelope(raw.http_response), raw.headers)
            except ModelError as error:
                if (
                    error.usage != Usage()
                    or error.lost
                    or (way := self._other_way(body, str(error))) in (None, *learned)
                ):
                    raise
                learned.add(str(way))

    def _other_way(self, body: Mapping[str, Any], error: str) -> str | None:
        """Changes how further requests are written where that caused the error, and returns what
        was wrong; None: nothing that could be changed."""
        limit = next(name for name in _LIMITS if name in body)
        if re.search(rf"\b{limit}\b", error) and _UNKNOWN.search(error):
            self._limit = _LIMITS[1 - _LIMITS.index(limit)]
            return "limit"
        if body["messages"][0]["role"] == "system" and _NO_SYSTEM.search(error):
            self._system = False
            return "system"
        return None

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
        """Reads the answer of a request."""
        return read_completion(body, headers.get("x-request-id", ""), rate_limits(headers))
