"""The documentation site: it builds without a warning, every public name has a place in it, and it
can be read in a real browser, large and small."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import turnwise
import yaml
from axe_playwright_python.sync_playwright import Axe

ROOT = Path(__file__).parent.parent
MODULES = ("turnwise", "judges", "protocols", "learning", "judging", "running", "testing", "tools")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)], cwd=ROOT,
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def public(module: str) -> list[str]:
    path = ROOT / ("__init__.pyi" if module == "turnwise" else f"{module}.pyi")
    if module == "judges":
        return list(turnwise.judges.__all__)
    stub = ast.parse(path.read_text())
    listed = next(n.value for n in stub.body if isinstance(n, ast.Assign))
    return [name for name in ast.literal_eval(listed) if name not in ("judges", "files")]  # modules


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_place(module: str, site: Path) -> None:
    text = (site / "reference" / f"{module}.html").read_text()
    here = "turnwise" if module == "turnwise" else f"turnwise.{module}"
    known = set(re.findall(r'id="([\w.]+)"', text))
    assert [name for name in public(module) if f"{here}.{name}" not in known] == []


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    listed = set(re.findall(r"[\w/-]+\.md", text))
    assert {page for page in pages if not page.startswith("adr/0")} == listed - {"adr/0*.md"}
    assert yaml.safe_load(text)["strict"] is True


PAGES = ("index.html", "credit.html", "reference/testing.html", "coming-from-trl.html")


@pytest.mark.parametrize(
    ("width", "scheme", "pages"),
    [
        (1280, "light", PAGES),
        (390, "light", PAGES[:2]),
        (1280, "dark", PAGES[2:]),
        pytest.param(1280, "light", (), marks=pytest.mark.slow),  # all of them
        pytest.param(390, "dark", (), marks=pytest.mark.slow),
    ],
)
def test_pages_open_in_a_browser(
    width: int, scheme: str, pages: tuple[str, ...], browser: Any, served: str, site: Path
) -> None:
    pages = pages or tuple(sorted(str(p.relative_to(site)) for p in site.rglob("*.html")))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(600_000)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: None if r.url.startswith(served) else wrong.append(r.url))
    for name in pages:
        page.goto(f"{served}/{name}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        found = Axe().run(page)
        serious = [
            (v["id"], v["nodes"][0]["html"][:220])
            for v in found.response["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert not serious, f"{name}: {serious}"
    assert wrong == []
    context.close()
