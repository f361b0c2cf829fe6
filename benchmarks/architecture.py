"""Draws the picture of docs/architecture.md: floors, rooms, and who imports whom, as the source
tree has it.

Floors and imports are those that `tests/test_architecture.py` works with, the names of the floors
those of the page's table. Every import between rooms is in the picture's metadata; the arrows are
the transitive reduction of them. `python benchmarks/architecture.py` writes the file, and a test
compares the file with what this script would write.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterable
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_architecture import FLOORS, HOUSE, graph, imports, modules  # noqa: E402

FIGURE = ROOT / "docs" / "figures" / "architecture.svg"
PAGE = ROOT / "docs" / "architecture.md"
PUBLIC = ("protocols", "learning", "judging", "running", "tools")
GUESTS = tuple(part for part in HOUSE if part != "engine")

WIDTH, TOP, PITCH, BOX = 900, 46, 54, 32
# Left and right edge of each room: those that arrows join stand one above the other.
PLACE = {
    "errors": (180, 566), "tensors": (98, 170), "util": (180, 566), "records": (180, 566),
    "policy": (98, 206), "environments": (214, 338), "ledger": (346, 451),
    "analysis": (461, 566), "protocols": (98, 451), "hookspecs": (346, 451),
    "exchange": (461, 566), "rollout": (214, 338), "pipeline": (346, 451),
    "feedback": (346, 451), "stages": (214, 566), "report": (346, 451), "testing": (461, 566),
    "train": (214, 338), "chat": (346, 451), "cli": (346, 451),
}  # fmt: skip
STYLE = """
text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.name { font-weight: 600; text-anchor: middle; }
.floor { font-size: 13px; fill: #57606a; }
.small { font-size: 12.5px; fill: #424a53; }
.head { font-size: 13px; font-weight: 600; }
.page { fill: #ffffff; stroke: #d0d7de; }
.band { fill: #f3f5f8; }
.room rect { fill: #ffffff; stroke: #5a6b7b; stroke-width: 1.2; }
.public rect { fill: #e3eefb; stroke: #1f6fb4; stroke-width: 1.2; }
.guest text { font-size: 13px; }
.guest rect { fill: #fdeedd; stroke: #b4590b; stroke-width: 1.2; }
.arrow, .bus { fill: none; stroke: #424a53; stroke-width: 1.4; }
.head-of-arrow, .dot { fill: #424a53; }
.bus { stroke: #b4590b; }
.dot { fill: #b4590b; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; }
.floor { fill: #9da7b3; }
.small { fill: #c3ccd6; }
.page { fill: #0d1117; stroke: #30363d; }
.band { fill: #171d26; }
.room rect { fill: #0d1117; stroke: #8b98a5; }
.public rect { fill: #10263d; stroke: #58a6ff; }
.guest rect { fill: #33210f; stroke: #f0a35e; }
.arrow { stroke: #b6c1cc; }
.head-of-arrow { fill: #b6c1cc; }
.bus { stroke: #f0a35e; }
.dot { fill: #f0a35e; }
}
"""


def room(name: str) -> str:
    """Returns the room of a module of the engine; of any other module, its part of the house."""
    first, *more = name.split(".")
    return more[0] if first == "engine" and more else first


def edges() -> list[tuple[str, str]]:
    """Returns imports between the rooms of the engine, and of its rooms from other parts."""
    found = {
        (room(name), room(target))
        for name, targets in graph().items()
        for target in targets
        if target.startswith("engine.")
    }
    return sorted((a, b) for a, b in found if a != b)


def opened() -> dict[str, list[str]]:
    """Maps each public module to the rooms whose names it gives away, by its stub."""
    known = modules()
    return {
        name: sorted({room(t) for t in imports(name, (ROOT / f"{name}.pyi").read_text(), known)})
        for name in PUBLIC
    }


def used() -> dict[str, list[str]]:
    """Maps each part that stands on the engine to the public modules that it imports."""
    found: dict[str, set[str]] = {part: set() for part in GUESTS}
    for name, path in modules().items():
        if (part := name.split(".")[0]) in found:
            package = path.name == "__init__.py"
            found[part] |= imports(name, path.read_text(), PUBLIC, package=package)
    return {part: [name for name in PUBLIC if name in names] for part, names in found.items()}


def drawn(all_edges: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the edges that no way over other rooms stands for (the transitive reduction)."""
    to: dict[str, set[str]] = {}
    for a, b in all_edges:
        to.setdefault(a, set()).add(b)

    def beyond(start: str) -> set[str]:
        return set().union(*({b} | beyond(b) for b in to.get(start, ())))

    return [
        (a, b) for a in sorted(to) for b in sorted(to[a]) if not any(b in beyond(c) for c in to[a])
    ]


def floors() -> list[tuple[str, list[str]]]:
    """Returns the floors as the page names them, from the ground up, with their rooms.

    Raises:
        ValueError: the table's rooms are not those of the engine.
    """
    table = PAGE.read_text().split("| floor | rooms |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([a-z ]+) \| ([^|]+) \|", table, re.MULTILINE)
    found = [(name, re.findall(r"`(\w+)/?`", rooms)) for name, rooms in rows]
    named = sorted(each for _, rooms in found for each in rooms)
    if named != sorted(each for floor in FLOORS for each in floor):
        raise ValueError(f"docs/architecture.md names other rooms than there are: {named}")
    return found


LEVEL = {each: level for level, floor in enumerate(FLOORS) for each in floor}


def top(level: float) -> float:
    """Returns the upper edge of the boxes of a level; 0 is the ground."""
    return TOP + (len(FLOORS) - 1 - level) * PITCH


def box(kind: str, name: str, left: float, right: float, y: float, title: str) -> str:
    label = name + "/" if (ROOT / "engine" / name).is_dir() or kind == "guest" else name
    return (
        f'<g class="{kind}" id="{kind}-{name}"><title>{escape(title)}</title>'
        f'<rect x="{left}" y="{y:g}" width="{right - left}" height="{BOX}" rx="5"/>'
        f'<text class="name" x="{(left + right) / 2:g}" y="{y + BOX / 2 + 5:g}">{label}</text></g>'
    )


def text(kind: str, x: float, y: float, *lines: str, pitch: int = 16) -> str:
    return "".join(
        f'<text class="{kind}" x="{x:g}" y="{y + i * pitch:g}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    )


def arrow(a: str, b: str) -> str:
    """Draws an arrow down from room to room: straight where one stands above the other."""
    low, high = max(PLACE[a][0], PLACE[b][0]), min(PLACE[a][1], PLACE[b][1])
    start, end = top(LEVEL[a]) + BOX, top(LEVEL[b]) - 7
    if low < high:
        x = (low + high) / 2
        way = f"M{x:g} {start:g}V{end:g}"
    else:
        x, middle = sum(PLACE[b]) / 2, (start + end) / 2
        way = f"M{sum(PLACE[a]) / 2:g} {start:g}C{sum(PLACE[a]) / 2:g} {middle:g} {x:g} "
        way += f"{middle:g} {x:g} {end:g}"
    return (
        f'<g id="{a}-to-{b}"><path class="arrow" d="{way}"/>'
        f'<path class="head-of-arrow" d="M{x - 4.5:g} {end:g}h9l-4.5 7z"/></g>'
    )


def engine(all_edges: list[tuple[str, str]]) -> list[str]:
    parts = []
    for name, rooms in floors():
        levels = [LEVEL[each] for each in rooms]
        y, below = top(max(levels)) - 11, top(min(levels)) + PITCH - 11
        height = below - y - 4
        parts.append(
            f'<rect class="band" x="8" y="{y + 2:g}" width="570" height="{height:g}" rx="6"/>'
        )
        parts.append(text("floor", 18, (y + below) / 2 + 5, name))
    parts += [arrow(a, b) for a, b in drawn(all_edges) if a in LEVEL]
    for each in sorted(LEVEL, key=lambda name: (-LEVEL[name], PLACE[name])):
        targets = [b for a, b in all_edges if a == each]
        title = f"{each} imports {', '.join(targets) or 'no other room'}"
        parts.append(box("room", each, *PLACE[each], top(LEVEL[each]), title))
    return parts


def outside() -> list[str]:
    """Draws the parts that stand on the engine, the public modules, and who uses which."""
    parts, uses, rooms = [], used(), opened()
    least_first = sorted(GUESTS, key=lambda part: len(uses[part]))
    at = {part: 726 + 67 * i for i, part in enumerate(least_first)}
    rows = {name: TOP + 56 + 84 * i for i, name in enumerate(PUBLIC)}
    for part, x in at.items():
        lowest = max(rows[name] for name in uses[part]) + BOX / 2
        parts.append(f'<path class="bus" d="M{x} {TOP + BOX}V{lowest:g}"/>')
        for name in uses[part]:
            parts.append(f'<circle class="dot" cx="{x}" cy="{rows[name] + BOX / 2:g}" r="4.5"/>')
    for name, y in rows.items():
        far = max(at[part] for part in GUESTS if name in uses[part])
        parts.insert(0, f'<path class="bus" d="M690 {y + BOX / 2:g}H{far}"/>')
        parts.append(box("public", name, 594, 690, y, f"{name} opens {', '.join(rooms[name])}"))
        lines = textwrap.wrap(", ".join(rooms[name]), 25)
        parts.append(text("small", 596, y + BOX + 14, *lines, pitch=15))
    for part, x in at.items():
        title = f"{part} imports {', '.join(uses[part])}"
        parts.append(box("guest", part, x - 31, x + 31, TOP, title))
    parts.append(text("head", 594, TOP + 12, "public", "modules"))
    return parts


def legend(all_edges: list[tuple[str, str]]) -> list[str]:
    within = [edge for edge in all_edges if edge[0] in LEVEL]
    y = top(3) - 34
    paragraphs = (
        "An arrow: the upper room imports the lower one, at the top of a file, for types or in a"
        f" function. {len(within)} pairs do so. {len(drawn(within))} are drawn: along them every"
        " room leads to all that it imports.",
        "A dot: the part above imports from that public module (turnwise.protocols and so on)."
        " Below each module: the rooms whose names it gives.",
        "The engine imports nothing on this side. It finds these parts, and anybody else's,"
        " through entry points and hooks.",
    )
    lines = [line for each in paragraphs for line in (*textwrap.wrap(each, 44), "")]
    return [text("small", 594, y, *lines)]


def metadata() -> dict[str, object]:
    """Returns what the picture shows, as data, with all imports."""
    return {
        "floors": [list(floor) for floor in FLOORS],
        "imports": [list(edge) for edge in edges()],
        "public": opened(),
        "uses": used(),
    }


def picture() -> str:
    """Returns the SVG's text."""
    all_edges = edges()
    height = int(top(0) + BOX + 16)
    told = escape(json.dumps(metadata()), quote=False)
    title = "The rooms of Turnwise's engine on their floors, and who imports whom"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
        f' height="{height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<metadata>{told}</metadata>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        text("head", 18, 24, "engine/"),
        *engine(all_edges),
        *outside(),
        *legend(all_edges),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    FIGURE.write_text(picture())
    print(f"wrote {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
