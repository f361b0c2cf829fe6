"""An environment of one's own: text in, text out, a reward at the end."""

import sys

import gymnasium
import turnwise


class Riddle(gymnasium.Env):
    """Asks for a word; there are five tries."""

    observation_space = action_space = turnwise.Text(4096)
    riddles = {"What has keys and opens no lock?": "piano", "What dries and gets wetter?": "towel"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.question = str(self.np_random.choice(list(self.riddles)))
        return self.question, {"system": "Answer in one word."}

    def step(self, action):
        right = self.riddles[self.question] in action.lower()
        answer = "Right!" if right else "No, try again."
        return answer, float(right), right, False, {"success": right}


def main(policy: str, updates: int = 20) -> turnwise.Run:
    gymnasium.register("examples/Riddle-v0", f"{__name__}:Riddle", max_episode_steps=5)
    problems = turnwise.check_environment("examples/Riddle-v0", episodes=3)
    assert not problems, problems
    return turnwise.train(
        policy, env="examples/Riddle-v0", updates=updates, groups=4, group_size=4, max_new_tokens=12
    )


if __name__ == "__main__":
    print(main(sys.argv[1]))
