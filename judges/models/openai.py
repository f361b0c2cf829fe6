"""`openai:NAME` by the Responses API, `openai-chat:NAME` by Chat Completions: OpenAI, and by `url` every server that speaks the latter (vLLM,
`transformers serve`, Ollama, proxies).

Instructions and rubric come first and are the same in every call, which is what the provider's prompt cache needs. The answer is bound to a schema,
strictly. The body is read as it came, with status and finish reason first: the SDK's own `parse()` takes a cut-off answer for a wrong one,
and in Responses would read a model's commentary as part of its answer.

Not tried against the live services: whether a schema of ours is ever refused, the rate-limit headers, batches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...engine.plugins import PluginError
from ...engine.secrets import in_use, url_in_use
from ...engine.suggest import install
from . import ModelError, Prompt, Reply, Token, Usage, called, envelope, free_of, http_error


class OpenAI:
    """Args:
    model: as the server names it.
    api_key: default: the environment's OPENAI_API_KEY; servers of one's own often need none.
    url: another server, e.g. http://localhost:8000/v1.
    effort: of reasoning, "none" to "max", where the model knows it.
    extra: further fields of the request's body, e.g. {temperature: 0} where the model takes it.
    schema: "strict" binds the answer to the schema; "prompt" only tells the model of it, for servers that cannot do the former.
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
            raise PluginError(f"judges by OpenAI's APIs need their SDK: {install('judges')}") from error
        if schema not in ("strict", "prompt"):
            raise ValueError(f"schema must be 'strict' or 'prompt', got {schema!r}")
        self.name = f"{'openai' if self.path == OpenAI.path else 'openai-chat'}:{model}"
        self._model, self._effort, self._extra, self._schema = model, effort, dict(extra or {}), schema
        self._sdk, self._http = openai, httpx2
        try:
            self._client = openai.AsyncOpenAI(
                api_key=api_key or ("none" if url else None), base_url=url, max_retries=0, timeout=None
            )
        except openai.OpenAIError as error:
            raise PluginError(
                f"{self.name} needs a key: set OPENAI_API_KEY, or give the model `api_key` or a `url` of your own"
            ) from error
        in_use(self._client.api_key)
        url_in_use(self._client.base_url)
        self.settings: Mapping[str, Any] = {
            "effort": effort, "extra": free_of(extra, "max_output_tokens", "max_completion_tokens", "max_tokens"),
            "url": str(self._client.base_url), "schema": schema,
        }  # fmt: skip

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The request's body."""
        body: dict[str, Any] = {
            "model": self._model, "instructions": self._instructions(prompt), "input": [{"role": "user", "content": prompt.user}],
            "max_output_tokens": prompt.max_tokens, "store": False, "stream": False,
        }  # fmt: skip
        if self._schema == "strict":
            body["text"] = {"format": {"type": "json_schema", "name": "verdict", "strict": True, "schema": dict(prompt.schema)}}
        if self._effort:
            body["reasoning"] = {"effort": self._effort}
        if prompt.top_logprobs:
            body |= {"top_logprobs": prompt.top_logprobs, "include": ["message.output_text.logprobs"]}
        return body | self._extra

    def _instructions(self, prompt: Prompt) -> str:
        if self._schema == "strict":
            return prompt.system
        return f"{prompt.system}\n\nAnswer with one JSON object of this schema and nothing else:\n{json.dumps(prompt.schema)}"

    async def ask(self, prompt: Prompt) -> Reply:
        body = self.body(prompt)
        extra = {key: body.pop(key) for key in self._extra}
        raw = await self._call(self._client.responses.with_raw_response.create(**body, extra_body=extra or None))
        return self.read(envelope(raw.http_response), raw.headers)

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
        return read_response(body, headers.get("x-request-id", ""), _limits(headers))

    # Large jobs: `judges/batches.py`.

    async def submit(self, prompts: Mapping[str, Prompt]) -> str:
        """Sends many questions as one batch; returns its id."""
        lines = [{"custom_id": id_, "method": "POST", "url": self.path, "body": self.body(p)} for id_, p in prompts.items()]
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = await self._call(self._client.files.create(file=("verdicts.jsonl", text), purpose="batch"))
        first = min(prompts)
        batch = await self._call(
            self._client.batches.create(
                input_file_id=file.id, endpoint=self.path, completion_window="24h",  # type: ignore[arg-type]
                metadata={"turnwise": first},
            )
        )  # fmt: skip
        return str(batch.id)

    async def results(self, batch: str) -> dict[str, Reply | ModelError] | None:
        """Answers by custom id; None while it is at work."""
        state = await self._call(self._client.batches.retrieve(batch))
        if state.status not in ("completed", "failed", "expired", "cancelled"):
            return None
        answers: dict[str, Reply | ModelError] = {}
        for file in filter(None, (state.output_file_id, state.error_file_id)):
            text = (await self._call(self._client.files.content(file))).text
            if not text.strip():
                raise ModelError("server", f"the batch's file {file} came back empty")
            try:
                answers |= {line["custom_id"]: self._line(line) for line in map(json.loads, filter(None, text.split("\n")))}
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError("server", f"the batch's file {file} cannot be read: {error}") from error
        return answers

    def _line(self, line: Mapping[str, Any]) -> Reply | ModelError:
        response, error = line.get("response") or {}, line.get("error")
        try:
            if error or int(response.get("status_code") or 0) != 200:
                found = error or (response.get("body") or {}).get("error") or {}
                code, message = str(found.get("code") or ""), str(found.get("message") or "no answer")
                raise http_error(int(response.get("status_code") or 500), str(found.get("type") or ""), code, message, {})
            return self.read(response.get("body") or {}, {})
        except ModelError as failed:
            return failed

    async def mine(self, since: float, ids: Sequence[str], results: Any = None) -> str | None:
        """The batch with these custom ids; None where there is none. For a process that was killed between sending a batch and writing down its id."""
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
    """The same by Chat Completions, for servers that speak no Responses.

    Args: those of `OpenAI`.
    """

    path = "/v1/chat/completions"

    def body(self, prompt: Prompt) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model, "max_completion_tokens": prompt.max_tokens,
            "messages": [{"role": "system", "content": self._instructions(prompt)}, {"role": "user", "content": prompt.user}],
        }  # fmt: skip
        if self._schema == "strict":
            form = {"name": "verdict", "strict": True, "schema": dict(prompt.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        if self._effort:
            body["reasoning_effort"] = self._effort
        if prompt.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": prompt.top_logprobs}
        return body | self._extra

    async def ask(self, prompt: Prompt) -> Reply:
        body = self.body(prompt)
        extra = {key: body.pop(key) for key in self._extra}
        raw = await self._call(self._client.chat.completions.with_raw_response.create(**body, extra_body=extra or None))
        return self.read(envelope(raw.http_response), raw.headers)

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
        return read_completion(body, headers.get("x-request-id", ""), _limits(headers))


def read_response(body: Mapping[str, Any], request: str = "", limits: float = 0.0) -> Reply:
    """A response of the Responses API: the last message that is no commentary.

    Raises:
        ModelError: it is none, or says that it failed.
    """
    if not isinstance(body.get("output"), list):
        raise ModelError("server", f"the answer is no response: {str(body)[:200]}")
    if body.get("status") == "failed":
        error = body.get("error") or {}
        raise ModelError("server", f"{error.get('code')}: {error.get('message')}")
    used, details = body.get("usage") or {}, (body.get("usage") or {}).get("input_tokens_details") or {}
    usage = _usage(used.get("input_tokens"), details, used.get("output_tokens"), used.get("total_tokens"))
    messages = [each for each in body["output"] if each.get("type") == "message" and each.get("phase") != "commentary"]
    parts = messages[-1].get("content") or [] if messages else []
    text = "".join(str(p.get("text") or "") for p in parts if p.get("type") == "output_text")
    refusal = " ".join(str(p.get("refusal")) for p in parts if p.get("type") == "refusal")
    tokens = _tokens(t for p in parts for t in p.get("logprobs") or ())
    model = str(body.get("model") or "")
    if refusal:
        return Reply("refused", "", usage, refusal, model, request, limits)
    if body.get("status") not in ("completed", None):
        why = str((body.get("incomplete_details") or {}).get("reason") or body.get("status"))
        stop: Any = {"max_output_tokens": "length", "content_filter": "filtered"}.get(why, "other")
        return Reply(stop, text, usage, why, model, request, limits)
    return Reply("end", text, usage, "", model, request, limits, tokens)


def read_completion(body: Mapping[str, Any], request: str = "", limits: float = 0.0) -> Reply:
    """A chat completion.

    Raises:
        ModelError: it is none.
    """
    choices = body.get("choices")
    if not isinstance(choices, list):
        raise ModelError("server", f"the answer is no completion: {str(body)[:200]}")
    used = body.get("usage") or {}
    details = used.get("prompt_tokens_details") or {}
    usage = _usage(used.get("prompt_tokens"), details, used.get("completion_tokens"), used.get("total_tokens"))
    model = str(body.get("model") or "")
    first = choices[0] if choices else {}
    message = first.get("message") or {}
    text, why = str(message.get("content") or ""), str(first.get("finish_reason") or "stop")
    if message.get("refusal"):
        return Reply("refused", "", usage, str(message["refusal"]), model, request, limits)
    if why != "stop":
        stop: Any = {"length": "length", "content_filter": "filtered"}.get(why, "other")
        return Reply(stop, text, usage, why, model, request, limits)
    tokens = _tokens((first.get("logprobs") or {}).get("content") or ())
    return Reply("end", text, usage, "", model, request, limits, tokens)


def _usage(read: Any, details: Mapping[str, Any], written: Any, total: Any) -> Usage:
    """Their input tokens include those read from and written to the cache; ours do not.

    Some servers (xAI, Gemini) count reasoning in the total but not in the output: the larger of both readings is
    booked, which is the output itself where reasoning is part of it.
    """
    cached, stored = _count(details.get("cached_tokens")), _count(details.get("cache_write_tokens"))
    prompt, output = _count(read), _count(written)
    if prompt:
        output = max(output, _count(total) - prompt)
    return Usage(max(prompt - cached - stored, 0), cached, stored, output)


def _count(value: Any) -> int:
    """A number of tokens, which some servers send as a float or as text; 0 for what is none."""
    try:
        return max(int(float(value)), 0)
    except (TypeError, ValueError, OverflowError):
        return 0


def _tokens(found: Any) -> tuple[Token, ...]:
    return tuple(
        Token(str(t.get("token") or ""), {str(a.get("token") or ""): float(a["logprob"]) for a in t.get("top_logprobs") or ()})
        for t in found
    )


def _limits(headers: Mapping[str, str]) -> float:
    """Seconds until there is room again ("1m6.5s"), where the headers say that there is none now."""
    waits = [0.0]
    for name in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{name}") == "0":
            units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
            parts = re.findall(r"([\d.]+)(ms|h|m|s)", headers.get(f"x-ratelimit-reset-{name}", ""))
            waits.append(sum(float(number) * units[unit] for number, unit in parts))
    return max(waits)
