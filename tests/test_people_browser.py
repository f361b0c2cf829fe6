"""Raters at work in a real browser: by mouse, by keyboard, on a phone, in the dark, with axe
looking on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import turnwise
from support.episodes import conversation
from support.rating import RUN, groups, heard, serving, study
from test_people_service import HOSTILE, PLAIN
from turnwise.plugins.human import lead, raters
from turnwise.plugins.human.desk import Desk

TASKS = ("rank", "compare", "score", "mark")


class Rater:
    """Somebody in front of a browser; what goes wrong in it is kept."""

    def __init__(
        self,
        browser: Any,
        base: str,
        ledger: turnwise.Ledger,
        name: str = "Ada",
        role: str = "rater",
        **context: Any,
    ) -> None:
        self.base, self.context = (
            base,
            browser.new_context(
                viewport=context.pop("viewport", {"width": 1280, "height": 900}), **context
            ),
        )
        # Milliseconds: a busy machine is no fault of a page's.
        self.context.set_default_timeout(600_000)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on(
            "console",
            lambda m: (
                self.wrong.append(m.text) if m.type == "error" and "htmx:" not in m.text else None
            ),
        )
        self.page.on("dialog", lambda d: (self.wrong.append("dialog"), d.dismiss()))
        self.page.on(
            "request", lambda r: None if r.url.startswith(base) else self.wrong.append(r.url)
        )
        self.page.goto(f"{base}/enter?link={raters.invite(ledger, RUN, name, role)}")
        self.go("button:has-text('Enter')")
        self.go("text=Begin")

    def go(self, what: str) -> None:
        """Clicks on what leads to another page, and waits for that."""
        with self.page.expect_navigation():
            self.page.click(what)
        self.page.wait_for_load_state()

    def send(self, how: str) -> None:
        with self.page.expect_navigation():
            (
                self.page.keyboard.press("Enter")
                if how == "keys"
                else self.page.click("button:has-text('Send') >> visible=true")
            )
        self.page.wait_for_load_state()

    def press(self, keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def checked(self) -> dict[str, str]:
        found = self.page.eval_on_selector_all(
            "#answer input:checked", "all => all.map(i => [i.name, i.value])"
        )
        return {name: value for name, value in found if value != ""}


@pytest.mark.parametrize("how", ["mouse", "keys"])
def test_every_kind_of_task(browser: Any, ledger: turnwise.Ledger, how: str) -> None:
    sources = study(ledger, *({"task": t, **PLAIN} for t in TASKS), played=groups(1, 3))
    seen = set()
    with serving(ledger) as base:
        ada = Rater(browser, base, ledger)
        page = ada.page
        while page.locator("#answer").count():
            kind = page.locator("#answer").get_attribute("data-kind")
            seen.add(kind)
            if kind == "rank":
                if how == "keys":
                    ada.press("b1a2c20")
                else:
                    for card, rank in ((0, 2), (1, 1), (2, 2)):
                        page.locator(f"[data-card='{card}'] .choices label").nth(rank - 1).click()
                    page.click("text=All of them are bad")
                expected = {"rank-0": "2", "rank-1": "1", "rank-2": "2", "all_bad": "1"}
            elif kind == "compare":
                ada.press("6") if how == "keys" else page.click("label[title='B is better']")
                expected = {"preference": "2"}
            elif kind == "score":
                if how == "keys":
                    ada.press("54")
                    page.keyboard.press("ArrowDown")
                    ada.press("2")
                else:
                    for aspect, points in (("helpful", 5), ("honest", 4), ("harmless", 2)):
                        page.locator(f"input[name='aspect-{aspect}'][value='{points}']").click()
                expected = {"aspect-helpful": "5", "aspect-honest": "4", "aspect-harmless": "2"}
            else:
                if how == "keys":
                    ada.press("gjw")
                else:
                    page.locator("[data-turn='0'] .good").click()
                    page.locator("[data-turn='1'] .wrong").click()
                expected = {"turn-0": "good", "first_wrong": "1"}
            assert ada.checked() == expected
            ada.send(how)
        assert seen == set(TASKS)
        assert "Nothing to rate" in page.inner_text("main")
        assert ada.wrong == []
        ada.context.close()
    said = heard(ledger, sources)
    marks = [a for a in said if a.stamp.source == "mark"]
    assert len(said) == 1 + 3 + 3 + 3
    assert all(a.turn_scores == (1.0, -1.0) and a.details["first_wrong"] == 1 for a in marks)  # type: ignore[union-attr]
    assert all(
        len(a.ranking) == 2 and a.details["all_bad"] for a in said if a.stamp.source == "rank"
    )  # type: ignore[union-attr]


def test_drafts_survive_a_reload_and_back_leads_to_a_correction(
    browser: Any, ledger: turnwise.Ledger
) -> None:
    study(ledger, {"task": "compare", **PLAIN, "undo": 60}, played=groups(2, 2))
    with serving(ledger) as base:
        ada = Rater(browser, base, ledger)
        page, first = ada.page, ada.page.url
        with page.expect_response(re.compile("/draft")):
            ada.press("2")
        page.keyboard.press("m")
        with page.expect_response(re.compile("/draft")):
            page.keyboard.type("because of ? and u")
        page.reload()
        assert ada.checked() == {"preference": "-2"}
        assert page.input_value("#comment") == "because of ? and u"
        ada.send("keys")
        assert page.url != first
        page.go_back()
        page.wait_for_load_state()
        assert "You have answered this" in page.inner_text("main")
        ada.press("7")
        ada.send("keys")
        assert "Your correction is saved" in page.inner_text("main")
        ada.press("u")
        page.wait_for_url(first + "*")
        assert ada.checked() == {"preference": "3"}
        ada.send("keys")
        assert [s.answer.strength for s in Desk(ledger).answers(RUN)] == [3.0]
        assert ada.wrong == []
        ada.context.close()


def test_passing_on_and_not_being_able_to_judge(browser: Any, ledger: turnwise.Ledger) -> None:
    sources = study(ledger, {"task": "compare", "raters": 2, **PLAIN}, played=groups(2, 2))
    with serving(ledger) as base:
        ada = Rater(browser, base, ledger)
        page = ada.page
        ada.press("?")
        assert page.locator("#keys").is_visible()
        page.keyboard.press("Escape")
        ada.press("s")
        page.keyboard.type("Not my field")
        ada.send("keys")
        assert "Passed on" in page.inner_text("main")
        ada.press("x")
        page.keyboard.type("cut off")
        ada.send("keys")
        assert ada.wrong == []
        ada.context.close()
    [said] = heard(ledger, sources)
    assert (said.status, said.reason) == ("abstained", "cut off")


def test_it_works_without_scripts(browser: Any, ledger: turnwise.Ledger) -> None:
    sources = study(ledger, {"task": "rank", **PLAIN}, played=groups(1, 2))
    with serving(ledger) as base:
        ada = Rater(browser, base, ledger, java_script_enabled=False)
        ada.send("mouse")
        assert "Give conversation A a rank" in ada.page.inner_text("main")
        for card in (0, 1):
            ada.page.locator(f"input[name='rank-{card}']").nth(card).check(force=True)
        ada.send("mouse")
        assert "Nothing to rate" in ada.page.inner_text("main")
        ada.context.close()
    assert len(heard(ledger, sources)) == 1


def test_hostile_conversations_do_nothing_in_a_browser(
    browser: Any, ledger: turnwise.Ledger
) -> None:
    played = {e.group: [e] for e in (conversation(HOSTILE, HOSTILE, heard=HOSTILE, id="bad"),)}
    study(ledger, {"task": "mark", **PLAIN}, played=played)
    with serving(ledger) as base:
        ada = Rater(browser, base, ledger)
        ada.page.wait_for_timeout(300)
        assert "alert(1)" in ada.page.inner_text("main"), "shown as text"
        assert (
            ada.page.locator(
                "main script, main img, main iframe, main svg, main style, main .said a"
            ).count()
            == 0
        )
        assert ada.page.url.startswith(base)
        ada.press("n")
        ada.send("keys")
        assert ada.wrong == []
        ada.context.close()


def everything(ledger: turnwise.Ledger) -> None:
    strata = {"strata": {"language": ["English", "German"]}}
    study(
        ledger,
        *({"task": t, "raters": 3, **PLAIN, **strata} for t in TASKS),
        played=groups(2, 3, turns=9),
    )


@pytest.mark.parametrize(
    ("width", "scheme"),
    [(1280, "light"), (390, "dark"), pytest.param(1280, "dark", marks=pytest.mark.slow)],
)
def test_axe_finds_nothing_and_nothing_sticks_out(
    browser: Any, ledger: turnwise.Ledger, width: int, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    everything(ledger)
    axe, found = Axe(), []
    with serving(ledger) as base:
        ada = Rater(
            browser,
            base,
            ledger,
            role="lead",
            viewport={"width": width, "height": 844},
            color_scheme=scheme,
        )
        page = ada.page

        def look(what: str) -> None:
            assert page.locator("h1").is_visible()
            for v in axe.run(page).response["violations"]:
                found.append(
                    (what, v["id"], v["impact"], [n["html"][:120] for n in v["nodes"]][:2])
                )
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (
                f"{what} sticks out"
            )

        look("me")
        ada.go("text=Go on")
        seen: set[str] = set()
        while page.locator("#answer").count() and len(seen) < 4:
            kind = str(page.locator("#answer").get_attribute("data-kind"))
            if kind not in seen:
                look(kind)
                seen.add(kind)
            ada.press({"rank": "a1b2c3", "compare": "2", "score": "345", "mark": "n"}[kind])
            ada.send("keys")
        ada.press("?")
        look("keys")
        for path in (
            "/lead",
            f"/lead/items/{Desk(ledger).answers(RUN)[0].item}",
            "/instructions",
            "/task/none",
            "/enter",
        ):
            page.goto(base + path)
            look(path)
        ada.context.close()
    assert found == []


def test_the_lead_works_in_a_browser(browser: Any, ledger: turnwise.Ledger) -> None:
    study(ledger, {"task": "compare", "raters": 2, **PLAIN}, played=groups(1, 2))
    with serving(ledger) as base:
        lea = Rater(browser, base, ledger, "Lea", "lead")
        lea.press("2")
        lea.send("keys")
        lea.page.goto(base + "/lead")
        lea.page.fill("#name", "Bo")
        lea.go("text=Make a link")
        link = lea.page.input_value("input.copy")
        bo = browser.new_context().new_page()
        bo.goto(link)
        for button in ("button:has-text('Enter')", "text=Begin"):
            with bo.expect_navigation():
                bo.click(button)
        bo.wait_for_load_state()
        bo.keyboard.press("6")
        with bo.expect_navigation():
            bo.keyboard.press("Enter")
        lea.page.goto(base + "/lead")
        with lea.page.expect_download() as file:
            lea.page.click("text=Download all")
        assert len(Path(file.value.path()).read_text().splitlines()) == 2
        lea.go("tr:has-text('Bo') button:has-text('Pause')")
        bo.goto(base)
        assert "paused" in bo.inner_text("main")
        assert lea.wrong == []
        lea.context.close()
        bo.context.close()
    assert lead.overview(ledger, RUN)["answers"] == 2


ARROWS = ("ArrowDown", "ArrowUp", "ArrowLeft", "ArrowRight")


def test_after_a_click_the_keys_do_what_their_list_says(
    browser: Any, ledger: turnwise.Ledger
) -> None:
    """Mouse and keys mixed, on all four tasks: an arrow moves and never changes an answer, whatever
    was clicked before."""
    study(ledger, *({"task": t, **PLAIN} for t in TASKS), played=groups(1, 2, turns=3))
    seen = set()
    with serving(ledger) as base:
        ada = Rater(browser, base, ledger)
        page = ada.page

        def only(expected: dict[str, str]) -> None:
            assert ada.checked() == expected

        while page.locator("#answer").count():
            kind = str(page.locator("#answer").get_attribute("data-kind"))
            if kind in seen:
                ada.press({"rank": "a1b2", "compare": "2", "score": "345", "mark": "n"}[kind])
                ada.send("keys")
                continue
            seen.add(kind)
            for after_an_error in (True, False):
                if after_an_error:
                    ada.send("keys")
                    assert page.locator("#problem").is_visible()
                    for key in ARROWS:
                        page.keyboard.press(key)
                    only({})
                if kind == "rank":
                    page.locator("[data-card='0'] .choices label").nth(0).click()
                    page.keyboard.press("ArrowRight")
                    only({"rank-0": "1"} if after_an_error else {"rank-0": "1", "rank-1": "1"})
                    ada.press("2")
                    only({"rank-0": "1", "rank-1": "2"})
                    page.locator("[data-card='1'] .choices label").nth(0).click()
                    page.keyboard.press("ArrowUp")
                    ada.press("2")
                    only({"rank-0": "2", "rank-1": "1"})
                elif kind == "compare":
                    page.click("label[title='B is better']")
                    for key in ARROWS:
                        page.keyboard.press(key)
                    only({"preference": "2"})
                elif kind == "score":
                    page.locator("input[name='aspect-helpful'][value='4']").click()
                    page.keyboard.press("ArrowDown")
                    only(
                        {"aspect-helpful": "4"}
                        if after_an_error
                        else {"aspect-helpful": "4", "aspect-honest": "3"}
                    )
                    ada.press("3")
                    only({"aspect-helpful": "4", "aspect-honest": "3"})
                    page.locator("input[name='aspect-helpful'][value='4']").click()
                    for key in ("ArrowLeft", "ArrowRight"):
                        page.keyboard.press(key)
                    only({"aspect-helpful": "4", "aspect-honest": "3"})
                else:
                    page.locator("[data-turn='0'] .good").click()
                    page.keyboard.press("ArrowDown")
                    ada.press("b")
                    only(
                        {"turn-0": "good", "turn-1": "bad"}
                        | ({} if after_an_error else {"first_wrong": "2"})
                    )
                    page.locator("[data-turn='2'] .wrong").click()
                    page.keyboard.press("ArrowUp")
                    page.keyboard.press("ArrowLeft")
                    only({"turn-0": "good", "turn-1": "bad", "first_wrong": "2"})
            if kind == "score":
                page.locator("input[name='aspect-harmless'][value='1']").click()
            ada.send("keys")
        assert seen == set(TASKS)
        assert ada.wrong == []
        ada.context.close()
