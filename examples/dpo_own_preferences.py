"""DPO on preferences of one's own: a file with a prompt, the better and the worse conversation."""

import json
import sys
import tempfile
from pathlib import Path

import turnwise

ASKED = ["Where is my parcel?", "The lamp is broken.", "I was charged twice.", "Cancel my order."]
BETTER = "I am sorry about that. What is your order number, please?"
WORSE = "That is not our fault."


def main(policy: str, updates: int = 1) -> turnwise.Run:
    said = lambda role, text: {"role": role, "content": text}  # noqa: E731
    rows = [
        {
            "prompt": [said("user", question)],
            "chosen": [said("assistant", BETTER)],
            "rejected": [said("assistant", WORSE)],
        }
        for question in ASKED
    ]
    data = Path(tempfile.mkdtemp()) / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dpo = {"name": "dpo", "lr": 1e-4, "beta": 0.1}
    stage = {"data": str(data), "optimizer": dpo, "epochs": updates, "batch_size": 4}
    run = turnwise.Run({"policy": policy, "stages": [{"preference": stage}], "name": "dpo"})
    for update in run:
        print(update)
    return run


if __name__ == "__main__":
    main(sys.argv[1])
