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
from ..llm.transcript import Unreadable, json_within
from .model import BatchFailed, BatchModel, ModelError, Prompt, Reply, Token, Usage, free_of
from .wire import (
    FILTERED,
    address_of,
    called,
    client_of,
    count,
    envelope,
    error_within,
    http_error,
    key_of,
    part,
    plain_word,
)

_STOPS = {  # plain words of finish reasons
    "": "end", "stop": "end", "eos": "end", "eostoken": "end", "endturn": "end",
    "stopsequence": "end", "complete": "end",
    "length": "length", "maxtokens": "length", "modellength": "length", "maxoutputtokens": "length",
}  # fmt: skip
# The server's own failures.
_BROKEN = ("error", "networkerror", "abort", "insufficientsystemresource")
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
                f"{self.name} needs a key: set OPENAI_API_KEY, or give the model `api_key` or a"
                " `url` of your own"
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
        body = self.body(prompt)
        extra = {key: body.pop(key) for key in self._extra}
        raw = await self._call(
            self._client.responses.with_raw_response.create(**body, extra_body=extra or None)
        )
        return self.read(envelope(raw.http_response), raw.headers)

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
        """Reads the body and headers of a response."""
        return read_response(body, headers.get("x-request-id", ""), _limits(headers))

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
            raise _whole(batch, state.to_dict())
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
        return read_completion(body, headers.get("x-request-id", ""), _limits(headers))


def read_response(body: Mapping[str, Any], request: str = "", limits: float = 0.0) -> Reply:
    """Reads a response of the Responses API: the last message that is no commentary.

    Raises:
        ModelError: it is none, or says that it failed.
    """
    usage = _usage(body)
    if body.get("status") == "failed" or (body.get("error") and not body.get("output")):
        raise error_within(body, usage)
    if isinstance(body.get("choices"), list):
        raise ModelError(
            "account",
            "this server speaks Chat Completions: use the provider openai-chat",
            usage=usage,
        )
    if not isinstance(body.get("output"), list):
        raise ModelError("form", f"the answer is no response: {str(body)[:200]}", usage=usage)
    output = [each for each in body["output"] if isinstance(each, Mapping)]
    messages = [
        each
        for each in output
        if each.get("type") == "message" and each.get("phase") != "commentary"
    ]
    text, refusal = _parts(messages[-1].get("content") if messages else None)
    found = messages[-1].get("content") if messages else None
    parts = [p for p in found if isinstance(p, Mapping)] if isinstance(found, list) else []
    tokens = _tokens(t for p in parts for t in p.get("logprobs") or ())
    model = str(body.get("model") or "")
    if refusal:
        return Reply("refused", "", usage, refusal, model, request, limits)
    if body.get("status") not in ("completed", None):
        why = str(part(body, "incomplete_details").get("reason") or body.get("status"))
        return Reply(_stop(why), text, usage, why, model, request, limits)
    return Reply("end", text, usage, "", model, request, limits, tokens)


def read_completion(body: Mapping[str, Any], request: str = "", limits: float = 0.0) -> Reply:
    """Reads a chat completion.

    Raises:
        ModelError: it is none, or an error that came as one.
    """
    usage, choices = _usage(body), body.get("choices")
    first = (
        choices[0]
        if isinstance(choices, list) and choices and isinstance(choices[0], Mapping)
        else {}
    )
    text, refusal = _parts(
        first["message"].get("content") if part(first, "message") else first.get("text")
    )
    message, model = part(first, "message"), str(body.get("model") or "")
    if first.get("error"):
        raise error_within(first, usage, lost=bool(text) and usage == Usage())
    if not text and (body.get("error") or body.get("object") == "error"):
        raise error_within(body, usage)
    blocked = part(body, "promptFeedback") or part(body, "prompt_feedback")
    if why := blocked.get("blockReason") or blocked.get("block_reason"):
        return Reply("filtered", "", usage, str(why), model, request, limits)
    if not isinstance(choices, list) and isinstance(body.get("output"), list):
        raise ModelError(
            "account", "this server speaks Responses: use the provider openai", usage=usage
        )
    if not isinstance(choices, list):
        raise ModelError("form", f"the answer is no completion: {str(body)[:200]}", usage=usage)
    refusal = str(message.get("refusal") or refusal)
    why, native = (
        str(first.get("finish_reason") or ""),
        str(first.get("native_finish_reason") or ""),
    )
    stop = _stop(why)
    if stop == "end" and not text and plain_word(native) in FILTERED:
        stop, why = _stop(native), native
    if stop == "refused" or (refusal and stop != "filtered"):
        return Reply("refused", "", usage, refusal or why, model, request, limits)
    if plain_word(why) in _BROKEN:
        raise ModelError(
            "server", f"ended by {why}", lost=bool(text) and usage == Usage(), usage=usage
        )
    if stop == "other" and _is_object(text := text or _called_with(message)):
        stop = "end"  # an unknown finish reason, with a complete answer
    if stop != "end":
        return Reply(stop, text, usage, why, model, request, limits)
    thought = next(
        (name for name in ("reasoning_content", "reasoning", "thinking") if message.get(name)), ""
    )
    reason = f"the server put all its text into `{thought}`" if thought and not text.strip() else ""
    tokens = _tokens(_list(part(first, "logprobs").get("content")))
    return Reply("end", text, usage, reason, model, request, limits, tokens)


def _stop(why: str) -> Any:
    """Returns how an answer ended, from a finish reason in any server's words ("content_filter:
    RECITATION" in Gemini's)."""
    word = plain_word(why.split(":")[0])
    if word == "refusal":
        return "refused"
    return "filtered" if word in FILTERED else _STOPS.get(word, "other")


def _is_object(text: str) -> bool:
    try:
        found = json_within(text)[1]
        return isinstance(found, dict) and bool(found)
    except Unreadable:
        return False


def _called_with(message: Mapping[str, Any]) -> str:
    """Returns the arguments of a message's only tool call: some servers make the answer to a schema
    one."""
    tools = [each for each in _list(message.get("tool_calls")) if isinstance(each, Mapping)]
    calls = [part(each, "function") for each in tools] or [part(message, "function_call")]
    return str(calls[0].get("arguments") or "") if len(calls) == 1 else ""


def _parts(content: Any) -> tuple[str, str]:
    """Returns the text and the refusal in a message's content: text, a list of parts less thoughts,
    or data that the server has parsed."""
    if isinstance(content, Mapping) and "type" not in content and "text" not in content:
        return json.dumps(content), ""
    if not isinstance(content, (list, Mapping)):
        return str(content or ""), ""
    texts, refusals = [], []
    for each in content if isinstance(content, list) else [content]:
        if isinstance(each, str):
            texts.append(each)
        elif isinstance(each, Mapping) and each.get("type") == "refusal":
            refusals.append(str(each.get("refusal") or "refused"))
        elif isinstance(each, Mapping) and each.get("type", "text") in ("text", "output_text"):
            texts.append(str(each.get("text") or ""))
    return "".join(texts), " ".join(refusals)


def _whole(batch: str, state: Mapping[str, Any]) -> BatchFailed:
    """Returns the error of a batch that ended without an answer to any of its questions."""
    errors = [e for e in _list(part(state, "errors").get("data")) if isinstance(e, Mapping)]
    reasons = "; ".join(
        ": ".join(str(e[k]) for k in ("code", "message") if e.get(k)) for e in errors[:3]
    )
    what = (
        f"the batch {batch} as a whole is {state.get('status')}:"
        f" {reasons or 'no question was answered'}"
    )
    return BatchFailed(error_within(errors).kind if errors else "busy", what[:500])


def _usage(body: Mapping[str, Any]) -> Usage:
    """Returns the tokens used, in any server's way of counting; 0 where it gives no number, which
    `judges/asking/calls.py` takes for unknown.

    Their input tokens include those read from and written to the cache; ours do not. Some servers
    count reasoning in the total but not in the output (xAI, Gemini), or as a number of its own: the
    largest reading is booked, which is the output itself where reasoning is part of it. A total
    without one of its parts gives that part; alone, it counts as output, which costs more.
    """
    used = part(body, "usage")
    details = part(used, "prompt_tokens_details") or part(used, "input_tokens_details")
    thoughts = part(used, "completion_tokens_details") or part(used, "output_tokens_details")

    def first(*names: str) -> int:
        return next((n for n in (count(used.get(name)) for name in names) if n), 0)

    read, output, total = (
        first("prompt_tokens", "input_tokens"),
        first("completion_tokens", "output_tokens"),
        first("total_tokens"),
    )
    cached = count(details.get("cached_tokens")) or first(
        "prompt_cache_hit_tokens", "cached_tokens", "cache_read_input_tokens"
    )
    stored = count(details.get("cache_write_tokens")) or first("cache_creation_input_tokens")
    if not read and output and total > output:
        read = total - output
    # More than was read: counted separately.
    fresh = max(read - cached - stored, 0) if cached + stored <= read else read
    reasoning = count(thoughts.get("reasoning_tokens")) or first("reasoning_tokens")
    if reasoning > output:
        output += reasoning
    return Usage(fresh, cached, stored, max(output, total - max(read, fresh + cached + stored)))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _tokens(found: Any) -> tuple[Token, ...]:
    """Returns the log-probabilities that are well formed: malformed ones must not cost an answer
    that is paid for."""
    tokens = []
    for each in found:
        if not isinstance(each, Mapping):
            return ()
        others = [a for a in _list(each.get("top_logprobs")) if isinstance(a, Mapping)]
        try:
            tokens.append(
                Token(
                    str(each.get("token") or ""),
                    {str(a.get("token") or ""): float(a["logprob"]) for a in others},
                )
            )
        except (KeyError, TypeError, ValueError):
            return ()
    return tuple(tokens)


def _limits(headers: Mapping[str, str]) -> float:
    """Returns the seconds until there is room again ("1m6.5s", or a number), where the headers tell
    of none now."""
    waits = [0.0]
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
    for name in ("requests", "tokens"):
        reset = headers.get(f"x-ratelimit-reset-{name}", "").strip()
        number = r"\d+(?:\.\d+)?"
        if headers.get(f"x-ratelimit-remaining-{name}", "").strip() != "0":
            continue
        if re.fullmatch(rf"(?:{number}(?:ms|h|m|s))+", reset) or re.fullmatch(
            r"\d{1,6}(?:\.\d+)?", reset
        ):
            waits.append(
                sum(
                    float(n) * units[unit]
                    for n, unit in re.findall(rf"({number})(ms|h|m|s|)", reset)
                )
            )
    return max(waits)
