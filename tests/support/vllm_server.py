"""A server that speaks vLLM 0.33's interfaces, as far as a trainer uses them, with a real model.

Paths, fields and their checks are those of vllm 0.33.0: `entrypoints/scale_out/token_in_token_out`
(`/inference/v1/generate`), `entrypoints/rl/online` and `entrypoints/serve/dev`, which are there
with VLLM_SERVER_DEV_MODE=1 alone. What a prompt begins with is kept, as its prefix cache keeps it:
after other weights were loaded and the cache was not reset, the first token's logits are those of
the old ones. `GET /__events` says what was asked, in order.

    VLLM_SERVER_DEV_MODE=1 python tests/support/vllm_server.py serve FOLDER --port 8000 \
        --logprobs-mode processed_logprobs --enable-sleep-mode
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from transformers import AutoModelForCausalLM

# Those of SamplingParams that the server below heeds, with the values they may have.
KNOWN = {
    "n": {1}, "temperature": None, "top_p": {1.0}, "top_k": {0, -1}, "min_p": {0.0},
    "repetition_penalty": {1.0}, "presence_penalty": {0.0}, "frequency_penalty": {0.0},
    "seed": None, "max_tokens": None, "ignore_eos": None, "stop_token_ids": None,
    "logprobs": {0, 1}, "detokenize": None, "logit_bias": None,
}  # fmt: skip
NEGATED = {"enable-prefix-caching"}  # options that have a --no- of their own


class Engine:
    """The model, its prefix cache, and what was asked of it."""

    def __init__(self, folder: str, mode: str, sleeps: bool, longest: int | None) -> None:
        self.mode, self.can_sleep, self.given = mode, sleeps, longest
        self.version, self.asleep, self.paused, self.running = "default", False, False, 0
        self.events: list[Any] = []
        self.options: dict[str, Any] = {}
        self.delay = 0.0  # seconds before a reply is begun
        self.prefixes: dict[tuple[int, ...], torch.Tensor] = {}
        self.lock = threading.Lock()
        self.load(folder)

    def load(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.longest = self.given or self.model.config.max_position_embeddings

    @torch.no_grad()
    def generate(self, ids: list[int], given: dict[str, Any]) -> dict[str, Any]:
        """Returns a choice, its tokens drawn one after the other."""
        config = self.model.generation_config
        eos = config.eos_token_id if not given.get("ignore_eos") else None
        eos = eos if isinstance(eos, list) else [eos]
        stops = {*(given.get("stop_token_ids") or ()), *eos}
        draw = torch.Generator().manual_seed(given["seed"]) if "seed" in given else None
        out: list[int] = []
        content = []
        reason, why = "length", None
        most = min(given.get("max_tokens", 16), self.longest - len(ids))
        with self.lock:
            for _ in range(most):
                if self.paused:
                    reason = "abort"
                    break
                logits = self._logits(tuple(ids), out)
                temperature = given.get("temperature", 1.0)
                for i, bias in (given.get("logit_bias") or {}).items():
                    logits[int(i)] += min(100.0, max(-100.0, bias))
                scaled = logits / (temperature or 1.0)
                chosen = scaled.softmax(-1)
                token = int(torch.multinomial(chosen, 1, generator=draw) if temperature
                            else logits.argmax())  # fmt: skip
                said = scaled if self.mode == "processed_logprobs" else logits
                logprob = max(float(said.log_softmax(-1)[token]), -9999.0)
                one = {"token_id": token, "logprob": logprob, "rank": 1}
                content.append({**one, "top_logprobs": [one]})
                out.append(token)
                if token in stops:
                    reason, why = "stop", token
                    break
        return {
            "index": 0, "finish_reason": reason, "stop_reason": why, "token_ids": out,
            "routed_experts": None, "sampling_mask": None,
            "weight_versions": [{"version": self.version, "start": 0, "end": len(out)}],
            "logprobs": {"content": content} if given.get("logprobs") is not None else None,
        }  # fmt: skip

    def _logits(self, prompt: tuple[int, ...], out: list[int]) -> torch.Tensor:
        if out:
            return self.model(torch.tensor([[*prompt, *out]])).logits[0, -1].float()
        if prompt not in self.prefixes:
            self.prefixes[prompt] = self.model(torch.tensor([prompt])).logits[0, -1].float()
        return self.prefixes[prompt].clone()


def app_of(engine: Engine, dev: bool, key: str | None) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def note(request: Request, call: Any) -> Any:
        path = request.url.path
        told = request.headers.get("authorization")
        if key and path.startswith(("/inference", "/v1")) and told != f"Bearer {key}":
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        if request.method == "POST" and not path.startswith("/__"):
            request.state.event = [path, dict(request.query_params)]
            engine.events.append(request.state.event)
        return await call(request)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": "m", "max_model_len": engine.longest}]}

    @app.get("/__events")
    async def events() -> Any:
        return engine.events

    @app.get("/__options")
    async def options() -> Any:
        return engine.options

    @app.post("/__delay")
    async def delay(seconds: float) -> Any:
        engine.delay = seconds
        return {}

    @app.post("/__mode")
    async def mode(name: str) -> Any:
        engine.mode = name
        return {}

    @app.post("/__restart")
    async def restart() -> Any:
        """As if the process had been started again."""
        engine.version, engine.asleep, engine.paused = "default", False, False
        engine.prefixes.clear()
        return {}

    @app.post("/__forget")
    async def forget() -> Any:
        engine.events.clear()
        return {}

    @app.post("/inference/v1/generate")
    async def generate(request: Request) -> Any:
        body = await request.json()
        ids, given = body.get("token_ids"), body.get("sampling_params")
        wrong = (
            "token_ids" if not ids or any(i < 0 for i in ids)
            else "sampling_params" if not isinstance(given, dict)
            else next((k for k, v in given.items()
                       if k not in KNOWN or (KNOWN[k] and v not in KNOWN[k])), "")
        )  # fmt: skip
        size = engine.model.config.vocab_size
        if not wrong and any(int(i) >= size for i in given.get("logit_bias") or ()):
            wrong = "logit_bias"
        if wrong or len(ids) >= engine.longest or given.get("max_tokens", 16) < 1:
            return JSONResponse({"error": {"message": f"bad {wrong or 'length'}", "code": 400}},
                                status_code=400)  # fmt: skip
        if engine.asleep:
            return JSONResponse({"error": {"message": "asleep", "code": 500}}, status_code=500)
        if engine.paused:
            return JSONResponse({"error": {"message": "paused", "code": 503}}, status_code=503)
        engine.running += 1
        request.state.event.append(engine.version)
        try:
            await asyncio.sleep(engine.delay)
            choice = await asyncio.to_thread(engine.generate, ids, given)
        finally:
            engine.running -= 1
        return {"request_id": "generate-tokens-1", "model": "m", "created": 0, "usage": None,
                "output_mode": "tokens", "choices": [choice]}  # fmt: skip

    if not dev:
        return app

    @app.post("/pause")
    async def pause(mode: str = "abort", clear_cache: bool = True) -> Any:
        assert mode == "abort"
        engine.paused = True
        while engine.running:
            await asyncio.sleep(0.01)
        if clear_cache:
            engine.prefixes.clear()
        return {"status": "paused"}

    @app.post("/resume")
    async def resume() -> Any:
        engine.paused = False
        return {"status": "resumed"}

    @app.post("/collective_rpc")
    async def rpc(request: Request) -> Any:
        body = await request.json()
        if body.get("method") != "reload_weights":
            return JSONResponse({"detail": f"no method {body.get('method')}"}, status_code=500)
        if engine.asleep:  # its weights are not in memory
            return JSONResponse({"detail": "asleep"}, status_code=500)
        assert engine.paused
        try:
            engine.load(body["kwargs"]["weights_path"])
        except OSError as error:
            return JSONResponse({"detail": str(error)}, status_code=500)
        return {"results": [None]}

    @app.post("/reset_prefix_cache")
    async def reset() -> Any:
        if not engine.running:
            engine.prefixes.clear()
        return {"success": not engine.running}

    @app.post("/update_weight_version")
    async def version(request: Request) -> Any:
        engine.version = (await request.json())["new_version"]
        return {"success": True, "new_version": engine.version}

    @app.post("/sleep")
    async def sleep(level: int = 1) -> Any:
        assert engine.can_sleep
        engine.asleep = True
        engine.prefixes.clear()
        return {"status": "sleeping", "level": level}

    @app.get("/is_sleeping")
    async def is_sleeping() -> Any:
        return {"is_sleeping": engine.asleep}

    @app.post("/wake_up")
    async def wake() -> Any:
        engine.asleep = False
        return {"status": "awake", "tags": None}

    return app


def _with_config(arguments: list[str]) -> list[str]:
    """Returns the arguments with those of a `--config` file before them, as vLLM's parser does."""
    if "--config" not in arguments:
        return arguments
    at = arguments.index("--config")
    found: list[str] = []
    for key, value in yaml.safe_load(Path(arguments[at + 1]).read_text()).items():
        if isinstance(value, bool):
            found += [f"--{key}"] if value else [f"--no-{key}"] if key in NEGATED else []
        elif isinstance(value, list):
            found += [f"--{key}", *map(str, value)]
        else:
            found += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return [*arguments[:2], *found, *arguments[2:at], *arguments[at + 2 :]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["serve"])
    parser.add_argument("folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--logprobs-mode", default="raw_logprobs")
    parser.add_argument("--enable-sleep-mode", action="store_true")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--compilation-config", type=json.loads)
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    parser.add_argument("--api-key")
    given = parser.parse_args(_with_config(sys.argv[1:]))
    torch.set_num_threads(1)
    # What vLLM calls EngineCore: a process that holds the GPU, and ends when it is told to.
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1e6) # EngineCore"],
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                     stderr=subprocess.DEVNULL)  # fmt: skip
    engine = Engine(given.folder, given.logprobs_mode, given.enable_sleep_mode, given.max_model_len)
    engine.options = vars(given)
    dev = os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
    app = app_of(engine, dev, given.api_key or os.environ.get("VLLM_API_KEY"))
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    sys.exit(main())
