"""The pages that teach by code: what stands there is executed."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import itertools
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
import turnwise
import yaml
from support.echo import ECHO
from support.scripts import benchmark
from turnwise import judges, judging, learning, protocols, running, tools
from turnwise.engine.pipeline import options_command
from turnwise.engine.pipeline.options import Option, every_part, options_of

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL
    )


def test_the_optimizer_and_the_credit_method_of_the_page_train(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *files, use = blocks("writing-an-optimizer.md", "python")
    monkeypatch.setitem(sys.modules, "acme", types.ModuleType("acme"))
    for code in files:
        [name] = re.findall(r"# acme/(\w+)\.py", code)
        module = types.ModuleType(f"acme.{name}")
        exec(compile(code, name, "exec"), module.__dict__)
        monkeypatch.setitem(sys.modules, f"acme.{name}", module)
    plugins = turnwise.Plugins({"acme": sys.modules["acme.plugin"]})
    where: dict[str, Any] = {
        "turnwise": turnwise,
        "policy": str(model_folder()),
        "folder": tmp_path / "r",
        "plugins": plugins,
    }
    exec(use, where)
    done = where["run"]
    assert done.updates == 3
    start = torch.cat(
        [p.flatten() for p in turnwise.Policy.from_pretrained(model_folder()).parameters()]
    )
    assert not torch.equal(start, torch.cat([p.flatten() for p in done.policy.parameters()]))
    assert any(m.credit for m in done.ledger.members(done.id))


PRESETS = {
    re.findall(r"# ([\w. +]+?) \(", text)[0]: yaml.safe_load(text)["rl"]
    for text in blocks("optimizers.md", "yaml")
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_of_the_page_trains(
    name: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    assert set(PRESETS) == {"GRPO", "RLOO", "Dr. GRPO", "DAPO", "GSPO", "CISPO", "REINFORCE++"}
    count = lambda e: float(sum(t.action.count("e") for t in e.turns))  # noqa: E731
    small = {
        "env": {"id": ECHO, "kwargs": {"turns": 2}},
        "updates": 1,
        "groups": 3,
        "max_new_tokens": 5,
        "poll": 0.0,
        "feedback": [count],
    }
    if PRESETS[name].get("groups"):
        small["groups"] = 6
    stage = {**PRESETS[name], **small}
    done = turnwise.Run(
        {"policy": str(model_folder()), "threads": 1, "stages": [{"rl": stage}]},
        folder=tmp_path / "r",
    ).finish()
    assert done.policy.version == 1


def test_every_credit_method_and_optimizer_has_its_row() -> None:
    plugins = turnwise.Plugins()
    for kind, page in (("credit method", "credit.md"), ("optimizer", "optimizers.md")):
        text = (DOCS / page).read_text()
        for name in plugins.names(kind):
            if name not in ("acme-last-turn",) and not name.startswith("acme"):
                assert f"| `{name}`" in text, f"docs/{page} lacks a row for {name!r}"


def test_a_judge_of_turns_alone_gives_credit(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's example: scores of turns beside the environment's outcome."""
    monkeypatch.chdir(tmp_path)
    [code] = blocks("credit.md", "python")
    where: dict[str, Any] = {"turnwise": turnwise, "policy": str(model_folder()), "env": ECHO}
    short = code.replace(
        'credit="judged"',
        'credit="judged", updates=2, groups=2, group_size=2, max_new_tokens=5, poll=0.0',
    )
    exec(short.replace("turnwise.train(", "done = turnwise.train("), where)
    metrics = where["done"].metrics
    assert all(m["credit/scored_turns"] == 1 for m in metrics)
    assert where["done"].policy.version == 2


def test_the_rows_and_the_code_of_preference_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row of the page is read as what the page says that it becomes; the rows of our own
    formats hold nothing that is not written."""
    from turnwise.engine.exchange.reading import import_data, read_records
    from turnwise.engine.exchange.records import Ranked
    from turnwise.engine.exchange.writing import export_pairs, export_stepwise, export_unpaired

    rows = blocks("preference-data.md", "json")
    kinds = ["Ranked", "Scored", "Scored", "Scored", "Ranked", "Ranked", "Ranked"]
    for row, kind in zip(rows, kinds, strict=True):
        path = tmp_path / "row.json"
        path.write_text(row if row.startswith("[") else row.replace("\n", " "))
        assert {type(said).__name__ for said in read_records(path)} == {kind}
        if rows.index(row) < 3:
            episodes, comparisons, scores = import_data(path, run="r", stage="rank", update=1)
            known = {e.id: e for e in episodes}
            written = (
                export_pairs(known, comparisons),
                (
                    []
                    if scores and scores[0].score is None
                    else list(export_unpaired(known, scores, [], 0.5))
                ),
                list(export_stepwise(known, scores, 0.5)),
            )
            assert written[rows.index(row)] == [json.loads(row)]
    path.write_text(rows[-1])
    said = [r for r in read_records(path) if isinstance(r, Ranked)]
    assert [[[r.talks[i][-1].content for i in tier] for tier in r.tiers] for r in said] == [
        [["A way in."], ["A hole."]],
        [["Red.", "Blue."], ["Seven."]],
    ]
    monkeypatch.chdir(tmp_path)
    [code] = blocks("preference-data.md", "python")
    exec(code, {})


def test_the_page_of_agents(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program plays, and its stages are stages."""
    [program] = blocks("agents.md", "python")
    (tmp_path / "page_agent.py").write_text(program)
    (tmp_path / "tasks.jsonl").write_text('{"question": "hello", "answer": ""}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    kwargs = {"program": "page_agent:play", "tasks": str(tmp_path / "tasks.jsonl"), "held_out": 0}
    [start] = turnwise.starts("turnwise/Agent-v0", 0, 1, kwargs=kwargs)
    policy = turnwise.Policy.from_pretrained(wide)
    player = turnwise.PolicyPlayer(policy, turnwise.Sampling(1.0, 8))
    [episode] = turnwise.rollout(player, [(start, 0)])
    assert (episode.ending, episode.reason, episode.success) == ("terminated", "", True)
    monkeypatch.syspath_prepend(str(DOCS.parent))
    played, served = (yaml.safe_load(block) for block in blocks("agents.md", "yaml"))
    for config in (played, served):
        own = {**config, "policy": str(wide), "folder": str(tmp_path / config["stages"][0]["rl"]
            .get("episodes", "played"))}  # fmt: skip
        own.pop("ledger", None)
        assert turnwise.Run(own).stages[0][0] == "rl"


def test_the_rules_of_the_page(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every registered rule has its row with all its options; the page's code runs, and its
    feedback trains."""
    import inspect

    text, plugins = (DOCS / "rules.md").read_text(), turnwise.Plugins()
    for name in plugins.infos["judges"].registered["judge"]:
        factory = plugins.factory("judge", name)
        if factory.__module__.rpartition(".")[2] in (
            "rules",
            "answers",
            "structure",
            "economy",
            "combine",
        ):
            [row] = re.findall(rf"^\| `{name}` \| (.*)", text, re.MULTILINE)
            for option in set(inspect.signature(factory).parameters) - {"plugins"}:
                assert f"`{option}`" in row, f"docs/rules.md lacks {option!r} of {name!r}"
    [code] = blocks("rules.md", "python")
    module = types.ModuleType("my_rules")
    exec(compile(code, "rules.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "my_rules", module)
    feedback = [
        each for block in blocks("rules.md", "yaml") for each in yaml.safe_load(block)["feedback"]
    ]
    small = {
        "updates": 1,
        "groups": 2,
        "group_size": 2,
        "max_new_tokens": 5,
        "poll": 0.0,
        "env": ECHO,
        "feedback": feedback,
    }
    stage = {**small, "combiner": {"name": "weighted", "turns": ["economy"]}}
    done = turnwise.Run(
        {"policy": str(model_folder()), "threads": 1, "stages": [{"rl": stage}]},
        folder=tmp_path / "r",
    ).finish()
    said = {
        a.stamp.source
        for e in done.ledger.run_episodes(done.id)
        for a in done.ledger.feedback([e.group])
        if a.status == "scored"
    }
    assert said == {"length", "manners", "economy", "short"}


def test_the_pages_code_and_options_of_people(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import fields

    from turnwise.plugins.human.source import People

    text = (DOCS / "people.md").read_text()
    for option in fields(People):
        assert f"`{option.name}`" in text, f"docs/people.md lacks {option.name!r}"
    pipeline, sources = (yaml.safe_load(block) for block in blocks("people.md", "yaml"))
    assert len(turnwise.Run(pipeline, folder="/nonexistent/run").stages) == 2
    stage = {
        "env": "turnwise/SupportDesk-v0",
        **sources,
        "credit": "judged",
        "combiner": "weighted",
    }
    assert turnwise.Run(
        {"policy": "nowhere", "stages": [{"rl": stage}]}, folder="/nonexistent/run"
    ).stages
    monkeypatch.chdir(tmp_path)
    renderer, service = blocks("people.md", "python")
    plugin = types.ModuleType("boards")
    exec(renderer, plugin.__dict__)
    shown = turnwise.Plugins({"boards": plugin}).create("renderer", "boards")(
        turnwise.Message("user", '{"board": ["<b>", "k."]}')
    )
    assert (
        shown
        == "<table><tr><td>&lt;</td><td>b</td><td>&gt;</td></tr><tr><td>k</td><td>.</td></tr></table>"  # noqa: E501
    )
    exec(service, {})
    for picture in re.findall(r"\(figures/([^)]+)\)", text):
        assert (DOCS / "figures" / picture).is_file()


def test_the_pages_code_and_options_of_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    import inspect

    from turnwise.engine.analysis.judge_report import FEATURES
    from turnwise.plugins.combiners.calibrated import Calibrated

    text = (DOCS / "calibration.md").read_text()
    for name in [*list(inspect.signature(Calibrated).parameters)[1:], *FEATURES]:
        assert f"`{name}`" in text, f"docs/calibration.md lacks {name!r}"
    [pipeline] = (yaml.safe_load(block) for block in blocks("calibration.md", "yaml"))
    run = turnwise.Run({"policy": "nowhere", "stages": [pipeline]}, folder="/nonexistent/run")
    assert run.stages
    [code] = blocks("calibration.md", "python")
    exec(code, {})
    said = capsys.readouterr().out
    assert "people (people) scored 50 of the 200 episodes" in said
    assert "This judge is worth" in said


def test_the_page_of_judges(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every judge has its row with its options; the page's code runs against a loopback server, its
    feedback makes runs, and the first trains."""
    from dataclasses import fields

    from support.model_server import ModelServer, example

    text, plugins = (DOCS / "judges.md").read_text(), turnwise.Plugins()
    shared = {f.name for f in fields(judges.ModelJudge)}
    for name in (
        "rubric", "pairwise", "listwise", "checklist", "constitution", "panel", "escalation"
    ):  # fmt: skip
        [row] = re.findall(rf"^\| `{name}` \| (.*)", text, re.MULTILINE)
        own = (
            {f.name for f in fields(plugins.factory("judge", name)) if f.init}
            - shared
            - {"rubric", "constitution", "plugins"}
        )
        for option in own:
            assert f"`{option}" in row, f"docs/judges.md lacks {option!r} of {name!r}"
    for option in shared - {"plugins"}:
        assert f"`{option}" in text, f"docs/judges.md lacks {option!r}"
    for name in plugins.names("model"):
        assert f"| `{name}` |" in text
    monkeypatch.chdir(tmp_path)
    [rubric] = blocks("judges.md", "markdown")
    (tmp_path / "helpful.md").write_text(rubric)
    with ModelServer(example) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "k-test")
        monkeypatch.setenv("ANTHROPIC_API_KEY", "k-test")
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        where: dict[str, Any] = {}
        for code in blocks("judges.md", "python"):
            exec(code, where)
        assert server.count() == 6
        first, *others = (yaml.safe_load(block) for block in blocks("judges.md", "yaml"))
        small = {
            "env": ECHO,
            "updates": 1,
            "groups": 2,
            "group_size": 2,
            "max_new_tokens": 5,
            "poll": 0.0,
        }
        done = turnwise.Run(
            {"policy": str(model_folder()), "stages": [{"rl": {**small, **first}}]},
            folder=tmp_path / "runs" / "r",
        ).finish()
        assert {a.status for a in done.ledger.feedback(run=done.id, late=True)} == {"scored"}
    for block in others:
        stage = block.get("rl") or {"env": ECHO, **block}
        assert turnwise.Run(
            {"policy": "nowhere", "stages": [{"rl": stage}]}, folder="/nonexistent/run"
        ).stages


def test_what_the_pages_point_to_is_there() -> None:
    """Files of the repository that a page names, and pages that it links to."""
    root = Path(__file__).parents[1]
    named = re.compile(
        r"(?<![\w/.])((?:engine|judges|plugins|envs|tests|benchmarks|docs|examples)/[\w/.-]+\.(?:py|md|yaml|json))\b"
    )
    linked = re.compile(r"\]\(([\w/.-]+\.md)(?:#[\w-]*)?\)")
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md")]
    lost = [
        f"{page.relative_to(root)}: {name}"
        for page in pages
        if page.name != "CHANGELOG.md"
        for name in named.findall(page.read_text())
        if not (root / name).exists()
    ]
    lost += [
        f"{page.relative_to(root)}: {name}"
        for page in pages
        for name in linked.findall(page.read_text())
        if not (page.parent / name).exists()
    ]
    assert lost == []


PUBLIC = (protocols, learning, judging, running, tools, judges)
KINDS = (
    "stage", "judge", "model", "combiner", "aggregator", "credit method",
    "curriculum",    "optimizer", "backend",
)  # fmt: skip


def options(plugins: turnwise.Plugins, owner: str) -> dict[str, Any]:
    """The options of a stage, of a part or of another section of a config, with their types."""
    from turnwise.engine.feedback import specs
    from turnwise.engine.pipeline.config import PolicyConfig, RunConfig
    from turnwise.engine.stages.environments import EnvConfig

    if owner == "feedback":
        return dict.fromkeys(specs.SETTINGS)
    sections = {"run": RunConfig, "policy": PolicyConfig, "env": EnvConfig}
    factories = [plugins.factory(kind, owner) for kind in KINDS if owner in plugins.names(kind)]
    found: dict[str, Any] = {}
    for factory in [*factories, *(sections[name] for name in sections if name == owner)]:
        if hasattr(factory, "model_fields"):
            found |= {name: field.annotation for name, field in factory.model_fields.items()}
            continue
        found |= {n: p.annotation for n, p in inspect.signature(factory).parameters.items()}
        with contextlib.suppress(NameError):  # a name for type checkers alone stays a string
            found |= typing.get_type_hints(getattr(factory, "__init__", factory))
    return found


def there_is(name: str, plugins: turnwise.Plugins) -> bool:
    """Whether a name of the glossary is one of ours: a file, a command, a class or one of its
    attributes, a stage or part, an option of these (and a value of it), or an event."""
    from turnwise.engine import hookspecs
    from turnwise.engine.cli.main import app

    if "/" in name:
        return (DOCS.parent / name).exists()
    if name.startswith("turnwise "):
        return name[9:] in {c.name or c.callback.__name__ for c in app.registered_commands}
    key, _, value = name.partition(": ")
    owner, _, attribute = key.partition(".")
    if owner in ("turnwise", "gymnasium"):
        found: Any = {"turnwise": turnwise, "gymnasium": gymnasium}[owner]
        for part in attribute.split(".") if attribute else ():
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    homes = [turnwise, *PUBLIC]
    if home := next((h for h in homes if owner in dir(h)), None):
        thing = getattr(home, owner)
        fields = getattr(thing, "__dataclass_fields__", ())
        return not value and (not attribute or attribute in fields or hasattr(thing, attribute))
    if attribute:
        known = options(plugins, owner)
        return attribute in known and (not value or f"'{value}'" in str(known[attribute]))
    return any(owner in plugins.names(kind) for kind in KINDS) or hasattr(
        getattr(hookspecs, owner, None), "turnwise_spec"
    )


def test_the_glossary_names_what_there_is() -> None:
    """Entries in alphabetical order under their letters, and every name in back quotes exists."""
    text, plugins = (DOCS / "glossary.md").read_text(), turnwise.Plugins()
    words = re.findall(r"^- \*\*(.+?)\*\*: ", text, re.MULTILINE)
    assert words == sorted(words, key=str.casefold)
    assert len(words) == len(set(words)) == len(re.findall(r"^- ", text, re.MULTILINE))
    for section in text.split("\n## ")[1:]:
        letter = section[0]
        assert f"[{letter}](#{letter.lower()})" in text
        assert set(re.findall(r"^- \*\*(.)", section.upper(), re.MULTILINE)) == {letter}
    names = {" ".join(name.split()) for name in re.findall(r"`([^`]+)`", text)}
    assert [name for name in sorted(names) if not there_is(name, plugins)] == []
    for invented in (
        "Episod", "Episode.orign", "rl.group", "rl.history: rewrite", "engine/ledger.py",
        "turnwise.learning.White", "turnwise rates", "ppoo", "outcome.baseline: median",
        "gymnasium.Enf", "turnwise.lerning", "feedback.price",
    ):  # fmt: skip
        assert not there_is(invented, plugins), invented


def test_the_configuration_page_is_made_of_the_code(plugins: turnwise.Plugins) -> None:
    """Every option of every part, with what it means and its default."""
    script = benchmark("configuration")
    found, text = script.sections(plugins), script.PAGE.read_text()
    assert text == script.page(text, found), "run `python benchmarks/configuration.py`"
    with pytest.raises(ValueError, match="stage rl.*must stand in exactly one mark"):
        script.page(text.replace("options: stage rl -->", "options: stage lr -->"), found)
    assert script.page(text, {**found, "run": "other"}) != text
    for part, factory in every_part(plugins):
        bare = [option.keys for option in options_of(factory) if not option.text]
        assert bare == [], f"{part}: say in the docstring what these are"


def test_no_block_of_options_is_written_twice(plugins: turnwise.Plugins) -> None:
    """Classes that declare the same keys with the same defaults have a base class for them."""
    declared: dict[str, set[tuple[str, str]]] = {}
    for _, factory in every_part(plugins):
        for option in options_of(factory):
            pairs = zip(option.keys, option.defaults, strict=True)
            declared.setdefault(option.owner, set()).update(pairs)
    twice = {
        (a, b): sorted(key for key, _ in declared[a] & declared[b])
        for a, b in itertools.combinations(sorted(declared), 2)
        if len(declared[a] & declared[b]) > 3
    }
    # Two SDKs' clients: the words differ, and a model is given by position.
    assert twice == {("Anthropic", "OpenAI"): ["api_key", "effort", "extra", "model", "url"]}


def test_the_options_of_a_part_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    options_command.options(None)
    told = capsys.readouterr().out
    count = sum(len(o.keys) for _, f in every_part(turnwise.Plugins()) for o in options_of(f))
    assert f"{count} options of" in told
    options_command.options(["rejection"])
    told = capsys.readouterr().out
    assert re.search(r"micro_tokens\s+. 2048 +. tokens per forward pass", told)
    assert "[environment]" not in told
    with pytest.raises(turnwise.ConfigError, match="no part is called 'grop'. Did you mean 'grpo'"):
        options_command.options(["grop"])


def test_options_are_read_from_any_factory() -> None:
    def factory(weight: float, note: str = "", *, tags: tuple[str, ...] = ("a", "b")) -> None:
        """Makes nothing.

        Args:
            weight: how much, in
                kilograms.
            note, tags: words: of any kind.

        Returns:
            nothing.
        """

    assert options_of(factory) == [
        Option("factory", ("weight",), ("needed",), "how much, in kilograms."),
        Option("factory", ("note", "tags"), ("empty", "[a, b]"), "words: of any kind."),
    ]
    assert options_of(lambda plugins, more=1e-6: None) == [
        Option("<lambda>", ("more",), ("1e-6",), "")
    ]


def test_the_page_of_runs(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    stages = [
        {"rl": {"env": "turnwise/SupportDesk-v0", "updates": 1, "groups": 2, "group_size": 2,
                "max_new_tokens": 6}},
        {"evaluate": {"env": "turnwise/SupportDesk-v0", "episodes": 2, "max_new_tokens": 6}},
    ]  # fmt: skip
    turnwise.Run({"policy": str(model_folder()), "stages": stages}, folder=tmp_path / "r").finish()
    names: dict[str, Any] = {"folder": tmp_path / "r"}
    for block in blocks("runs.md", "python"):
        exec(compile(block, "docs/runs.md", "exec"), names)
    assert {"id", "name", "folder", "metrics", "ledger", "policy"} <= set(dir(names["run"]))


def test_the_page_of_determinism(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its assertion holds; with another seed it would not."""
    monkeypatch.chdir(tmp_path)
    [block] = blocks("determinism.md", "python")
    code = re.sub(r"^model = .*", f"model = {str(model_folder())!r}", block, flags=re.MULTILINE)
    exec(compile(code, "docs/determinism.md", "exec"), {})
    other = code.replace('seed=7, folder="runs/two"', 'seed=8, folder="runs/three"')
    other = other.replace("runs/one", "runs/four")
    with pytest.raises(AssertionError):
        exec(compile(other, "docs/determinism.md", "exec"), {})


def small_version(block: str, model: str) -> str:
    """A block that trains, with a tiny model and few updates."""
    for wide, narrow in (
        (r'(policy=)"Qwen/[^"]*"', rf"\1{model!r}"),
        (r"updates=200", "updates=1, groups=2, group_size=2"),
        (r"max_new_tokens=64", "max_new_tokens=6"),
    ):
        block = re.sub(wide, narrow, block)
    return block


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_first_code_that_one_sees(
    roomy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of README and of the site's first page."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    first, second = blocks("../README.md", "python")
    exec(compile(small_version(first, roomy), "README.md", "exec"), names)
    assert (tmp_path / "riddler" / "config.json").is_file()
    stage = {"env": "acme/Riddle-v0", "updates": 1, "groups": 2, "group_size": 2}
    config = {"policy": roomy, "stages": [{"rl": {**stage, "max_new_tokens": 6}}]}
    Path("pipeline.yaml").write_text(yaml.safe_dump(config))
    exec(compile(second, "README.md", "exec"), names)
    gymnasium.registry.pop("acme/Riddle-v0")
    [page] = blocks("index.md", "python")
    exec(compile(small_version(page, roomy), "docs/index.md", "exec"), names)
    assert names["run"].updates == 1


def test_the_page_of_biases(capsys: pytest.CaptureFixture[str]) -> None:
    """A judge that takes what is shown first is named, and one that likes canaries is out."""
    from support.episodes import conversation

    bias, canaries = blocks("judge-bias.md", "python")
    pairs = [(f"a{i}", f"b{i}") for i in range(40)]
    answers = [
        turnwise.Comparison(
            f"g{i}", ((order[0],), (order[1],)), id=f"{i}-{k}", shown={"order": list(order)},
            stamp=turnwise.Stamp(source="judge"),
        )
        for i, pair in enumerate(pairs)
        for k, order in enumerate((pair, pair[::-1]))
    ]  # fmt: skip
    episodes = [conversation("Well.", id=name) for pair in pairs for name in pair]
    names: dict[str, Any] = {"answers": answers, "episodes": episodes, "people": None}
    names |= {"others": None, "families_of_texts": None}
    exec(compile(bias, "docs/judge-bias.md", "exec"), names)
    assert re.search(r"judge what is shown first wins 100", capsys.readouterr().out)
    names |= {"episode": episodes[0], "score": 10}
    for line in ("schedule, quarantine = ", "if kind := "):
        assert line in canaries
    once = canaries.replace("Schedule(rate=0.1", "Schedule(rate=1.0")
    exec(compile(once, "docs/judge-bias.md", "exec"), names)
    assert names["kind"]
    assert not names["quarantine"].quarantined, "one is no proof"


def test_the_page_of_aggregators(capsys: pytest.CaptureFixture[str]) -> None:
    [block] = blocks("aggregators.md", "python")
    exec(compile(block, "docs/aggregators.md", "exec"), {})
    assert re.fullmatch(r"\S+ \S+\n", capsys.readouterr().out)


def test_the_page_of_publishing() -> None:
    [block] = blocks("publish-a-plugin.md", "python")
    names: dict[str, Any] = {}
    exec(compile(block, "docs/publish-a-plugin.md", "exec"), names)
    names["test_it_is_sound"]()
    text = (DOCS / "publish-a-plugin.md").read_text()
    from turnwise import testing

    for name in dir(testing):
        assert f"{name}(" in text or f"`{name}`" in text or name == "Unsound", name
    commands = re.findall(r"^\$ ", text, re.MULTILINE)
    assert len(commands) <= 6


def _commands() -> list[tuple[str, str]]:
    """Every line that runs `turnwise` on a page, with the page's name."""
    root = DOCS.parent
    pages = [*root.glob("*.md"), *DOCS.glob("*.md"), *root.glob("examples/*.md")]
    found = []
    for page in pages:
        if page.name in ("CHANGELOG.md", "commands.md"):  # history; made of the code
            continue
        for line in re.findall(r"^ *(?:\$ |exec )(.*)$", page.read_text(), re.MULTILINE):
            found += [
                (page.name, words.strip())
                for words in line.split(" && ")
                if words.strip().startswith("turnwise ")
            ]
    return found


@pytest.fixture(scope="module")
def wrong_in(plugins: turnwise.Plugins) -> Callable[[str], str]:
    """Returns what the command line finds wrong in a command, without running it: an unknown
    command or option, a value, how many arguments there are. Nothing wrong is empty."""
    import shlex

    import typer
    from turnwise.engine.cli.main import app

    plugins.call_commands(app)
    program: Any = typer.main.get_command(app)

    def wrong(line: str) -> str:
        command, (_, *words), name = program, shlex.split(line, comments=True), "turnwise"
        try:
            while hasattr(command, "commands"):
                name, command, words = command.resolve_command(
                    typer.Context(command, info_name=name), words
                )
            command.make_context(name, words)
        except (SystemExit, Exception) as error:
            return str(error) or type(error).__name__
        return ""

    return wrong


def test_every_command_of_the_pages_is_one(wrong_in: Callable[[str], str]) -> None:
    lines = _commands()
    assert len(lines) > 40
    assert [(page, line, why) for page, line in lines if (why := wrong_in(line))] == []
    for invented in (
        "turnwise runn a.yaml", "turnwise run a.yaml --sed 1", "turnwise chat --seed x",
        "turnwise new judg acme", "turnwise fits a b",
    ):  # fmt: skip
        assert wrong_in(invented), invented


def test_what_containers_are_told_to_run_is_a_command(wrong_in: Callable[[str], str]) -> None:
    """And the versions and extras that their files name are those of the project."""
    import shlex
    import tomllib

    import yaml

    root = DOCS.parent
    deploy = root / "examples" / "deploy"
    services = yaml.safe_load((deploy / "compose.yaml").read_text())["services"]
    given = [
        re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", shlex.join(each["command"]))
        for each in services.values()
        if each["image"] == "turnwise:cpu"
    ]
    job = yaml.safe_load((deploy / "kuberay.yaml").read_text())["spec"]
    lines = [*(f"turnwise {words}" for words in given), job["entrypoint"]]
    assert len(lines) == 3
    assert [(line, why) for line in lines if (why := wrong_in(line))] == []
    assert f"proxy_pass http://rate:{8088};" in (deploy / "nginx.conf").read_text()
    assert f"ray=={job['rayClusterSpec']['rayVersion']}\n" in (root / "constraints.txt").read_text()
    recipe = (root / "Dockerfile").read_text()
    known = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        each for found in re.findall(r"whl\)\[([\w,]+)\]", recipe) for each in found.split(",")
    }
    assert named == {"all", "ray"} <= known.keys()
    assert re.findall(r"^FROM \S+ AS (cpu|cuda)$", recipe, re.MULTILINE) == ["cpu", "cuda"]
    kept = (root / ".dockerignore").read_text().split()
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    assert not {name.split(".")[1] for name in packages if "." in name} & set(kept)


def test_every_line_of_the_comparison_is_held_by_something(wrong_in: Callable[[str], str]) -> None:
    """By tests that are there, scripts that are there, or commands that exist."""
    root = DOCS.parent
    rows = re.findall(r"^\| (?!-)(.*) \|$", (DOCS / "comparison.md").read_text(), re.MULTILINE)
    held = [row.rsplit(" | ", 1)[1] for row in rows if not row.endswith("held by")]
    assert len(held) > 20
    targets = re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), re.MULTILINE)
    for cell in held:
        given = re.findall(r"`([^`]+)`", cell)
        assert given, cell
        for one in given:
            kind, _, rest = one.partition(" ")
            if kind == "turnwise":
                assert not wrong_in(one), one
            elif kind == "make":
                assert rest in targets
            else:
                assert (root / (rest or kind)).is_file(), one


def _blocks_of_all(language: str) -> Iterator[tuple[str, str]]:
    """Every block of a language on any page, with the page's name."""
    root = DOCS.parent
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("examples/*.md")]:
        pattern = rf"^( *)```{language}\n(.*?)^\1```"
        for indent, text in re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL):
            yield page.name, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)


def _names_of_ours(code: str) -> Iterator[tuple[str, str]]:
    """The names that code takes from Turnwise, each with its module."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.ImportFrom(module=str(module)) if f"{module}.".startswith("turnwise."):
                yield from ((module, each.name) for each in node.names)
            case ast.Attribute(value=ast.Name(id="turnwise")):
                yield "turnwise", node.attr


def _there(module: str, name: str) -> bool:
    whole = importlib.import_module(module)
    return hasattr(whole, name) or importlib.util.find_spec(f"{module}.{name}") is not None


def test_every_block_of_the_pages_can_be_read() -> None:
    """Python compiles, and what it takes from Turnwise exists; YAML and JSON are such."""
    blocks = {language: list(_blocks_of_all(language)) for language in ("python", "yaml", "json")}
    assert all(blocks.values())
    lost = {
        (page, *name)
        for page, code in blocks["python"]
        for name in _names_of_ours(code)
        if not _there(*name)
    }
    assert lost == set()
    for page, text in blocks["yaml"]:
        assert list(yaml.safe_load_all(text)), page
    for _, text in blocks["json"]:
        while text := text.strip():  # several, one after the other, are JSON lines
            text = text[json.JSONDecoder().raw_decode(text)[1] :]
    assert not _there("turnwise", "trian")


def test_the_page_of_commands_is_made_of_the_command_line() -> None:
    script = benchmark("commands")
    text = script.PAGE.read_text()
    assert text == script.page(text), "run `python benchmarks/commands.py`"
    assert "## `turnwise rate`" in text, "a plugin's command"
