"""What a run saves for others: a card that its own records hold, and the way to the hub."""

from __future__ import annotations

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import transformers
import turnwise
from support.echo import ECHO
from turnwise.engine.pipeline.card import model_card

RL = {
    "env": ECHO, "updates": 3, "groups": 2, "group_size": 2, "max_new_tokens": 4,
    "feedback": ["environment", {"judge": "length", "max_words": 3, "weight": 0.5}],
    "optimizer": {"name": "grpo", "lr": 1e-3}, "credit": "outcome",
}  # fmt: skip
EVALUATE = {"env": ECHO, "episodes": 4, "max_new_tokens": 4}


@pytest.fixture
def run(model_folder: Callable[..., Path], tmp_path: Path) -> turnwise.Run:
    return turnwise.Run(
        {"policy": {"model": str(model_folder()), "lora": {"r": 4}},
            "stages": [{"rl": RL}, {"evaluate": EVALUATE}], "threads": 1, "name": "echoes"},
        folder=tmp_path / "run",
    ).finish()  # fmt: skip


def card_of(folder: Path) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard((folder / "README.md").read_text())


def test_a_policy_is_saved_with_a_card_that_the_run_holds(
    run: turnwise.Run, tmp_path: Path
) -> None:
    card = card_of(run.folder / "policy")
    header = card.data.to_dict()
    assert header["library_name"] == "peft"
    assert "base_model" not in header, "a folder of this machine is no model of the hub"
    assert {"turnwise", "rl", "evaluate", "grpo"} <= set(header["tags"])
    assert header["pipeline_tag"] == "text-generation"
    assert f"| rl | {ECHO} | environment, length | grpo, outcome, 3 updates |" in card.text
    for line in run.metrics[:3]:
        assert f"| {line['update']} | {line['outcome']:.3f} | {line['success']:.3f} |" in card.text
    assert f"| policy | {run.metrics[3]['policy/success']:.3f} |" in card.text
    assert "Replies were cut at 4 tokens." in card.text
    assert "lora:" in card.text, "the config is quoted"
    run.policy.save_pretrained(tmp_path / "merged", merge=True)
    plain = card_of(tmp_path / "merged")
    assert plain.data.to_dict()["library_name"] == "transformers"
    assert 'pipeline("text-generation"' in plain.text
    said = transformers.pipeline("text-generation", str(tmp_path / "merged"))(
        [{"role": "user", "content": "hello"}], max_new_tokens=3
    )
    assert said[0]["generated_text"][-1]["role"] == "assistant"


def test_without_evaluation_the_card_says_so(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    only = {**RL, "updates": 1, "feedback": ["environment"]}
    done = turnwise.Run(
        {
            "policy": str(model_folder()),
            "stages": [{"repeat": {"times": 2, "stages": [{"rl": only}]}}],
        },
        folder=tmp_path / "run",
    ).finish()
    text = (done.folder / "policy" / "README.md").read_text()
    assert "No held-out evaluation was part of the run." in text
    assert "## On held-out starts" not in text
    assert f"| rl | {ECHO} | environment |" in text


def test_the_card_names_judges_however_they_are_given() -> None:
    def trained(**options: Any) -> str:
        config = {"policy": {"model": "me/base"}, "stages": [{"rl": {"env": ECHO, **options}}]}
        text = model_card("x", config, [], adapters=False)
        return next(line for line in text.splitlines() if line.startswith("| rl |"))

    assert f"| {ECHO} | environment |" in trained()
    assert "| reward-model |" in trained(feedback="reward-model")
    assert "| length |" in trained(feedback={"judge": "length", "weight": 0.1})
    assert "| Polite |" in trained(feedback=["<__main__.Polite object at 0x7f3b5c0d2e10>"])
    mixed = [{"id": ECHO, "feedback": ["rubric"]}, {"id": "other/Env-v0"}]
    assert "| test/Echo-v0, other/Env-v0 | rubric, environment |" in trained(env=mixed)


def test_the_base_is_named_where_others_can_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def header(model: Any) -> dict[str, Any]:
        card = model_card("x", {"policy": model, "stages": []}, [], adapters=False)
        return dict(huggingface_hub.ModelCard(card).data.to_dict())

    assert header({"model": "me/base"})["base_model"] == "me/base"
    assert header({"model": "smollm2-135m"})["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert header({"model": "smollm2-135m"})["license"] == "apache-2.0"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    for model in ({"model": "runs/base"}, {"model": "/x/y"}, "<Policy object at 0x7f3b5c0d2e10>"):
        assert "base_model" not in header(model)


def test_secrets_stay_out_of_the_card(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_API_KEY", "sk-verysecret-0123456789")
    env = {"id": ECHO, "options": {"api_key": "sk-verysecret-0123456789"}}
    done = turnwise.Run(
        {"policy": str(model_folder()), "stages": [{"rl": {**RL, "env": env, "updates": 1}}]},
        folder=tmp_path / "run",
    ).finish()
    assert "verysecret" not in (done.folder / "policy" / "README.md").read_text()


class Hub(http.server.BaseHTTPRequestHandler):
    """Takes what `upload_folder` sends: a repository, and files in one commit."""

    made: ClassVar[list[dict[str, Any]]]
    files: ClassVar[dict[str, bytes]]
    token = "hf_right"

    def do_GET(self) -> None:
        self.answer({"id": "me/echoes", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path.endswith("/repos/create"):
            self.made.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/me/echoes"})
        elif self.path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [f["path"] for f in json.loads(body)["files"]]
            self.answer(
                {
                    "files": [
                        {"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                }
            )
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/me/echoes/commit/{'0' * 40}"
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


SCRIPT = """
import os, sys, turnwise
policy = turnwise.Policy.from_pretrained(sys.argv[1])
policy.card = lambda adapters: "---\\nlibrary_name: transformers\\n---\\n"
from turnwise.engine.policy.hub import push
for token in ("hf_wrong", "hf_right"):
    os.environ["HF_TOKEN"] = token
    try:
        print(push(policy, "me/echoes", private=True), end="|")
    except turnwise.PolicyError as error:
        print(error, end="|")
"""


def test_a_policy_is_put_on_the_hub(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    handler = type("Handler", (Hub,), {"made": [], "files": {}})

    def pushed() -> list[str]:
        environment = {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(model_folder())],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split("|")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        refused, address, _ = pushed()
        server.shutdown()
    assert "cannot be put on the hub as 'me/echoes'" in refused
    assert "hf auth login" in refused
    assert "/me/echoes" in address
    assert handler.made[0]["name"] == "echoes"
    assert "private" in str(handler.made[0])
    there = tmp_path / "there"
    there.mkdir()
    for name, content in handler.files.items():
        (there / name).write_bytes(content)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(handler.files)
    assert card_of(there).data.to_dict()["library_name"] == "transformers"
    assert turnwise.Policy.from_pretrained(there).context_length == 256


def test_what_cannot_be_pushed(run: turnwise.Run) -> None:
    with pytest.raises(turnwise.PolicyError, match="cannot be put on the hub as 'me/echoes'"):
        run.push_to_hub("me/echoes", merge=True)  # no hub is asked here
    with pytest.raises(turnwise.PolicyError, match="which others lack: put them on the hub wi"):
        run.push_to_hub("me/echoes")
    again = turnwise.Run(run.config, folder=run.folder, resume=True)
    with pytest.raises(turnwise.ConfigError, match="play the run first"):
        again.push_to_hub("me/echoes", merge=True)
