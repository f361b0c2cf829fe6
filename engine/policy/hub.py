"""Puts a policy on the hub."""

from __future__ import annotations

import tempfile

from ..errors import PolicyError
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
        PolicyError: the hub cannot be reached, or refuses it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder, merge=merge)
        try:
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repo, folder_path=folder).repo_url)
        except Exception as error:  # the hub's client has changed its HTTP library twice
            raise PolicyError(
                f"the policy cannot be put on the hub as {repo!r}: {error}. A token that may write"
                " is needed: `hf auth login`, or HF_TOKEN"
            ) from error
