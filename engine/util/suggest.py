"""Suggestions for error messages: near names where a name is not known, and how to install what is
missing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import metadata

# What other libraries (trl, verl, OpenRLHF, stable-baselines3) call an option of ours.
SYNONYMS = {
    "learning_rate": "lr", "actor_learning_rate": "lr", "step_size": "lr",
    "beta": "kl", "kl_coef": "kl", "kl_coeff": "kl", "init_kl_coef": "kl", "kl_loss_coef": "kl",
    "kl_penalty": "kl_place", "target": "kl_target",
    "epsilon": "clip", "clip_range": "clip", "cliprange": "clip", "clip_ratio": "clip",
    "clip_eps": "clip", "eps_clip": "clip",
    "epsilon_high": "clip_high", "clip_ratio_high": "clip_high", "loss_type": "loss",
    "loss_agg_mode": "loss_mean",
    "whiten_rewards": "reward_whiten",
    "num_iterations": "epochs", "ppo_epochs": "epochs", "num_ppo_epochs": "epochs",
    "num_train_epochs": "epochs", "n_epochs": "epochs",
    "num_mini_batches": "minibatches", "vf_coef": "value_coef", "cliprange_value": "value_clip",
    "warmup_steps": "warmup",
    "max_grad_norm_clip": "max_grad_norm", "grad_clip": "max_grad_norm", "gae_lambda": "lam",
    "lambda": "lam", "scale_rewards": "baseline",
    "num_generations": "group_size", "n_samples_per_prompt": "group_size",
    "num_return_sequences": "group_size", "rollout_n": "group_size",
    "train_batch_size": "groups",
    "rollout_batch_size": "groups", "num_prompts": "groups",
    "max_completion_length": "max_new_tokens", "max_response_length": "max_new_tokens",
    "generate_max_len": "max_new_tokens",
    "max_tokens": "max_new_tokens", "response_length": "max_new_tokens", "max_steps": "updates",
    "num_updates": "updates",
    "total_training_steps": "updates", "reward_funcs": "feedback", "reward_fn": "feedback",
    "rewards": "feedback",
    "dynamic_sampling": "resample", "environment": "env", "envs": "env", "model": "policy",
    "train": "run", "steps": "updates",
    "reward": "feedback", "rank": "r", "lora_rank": "r", "lora_r": "r", "alpha": "lora_alpha",
}  # fmt: skip
# Which part of a stage an option belongs to, where it was given to another.
PARTS = {
    "optimizer": (
        "lr", "kl", "kl_place", "kl_estimator", "kl_target", "clip", "clip_high", "loss",
        "loss_mean", "divisor", "normalise", "epochs",
        "minibatches", "value_coef", "value_clip", "critic", "warmup", "decay", "weight_decay",
        "max_grad_norm", "micro_tokens", "beta",
    ),
    "credit": ("baseline", "truncated", "gamma", "lam", "turn_gamma", "turn_lam", "unit", "omega",
        "rollouts", "smear"),
    "": ("group_size", "groups", "updates", "max_new_tokens", "max_turns", "temperature",
        "feedback", "resample", "reward_clip", "reward_whiten"),
}  # fmt: skip
# What others have as an option of training, and where the same is to be had.
ELSEWHERE = {
    "train_dataset": "rows of prompts are an environment's: `env: {id: turnwise/Prompts-v0, kwargs:"
    " {data: prompts.jsonl}}`",
    "eval_dataset": "held-out starts are played by a stage `evaluate`, or by `gold` meanwhile",
    "reward_weights": "a source has its own weight: `feedback: [{judge: ..., weight: 0.5}]`",
    "output_dir": "it is the run's `folder`",
    "report_to": "they are the `trackers` of a pipeline",
    "logging_steps": "every update is a line of the run's metrics.jsonl and of its log",
    "save_steps": "it is the `checkpoint_every` of a pipeline, in updates",
    "trackers": "they are a pipeline's, next to `policy` and `stages`",
    "checkpoint_every": "it is a pipeline's, next to `policy` and `stages`",
    "peft_config": "adapters are the policy's: `policy: {model: ..., lora: {r: 16}}`",
    "bf16": "it is the policy's: `policy: {model: ..., precision: bf16}`",
    "fp16": "it is the policy's: `policy: {model: ..., dtype: float16}`",
    "gradient_accumulation_steps": "a step is made on all conversations of an update, however many"
    " fit at a time (the optimizer's `micro_tokens`)",
    "per_device_train_batch_size": "an update has `groups` starts of `group_size` conversations",
    "num_train_epochs": "how long it trains is `updates`; the optimizer's `epochs` are passes over"
    " one update's conversations",
    "warmup_ratio": "it is the optimizer's `warmup`, in steps",
    "max_prompt_length": "a conversation may be as long as the model's context",
    "processing_class": "the tokenizer is that of the model's folder",
    "tokenizer": "the tokenizer is that of the model's folder",
    "use_vllm": "replies are sampled in the process; another `backend` would be a plugin's",
    "resume": "turnwise.train(..., folder=..., resume=True), or `turnwise run --resume`",
    "resume_from_checkpoint": "turnwise.train(..., folder=..., resume=True), or `turnwise run"
    " --resume`",
    "top_p": "replies are sampled at `temperature` from all tokens, so that what is trained is what"
    " was sampled",
    "top_k": "replies are sampled at `temperature` from all tokens, so that what is trained is what"
    " was sampled",
}


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Returns those of the known names that may be meant, the nearest first: called so by others,
    or spelt alike."""
    names = sorted(known)
    meant = {other: own for other, own in SYNONYMS.items() if own in names} | {
        own: own for own in names
    }
    turned = [own for own in names if own != name and sorted(own) == sorted(name)]
    alike = 0.5 if len(name) <= 3 else 0.6  # one letter of two is half of it
    near = [name] if name in meant else difflib.get_close_matches(name, meant, n=3, cutoff=alike)
    return list(dict.fromkeys([*turned, *(meant[other] for other in near)]))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'? Known: ..." for error messages; for an option that has another
    name here, or belongs elsewhere, that name or place."""
    names = sorted(known)
    ours = SYNONYMS.get(name, name)
    if ours != name and ours in names:
        return f" Here it is called {ours!r}. Known: {', '.join(names)}."
    if name in ELSEWHERE and {"updates", "stages", "micro_tokens"} & set(names):
        return f" In Turnwise {ELSEWHERE[name]}. Known: {', '.join(names)}."
    if ours in PARTS["credit"] and "minibatches" in names:  # an optimizer for RL
        return (
            f" It is an option of the credit method, called {ours!r}, which is next to"
            f" `optimizer`: `credit: {{name: ..., {ours}: ...}}`. Known: {', '.join(names)}."
        )
    for part, options in PARTS.items():
        if ours in options and part in names:
            return (
                f" It is an option of the {part}, called {ours!r}: `{part}: {{name: ..., {ours}:"
                f" ...}}`. Known: {', '.join(names)}."
            )
    if ours in PARTS[""] and set(names) & {"lr", "baseline", "gamma"}:
        return (
            f" It is an option of the stage, called {ours!r}, and stands next to `optimizer` and"
            f" `credit`. Known: {', '.join(names)}."
        )
    near = near_names(name, names)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{hint} Known: {', '.join(names) or '(none)'}."


def install(extra: str) -> str:
    """Returns the command that installs what an extra of this package needs, however the package
    itself was installed: the name `turnwise` on PyPI is another project's, which `pip install
    'turnwise[...]'` would install."""
    needs = [line.partition(";") for line in metadata.requires("turnwise") or ()]
    packages = [
        name.strip()
        for name, _, marker in needs
        if f'extra == "{extra}"' in marker.replace("'", '"')
    ]
    return f"pip install {' '.join(map(repr, packages))}"
