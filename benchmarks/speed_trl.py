"""One process of TRL's own GRPOTrainer at the same work: `python speed_trl.py WORK FOLDER STEPS
THREADS [JSON]`, with the time it was started in SPEED_BEGAN.

Two liberties are taken, both in TRL's favour: its parser of tool calls is replaced by one that
takes any reply for a call, since a random model writes none, and every reply has a fixed number of
tokens by `min_new_tokens`, since TRL limits whole conversations only.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
import trl.trainer.grpo_trainer as grpo
from speed_work import (
    BYE,
    GROUP,
    REPLY,
    WORKS,
    Work,
    answer,
    length,
    make,
    question,
    reward,
    system_of,
)


class Talk:
    """The same environment, as a tool that the model calls."""

    work: Work

    def reset(self, start: int = 0, **more: Any) -> None:
        """Opens a conversation."""
        self.start = start
        self.replies: list[str] = []

    def say(self, text: str) -> str:
        """Says something.

        Args:
            text: what is said.

        Returns:
            the answer.
        """
        self.replies.append(text)
        if len(self.replies) >= length(self.work, self.start, self.replies[0]) - 1:
            return BYE
        return answer(self.start, len(self.replies), text)

    def get_reward(self) -> float:
        """Returns the reward of the whole conversation."""
        return reward(self.replies)


def main() -> None:
    """Runs steps and prints what they took."""
    name, folder, steps, threads, *more = sys.argv[1:]
    work, options = WORKS[name], json.loads(more[0]) if more else {}
    torch.set_num_threads(int(threads))
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    Talk.work = work
    source = make(work, Path(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.padding_side = "left"
    tokenizer.response_template = {"any": "thing"}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    bye = tokenizer(BYE, add_special_tokens=False)["input_ids"]

    def parse(tokenizer: Any, ids: list[int], *, prefix: list[int], tools: Any) -> dict[str, Any]:
        text = tokenizer.decode(ids)
        near = prefix[-24:]
        if any(near[i : i + len(bye)] == bye for i in range(len(near))):
            return {"role": "assistant", "content": text}
        call = {"type": "function", "function": {"name": "say", "arguments": {"text": text}}}
        return {"role": "assistant", "content": text, "tool_calls": [call]}

    grpo.parse_response = parse
    rows = [
        {
            "prompt": [
                {"role": "system", "content": system_of(work)},
                {"role": "user", "content": question(i)},
            ],
            "start": i,
        }
        for i in range(1000)
    ]
    times: dict[str, list[Any]] = {"play": [], "step": [], "tokens": []}
    with tempfile.TemporaryDirectory() as runs:
        config = trl.GRPOConfig(
            output_dir=runs, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
            disable_tqdm=True, logging_strategy="no", learning_rate=1e-6, beta=0.0,
            per_device_train_batch_size=work.dialogues, num_generations=GROUP,
            max_completion_length=7000, max_tool_calling_iterations=work.turns - 1,
            generation_kwargs={"max_new_tokens": REPLY, "min_new_tokens": REPLY},
            max_steps=int(steps), **options,
        )  # fmt: skip
        trainer = grpo.GRPOTrainer(
            model=model, args=config, processing_class=tokenizer, environment_factory=Talk,
            train_dataset=datasets.Dataset.from_list(rows),
        )  # fmt: skip
        generate = trainer._generate

        def timed(*args: Any, **kwargs: Any) -> Any:
            since = time.perf_counter()
            out = generate(*args, **kwargs)
            times["play"].append(time.perf_counter() - since)
            return out

        trainer._generate = timed
        ready = time.time()

        class Clock(transformers.TrainerCallback):
            """Notes when steps end."""

            since = time.perf_counter()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                """Notes one."""
                now = time.perf_counter()
                times["step"].append(now - self.since)
                times["tokens"].append(0)
                self.since = now

        trainer.add_callback(Clock())
        trainer.train()
    times["tokens"] = [
        REPLY * sum(len(e.replies) + 1 for e in trainer.environments) for _ in times["step"]
    ]
    found: dict[str, Any] = dict(times)
    found["first"] = ready - float(os.environ["SPEED_BEGAN"]) + times["step"][0]
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()
