"""Promise 6: secrets never reach a config dump, a log, a report or a ledger; nothing is unpickled
from outside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import turnwise
from turnwise.engine.util.secrets import redact, redacted

KEY = "sk-proj-abcdefghijklmnop1234567890"


class Leaky(turnwise.Judge):
    """A judge whose failure quotes its key, as SDK errors do."""

    def __init__(self, api_key: str) -> None:
        self.api_key = api_key

    def score(self, episodes: object) -> list[turnwise.Feedback]:
        raise ConnectionError(
            f"401: incorrect API key provided: {self.api_key}; also Bearer {self.api_key} at"
            " http://me:pw12345@host/"
        )


@turnwise.hookimpl
def register_judges(register: Callable[..., None]) -> None:
    register("leaky", Leaky)


def test_a_run_leaves_no_secret_behind(
    tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_API_KEY", "plainlookingvalue42")
    odd = "plainlookingvalue42"  # looks like nothing; known from the environment only
    import sys

    run = turnwise.Run(
        {
            "policy": str(model_folder()),
            "threads": 1,
            "stages": [
                {"rl": {
                    "env": "test/Echo-v0", "updates": 1, "groups": 2, "group_size": 2,
                    "max_new_tokens": 4, "max_failure_rate": 1.0,
                    "feedback": [
                        {"judge": "leaky", "api_key": KEY, "weight": 1.0},
                        {"judge": "leaky", "name": "second", "api_key": odd, "weight": 1.0},
                    ],
                }}
            ],
        },
        folder=tmp_path / "run",
        plugins=turnwise.Plugins({"here": sys.modules[__name__]}),
    )  # fmt: skip
    run.finish()
    said = run.ledger.feedback([e.group for e in run.ledger.run_episodes(run.id)])
    assert {f.status for f in said} == {"failed"}
    assert all("401: incorrect API key provided: ***" in f.reason for f in said)
    texts = [e.reason for e in run.ledger.run_episodes(run.id)] + [
        m.reason for m in run.ledger.members(run.id)
    ]
    texts += [repr(f) for f in said]
    assert not any(secret in text for text in texts for secret in (KEY, odd, "pw12345"))
    run.ledger.close()
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {"config.yaml", "ledger.sqlite", "metrics.jsonl"} <= {p.name for p in files}
    for path in files:
        for secret in (KEY, odd, "pw12345"):
            assert secret.encode() not in path.read_bytes(), f"{path.name} holds a secret"


def test_an_environments_failure_leaves_no_secret_behind() -> None:
    """Episodes are stored compressed, so a look at the bytes would prove nothing: read them
    back."""
    import gymnasium

    class Leaks(gymnasium.Env):
        observation_space = action_space = turnwise.Text(100)

        def reset(self, **_: object) -> object:
            raise ConnectionError(f"401 bad key {KEY}")

    gymnasium.register("test/Leaks-v0", Leaks)
    [episode] = turnwise.rollout(
        turnwise.ScriptPlayer(lambda said: "hi"), [(turnwise.starts("test/Leaks-v0", 1, 1)[0], 0)]
    )
    assert "401 bad key ***" in episode.reason
    assert KEY not in repr(episode)


def test_what_is_hidden_and_what_is_not() -> None:
    shown = redacted(
        {
            "api_key": "abc",
            "max_new_tokens": 5,
            "nested": [{"hf_token": "x"}],
            "url": "postgresql://u:pw@h/db",
            "judge": Leaky(KEY),
        }
    )
    assert shown["api_key"] == "***"
    assert shown["max_new_tokens"] == 5
    assert shown["nested"] == [{"hf_token": "***"}]
    assert shown["url"] == "postgresql://***@h/db"
    assert shown["judge"].endswith("Leaky>")
    assert redact(f"use {KEY} now") == "use *** now"
    assert redact("the monkey and the tokens stay") == "the monkey and the tokens stay"


def test_pickled_weights_are_not_loaded(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    """A folder with a pickle instead of safetensors: refused, and the pickle is never opened."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder)
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "exploded",))  # type: ignore[return-value]

    torch.save({"x": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(turnwise.PolicyError):
        turnwise.Policy.from_pretrained(folder)
    assert not (tmp_path / "exploded").exists()
