"""Makes a folder in which the package stands alone: the reference is made of it, and the root of
the repository, which is the package too, holds much else."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def on_startup(**_: Any) -> None:
    """Links what belongs to the package, before any plugin looks for it."""
    alone = ROOT / ".docs_path" / "turnwise"
    alone.mkdir(parents=True, exist_ok=True)
    parts = ("engine", "envs", "judges", "plugins", "*.py", "*.pyi", "py.typed")
    for path in (each for part in parts for each in ROOT.glob(part)):
        link = alone / path.name
        if not link.is_symlink():
            link.symlink_to(path)
