"""A task set of verifiers, run by verifiers' own harness, in which nothing is changed.

env:
  id: turnwise/Agent-v0
  kwargs:
    command: [PYTHON, examples/agents/verifiers_harness.py, TASKSET]
    tasks: rows.jsonl  # {"row": 0}, {"row": 1}, ...: numbers of the set's tasks

PYTHON has `verifiers` (an environment of its own: it needs openai below 3) and finds `uv`.
"""

import asyncio
import itertools
import json
import os
import sys
from urllib.request import Request, urlopen

import verifiers.v1 as vf


async def main(name):
    """Runs the harness on one task, and posts the reward that the task gives."""
    row = json.loads(os.environ["TURNWISE_TASK"])["row"]
    tasks = vf.load_taskset(vf.TasksetConfig(id=name)).load()
    policy = vf.EvalClientConfig(
        base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY"
    )
    config = vf.AgentConfig(
        harness={"id": "null"}, runtime=vf.SubprocessConfig(),
        client=policy, model=os.environ["TURNWISE_MODEL"],
    )  # fmt: skip
    trace = await vf.make_agent(config).run(next(itertools.islice(tasks, row, None)))
    if trace.last_error is not None:
        sys.exit(str(trace.last_error))
    key = {"Authorization": f"Bearer {os.environ['TURNWISE_KEY']}"}
    reward = json.dumps({"reward": trace.reward}).encode()
    urlopen(Request(os.environ["TURNWISE_URL"] + "/reward", reward, key))


asyncio.run(main(sys.argv[1]))
