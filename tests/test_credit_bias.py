"""The page's table of biases is what the script computes: every conversation of a small world
listed, and sent through each method's `assign`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from support.scripts import benchmark

bias = benchmark("credit_bias")


@pytest.mark.parametrize("many", [False, True])
def test_the_worlds_conversations_are_all_there_are(many: bool) -> None:
    """Their probabilities sum to 1, and their mean outcome is the value of the start."""
    world = bias.World(0, "turns", many)
    told, chances, grads, _ = bias.slopes(world)
    assert float(chances.sum()) == pytest.approx(1)
    assert sum(p * one.outcome for p, one in zip(chances, told, strict=True)) == pytest.approx(
        world.value("A", 0)
    )
    score = sum(p * g.sum(0) for p, g in zip(chances, grads, strict=True))
    assert np.abs(score).max() < 1e-12, "the mean of grad log pi is 0"


def page() -> dict[str, list[str]]:
    lines = re.findall(
        r"^\| (.*) \|$", bias.PAGE.read_text().split(bias.BEGIN)[1].split(bias.END)[0], re.MULTILINE
    )
    return {cells[0]: cells[1:] for cells in (line.split(" | ") for line in lines)}


# Fitting takes longer than all the others together.
QUICK = [row for row in bias.ROWS if row.make is not bias.fitted]


@pytest.mark.parametrize("row", QUICK, ids=lambda row: row.name)
def test_the_page_says_what_is_computed(row: Any) -> None:
    """At the smallest group size."""
    _, *numbers = bias.line(row, row.sizes[:1])
    assert [cell.split("; ")[0] for cell in page()[row.name][2:4]] == numbers


@pytest.mark.slow
def test_the_whole_table_is_the_page() -> None:
    assert bias.markdown() in bias.PAGE.read_text()


def test_every_method_and_option_of_the_page_has_its_line() -> None:
    """What the first two tables of the page list stands in the third, or in the paragraph behind
    it."""
    text = bias.PAGE.read_text()
    methods, options = (
        re.findall(r"^\| (`[^|]*) \|", part, re.MULTILINE)
        for part in text.split("| option | default |")[:2]
    )
    said = text.split("## Is the gradient right?")[1].split("## Which one?")[0]
    for name in [
        *methods,
        *(
            o
            for line in options
            if not line.startswith("`outcome`, ")
            for o in re.findall(r"`[\w-]+`", line)
        ),
    ]:
        assert name in said or f"{name[:-1]}: " in said, name
