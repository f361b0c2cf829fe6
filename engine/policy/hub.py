"""Puts a policy on the hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from ..errors import PolicyError
from .known import KNOWN, known_folder
from .loading import ADAPTERS
from .policy import Policy


def push(policy: Policy, repo: str, *, private: bool = False, merge: bool = False) -> str:
    """Uploads a policy with its tokenizer and card to a repository of the hub, which is made if it
    is not there.

    Args:
        repo: such as "me/riddler".
        private: a repository that is made is seen by its owner alone.
        merge: fold LoRA adapters into the weights; else the adapters alone are uploaded.

    Returns:
        the address of what was uploaded.

    Raises:
        PolicyError: the hub cannot be reached, or refuses it; or the adapters are of a folder of
            this machine, and others could not load them.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder, merge=merge)
        _name_base(Path(folder) / ADAPTERS)
        try:
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repo, folder_path=folder).repo_url)
        except Exception as error:  # the hub's client has changed its HTTP library twice
            raise PolicyError(
                f"the policy cannot be put on the hub as {repo!r}: {error}. A token that may write"
                " is needed: `hf auth login`, or HF_TOKEN"
            ) from error


def _name_base(note: Path) -> None:
    """Writes the name on the hub of the model that adapters belong to, where they name a folder.

    Raises:
        PolicyError: it has none.
    """
    if not note.is_file():
        return
    content = json.loads(note.read_text(encoding="utf-8"))
    base = content["base_model_name_or_path"]
    if not Path(base).is_dir():
        return
    names = {known_folder(name): known.hub for name, known in KNOWN.items()}
    if Path(base) not in names:
        raise PolicyError(
            f"the adapters belong to the model in the folder {base}, which others lack: put"
            " them on the hub with merge=True"
        )
    content["base_model_name_or_path"] = names[Path(base)]
    note.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
