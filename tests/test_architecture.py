"""The house keeps its rules: floors, import names, the package list, light imports, documented hooks."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import turnwise
from turnwise.engine import hookspecs

ROOT = Path(__file__).parents[1]
HOUSE = ("engine", "envs", "judges", "plugins")
FLOORS = {
    0: ["engine.episode", "engine.feedback", "engine.tensors", "engine.suggest", "engine.overoptimisation", "engine.preferences",
        "engine.agreement", "engine.calibration", "engine.exchange", "engine.files"],
    1: ["engine.hookspecs", "engine.plugins", "engine.environment", "engine.env_process", "engine.instances", "engine.env_check", "engine.wording", "engine.learning", "engine.reward", "engine.database", "engine.ledger",
        "engine.bias", "engine.judge_report", "engine.policy", "engine.secrets", "engine.memory", "engine.batch", "engine.builtin"],
    2: ["engine.rollout", "engine.sources", "engine.config", "engine.checkpoint", "engine.tracking", "engine.run", "engine.stages"],
    3: ["engine.progress", "engine.talk", "engine.train", "engine.report", "engine.cli"],
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for part in HOUSE:
        for path in sorted((ROOT / part).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, *, at_import_time: bool = False) -> set[str]:
    """Turnwise modules that a module imports, as dotted names below the root."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if at_import_time:
        nodes = []
        waiting: list[ast.AST] = list(tree.body)
        while waiting:
            node = waiting.pop()
            nodes.append(node)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            waiting += ast.iter_child_nodes(node)
    found = set()
    known = modules()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                whole = f"{target}.{alias.name}".strip(".")
                found.add(whole if whole in known else target)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(n.split(".")[0] == "turnwise" for n in names), f"{name} imports turnwise absolutely"
    return found & set(known)


def floor(name: str) -> int:
    return next(level for level, names in FLOORS.items() if any(name == n or name.startswith(n + ".") for n in names))


def test_floors() -> None:
    for name, path in modules().items():
        if name == "engine" or not name.startswith("engine"):
            continue
        for target in imports(name, path, at_import_time=True):
            if target.startswith("engine."):
                assert floor(target) <= floor(name), f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})"


def test_the_engine_knows_no_plugin_and_plugins_not_each_other() -> None:
    for name, path in modules().items():
        part = name.split(".")[0]
        for target in imports(name, path):
            other = target.split(".")[0]
            assert other == "engine" or (part == other and part != "engine"), f"{name} imports {target}"


def test_no_import_circles() -> None:
    graph = {name: imports(name, path, at_import_time=True) - {name} for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name in done:
            return
        for target in graph[name]:
            if not (name.startswith(target + ".") or target.startswith(name + ".")):  # a package and its own parts
                visit(target, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_package_list_equals_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {"turnwise"} | {"turnwise." + n for n, p in modules().items() if p.name == "__init__.py"}
    assert set(listed) == folders


def test_no_module_is_loaded_under_another_name() -> None:
    code = (
        "import sys, turnwise; turnwise.Plugins(); turnwise.Policy; turnwise.train\n"
        f"ours = {{k: m.__file__ for k, m in list(sys.modules.items()) if str(getattr(m, '__file__', None)).startswith({str(ROOT)!r} + '/')"
        " and '/.venv/' not in m.__file__}\n"
        "assert all(k.split('.')[0] == 'turnwise' for k in ours), [k for k in ours if not k.startswith('turnwise')]\n"
        "assert len(set(ours.values())) == len(ours)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
    here = {k: str(getattr(m, "__file__", "")) for k, m in list(sys.modules.items())}
    inside = [k for k, f in here.items() if any(f.startswith(f"{ROOT / part}/") for part in HOUSE)]
    assert all(k.split(".")[0] == "turnwise" for k in inside), "pytest too must not import the root under another name"
    assert ROOT.name not in sys.modules or not here[ROOT.name].startswith(f"{ROOT}/__init__")


@pytest.mark.parametrize(
    "code",
    [
        "import turnwise",
        "import turnwise; turnwise.Plugins(); turnwise.Text; turnwise.Feedback; turnwise.judges; turnwise.Ledger; turnwise.Run",
        "import turnwise.engine.cli",
    ],
    ids=["import", "contracts", "cli"],
)
def test_imports_load_no_torch(code: str) -> None:
    check = code + "\nimport sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["plugins"], ["run", "--help"], ["judges", "--help"], ["rate", "--help"]]
)
def test_the_command_line_loads_nothing_heavy_to_show_itself(arguments: list[str]) -> None:
    """What is heavy is loaded by whoever needs it: a factory when it is called, a command when it runs."""
    heavy = ("torch", "transformers", "accelerate", "scipy", "sqlalchemy", "matplotlib", "datasets", "fastapi", "uvicorn",
             "jinja2", "openai", "anthropic", "httpx2", "llguidance", "jsonschema", "pandas", "asyncio")  # fmt: skip
    code = (
        f"import sys; sys.argv = ['turnwise', *{arguments}]\n"
        "from turnwise.engine.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('loaded:', [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stdout[-500:] + done.stderr[-2000:]


def test_names_of_judges_resolve_when_they_are_used() -> None:
    for name in turnwise.judges.__all__:
        assert getattr(turnwise.judges, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Rubrik'"):
        turnwise.judges.Rubrik  # noqa: B018
    plugins = turnwise.Plugins()
    for kind in (
        "judge",
        "model",
        "feedback source",
        "combiner",
        "aggregator",
        "credit method",
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


def test_every_key_of_the_config_is_documented() -> None:
    from turnwise.engine.config import PolicyConfig, RunConfig

    page = (ROOT / "docs" / "configuration.md").read_text()
    plugins = turnwise.Plugins()
    ours = ("sft", "rank", "revise", "reward-model", "preference", "rl", "evaluate")
    sections = {"Run": RunConfig, "Policy": PolicyConfig} | {f"`{n}`": plugins.factory("stage", n) for n in ours}
    for title, model in sections.items():
        section = page.split(f"## {title}\n")[1].split("\n## ")[0]
        for key in model.model_fields:
            assert f"`{key}`" in section, f"docs/configuration.md lacks `{key}` under {title}"


def test_the_code_in_the_docs_runs() -> None:
    """Each Python block of the plugin page, as it stands there."""
    import types

    for block in (ROOT / "docs" / "plugins.md").read_text().split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "docs/plugins.md", "exec"), vars(types.ModuleType("docs")))


def test_the_pipelines_in_the_readme_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every YAML block: its keys are known and its parts fit together; nothing is loaded."""
    import yaml
    from turnwise.engine.config import _Loader

    monkeypatch.setenv("OPENAI_API_KEY", "k-test")
    blocks = [b.split("```")[0] for b in (ROOT / "README.md").read_text().split("```yaml\n")[1:]]
    assert len(blocks) == 3
    for block in blocks:
        found = yaml.load(block, _Loader)  # as `turnwise run` reads it: 1e-6 is a number
        config = found if isinstance(found, dict) else {"policy": "nowhere", "stages": found}
        run = turnwise.Run(config, folder="/nonexistent/run")
        assert len(run.stages) in (1, 3, 9)
