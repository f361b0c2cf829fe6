"""verifiers/Taskset-v0: a task set of verifiers (Prime Intellect), one reply for each task.

`kwargs: {taskset: ID}` names it as verifiers does: the module that exports it. A task is a start,
known by its prompt; the reply is scored by the task's own rewards, and success is a reward of at
least 1. Its metrics are in `info["metrics"]`.

What verifiers runs in a program and a box of its own (tools, several turns, a runtime) is not
played here: such a task set is refused by name. verifiers 0.4 needs openai below 3, which the
judges here do not, so that it is installed where no model judges.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import gymnasium

from ..protocols import Text
from ..tools import Splits, canonical_json, split_tasks, task_of

OWN_HARNESS = (
    "that runs in verifiers' own harness, and only tasks that a single reply solves are played here"
)
LIMIT = 10_000  # tasks of a set that never ends


class Taskset(gymnasium.Env[str, str]):
    """Tasks of verifiers; see the module's docstring.

    Args:
        taskset: its id.
        config: of the task set.
        held_out: share of the tasks that are held out (`options={"split": "held_out"}`).

    Raises:
        ValueError: there is no such task set, or it needs more than a reply.
    """

    metadata: dict[str, Any] = {"render_modes": [], "concurrency": "thread"}
    observation_space = action_space = Text(1_000_000)

    def __init__(
        self, taskset: str, config: Mapping[str, Any] | None = None, held_out: float = 0.1
    ) -> None:
        if not 0 <= held_out < 1:
            raise ValueError("held_out must be in [0, 1)")
        if not taskset or not isinstance(taskset, str):
            raise ValueError(f"taskset must be a task set's id, got {taskset!r}")
        if not isinstance(config or {}, Mapping):
            raise ValueError(f"config must be a mapping, got {config!r}")
        self._name = taskset
        self._rows = _tasks(taskset, canonical_json(dict(config or {})), held_out)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Asks the seed's task.

        Raises:
            ValueError: the split is neither "train" nor "held_out", or has no tasks.
        """
        super().reset(seed=seed)
        number = int(self.np_random.integers(2**31)) if seed is None else seed
        key, row = task_of(self._rows, options, number, self._name)
        self.task, self._asked, self._system = row["task"], row["prompt"], row["system"]
        system = {"system": self._system} if self._system else {}
        return self._asked, {"row": key, **system}

    async def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:  # type: ignore[override]
        """Scores the reply.

        Raises:
            ValueError: the task has no reward.
        """
        import verifiers.v1 as vf

        spoken = [vf.UserMessage(content=self._asked), vf.AssistantMessage(content=action)]
        if self._system:
            spoken.insert(0, vf.SystemMessage(content=self._system))
        nodes = [
            vf.MessageNode(
                parent=k - 1 if k else None, message=m, sampled=isinstance(m, vf.AssistantMessage)
            )
            for k, m in enumerate(spoken)
        ]
        task = vf.TraceTask(type=type(self.task).__name__, data=self.task.data)
        trace = vf.Trace(task=task, agent=vf.AgentInfo(config=vf.AgentConfig()), nodes=nodes)
        await self.task.score(trace)
        if not trace.rewards:
            raise ValueError(f"a task of {self._name} has no reward")
        reward = float(trace.reward)
        return "", reward, True, False, {"success": reward >= 1.0, "metrics": dict(trace.metrics)}


@lru_cache(maxsize=64)
def _tasks(name: str, config: str, held_out: float) -> Splits:
    """Returns the tasks of both splits; no prompt is in both.

    Raises:
        ValueError: there is no such task set, or it needs more than a reply.
    """
    import verifiers.v1 as vf
    from verifiers.v1.utils.loaders import taskset_class, taskset_config_type

    try:
        kind = taskset_class(name)
        made = kind(taskset_config_type(name)(id=name, **json.loads(config)))
    except (ImportError, TypeError, AttributeError) as error:
        raise ValueError(f"taskset {name!r}: {error}") from error
    task_kind = kind.task_type()
    hooks = ("setup", "finalize", "stage_verifier")
    needs = {
        "a container": task_kind.NEEDS_CONTAINER,
        "a runtime that it prepares": any(
            inspect.getattr_static(task_kind, hook) is not inspect.getattr_static(vf.Task, hook)
            for hook in hooks
        ),
        "tools": bool(kind.toolsets(made.config))
        or task_kind.toolsets.__func__ is not vf.Task.toolsets.__func__,
    }
    if found := [what for what, needed in needs.items() if needed]:
        raise ValueError(f"taskset {name!r} needs {' and '.join(found)}: {OWN_HARNESS}")
    rows: list[tuple[Any, Any, Mapping[str, Any]]] = []
    for task in itertools.islice(made, None if made.bounded else LIMIT):
        if why := _beyond(task):
            raise ValueError(f"task {task.data.idx} of {name!r} needs {why}: {OWN_HARNESS}")
        system, prompt = _texts(task, name)
        row = {"task": task, "prompt": prompt, "system": system}
        rows.append((prompt.split(), [system, task.data.id], row))
    return split_tasks(rows, held_out)


def _beyond(task: Any) -> str:
    """Returns what a task needs besides a reply; empty where that is all."""
    signals = [*task.hooks("reward"), *task.hooks("metric")]
    signals += [judge.score for judge in task.plugged_judges()]
    for signal in signals:
        runtime = inspect.signature(signal).parameters.get("runtime")
        if runtime is not None and runtime.default is runtime.empty:
            return f"a runtime for {signal.__name__!r}"
    return "an image" if task.data.image else ""


def _texts(task: Any, name: str) -> tuple[str, str]:
    """Returns a task's system prompt and its prompt.

    Raises:
        ValueError: it begins with more than a message of the user.
    """
    prompt, system = task.data.prompt, task.data.system_prompt or ""
    if isinstance(prompt, str):
        return system, prompt
    messages = list(prompt or ())
    if messages and messages[0].role == "system" and not system:
        system = str(messages.pop(0).content)
    if [m.role for m in messages] != ["user"] or not isinstance(messages[0].content, str):
        raise ValueError(
            f"task {task.data.idx} of {name!r} does not begin with one text of the user's"
        )
    return system, messages[0].content
