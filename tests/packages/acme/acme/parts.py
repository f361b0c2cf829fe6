"""An environment, judges, a source that answers late, a combiner and a backend."""

import gymnasium
import turnwise


class Manners(gymnasium.Env):
    observation_space = action_space = turnwise.Text(10_000)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 2
        return f"hello {self.np_random.integers(100)}", {"system": "tell me"}

    def step(self, action):
        self.left -= 1
        return "more please", float(len(action) % 3), self.left == 0, False, {}


class Polite(turnwise.Judge):
    """An async judge: scores whole episodes and single turns."""

    def __init__(self, letter: str = "a"):
        self.letter = letter

    async def score(self, episodes):
        return [
            turnwise.Feedback(
                e.id, score=sum(t.action.count(self.letter) for t in e.turns),
                turn_scores=[float(t.action.count(self.letter)) for t in e.turns],
            )
            for e in episodes
        ]  # fmt: skip


class Ranker(turnwise.GroupJudge):
    """Longer conversations first; equal lengths tie."""

    def rank(self, group):
        by_length = {}
        for e in group:
            by_length.setdefault(sum(len(t.action) for t in e.turns), []).append(e.id)
        return turnwise.Comparison(
            group[0].group, [by_length[n] for n in sorted(by_length, reverse=True)]
        )


class People(turnwise.FeedbackSource):
    """Answers at the third look, out of order; repeats itself until it is acknowledged; one of them
    abstains."""

    version = "people-1"

    def __init__(self):
        self.waiting, self.looks, self.delivered = [], 0, set()

    def open(self, context):
        self.name, self.clock = context.name, context.clock

    def request(self, requests):
        self.waiting += [r for r in requests if r.id not in {w.id for w in self.waiting}]

    def receive(self):
        self.looks += 1
        if self.looks % 3:
            return []
        answers = []
        for r in reversed(self.waiting):
            stamp = turnwise.Stamp(request=r.id, rater=f"rater-{r.rater_slot}", time=self.clock())
            # Never by an id: those differ from machine to machine.
            if r.rater_slot == 0 and r.episodes[0].slot == 0:
                answers.append(
                    turnwise.Feedback.abstained(r.target, "no idea", id=f"h-{r.id}", stamp=stamp)
                )
            else:
                answers.append(
                    turnwise.Feedback(
                        r.target,
                        score=len(r.episodes[0].turns[-1].action) / 10,
                        id=f"h-{r.id}",
                        stamp=stamp,
                    )
                )
        return answers

    def acknowledge(self, ids):
        self.waiting = [r for r in self.waiting if f"h-{r.id}" not in ids]

    def state_dict(self):
        return {"looks": self.looks}

    def load_state_dict(self, state):
        self.looks = state["looks"]


class BestOf(turnwise.Combiner):
    """The best score that any source gave; who got none has no reward."""

    def __init__(self, weights):
        self.weights = weights

    def combine(self, group, feedback):
        rewards = []
        for e in group:
            scores = [
                f.score
                for f in feedback
                if isinstance(f, turnwise.Feedback) and f.episode == e.id and f.score is not None
            ]
            if scores:
                best = max(scores)
                rewards.append(turnwise.Rewards(best, (*[0.0] * (len(e.turns) - 1), best)))
            else:
                rewards.append(turnwise.NoReward("nobody scored it"))
        return rewards


class Counted:
    """The built-in backend, counted: a backend may stand on another one."""

    def __init__(self, policy, rows=8):
        self.inner = turnwise.Plugins().create("backend", "in-process", policy=policy, rows=rows)
        self.rows, self.replies = rows, 0

    def reply(self, conversations, sampling, arriving=tuple):
        for conversation, sample in self.inner.reply(conversations, sampling, arriving):
            self.replies += 1
            yield conversation, sample

    def refresh(self):
        self.inner.refresh()
