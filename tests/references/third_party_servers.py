"""Asks model servers that others wrote one question bound to a schema, through the official SDKs on
every wire, and through our judges' models.

Judges meet more than what two companies serve: proxies and local servers speak the same wires, more
or less. litellm's proxy stands in front of the fault server of the tests, which so is read by
somebody else's parsers too.

    npm install --prefix others --ignore-scripts @copilotkit/aimock@1.43.0   # MIT, 12 MB, one
        package
    pip install --only-binary=:all: --target others/lib 'litellm[proxy]==1.106.0'   # MIT, 716 MB,
        117 wheels
    pip install 'turnwise[judges,people]'   # is enough for `transformers serve`
    python tests/references/third_party_servers.py --aimock others --litellm others/litellm

where `others/litellm` is a script that calls `litellm.run_server()` with `others/lib` in
PYTHONPATH. litellm is pinned, and runs without a network and without rights (`unshare -n`,
`setpriv`): releases 1.82.7 and 1.82.8 on PyPI stole credentials, and 1.107.0, which PyPI no longer
lists, is described as compromised too.

Observed with anthropic 2.11.0, openai 3.52.0, transformers 5.23.0 and Python 3.11, on two shared
CPU cores ("fits": the answer fits the schema; "schema upstream": what the proxy made of it, and the
wire it spoke to the fault server):

    server                 start s  wire   the SDK gives   fits  tokens   schema upstream
    aimock                 0.2   messages   Message   yes   0/0   -
    aimock                 0.2   chat   ChatCompletion   yes   4/12   -
    aimock                 0.2   responses   Response   yes   0/0   -
    aimock                 0.2   responses, no stream  Response   yes   0/0   -
    aimock                 0.4   judges, anthropic   Reply, end   yes   0/0   -
    aimock                 0.4   judges, openai-chat   Reply, end   yes   8/12   -
    aimock                 0.4   judges, openai   Reply, end   yes   0/0   -
    litellm, to anthropic  5.3   messages   Message   yes   4/17   as asked, messages
    litellm, to anthropic  5.3   chat   ChatCompletion   yes   4/17   as asked, messages
    litellm, to anthropic  5.3   responses   Response   yes   4/17   as asked, messages
    litellm, to anthropic  5.3   responses, no stream  Response   yes   4/17   as asked, messages
    litellm, to openai     5.3   messages   Message   yes   4/17   as asked, responses
    litellm, to openai     5.3   chat   ChatCompletion   yes   4/17   as asked, chat
    litellm, to openai     5.3   responses   Response   yes   4/17   as asked, responses
    litellm, to openai     5.3   responses, no stream  Response   yes   4/17   as asked, responses
    litellm, canned        5.3   messages   Message   yes   2095/503  -
    litellm, canned        5.3   chat   ChatCompletion   yes   10/20   -
    litellm, canned        5.3   responses   Response   yes   36/87   -
    litellm, canned        5.3   responses, no stream  Response   yes   36/87   -
    transformers serve     5.2   messages   NotFoundError 404   -   -   -
    transformers serve     5.2   chat   ChatCompletion   no   12/64   -
    transformers serve     5.2   responses   str: 'data: {"response'...  -   -   -
    transformers serve     5.2   responses, no stream  Response   no   12/64   -
    transformers serve     7.7   judges, anthropic   ModelError account 404   -   -   -
    transformers serve     7.7   judges, openai-chat   Reply, length   no   33/64   -
    transformers serve     7.7   judges, openai   Reply, end   no   33/64   -

litellm was not asked through the judges' models.

aimock and litellm's canned answers do not look at the schema; their token counts are made up.
Between wires litellm
translates: from messages to an OpenAI model it asks on the responses wire with `strict` false, and
from chat to an Anthropic model it sends `output_format`, the name that `output_config.format` had
in beta. `transformers serve` takes a schema and ignores it, streams responses unless `stream` is
false (the SDK hands out the stream as a string), and knows no messages.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.model_server import ModelServer, example
from turnwise.judges.models.model import ModelError, Prompt, Reply, make_model
from turnwise.learning import build_policy

QUESTION = "Which is better?"
SAID = {"rationale": "short and right", "winner": "B"}
SCHEMA = {
    "type": "object",
    "properties": {
        "rationale": {"type": "string"},
        "winner": {"type": "string", "enum": ["A", "B", "tie"]},
    },
    "required": ["rationale", "winner"],
    "additionalProperties": False,
}
KEY = "sk-loopback"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def running(command: Sequence[str], ready: str, log: Path, **env: str) -> Iterator[float]:
    """Runs a server until the block ends; gives the seconds until it was ready."""
    begin = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env}
        )
    try:
        while True:
            try:
                urllib.request.urlopen(ready, timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() - begin > 120:
                    raise SystemExit(
                        f"{command[0]} did not start:\n{log.read_text()[-2000:]}"
                    ) from None
                time.sleep(0.1)
        yield time.monotonic() - begin
    finally:
        process.terminate()
        process.wait(20)


def questions(url: str, model: str) -> Iterator[tuple[str, Any]]:
    """The question on every wire: its name, and the reply or the exception."""
    options: dict[str, Any] = {"api_key": KEY, "max_retries": 0, "timeout": 60.0}
    a, o = (
        anthropic.Anthropic(base_url=url, **options),
        openai.OpenAI(base_url=f"{url}/v1", **options),
    )
    turn: Any = {"role": "user", "content": QUESTION}
    named: Any = {"name": "verdict", "strict": True, "schema": SCHEMA}
    output: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    form: Any = {"type": "json_schema", "json_schema": named}
    text: Any = {"format": {"type": "json_schema", **named}}
    asks = {
        "messages": lambda: a.messages.create(
            model=model, max_tokens=64, messages=[turn], output_config=output
        ),
        "chat": lambda: o.chat.completions.create(
            model=model, max_tokens=64, messages=[turn], response_format=form
        ),
        "responses": lambda: o.responses.create(
            model=model, max_output_tokens=64, input=[turn], text=text
        ),
        "responses, no stream": lambda: o.responses.create(
            model=model, max_output_tokens=64, input=[turn], text=text, stream=False
        ),
    }
    for wire, ask in asks.items():
        try:
            yield wire, ask()
        except (anthropic.APIError, openai.APIError) as error:
            yield wire, error
    prompt = Prompt("You are a judge.", QUESTION, SCHEMA, max_tokens=64)
    for provider, where in (
        ("anthropic", url),
        ("openai-chat", f"{url}/v1"),
        ("openai", f"{url}/v1"),
    ):
        ours = make_model({"provider": provider, "model": model, "url": where, "api_key": KEY})
        try:
            yield f"judges, {provider}", asyncio.run(ours.ask(prompt))
        except ModelError as error:
            yield f"judges, {provider}", error


def row(wire: str, reply: Any) -> tuple[str, str, str]:
    """What came: the type, whether the answer fits the schema, the tokens."""
    if isinstance(reply, ModelError):
        return f"ModelError {reply.kind} {reply.status or ''}".strip(), "-", "-"
    if isinstance(reply, Exception):
        return f"{type(reply).__name__} {getattr(reply, 'status_code', '')}".strip(), "-", "-"
    if isinstance(reply, str):
        return f"str: {reply[:16]!r}...", "-", "-"
    if isinstance(reply, Reply):
        text, used = (
            reply.text,
            (reply.usage.fresh + reply.usage.read + reply.usage.written, reply.usage.output),
        )
    elif wire == "messages":
        text, used = reply.content[0].text, (reply.usage.input_tokens, reply.usage.output_tokens)
    elif wire == "chat":
        text, used = (
            reply.choices[0].message.content,
            (reply.usage.prompt_tokens, reply.usage.completion_tokens),
        )
    else:
        text, used = reply.output_text, (reply.usage.input_tokens, reply.usage.output_tokens)
    try:
        said = json.loads(text)
        fits = set(said) == set(SCHEMA["required"]) and said["winner"] in ("A", "B", "tie")
    except (ValueError, TypeError):
        fits = False
    kind = f"Reply, {reply.stop}" if isinstance(reply, Reply) else type(reply).__name__
    return kind, "yes" if fits else "no", f"{used[0]}/{used[1]}"


def aimock(prefix: Path, folder: Path) -> Iterator[tuple[str, ...]]:
    fixtures = folder / "fixtures.json"
    fixtures.write_text(
        json.dumps(
            {
                "fixtures": [
                    {"match": {"userMessage": QUESTION}, "response": {"content": json.dumps(SAID)}}
                ]
            }
        )
    )
    port, program = free_port(), prefix / "node_modules/@copilotkit/aimock/dist/cli.js"
    url = f"http://127.0.0.1:{port}"
    with running(
        ["node", str(program), "-p", str(port), "-f", str(fixtures)],
        f"{url}/v1/models",
        folder / "log",
    ) as seconds:
        for wire, reply in questions(url, "gpt-4o"):
            yield "aimock", f"{seconds:.1f}", wire, *row(wire, reply), "-"


def litellm(command: str, folder: Path) -> Iterator[tuple[str, ...]]:
    config = folder / "litellm.yaml"
    with ModelServer(example) as upstream:
        routes = {
            "to anthropic": {
                "model": "anthropic/claude-haiku-4-5",
                "api_base": upstream.url,
                "api_key": "x",
            },
            "to openai": {
                "model": "openai/gpt-4o",
                "api_base": f"{upstream.url}/v1",
                "api_key": "x",
            },
            "canned": {"model": "openai/gpt-4o", "api_key": "x", "mock_response": json.dumps(SAID)},
        }
        config.write_text(
            json.dumps(
                {"model_list": [{"model_name": n, "litellm_params": p} for n, p in routes.items()]}
            )
        )
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        start = [
            *shlex.split(command),
            "--config",
            str(config),
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
        ]
        # the price list from the package, not from the network
        env = {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        with running(start, f"{url}/health/liveliness", folder / "log", **env) as seconds:
            for route in routes:
                before = len(upstream.requests)
                for wire, reply in questions(url, route):
                    seen = [r.asked for r in upstream.requests[before:] if r.asked is not None]
                    before = len(upstream.requests)
                    kept = [
                        f"{'as asked' if asked.schema == SCHEMA else 'lost'}, {asked.wire}"
                        for asked in seen
                    ]
                    yield (
                        f"litellm, {route}",
                        f"{seconds:.1f}",
                        wire,
                        *row(wire, reply),
                        "; ".join(kept) or "-",
                    )


def transformers_serve(folder: Path) -> Iterator[tuple[str, ...]]:
    model = build_policy(folder / "tiny", [QUESTION] * 4)
    (folder / "hub").mkdir()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    program = str(Path(sys.executable).with_name("transformers"))
    start = [
        program,
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        str(model),
    ]
    with running(
        start, f"{url}/health", folder / "log", HF_HUB_CACHE=str(folder / "hub"), HF_HUB_OFFLINE="1"
    ) as seconds:
        for wire, reply in questions(url, str(model)):
            yield "transformers serve", f"{seconds:.1f}", wire, *row(wire, reply), "-"


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--aimock", type=Path, help="the npm prefix that aimock is installed in")
    options.add_argument("--litellm", help="the command that starts litellm's proxy")
    given = options.parse_args()
    rows: list[tuple[str, ...]] = [
        ("server", "start s", "wire", "the SDK gives", "fits", "tokens", "schema upstream")
    ]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)  # a server may run as somebody else
        folders = iter(root / str(n) for n in range(3))
        for make in (
            given.aimock and (lambda f: aimock(given.aimock, f)),
            given.litellm and (lambda f: litellm(given.litellm, f)),
            transformers_serve,
        ):
            if make:
                folder = next(folders)
                folder.mkdir(mode=0o755)
                rows += make(folder)
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for r in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
