"""`vllm`: replies are sampled by a vLLM server, which gets the policy's weights whenever they have
changed.

    policy ──files──▶ vLLM server ◀──token ids── conversations, here with their environments
                          └──token ids, log-probs──▶

The server is one that runs (`url`), or one that is started on this machine and sleeps while the
policy is updated. For each version of the weights it is told, in this order: pause, load them,
forget the prefixes that were computed, call the weights by a name, go on. Every reply says by which
weights it was sampled, so that those of others are never taken for the policy's.

The first replies of each version are scored by the policy, too. Where the log-probs differ by more
than `tolerance` at the start, the run ends; later, it warns. The interfaces are those of vLLM 0.33:
`/inference/v1/generate`, and with VLLM_SERVER_DEV_MODE=1 `/pause`, `/resume`, `/collective_rpc`
(`reload_weights`), `/reset_prefix_cache`, `/update_weight_version`, `/sleep` and `/wake_up`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from ...learning import Policy, Row, broadcast
from ...protocols import (
    ConfigError,
    Conversation,
    NonFiniteError,
    PluginError,
    Sample,
    Sampling,
)
from ...tools import TIED, background, canonical_json, install

LOOK = 0.05  # seconds between looks for conversations that have come to wait
PATIENCE = 600.0  # seconds that a reply, or loading weights, may take
START = 900.0  # seconds until a server that was started must answer
TRIES = 3  # of a reply whose connection broke, and of forgetting prefixes
CHECKED = 8  # replies of a version of the weights that the policy scores, too

_servers: dict[str, Server] = {}  # of this process, by their address, or by how they were started


class VLLM:
    """Samples through a vLLM server.

    Args:
        policy: whose replies are sampled.
        url: of a server that runs, such as "http://10.0.0.7:8000"; default: one is started here.
        rows: conversations alive at a time.
        folder: where weights are handed over; the server must see it under the same name. Default:
            a temporary one, for a server on this machine.
        sleep: whether the server gives up its GPU memory between plays. Default: the one that is
            started here does.
        tolerance: mean difference of log-probs between server and policy that is allowed.
        options: of `vllm serve`, by name without dashes, for the one that is started.
    """

    def __init__(
        self,
        policy: Policy,
        url: str = "",
        rows: int = 256,
        folder: str = "",
        sleep: bool | None = None,
        tolerance: float = 0.01,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        if url and options:
            raise ConfigError(
                f"`options` are of a server that is started here, and {url} runs already: leave"
                " one of the two out"
            )
        self._several = policy.accelerator.num_processes > 1
        if self._several and (not url or sleep):
            raise ConfigError(
                f"this run has {policy.accelerator.num_processes} processes, which share a server"
                " that runs (`url`) and does not sleep"
            )
        self.policy, self.rows, self.tolerance = policy, rows, tolerance
        self.url, self.folder, self.options = url.rstrip("/"), folder, dict(options or {})
        self.sleeps = not url if sleep is None else sleep
        self._weights: tuple[Any, ...] = ()  # what they were when they got their name
        self._name = ""
        self._unchecked = CHECKED
        self._agreed = False  # once, which later differences are measured against

    def refresh(self) -> None:
        """Lets the server sleep; weights are sent when something is sampled with them. With several
        processes they are sent here, where all of them are."""
        if self._several:
            self._take_up()
        elif self.sleeps and (server := _servers.get(self._key)) is not None:
            server.sleep()

    def reply(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        arriving: Callable[[], Sequence[Conversation]] = tuple,
    ) -> Iterator[tuple[Conversation, Sample]]:
        """Yields every conversation with its sampled reply, when it ends; those that arrive
        meanwhile are sent at once.

        Raises:
            ConfigError: the server is not there, refuses what it is asked, or is no vLLM with
                processed log-probs.
            NonFiniteError: a log-prob is not a finite number.
        """
        server = _servers[self._key] if self._several else self._take_up()
        ended: queue.SimpleQueue[tuple[Conversation, Any]] = queue.SimpleQueue()
        asked: dict[int, Future[None]] = {}

        def ask(some: Sequence[Conversation]) -> None:
            for each in some:
                work = server.sample(each, self._request(each, sampling), ended.put)
                asked[each.row] = background(work)

        try:
            ask(conversations)
            while asked:
                ask(arriving())
                with contextlib.suppress(queue.Empty):
                    conversation, answer = ended.get(timeout=LOOK)
                    del asked[conversation.row]
                    if isinstance(answer, BaseException):
                        raise answer
                    sample = self._sample(answer)
                    self._check(conversation, sample, sampling.temperature)
                    yield conversation, sample
        finally:
            for each in asked.values():
                each.cancel()

    @property
    def _key(self) -> str:
        return self.url or canonical_json(self.options)

    def _take_up(self) -> Server:
        """Returns the server, awake and with the policy's weights of now."""
        weights = tuple((id(p), p._version) for p in self.policy.network.parameters())
        if weights != self._weights:
            name = broadcast(uuid4().hex) if self._several else uuid4().hex
            self._weights, self._name, self._unchecked = weights, name, CHECKED
        server = _servers.get(self._key) or Server(self.url, self.folder, self.options)
        server.take_up(self.policy, self._name)
        return _servers.setdefault(self._key, server)

    def _request(self, conversation: Conversation, sampling: Sampling) -> dict[str, Any]:
        """Returns the body that asks for a reply. All that a model's own generation config might
        set is set here, since log-probs would be those of another distribution."""
        room = self.policy.context_length - len(conversation.ids)
        most = conversation.limit or sampling.max_new_tokens
        return {
            "token_ids": list(conversation.ids),
            "sampling_params": {
                "n": 1,
                "temperature": sampling.temperature,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "seed": conversation.seed % 2**63,
                "max_tokens": min(sampling.max_new_tokens, most, room),
                "ignore_eos": True,  # what ends a reply is in the next line alone
                "stop_token_ids": sorted(self.policy.chat.stop_ids),
                "logprobs": 0,
                "detokenize": False,
            },
        }

    def _sample(self, answer: Mapping[str, Any]) -> Sample:
        """Returns the reply in an answer.

        Raises:
            ConfigError: it is not as vLLM 0.33 answers, or was sampled by other weights.
            NonFiniteError: a log-prob is not a finite number.
        """
        try:
            [choice] = answer["choices"]
            ids = tuple(choice["token_ids"])
            content = choice["logprobs"]["content"]
            logprobs = tuple(float(each["logprob"]) for each in content)
            by = {span["version"] for span in choice["weight_versions"] or ()}
            if not ids or [each["token_id"] for each in content] != list(ids):
                raise ValueError("its log-probs are of other tokens than its reply's")
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self.url or 'vLLM'} does not answer as vLLM 0.33 does:"
                f" {type(error).__name__}: {error}"
            ) from error
        if by != {self._name}:
            raise ConfigError(
                f"{self.url or 'vLLM'} sampled a reply with other weights than this policy's: it"
                " was restarted, or another run sends it weights. Go on with --resume, with a"
                " server of its own for each run"
            )
        if choice["finish_reason"] not in ("stop", "length"):
            raise ConfigError(f"vLLM ended a reply with {choice['finish_reason']!r}: see its log")
        if not all(-9000.0 < p <= 1e-6 for p in logprobs):  # -9999 stands for what is not known
            raise NonFiniteError(
                f"vLLM gave log-probs that are none: {sorted(set(logprobs))[:3]}; the policy's"
                " logits may not be finite"
            )
        return Sample(ids, logprobs, ids[-1] not in self.policy.chat.stop_ids)

    @torch.no_grad()
    def _check(self, conversation: Conversation, sample: Sample, temperature: float) -> None:
        """Scores one of the first replies of these weights with the policy itself.

        Raises:
            ConfigError: the server's log-probs are others, at the start.
        """
        if not self._unchecked or not temperature:
            return
        self._unchecked -= 1
        ids = (*conversation.ids, *sample.ids)
        places = range(len(conversation.ids), len(ids))
        row = Row(ids, 0, tuple(places), tuple(range(len(places))))
        [micro] = self.policy.micro_batches([row], len(ids))
        own = self.policy.score(micro, temperature, self.policy.network).logprobs.float().cpu()
        apart = float((own - torch.tensor(sample.logprobs)).abs().mean())
        if apart <= self.tolerance:
            self._agreed = True
            return
        says = (
            f"vLLM's log-probs are {apart:.2g} a token from the policy's own; {self.tolerance:g}"
            " is allowed (`tolerance`)"
        )
        if self._agreed:
            warnings.warn(f"{says}; they agreed before", stacklevel=2)
            return
        raise ConfigError(
            f"{says}. Start the server with --logprobs-mode processed_logprobs, on the same model,"
            " in the policy's dtype"
        )


class Server:
    """A vLLM server: which weights it has, and whether it sleeps.

    Args:
        url: of one that runs; "": one is started here.
        folder: where weights are handed over; "": a temporary one.
        options: of `vllm serve`.
    """

    def __init__(self, url: str, folder: str, options: Mapping[str, Any]) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise PluginError(f"`backend: vllm` needs httpx2: {install('vllm')}") from error
        if folder:  # a server of another user must be able to read it
            self._folder = Path(folder) / f"turnwise-{uuid4().hex}"
            self._folder.mkdir(parents=True)
        else:
            self._folder = Path(tempfile.mkdtemp(prefix="turnwise-vllm-"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        self._held: Path | None = None  # where the weights are that it has
        self.has, self.asleep, self.url, self._options = "", False, url, options
        key = os.environ.get("VLLM_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._errors: Any = httpx2.HTTPError
        # One connection for each reply; the server queues what it has no room for.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx2.Timeout(PATIENCE, connect=10.0, pool=None)
        self._client = httpx2.Client(timeout=timeout, headers=self._headers)
        self._many = httpx2.AsyncClient(limits=limits, timeout=timeout, headers=self._headers)

    def take_up(self, policy: Policy, name: str) -> None:
        """Wakes the server, and sends it weights that it does not have.

        Args:
            policy: whose weights.
            name: what these very weights are called.

        Raises:
            ConfigError: it is not there, or refuses.
        """
        if self.asleep:
            self._post("wake_up")
            self.asleep = False
        if self.has == name:
            return
        files = self._folder / name
        if policy.saves:
            policy.save_pretrained(files, merge=True)
        if policy.accelerator.is_main_process:
            self._load(policy, files, name)
        policy.accelerator.wait_for_everyone()
        if self._held is not None:
            shutil.rmtree(self._held, ignore_errors=True)
        self.has, self._held = name, files

    def _load(self, policy: Policy, files: Path, name: str) -> None:
        """Has the server load weights, and call them by a name."""
        if not self.url:
            self._start(files, policy)
        else:
            self._post("pause?mode=abort")  # what another left behind
            self._post("collective_rpc", method="reload_weights",
                       kwargs={"weights_path": str(files)})  # fmt: skip
        for again in range(TRIES):
            if self._post("reset_prefix_cache").get("success"):
                break
            time.sleep(2.0**again)  # blocks are still being moved
        else:
            raise ConfigError(
                f"{self.url} does not forget the prefixes that the weights before had computed"
            )
        self._post("update_weight_version", new_version=name)
        self._post("resume")

    def sleep(self) -> None:
        """Lets the server give up its GPU memory until something is sampled."""
        if not self.asleep and self.has:
            self._post("sleep?level=1")
            self.asleep = True

    async def sample(
        self,
        conversation: Conversation,
        body: Mapping[str, Any],
        ended: Callable[[tuple[Conversation, Any]], None],
    ) -> None:
        """Asks for a reply, and hands on the answer or the error."""
        try:
            for again in range(TRIES):
                try:
                    answer = await self._many.post(f"{self.url}/inference/v1/generate", json=body)
                    break
                except self._errors:
                    if again + 1 == TRIES:
                        raise
                    await asyncio.sleep(2.0**again)
            ended((conversation, self._content(answer)))
        except Exception as error:
            ended((conversation, self._named(error)))

    def _post(self, path: str, **body: Any) -> Any:
        try:
            return self._content(self._client.post(f"{self.url}/{path}", json=body or None))
        except Exception as error:
            raise self._named(error) from error

    def _content(self, answer: Any) -> Any:
        if answer.status_code != 200:
            missing = answer.status_code == 404
            hint = " Start it with VLLM_SERVER_DEV_MODE=1." if missing else ""
            raise ConfigError(
                f"vLLM at {self.url} refused {answer.request.url.path} with"
                f" {answer.status_code}: {answer.text[:300]}{hint}"
            )
        return answer.json() if answer.content else {}

    def _named(self, error: Exception) -> Exception:
        """Returns the error of a connection, with what was asked and what to do."""
        if not isinstance(error, self._errors):
            return error
        return ConfigError(
            f"no vLLM server answers at {self.url}: {type(error).__name__}: {error}. Start one with"
            " `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs`, or"
            " leave `url` out"
        )

    def _start(self, files: Path, policy: Policy) -> None:
        """Starts a server on this machine with a policy's weights, and waits until it answers.

        Raises:
            PluginError: vLLM is not installed.
            ConfigError: it ended, or did not answer in time.
        """
        command = shutil.which("vllm")
        if command is None:
            raise PluginError(
                "`backend: vllm` starts `vllm serve`, and there is no command `vllm`: `pip install"
                " vllm`, or name a server that runs (`url`)"
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        half = policy.precision == "bf16"
        dtype = "bfloat16" if half else str(policy.model.dtype).removeprefix("torch.")
        given = {"logprobs-mode": "processed_logprobs", "enable-sleep-mode": True, "dtype": dtype,
                 "host": "127.0.0.1", "port": port, **self._options}  # fmt: skip
        arguments = [
            part
            for name, value in given.items()
            if value is not False
            for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
        ]
        log = self._folder / "vllm.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*TIED, command, "serve", str(files), *arguments],
                stdout=out,
                stderr=out,
                env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"},
            )
        atexit.register(process.terminate)
        self.url, until = f"http://127.0.0.1:{port}", time.monotonic() + START
        while True:
            with contextlib.suppress(self._errors):
                if self._client.get(f"{self.url}/health").status_code == 200:
                    return
            if process.poll() is not None or time.monotonic() > until:
                process.terminate()
                last = log.read_text(errors="replace").splitlines()[-5:]
                raise ConfigError("vLLM did not start. Its last words: " + " / ".join(last))
            time.sleep(0.2)
