"""PPO with a critic, a KL penalty, and any function of a conversation as the reward."""

import sys

import turnwise


def helpful_and_brief(episode: turnwise.Episode) -> float:
    """Pays what the environment pays, less a cent for each word."""
    words = sum(len(turn.action.split()) for turn in episode.turns)
    return episode.env_return - words / 100


def main(policy: str, updates: int = 20) -> turnwise.Run:
    return turnwise.train(
        policy,
        env="turnwise/SupportDesk-v0",
        feedback=[helpful_and_brief],
        optimizer={"name": "ppo", "lr": 1e-3, "kl": 0.05},
        credit={"name": "gae", "lam": 0.95},
        updates=updates,
        groups=8,
        group_size=2,
        max_new_tokens=24,
    )


if __name__ == "__main__":
    print(main(sys.argv[1]))
