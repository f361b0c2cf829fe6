"""`vllm`: replies are sampled by a vLLM server, which gets the policy's weights whenever they have
changed.

    policy ──files──▶ vLLM server ◀──token ids── conversations, here with their environments
                          └──token ids, log-probs──▶

The server is one that runs (`url`), or one that is started on this machine and sleeps while the
policy is updated (vllm_server.py). Every reply says by which weights it was sampled, so that those
of others are never taken for the policy's.

The first replies of each version of the weights are scored by the policy, too. Where the log-probs
differ by more than `tolerance` at the start, the run ends; later, it warns, and ends where they are
far apart.
"""

from __future__ import annotations

import contextlib
import queue
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any
from uuid import uuid4

import torch

from ...learning import Policy, Row, broadcast
from ...protocols import ConfigError, Conversation, NonFiniteError, Sample, Sampling
from ...tools import background, canonical_json
from .vllm_server import Server

LOOK = 0.05  # seconds between looks for conversations that have come to wait
CHECKED = 8  # replies of a version of the weights that the policy scores, too
FAR = 100.0  # times the tolerance: no rounding puts log-probs so far apart
NEVER = -100.0  # what vLLM lets one add to the logit of an id that is no token

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
        patience: seconds that a reply, loading weights, or starting the server may take.
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
        patience: float = 900.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        if not (tolerance > 0 and patience > 0):
            raise ValueError(
                f"tolerance and patience must be above 0, got {tolerance} and {patience}"
            )
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
        self.policy, self.rows, self.tolerance, self.patience = policy, rows, tolerance, patience
        self.url, self.folder, self.options = url.rstrip("/"), folder, dict(options or {})
        self.sleeps = not url if sleep is None else sleep
        self._weights: tuple[Any, ...] = ()  # what they were when they got their name
        self._name = ""
        self._unchecked = CHECKED
        self._apart = torch.empty(0)  # by how much log-probs of this version's tokens differ
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
                processed log-probs; or it cannot sample at this temperature.
            NonFiniteError: a log-prob is not a finite number.
        """
        if sampling.temperature and not 0.01 <= sampling.temperature <= 2.0:
            raise ConfigError(
                f"temperature {sampling.temperature:g}: vLLM samples at .01 to 2, or greedily at 0"
            )
        server = self._shared() if self._several else self._take_up()
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
                    sample = self._sample(answer, self._most(conversation, sampling))
                    self._compare(conversation, sample, sampling.temperature)
                    yield conversation, sample
            self._check()
        finally:
            for each in asked.values():
                each.cancel()

    @property
    def _key(self) -> str:
        """The server's: one that is started can have the weights of one kind of model only."""
        model = self.policy.model
        config = {k: str(v) for k, v in model.config.to_dict().items()}
        return self.url or canonical_json([self.options, config, str(model.dtype)])

    def _take_up(self) -> Server:
        """Returns the server, awake and with the policy's weights of now."""
        policy = self.policy
        # An optimizer's kernel may write weights without raising the versions that torch counts.
        now = (policy.version, *((id(p), p._version) for p in policy.network.parameters()))
        if now != self._weights:
            name = broadcast(uuid4().hex) if self._several else uuid4().hex
            self._weights, self._name, self._unchecked = now, name, CHECKED
            self._apart = torch.empty(0)
        server = _servers.get(self._key) or Server(
            self.url, self.folder, self.options, self.patience
        )
        server.take_up(policy, self._name)
        return _servers.setdefault(self._key, server)

    def _shared(self) -> Server:
        """Returns the server of several processes.

        Raises:
            ConfigError: it has been sent another policy's weights, which one process alone cannot
                change.
        """
        server = _servers.get(self._key)
        if server is None or server.has != self._name:
            raise ConfigError(
                f"{self.url} has the weights of another policy, and several processes cannot send"
                " it this one's while they play: policies that play each other need a run of one"
                " process, or another backend"
            )
        return server

    def _most(self, conversation: Conversation, sampling: Sampling) -> int:
        """Returns how many tokens a reply may have."""
        room = self.policy.context_length - len(conversation.ids)
        if room < 1:
            raise ConfigError(
                f"a conversation begins with {len(conversation.ids)} tokens, and its server reads"
                f" {self.policy.context_length}: start it with a larger --max-model-len"
            )
        most = conversation.limit or sampling.max_new_tokens
        return min(sampling.max_new_tokens, most, room)

    def _request(self, conversation: Conversation, sampling: Sampling) -> dict[str, Any]:
        """Returns the body that asks for a reply. All that a model's own generation config might
        set is set here, since log-probs would be those of another distribution."""
        no_tokens = self.policy.network.missing.tolist()
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
                "max_tokens": self._most(conversation, sampling),
                "ignore_eos": True,  # what ends a reply is in the next line alone
                "stop_token_ids": sorted(self.policy.chat.stop_ids),
                "logprobs": 0,
                "detokenize": False,
                **({"logit_bias": dict.fromkeys(map(str, no_tokens), NEVER)} if no_tokens else {}),
            },
        }

    def _sample(self, answer: Mapping[str, Any], most: int) -> Sample:
        """Returns the reply in an answer.

        Args:
            answer: what the server answered.
            most: tokens that were asked for.

        Raises:
            ConfigError: it is not as vLLM 0.33 answers, was sampled by other weights, or is
                shorter than asked.
            NonFiniteError: a log-prob is not a finite number.
        """
        server = self.url or "vLLM"
        try:
            [choice] = answer["choices"]
            reason = choice["finish_reason"]
            ids = tuple(choice["token_ids"])
            content = choice["logprobs"]["content"] if ids else []
            logprobs = tuple(float(each["logprob"]) for each in content)
            by = {span["version"] for span in choice["weight_versions"] or ()}
            if [each["token_id"] for each in content] != list(ids):
                raise ValueError("its log-probs are of other tokens than its reply's")
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{server} does not answer as vLLM 0.33 does: {type(error).__name__}: {error}"
            ) from error
        if by - {self._name} or reason == "abort":
            raise ConfigError(
                f"{server} sampled a reply with other weights than this policy's, or broke it off:"
                " it was restarted, or another run or worker sends it weights. Go on with --resume,"
                " with a server of its own for each"
            )
        if not ids or reason not in ("stop", "length") or (reason == "length" and len(ids) < most):
            raise ConfigError(
                f"{server} ended a reply of {len(ids)} tokens with {reason!r}, where up to {most}"
                " were asked for: see its log, and its limits of a reply's length"
            )
        if not all(-9000.0 < p <= 1e-6 for p in logprobs):  # -9999 stands for what is not known
            raise NonFiniteError(
                f"vLLM gave log-probs that are none: {sorted(set(logprobs))[:3]}; the policy's"
                " logits may not be finite"
            )
        return Sample(ids, logprobs, ids[-1] not in self.policy.chat.stop_ids)

    @torch.no_grad()
    def _compare(self, conversation: Conversation, sample: Sample, temperature: float) -> None:
        """Scores one of the first replies of these weights with the policy itself."""
        if not self._unchecked or not temperature:
            return
        ids = (*conversation.ids, *sample.ids)
        places = range(len(conversation.ids), len(ids))
        row = Row(ids, 0, tuple(places), tuple(range(len(places))))
        [micro] = self.policy.micro_batches([row], len(ids))
        own = self.policy.score(micro, temperature, self.policy.network).logprobs.float().cpu()
        self._apart = torch.cat([self._apart, (own - torch.tensor(sample.logprobs)).abs()])
        self._unchecked -= 1
        if not self._unchecked:
            self._check()

    def _check(self) -> None:
        """Looks at how far the log-probs of these weights' first replies are apart.

        Raises:
            ConfigError: they are others, at the start; or far apart, at any time.
        """
        if not len(self._apart):
            return
        apart = float(self._apart.mean())
        if apart <= self.tolerance:
            self._agreed = True
            return
        says = (
            f"vLLM's log-probs are {apart:.2g} a token from the policy's own; {self.tolerance:g}"
            " is allowed (`tolerance`)"
        )
        if not self._agreed:
            raise ConfigError(
                f"{says}. Start the server with --logprobs-mode processed_logprobs, on the same"
                " model, in the policy's dtype"
            )
        if not apart <= FAR * self.tolerance:
            raise ConfigError(
                f"{says}. They agreed before: the server may not have loaded these weights; see its"
                " log"
            )
        if not self._unchecked:
            warnings.warn(f"{says}; they agreed before", stacklevel=2)
