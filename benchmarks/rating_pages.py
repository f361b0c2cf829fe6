"""Pictures of every page of the rating service, at the width of a desk and of a phone.

    python benchmarks/rating_pages.py [docs/figures/rating]

Plays SupportDesk with scripted players, asks six simulated people about it (one clicks whatever
stands left, one guesses), and takes the pictures in Chromium. Nothing of it is a measurement.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import turnwise
from PIL import Image
from turnwise.engine.rollout.conversation import Where
from turnwise.engine.rollout.players import ScriptPlayer
from turnwise.engine.rollout.rollout import rollout
from turnwise.plugins.human import lead, raters
from turnwise.plugins.human.desk import Desk

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.browsers import chromium
from support.rating import RUN, next_task, person, serving, study

INSTRUCTIONS = """
You read conversations between a shop's **assistant** and a person who writes to it.

1. Ask yourself what the person needed, and whether they got it.
2. A good assistant asks only for what it does not know yet. Asking again for what was said \
already is bad.
3. Length, politeness and formatting do not matter by themselves.

> If you cannot tell, say *Cannot judge*. That is an answer too.
"""
ASK = {
    "gold_share": 0.0,
    "undo": 0.0,
    "instructions": INSTRUCTIONS,
    "strata": {"language": ["English", "German"]},
}


def fill(task: Any, name: str, rng: random.Random) -> dict[str, str]:
    """What a simulated rater says: by the environment's return with some noise, but for those who
    do not look."""
    worth = [e.env_return + rng.gauss(0, 0.35) for e in task.shown]
    kind = task.study["task"]
    if name == "Bo":  # always what stands first
        worth = [-float(i) for i in range(len(worth))]
    if name == "Cy":
        rng.shuffle(worth)
    if kind == "rank":
        return {
            f"rank-{i}": str(1 + sum(other > w for other in worth)) for i, w in enumerate(worth)
        }
    if kind == "compare":
        return {"preference": str(max(-3, min(3, round(3 * (worth[1] - worth[0])))))}
    if kind == "score":
        return {
            f"aspect-{a}": str(max(1, min(5, round(1 + 4 * worth[0] + rng.gauss(0, 0.5)))))
            for a in task.study["aspects"]
        }
    return {
        "first_wrong": "none" if worth[0] > 0.6 else str(rng.randrange(len(task.shown[0].turns)))
    }


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    turnwise.Plugins()
    starts = turnwise.starts("turnwise/SupportDesk-v0", 11, 12)
    played: dict[str, list[turnwise.Episode]] = {}
    for slot, name in enumerate(("demonstrator", "expert", "random", "demonstrator")):
        for e in rollout(ScriptPlayer(name), [(s, slot) for s in starts], Where(RUN, "rl", 1, 4)):
            played.setdefault(e.group, []).append(e)
    rng, now = random.Random(0), [1_790_000_000.0]
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        ledger = turnwise.Ledger(Path(folder) / "ledger.sqlite", clock=lambda: now[0])
        study(
            ledger,
            *(
                {"task": t, "raters": 4, **ASK, **({"pairs": 2} if t == "compare" else {})}
                for t in ("rank", "compare", "score", "mark")
            ),
            played=played,
        )
        desk = Desk(ledger, rng)
        for n, name in enumerate(("Ada", "Bo", "Cy", "Dagny", "Emre", "Fatou")):
            rater = person(ledger, name)
            raters.declare(ledger, rater, {"language": ("English", "German")[n % 2]})
            for _ in range(46):
                task = next_task(desk, rater)
                if task is None:
                    break
                now[0] += rng.uniform(8, 40) if name != "Bo" else 2
                desk.answer(task.id, rater, fill(task, name, rng))
        with serving(ledger) as base:
            for width, scheme in ((1280, "light"), (390, "light"), (1280, "dark")):
                shoot(browser, base, ledger, out, width, scheme)
        ledger.close()


def shoot(
    browser: Any, base: str, ledger: turnwise.Ledger, out: Path, width: int, scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 860 if width > 600 else 844},
        color_scheme=scheme,
        device_scale_factor=1,
    )
    page = context.new_page()
    where = {(1280, "light"): "desk", (390, "light"): "phone", (1280, "dark"): "dark"}[
        width, scheme
    ]

    def look(name: str) -> None:
        page.wait_for_load_state()
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(250)
        path = out / f"{name}-{where}.png"
        page.screenshot(path=path, full_page=where == "phone" and name != "keys")
        Image.open(path).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(
            path, optimize=True
        )

    def click(what: str) -> None:
        with page.expect_navigation():
            page.click(what)

    page.goto(f"{base}/enter?link={raters.invite(ledger, RUN, f'Lea {where}', 'lead')}")
    if where != "dark":
        look("enter")
    click("button:has-text('Enter')")
    if where != "dark":
        look("instructions")
    click("text=Begin")
    if where != "dark":
        look("about-you")
    click("text=Go on")
    seen: set[str] = set()
    while page.locator("#answer").count() and len(seen) < 4:
        kind = str(page.locator("#answer").get_attribute("data-kind"))
        if kind not in seen and (where != "dark" or kind == "rank"):
            for key in {"rank": "b2a1c", "compare": "3", "score": "54", "mark": "gj"}[kind]:
                page.keyboard.press(key)
            look(kind)
            if kind == "rank" and where == "desk":
                page.keyboard.press("?")
                look("keys")
                page.keyboard.press("Escape")
        seen.add(kind)
        for key in {"rank": "a1b2c3d4", "compare": "3", "score": "545", "mark": "n"}[kind]:
            page.keyboard.press(key)
        with page.expect_navigation():
            page.keyboard.press("Enter")
        page.wait_for_load_state()
    page.goto(f"{base}/lead")
    look("lead")
    if where != "dark":
        page.locator("main a[href^='/lead/items/']").first.click()
        page.wait_for_load_state()
        look("item")
        for source in ("rank", "compare", "score", "mark"):
            lead.pause(ledger, RUN, source, True)
        page.goto(base)
        look("nothing-to-rate")
        for source in ("rank", "compare", "score", "mark"):
            lead.pause(ledger, RUN, source, False)
    context.close()


if __name__ == "__main__":
    main(
        Path(sys.argv[1])
        if len(sys.argv) > 1
        else Path(__file__).parents[1] / "docs" / "figures" / "rating"
    )
