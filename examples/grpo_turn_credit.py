"""GRPO with credit per turn: each turn is compared with those of the others at the same place."""

import sys

import turnwise


def main(policy: str, updates: int = 20) -> turnwise.Run:
    run = turnwise.train(
        policy,
        env="turnwise/SupportDesk-v0",
        optimizer={"name": "grpo", "lr": 1e-3, "kl": 0.02},
        credit="turn-returns",
        updates=updates,
        groups=4,
        group_size=4,
        max_new_tokens=24,
    )
    for one in run.trained()[:4]:
        print(one)  # its outcome, each turn's credit, or why it was left out
        for turn in one.episode.turns:
            print(f"  {turn.action!r}")
    return run


if __name__ == "__main__":
    main(sys.argv[1])
