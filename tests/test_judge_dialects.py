"""Servers that are almost compatible: for each dialect what the verdict is, what is booked and what
is asked again, by the official SDKs over real sockets. The amounts are computed by hand, in
millionths of a dollar at PRICE (3 for a token that is read, 15 for one that is written)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import turnwise
from support.clock import AsyncClock
from support.episodes import conversation
from support.judges import PRICE, RUBRIC, answers, booked, context, model, unbiased
from support.model_server import Asked, ModelServer
from turnwise.judges.asking import calls
from turnwise.judges.llm.rubric_judge import RubricJudge
from turnwise.judges.llm.transcript import Unreadable, json_within

pytest.importorskip("anthropic")
pytest.importorskip("openai")

GOOD = conversation("good", "good good", id="e1")
MOST = 64 * 15  # of what is written, where nobody knows
MANY = calls.REQUESTS
USED = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}  # 600
READ = {"input_tokens": 100, "output_tokens": 20}

Said = tuple[int, Any, Mapping[str, str]]
# (status, body, headers) or a body, of the question and the text of a good verdict.
Says = Callable[[Asked, str], Any]


class Dialect(NamedTuple):
    """What a server says, and what comes of it.

    Attributes:
        says: to each request; the last one says it to all further ones.
        reason: stands in the verdict's reason.
        booked: of the tokens that are told, and of what is written where it is not.
        unread: how many requests are booked with the most that may have been read.
        unsure: how many are booked as not certain.
    """

    says: tuple[Says, ...]
    verdict: str = "scored"
    reason: str = ""
    requests: int = 1
    booked: int = 600
    unread: int = 0
    unsure: int = 0
    wire: str = "chat"
    options: Mapping[str, Any] = {}


def chat(
    content: Any, finish: Any = "stop", usage: Any = USED, choice: Any = None, **message: Any
) -> dict[str, Any]:
    first = {
        "index": 0,
        "finish_reason": finish,
        "message": {"role": "assistant", "content": content, **message},
    }
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "judge-1",
            "choices": [{**first, **(choice or {})}], "usage": usage}  # fmt: skip


def claude(content: Any, stop: Any = "end_turn", usage: Any = READ, **more: Any) -> dict[str, Any]:
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"id": "m", "type": "message", "role": "assistant", "model": "judge-1",
        "content": blocks,
            "stop_reason": stop, "usage": usage, **more}  # fmt: skip


def response(
    parts: Any, status: str = "completed", usage: Any = READ, **more: Any
) -> dict[str, Any]:
    output = (
        [{"type": "message", "role": "assistant", "content": parts}] if parts is not None else []
    )
    return {
        "id": "r",
        "object": "response",
        "model": "judge-1",
        "status": status,
        "output": output,
        "usage": usage,
        **more,
    }


def told(write: Callable[[str], Any], **more: Any) -> Dialect:
    """An answer of a shape that can be read."""
    return Dialect((lambda asked, good: chat(write(good)),), **more)


def ended(finish: str, verdict: str, reason: str, content: Any = "", **more: Any) -> Dialect:
    return Dialect((lambda asked, good: chat(content, finish),), verdict, reason, **more)


def counted(usage: Any, booked: int, unread: int = 0, unsure: int = 0) -> Dialect:
    """A way of counting tokens."""
    return Dialect(
        (lambda asked, good: chat(good, usage=usage),), booked=booked, unread=unread, unsure=unsure
    )


def refused(
    status: int,
    body: Any,
    verdict: str,
    reason: str,
    requests: int = 1,
    headers: Any = None,
    **more: Any,
) -> Dialect:
    """An error, which costs nothing."""
    return Dialect(
        (lambda asked, good: (status, body, headers or {}),), verdict, reason, requests, 0, **more
    )


def unless(wrong: Callable[[Asked], bool], status: int, body: Any) -> Says:
    """An error where a request is not written as the server wants it."""
    return lambda asked, good: (status, body, {}) if wrong(asked) else chat(good)


def has(name: str) -> Callable[[Asked], bool]:
    return lambda asked: name in asked.body


def roles(asked: Asked) -> bool:
    return asked.body["messages"][0]["role"] == "system"


FORBIDDEN = {"message": {"detail": [{"type": "extra_forbidden",
                "loc": ["body", "max_completion_tokens"],
             "msg": "Extra inputs are not permitted"}]}}  # fmt: skip
AZURE = {"message": "The response was filtered", "type": None, "param": "prompt",
    "code": "content_filter",
         "innererror": {"code": "ResponsibleAIPolicyViolation"}}  # fmt: skip
DIALECTS: dict[str, Dialect] = {
    # Content.
    "parts with thoughts": told(
        lambda g: [
            {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
            {"type": "text", "text": g},
        ]
    ),
    "two parts": told(lambda g: [{"type": "text", "text": g[:9]}, {"type": "text", "text": g[9:]}]),
    "parts that are text": told(lambda g: [g[:9], g[9:]]),
    "parsed data": told(json.loads),
    "a fence": told(lambda g: f"```json\n{g}\n```"),
    "a fence in one line": told(lambda g: f"```{g}```"),
    "a fence in capitals, and white space": told(lambda g: f"\n ```JSON  \r\n{g}\r\n ```\n"),
    "a fence of waves": told(lambda g: f"~~~json\n{g}\n~~~"),
    "thoughts": told(lambda g: f"<think>\nso {{so}}\n</think>\n\n{g}"),
    "thoughts without an opening tag": told(lambda g: f"so it is\n</think>\n\n{g}"),
    "thoughts that name the end of thoughts": told(
        lambda g: f"I end with </think> now.\n</think>{g}"
    ),
    "a verdict that names the end of thoughts": told(
        lambda g: g.replace("I read it.", "It wrote </think> twice.")
    ),
    "thoughts and a fence": told(lambda g: f"<thinking>so</thinking>\n```json\n{g}\n```"),
    "thoughts in capitals": told(lambda g: f"<Think>so</Think>{g}"),
    "thoughts by other names": told(lambda g: f"<scratchpad>so</scratchpad>{g}"),
    "an analysis": told(lambda g: f"<analysis>so</analysis>\n{g}"),
    "a reflection": told(lambda g: f"<reflection>so</reflection>\n{g}"),
    "thoughts in Gemma's channel": told(lambda g: f"<|channel>thought\nso<channel|>{g}"),
    "thoughts in brackets": told(lambda g: f"[THINK]so[/THINK]{g}"),
    "thoughts in a channel": told(
        lambda g: (
            "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final"
            f" <|constrain|>json<|message|>{g}<|return|>"
        )
    ),
    "a channel without control tokens": told(lambda g: f"analysisWe say so.assistantfinal{g}"),
    "a stop word": told(lambda g: f"{g}<|im_end|>"),
    "stop words": told(lambda g: f"{g}\n</s><|eot_id|>\n<end_of_turn>"),
    "a stop word in other letters": told(lambda g: f"{g}<｜end▁of▁sentence｜>"),
    "a header": told(lambda g: f"<|start_header_id|>assistant<|end_header_id|>\n\n{g}"),
    "a mark of bytes": told(lambda g: f"\ufeff{g}"),
    "text of a completion": Dialect(
        (
            lambda a, g: {
                **chat(None),
                "choices": [{"index": 0, "text": g, "finish_reason": "stop"}],
            },
        )
    ),
    "thoughts that do not end": told(
        lambda g: f"<think>{g}",
        verdict="failed",
        reason="unreadable, also when asked again",
        requests=2,
        booked=1200,
    ),
    "all in the reasoning": Dialect(
        (lambda a, g: chat(None, reasoning_content=g),),
        "failed",
        "into `reasoning_content`",
        requests=2,
        booked=1200,
    ),
    "log-probabilities that are none": Dialect(
        (
            lambda a, g: chat(
                g,
                choice={
                    "logprobs": {
                        "content": [
                            {"token": "a", "top_logprobs": [{"token": "b", "logprob": None}]}
                        ]
                    }
                },
            ),
        )
    ),
    # Ends.
    "no finish reason": Dialect((lambda a, g: chat(g, None),)),
    "eos": Dialect((lambda a, g: chat(g, "eos_token"),)),
    "STOP": Dialect((lambda a, g: chat(g, "STOP"),)),
    "end_turn": Dialect((lambda a, g: chat(g, "end_turn"),)),
    "MAX_TOKENS": ended("MAX_TOKENS", "failed", "truncated", "{", requests=2, booked=1200),
    "content_filter": ended("content_filter", "abstained", "filtered: content_filter"),
    "SAFETY": ended("SAFETY", "abstained", "filtered: SAFETY"),
    "content_filter: RECITATION": ended("content_filter: RECITATION", "abstained", "RECITATION"),
    "sensitive": ended("sensitive", "abstained", "filtered: sensitive"),
    "refusal": ended("refusal", "abstained", "refused: refusal"),
    "a refusal's field": Dialect(
        (lambda a, g: chat(None, refusal="I will not."),), "abstained", "refused: I will not."
    ),
    "a refusal's part": Dialect(
        (lambda a, g: chat([{"type": "refusal", "refusal": "I will not."}]),),
        "abstained",
        "refused: I will not.",
    ),
    "a provider's own refusal": Dialect(
        (lambda a, g: chat("", choice={"native_finish_reason": "refusal"}),),
        "abstained",
        "refused: refusal",
    ),
    "a blocked prompt": Dialect(
        (
            lambda a, g: {
                "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
                "usage": {"prompt_tokens": 100},
            },
        ),
        "abstained",
        "filtered: PROHIBITED_CONTENT",
        booked=300,
    ),
    "an end by an error, once": Dialect(
        (lambda a, g: chat("", "error"), lambda a, g: chat(g)), requests=2, booked=600 + 600
    ),
    "an end by the server": ended(
        "insufficient_system_resource",
        "failed",
        "server: ended by",
        requests=MANY,
        booked=600 * MANY,
    ),
    **{
        f"a verdict that ended by {w}": Dialect((lambda a, g, w=w: chat(g, w),))
        for w in (
            "tool_calls",
            "function_call",
            "done",
            "completed",
            "null",
            "unknown",
            "FINISH_REASON_STOP",
        )
    },
    "a verdict as a tool's arguments": Dialect(
        (
            lambda a, g: chat(
                None,
                "tool_calls",
                tool_calls=[{"type": "function", "function": {"name": "v", "arguments": g}}],
            ),
        )
    ),
    "tool calls": ended("tool_calls", "failed", "ended by tool_calls"),
    # Errors inside 200.
    "402 in 200": refused(
        200,
        {"error": {"code": 402, "message": "Insufficient credits"}},
        "failed",
        "account: HTTP 402",
    ),
    "400 in 200": refused(
        200, {"error": {"code": "400", "message": "context length"}}, "failed", "request: HTTP 400"
    ),
    "429 in 200": refused(
        200, {"error": {"code": 429, "message": "slow down"}}, "failed", "busy: HTTP 429", MANY
    ),
    "a quota in 200": refused(
        200,
        {"error": {"code": "insufficient_quota", "message": "no"}},
        "failed",
        "account: insufficient_quota",
    ),
    "text as an error in 200": refused(
        200, {"error": "model runner has stopped"}, "failed", "server: model runner", MANY
    ),
    "an error's object in 200": refused(
        200,
        {"object": "error", "message": "too long", "type": "BadRequestError", "code": 400},
        "failed",
        "too long",
    ),
    "429 beside choices": Dialect(
        (
            lambda a, g: {**chat(None, usage=None), "error": {"code": 429, "message": "slow"}},
            lambda a, g: chat(g),
        ),
        requests=2,
    ),
    "a page with 200": Dialect(
        (lambda a, g: (200, b"<!doctype html><html>Log in</html>", {}),),
        "failed",
        "/v1/chat/completions",
        requests=2,
        booked=2 * MOST,
        unread=2,
        unsure=2,
    ),
    "a response, asked for a completion": refused(
        200,
        response([{"type": "output_text", "text": "{}"}], usage=None),
        "failed",
        "use the provider openai",
    ),
    "an answer of no known form": Dialect(
        (lambda a, g: {"choices": {}, "usage": USED},),
        "failed",
        "form: the answer is no completion",
        requests=2,
        booked=1200,
    ),
    "events": Dialect(
        (
            lambda a, g: (
                200,
                b"data: {}\n\ndata: [DONE]\n\n",
                {"content-type": "text/event-stream"},
            ),
        ),
        "failed",
        "form: HTTP 200 with",
        requests=2,
        booked=2 * MOST,
        unread=2,
        unsure=2,
    ),
    "a filter in 200": refused(
        200,
        {"error": {"code": "content_policy_violation", "message": "no"}},
        "abstained",
        "filtered: ",
    ),
    "502 in a choice, once": Dialect(
        (
            lambda a, g: chat("", "error", None, {"error": {"code": 502, "message": "died"}}),
            lambda a, g: chat(g),
        ),
        requests=2,
    ),
    "502 in a choice, its tokens told": Dialect(
        (
            lambda a, g: chat("ab", "error", USED, {"error": {"code": 502, "message": "died"}}),
            lambda a, g: chat(g),
        ),
        requests=2,
        booked=1200,
    ),
    "502 in a choice after some text": Dialect(
        (
            lambda a, g: chat("ab", "error", None, {"error": {"code": 502, "message": "died"}}),
            lambda a, g: chat(g),
        ),
        requests=2,
        booked=600 + MOST,
        unread=1,
        unsure=1,
    ),
    "no choices": Dialect(
        (lambda a, g: {**chat(g), "choices": []},),
        "failed",
        "it was empty",
        requests=2,
        booked=1200,
    ),
    # Errors.
    "Azure's filter": refused(
        400, {"error": AZURE}, "abstained", "filtered: HTTP 400 content_filter"
    ),
    "a policy": refused(
        400,
        {"error": {"code": "content_policy_violation", "message": "no"}},
        "abstained",
        "filtered: ",
    ),
    "an invalid prompt": refused(
        400, {"error": {"code": "invalid_prompt", "message": "flagged"}}, "abstained", "filtered: "
    ),
    "an inner error": refused(
        400,
        {
            "error": {
                "code": None,
                "message": "no",
                "innererror": {"code": "ResponsibleAIPolicyViolation"},
            }
        },
        "abstained",
        "filtered",
    ),
    "a proxy's exception": refused(
        400,
        {"error": {"message": "litellm.ContentPolicyViolationError: no", "code": "400"}},
        "abstained",
        "filtered",
    ),
    "an inspection": refused(
        400, {"code": "DataInspectionFailed", "message": "no"}, "abstained", "filtered"
    ),
    "flagged with 403": refused(
        403,
        {
            "error": {
                "code": 403,
                "message": "moderation",
                "metadata": {"reasons": ["hate"], "flagged_input": "x"},
            }
        },
        "abstained",
        "hate",
    ),
    "a key in a list": refused(
        400,
        [{"error": {"code": 400, "message": "API key not valid", "status": "INVALID_ARGUMENT"}}],
        "failed",
        "account: HTTP 400 INVALID_ARGUMENT: API key not valid",
    ),
    "a proxy's word on the key": refused(
        400,
        {"error": {"message": "litellm.AuthenticationError: Incorrect API key provided"}},
        "failed",
        "account: HTTP 400",
    ),
    "a model that is none": refused(
        400, {"error": {"message": "`x` is not a valid model ID"}}, "failed", "account: HTTP 400"
    ),
    "no balance": refused(
        400,
        {"code": "Arrearage", "message": "Access denied"},
        "failed",
        "account: HTTP 400 Arrearage",
    ),
    "advice on billing with 429": refused(
        429,
        {"error": {"message": "slow down, or raise your credit balance"}},
        "failed",
        "busy: HTTP 429",
        MANY,
    ),
    "detail as a list": refused(
        400, {"detail": [{"loc": ["body", "x"], "msg": "bad x"}]}, "failed", "bad x"
    ),
    "detail as text": refused(422, {"detail": "bad y"}, "failed", "request: HTTP 422: bad y"),
    "plain text": refused(400, b"bad z", "failed", "request: HTTP 400: bad z"),
    "a provider's reason": refused(
        400,
        {
            "error": {
                "code": 400,
                "message": "Provider returned error",
                "metadata": {"raw": "bad w"},
            }
        },
        "failed",
        "bad w",
    ),
    "a page with 404": refused(
        404, b"<html><body>Not here</body></html>", "failed", "/v1/chat/completions"
    ),
    "405": refused(405, {"detail": "Method Not Allowed"}, "failed", "account: HTTP 405"),
    "a retired model": refused(410, {"error": {"message": "gone"}}, "failed", "account: HTTP 410"),
    "not implemented": refused(501, {"error": {"message": "no"}}, "failed", "request: HTTP 501"),
    # Limits and roles.
    "max_tokens alone": Dialect(
        (unless(has("max_completion_tokens"), 422, FORBIDDEN),), requests=1
    ),
    "max_tokens alone, by the option": Dialect(
        (unless(has("max_completion_tokens"), 422, FORBIDDEN),), options={"limit": "max_tokens"}
    ),
    "max_completion_tokens alone": Dialect(
        (
            unless(
                has("max_tokens"),
                400,
                {"error": {"message": "Unsupported parameter: 'max_tokens'"}},
            ),
        ),
        options={"limit": "max_tokens"},
    ),
    "neither limit": Dialect(
        (
            lambda a, g: (
                400,
                {
                    "error": {
                        "message": (
                            "unknown field"
                            f" {'max_tokens' if 'max_tokens' in a.body else 'max_completion_tokens'}"  # noqa: E501
                        )
                    }
                },
                {},
            ),
        ),
        "failed",
        "unknown field",
        booked=0,
    ),
    "no system's role": Dialect(
        (unless(roles, 400, {"message": "System role not supported", "code": 400}),)
    ),
    "no system's role, by the option": Dialect(
        (unless(roles, 400, {"message": "System role not supported"}),), options={"system": False}
    ),
    "roles that alternate": Dialect(
        (
            unless(
                roles,
                400,
                {"error": "Conversation roles must alternate user/assistant/user/assistant/..."},
            ),
        )
    ),
    "no instructions": Dialect(
        (
            unless(
                roles,
                400,
                [{"error": {"message": "Developer instruction is not enabled for models/gemma-3"}}],
            ),
        )
    ),
    "neither system's role nor the limit": Dialect(
        (
            lambda a, g: (
                (422, FORBIDDEN, {})
                if has("max_completion_tokens")(a)
                else (500, "System role not supported", {})
                if roles(a)
                else chat(g)
            ),
        )
    ),
    # Tokens.
    "reasoning outside": counted({**USED, "total_tokens": 1120}, 300 + 1020 * 15),
    "reasoning inside": counted(
        {**USED, "completion_tokens_details": {"reasoning_tokens": 15}}, 600
    ),
    "cached": counted({**USED, "prompt_tokens_details": {"cached_tokens": 60}}, 120 + 18 + 300),
    "numbers as text": counted({"prompt_tokens": "100", "completion_tokens": "20.0"}, 600),
    "the prompt alone": counted({"prompt_tokens": 100}, 300 + MOST, unsure=1),
    "the completion alone": counted({"completion_tokens": 20}, 300, unread=1, unsure=1),
    "nothing": counted(None, MOST, unread=1, unsure=1),
    "zeros": counted(dict.fromkeys(USED, 0), MOST, unread=1, unsure=1),
    "numbers beyond sense": counted(
        {"prompt_tokens": 1e30, "completion_tokens": "many"}, MOST, unread=1, unsure=1
    ),
    # Headers.
    "a wait that is none": Dialect(
        (
            lambda a, g: (
                200,
                chat(g),
                {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "..s"},
            ),
        )
    ),
    "a wait in words": Dialect(
        (
            lambda a, g: (
                200,
                chat(g),
                {
                    "x-ratelimit-remaining-tokens": "0",
                    "x-ratelimit-reset-tokens": "soon",
                    "retry-after": "-",
                },
            ),
        )
    ),
    "text as the type": Dialect(
        (
            lambda a, g: (
                200,
                json.dumps(chat(g)).encode(),
                {"content-type": "text/plain; charset=klingon"},
            ),
        )
    ),
    "a mark of bytes before the body": Dialect(
        (lambda a, g: (200, b"\xef\xbb\xbf" + json.dumps(chat(g)).encode(), {}),)
    ),
    # The other wires.
    "Responses: a filter": Dialect(
        (lambda a, g: response([], "incomplete", incomplete_details={"reason": "content_filter"}),),
        "abstained",
        "filtered",
        wire="responses",
    ),
    "Responses: failed by its prompt": Dialect(
        (
            lambda a, g: response(
                None, "failed", None, error={"code": "invalid_prompt", "message": "flagged"}
            ),
        ),
        "abstained",
        "filtered: invalid_prompt",
        booked=0,
        wire="responses",
    ),
    "Responses: failed by a limit, once": Dialect(
        (
            lambda a, g: response(
                None, "failed", READ, error={"code": "rate_limit_exceeded", "message": "slow"}
            ),
            lambda a, g: response([{"type": "output_text", "text": g}]),
        ),
        requests=2,
        booked=1200,
        wire="responses",
    ),
    "Responses: no tokens": Dialect(
        (lambda a, g: response([{"type": "output_text", "text": g}], usage=None),),
        booked=MOST,
        unread=1,
        unsure=1,
        wire="responses",
    ),
    "Messages: a refusal": Dialect(
        (lambda a, g: claude([], "refusal"),), "abstained", "refused: refusal", wire="messages"
    ),
    "Messages: a refusal without content": Dialect(
        (lambda a, g: claude(None, "refusal"),), "abstained", "refused: refusal", wire="messages"
    ),
    "Messages: an error in 200": Dialect(
        (
            lambda a, g: {
                "type": "error",
                "error": {"type": "overloaded_error", "message": "busy"},
            },
            lambda a, g: claude(g),
        ),
        requests=2,
        wire="messages",
    ),
    "Messages: cached tokens and text for numbers": Dialect(
        (
            lambda a, g: claude(
                g,
                usage={
                    "input_tokens": "100",
                    "cache_read_input_tokens": 10.0,
                    "output_tokens": "20",
                },
            ),
        ),
        booked=603,
        wire="messages",
    ),
    "Messages: no tokens": Dialect(
        (lambda a, g: claude(g, usage=None),), booked=MOST, unread=1, unsure=1, wire="messages"
    ),
    "Messages: what was written alone": Dialect(
        (lambda a, g: claude(g, usage={"output_tokens": 20}),),
        booked=300,
        unread=1,
        unsure=1,
        wire="messages",
    ),
}
_runs = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    with ModelServer(unbiased) as server:
        yield server


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[turnwise.Ledger]:
    """Opens one ledger for all cases, each of which is a run of its own in it."""
    opened = turnwise.Ledger(tmp_path_factory.mktemp("dialects") / "ledger.sqlite")
    yield opened
    opened.close()


@pytest.mark.parametrize("name", DIALECTS)
def test_what_a_dialect_becomes(
    name: str,
    server: ModelServer,
    ledger: turnwise.Ledger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "TIME", AsyncClock())
    dialect, run, heard = DIALECTS[name], f"run-{next(_runs)}", list[Asked]()

    def answer(asked: Asked) -> tuple[int, Any, dict[str, str]]:
        said = dialect.says[min(len(heard), len(dialect.says) - 1)](
            asked, json.dumps(unbiased(asked))
        )
        heard.append(asked)
        status, body, headers = said if isinstance(said, tuple) else (200, said, {})
        return status, body, dict(headers)

    server.dialect = answer
    asked = model(dialect.wire, server, **dialect.options)
    judge = RubricJudge(
        canaries=0,
        model=asked,
        rubric=RUBRIC,
        cache=False,
        prices={asked.name: PRICE},
        max_tokens=64,
    )
    [said] = answers(judge, [GOOD], context(tmp_path, ledger, run))

    assert said.status == dialect.verdict, said.reason
    assert (said.score is not None) == (dialect.verdict == "scored")
    assert dialect.reason in said.reason
    rows = booked(ledger, run)
    assert len(rows) == dialect.requests, [asked.body for asked in heard]
    first = heard[0]
    # No text has more tokens than bytes.
    unread = len((first.system + first.user + str(first.schema)).encode()) + 64
    assert sum(row.cost for row in rows) * 1e6 == pytest.approx(
        dialect.booked + dialect.unread * unread * 3.75
    )
    assert sum(not row.certain for row in rows) == dialect.unsure
    assert said.stamp.cost == pytest.approx(sum(row.cost for row in rows))
    assert judge._caller.account.reserved == 0.0


@pytest.mark.parametrize(
    "part",
    [" ", "#", "</s>", "<|", "</think>", "assistantfinal", "<|a|> ", "[INST]", "```", "\ufeff"],
)
def test_an_answer_of_much_that_is_taken_off_is_read_in_linear_time(part: str) -> None:
    """Quadratic time would be many seconds here."""
    with pytest.raises(Unreadable):
        json_within(part * (50_000 // len(part)) + "x")
