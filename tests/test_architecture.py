"""The house keeps its rules: floors, import names, the package list, light imports, documented
hooks."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import turnwise
from support.scripts import benchmark
from turnwise.engine import hookspecs

ROOT = Path(__file__).parents[1]
HOUSE = ("engine", "envs", "judges", "plugins")
# The rooms of `engine/`, from the ground up: a room imports from lower floors only. Rooms on one
# floor do not know one another.
FLOORS = (
    ("errors",),
    ("tensors",),
    ("util",),
    ("records",),
    ("environments", "policy", "ledger", "analysis"),
    ("protocols",),
    ("hookspecs",),
    ("exchange", "rollout"),
    ("pipeline",),
    ("feedback",),
    ("stages",),
    ("report", "testing"),
    ("train",),
    ("cli",),
)


def modules() -> dict[str, Path]:
    found = {}
    for part in HOUSE:
        for path in sorted((ROOT / part).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@lru_cache(None)
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def imports(name: str, text: str, known: Collection[str], *, package: bool = False) -> set[str]:
    """Turnwise modules that a module imports, as dotted names below the root, wherever the import
    stands: at the top, in a TYPE_CHECKING block, in a function."""
    parts = name.split(".")
    here = parts if package else parts[:-1]
    found = set()
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                whole = f"{target}.{alias.name}".strip(".")
                found.add(whole if whole in known else target)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            assert not any(n.split(".")[0] == "turnwise" for n in names), (
                f"{name} imports turnwise absolutely"
            )
    return found & set(known)


def graph(planted: Mapping[str, str] | None = None) -> dict[str, set[str]]:
    """What every module imports.

    Args:
        planted: lines to add to the text of modules, to see a rule broken.
    """
    known = modules()
    return {
        name: (
            imports(
                name,
                path.read_text() + (planted or {}).get(name, ""),
                known,
                package=path.name == "__init__.py",
            )
            - {name}
        )
        for name, path in known.items()
    }


def climbs(found: Mapping[str, set[str]]) -> list[str]:
    """Imports within the engine that do not go down."""
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    within = [
        (n.split("."), t.split("."))
        for n, targets in found.items()
        for t in targets
        if n[:7] == t[:7] == "engine."
    ]
    return sorted(
        f"{'.'.join(n)} -> {'.'.join(t)}"
        for n, t in within
        if n[1] != t[1] and floor[t[1]] >= floor[n[1]]
    )


def circles(found: Mapping[str, set[str]]) -> list[str]:
    """Ways that lead from a module through its imports back to it."""
    done: set[str] = set()
    seen: list[str] = []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            seen.append(" -> ".join([*trail[trail.index(name) :], name]))
            return
        if name in done:
            return
        for target in sorted(found[name]):
            if not name.startswith(target + "."):  # a package is there before its parts
                visit(target, (*trail, name))
        done.add(name)

    for name in found:
        visit(name, ())
    return seen


def test_rooms_know_lower_rooms_only() -> None:
    assert climbs(graph()) == []
    rooms = {
        path.name.removesuffix(".py")
        for path in (ROOT / "engine").iterdir()
        if path.suffix in ("", ".py")
    }
    assert rooms - {"__init__", "__pycache__"} == {room for floor in FLOORS for room in floor}
    assert len(rooms - {"__init__", "__pycache__"}) <= 19, "as many as one may keep in mind"


PLACES = (
    "\nfrom {} import run\n",
    "\nif TYPE_CHECKING:\n    from {} import run\n",
    "\ndef f():\n    from {} import run\n",
)


@pytest.mark.parametrize("place", PLACES, ids=["top", "types", "function"])
def test_a_rule_that_is_broken_shows(place: str) -> None:
    """One import planted in each of the three places where imports stand."""
    assert climbs(graph({"engine.ledger.rows": place.format("..pipeline")})) == [
        "engine.ledger.rows -> engine.pipeline.run"
    ]
    found = circles(graph({"engine.pipeline.resume": place.format(".")}))
    assert len(found) == 1
    assert "engine.pipeline.resume" in found[0]
    assert foreign(graph({"judges.simulated": place.format("..plugins")})) == [
        "judges.simulated -> plugins"
    ]


def foreign(found: Mapping[str, set[str]]) -> list[str]:
    """Imports of another of the four parts of the house than the engine."""
    pairs = [
        (n, t, n.split(".")[0], t.split(".")[0]) for n, targets in found.items() for t in targets
    ]
    return sorted(
        f"{n} -> {t}"
        for n, t, own, other in pairs
        if other not in ("engine", own) or (own == "engine") > (other == "engine")
    )


def test_the_engine_knows_no_plugin_and_plugins_not_each_other() -> None:
    assert foreign(graph()) == []


def test_no_import_circles() -> None:
    assert circles(graph()) == []


def private(found: Mapping[str, set[str]]) -> set[str]:
    """Imports of the engine's own modules from the parts that stand on its public modules."""
    return {
        f"{n} -> {t}"
        for n, targets in found.items()
        for t in targets
        if n.split(".")[0] in ("judges", "plugins", "envs") and t.startswith("engine.")
    }


def test_judges_plugins_and_environments_import_public_names_only() -> None:
    assert private(graph()) == set()
    planted = private(graph({"judges.simulated": "\nfrom ..engine.policy import policy\n"}))
    assert planted == {"judges.simulated -> engine.policy.policy"}
    for path in (ROOT / "tests" / "packages").rglob("*.py"):
        assert "turnwise.engine" not in path.read_text(), path


@pytest.mark.parametrize(
    "name", ["protocols", "learning", "judging", "running", "testing", "tools"]
)
def test_every_name_of_a_public_module_resolves(name: str) -> None:
    module = importlib.import_module(f"turnwise.{name}")
    stub = ast.parse((ROOT / f"{name}.pyi").read_text())
    given = {a.name for n in ast.walk(stub) if isinstance(n, ast.ImportFrom) for a in n.names}
    listed = next(n.value for n in stub.body if isinstance(n, ast.Assign))
    assert given == set(ast.literal_eval(listed)) == set(dir(module))
    for each in given:
        assert getattr(module, each) is not None


# Objects of other libraries, of environments and of plain Python have what they have; all of ours
# derive from base classes.
FOREIGN = {
    "engine/environments/process.py": "an environment of other people may lack its spaces",
    "engine/feedback/judge_source.py": "an array of any library has `tolist`",
    "engine/policy/properties.py": "a configuration of transformers has the settings it has",
    "engine/records/feedback.py": "a judge that is a function has no version",
    "engine/util/wording.py": "some functions and classes have no name",
}


def test_capabilities_are_not_found_by_hasattr() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3))
    ]
    assert sorted(found) == sorted(FOREIGN), "at most one in a file"


def test_modules_and_functions_stay_short() -> None:
    for path in modules().values():
        text, name = path.read_text(), str(path.relative_to(ROOT))
        assert text.count("\n") <= 450, name
        for node in ast.walk(parsed(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno < 70, f"{name}: {node.name}"


# Words that meant nine things as names, and words that say "a person" where there is none.
NAMES = {"said", "heard", "told", "aside", "talk", "hear"}
PROSE = re.compile(r"\b(said|somebody|nobody|whoever|anew|beside)\b", re.IGNORECASE)


def test_the_words_are_those_of_the_field() -> None:
    prose = 0
    for path in modules().values():
        text = path.read_text()
        names = {
            getattr(node, field, None)
            for node in ast.walk(parsed(text))
            for field in ("id", "attr", "arg", "name")
        }
        words = {
            word.lower()
            for name in names
            if isinstance(name, str)
            for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
        }
        assert not words & NAMES, path
        prose += sum(
            len(PROSE.findall(token.string))
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type in (tokenize.STRING, tokenize.COMMENT)
        )
    assert prose <= 15


def test_package_list_equals_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {"turnwise"} | {
        "turnwise." + n for n, p in modules().items() if p.name == "__init__.py"
    }
    assert set(listed) == folders


def test_no_module_is_loaded_under_another_name() -> None:
    code = (
        "import sys, turnwise; turnwise.Plugins(); turnwise.Policy; turnwise.train\nours = {k:"
        " m.__file__ for k, m in list(sys.modules.items()) if str(getattr(m, '__file__',"
        f" None)).startswith({str(ROOT)!r} + '/') and '/.venv/' not in m.__file__}}\nassert"
        " all(k.split('.')[0] == 'turnwise' for k in ours), [k for k in ours if not"
        " k.startswith('turnwise')]\nassert len(set(ours.values())) == len(ours)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
    here = {k: str(getattr(m, "__file__", "")) for k, m in list(sys.modules.items())}
    inside = [k for k, f in here.items() if any(f.startswith(f"{ROOT / part}/") for part in HOUSE)]
    assert all(k.split(".")[0] == "turnwise" for k in inside), (
        "pytest too must not import the root under another name"
    )
    # A clone may be called turnwise, as the package is; under any other name its root is no module.
    beside = ROOT.name != "turnwise" and ROOT.name in sys.modules
    assert not beside or not here[ROOT.name].startswith(f"{ROOT}/__init__")


@pytest.mark.parametrize(
    "code",
    [
        "import turnwise",
        (
            "import turnwise; turnwise.Plugins(); turnwise.Text; turnwise.Feedback;"
            " turnwise.judges; turnwise.Ledger; turnwise.Run"
        ),
        "import turnwise.engine.cli.main",
    ],
    ids=["import", "contracts", "cli"],
)
def test_imports_load_no_torch(code: str) -> None:
    check = (
        code
        + "\nimport sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["plugins"],
        ["run", "--help"],
        ["judges", "--help"],
        ["rate", "--help"],
    ],
)
def test_the_command_line_loads_nothing_heavy_to_show_itself(arguments: list[str]) -> None:
    """What is heavy is loaded by whoever needs it: a factory when it is called, a command when it
    runs."""
    heavy = ("torch", "transformers", "accelerate", "scipy", "sqlalchemy", "matplotlib", "datasets",
        "fastapi", "uvicorn",
             "jinja2", "openai", "anthropic", "httpx2", "llguidance", "jsonschema", "pandas",
             "asyncio")  # fmt: skip
    code = (
        f"import sys; sys.argv = ['turnwise', *{arguments}]\n"
        "from turnwise.engine.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('loaded:', [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stdout[-500:] + done.stderr[-2000:]


def test_names_of_judges_resolve_when_they_are_used() -> None:
    for name in turnwise.judges.__all__:
        found = getattr(turnwise.judges, name)
        assert isinstance(found, str) or found.__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Rubrik'"):
        turnwise.judges.Rubrik  # noqa: B018
    plugins = turnwise.Plugins()
    for kind in (
        "judge",
        "model",
        "combiner",
        "aggregator",
        "credit method",
        "curriculum",
        "optimizer",
        "stage",
        "backend",
    ):
        for name in plugins.names(kind):
            assert callable(plugins.factory(kind, name)), f"{kind} {name}"


def test_public_names_resolve() -> None:
    import turnwise

    for name in turnwise.__all__:
        assert getattr(turnwise, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Polcy'"):
        turnwise.Polcy  # noqa: B018


def test_every_hook_is_documented_with_its_arguments() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text()
    for name, function in vars(hookspecs).items():
        if hasattr(function, "turnwise_spec"):
            signature = f"{name}({', '.join(inspect.signature(function).parameters)})"
            assert f"`{signature}`" in page, f"docs/plugins.md lacks `{signature}`"


def test_nothing_speaks_of_unfinished_work() -> None:
    for path in modules().values():
        text = path.read_text()
        for word in ("TODO", "FIXME", "NotImplementedError"):
            assert word not in text, f"{path} says {word}"


def test_the_code_in_the_docs_runs() -> None:
    """Each Python block of the plugin page, as it stands there."""
    import types

    for block in (ROOT / "docs" / "plugins.md").read_text().split("```python\n")[1:]:
        exec(
            compile(block.split("```")[0], "docs/plugins.md", "exec"),
            vars(types.ModuleType("docs")),
        )


def test_the_pipelines_in_the_readme_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every YAML block: its keys are known and its parts fit together; nothing is loaded."""
    import yaml
    from turnwise.engine.pipeline.config import Loader

    monkeypatch.setenv("OPENAI_API_KEY", "k-test")
    blocks = [b.split("```")[0] for b in (ROOT / "README.md").read_text().split("```yaml\n")[1:]]
    assert len(blocks) == 4
    for block in blocks:
        found = yaml.load(block, Loader)  # as `turnwise run` reads it: 1e-6 is a number
        config = found if isinstance(found, dict) else {"policy": "nowhere", "stages": found}
        run = turnwise.Run(config, folder="/nonexistent/run")
        assert len(run.stages) in (1, 3, 9)


def test_the_picture_of_the_rooms_is_up_to_date() -> None:
    """`benchmarks/architecture.py` would draw what is there: floors, rooms, every import between
    rooms."""
    script = benchmark("architecture")
    text = (ROOT / "docs" / "figures" / "architecture.svg").read_text()
    svg = ElementTree.fromstring(text)
    told = json.loads(svg.findtext("{*}metadata") or "")
    rooms = [room for floor in FLOORS for room in floor]
    pairs = {
        (name.split(".")[1], target.split(".")[1])
        for name, targets in graph().items()
        for target in targets
        if name[:7] == target[:7] == "engine."
    }
    pairs = {(a, b) for a, b in pairs if a != b}
    again = "run `python benchmarks/architecture.py`"
    assert told["floors"] == [list(floor) for floor in FLOORS], again
    assert {tuple(pair) for pair in told["imports"] if pair[0] in rooms} == pairs, again
    ids = {element.get("id", "") for element in svg.iter()}
    assert {f"room-{room}" for room in rooms} <= ids, again
    arrows = {tuple(each.split("-to-")) for each in ids if "-to-" in each}
    assert arrows <= pairs, again
    reached = set(arrows)  # along arrows, whoever imports whom is reached, and nobody else
    while more := {(a, d) for a, b in reached for c, d in arrows if b == c} - reached:
        reached |= more
    assert pairs <= reached, again
    assert text == script.picture(), again
