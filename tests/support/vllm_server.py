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
import os
import sys
import threading
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from transformers import AutoModelForCausalLM

# Those of SamplingParams that the server below heeds, with the values they may have.
KNOWN = {
    "n": {1}, "temperature": None, "top_p": {1.0}, "top_k": {0, -1}, "min_p": {0.0},
    "repetition_penalty": {1.0}, "presence_penalty": {0.0}, "frequency_penalty": {0.0},
    "seed": None, "max_tokens": None, "ignore_eos": None, "stop_token_ids": None,
    "logprobs": {0, 1}, "detokenize": None,
}  # fmt: skip


class Engine:
    """The model, its prefix cache, and what was asked of it."""

    def __init__(self, folder: str, mode: str, sleeps: bool) -> None:
        self.mode, self.can_sleep = mode, sleeps
        self.version, self.asleep, self.paused, self.running = "default", False, False, 0
        self.events: list[Any] = []
        self.prefixes: dict[tuple[int, ...], torch.Tensor] = {}
        self.lock = threading.Lock()
        self.load(folder)

    def load(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

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
        with self.lock:
            for _ in range(given.get("max_tokens", 16)):
                if self.paused:
                    reason = "abort"
                    break
                logits = self._logits(tuple(ids), out)
                temperature = given.get("temperature", 1.0)
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
        return self.prefixes[prompt]


def app_of(engine: Engine, dev: bool, key: str | None, longest: int) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def note(request: Request, call: Any) -> Any:
        path = request.url.path
        told = request.headers.get("authorization")
        if key and path.startswith("/inference") and told != f"Bearer {key}":
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        if not path.startswith("/__") and path != "/health":
            request.state.event = [path, dict(request.query_params)]
            engine.events.append(request.state.event)
        return await call(request)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/__events")
    async def events() -> Any:
        return engine.events

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
        if wrong or len(ids) + given.get("max_tokens", 16) > longest:
            return JSONResponse({"error": {"message": f"bad {wrong or 'length'}", "code": 400}},
                                status_code=400)  # fmt: skip
        if engine.asleep:
            return JSONResponse({"error": {"message": "asleep", "code": 500}}, status_code=500)
        if engine.paused:
            return JSONResponse({"error": {"message": "paused", "code": 503}}, status_code=503)
        engine.running += 1
        request.state.event.append(engine.version)
        try:
            choice = await asyncio.to_thread(engine.generate, ids, given)
        finally:
            engine.running -= 1
        return {"request_id": "generate-tokens-1", "model": "m", "created": 0, "usage": None,
                "output_mode": "tokens", "choices": [choice]}  # fmt: skip

    if not dev:
        return app

    @app.post("/pause")
    async def pause(mode: str = "abort") -> Any:
        assert mode == "abort"
        engine.paused = True
        while engine.running:
            await asyncio.sleep(0.01)
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
        assert engine.paused
        engine.load(body["kwargs"]["weights_path"])
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

    @app.post("/wake_up")
    async def wake() -> Any:
        engine.asleep = False
        return {"status": "awake", "tags": None}

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["serve"])
    parser.add_argument("folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--logprobs-mode", default="raw_logprobs")
    parser.add_argument("--enable-sleep-mode", action="store_true")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=10**6)
    parser.add_argument("--api-key")
    given = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine(given.folder, given.logprobs_mode, given.enable_sleep_mode)
    dev = os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
    app = app_of(engine, dev, given.api_key or os.environ.get("VLLM_API_KEY"), given.max_model_len)
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    sys.exit(main())
