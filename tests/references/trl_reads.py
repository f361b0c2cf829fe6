"""Shows that trl's trainers accept what `turnwise export` writes, unchanged: JSON lines and
`datasets` folders, with a tiny model.

Conversations of several turns are ranked and scored here, some with grades and some without,
written in the three formats, loaded as trl's users load them and trained on for two steps. It was
run with Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, datasets 5.2.0 and trl 1.16.0, and
for PRMTrainer, which trl 1.16.0 no longer has, with trl 1.13.0. docs/preference-data.md has what it
printed. trl is no dependency; to run it again where turnwise is installed:

    pip install 'turnwise[data]' trl==1.16.0
    python tests/references/trl_reads.py
"""

from __future__ import annotations

import os
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import torch
import transformers
import trl
import turnwise
from turnwise.engine.exchange.writing import export_pairs, export_stepwise, export_unpaired, save
from turnwise.learning import build_tokenizer

datasets.disable_progress_bars()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

WORDS = (
    "so what do you see I see a door open the door then and it is shut now say more please yes no"
    " maybe"
)


def played(seed: int, slot: int) -> turnwise.Episode:
    """A conversation of three turns; those of one start share their first message, and slots 1 and
    2 their first reply too."""
    words = WORDS.split()
    say = lambda *key: " ".join(  # noqa: E731
        words[zlib.crc32(repr((key, i)).encode()) % len(words)] for i in range(4)
    )
    heard = [f"so {seed}", say(seed, min(slot, 1), 1), say(seed, slot, 2)]
    replies = [say(seed, min(slot, 1), "a"), say(seed, slot, "b"), say(seed, slot, "c")]
    turns = tuple(
        turnwise.Turn(turnwise.Message("user", h), r, 0.0)
        for h, r in zip(heard, replies, strict=True)
    )
    start = turnwise.Start("e", seed)
    return turnwise.Episode(f"{seed}-{slot}", start, turns, "terminated", slot=slot,
        system="say what you see", final=turnwise.Message("user", "bye"))  # fmt: skip


def write(folder: Path) -> None:
    groups = [[played(seed, slot) for slot in range(3)] for seed in range(8)]
    episodes = {e.id: e for group in groups for e in group}
    graded = {0: 2.0, 3: 1.0}
    ranked = [
        turnwise.Comparison(
            g[0].group,
            tuple((e.id,) for e in g),
            strength=graded.get(i),
            stamp=turnwise.Stamp(rater=f"r{i}"),
        )
        for i, g in enumerate(groups)
    ]
    scored = [
        turnwise.Feedback(id_, score=i % 3 / 2, turn_scores=(1.0, None, i % 2))
        for i, id_ in enumerate(sorted(episodes))
    ]
    for name, rows in (
        ("pairs", export_pairs(episodes, ranked)),
        ("unpaired", list(export_unpaired(episodes, scored, ranked, 0.5))),
        ("stepwise", list(export_stepwise(episodes, scored, 0.5))),
    ):
        save(rows, folder / f"{name}.jsonl")
        save(rows, folder / name)


def load(folder: Path, name: str, kind: str) -> Any:
    if kind == "jsonl":
        return datasets.load_dataset(
            "json",
            data_files=str(folder / f"{name}.jsonl"),
            split="train",
            cache_dir=str(folder / "cache"),
        )
    return datasets.load_from_disk(str(folder / name))


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    write(folder)
    tokenizer = build_tokenizer([WORDS] * 4, vocabulary=320)
    shape = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    trainers: list[tuple[str, Any, Any, str, Any, dict[str, Any]]] = [
        ("DPOTrainer", trl.DPOTrainer, trl.DPOConfig, "pairs", transformers.AutoModelForCausalLM,
            {}),
        ("RewardTrainer", trl.RewardTrainer, trl.RewardConfig, "pairs",
            transformers.AutoModelForSequenceClassification, {"num_labels": 1}),
    ]  # fmt: skip
    try:
        from trl import KTOConfig, KTOTrainer
    except ImportError:
        from trl.experimental.kto import KTOConfig, KTOTrainer
    trainers.append(
        ("KTOTrainer", KTOTrainer, KTOConfig, "unpaired", transformers.AutoModelForCausalLM, {})
    )
    try:
        from trl.experimental.prm import PRMConfig, PRMTrainer
    except ImportError:
        pass
    else:
        tokens = transformers.AutoModelForTokenClassification
        trainers.append(
            ("PRMTrainer", PRMTrainer, PRMConfig, "stepwise", tokens, {"num_labels": 2})
        )
    print(
        f"trl {trl.__version__}, transformers {version('transformers')}, datasets"
        f" {version('datasets')}"
    )
    for name, trainer, config, data, model, more in trainers:
        for kind in ("jsonl", "datasets folder"):
            torch.manual_seed(0)
            found = load(folder, data, kind)
            shape.num_labels = more.get("num_labels", 2)
            model.from_config(shape).save_pretrained(folder / name)
            options = config(
                output_dir=str(folder / "out"), max_steps=2, per_device_train_batch_size=4,
                logging_steps=1, report_to=[],
                save_strategy="no", use_cpu=True, disable_tqdm=True,
            )  # fmt: skip
            made = trainer(
                model=model.from_pretrained(folder / name),
                args=options,
                train_dataset=found,
                processing_class=tokenizer,
            )
            made.remove_callback(transformers.PrinterCallback)
            made.train()
            losses = [f"{line['loss']:.4f}" for line in made.state.log_history if "loss" in line]
            print(
                f"{name} from {data} as {kind}: {len(found)} rows with"
                f" {', '.join(found.column_names)}; losses {' '.join(losses)}"
            )
            if name == "DPOTrainer" and kind == "jsonl":
                row = made.train_dataset[2]
                print(f"  prompt {tokenizer.decode(row['prompt_ids'])!r}")
                print(f"  trained as chosen {tokenizer.decode(row['chosen_ids'])!r}")


if __name__ == "__main__":
    main()
