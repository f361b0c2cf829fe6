"""Python functions as the policy's tools; what they return comes back as the next observation."""

import sys

import turnwise


def days_between(first: int, second: int) -> int:
    """Returns how many days lie between two days of a year."""
    return abs(second - first)


def main(policy: str, updates: int = 20) -> turnwise.Run:
    here = f"{__name__}:days_between"
    kwargs = {"env": "turnwise/SupportDesk-v0", "tools": ["statistics:fmean", here]}
    return turnwise.train(
        policy,
        env={"id": "turnwise/Tools-v0", "kwargs": kwargs},
        feedback=["environment", {"judge": "tool-calls", "weight": 0.1}],
        updates=updates,
        groups=4,
        group_size=4,
        max_new_tokens=48,
    )


if __name__ == "__main__":
    print(main(sys.argv[1]))
