"""Plays a pipeline in the processes that a launcher started and saves the gradient of every step;
used by test_processes.py.

Steps are plain gradient descent at the rate of the config: AdamW's first ones have the size of the
rate whatever the gradient is, so rounding where it is nearly zero would be seen in everything that
follows. A critic begins with something to say, or its gradients would be zero below its last layer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import turnwise
from turnwise.engine.pipeline.processes import leave
from turnwise.engine.policy.learner import Learner
from turnwise.engine.policy.sharding import full
from turnwise.plugins.optimizers.ppo import Critic


def play(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the gradients of every step of a run, whole, and the weights it ends with."""
    gradients: list[list[torch.Tensor]] = []
    step, begin = Learner.step, Critic.__init__

    def outspoken(critic: Critic, hidden_size: int) -> None:
        begin(critic, hidden_size)
        torch.nn.init.normal_(critic.layers[2].weight, std=0.5)

    def recorded(learner: Learner, progress: float, what: Any) -> float:
        gradients.append(
            [
                torch.zeros(p.shape) if p.grad is None else full(p.grad).detach().clone()
                for p in learner._parameters
            ]
        )
        learner.adam = torch.optim.SGD(learner._masters, lr=1.0)  # `step` sets the rate
        return step(learner, progress, what)

    Learner.step = recorded  # type: ignore[method-assign]
    Critic.__init__ = outspoken  # type: ignore[method-assign]
    try:
        run = turnwise.Run(config, folder=folder).finish()
    finally:
        Learner.step = step  # type: ignore[method-assign]
        Critic.__init__ = begin  # type: ignore[method-assign]
    network = run.policy.copied_network()
    found = {
        "gradients": gradients,
        "weights": [p.detach() for p in network.parameters()],
        "processes": run.policy.accelerator.num_processes,
        "divided": run.policy.is_sharded,
        "updates": run.updates,
    }
    return found | {"run": run}


if __name__ == "__main__":
    asked, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    made = [play(config, out / str(i)) for i, config in enumerate(asked)]
    run = [each.pop("run") for each in made][-1]
    if run.is_main:
        torch.save(made, out / "made.pt")
    leave(run)
