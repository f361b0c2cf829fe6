"""Settings laid over a config, what a run would do, schemas, and runs beside each other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import turnwise
import yaml
from support.command import Command
from turnwise.engine.cli.schema import config_schema
from turnwise.engine.pipeline.config import Loader, setting
from turnwise.engine.pipeline.overlay import lay_over, named_after

ROOT = Path(__file__).parent.parent
DESK = "turnwise/SupportDesk-v0"
CONFIG: dict[str, Any] = {
    "policy": "q",
    "stages": [
        {"sft": None},
        {"rl": {"env": DESK, "feedback": ["environment", "length"]}},
        {"reward-model": {}},
        {"rl": {"env": [[DESK, 0.5]]}},
        {"repeat": {"times": 2, "stages": [{"rl": {"updates": 1}}]}},
    ],
}


@pytest.mark.parametrize(
    ("text", "stage", "options"),
    [
        ("stages.rl.optimizer.lr=3e-6", 1, {"optimizer": {"lr": 3e-6}}),
        ("stages.rl-2.env.0.1=0.25", 3, {"env": [[DESK, 0.25]]}),
        ("stages.sft.epochs=3", 0, {"epochs": 3}),
        ("stages.1.updates=7", 1, {"updates": 7}),
        ("stages.rl.env.kwargs.size=5", 1, {"env": {"id": DESK, "kwargs": {"size": 5}}}),
        (
            "stages.rl.feedback.1.max_words=3",
            1,
            {"feedback": ["environment", {"judge": "length", "max_words": 3}]},
        ),
        ("stages.rl.feedback=[length]", 1, {"feedback": ["length"]}),
        ("stages.reward-model.members=2", 2, {"members": 2}),
    ],
)
def test_a_setting_takes_its_place(text: str, stage: int, options: dict[str, Any]) -> None:
    laid = lay_over(CONFIG, setting(text))
    if stage == 1 and text.startswith("stages.1"):
        assert laid["stages"][1] == {"updates": 7, **CONFIG["stages"][1]}  # an entry, not a stage
        return
    [(name, before)] = CONFIG["stages"][stage].items()
    assert laid["stages"][stage] == {name: {**(before or {}), **options}}
    others = [i for i in range(len(CONFIG["stages"])) if i != stage]
    assert [laid["stages"][i] for i in others] == [CONFIG["stages"][i] for i in others]
    assert CONFIG["stages"][0] == {"sft": None}  # what was given stays as it was


def test_settings_and_secrets() -> None:
    """A run's name, and with it its folder, tells none, and stays when one is changed."""
    told = [named_after([("", setting(f"ledger=postgresql://u:{word}@h/db"))])
            for word in ("s3cretpw99", "another88")]  # fmt: skip
    assert told[0] == told[1]
    assert "s3cret" not in told[0]


def test_settings_keep_what_is_there() -> None:
    seats = {"stages": [{"rl": {"env": {"id": "x", "seats": {0: "policy", 1: "random"}}}}]}
    laid = lay_over(seats, {"stages": {"rl": {"env": {"seats": {1: {"policy": "other"}}}}}})
    assert laid["stages"][0]["rl"]["env"]["seats"] == {0: "policy", 1: {"policy": "other"}}
    judged = {"stages": [{"evaluate": {"judge": "pairwise"}}]}
    laid = lay_over(judged, setting("stages.evaluate.judge.model=x"))
    assert laid["stages"][0]["evaluate"]["judge"] == {"judge": "pairwise", "model": "x"}
    assert lay_over({"policy": {"model": "a", "lora": {}}}, {"policy": "b"}) == {"policy": "b"}


def test_settings_reach_into_repetitions_and_the_policy() -> None:
    laid = lay_over(CONFIG, setting("stages.repeat.stages.rl.updates=5"))
    assert laid["stages"][4] == {"repeat": {"times": 2, "stages": [{"rl": {"updates": 5}}]}}
    laid = lay_over(CONFIG, setting("policy.lora.r=8"))
    assert laid["policy"] == {"model": "q", "lora": {"r": 8}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages.rll.updates=1", "stages has no entry 'rll'. Did you mean 'rl'"),
        ("stages.rl.feedback.7.x=1", "stages.rl.feedback has no entry '7'. Known: 0, 1"),
        ("stages.rl-2.env.0.1.x=1", "stages.rl-2.env.0.1 is 0.5, which has no 'x'"),
        ("lr", "--set takes a key with its place and a value"),
        ("stages..lr=1", "--set takes a key with its place and a value"),
        ("seed=[1", "the value is not valid YAML"),
    ],
)
def test_what_a_setting_cannot_be(text: str, message: str) -> None:
    with pytest.raises(turnwise.ConfigError, match=re.escape(message)):
        lay_over(CONFIG, setting(text))


def pipeline(folder: Path, model: Path, **more: Any) -> Path:
    """Writes a small pipeline; returns its path."""
    rl = {"env": DESK, "updates": 1, "groups": 2, "group_size": 2, "max_new_tokens": 6}
    evaluate = {"env": DESK, "episodes": 6, "max_new_tokens": 6}
    config = {
        "policy": str(model), "threads": 1,
        "stages": [{"rl": {**rl, **more}}, {"evaluate": evaluate}],
    }  # fmt: skip
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_files_and_settings_are_checked_and_name_the_run(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = pipeline(tmp_path, model_folder())
    (tmp_path / "more.yaml").write_text("stages: {rl: {credit: turn-returns, updates: 4}}\nseed: 7")
    read = turnwise.RunConfig.load(
        path, tmp_path / "more.yaml", setting("stages.rl.optimizer.lr=1e-3"), {"seed": 9}
    )
    assert re.fullmatch(r"pipeline-more-lr-0.001-seed-9-[0-9a-f]{6}", read.name)
    assert turnwise.RunConfig.load(path, {"seed": 9}).name == "pipeline-seed-9"
    names = {
        turnwise.RunConfig.load(path, *map(setting, texts)).name
        for texts in (
            ["stages.rl.optimizer.lr=1"], ["stages.rl.max_new_tokens=1"], ["stages.rl.updates=1"],
            ["stages.rl.optimizer.kl=0.1"], ["stages.rl.optimizer.kl=-0.1"],
            ["stages.rl.feedback.0.weight=1"], [f"stages.rl.env={'x' * 150}"],
            [f"stages.rl.env={'x' * 151}"], ["seed=1"], ["seed=2"],
        )
        if texts != ["stages.rl.feedback.0.weight=1"]
    }  # fmt: skip
    assert len(names) == 9
    (tmp_path / "named.yaml").write_text(path.read_text() + "name: mine\n")
    named = turnwise.RunConfig.load(tmp_path / "named.yaml", {"seed": 3})
    assert named.name == "mine-seed-3"
    assert read.seed == 9
    rl = read.stages[0]["rl"]
    assert (rl["credit"], rl["updates"], rl["groups"]) == ("turn-returns", 4, 2)
    [(_, stage), _] = turnwise.Run(read, folder=tmp_path / "r").stages
    assert stage.optimizer == {"name": "grpo", "lr": 1e-3}  # options alone are the default part's
    for wrong, message in (
        ("stages.rl.optimizer.lrr=1", "no option 'lrr'. Did you mean 'lr'"),
        ("stages.rl.updates=many", "valid integer"),
        ("stage.rl.updates=1", "no key 'stage'. Did you mean 'stages'"),
    ):
        with pytest.raises((turnwise.ConfigError, turnwise.PluginError), match=message):
            turnwise.Run(turnwise.RunConfig.load(path, setting(wrong)), folder=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_what_a_merge_key_brings_in_may_be_overridden(tmp_path: Path) -> None:
    """Whether `<<` stands first or last: it is no key that comes again."""
    text = """
    policy: x
    stages:
      - rl: &rl {env: turnwise/Maze-v0, groups: 2, updates: 3}
      - rl: {<<: *rl, groups: 4}
      - rl: {groups: 5, <<: *rl}
    """
    (tmp_path / "p.yaml").write_text(text)
    stages = turnwise.RunConfig.load(tmp_path / "p.yaml").stages
    assert [stage["rl"]["groups"] for stage in stages] == [2, 4, 5]
    assert [stage["rl"]["updates"] for stage in stages] == [3, 3, 3]


def test_a_dry_run_says_what_a_run_would_do_and_does_nothing(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    feedback = ["environment", "length", {"judge": "simulated-panel", "raters": 3, "weight": 1}]
    path = pipeline(tmp_path, model_folder(), updates=5, groups=4, feedback=feedback)
    done = Command(
        "run", str(path), "--set", "stages.rl.group_size=3", "--dry-run", cwd=tmp_path
    ).wait()
    assert done.returncode == 0, done.stderr
    shown, _, said = done.stdout.partition("\n\n")
    assert shown.startswith("# All that holds")
    resolved = yaml.safe_load(shown)
    assert resolved["stages"][0]["rl"]["group_size"] == 3
    assert resolved["stages"][0]["rl"]["temperature"] == 1.0  # a default
    assert resolved["stages"][0]["rl"]["optimizer"]["name"] == "grpo"
    assert resolved["stages"][0]["rl"]["optimizer"]["clip"] == 0.2
    assert "pipeline-group_size-3" in said
    assert f"plays 60 conversations of 20 starts in {DESK}" in said
    assert "asks length about 60 conversations" in said
    assert "asks simulated-panel about 20 groups, 3 times each" in said
    assert f"plays 6 starts of {DESK} by policy, before" in said
    assert resolved["stages"][0]["rl"]["credit"]["name"] == "outcome", (
        "what goes with the optimizer"
    )
    (tmp_path / "models").mkdir()
    for wrong in (str(model_folder()) + "y", "models/typo"):
        done = Command(
            "run", str(path), "--set", f"policy={wrong}", "--dry-run", cwd=tmp_path
        ).wait()
        assert f"cannot load the policy '{wrong}': there is no such folder" in done.stderr
        assert done.returncode == 1
        assert "asks length about" in done.stdout, "the rest is said all the same"
    assert not (tmp_path / "runs").exists()


def blocks() -> list[tuple[str, Any]]:
    """Returns every pipeline, or list of stages, of README, docs and examples."""
    found = [(str(p), p.read_text()) for p in sorted((ROOT / "examples").glob("**/*.yaml"))]
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        found += [
            (page.name, text) for text in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S)
        ]
    parsed = [(name, yaml.load(text, Loader)) for name, text in found]
    stages = turnwise.Plugins().names("stage")
    whole = [(name, {"policy": "x", "stages": each}) if isinstance(each, list) else (name, each)
             for name, each in parsed]  # fmt: skip
    return [
        (name, each) for name, each in whole
        if isinstance(each, dict) and "stages" in each and all(
            isinstance(s, dict) and next(iter(s)) in (*stages, "repeat") for s in each["stages"])
    ]  # fmt: skip


def test_the_schema_takes_every_pipeline_of_the_docs_and_no_misspelt_one() -> None:
    schema = config_schema(turnwise.Plugins())
    jsonschema.Draft202012Validator.check_schema(schema)
    checker = jsonschema.Draft202012Validator(schema)
    known = blocks()
    assert len(known) > 10
    for name, each in known:
        plain = json.loads(json.dumps(each))
        assert [e.message[:200] for e in checker.iter_errors(plain)] == [], name
    base = {"policy": "x", "stages": [{"rl": {"env": DESK, "optimizer": {"lr": 1e-6}}}]}
    assert checker.is_valid(base)
    assert checker.is_valid(lay_over(base, setting("stages.rl.optimizer.lr='1e-6'")))
    for wrong in (
        "stages.rl.optimizr=grpo", "stages.rl.optimizer.lrr=1", "stages.rl.updates=many",
        "stages.rl.feedback=[lenght]", "stages.rl.gold.evry=3", "sed=3", "stages.rl.updates=0",
        "stages.rl.feedback=[{judge: length, max_word: 3}]",
        "stages.rl.updates='5x'", "stages=[{rll: {env: x}}]",
    ):  # fmt: skip
        assert not checker.is_valid(lay_over(base, setting(wrong))), wrong


def test_an_empty_further_file_is_named(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    path = pipeline(tmp_path, model_folder())
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(turnwise.ConfigError, match="a mapping with the settings that it changes"):
        turnwise.RunConfig.load(path, tmp_path / "empty.yaml")


def test_a_further_list_of_stages_says_that_it_takes_the_place_of_all(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = pipeline(tmp_path, model_folder())
    (tmp_path / "more.yaml").write_text(f"stages: [{{rl: {{env: {DESK}, updates: 3}}}}]")
    with pytest.warns(UserWarning, match=r"more.yaml has a list of stages, which takes the place"):
        assert len(turnwise.RunConfig.load(path, tmp_path / "more.yaml").stages) == 1
    (tmp_path / "more.yaml").write_text("stages: {rl: {updates: 3}}")
    assert len(turnwise.RunConfig.load(path, tmp_path / "more.yaml").stages) >= 1


def test_every_pipeline_of_the_docs_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all of its parts, as they are made before a run begins, and what it would pay."""
    monkeypatch.syspath_prepend(str(ROOT))  # where a reader stands: examples.agents is found
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    for provider in ("OPENAI", "ANTHROPIC"):
        monkeypatch.setenv(f"{provider}_API_KEY", "k-test")
    for name, each in blocks():
        try:
            run = turnwise.Run(each, folder=tmp_path / "run")
            lines = [line for _, stage in run.stages for line in stage.outline()]
            lines += run.plugins.costs(run)
        except Exception as error:
            error.add_note(f"in {name}: {each}")
            raise
        assert lines, name
        assert not [line for line in lines if "cannot say" in line], name


def test_a_pipeline_to_begin_with_can_be_run(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    for optimizer, more in (
        ("grpo", ["--judge", "length"]), ("ppo", ["--no-lora"]), ("rejection", []),
    ):  # fmt: skip
        out = tmp_path / f"{optimizer}.yaml"
        done = Command(
            "config", "new", str(out), "--model", str(model_folder()), "--env", DESK,
            "--optimizer", optimizer, *more,
        ).wait()  # fmt: skip
        assert done.returncode == 0, done.stderr
        turnwise.Run(str(out), folder=tmp_path / "r")  # checks all of it
        assert jsonschema.Draft202012Validator(config_schema(turnwise.Plugins())).is_valid(
            yaml.safe_load(out.read_text())
        )
    again = Command("config", "new", str(out)).wait()
    assert (again.returncode, "is there already" in again.stderr) == (1, True)
    wrong = Command(
        "config", "new", str(tmp_path / "x.yaml"), "--model", "m", "--env", DESK, "--judge", "lenth"
    ).wait()  # fmt: skip
    assert wrong.returncode == 1
    assert not (tmp_path / "x.yaml").exists()


def test_two_runs_are_compared_and_a_past_one_is_looked_at(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = pipeline(tmp_path, model_folder())
    folders = []
    for lr in (1e-3, 0.1):
        folders.append(tmp_path / f"run-{lr}")
        # The second states two defaults as well, of which one is another value.
        stated = {"seed": 0, "stages": {"rl": {"temperature": 1.0}}} if lr == 0.1 else {}
        config = turnwise.RunConfig.load(path, setting(f"stages.rl.optimizer.lr={lr}"), stated)
        run = turnwise.Run(config, folder=folders[-1]).finish()
    done = Command("compare", *map(str, folders), "--json").wait()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["settings"] == [{"key": "stages.rl.optimizer.lr", "first": 0.001, "second": 0.1}]
    assert [each["player"] for each in found["outcomes"]] == ["policy", "before"]
    before = found["outcomes"][1]["difference"]
    # The same policy with the same seeds on the same starts: the difference is 0, to the last bit.
    assert (before["pairs"], before["outcome"], before["outcome_high"]) == (6, 0.0, 0.0)
    shown = Command("compare", *map(str, folders)).wait().stdout
    assert "stages.rl.optimizer.lr" in shown

    past = turnwise.PastRun(folders[1])
    assert past.metrics == run.metrics
    assert past.evaluation.keys() == {"policy", "before", "policy - before"}
    assert [e.id for e in past.episodes("rl")] == [e.id for e in run.episodes("rl")]
    assert len(past.episodes("rl", update=1)) == 4
    members = {m.episode: m for m in past.ledger.members(past.id, 1)}
    trained = past.trained(1)
    assert {t.episode.id: t.outcome for t in trained} == {
        m.episode: m.outcome for m in members.values()
    }
    for one in trained:
        assert len(one.credit) in (0, len(one.episode.turns))
        assert ("left out" in repr(one)) == bool(one.reason)
    table = past.frame("evaluate")
    assert table["policy/outcome"].tolist() == [past.metrics[-1]["policy/outcome"]]
    assert list(past.frame().index) == [1, 2]
    assert past.policy.model.num_parameters() == run.policy.model.num_parameters()
    answer = turnwise.Feedback("e", 0.5, comment="<b>", stamp=turnwise.Stamp(source="ann"))
    shown = answer._repr_html_()
    assert shown.count("<tr>") == 5, "a head, and what is not as by default"
    assert "&lt;b&gt;" in shown
    assert "ann" in shown
    ranked = turnwise.Comparison("g", (("a",), ("b",)))
    assert "ranking" in ranked._repr_html_()
    figure = past.plot("return", stage="rl")
    assert [axes.get_ylabel() for axes in figure.axes] == ["return"]
    assert figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it as it stands"
    with pytest.raises(turnwise.ConfigError, match="no update has a metric 'retrn'"):
        past.plot("retrn")
    with pytest.raises(turnwise.ConfigError, match="no update is of a stage 'sft'"):
        past.frame("sft")
    with pytest.raises(turnwise.ConfigError, match="holds no run"):
        turnwise.PastRun(tmp_path)
    with pytest.raises(turnwise.ConfigError, match=f"Did you mean '{past.folder}'"):
        turnwise.PastRun(f"{past.folder}x")
    for look in (past.episodes, past.trained):
        with pytest.raises(turnwise.ConfigError, match="there is no update 99: made are 1 to 2"):
            look(update=99)


def test_records_are_short_where_they_are_printed_and_safe_in_a_page(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    run = turnwise.Run(str(pipeline(tmp_path, model_folder())), folder=tmp_path / "r")
    updates = list(run)
    assert len(repr(updates[0])) < 200
    assert "'rl'" in repr(updates[0])
    assert updates[0]._repr_html_().count("<tr>") > 10
    episode = updates[0].episodes[0]
    assert len(repr(episode)) < 250
    assert len(repr(episode.turns[0])) < 1500  # the texts, and no token
    odd = turnwise.Episode(
        "e", episode.start,
        (turnwise.Turn(turnwise.Message("user", "<script>x</script>"), "<b>&", 1.0),), "terminated",
    )  # fmt: skip
    assert "<script>" not in odd._repr_html_()
    assert "&lt;b&gt;&amp;" in odd._repr_html_()
    assert repr(turnwise.Feedback("e", 0.5)) == "Feedback(episode='e', score=0.5)"
    assert repr(turnwise.Feedback.failed("e", "no")) == (
        "Feedback(episode='e', status='failed', reason='no')"
    )
    assert repr(turnwise.Message("user", "x")) == "Message(role='user', content='x')"
    assert "rl" in run._repr_html_()
    coloured = turnwise.Trained(odd, 1.0, (-0.5,), "")
    assert "190, 40, 40" in coloured._repr_html_()
    assert "-0.500" in coloured._repr_html_()


def test_an_evaluation_says_whether_the_policy_got_better(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from turnwise.engine.report.verdict import verdict

    config = yaml.safe_load(pipeline(tmp_path, model_folder()).read_text())
    run = turnwise.Run(config, folder=tmp_path / "r").finish()
    page = turnwise.running.write_report(run.folder).read_text()
    assert "Did it get better?" in page
    row = {"success": 0.2, "success_low": 0.1, "success_high": 0.3, "outcome": 0.2, "pairs": 50}
    row |= {"outcome_low": 0.1, "outcome_high": 0.3}
    scores = {"policy": {"success": 0.6}, "before": {"success": 0.4}}
    said = verdict({**scores, "policy - before": row})
    assert said == (
        "Yes: success 0.400 before, 0.600 after, +0.200 (+0.100 to +0.300, 95 %) on 50 starts."
    )
    worse = {**row, "success": -0.2, "success_low": -0.3, "success_high": -0.1}
    assert verdict({**scores, "policy - before": worse}).startswith("No, it got worse")
    unclear = {**row, "success_low": -0.1}
    assert verdict({**scores, "policy - before": unclear}).startswith("Not that these starts")
    assert verdict(scores).startswith("It is not known")
    other = {**scores, "old-policy - before": row}
    assert verdict(other).startswith("It is not known")
    named = {f"{DESK}/{name}": each for name, each in {**scores, "policy - before": row}.items()}
    assert verdict(named).startswith(f"In {DESK}: Yes")
    config["stages"][1]["evaluate"]["before"] = False
    alone = turnwise.Run(config, folder=tmp_path / "alone").finish()
    assert turnwise.PastRun(alone.folder).evaluation.keys() == {"policy"}
    evaluate = {"env": DESK, "episodes": 3, "max_new_tokens": 6, "players": ["random", "policy"]}
    config["stages"] = [config["stages"][0], {"evaluate": evaluate}, {"evaluate": evaluate}]
    last = turnwise.Run(config, folder=tmp_path / "last").finish()
    assert "policy - before" in turnwise.PastRun(last.folder).evaluation
    config["stages"] = [{"evaluate": evaluate}, {"evaluate": evaluate}]
    untrained = turnwise.Run(config, folder=tmp_path / "untrained").finish()
    assert turnwise.PastRun(untrained.folder).evaluation.keys() == {
        "random", "policy", "random - policy"
    }  # fmt: skip
