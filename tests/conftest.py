"""Small real models of several architectures, and environments for tests.

Everything is built here; nothing is fetched.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import support.echo  # noqa: F401 - registers it
import torch
import transformers
import turnwise
from support.browsers import CHROMIUM, chromium
from support.databases import cluster, new_database, program
from support.models import LLAMA_LIKE, WORDS, configs
from turnwise.learning import build_policy, build_tokenizer

hypothesis.settings.register_profile(  # how long an example takes says how busy the machine is
    "turnwise", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("turnwise")
# chosen here, so that no run measures which number is faster
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
transformers.utils.logging.disable_progress_bar()

LONGEST = (
    "test_cli.py",
    "test_promise_3_resume.py",
    "test_reward_model.py",
    "test_durable.py",
    "test_people_browser.py",
    "test_people_service.py",
    "test_retrain.py",
    "test_judge_economy.py",
    "test_rl.py",
    "test_envs.py",
    "test_damage.py",
    "test_promise_2_gradients.py",
    "test_late_feedback.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first: of two workers, none is to be alone with one at the
    end."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer([WORDS] * 4, vocabulary=320)


@pytest.fixture(scope="session")
def model_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a small model of an architecture and saves it as a folder, once per session."""
    made: dict[str, Path] = {}

    def make(architecture: str = "llama") -> Path:
        if architecture not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                configs(len(tokenizer))[architecture]
            )
            for parameter in model.parameters():  # biases and norms too must matter
                if parameter.ndim == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            folder = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[architecture] = folder
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def wide(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with room for the schemas of tools."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**LLAMA_LIKE, "max_position_embeddings": 4096}, vocab_size=len(tokenizer),
        bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(model_folder: Callable[..., Path]) -> turnwise.Policy:
    return turnwise.Policy.from_pretrained(model_folder())


@pytest.fixture(scope="session", autouse=True)
def plugins() -> turnwise.Plugins:
    """The installed plugins; making them registers the built-in environments."""
    return turnwise.Plugins()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL cluster for this session."""
    if program("initdb") is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with cluster() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of either kind that a ledger can live in."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.sqlite"
    return new_database(request.getfixturevalue("postgres"), f"t{uuid.uuid4().hex}")


@pytest.fixture
def ledger_url(tmp_path: Path) -> str:
    """Returns where `ledger` lies: on SQLite, except where a file's own fixture says otherwise."""
    return f"sqlite:///{tmp_path}/ledger.sqlite"


@pytest.fixture
def ledger_clock() -> Callable[[], float]:
    """Returns the clock of `ledger`: the real one, except where a file's own fixture says
    otherwise."""
    return time.time


@pytest.fixture
def ledger(ledger_url: str, ledger_clock: Callable[[], float]) -> Iterator[turnwise.Ledger]:
    """Opens an empty ledger."""
    opened = turnwise.Ledger(ledger_url, clock=ledger_clock)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for a file's tests; while it is open, its event loop is the thread's."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny policy's folder, with room for a game's rules and the schemas of tools."""
    folder, words = tmp_path_factory.mktemp("roomy"), ["hello there", "what is your order number?"]
    return str(build_policy(folder, words, hidden=32, layers=2, heads=2, context=4096))
