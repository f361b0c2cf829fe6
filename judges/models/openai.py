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
from ...engine.secrets import redact
from ...engine.suggest import install
from . import (
    ModelError,
    Prompt,
    Reply,
    Token,
    Usage,
    called,
    client_of,
    count,
    envelope,
    error_within,
    free_of,
    http_error,
    mapping,
    said_error,
)


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
            self._client = client_of(
                self.name, api_key, url,
                lambda key, base: openai.AsyncOpenAI(
                    api_key=key or ("none" if base else None), base_url=base, max_retries=0, timeout=httpx2.Timeout(None, connect=10.0)
                ),
            )  # fmt: skip
        except openai.OpenAIError as error:
            raise PluginError(
                f"{self.name} needs a key: set OPENAI_API_KEY, or give the model `api_key` or a `url` of your own"
            ) from error
        self.settings: Mapping[str, Any] = {
            "effort": effort, "extra": free_of(extra, "max_output_tokens", "max_completion_tokens", "max_tokens"),
            "url": redact(str(self._client.base_url)), "schema": schema,
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
                input_file_id=file.id, endpoint=self.path, completion_window="24h",
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
        if not (state.output_file_id or state.error_file_id):
            why = said_error([each.to_dict() for each in (state.errors.data or ())] if state.errors else [])
            said = ": ".join(filter(None, (why[1], why[2]))) or "nothing is said of why"
            raise ModelError("batch", f"the batch {batch} {state.status} as a whole: {said}"[:500])
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
                kind, code, message = said_error(error or response.get("body") or "no answer")
                raise http_error(int(response.get("status_code") or 500), kind, code, message, {})
            return self.read(response.get("body") or {}, {})
        except ModelError as failed:
            return failed.answer

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

    A server that refuses the limit's name or the system's message for what it is gets the question in its own dialect from then on.

    Args:
        limit: what the field with the most tokens of an answer is called: "max_completion_tokens" or "max_tokens"; default: the first, and the other
            where the server refuses that. A server that ignores the one it does not know needs to be told.
        system: where instructions go: "system", a message of their own, or "user", into the user's; default: the first, and the other where the server
            refuses that.
        others: those of `OpenAI`.
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
        limit: str | None = None,
        system: str | None = None,
    ) -> None:
        if limit not in (None, "max_completion_tokens", "max_tokens"):
            raise ValueError(f"limit must be 'max_completion_tokens' or 'max_tokens', got {limit!r}")
        if system not in (None, "system", "user"):
            raise ValueError(f"system must be 'system' or 'user', got {system!r}")
        super().__init__(model, api_key=api_key, url=url, effort=effort, extra=extra, schema=schema)
        self._limit, self._system = limit or "max_completion_tokens", system or "system"
        self._told = {"limit": limit, "system": system}
        self.settings = {**self.settings, **{name: said for name, said in self._told.items() if said}}

    def body(self, prompt: Prompt) -> dict[str, Any]:
        instructions = self._instructions(prompt)
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": prompt.user}]
        if self._system == "user":
            messages = [{"role": "user", "content": f"{instructions}\n\n{prompt.user}"}]
        body: dict[str, Any] = {"model": self._model, self._limit: prompt.max_tokens, "messages": messages}
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
        try:
            raw = await self._call(self._client.chat.completions.with_raw_response.create(**body, extra_body=extra or None))
        except ModelError as error:
            raise self._understood(error, body) from error
        return self.read(envelope(raw.http_response), raw.headers)

    def _understood(self, error: ModelError, body: Mapping[str, Any]) -> ModelError:
        """The error, or that the next request says it in the server's dialect."""
        said = str(error)
        if error.kind not in ("request", "server") or error.status not in (400, 422, 500):
            return error
        if "max_completion_tokens" in body and "max_completion_tokens" in said and self._told["limit"] is None:
            self._limit = "max_tokens"
            return ModelError("dialect", said, error.status)
        if len(body["messages"]) > 1 and _NO_SYSTEM.search(said) and self._told["system"] is None:
            self._system = "user"
            return ModelError("dialect", said, error.status)
        if self._schema == "strict" and re.search(r"response_format|json_schema|guided|grammar", said):
            return ModelError(
                error.kind, f"{said} (where the server knows no schemas: `schema: prompt`)", error.status, error.after
            )
        return error

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
        return read_completion(body, headers.get("x-request-id", ""), _limits(headers))


_NO_SYSTEM = re.compile(
    r"system (?:role|message|prompt|instruction)s?\b.{0,40}(?:not |un)(?:be )?(?:supported|allowed|enabled)|(?:not|n't) support.{0,40}\bsystem\b"
    r"|roles? must alternate|only user and assistant roles|(?:unknown|unexpected|invalid|unsupported)[^.]{0,30}role[^.]{0,20}system"
    r"|role['\"`: ]+system|developer instruction is not enabled|role[^.]{0,40}must be[^.]{0,20}(?:user|assistant)"
    r"|should be ['\"]?(?:user|assistant)['\"]? or",
    re.IGNORECASE,
)


def read_response(body: Mapping[str, Any], request: str = "", limits: float = 0.0) -> Reply:
    """A response of the Responses API: the last message that is no commentary.

    Raises:
        ModelError: it is none, or says that it failed.
    """
    if body.get("error") and body.get("status") in (None, "failed"):
        raise error_within(body["error"], paid=bool(mapping(body.get("usage")).get("output_tokens")))
    if not isinstance(body.get("output"), list):
        if isinstance(body.get("choices"), list):
            raise ModelError("account", "the server answers as Chat Completions do: use the provider openai-chat", lost=True)
        raise ModelError("server", redact(f"the answer is no response: {body!s}")[:300], lost=True)
    if body.get("status") == "failed":
        raise ModelError("server", "the response failed, nothing is said of why", lost=True)
    messages = [
        m for m in body["output"] if isinstance(m, Mapping) and m.get("type") == "message" and m.get("phase") != "commentary"
    ]
    text, refusal, parts = _content(messages[-1].get("content")) if messages else ("", "", [])
    usage = _usage(mapping(body.get("usage")), "input_tokens", "output_tokens", text)
    tokens = _tokens(t for p in parts for t in p.get("logprobs") or ())
    model = str(body.get("model") or "")
    if refusal:
        return Reply("refused", "", usage, refusal, model, request, limits)
    if body.get("status") not in ("completed", None):
        why = str(mapping(body.get("incomplete_details")).get("reason") or body.get("status"))
        return Reply(_stop(why), text, usage, why, model, request, limits)
    return Reply("end", text, usage, "", model, request, limits, tokens)


def read_completion(body: Mapping[str, Any], request: str = "", limits: float = 0.0) -> Reply:
    """A chat completion.

    Raises:
        ModelError: it is none, or holds an error.
    """
    choices, model = body.get("choices"), str(body.get("model") or "")
    first = mapping(choices[0] if isinstance(choices, list) and choices else None)
    message = mapping(first.get("message"))
    text, refusal, _ = _content(message.get("content") if message else first.get("text"))
    used = mapping(body.get("usage"))
    usage = _usage(used, "prompt_tokens", "completion_tokens", text)
    for holder in (body, first):
        if holder.get("error"):
            raise error_within(holder["error"], paid=usage != Usage())
    blocked = mapping(body.get("promptFeedback") or body.get("prompt_feedback"))
    if why := str(blocked.get("blockReason") or blocked.get("block_reason") or ""):
        return Reply("filtered", "", usage, why, model, request, limits)
    if not isinstance(choices, list):
        if isinstance(body.get("output"), list):
            raise ModelError("account", "the server answers as Responses do: use the provider openai", lost=True)
        said = mapping(body.get("base_resp"))  # MiniMax
        kinds = {1002: 429, 1004: 401, 1008: 402, 1026: "content_filter", 1027: "content_filter", 1039: 429, 2049: 401}
        if code := count(said.get("status_code")):
            raise error_within({"code": kinds.get(code, 500), "message": f"{code} {said.get('status_msg')}"})
        if body.get("object") == "error" or ("message" in body and "code" in body):
            raise error_within(body)
        raise ModelError("server", redact(f"the answer is no completion: {body!s}")[:300], lost=usage != Usage())
    refusal = str(message.get("refusal") or refusal)
    why = str(first.get("finish_reason") or "stop")
    if refusal:
        return Reply("refused", "", usage, refusal, model, request, limits)
    stop = _stop(why)
    if stop == "other" and why.lower() in _PASSING:
        raise ModelError("server", f"ended by {why}", lost=True)
    if stop != "end":
        return Reply(stop, text, usage, why, model, request, limits)
    tokens = _tokens(mapping(first.get("logprobs")).get("content") or ())
    thought = message.get("reasoning") or message.get("reasoning_content")
    empty = f"`reasoning` holds {len(str(thought))} characters" if thought and not text.strip() else ""
    return Reply("end", text, usage, empty, model, request, limits, tokens)


_STOPS = {
    "end": [
        "stop",
        "end_turn",
        "eos",
        "eos_token",
        "stop_sequence",
        "stop_token",
        "completed",
        "complete",
        "end",
        "finish",
        "finished",
        "stop_str",
    ],
    "length": ["length", "max_tokens", "max_output_tokens", "model_length", "max_length", "token_limit"],
    "filtered": [
        "content_filter",
        "content-filter",
        "content_filtered",
        "safety",
        "recitation",
        "blocklist",
        "prohibited_content",
        "spii",
        "image_safety",
        "filtered",
        "sensitive",
        "guardrail_intervened",
        "moderation",
        "risk_control",
        "language",
        "content_policy",
    ],
    "refused": ["refusal", "refused"],
}
_PASSING = {
    "error",
    "insufficient_system_resource",
    "abort",
    "aborted",
    "network_error",
    "engine_overloaded",
    "overloaded",
    "cancelled",
    "timeout",
}


def _stop(why: str) -> Any:
    return next((stop for stop, names in _STOPS.items() if why.lower().removeprefix("finishreason.") in names), "other")


def _content(content: Any) -> tuple[str, str, list[Mapping[str, Any]]]:
    """Text and refusal of a message's content, one text or a list of parts, and the parts; thoughts are none of the text."""
    if isinstance(content, str):
        return content, "", []
    parts = [{"text": p} if isinstance(p, str) else p for p in (content if isinstance(content, list) else [content])]
    parts = [p for p in parts if isinstance(p, Mapping)]
    text = "".join(
        str(p.get("text") or "") for p in parts if p.get("type", "text") in ("text", "output_text") and not p.get("thought")
    )
    return text, " ".join(str(p.get("refusal")) for p in parts if p.get("type") == "refusal"), parts


def _usage(used: Mapping[str, Any], read: str, written: str, text: str) -> Usage:
    """Their input tokens include those read from and written to the cache; ours do not.

    Some servers (xAI, Gemini) count reasoning in the total but not in the output: the larger of both readings is booked, which is the output itself where
    reasoning is part of it. A count that is missing makes the whole unknown: `Usage()`.
    """
    details = mapping(used.get(f"{read}_details"))
    cached, stored = count(details.get("cached_tokens")), count(details.get("cache_write_tokens"))
    cached = cached or count(used.get("prompt_cache_hit_tokens"))
    prompt, output, total = count(used.get(read)), count(used.get(written)), count(used.get("total_tokens"))
    thought = count(mapping(used.get(f"{written}_details")).get("reasoning_tokens") or used.get("reasoning_tokens"))
    output = output + thought if thought > output else output
    prompt = prompt or max(total - output, 0)
    output = max(output, total - prompt)
    if not prompt or (text.strip() and not output):
        return Usage()
    fresh = prompt - cached - stored
    return Usage(fresh if fresh >= 0 else prompt, cached, stored, output)


def _tokens(found: Any) -> tuple[Token, ...]:
    try:
        return tuple(
            Token(
                str(t.get("token") or ""), {str(a.get("token") or ""): float(a["logprob"]) for a in t.get("top_logprobs") or ()}
            )
            for t in found
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return ()  # of a shape of the server's own: the answer counts without them


def _limits(headers: Mapping[str, str]) -> float:
    """Seconds until there is room again ("1m6.5s"), where the headers say that there is none now."""
    waits = [0.0]
    for name in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{name}") == "0":
            units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
            parts = re.findall(r"(\d+(?:\.\d+)?|\.\d+)(ms|h|m|s)", headers.get(f"x-ratelimit-reset-{name}", ""))
            waits.append(sum(float(number) * units[unit] for number, unit in parts))
    return max(waits)
