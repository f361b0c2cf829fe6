"""The command line: `turnwise run | evaluate | report | chat | export | plugins | envs`, and
whatever commands plugins add (`turnwise demo`).

Exit statuses: 0 done; 1 failed, and the message gives the reason; 2 the command line is wrong; 3
paused until a decision is made; 130 ended by Ctrl-C, 143 by SIGTERM, with everything saved.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer.core

from .errors import PluginError
from .pipeline.plugins import Plugins
from .util.secrets import redact
from .util.suggest import did_you_mean
from .util.wording import one_line


class Commands(typer.core.TyperGroup):
    """The commands; an unknown one is answered with a list of those that exist."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Returns the command of this name, or fails with near names."""
        if args and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"no command {args[0]!r}.{did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands, help="Aligns multi-turn agents on whole conversations.", no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def main() -> None:
    """Runs the command line; an error that the user can fix is printed as one message, not as a
    traceback."""
    sys.path.insert(0, os.getcwd())  # the user's own environments and judges, as with `python -m`
    others, ours = warnings.formatwarning, str(Path(__file__).parents[1])
    warnings.formatwarning = lambda message, category, filename, *more: (
        f"turnwise: {redact(str(message))}\n"
        if filename.startswith(ours)
        else redact(others(message, category, filename, *more))
    )
    try:
        plugins = Plugins()
        plugins.call_commands(app)
        app.info.context_settings = {**(app.info.context_settings or {}), "obj": plugins}
        app()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        lines = redact(str(error)).splitlines()  # it may quote an environment or a server
        print("turnwise: " + "\n".join(map(one_line, lines)), file=sys.stderr)
        sys.exit(1)


def _is_for_the_user(error: Exception) -> bool:
    """Returns whether an error is one of ours, which says what to do; any other is a bug and keeps
    its traceback."""
    return type(error).__module__.startswith("turnwise.") or (
        isinstance(error, LookupError) and not isinstance(error, (KeyError, IndexError))
    )


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"turnwise {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    pass


MODULE = typer.Option(
    help="Import this module first, which registers environments; `run` takes its hooks too."
)
KWARGS = typer.Option(help="What the environment is made with (gymnasium.make), as JSON.")
LEDGER = typer.Option(help="The ledger's URL, where the one in the config had a password.")


def import_module(module: str | None, plugins: Plugins | None = None) -> None:
    """Imports the module that `--module` names, from the current folder or installed; where it has
    hooks it is a plugin too."""
    if module and (module.endswith(".py") or "/" in module):
        raise PluginError(
            f"--module {module}: name it as `import` does, such as {Path(module).stem}; it is"
            " looked for in this folder"
        )
    try:
        if module:
            found = importlib.import_module(module)
            if plugins is not None:
                plugins.adopt(module, found)
    except ImportError as error:
        raise PluginError(f"--module {module}: {error}") from error


@app.command("run")
def run_(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A pipeline in YAML.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where the run goes; default runs/<name>.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the config's seed.")] = None,
    resume: Annotated[
        bool,
        typer.Option(help="Go on with what the folder holds, exactly; from the start if nothing."),
    ] = False,
    module: Annotated[str | None, MODULE] = None,
) -> None:
    """Runs a pipeline: sft, rank, reward-model, rl, evaluate, and stages of plugins."""
    from .pipeline.config import RunConfig
    from .pipeline.folder import read_evaluation
    from .pipeline.progress import Display, in_a_line, quiet
    from .pipeline.run import Run
    from .stages.rl.metrics import idle_stages, learned_nothing

    import_module(module, context.obj)
    read = RunConfig.load(config)
    if seed is not None:
        read.seed = seed
    quiet()
    warnings.filterwarnings("ignore", message="the run is paused")  # printed at the end
    main = os.environ.get("RANK", "0") == "0"
    with Display(sys.stderr.isatty() and main, log=main) as display:
        run = Run(read, folder=folder, resume=resume, plugins=context.obj, on_status=display.show)
        for update in run:
            if run.is_main and not sys.stderr.isatty():
                print(in_a_line(update), flush=True)
    if not run.is_main:
        return
    idle = {} if run.stopping else idle_stages(run.metrics)
    nothing = bool(idle) and learned_nothing(run.metrics)
    ended = "Nothing learned" if nothing else "Finished"
    how = "Paused" if run.paused else "Stopped" if run.stopping else ended
    print(
        f"{how} after update {run.updates}. Everything is in {run.folder}."
        + (f"\n{run.paused}" if run.paused else "")
    )
    for stage, why in idle.items():
        print(f"{stage} taught the policy nothing: {why}")
    if run.stopping:
        again = [f"--folder {folder}"] if folder else []
        again += [f"--seed {seed}"] if seed is not None else []
        again += [f"--module {module}"] if module else []
        print(" ".join(["To go on from there:  turnwise run --resume", str(config), *again]))
    if table := read_evaluation(run.folder):
        print_scores(table)
    if run.paused:
        raise typer.Exit(3)
    if run.stopping:
        raise typer.Exit(128 + (run.signal or signal.SIGINT))
    if nothing:
        raise typer.Exit(4)


@app.command()
def evaluate(
    policy: Annotated[str, typer.Argument(help="A model's folder or hub name.")],
    env: Annotated[str, typer.Option(help="An environment's id.")],
    episodes: Annotated[int, typer.Option(min=1)] = 300,
    player: Annotated[
        list[str] | None, typer.Option(help="Also these players of the environment, e.g. expert.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of a reply; default: as in the run that trained the policy, else 256."
        ),
    ] = None,
    options: Annotated[str, typer.Option(help="Reset options as JSON.")] = "{}",
    kwargs: Annotated[str, KWARGS] = "{}",
    seed: Annotated[int, typer.Option(help="Of the starts.")] = 20_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    module: Annotated[str | None, MODULE] = None,
) -> None:
    """Plays a policy on starts of its own, next to scripted players; see --options for held-out
    content."""
    from dataclasses import asdict

    from .analysis.scores import score
    from .pipeline.progress import quiet
    from .policy.policy import Policy
    from .records.sampling import Sampling
    from .rollout.players import PolicyPlayer, ScriptPlayer
    from .stages.environments import EnvConfig, check_envs
    from .stages.evaluate import play_held_out

    with _only_our_output() if as_json else contextlib.nullcontext():
        import_module(module)
        chosen = EnvConfig(
            id=env, options=_mapping("--options", options), kwargs=_mapping("--kwargs", kwargs)
        )
        check_envs([chosen], player or [])
        quiet()
        limit = max_new_tokens or _trained_limit(Path(policy))
        own = PolicyPlayer(Policy.from_pretrained(policy), Sampling(temperature, limit))
        players: dict[str, Any] = {"policy": own} | {
            name: ScriptPlayer(name) for name in player or []
        }
        played = {
            name: play_held_out(each, chosen, episodes, seed) for name, each in players.items()
        }
        table = {name: asdict(score(found)) for name, found in played.items()}
    for name, found in played.items():
        if reasons := Counter(e.reason for e in found if e.ending == "failed"):
            [(reason, _)] = reasons.most_common(1)
            print(
                f"{reasons.total()} of {len(found)} episodes of {name!r} failed and are left out:"
                f" {reason}",
                file=sys.stderr,
            )
    if as_json:
        print(json.dumps(table, indent=2))
    else:
        print_scores(table)


def _trained_limit(policy: Path) -> int:
    """Returns the most tokens of a reply in the run that trained the policy, from its folder; 256
    where the folder does not say."""
    from .errors import ConfigError
    from .pipeline.config import flat
    from .pipeline.folder import read_config

    try:
        stages = [
            options or {}
            for stage in flat(read_config(policy.parent)["stages"])
            for options in stage.values()
        ]
        found = [
            int(options["max_new_tokens"]) for options in stages if "max_new_tokens" in options
        ]
    except (ConfigError, KeyError, TypeError, ValueError):
        found = []
    limit, where = (found[-1], f", as in {policy.parent / 'config.yaml'}") if found else (256, "")
    print(f"replies of at most {limit} tokens{where} (--max-new-tokens)", file=sys.stderr)
    return limit


@app.command()
def report(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the page goes; default report.html in the folder.")
    ] = None,
    ledger: Annotated[str | None, LEDGER] = None,
) -> None:
    """Writes a run's report: one HTML page with curves, proxy against truth, habits, and
    conversations before and after."""
    from .report.page import write_report

    print(write_report(folder, out, ledger, context.obj))


@app.command()
def chat(
    policy: Annotated[
        str | None,
        typer.Argument(help="A model's folder or hub name; none: you play the agent yourself."),
    ] = None,
    env: Annotated[
        str | None, typer.Option(help="Play this environment: the policy as the agent, or you.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system prompt, when you talk to the policy.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    options: Annotated[str, typer.Option(help="Reset options as JSON.")] = "{}",
    seed: Annotated[int, typer.Option(help="Of replies and of the environment's start.")] = 0,
    module: Annotated[str | None, MODULE] = None,
) -> None:
    """Opens a chat with a policy, shows it at work in an environment, or lets you play an
    environment yourself."""
    from . import chat as chat_command
    from .errors import ConfigError
    from .pipeline.progress import quiet

    import_module(module)
    if policy is None and env is None:
        raise ConfigError(
            "name a policy to talk to, an --env to play yourself, or both to watch the policy play"
        )
    chosen = _mapping("--options", options)
    quiet()
    if env is None:
        assert policy is not None
        chat_command.with_policy(policy, system, temperature, max_new_tokens, seed)
    else:
        chat_command.in_environment(env, chosen, seed, policy, temperature, max_new_tokens)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[
        Path, typer.Argument(help="A .jsonl file to write, or without an ending a datasets folder.")
    ],
    form: Annotated[
        Literal["pairs", "unpaired", "stepwise"],
        typer.Option(
            "--format",
            help="TRL's dataset types: preference, unpaired preference, stepwise supervision.",
        ),
    ] = "pairs",
    threshold: Annotated[
        float | None,
        typer.Option(help="Scores from this one on are good; without it they must be 0 or 1."),
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Only feedback on this stage's conversations.")
    ] = None,
    ledger: Annotated[str | None, LEDGER] = None,
) -> None:
    """Writes the feedback on a run's conversations in the formats that other tools train on:
    comparisons, scores, scores of turns."""
    from .errors import ConfigError
    from .exchange.writing import export_pairs, export_stepwise, export_unpaired, save
    from .pipeline.folder import open_ledger
    from .records.feedback import Comparison, Feedback

    opened, run = open_ledger(folder, ledger)
    answers = opened.feedback(run=run, stages=stage, status="scored", late=True, order="target")
    comparisons = [a for a in answers if isinstance(a, Comparison)]
    scores = [a for a in answers if isinstance(a, Feedback)]
    episodes = opened.episodes(
        sorted(
            {e for c in comparisons for tier in c.ranking for e in tier}
            | {s.episode for s in scores}
        )
    )
    opened.close()
    if form == "pairs":
        rows = export_pairs(episodes, comparisons)
    elif form == "unpaired":
        rows = list(export_unpaired(episodes, scores, comparisons, threshold))
    else:
        rows = list(export_stepwise(episodes, scores, threshold))
    of = (
        f"{len(comparisons)} comparisons"
        if form == "pairs"
        else f"{len(scores)} scores and {len(comparisons)} comparisons"
    )
    if not rows:
        where = f" in {', '.join(stage)}" if stage else ""
        raise ConfigError(f"the run in {folder} has nothing to write as {form}{where}: {of}")
    save(rows, out)
    print(f"{len(rows)} {form if form == 'pairs' else f'rows, {form},'} of {of} in {out}")


@app.command("plugins")
def plugins_(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Lists plugins: version, hooks, what each registered, and why one failed."""
    from dataclasses import asdict

    infos = list(context.obj.infos.values())
    if as_json:
        print(json.dumps([asdict(info) for info in infos], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("plugin", "version", "registered", "hooks")
    for info in infos:
        entries = "\n".join(
            f"{kind}: {', '.join(names)}" for kind, names in info.registered.items()
        )
        table.add_row(
            info.name,
            info.version,
            f"[red]FAILED[/red] {info.failed}" if info.failed else entries,
            "\n".join(info.hooks),
        )
    Console().print(table)


@app.command()
def envs(
    check: Annotated[
        str | None,
        typer.Option(help="Plays whole episodes of this environment and lists what is wrong."),
    ] = None,
    kwargs: Annotated[str, KWARGS] = "{}",
    options: Annotated[str, typer.Option(help="Reset options as JSON.")] = "{}",
    episodes: Annotated[int, typer.Option(min=1, help="Starts to play.")] = 20,
    limit: Annotated[float, typer.Option(min=0.01, help="Seconds that one call may take.")] = 10.0,
    module: Annotated[str | None, MODULE] = None,
) -> None:
    """Lists dialogue environments, or checks one."""
    import gymnasium

    from .environments.checker import check_environment
    from .environments.registry import dialogue_ids

    import_module(module)
    if check is None:
        for name in dialogue_ids():
            print(f"{name}  {gymnasium.registry[name].entry_point}")
        return
    asked = _mapping("--options", options)
    problems = check_environment(
        check, episodes=episodes, limit=limit, options=asked, **_mapping("--kwargs", kwargs)
    )
    for problem in problems:
        print(f"- {problem}")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"{check}: {count if problems else 'nothing wrong'}")
    if problems:
        raise typer.Exit(1)


def _mapping(name: str, text: str) -> dict[str, Any]:
    """Parses an option that is a JSON object.

    Raises:
        ConfigError: it is not.
    """
    from .errors import ConfigError

    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f'{name} must be a JSON object such as {{"size": 5}}, got {text}')
    return value


@contextlib.contextmanager
def _only_our_output() -> Iterator[None]:
    """Sends what environments print, from C too, to standard error: standard output is for programs
    that read our JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def print_scores(table: dict[str, dict[str, Any]]) -> None:
    """Prints players and their results, as a table."""
    from rich.console import Console
    from rich.table import Table

    number = lambda row, key, digits=3: f"{row[key]:.{digits}f}" if row.get(key) is not None else ""  # noqa: E731
    interval = lambda row, low, high: f"{row[low]:.3f} to {row[high]:.3f}"  # noqa: E731
    judged = any("proxy" in row for row in table.values())
    broken = any(row.get("failed") for row in table.values())
    more_columns = (*(("proxy", "KL") if judged else ()), *(("failed",) if broken else ()))
    shown = Table(
        "player", "outcome", "success", "95 % interval", "turns", "questions", *more_columns
    )
    pairs = Table(
        "pair", "success", "95 % interval", "outcome", "95 % interval", "wins by the judge"
    )
    for name, row in table.items():
        if "pairs" in row:
            pairs.add_row(
                name, f"{row['success']:+.3f}", interval(row, "success_low", "success_high"),
                f"{row['outcome']:+.3f}",
                interval(row, "outcome_low", "outcome_high"), number(row, "win_rate"),
            )  # fmt: skip
        else:
            columns = number(row, "outcome"), number(row, "success"), interval(row, "low", "high")
            more: tuple[str, ...] = (number(row, "proxy"), number(row, "kl", 2)) if judged else ()
            more += (f"{row['failed']} of {row['episodes']}",) if broken else ()
            shown.add_row(
                name, *columns, number(row, "turns", 2), number(row, "questions", 2), *more
            )
    console = Console()
    console.print(shown)
    if pairs.row_count:
        console.print(pairs)
