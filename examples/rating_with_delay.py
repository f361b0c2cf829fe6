"""Ratings that come later: the run plays on meanwhile, and corrects for what has grown stale."""

import sys
import threading

import turnwise


class Later(turnwise.FeedbackSource):
    """Rates by the environment's own return, some time after it was asked; a web page or a mail
    robot would call `answer` when a person has rated."""

    version = "1"

    def __init__(self, seconds: float) -> None:
        self.seconds, self.answers, self.lock = seconds, {}, threading.Lock()

    def request(self, requests):  # the same may be asked again after a crash
        for request in requests:
            threading.Timer(self.seconds, self.answer, (request,)).start()

    def answer(self, request):
        stamp = turnwise.Stamp(request=request.id, rater="ann")
        score = request.episodes[0].env_return
        id = f"later-{request.id}"
        with self.lock:
            self.answers[id] = turnwise.Feedback(request.target, score, id=id, stamp=stamp)

    def receive(self):
        with self.lock:
            return list(self.answers.values())

    def acknowledge(self, ids):
        with self.lock:
            for id in ids:
                self.answers.pop(id, None)


def main(policy: str, updates: int = 6, seconds: float = 3.0) -> turnwise.Run:
    return turnwise.train(
        policy,
        env="turnwise/SupportDesk-v0",
        feedback=[{"judge": Later(seconds), "name": "people", "deadline": 3600}],
        pending=32,
        staleness=3,
        poll=0.1,
        updates=updates,
        groups=4,
        group_size=4,
        max_new_tokens=24,
    )


if __name__ == "__main__":
    print(main(sys.argv[1]).frame()[["outcome", "waiting"]])
