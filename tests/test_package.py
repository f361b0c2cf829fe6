"""What is published: a source distribution and a wheel that are whole, and say what they are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distributions, made of what git knows."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT,
                            capture_output=True, check=True).stdout  # fmt: skip
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith("runs/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)], cwd=copy,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def test_the_wheel_is_whole(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = message_from_string(
            archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        )
    packaged = {n.removeprefix("turnwise/") for n in names if n.startswith("turnwise/")}
    ours = [p for part in ("engine", "envs", "judges", "plugins") for p in (ROOT / part).rglob("*")]
    here = {
        str(path.relative_to(ROOT))
        for path in ours
        if path.is_file() and "__pycache__" not in path.parts
    }
    here |= {path.name for pattern in ("*.py", "*.pyi", "py.typed") for path in ROOT.glob(pattern)}
    assert here - packaged == set()  # code, types, templates, pages
    assert {n.split("/")[0] for n in packaged} <= {n.split("/")[0] for n in here}  # no tests
    assert metadata["Name"] == "turnwise"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert "judges" in metadata.get_all("Provides-Extra", [])


def test_every_extra_is_explained(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("METADATA"))
        extras = message_from_string(archive.read(name).decode()).get_all("Provides-Extra", [])
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    explained = [extra for row in rows for extra in re.findall(r"`([\w-]+)`", row)]
    assert sorted(explained) == sorted(extras)


def test_the_source_distribution_has_what_its_tests_need(built: Path) -> None:
    [source] = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed_there = (
        "pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "mkdocs.yml",
        "tests/conftest.py", "tests/support/clock.py", "docs/index.md", "examples/tools.py",
        "benchmarks/shop.py", "engine/cli/packages/test.yml",
    )  # fmt: skip
    for needed in needed_there:
        assert needed in names, needed


def test_the_index_takes_both(built: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def run_in(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def installed(source: Path, folder: Path) -> str:
    """Installs Turnwise in a venv of its own, beside the packages that are here; returns the
    venv's Python."""
    assert run_in(folder, sys.executable, "-m", "venv", "v").returncode == 0
    python = str(folder / "v" / "bin" / "python")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    [site] = (folder / "v" / "lib").glob("python*/site-packages")
    (site / "ours.pth").write_text(f"{ours}\n")
    done = run_in(folder, python, "-m", "pip", "install", "-q", "--no-deps", str(source))
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.slow
def test_types_reach_a_user_of_a_clone(tmp_path: Path) -> None:
    """After the install that README names."""
    clone = tmp_path / "clone"
    assert run_in(tmp_path, "git", "clone", "-q", str(ROOT), str(clone)).returncode == 0
    python = installed(clone, tmp_path)
    (tmp_path / "user.py").write_text(
        "import turnwise\n\nrun = turnwise.PastRun('x')\nreveal_type(run.metrics)\nrun.metrcs\n"
        "turnwise.train('m', 'e', updates='3')\nturnwise.Feedback('e', scor=1)\n"
    )
    done = run_in(tmp_path, python, "-m", "mypy", "user.py")
    assert 'Revealed type is "list[dict[str, Any]]"' in done.stdout
    assert 'has no attribute "metrcs"' in done.stdout
    assert "Found 3 errors" in done.stdout, done.stdout
    for example in (ROOT / "examples").glob("*.py"):
        (tmp_path / example.name).write_bytes(example.read_bytes())
    if run_in(tmp_path, python, "-m", "pip", "install", "-q", "basedpyright").returncode:
        pytest.skip("basedpyright cannot be had")
    mode = {"typeCheckingMode": "standard", "exclude": ["clone", "v"]}  # pyright's own default
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(mode))
    done = run_in(tmp_path, python, "-m", "basedpyright", "--outputjson", "--pythonpath", python)
    checked = json.loads(done.stdout)
    found = [(Path(d["file"]).name, d["rule"]) for d in checked["generalDiagnostics"]
             if d["severity"] == "error"]  # fmt: skip
    assert found == [
        ("user.py", "reportAttributeAccessIssue"),
        ("user.py", "reportArgumentType"),
        ("user.py", "reportCallIssue"),
    ]


@pytest.mark.slow
def test_the_source_distribution_installs_and_passes_its_tests(built: Path, tmp_path: Path) -> None:
    [source] = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    python = installed(source, tmp_path)
    files = [
        f"tests/test_{name}.py"
        for name in ("tensors", "credit_methods", "ledger", "plugins", "sft", "testing")
    ]
    [root] = tmp_path.glob("turnwise-*")
    done = run_in(root, python, "-m", "pytest", "-q", "-m", "not slow", *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    shown = run_in(tmp_path, python, "-c", "import turnwise; print(turnwise.__file__)").stdout
    assert shown.startswith(str(tmp_path / "v")), "what was tested is what was installed"
