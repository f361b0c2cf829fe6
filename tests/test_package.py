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


@pytest.mark.slow
def test_types_reach_a_user_of_a_clone(tmp_path: Path) -> None:
    """The install that README names for type checkers."""
    run = lambda *command: subprocess.run(  # noqa: E731
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    clone = tmp_path / "clone"
    assert run("git", "clone", "-q", str(ROOT), str(clone)).returncode == 0
    assert run(sys.executable, "-m", "venv", "v").returncode == 0
    python = str(tmp_path / "v" / "bin" / "python")
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])").stdout.strip()
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    Path(site, "ours.pth").write_text(f"{ours}\n")
    done = run(python, "-m", "pip", "install", "-q", "--no-deps", str(clone))
    assert done.returncode == 0, done.stderr
    (tmp_path / "user.py").write_text(
        "import turnwise\n\nrun = turnwise.PastRun('x')\nreveal_type(run.metrics)\nrun.metrcs\n"
        "turnwise.train('m', 'e', updates='3')\nturnwise.Feedback('e', scor=1)\n"
    )
    done = run(python, "-m", "mypy", "user.py")
    assert 'Revealed type is "list[dict[str, Any]]"' in done.stdout
    assert 'has no attribute "metrcs"' in done.stdout
    assert "Found 3 errors" in done.stdout, done.stdout
    for example in (ROOT / "examples").glob("*.py"):
        (tmp_path / example.name).write_bytes(example.read_bytes())
    if run(python, "-m", "pip", "install", "-q", "basedpyright").returncode:
        pytest.skip("basedpyright cannot be had")
    mode = {"typeCheckingMode": "standard", "exclude": ["clone", "v"]}  # pyright's own default
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(mode))
    done = run(python, "-m", "basedpyright", "--outputjson", "--pythonpath", python)
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
    run = lambda *command: subprocess.run(  # noqa: E731
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    [source] = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    assert run(sys.executable, "-m", "venv", "v").returncode == 0
    python = str(tmp_path / "v" / "bin" / "python")
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])").stdout.strip()
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    Path(site, "ours.pth").write_text(f"{ours}\n")
    done = run(python, "-m", "pip", "install", "-q", "--no-deps", str(source))
    assert done.returncode == 0, done.stderr
    files = [
        f"tests/test_{name}.py"
        for name in ("tensors", "credit_methods", "ledger", "plugins", "sft", "testing")
    ]
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-m", "not slow", *files], capture_output=True, text=True,
        check=False, cwd=next(tmp_path.glob("turnwise-*")),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    shown = run(python, "-c", "import turnwise; print(turnwise.__file__)").stdout
    assert shown.startswith(site), "what was tested is what was installed"
