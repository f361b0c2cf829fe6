"""The notebooks of the examples: each runs from the first cell to the last, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from turnwise.plugins.demo.support_desk import SFT, play_run, small_model

NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"
SHOWN = {
    "first_run": {"text/html", "image/png"},
    "reading_credit": {"text/html"},
    "judges_against_people": {"image/png"},
}
SMALL = {"updates": 2, "groups": 4, "rollouts": 2}


@pytest.fixture(scope="module")
def fluent(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny policy that helps some customers: there is credit to read."""
    folder = tmp_path_factory.mktemp("fluent")
    stage = {**SFT, "player": "expert", "episodes": 800, "epochs": 3}
    play_run(folder, "sft", small_model(folder, 0), [{"sft": stage}], 0, threads=1)
    return str(folder / "sft" / "policy")


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_a_notebook_runs(name: str, fluent: str, tmp_path: Path) -> None:
    book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(book)
    shown = [cell.get("outputs") for cell in book.cells if cell.cell_type == "code"]
    assert sum(map(bool, shown)) >= len(shown) / 2, "it is kept as it was when it was run"
    [given] = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    for key, value in {"policy": fluent, **SMALL}.items():
        given.source = re.sub(rf"\b{key} = .*", rf"{key} = {value!r}", given.source)
    NotebookClient(book, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = {
        kind for cell in book.cells for o in cell.get("outputs", ()) for kind in o.get("data", ())
    }
    assert SHOWN[name] <= kinds
