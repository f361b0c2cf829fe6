"""`turnwise new`: what it writes passes its own tests, is typed, and becomes a wheel that a run
uses; the version of the plugin API, and the trace of its hooks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import turnwise
from support.command import Command
from turnwise.engine.cli.new import Kind, package
from turnwise.engine.hookspecs import VERSION

ROOT = Path(__file__).parent.parent


def write(folder: Path, kind: Kind, name: str) -> Path:
    for path, text in package(kind, name).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def lay_metadata(folder: Path, name: str) -> str:
    """Lays metadata next to a package's code, as an installation does; returns where that is."""
    found = folder / "src" / f"{name.replace('-', '_')}-0.1.0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    own = tomllib.loads((folder / "pyproject.toml").read_text())
    points = own["project"]["entry-points"]["turnwise"]
    lines = "".join(f"{key} = {value}\n" for key, value in points.items())
    (found / "entry_points.txt").write_text(f"[turnwise]\n{lines}")
    return str(folder / "src")


def test_new_packages_pass_their_own_tests_and_the_linters(tmp_path: Path) -> None:
    """All kinds at once: most of a test's seconds are imports."""
    names = [f"acme-{kind.value}" for kind in Kind]
    for name, kind in zip(names, Kind, strict=True):
        write(tmp_path / name, kind, name)
    path = os.pathsep.join(lay_metadata(tmp_path / name, name) for name in names)

    def run(folder: Path, *command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True,
            check=False, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    said = run(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib")
    passed = re.search(r"(\d+) passed", said)
    assert passed
    assert int(passed[1]) >= 2 * len(names)
    for folder in (tmp_path / name for name in names):
        (folder / "ruff.toml").write_text("line-length = 100\n")
        run(folder, "ruff", "check", "--select", "E,F,I,UP,B", ".")
        run(folder, "ruff", "format", "--check", ".")
    files = [p for p in tmp_path.rglob("*") if p.suffix in (".py", ".md", ".toml", ".yml")]
    assert not re.search(r"<[A-Z]+>", "".join(path.read_text() for path in files))


@pytest.mark.slow
def test_from_a_new_judge_to_a_wheel_that_a_run_uses(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The commands of docs/publish-a-plugin.md, in a venv that has what Turnwise needs."""
    done = Command("new", "judge", "acme-polite", cwd=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "acme-polite"
    run = lambda *command: subprocess.run(  # noqa: E731
        command, cwd=folder, check=True, capture_output=True, text=True
    )
    run(sys.executable, "-m", "build", "--wheel")
    [wheel] = (folder / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])").stdout.strip()
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    Path(site, "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    run(python, "-m", "pip", "install", "--no-deps", str(wheel))
    config = tmp_path / "pipeline.yaml"
    config.write_text(f"""
policy: {model_folder()}
threads: 1
stages:
  - rl: {{env: turnwise/SupportDesk-v0, updates: 1, groups: 2, group_size: 2, max_new_tokens: 6,
         feedback: [environment, {{judge: acme-polite, words: [a], weight: 0.2}}]}}
""")
    done = subprocess.run(
        [python, "-m", "turnwise", "run", str(config)], cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 4), done.stderr
    past = turnwise.PastRun(tmp_path / "runs" / "pipeline")
    answers = past.ledger.feedback(run=past.id, sources=["acme-polite"])
    assert len(answers) == 4


@pytest.mark.parametrize("name", ["Acme", "a b", "-x", "acme--x", "1st"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    done = Command("new", "judge", "--folder", str(tmp_path / "x"), "--", name).wait()
    assert (done.returncode, "small letters" in done.stderr) == (1, True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [("class", "a word of Python"), ("none", "a word of Python"), ("json", "would hide"),
     ("turnwise", "would hide"), ("length", "there is a judge of this name")],
)  # fmt: skip
def test_names_that_are_taken(name: str, why: str, tmp_path: Path) -> None:
    done = Command("new", "judge", name, cwd=tmp_path).wait()
    assert (done.returncode, why in done.stderr) == (1, True), done.stderr
    assert not (tmp_path / name).exists()


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    done = Command("new", "judge", "acme-x", "--folder", str(tmp_path)).wait()
    assert (done.returncode, "is there already" in done.stderr) == (1, True)
    wrong = Command("new", "juge", "acme-x", cwd=tmp_path).wait()
    assert (wrong.returncode, "judge" in wrong.stderr) == (2, True)


def plugin(**names: object) -> ModuleType:
    made = ModuleType("made")

    @turnwise.hookimpl
    def register_judges(register: Callable[..., None]) -> None:
        register("made-judge", "builtins:dict")

    vars(made).update({"register_judges": register_judges, **names})
    return made


def test_a_plugin_of_a_later_api_does_not_load() -> None:
    turnwise.Plugins({"made": plugin(TURNWISE_API=VERSION)})
    turnwise.Plugins({"made": plugin()})
    for wrong in (VERSION + 1, "2"):
        with pytest.raises(turnwise.PluginError, match="written for version .* of the plugin API"):
            turnwise.Plugins({"made": plugin(TURNWISE_API=wrong)})


def test_hooks_are_traced_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turnwise.Plugins({"made": plugin()})
    assert "hook" not in capsys.readouterr().err
    monkeypatch.setenv("TURNWISE_TRACE_HOOKS", "1")
    turnwise.Plugins({"made": plugin()})
    assert "turnwise: hook register_judges(register) calls made" in capsys.readouterr().err
