"""A judge of one's own, which counts a fifth beside the environment's own reward."""

import sys

import turnwise


class Polite(turnwise.Judge):
    """Scores the share of replies that hold a polite word."""

    version = "1"

    def score(self, episodes):
        return [self.judged(episode) for episode in episodes]

    def judged(self, episode):
        if not episode.turns:
            return turnwise.Feedback.abstained(episode.id, "there is no reply")
        polite = [float("please" in turn.action.lower()) for turn in episode.turns]
        return turnwise.Feedback(
            episode.id, score=sum(polite) / len(polite), turn_scores=tuple(polite)
        )


def main(policy: str, updates: int = 20) -> turnwise.Run:
    return turnwise.train(
        policy,
        env="turnwise/SupportDesk-v0",
        feedback=["environment", {"judge": Polite(), "weight": 0.2}],
        updates=updates,
        groups=4,
        group_size=4,
        max_new_tokens=24,
    )


if __name__ == "__main__":
    print(main(sys.argv[1]))
