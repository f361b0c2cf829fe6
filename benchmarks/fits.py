"""What `turnwise fits` predicts beside what is measured: three models, four settings each.

    turnwise model get smollm2-135m
    python benchmarks/fits.py --out runs/bench-fits        # about half an hour on one core

    python benchmarks/fits.py --budgets                    # what fits in 8, 16 and 24 GB, predicted

Each setting is a process of its own (`benchmarks/memory.py`): 32 conversations of some 350 tokens
are played, and two updates are made on them. Resident memory, the peak of each. The bar: every
prediction lies within 20 % of what was measured. Writes `results.json` and `results.md` into --out;
what an earlier call measured is not measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from speed_work import Work, make
from transformers import LlamaConfig
from turnwise.engine.policy.fitting import Setting, Shape, ways

MODELS = {
    "3 M": Work("3 M", 192, 6, 6, 6, 512, 4096),
    "34 M": Work("34 M", 512, 10, 8, 4, 1408, 16_384),
}
REAL = "smollm2-135m"
SETTINGS = {
    "all weights, activation_memory 0.2": ["--activation-memory", "0.2"],
    "all weights, activation_memory 0.5": ["--activation-memory", "0.5"],
    "LoRA, activation_memory 0.2": ["--lora", "--activation-memory", "0.2"],
    "LoRA, activation_memory 0.5": ["--lora", "--activation-memory", "0.5"],
}
BAR = 0.2


LLAMA = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size")  # fmt: skip
SHAPES = {  # of models that people have, under the hub's names
    "SmolLM2-135M": (576, 30, 9, 3, 1536, 49_152), "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151_936),
    "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151_936),
    "Qwen2.5-3B": (2048, 36, 16, 2, 11_008, 151_936),
    "Llama-3.1-8B": (4096, 32, 32, 8, 14_336, 128_256),
}  # fmt: skip
UNTIED = ("Llama-3.1-8B",)


def budgets() -> None:
    """Prints the first way of training each shape that fits in so many GB, and its peak."""
    print("| model | 8 GB | 16 GB | 24 GB |\n| --- | --- | --- | --- |")
    for name, sizes in SHAPES.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(1, get_context("spawn")) as apart,
        ):
            named: dict[str, Any] = dict(zip(LLAMA, sizes, strict=True))
            tied = name not in UNTIED
            LlamaConfig(
                **named, tie_word_embeddings=tied, max_position_embeddings=8192
            ).save_pretrained(folder)
            # In a process of its own: what it takes itself is part of the prediction.
            found = apart.submit(peaks_of, folder).result()
        cells = [
            next((f"{way}: {most:.1f} GiB" for way, most in found.items() if most <= room), "none")
            for room in (8, 16, 24)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def peaks_of(folder: str) -> dict[str, float]:
    """Returns the peak of each way of training a shape, in GiB."""
    shape = Shape(folder)
    found = {way: shape.peaks(setting) for way, setting in ways(Setting(reference=True)).items()}
    return {way: max(peaks.play, peaks.update) / 2**30 for way, peaks in found.items()}


def ask(*options: str) -> dict[str, float]:
    """Runs memory.py. Returns MB of play and of the update, and the tokens of a conversation."""
    script = [sys.executable, str(Path(__file__).parent / "memory.py")]
    done = subprocess.run([*script, *options], capture_output=True, text=True, check=True)
    lines = re.findall(r"(?<!first )(play|update):? (\d+) MB", done.stdout)
    found = {what: float(size) for what, size in lines}
    tokens = re.search(r"(\d+) tokens each", done.stdout)
    return found | ({"tokens": float(tokens[1])} if tokens else {})


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-fits"))
    parser.add_argument("--budgets", action="store_true", help="Predict what fits, instead.")
    given = parser.parse_args()
    if given.budgets:
        budgets()
        return
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "results.json"
    measured: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    lines = ["| model | setting | play: predicted, measured | update: predicted, measured |"]
    lines.append("| --- | --- | --- | --- |")
    worst = 0.0
    for name in (*MODELS, REAL):
        model = REAL if name == REAL else str(make(MODELS[name], given.out))
        for setting, options in SETTINGS.items():
            key = f"{name}, {setting}"
            if key not in measured:
                measured[key] = ask(model, *options)
                file.write_text(json.dumps(measured, indent=2) + "\n")
            found = measured[key]
            told = ask(model, "--predict", "--tokens", str(int(found["tokens"])), *options)
            cells = []
            for what in ("play", "update"):
                worst = max(worst, abs(told[what] / found[what] - 1))
                off = f"{told[what] / found[what] - 1:+.0%}"
                cells.append(f"{told[what]:.0f}, {found[what]:.0f} MB ({off})")
            lines.append(f"| {name} | {setting} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    held = worst <= BAR
    lines += ["", f"- {'yes' if held else 'NO'}: within {BAR:.0%}; the worst is off by {worst:.0%}"]
    (given.out / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
