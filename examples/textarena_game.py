"""A game of TextArena, played alone: a number from 1 to 20 is to be guessed."""

import sys

import turnwise


def main(policy: str, updates: int = 20) -> turnwise.Run:
    return turnwise.train(
        policy,
        env={"id": "textarena/GuessTheNumber-v0"},
        optimizer={"name": "grpo", "lr": 1e-4},
        updates=updates,
        groups=4,
        group_size=4,
        max_new_tokens=12,
        max_turns=10,
    )


if __name__ == "__main__":
    print(main(sys.argv[1]))
