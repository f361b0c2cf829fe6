"""The command line, as a user meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import turnwise
from support.command import Command
from turnwise.engine.cli.main import main
from turnwise.learning import build_policy


def call(
    *arguments: str, cwd: Path | None = None, said: str = ""
) -> subprocess.CompletedProcess[str]:
    return Command(*arguments, cwd=cwd, given=said).wait()


def test_help_lists_every_command() -> None:
    done = call("--help")
    assert done.returncode == 0
    for command in ("run", "demo", "evaluate", "report", "chat", "export", "plugins", "envs"):
        assert command in done.stdout


def test_a_pipeline_from_a_file(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(f"""
policy: {model_folder()}
threads: 1
stages:
  - sft: {{env: turnwise/SupportDesk-v0, episodes: 30, lr: 1.0e-3}}
  - rl: {{env: turnwise/SupportDesk-v0, updates: 1, groups: 2, group_size: 2, max_new_tokens: 6, feedback: [environment, length]}}
  - evaluate: {{env: {{id: turnwise/SupportDesk-v0, options: {{split: held_out}}}}, episodes: 8, players: [policy, expert], max_new_tokens: 6}}
""")  # noqa: E501
    done = call("run", "pipeline.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Finished after update 3" in done.stdout
    assert "expert" in done.stdout
    table = json.loads((tmp_path / "runs" / "pipeline" / "evaluation.json").read_text())
    assert table["expert"]["success"] == 1.0
    again = call("run", "pipeline.yaml", cwd=tmp_path)
    assert (again.returncode, "results already" in again.stderr) == (1, True)
    shown = call(
        "evaluate", str(tmp_path / "runs/pipeline/policy"), "--env", "turnwise/SupportDesk-v0",
        "--episodes", "5",
        "--player", "random", "--max-new-tokens", "6", "--json",
    )  # fmt: skip
    assert set(json.loads(shown.stdout)) == {"policy", "random"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "policy: nowhere\nstages: [{rl: {env: turnwise/Maze-v0, update: 3}}]",
            "Did you mean 'updates'",
        ),
        ("policy: nowhere\nstage: []", "has no key 'stage'. Did you mean 'stages'"),
        ("policy: nowhere\nstages: []", "at least 1 item"),
        ("policy: nowhere\nstages: [{lr: {}}]", "no stage 'lr'. Did you mean 'rl'"),
        (
            "policy: nowhere\nstages: [{rl: {env: turnwise/Maze-v0}}]",
            "cannot load the policy 'nowhere'. It is no local folder",
        ),
        (
            "policy: {mdel: x}\nstages: [{rl: {env: turnwise/Maze-v0}}]",
            "policy has no key 'mdel'. Did you mean 'model'",
        ),
        ("stages: [{rl: {env: turnwise/Maze-v0}}]", "needs the key 'policy'"),
        (
            "policy: nowhere\nstages: [{evaluate: {env: turnwise/Maze-v0, players: [exprt]}}]",
            "Did you mean 'expert'",
        ),
        (
            (
                "policy: nowhere\nstages: [{rl: {env: turnwise/Maze-v0, optimizer: {name: ppo, lr:"
                " 1e-3, kl: -1}}}]"
            ),
            "ppo.kl: Input should be greater than or equal to 0 (got -1)",
        ),
        (
            "polcy: tiny\nstages: [{rl: {env: turnwise/Maze-v0}}]",
            "turnwise: the config has no key 'polcy'. Did you mean 'policy'?",
        ),
        (
            "policy: x\nstages: {rl: {env: turnwise/Maze-v0}}",
            "as in `stages: [{rl: {...}}]`",
        ),
        ("policy: x\nstages: rl", "stages: it must be a list"),
        (
            "policy: ./tinny\nstages: [{rl: {env: turnwise/Maze-v0}}]",
            "no such folder. Did you mean the folder 'tiny'?",
        ),
        (
            "policy: tinny\nstages: [{rl: {env: turnwise/Maze-v0}}]",
            "no model of that name could be fetched. Did you mean the folder 'tiny'?",
        ),
        (
            "policy: /no/such\nstages: [{rl: {env: turnwise/Maze-v0}}]",
            "cannot load the policy '/no/such': there is no such folder",
        ),
        ("policy: empty\nstages: [{rl: {env: turnwise/Maze-v0}}]", "the folder holds no model"),
        (
            "policy: x\nname: ../../x\nstages: [{rl: {env: turnwise/Maze-v0}}]",
            "the run's name '../../x' is to be its folder under runs/",
        ),
        (
            "policy: x\nname: ..\nstages: [{rl: {env: turnwise/Maze-v0}}]",
            "the run's name '..' is to be its folder under runs/",
        ),
        (
            "policy: x\nstages: [{rl: {env: turnwise/Maze-v0, feedback: [polite]}}]",
            "One of your own is given as an object, or named as",
        ),
        (
            "policy: x\nstages: [{rl: {env: turnwise/Maze-v0, learning_rate: 1}}]",
            "an option of the optimizer, called 'lr'",
        ),
        (
            (
                "policy: x\nstages: [{rl: {env: turnwise/Maze-v0, optimizer: {name: grpo,"
                " learning_rate: 1}}}]"
            ),
            "Here it is called 'lr'",
        ),
        (
            "policy: 3\nstages: [{rl: {env: turnwise/Maze-v0}}]",
            "policy must be a model's folder or hub name",
        ),
        ("3: 4", "keys must be words, got 3"),
        ("policy: x\nseed: 1\nseed: 2", "the key 'seed' is there already\n  line 3, column 1"),
        (
            "a: &a {seed: 1, <<: {name: b}}\npolicy: {<<: *a, model: x, <<: {k: 1}}",
            "the key '<<' is there already",
        ),
        ("policy: x\nstages: [{r1: {}}]", "no stage 'r1'. Did you mean 'rl'"),
        (
            "policy: x\nstages: [{rl: {env: turnwise/Maze-v0, feedback:"
            " [{judge: 'os.path:basename', wieght: 1}]}}]",
            "no option 'wieght'. Did you mean 'weight'",
        ),
        ("policy: \xff\udcff", "not valid YAML"),
        ("[1, 2", "not valid YAML"),
        ("- 1", "must hold a mapping"),
    ],
)
def test_bad_configs_are_one_message(
    config: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "c.yaml").write_bytes(config.encode(errors="surrogateescape"))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["turnwise", "run", "c.yaml"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert message in said or re.search(message, said), said
    assert "Traceback" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "c.yaml",
        "empty",
        "tiny",
    ], "nothing is left behind"


def test_the_version_and_commands_that_are_not_known() -> None:
    assert call("--version").stdout == f"turnwise {turnwise.__version__}\n"
    for wrong, hint in (("trian", "run"), ("plugin", "plugins"), ("reprot", "report")):
        done = call(wrong)
        said = " ".join(done.stderr.replace("│", " ").split())
        assert (done.returncode, f"no command {wrong!r}. Did you mean {hint!r}" in said) == (
            2,
            True,
        ), said


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("policy: x")
    with pytest.raises(
        turnwise.ConfigError,
        match=r"is a folder, and a run is made from a config.*resume=True.*`turnwise report",
    ):
        turnwise.Run(tmp_path)
    with pytest.raises(
        turnwise.ConfigError,
        match=r"is a folder, and a run is made from a config, a file in YAML\.$",
    ):
        turnwise.Run(str(tmp_path.parent))


def test_evaluate_plays_one_seat_of_several(tmp_path: Path) -> None:
    model = build_policy(tmp_path / "m", ["[0 1] tic tac toe"], hidden=16, layers=1, context=2048)
    command = ["evaluate", str(model), "--env", "textarena/TicTacToe-v0", "--episodes", "3",
        "--max-new-tokens", "4", "--player", "random", "--json"]  # fmt: skip
    done = call(*command, "--seats", '{"0": "random", "1": "policy"}')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["random"]["episodes"] == 3
    both = call(*command, "--seats", '{"0": "policy", "1": "policy"}')
    assert both.returncode == 1
    assert "gives the seats 0, 1 to the policy" in both.stderr
    wrong = call(*command, "--seats", '{"0": "expert", "1": "policy"}')
    assert (wrong.returncode, "has no player 'expert'" in wrong.stderr) == (1, True)
    none = call(*command, "--seats", '{"0": "random"}')
    assert (none.returncode, "must be the policy's" in none.stderr) == (1, True)


def test_envs_lists_and_checks() -> None:
    listed = call("envs").stdout
    assert "turnwise/SupportDesk-v0" in listed
    assert "CartPole" not in listed
    assert "textarena/Wordle-v0  not here: its list of words is fetched" in listed
    assert "nothing wrong" in call("envs", "--check", "turnwise/Maze-v0").stdout
    tests = Path(__file__).parent
    bad = call(
        "envs", "--check", "test/NeverEnds-v0", "--module", "support.environments", cwd=tests
    )
    assert bad.returncode == 1
    assert "did not end" in bad.stdout
    missing = call("envs", "--check", "turnwise/Mase-v0")
    assert (missing.returncode, "Did you mean 'turnwise/Maze-v0'" in missing.stderr) == (1, True)
    unplayable = call("envs", "--check", "textarena/Chess-v0")
    assert "cannot be played here: it imports chess, which is under the GPL" in unplayable.stderr


def test_a_users_own_module_by_the_installed_command(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """`turnwise`, not `python -m turnwise`: the current folder must be found all the same."""
    (tmp_path / "mine.py").write_text(
        "import gymnasium, turnwise\n"
        "class Mine(gymnasium.Env):\n"
        "    observation_space = action_space = turnwise.Text(1000)\n"
        "    def reset(self, **more): return 'hello', {}\n"
        "    def step(self, action): return 'bye', 1.0, True, False, {}\n"
        "gymnasium.register('mine/Mine-v0', Mine)\n"
    )
    (tmp_path / "c.yaml").write_text(
        f"policy: {model_folder()}\nthreads: 1\nstages: [{{evaluate: {{env: mine/Mine-v0, episodes:"
        " 3, max_new_tokens: 3}}]"
    )
    script = str(Path(sys.executable).parent / "turnwise")
    done = subprocess.run(
        [script, "run", "c.yaml", "--module", "mine"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = call("envs", "--check", "mine/Mine-v0", "--module", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = call("run", "c.yaml", cwd=tmp_path)
    assert (done.returncode, "no environment 'mine/Mine-v0'" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [
                "evaluate",
                "{model}",
                "--env",
                "turnwise/SupportDesk-v0",
                "--episodes",
                "2",
                "--options",
                '{"splt": "x"}',
            ],
            "SupportDesk takes",
        ),
        (
            ["evaluate", "{model}", "--env", "turnwise/SupportDesk-v0", "--options", "{"],
            "--options is not JSON",
        ),
        (["evaluate", "{parent}", "--env", "turnwise/Maze-v0"], "holds no model"),
        (["envs", "--check", "CartPole-v1"], "make: its observation space is Box("),
        (
            ["envs", "--check", "mine/Mine-v0"],
            "One of your own is registered when its module is imported",
        ),
        (
            ["envs", "--check", "mine/Mine-v0", "--module", "mine.py"],
            "name it as `import` does, such as mine",
        ),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    filled = [
        a.replace("{model}", str(model_folder())).replace("{parent}", str(tmp_path))
        for a in arguments
    ]
    done = call(*filled, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_an_evaluation_plays_as_the_run_did_and_shows_what_failed(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "half.py").write_text(
        "import gymnasium, turnwise\n"
        "class Half(gymnasium.Env):\n"
        "    observation_space = action_space = turnwise.Text(1000)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        if seed % 2: raise RuntimeError('flaky')\n"
        "        return 'hello', {}\n"
        "    def step(self, action): return 'bye', float(len(action)), True, False, {}\n"
        "gymnasium.register('half/Half-v0', Half)\n"
    )
    (tmp_path / "c.yaml").write_text(
        f"policy: {model_folder()}\nthreads: 1\nstages: [{{rl: {{env: half/Half-v0, updates: 1,"
        " groups: 4, group_size: 2, max_new_tokens: 5, max_failure_rate: 0.9}}]"
    )
    played = call("run", "c.yaml", "--module", "half", cwd=tmp_path)
    assert (played.returncode, "4 episodes failed in their environment" in played.stdout) == (
        0,
        True,
    ), played.stderr
    evaluated = (
        "evaluate",
        "runs/c/policy",
        "--env",
        "half/Half-v0",
        "--module",
        "half",
        "--episodes",
        "6",
    )
    shown = call(*evaluated, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert (
        "replies of at most 5 tokens, as in runs/c/config.yaml (--max-new-tokens)" in shown.stderr
    )
    assert (
        "3 of 6 episodes of 'policy' failed and are left out: reset: RuntimeError: flaky"
        in shown.stderr
    )
    assert "3 of 6" in shown.stdout
    assert (
        "replies of at most" not in call(*evaluated, "--max-new-tokens", "3", cwd=tmp_path).stderr
    )


def test_train_tells_what_it_does_where_no_terminal_is(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    code = (
        f"import turnwise\nturnwise.train({str(model_folder())!r}, 'turnwise/SupportDesk-v0',"
        " feedback=['environment', 'length'], updates=2, groups=2, group_size=2, max_new_tokens=4)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    lines = done.stderr.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("rl ")] == ["rl 1", "rl 2"]
    assert any(
        line.endswith(f"finished after update 2; everything is in {tmp_path}/runs/supportdesk-v0-1")
        for line in lines
    )


@pytest.mark.slow
def test_the_demo_in_small(tmp_path: Path) -> None:
    """The whole demo with a few updates: everything it promises to write is there."""
    done = call("demo", "--quick", "--folder", str(tmp_path / "demo"), "--seed", "3")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["seed"] == 3
    assert set(summary["players"]) == {"expert", "random", "sft", "ppo", "grpo"}
    for player in summary["players"].values():
        assert {"outcome", "success", "low", "high", "turns", "questions"} <= set(player)
        assert player["low"] <= player["success"] <= player["high"]
    assert summary["players"]["expert"]["outcome"] == 1.0
    assert (tmp_path / "demo" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "## After SFT" in (tmp_path / "demo" / "before-after.md").read_text()
    assert "before (SFT)" in done.stdout
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("all my work")
    refused = call("demo", "--quick", "--folder", str(other))
    assert refused.returncode == 1
    assert (other / "thesis.txt").exists()


def test_rank_export_report_and_chat(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(f"""
policy: {model_folder()}
threads: 1
stages:
  - rank: {{env: turnwise/SupportDesk-v0, updates: 1, groups: 3, group_size: 3, max_new_tokens: 6, feedback: [simulated-panel]}}
  - rl: {{env: turnwise/SupportDesk-v0, updates: 2, groups: 2, group_size: 2, max_new_tokens: 6, feedback: [{{judge: length, max_words: 1}}]}}
""")  # noqa: E501
    done = call("run", "pipeline.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    exported = call("export", "runs/pipeline", "pairs.jsonl", cwd=tmp_path)
    assert "9 pairs of 3 comparisons" in exported.stdout
    records = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert all(set(r) >= {"prompt", "chosen", "rejected", "rater"} for r in records)
    shown = call("report", "runs/pipeline", cwd=tmp_path)
    assert (shown.returncode, shown.stdout.strip()) == (0, "runs/pipeline/report.html")
    assert "simulated-panel: 3" in (tmp_path / "runs/pipeline/report.html").read_text()
    assert "holds no run" in call("report", ".", cwd=tmp_path).stderr

    policy = str(tmp_path / "runs/pipeline/policy")
    talked = call("chat", policy, "--max-new-tokens", "5", said="hello\nhow are you?\n\n")
    assert talked.returncode == 0, talked.stderr
    assert talked.stdout.count("policy  ") == 2
    watched = call(
        "chat", policy, "--env", "turnwise/SupportDesk-v0", "--max-new-tokens", "5", "--seed", "3"
    )
    assert "return" in watched.stdout
    assert (
        watched.stdout
        == call(
            "chat",
            policy,
            "--env",
            "turnwise/SupportDesk-v0",
            "--max-new-tokens",
            "5",
            "--seed",
            "3",
        ).stdout
    )
    played = call("chat", "--env", "turnwise/Maze-v0", said="north\n\n")
    assert "You are the agent in turnwise/Maze-v0" in played.stdout
    assert "Left the conversation" in played.stderr
    tools = json.dumps({"env": "turnwise/SupportDesk-v0", "tools": ["statistics:fmean"]})
    shown = call("chat", "--env", "turnwise/Tools-v0", "--kwargs", tools, said="\n").stdout
    assert "You help the customers of a shop" in shown
    assert '"name": "fmean"' in shown
    assert "name a policy to talk to" in call("chat").stderr


def test_a_run_that_failed_says_how_to_go_on(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The environment is away after eight conversations, and back in another process."""
    (tmp_path / "tired.py").write_text("""\
import gymnasium
import turnwise

class Tired(gymnasium.Env):
    observation_space = action_space = turnwise.Text(100)
    played = 0

    def reset(self, *, seed=None, options=None):
        Tired.played += 1
        if Tired.played > 8:
            raise OSError("no connection")
        return f"hello {seed}", {}

    def step(self, action):
        return "bye", float(len(action)), True, False, {}

gymnasium.register("tired/Tired-v0", Tired)
""")
    (tmp_path / "c.yaml").write_text(f"""
policy: {model_folder()}
threads: 1
stages:
  - rl: {{env: tired/Tired-v0, updates: 2, groups: 2, group_size: 4, max_new_tokens: 6}}
""")
    failed = call("run", "c.yaml", "--module", "tired", cwd=tmp_path)
    assert failed.returncode == 1
    assert "no connection" in failed.stderr
    hint = "To go on after update 1:  turnwise run --resume c.yaml --module tired"
    assert failed.stderr.rstrip().endswith(hint)
    again = call("run", "--resume", "c.yaml", "--module", "tired", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "Finished after update 2" in again.stdout


def test_a_person_takes_a_seat() -> None:
    seats = '{"0": "random", "1": "policy"}'
    said = "".join(f"{field}\n" for field in (*range(9), *range(9)))
    played = call("chat", "--env", "textarena/TicTacToe-v0", "--seats", seats, said=said)
    assert played.returncode == 0, played.stderr
    assert "in seat 1" in played.stdout
    assert "You are Player 1 in Tic Tac Toe" in played.stdout
    assert "terminated; return" in played.stdout


@pytest.mark.slow
def test_the_road_quickly(tmp_path: Path) -> None:
    done = call("demo", "--road", "--quick", "--folder", str(tmp_path / "road"), "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert "To go on: turnwise chat" in done.stdout
    summary = json.loads((tmp_path / "road" / "summary.json").read_text())
    assert set(summary["reward_model"]) >= {"pair_accuracy", "rater_agreement", "calibration_error"}
    assert set(summary["players"]) >= {"expert", "random", "sft", "ppo-rm", "grpo", "best-of-4"}
    assert (tmp_path / "road" / "report.html").stat().st_size < 5_000_000
    stages = [
        json.loads(line)["stage"]
        for line in (tmp_path / "road" / "road" / "metrics.jsonl").read_text().splitlines()
    ]
    assert list(dict.fromkeys(stages)) == ["rank", "reward-model", "rl", "evaluate"]
