"""Replies sampled by a vLLM server: the server of tests/support, exact to vLLM's source, and the
real one where it is installed (`slow`)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import turnwise
from turnwise.engine.records.sampling import Conversation
from turnwise.plugins.backends import ray, vllm
from turnwise.running import Where

DESK = "turnwise/SupportDesk-v0"
SERVER = Path(__file__).parent / "support" / "vllm_server.py"
WHERE = Where("run", "rl", 1, 3)


class Served:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *options: str, dev: bool = True, key: str = "") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        env = {**os.environ, "VLLM_SERVER_DEV_MODE": str(int(dev)), "VLLM_API_KEY": key}
        command = [sys.executable, str(SERVER), "serve", str(folder), "--port", str(port), *options]
        self.process = subprocess.Popen(command, env=env, start_new_session=True)
        until = time.monotonic() + 120
        while True:
            try:
                self.get("health")
                return
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.1)

    def kill(self) -> None:
        """Ends it, with what it has started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}/{path}") as answer:
            return bytes(answer.read())

    def post(self, path: str) -> None:
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{path}", method="POST"))

    def events(self) -> list[Any]:
        return list(json.loads(self.get("__events")))


SENT = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume",
        "/inference/v1/generate"]  # fmt: skip
PROCESSED = ("--logprobs-mode", "processed_logprobs", "--enable-sleep-mode")


@pytest.fixture(scope="module")
def usual(model_folder: Callable[..., Path]) -> Iterator[Served]:
    server = Served(model_folder(), *PROCESSED)
    yield server
    server.kill()


@pytest.fixture
def serve(usual: Served, model_folder: Callable[..., Path]) -> Iterator[Callable[..., Served]]:
    """Starts servers; the usual one, which speaks of what was sampled from, serves many tests."""
    made: list[Served] = []

    def make(*options: str, **more: Any) -> Served:
        if options == PROCESSED and not more:
            for path in ("__mode?name=processed_logprobs", "__restart", "__forget"):
                usual.post(path)
            return usual
        made.append(Served(model_folder(), *options, **more))
        return made[-1]

    yield make
    for each in made:
        each.kill()
    vllm._servers.clear()


@pytest.fixture
def policy(model_folder: Callable[..., Path]) -> turnwise.Policy:
    return turnwise.Policy.from_pretrained(model_folder(), device="cpu")


def moved(policy: turnwise.Policy) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    policy.version += 1


def played(policy: turnwise.Policy, backend: Any, **options: Any) -> list[turnwise.Episode]:
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(0.7, 8), backend)
    chosen = [(s, slot) for s in turnwise.starts(DESK, 5, 3) for slot in range(2)]
    return turnwise.rollout(player, chosen, WHERE, **options)


def own_logprobs(policy: turnwise.Policy, episode: turnwise.Episode) -> list[float]:
    """What the model itself says, in one plain pass over a conversation."""
    ids = [i for t in episode.turns for i in (*t.prompt_ids, *(t.action_ids or ()))]
    with torch.no_grad():
        logits = policy.model(torch.tensor([ids])).logits[0].float() / 0.7
    at, found = 0, []
    for turn in episode.turns:
        at += len(turn.prompt_ids)
        for token in turn.action_ids or ():
            found.append(float(logits[at - 1].log_softmax(-1)[token]))
            at += 1
    return found


def test_a_server_samples_the_policy_of_now(
    serve: Callable[..., Served], policy: turnwise.Policy
) -> None:
    """Ids in and out; log-probs are the policy's; each version is sent once, and its prefixes are
    forgotten before anything is sampled with it."""
    server = serve(*PROCESSED)
    backend = vllm.VLLM(policy, url=server.url, tolerance=1e-4)
    first = []
    for version in range(3):
        episodes = played(policy, backend)
        assert {e.ending for e in episodes} <= {"terminated", "truncated"}
        for episode in episodes:
            said = [p for t in episode.turns for p in t.logprobs or ()]
            assert said == pytest.approx(own_logprobs(policy, episode), abs=1e-4)
            assert {t.policy_version for t in episode.turns} == {version}
        first.append([t.action_ids for t in episodes[0].turns])
        backend.refresh()
        moved(policy)
    assert len({str(ids) for ids in first}) == 3
    events, names = server.events(), list[str]()
    for i, (path, *_) in enumerate(events):
        if path == "/collective_rpc":
            assert [each[0] for each in events[i - 1 : i + 5]] == SENT
            names.append(events[i + 4][2])
    assert len(set(names)) == len(names) == 3
    used = [each[2] for each in events if each[0] == "/inference/v1/generate"]
    assert sorted(set(used), key=used.index) == names


def test_the_same_seeds_give_the_same_replies(
    serve: Callable[..., Served], policy: turnwise.Policy
) -> None:
    server = serve(*PROCESSED)
    one, two = (
        [[t.action_ids for t in e.turns] for e in played(policy, vllm.VLLM(policy, server.url))]
        for _ in range(2)
    )
    assert one == two
    assert len({str(each) for each in one}) == len(one)


def test_a_run_learns_through_a_server(
    serve: Callable[..., Served], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """GRPO with adapters, which are sent merged; the weights that importance is measured by are
    those of rounding."""
    server = serve(*PROCESSED)
    rl = {"env": DESK, "updates": 3, "groups": 2, "group_size": 3, "max_new_tokens": 6,
          "feedback": [{"judge": "length", "min_words": 6}], "optimizer": {"lr": 1e-2},
          "backend": {"name": "vllm", "url": server.url, "tolerance": 1e-4}}  # fmt: skip
    config = {"policy": {"model": str(model_folder()), "lora": {"r": 4}}, "threads": 1,
              "stages": [{"rl": rl}]}  # fmt: skip
    run = turnwise.Run(config, folder=tmp_path / "run").finish()
    assert len(run.metrics) == 3
    assert all(m["weight_off_one"] < 1e-3 and m["steps"] == 1 for m in run.metrics)
    sent = [path for path, *_ in server.events()]
    assert sent.count("/collective_rpc") == 3
    assert "/sleep" not in sent  # another's server


def test_wrong_logprobs_are_caught(serve: Callable[..., Served], policy: turnwise.Policy) -> None:
    """A server that says the log-probs of temperature 1; and one that begins to do so."""
    server = serve(*PROCESSED)
    server.post("__mode?name=raw_logprobs")  # vLLM's default
    with pytest.raises(turnwise.ConfigError, match=r"a token from the policy's own; 0.01 is allow"):
        played(policy, vllm.VLLM(policy, url=server.url))
    server.post("__mode?name=processed_logprobs")
    backend = vllm.VLLM(policy, url=server.url)
    played(policy, backend)
    server.post("__mode?name=raw_logprobs")
    moved(policy)
    with pytest.warns(UserWarning, match="they agreed before"):
        played(policy, backend)
    narrow = vllm.VLLM(policy, url=server.url, tolerance=1e-4)
    server.post("__mode?name=processed_logprobs")
    played(policy, narrow)
    server.post("__mode?name=raw_logprobs")
    moved(policy)
    with pytest.raises(turnwise.ConfigError, match="the server may not have loaded these weights"):
        played(policy, narrow)


def test_a_round_of_few_replies_is_checked_too(
    serve: Callable[..., Served], policy: turnwise.Policy
) -> None:
    """Fewer than are scored: what there is decides before anything trains on it."""
    server = serve(*PROCESSED)
    server.post("__mode?name=raw_logprobs")
    backend = vllm.VLLM(policy, url=server.url)
    talk = Conversation(0, [1, 2, 3], seed=1)
    with pytest.raises(turnwise.ConfigError, match=r"a token from the policy's own"):
        list(backend.reply([talk], turnwise.Sampling(0.5, 6)))


def test_weights_that_change_unseen_by_torch_are_sent(
    serve: Callable[..., Served], policy: turnwise.Policy
) -> None:
    """Optimizers whose kernels write into memory, such as bitsandbytes' and AdamW's fused one,
    leave torch's version counters as they were."""
    backend = vllm.VLLM(policy, url=serve(*PROCESSED).url, tolerance=1e-4)
    played(policy, backend)
    for parameter in policy.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    policy.version += 1
    [said, own] = [
        torch.tensor(each)
        for episode in played(policy, backend)[:1]
        for each in ([p for t in episode.turns for p in t.logprobs or ()],
                     own_logprobs(policy, episode))
    ]  # fmt: skip
    assert torch.allclose(said, own, atol=1e-4)


def test_ids_that_are_no_tokens_are_never_sampled(
    serve: Callable[..., Served], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """A model whose vocabulary is padded, as many are, here to twice its size."""
    plain = turnwise.Policy.from_pretrained(model_folder(), device="cpu")
    tokens = len(plain.tokenizer)
    plain.model.resize_token_embeddings(2 * tokens, mean_resizing=False)
    plain.model.save_pretrained(str(tmp_path))
    plain.tokenizer.save_pretrained(str(tmp_path))
    padded = turnwise.Policy.from_pretrained(tmp_path, device="cpu")
    backend = vllm.VLLM(padded, url=serve(*PROCESSED).url, tolerance=1e-4)
    ids = [i for e in played(padded, backend) for t in e.turns for i in t.action_ids or ()]
    assert len(ids) > 100
    assert max(ids) < tokens


def test_a_server_that_reads_less_ends_conversations_there(
    serve: Callable[..., Served], policy: turnwise.Policy
) -> None:
    server = serve(*PROCESSED, "--max-model-len", "200")
    episodes = played(policy, vllm.VLLM(policy, url=server.url))
    assert policy.context_length == 200
    assert "context" in {e.reason for e in episodes}
    assert all(sum(len(t.prompt_ids) + len(t.action_ids or ()) for t in e.turns) <= 200
               for e in episodes)  # fmt: skip


def test_a_server_that_sleeps_is_woken(
    serve: Callable[..., Served], policy: turnwise.Policy
) -> None:
    """A run that ended let it sleep, and the next one finds it so."""
    server = serve(*PROCESSED)
    for _ in range(2):
        backend = vllm.VLLM(policy, url=server.url, sleep=True)
        played(policy, backend)
        backend.refresh()
        vllm._servers.clear()
    paths = [path for path, *_ in server.events() if path != "/inference/v1/generate"]
    assert paths == [*SENT[:5], "/sleep", "/wake_up", *SENT[:5], "/sleep"]


def test_processes_cannot_play_two_policies_by_one_server(
    serve: Callable[..., Served], policy: turnwise.Policy, model_folder: Callable[..., Path]
) -> None:
    server = serve(*PROCESSED)
    other = turnwise.Policy.from_pretrained(model_folder(), device="cpu")
    ours, theirs = (vllm.VLLM(each, url=server.url) for each in (policy, other))
    ours._several = theirs._several = True
    ours.refresh()
    theirs.refresh()
    assert played(other, theirs)
    with pytest.raises(turnwise.ConfigError, match="has the weights of another policy"):
        played(policy, ours)


def test_a_prefix_cache_that_is_not_reset_is_caught(
    serve: Callable[..., Served], policy: turnwise.Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server of the tests can be wrong in the way that the order of calls prevents."""
    server, post = serve(*PROCESSED), vllm.Server._post

    def forgetful(self: Any, path: str, **body: Any) -> Any:
        path += "&clear_cache=false" if path.startswith("pause") else ""  # deprecated, and goes
        return {"success": True} if path == "reset_prefix_cache" else post(self, path, **body)

    monkeypatch.setattr(vllm.Server, "_post", forgetful)
    backend = vllm.VLLM(policy, url=server.url, tolerance=1e-3)
    played(policy, backend)
    moved(policy)
    with pytest.raises(turnwise.ConfigError, match="They agreed before"):
        played(policy, backend)


def test_other_weights_are_never_taken_for_the_policys(
    serve: Callable[..., Served], policy: turnwise.Policy, model_folder: Callable[..., Path]
) -> None:
    """A server that was restarted has none of ours; two policies of a run take turns."""
    server = serve(*PROCESSED)
    backend = vllm.VLLM(policy, url=server.url)
    played(policy, backend)
    server.post("__restart")
    with pytest.raises(turnwise.ConfigError, match="sampled a reply with other weights"):
        played(policy, backend)
    vllm._servers.clear()
    other = turnwise.Policy.from_pretrained(model_folder(), device="cpu")
    moved(other)
    theirs = vllm.VLLM(other, url=server.url, tolerance=1e-4)
    for each, its in ((policy, backend), (other, theirs), (policy, backend)):
        for episode in played(each, its):
            said = [p for t in episode.turns for p in t.logprobs or ()]
            assert said == pytest.approx(own_logprobs(each, episode), abs=1e-4)


def test_what_is_wrong_with_a_server_is_said(
    serve: Callable[..., Served], policy: turnwise.Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, url: str) -> None:
        with pytest.raises(turnwise.ConfigError, match=match):
            played(policy, vllm.VLLM(policy, url=url))

    refused("no vLLM server answers at http://127.0.0.1:9", "http://127.0.0.1:9")
    refused("with 404.*VLLM_SERVER_DEV_MODE=1", serve(*PROCESSED, dev=False).url)
    guarded = serve(*PROCESSED, key="hunter2").url
    refused("with 401: .*Unauthorized", guarded)
    monkeypatch.setenv("VLLM_API_KEY", "hunter2")
    vllm._servers.clear()
    assert played(policy, vllm.VLLM(policy, url=guarded))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # is not for servers of one's own
    slow = serve(*PROCESSED)
    slow.post("__delay?seconds=2")
    with pytest.raises(turnwise.ConfigError, match="no answer within 0.5 s"):
        played(policy, vllm.VLLM(policy, url=slow.url, patience=0.5))
    slow.post("__delay?seconds=0")
    hot = turnwise.PolicyPlayer(policy, turnwise.Sampling(3.0, 8), vllm.VLLM(policy, url=slow.url))
    with pytest.raises(turnwise.ConfigError, match="temperature 3: vLLM samples at .01 to 2"):
        turnwise.rollout(hot, [(s, 0) for s in turnwise.starts(DESK, 5, 1)], WHERE)
    with pytest.raises(turnwise.ConfigError, match="2 workers cannot share http://127.0.0.1:9"):
        ray.Ray(policy, backend={"name": "vllm", "url": "http://127.0.0.1:9"})
    with pytest.raises(turnwise.ConfigError, match="`options` are of a server that is started"):
        vllm.VLLM(policy, url="http://127.0.0.1:9", options={"dtype": "float32"})


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command `vllm`, which is the server of the tests here."""
    script = tmp_path / "bin" / "vllm"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {SERVER} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(vllm, "_servers", {})


def test_a_server_that_is_started_sleeps_while_the_policy_is_updated(
    command: None, policy: turnwise.Policy
) -> None:
    options = {"max-model-len": 256, "enable_prefix_caching": False,
               "compilation-config": {"pass_config": {"fuse": True}}}  # fmt: skip
    backend = vllm.VLLM(policy, options=options)
    for _ in range(2):
        played(policy, backend)
        backend.refresh()
        backend.refresh()
        moved(policy)
    [server] = vllm._servers.values()
    with urllib.request.urlopen(f"{server.url}/__events") as answer:
        paths = [path for path, *_ in json.load(answer) if path != "/inference/v1/generate"]
    assert paths == [*SENT[2:5], "/sleep", "/wake_up", *SENT[:5], "/sleep"]
    with urllib.request.urlopen(f"{server.url}/__options") as answer:
        given = json.load(answer)
    assert given["compilation_config"] == options["compilation-config"]
    assert given["enable_prefix_caching"] is False
    assert given["enable_sleep_mode"] is True
    assert policy.context_length == 256
    ended(psutil.Process(server._process.pid).children(recursive=True), server.close)


def ended(processes: list[psutil.Process], end: Callable[[], Any]) -> None:
    """Asserts that a server's processes, and what it has started, are gone soon after."""
    assert len([p for p in processes if "EngineCore" in " ".join(p.cmdline())]) == 1
    end()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("by itself", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
)
def test_a_server_ends_with_the_run(
    command: None, model_folder: Callable[..., Path], tmp_path: Path, how: Any
) -> None:
    """With all of its processes, also where the one that started it is killed, and where the thread
    that started it has ended, as in a worker of Ray."""
    (tmp_path / "play.py").write_text(
        "import sys, threading, turnwise\n"
        "from turnwise.plugins.backends import vllm\n"
        f"policy = turnwise.Policy.from_pretrained({str(model_folder())!r}, device='cpu')\n"
        "backend = vllm.VLLM(policy)\n"
        "thread = threading.Thread(target=backend._take_up)\n"
        "thread.start(); thread.join()\n"
        "print('there', flush=True)\n"
        "sys.stdin.read()\n"
    )
    run = subprocess.Popen([sys.executable, str(tmp_path / "play.py")], stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE)  # fmt: skip
    assert run.stdin
    assert run.stdout
    assert run.stdout.readline() == b"there\n"
    end = run.stdin.close if how == "by itself" else lambda: run.send_signal(how)
    ended(psutil.Process(run.pid).children(recursive=True), end)
    run.wait(60)


def test_a_server_that_cannot_be_started_says_why(
    command: None, policy: turnwise.Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(turnwise.ConfigError, match="vLLM did not start.*unrecognized arguments"):
        played(policy, vllm.VLLM(policy, options={"no-such": True}))
    with pytest.raises(turnwise.ConfigError, match="cannot have 'port', which is set here"):
        played(policy, vllm.VLLM(policy, options={"port": 9}))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(turnwise.PluginError, match="there is no command `vllm`: `pip install"):
        played(policy, vllm.VLLM(policy))


def test_processes_that_share_the_weights_share_a_server(
    serve: Callable[..., Served], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Two, each with a share of the weights: the main one sends each version, once; the policy
    before training, which `evaluate` plays too, is sent in its turn."""
    server = serve(*PROCESSED)
    play = {"env": DESK, "max_new_tokens": 6,
            "backend": {"name": "vllm", "url": server.url, "tolerance": 1e-4}}  # fmt: skip
    rl = {**play, "updates": 2, "groups": 3, "group_size": 3, "optimizer": {"lr": 1e-2},
          "feedback": [{"judge": "length", "min_words": 6}]}  # fmt: skip
    config = {"policy": str(model_folder()), "threads": 1, "shard": True,
              "stages": [{"rl": rl}, {"evaluate": {**play, "episodes": 4}}]}  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
             "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "-m", "turnwise", "run",
             str(tmp_path / "c.yaml"), "--folder", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(start, capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    run = turnwise.PastRun(tmp_path / "run")
    assert [m["steps"] for m in run.metrics[:2]] == [1, 1]
    assert all(m["weight_off_one"] < 1e-3 for m in run.metrics[:2])
    sent = [path for path, *_ in server.events()]
    assert sent.count("/collective_rpc") == 4  # twice for `rl`, once for each that is evaluated


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("vllm") is None, reason="vLLM is not installed")
def test_the_real_server_agrees(policy: turnwise.Policy) -> None:
    """On a machine that has vLLM: two versions of a small model, in bfloat16."""
    backend = vllm.VLLM(policy, options={"gpu-memory-utilization": 0.3, "enforce-eager": True})
    for _ in range(2):
        assert {e.ending for e in played(policy, backend)} <= {"terminated", "truncated"}
        backend.refresh()
        moved(policy)


def test_conversations_that_come_later_are_sampled_too(
    serve: Callable[..., Served], policy: turnwise.Policy
) -> None:
    later = [Conversation(1, [5, 6, 7], seed=2), Conversation(2, [8, 9], seed=3)]

    def arriving() -> Sequence[Conversation]:
        return [later.pop()] if later else []

    backend = vllm.VLLM(policy, url=serve(*PROCESSED).url)
    first = Conversation(0, [1, 2, 3], seed=1, limit=30)
    sampling = turnwise.Sampling(1.0, 200)
    found = {c.row: s for c, s in backend.reply([first], sampling, arriving)}
    assert len(found[0].ids) <= 30
    assert set(found) == {0, 1, 2}
