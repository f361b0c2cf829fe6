"""An offline stage: plays groups once, has them ranked, and trains an optimizer on the
comparisons."""

from typing import Any

import torch
import turnwise
from turnwise.judging import Sources
from turnwise.learning import make_batch


class Offline(turnwise.Stage):
    env: str
    feedback: list[Any]
    optimizer: str = "acme-dpo"
    updates: int = 2

    def play(self, run):
        optimizer = run.plugins.create("optimizer", self.optimizer)
        optimizer.setup(run.policy)
        player = turnwise.PolicyPlayer(run.policy, turnwise.Sampling(1.0, 8))
        chosen = [(s, slot) for s in turnwise.starts(self.env, 1, 3) for slot in range(3)]
        where = turnwise.Where(run.id, run.stage, run.updates + 1, run.config.seed)
        episodes = run.ledger.add_episodes(turnwise.rollout(player, chosen, where))
        groups = {}
        for e in episodes:
            groups.setdefault(e.group, []).append(e)
        sources = Sources.make([self.feedback], run.plugins, 0.5)
        sources.ask([groups], run.ledger)
        sources.receive(run.ledger)
        place = {e.id: i for i, e in enumerate(episodes)}
        comparisons = [
            f for f in run.ledger.feedback(list(groups)) if isinstance(f, turnwise.Comparison)
        ]
        pairs = [(place[a], place[b]) for c in comparisons for a, b in turnwise.ranked_pairs(c)]
        better, worse = torch.tensor(pairs).T
        ones = torch.ones(len(pairs))
        for _ in range(self.updates):
            batch = make_batch(
                episodes, [turnwise.Rewards(0.0, (0.0,) * len(e.turns)) for e in episodes]
            )
            batch.pairs = turnwise.Pairs(better, worse, ones, torch.zeros(len(pairs)), ones)
            optimizer.prepare(run.policy, batch)
            metrics = optimizer.update(run.policy, batch)
            run.policy.version += 1
            yield run.finish_update({**metrics, "pairs": float(len(pairs))}, episodes=episodes)
