"""The server of `vllm`: how it is started and ended, and which weights it has.

For each version of the weights it is told, in this order: pause, load them, forget the prefixes
that were computed, call the weights by a name, go on. The interfaces are those of vLLM 0.33:
`/inference/v1/generate`, `/v1/models`, and with VLLM_SERVER_DEV_MODE=1 `/pause`, `/resume`,
`/collective_rpc` (`reload_weights`), `/reset_prefix_cache`, `/update_weight_version`,
`/is_sleeping`, `/sleep` and `/wake_up`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from ...learning import Policy
from ...protocols import ConfigError, Conversation, PluginError
from ...tools import install

TRIES = 3  # of a reply whose connection broke, and of forgetting prefixes
OURS = {"host", "port", "model", "api-key", "config"}  # options that are set here

# Runs a command and ends it, with all that it has started, when this process closes the standard
# input or ends in whatever way: the engine is a grandchild, which nothing else would end.
GUARD = """
import os, select, signal, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
def end(how, seconds):
    try:
        os.killpg(child.pid, how)
        child.wait(seconds)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
while child.poll() is None and not select.select([0], [], [], 0.2)[0]:
    pass
end(signal.SIGTERM, 10)
end(signal.SIGKILL, 10)
"""


class Server:
    """A vLLM server: which weights it has, and whether it sleeps.

    Args:
        url: of one that runs; "": one is started here.
        folder: where weights are handed over; "": a temporary one.
        options: of `vllm serve`.
        patience: seconds that a reply, loading weights, or the start may take.
    """

    def __init__(self, url: str, folder: str, options: Mapping[str, Any], patience: float) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise PluginError(f"`backend: vllm` needs httpx2: {install('vllm')}") from error
        self.url, self.patience, self._options = url, patience, options
        self.has, self.asleep = "", False
        self._longest = 0  # tokens that it reads
        self._process: subprocess.Popen[bytes] | None = None
        self._held: Path | None = None  # where the weights are that it has
        if folder:  # a server of another user must be able to read it
            self._folder = Path(folder) / f"turnwise-{uuid4().hex}"
            self._folder.mkdir(parents=True)
        else:
            self._folder = Path(tempfile.mkdtemp(prefix="turnwise-vllm-"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._errors: Any = httpx2.HTTPError
        self._late: Any = (httpx2.ReadTimeout, httpx2.WriteTimeout)
        # One connection for each reply; the server queues what it has no room for. A proxy between
        # would end replies that take long.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx2.Timeout(patience, connect=10.0, pool=None)
        usual: dict[str, Any] = {"timeout": timeout, "headers": headers, "trust_env": False}
        self._client = httpx2.Client(**usual)
        self._many = httpx2.AsyncClient(limits=limits, **usual)

    def take_up(self, policy: Policy, name: str) -> None:
        """Wakes the server, and sends it weights that it does not have. A policy may read no more
        tokens than its server: `context_length` is lowered where that is fewer.

        Args:
            policy: whose weights.
            name: what these very weights are called.

        Raises:
            ConfigError: it is not there, or refuses.
        """
        files = self._folder / name
        if self.has != name and policy.saves:  # before it wakes, while there is room
            policy.save_pretrained(files, merge=True)
        if self.asleep:
            self._post("wake_up")
            self.asleep = False
        if self.has == name:
            return
        if policy.accelerator.is_main_process:
            self._load(policy, files, name)
        policy.accelerator.wait_for_everyone()
        if not self.has:
            there = [model.get("max_model_len") for model in self._get("v1/models")["data"]]
            self._longest = min(filter(None, there))
        if self._held is not None:
            shutil.rmtree(self._held, ignore_errors=True)
        self.has, self._held = name, files
        # Conversations end there as at the model's own limit, instead of being refused.
        policy.context_length = min(policy.context_length, self._longest)

    def _load(self, policy: Policy, files: Path, name: str) -> None:
        """Has the server load weights, and call them by a name."""
        if not self.url:
            self._start(files, policy)
        else:
            if not self.has and self._get("is_sleeping").get("is_sleeping"):
                self._post("wake_up")  # another run, or this one before, let it sleep
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

    def close(self) -> None:
        """Ends a server that was started here, and waits for it."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()

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
                except self._errors as error:
                    if again + 1 == TRIES or isinstance(error, self._late):
                        raise
                    await asyncio.sleep(2.0**again)
            ended((conversation, self._content(answer)))
        except Exception as error:
            ended((conversation, self._named(error)))

    def _post(self, path: str, **body: Any) -> Any:
        return self._ask("POST", path, json=body or None)

    def _get(self, path: str) -> Any:
        return self._ask("GET", path)

    def _ask(self, method: str, path: str, **given: Any) -> Any:
        try:
            return self._content(self._client.request(method, f"{self.url}/{path}", **given))
        except Exception as error:
            raise self._named(error) from error

    def _content(self, answer: Any) -> Any:
        path = answer.request.url.path
        if answer.status_code != 200:
            hints = {404: " Start it with VLLM_SERVER_DEV_MODE=1."}
            if path == "/collective_rpc":
                hints[500] = f" It must be able to read {self._folder}: name a `folder` for both."
            raise ConfigError(
                f"vLLM at {self.url} refused {path} with {answer.status_code}:"
                f" {answer.text[:300]}{hints.get(answer.status_code, '')}"
            )
        return answer.json() if answer.content else {}

    def _named(self, error: Exception) -> Exception:
        """Returns the error of a connection, with what was asked and what to do."""
        if not isinstance(error, self._errors):
            return error
        if isinstance(error, self._late):
            return ConfigError(
                f"vLLM at {self.url} gave no answer within {self.patience:g} s (`patience`): see"
                " its log; fewer `rows` at a time are answered sooner"
            )
        return ConfigError(
            f"no vLLM server answers at {self.url}: {type(error).__name__}: {error}. Start one with"
            " `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs`, or"
            " leave `url` out"
        )

    def _start(self, files: Path, policy: Policy) -> None:
        """Starts a server on this machine with a policy's weights, and waits until it answers.

        Raises:
            PluginError: vLLM is not installed.
            ConfigError: it ended, or did not answer in time; an option is one that is set here.
        """
        command = shutil.which("vllm")
        if command is None:
            raise PluginError(
                "`backend: vllm` starts `vllm serve`, and there is no command `vllm`: `pip install"
                " vllm`, or name a server that runs (`url`)"
            )
        options = {name.replace("_", "-"): value for name, value in self._options.items()}
        if ours := sorted(OURS & options.keys()):
            raise ConfigError(
                f"`options` of `backend: vllm` cannot have {ours[0]!r}, which is set here; a key is"
                " read from VLLM_API_KEY"
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        half = policy.precision == "bf16"
        dtype = "bfloat16" if half else str(policy.model.dtype).removeprefix("torch.")
        given = {"logprobs-mode": "processed_logprobs", "enable-sleep-mode": True, "dtype": dtype,
                 **options}  # fmt: skip
        config = self._folder / "serve.yaml"
        config.write_text(json.dumps(given))  # which is YAML, too; vLLM reads values of each kind
        log = self._folder / "vllm.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", GUARD, command, "serve", str(files),
                 "--config", str(config), "--host", "127.0.0.1", "--port", str(port)],
                stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"},
            )  # fmt: skip

        self._process = process
        atexit.register(self.close)
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + self.patience
        while True:
            with contextlib.suppress(self._errors):
                if self._client.get(f"{url}/health").status_code == 200:
                    self.url = url
                    return
            if process.poll() is not None or time.monotonic() > until:
                self.close()
                last = log.read_text(errors="replace").splitlines()[-5:]
                raise ConfigError("vLLM did not start. Its last words: " + " / ".join(last))
            time.sleep(0.2)
