"""Records what published libraries compute into `recorded.json` beside this file: all inputs and
all outputs, in float64.

The formulas are never repeated here. trl's trainers and stable-baselines3 are called with stand-ins
for model, optimizer and trainer; verl's functions, an older trl's DPO loss and one block of trl's
GRPO trainer are run from the libraries' own source. It was run with Python 3.11, torch 2.13.0
(CPU), transformers 5.23.0, trl 1.16.0 and 0.28.0, stable-baselines3 2.9.2 and verl 0.9.1, all as
published on PyPI; `recorded.json` has the SHA-256 of the wheels that were read. To run it again:

    pip install torch transformers datasets trl==1.16.0 stable-baselines3==2.9.2
    pip download --no-deps --dest wheels trl==0.28.0 verl==0.9.1
    python tests/references/make.py wheels
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import sys
import textwrap
import zipfile
from collections import defaultdict
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl.trainer.grpo_trainer as trl_grpo
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

SEED = 20261121
GENERATOR = torch.Generator().manual_seed(SEED)
GAMMA_LAM = [(1.0, 1.0), (1.0, 0.95), (0.99, 0.9), (1.0, 0.0), (0.9, 0.5)]
ONE_PROCESS = SimpleNamespace(
    device="cpu",
    num_processes=1,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def prefix(lengths: list[int], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).double()


def nothing(*_: Any, **__: Any) -> None:
    pass


def model_output(logprobs: Tensor) -> SimpleNamespace:
    """What trl's trainers read from a model.

    Only the log-probs enter the loss; the rest is for metrics.
    """
    zeros = torch.zeros_like(logprobs)
    return SimpleNamespace(
        log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def excerpt(wheel: Path, path: str, names: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Runs the definitions of `names` (also methods), without decorators, from a file in a wheel;
    the rest is not imported."""
    tree = ast.parse(zipfile.ZipFile(wheel).read(path))
    body = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in names
    ]
    assert sorted(n.name for n in body) == sorted(names), path
    for node in body:
        node.decorator_list = []
    # Their types need not be known here.
    lazy = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module(lazy + body, []), path, "exec"), given)
    return given


def trl_dpo(wheel: Path) -> dict[str, Any]:
    """Both a trl of today, per-token log-probs in, and the last one whose sigmoid loss had label
    smoothing."""
    chosen, rejected = normal(6, mean=-40, std=6), normal(6, mean=-45, std=6)
    ref_chosen, ref_rejected = chosen + normal(6, std=7), rejected + normal(6, std=7)
    lengths = {"mixed": [[3, 5, 1, 4, 2, 5], [2, 4, 5, 1, 3, 5]], "one": [[1] * 6, [1] * 6]}

    def today(case: dict[str, Any], pairs: list[int], better: Tensor, worse: Tensor) -> Tensor:
        count = torch.tensor([lengths[case["lengths"]][side][i] for side in (0, 1) for i in pairs])
        mask = prefix(count.tolist(), 5)
        tokens = torch.cat([better, worse]).unsqueeze(1) * mask / count.unsqueeze(1)
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=ONE_PROCESS,
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[case["loss_type"]],
            loss_weights=[1.0],
            beta=case["beta"],
            label_smoothing=case["label_smoothing"],
            use_weighting=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
        )
        # A prompt of one token.
        completion_mask = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], 1)
        inputs = {
            "input_ids": torch.zeros_like(completion_mask),
            "attention_mask": torch.ones_like(completion_mask),
            "completion_mask": completion_mask,
            "ref_chosen_logps": ref_chosen[pairs],
            "ref_rejected_logps": ref_rejected[pairs],
        }
        return DPOTrainer._compute_loss(trainer, lambda **_: model_output(tokens), inputs, False)

    older = excerpt(wheel, "trl/trainer/dpo_config.py", ["FDivergenceType"], {"Enum": Enum})
    older |= {"torch": torch, "F": torch.nn.functional}
    dpo_loss = excerpt(wheel, "trl/trainer/dpo_trainer.py", ["dpo_loss"], older)["dpo_loss"]

    def before(case: dict[str, Any], pairs: list[int], better: Tensor, worse: Tensor) -> Tensor:
        trainer = SimpleNamespace(
            accelerator=ONE_PROCESS,
            reference_free=False,
            f_divergence_type="reverse_kl",
            beta=case["beta"],
            label_smoothing=case["label_smoothing"],
        )
        return dpo_loss(
            trainer, better, worse, ref_chosen[pairs], ref_rejected[pairs], case["loss_type"]
        )[0].mean()

    cases = []
    for beta in (0.1, 0.5):
        for name, compute in ((f"trl {version('trl')}", today), (wheel_name(wheel), before)):
            kinds = [
                ("sigmoid", 0.0, "mixed"),
                ("hinge", 0.0, "mixed"),
                ("ipo", 0.0, "mixed"),
                ("ipo", 0.0, "one"),
            ]
            if compute is before:
                kinds = [
                    ("sigmoid", 0.0, None),
                    ("sigmoid", 0.1, None),
                    ("hinge", 0.0, None),
                    ("ipo", 0.0, None),
                ]
            for loss_type, smoothing, length in kinds:
                case = {
                    "library": name,
                    "loss_type": loss_type,
                    "beta": beta,
                    "label_smoothing": smoothing,
                    "lengths": length,
                }
                better, worse = leaf(chosen), leaf(rejected)
                loss = compute(case, list(range(6)), better, worse)
                loss.backward()
                each = [compute(case, [i], chosen[[i]], rejected[[i]]).item() for i in range(6)]
                cases.append(
                    {
                        **case,
                        "losses": each,
                        "loss": loss,
                        "grad_chosen": better.grad,
                        "grad_rejected": worse.grad,
                    }
                )
    return {
        "notes": [
            (
                "chosen, rejected, ref_*: log-probs summed over the completion, [6]. grad_*: of the"
                " mean loss in them."
            ),
            (
                f"trl {version('trl')} (DPOTrainer._compute_loss) takes per-token log-probs: each"
                " sum was spread evenly over the completion's tokens, of which lengths['mixed'] or"
                " ['one'] gives the number (chosen, rejected)."
            ),
            (
                f"trl {version('trl')} divides, for 'ipo' only, each sequence's log-ratio (log pi -"
                " log ref, summed) by its number of completion tokens, before chosen minus"
                " rejected; the loss is (that - 1/(2 beta))^2. With lengths 'one' it is the"
                " unnormalised IPO. 'sigmoid' and 'hinge' take sums."
            ),
            (
                f"The sigmoid loss of trl {version('trl')} ignores label_smoothing (only robust,"
                f" exo_pair and aot use it), so smoothing is recorded from {wheel_name(wheel)},"
                " DPOTrainer.dpo_loss: label_smoothing is the probability that a label is flipped,"
                " -(1-s) log sigma(h) - s log sigma(-h)."
            ),
            (
                f"{wheel_name(wheel)} normalises 'ipo' by length where it computes the log-probs;"
                " dpo_loss, recorded, sees the result."
            ),
            "hinge is max(0, 1 - beta * margin).",
        ],
        "inputs": {
            "chosen": chosen,
            "rejected": rejected,
            "ref_chosen": ref_chosen,
            "ref_rejected": ref_rejected,
            "lengths": lengths,
        },
        "cases": cases,
    }


def trl_kto() -> dict[str, Any]:
    labels = torch.tensor([True, False, True, True, False, False])
    logps, ref_logps = normal(6, mean=-40, std=6), normal(6, mean=-40, std=6)
    ref_kl = normal(6, mean=-42, std=6)
    kl_inputs = {
        "positive": ref_kl + normal(6, mean=2.0, std=3),
        "negative": ref_kl + normal(6, mean=-4.0, std=3),
    }

    def compute(case: dict[str, Any], rows: list[int], policy: Tensor) -> tuple[Tensor, float]:
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=ONE_PROCESS,
            aux_loss_enabled=False,
            precompute_ref_logps=True,
            calculate_KL=True,
            _compute_kl_logps=lambda model, batch: kl_inputs[case["kl_logps"]],
            loss_type="kto",
            beta=case["beta"],
            desirable_weight=case["desirable_weight"],
            undesirable_weight=case["undesirable_weight"],
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
        )
        batch = {
            "input_ids": torch.zeros(len(rows), 2, dtype=torch.long),
            "attention_mask": torch.ones(len(rows), 2, dtype=torch.long),
            "completion_mask": torch.tensor([[0, 1]] * len(rows)),
            "label": labels[rows],
            "ref_logps": ref_logps[rows],
            "ref_KL_logps": ref_kl,
        }
        loss = KTOTrainer._compute_loss(
            trainer, lambda **_: model_output(policy.unsqueeze(1)), batch, False
        )
        return loss, trainer._metrics["train"]["kl"][0]

    cases = []
    for kl_logps in kl_inputs:
        for desirable, undesirable in ((1.0, 1.0), (1.33, 1.0), (1.0, 1.33)):
            case = {
                "kl_logps": kl_logps,
                "beta": 0.1,
                "desirable_weight": desirable,
                "undesirable_weight": undesirable,
            }
            policy = leaf(logps)
            loss, z0 = compute(case, list(range(6)), policy)
            loss.backward()
            each = [compute(case, [i], logps[[i]])[0].item() for i in range(6)]
            cases.append({**case, "z0": z0, "losses": each, "loss": loss, "grad": policy.grad})
    return {
        "notes": [
            (
                "logps, ref_logps: summed log-probs of the six completions, [6]; label true:"
                " desirable. No length normalisation."
            ),
            (
                "z0 = max(0, mean(kl_logps - ref_kl_logps)), over the batch (and all processes), in"
                " nats per sequence, detached. kl_logps are log-probs of mismatched pairs: each"
                " prompt of the batch with a neighbour's completion."
            ),
            (
                "losses: weight * (1 - sigma(beta (log-ratio - z0))) where desirable, weight * (1 -"
                " sigma(beta (z0 - log-ratio))) where not; z0 of the whole batch also where a"
                " single loss was recorded. loss: their plain mean over the batch."
            ),
        ],
        "inputs": {
            "label": labels,
            "logps": logps,
            "ref_logps": ref_logps,
            "kl_logps": kl_inputs,
            "ref_kl_logps": ref_kl,
        },
        "cases": cases,
    }


def token_inputs() -> dict[str, Tensor]:
    """Three sequences of five tokens, for the policy losses of trl and verl."""
    old = normal(3, 5, mean=-2.0, std=0.5)
    logps = old + normal(3, 5, std=0.5) + double([[0.5], [-0.9], [0.1]])
    # Beyond verl's dual clip: a ratio over 3 where the advantage is negative.
    logps[1, 0] = old[1, 0] + 1.3
    advantages = double([1.1, -0.7, 0.3])
    return {
        "logps": logps,
        "old_logps": old,
        "ref_logps": logps + normal(3, 5, std=0.4),
        "mask": prefix([5, 3, 2], 5),
        "advantages": advantages,
    }


def trl_grpo_loss(tokens: dict[str, Tensor]) -> dict[str, Any]:
    completion_ids = torch.zeros(3, 5, dtype=torch.long)
    prompt = torch.zeros(3, 1, dtype=torch.long)

    def compute(case: dict[str, Any]) -> dict[str, Any]:
        logps = leaf(tokens["logps"])
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=ONE_PROCESS,
            args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
            _get_per_token_logps_and_entropies=lambda *_, **__: (
                logps,
                torch.zeros_like(logps),
                None,
            ),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            _entropy_bonus_enabled=False,
            current_gradient_accumulation_steps=1,
            _metrics=defaultdict(lambda: defaultdict(list)),
            **{k: v for k, v in case.items() if k != "num_items_in_batch"},
        )
        inputs = {
            "prompt_ids": prompt,
            "prompt_mask": prompt,
            "completion_ids": completion_ids,
            "completion_mask": tokens["mask"],
            "advantages": tokens["advantages"],
            "old_per_token_logps": tokens["old_logps"],
            "ref_per_token_logps": tokens["ref_logps"],
            "num_items_in_batch": double(case["num_items_in_batch"]),
        }
        loss = trl_grpo.GRPOTrainer._compute_loss(trainer, None, inputs)
        loss.backward()
        return {**case, "loss": loss, "grad": logps.grad}

    usual = {
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "max_completion_length": 8,
        "num_items_in_batch": 10.0,
    }
    cases = [
        compute({"loss_type": loss_type, "importance_sampling_level": level, **usual})
        for level in ("token", "sequence")
        for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
    ]
    token = {"importance_sampling_level": "token", **usual}
    for level in ("token", "sequence"):
        wider = {"loss_type": "cispo", "importance_sampling_level": level, **usual}
        cases += [compute({**wider, "epsilon_high": high}) for high in (1.28, 5.0)]
    cases += [compute({"loss_type": "dapo", **token, "num_items_in_batch": 16.0})]
    cases += [
        compute({"loss_type": loss_type, **token, "beta": 0.04}) for loss_type in ("grpo", "dapo")
    ]
    return {
        "notes": [
            (
                "GRPOTrainer._compute_loss on 3 sequences of 5 tokens, of which 5, 3 and 2 count."
                " grad: of the loss in logps, [3, 5]."
            ),
            (
                "Normalisers: 'grpo' mean over sequences of each one's token mean; 'bnpo' tokens of"
                " this batch, 10; 'dr_grpo' sequences * max_completion_length, 3 * 8, whatever the"
                " mask; 'dapo' and 'cispo' num_items_in_batch / processes, the tokens of the whole"
                " generation batch (1 process, 1 accumulation step, 1 step per generation)."
            ),
            (
                "'cispo' clamps the ratio from above only, at epsilon_high itself, not 1 +"
                " epsilon_high: 1.28 is the usual clip of 0.28, 5.0 the value trl recommends."
                " Detached ratio * advantage * log-prob."
            ),
            (
                "'sequence' is GSPO's exp(mean log-ratio over the sequence's tokens), clipped once"
                " per sequence; its gradient goes through the mean. Per-token losses are then equal"
                " within a sequence and aggregated as loss_type says."
            ),
            (
                "beta: k3 estimate of the KL to ref_logps, exp(ref - logp) - (ref - logp) - 1,"
                " added per token before aggregation."
            ),
        ],
        "inputs": tokens,
        "cases": cases,
    }


def trl_grpo_advantages() -> dict[str, Any]:
    """The block of the trainer that turns rewards into advantages; it is no function of its own, so
    its source is run."""
    source = textwrap.dedent(
        inspect.getsource(trl_grpo.GRPOTrainer._generate_and_score_completions)
    )
    [block] = [
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.If)
        and ast.unparse(n.test) == "self.multi_objective_aggregation == 'sum_then_normalize'"
    ]
    code = compile(ast.Module([block], []), "grpo_trainer.py", "exec")

    def compute(rewards: Tensor, group_size: int, scale: str) -> Tensor:
        given = {
            **vars(trl_grpo),
            "self": SimpleNamespace(
                multi_objective_aggregation="sum_then_normalize",
                reward_weights=torch.ones(1),
                scale_rewards=scale,
            ),
            "rewards_per_func": rewards.unsqueeze(1),
            "unscorable_mask": torch.zeros(len(rewards), dtype=torch.bool),
            "num_generations": group_size,
            "device": "cpu",
        }
        exec(code, given)
        return given["advantages"]

    groups = double([[0.2, 1.4, -0.7, 0.9], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 0.0, 0.0]]).flatten()
    singletons = double([0.7, -1.2])
    return {
        "notes": [
            (
                "scale_rewards 'group': (R - mean) / (std + 1e-4), unbiased std (G - 1) of the"
                " group; 'batch': the same with the std of the whole batch, the mean still the"
                " group's; 'none': R - mean. Equal rewards give 0; so does a group of one (std 0)."
            ),
            "rewards: groups of group_size, one after the other.",
        ],
        "cases": [
            {
                "rewards": rewards,
                "group_size": size,
                "scale_rewards": scale,
                "advantages": compute(rewards, size, scale),
            }
            for rewards, size in ((groups, 4), (singletons, 1))
            for scale in ("group", "batch", "none")
        ],
    }


def sb3_gae() -> dict[str, Any]:
    rewards, values, last_value = normal(6), normal(6), normal(1)
    starts = double([1, 0, 0, 1, 0, 0])
    cases = []
    for gamma, lam in GAMMA_LAM:
        for done in (False, True):
            box = spaces.Box(-1.0, 1.0, (1,))
            buffer = RolloutBuffer(
                6, box, spaces.Discrete(2), device="cpu", gae_lambda=lam, gamma=gamma
            )
            buffer.rewards, buffer.values, buffer.episode_starts = (
                x.unsqueeze(1).numpy() for x in (rewards, values, starts)
            )
            buffer.advantages = np.zeros((6, 1))
            buffer.compute_returns_and_advantage(last_value, np.array([done]))
            cases.append(
                {
                    "gamma": gamma,
                    "lam": lam,
                    "done": done,
                    "advantages": buffer.advantages[:, 0],
                    "returns": buffer.returns[:, 0],
                }
            )
    return {
        "notes": [
            (
                "RolloutBuffer.compute_returns_and_advantage, one environment, six steps; its"
                " float32 arrays were replaced by float64."
            ),
            (
                "episode_starts[t] = 1: a new episode begins at step t, the one before it"
                " terminated. done: whether step 5 terminated; if not, the state after it is worth"
                " last_value. Nothing is whitened."
            ),
        ],
        "inputs": {
            "rewards": rewards,
            "values": values,
            "episode_starts": starts,
            "last_value": last_value,
        },
        "cases": cases,
    }


def sb3_ppo() -> dict[str, Any]:
    old_logps, logps, advantages = (
        normal(8, mean=-1.5, std=0.4),
        normal(8, mean=-1.5, std=0.4),
        normal(8),
    )
    old_values, returns = normal(8), normal(8)
    values = old_values + normal(8, std=0.3)
    cases = []
    for clip_value in (None, 0.2):
        policy_logps, new_values, logged = leaf(logps), leaf(values), {}
        data = SimpleNamespace(
            actions=None,
            observations=None,
            advantages=advantages,
            old_log_prob=old_logps,
            old_values=old_values,
            returns=returns,
        )
        policy = SimpleNamespace(
            set_training_mode=nothing,
            optimizer=SimpleNamespace(zero_grad=nothing, step=nothing),
            parameters=list,
            evaluate_actions=lambda *_, v=new_values, p=policy_logps: (
                v,
                p,
                torch.zeros(8, dtype=torch.float64),
            ),
        )
        trainer = SimpleNamespace(
            policy=policy,
            action_space=None,
            rollout_buffer=SimpleNamespace(
                get=lambda _, d=data: [d], values=old_values.numpy(), returns=returns.numpy()
            ),
            logger=SimpleNamespace(
                record=lambda name, value, *_, into=logged, **__: into.update({name: value})
            ),
            clip_range=lambda _: 0.2,
            clip_range_vf=None if clip_value is None else lambda _, c=clip_value: c,
            _update_learning_rate=nothing,
            _current_progress_remaining=1.0,
            _n_updates=0,
            n_epochs=1,
            batch_size=8,
            normalize_advantage=False,
            ent_coef=0.0,
            vf_coef=1.0,
            target_kl=None,
            max_grad_norm=1.0,
        )
        PPO.train(trainer)
        case = {
            "clip": 0.2,
            "clip_value": clip_value,
            "policy_loss": logged["train/policy_gradient_loss"],
            "value_loss": logged["train/value_loss"],
            "approx_kl": logged["train/approx_kl"],
            "clip_fraction": logged["train/clip_fraction"],
            "explained_variance": logged["train/explained_variance"],
            "grad_logps": policy_logps.grad,
            "grad_values": new_values.grad,
        }
        cases.append(case)
    return {
        "notes": [
            (
                "PPO.train, one minibatch of 8, one epoch, advantages not normalised; grad_*: of"
                " policy_loss + value_loss."
            ),
            (
                "value_loss is the plain mean squared error, without 1/2. With clip_value it is the"
                " error of the clipped value alone, old + clamp(new - old, +-clip), not the larger"
                " of both errors."
            ),
            "approx_kl is k3, mean(exp(d) - 1 - d) with d = logp - old_logp.",
            (
                "explained_variance compares old values to returns. clip_fraction goes through"
                " float32."
            ),
        ],
        "inputs": {
            "logps": logps,
            "old_logps": old_logps,
            "advantages": advantages,
            "values": values,
            "old_values": old_values,
            "returns": returns,
        },
        "cases": cases,
    }


class Config(SimpleNamespace):
    """Stands for verl's ActorConfig."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def verl(wheel: Path, tokens: dict[str, Tensor]) -> dict[str, Any]:
    names = ["masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value"]
    helpers = SimpleNamespace(
        **excerpt(wheel, "verl/utils/torch_functional.py", names, {"torch": torch})
    )
    losses = [
        "compute_policy_loss_vanilla",
        "compute_policy_loss_gspo",
        "compute_policy_loss_cispo",
    ]
    core = {
        "torch": torch,
        "verl_F": helpers,
        "defaultdict": defaultdict,
        "ActorConfig": Config,
        "AlgoConfig": type(None),
    }
    names = [
        "compute_gae_advantage_return",
        "compute_grpo_outcome_advantage",
        "compute_rloo_outcome_advantage",
    ]
    names += [*losses, "compute_value_loss", "agg_loss"]
    core = excerpt(wheel, "verl/trainer/ppo/core_algos.py", names, core)
    return {
        "gae": verl_gae(core, helpers),
        "group_advantage": verl_group_advantage(core),
        "policy_loss": verl_policy_loss(core, losses, tokens),
        "value_loss": verl_value_loss(core, tokens["mask"]),
        "agg_loss": verl_agg_loss(core),
    }


def verl_gae(core: dict[str, Any], helpers: SimpleNamespace) -> dict[str, Any]:
    mask = double([[1, 1, 0, 1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 1, 1, 0, 1, 1]])
    rewards = double([[0, 0.5, 0, 0, 0, 0, 0, 1.25, 0], [0.3, 0, 0, 0, 0, -0.75, 0, 0, 0.4]])
    values = normal(2, 9)
    whiten = helpers.masked_whiten
    cases = []
    for gamma, lam in GAMMA_LAM:
        helpers.masked_whiten = lambda advantages, mask: advantages
        advantages, returns = core["compute_gae_advantage_return"](
            rewards, values, mask, gamma, lam
        )
        helpers.masked_whiten = whiten
        whitened, _ = core["compute_gae_advantage_return"](rewards, values, mask, gamma, lam)
        cases.append(
            {
                "gamma": gamma,
                "lam": lam,
                "advantages": advantages,
                "returns": returns,
                "whitened": whitened,
            }
        )
    return {
        "notes": [
            (
                "compute_gae_advantage_return, [2, 9]. For advantages and returns, masked_whiten"
                " was replaced by the identity; 'whitened' is with verl's own: over the mask,"
                " unbiased variance, (x - mean) / sqrt(var + 1e-8)."
            ),
            (
                "Observation tokens (mask 0) are skipped: they neither decay nor insert their"
                " value. What stands there in the outputs is the advantage of the next action token"
                " and has no meaning, nor has what stands at whitened ones."
            ),
            (
                "A reward on an observation token would be lost. The state after the last token is"
                " worth 0; there is no bootstrap."
            ),
            (
                "Turns: sequence 0 is tokens 0-1, 3 (reward 0), 6-7, then padding; sequence 1 is"
                " tokens 0, 3-5, 7-8."
            ),
        ],
        "inputs": {"rewards": rewards, "values": values, "mask": mask},
        "cases": cases,
    }


def verl_group_advantage(core: dict[str, Any]) -> dict[str, Any]:
    group = [0, 1, 0, 2, 1, 0, 3, 1, 0]
    scores = double([0.2, 2.0, 1.4, 0.7, 2.0, -0.7, -1.2, 2.0, 0.9])
    mask = prefix([3, 2, 1, 3, 2, 3, 1, 3, 2], 3)
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(scores)), mask.sum(1).long() - 1] = scores
    arguments = {"token_level_rewards": rewards, "response_mask": mask, "index": np.array(group)}
    outputs = {
        "grpo_std": core["compute_grpo_outcome_advantage"](**arguments)[0],
        "grpo_mean": core["compute_grpo_outcome_advantage"](
            **arguments, norm_adv_by_std_in_grpo=False
        )[0],
        "rloo": core["compute_rloo_outcome_advantage"](**arguments)[0],
    }
    return {
        "notes": [
            (
                "compute_grpo_outcome_advantage with and without norm_adv_by_std_in_grpo, and"
                " compute_rloo_outcome_advantage: [9, 3]."
            ),
            (
                "grpo_std: (R - mean) / (std + 1e-6), unbiased std (G - 1). rloo: (R - mean) G / (G"
                " - 1)."
            ),
            (
                "Groups 2 and 3 have one member: verl takes mean 0 and std 1 there, so the"
                " advantage is the reward itself (over 1 + 1e-6 in grpo_std); rloo gives the reward"
                " too. Group 1 has equal rewards: 0."
            ),
        ],
        "inputs": {
            "rewards": rewards,
            "scores": scores,
            "mask": mask,
            "group": group,
            "epsilon": 1e-6,
        },
        "outputs": outputs,
    }


def verl_policy_loss(
    core: dict[str, Any], losses: list[str], tokens: dict[str, Tensor]
) -> dict[str, Any]:
    advantages = tokens["advantages"].unsqueeze(1).expand(3, 5)
    cases = []
    for name in losses:
        for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
            for dual_clip in (3.0, 1e6) if name.endswith("vanilla") else (None,):
                config = Config(
                    clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, global_batch_info={}
                )
                if dual_clip is not None:
                    config.clip_ratio_c = dual_clip
                logps = leaf(tokens["logps"])
                loss, _ = core[name](
                    tokens["old_logps"], logps, advantages, tokens["mask"], mode, config
                )
                loss.backward()
                case = {
                    "function": name,
                    "loss_agg_mode": mode,
                    "clip_low": 0.2,
                    "clip_high": 0.28,
                    "clip_ratio_c": dual_clip,
                    "loss": loss,
                    "grad": logps.grad,
                }
                cases.append(case)
    return {
        "notes": [
            (
                "Inputs as in trl's grpo_loss: the advantage of a sequence stands at each of its"
                " tokens. grad: in logps, [3, 5]."
            ),
            (
                "vanilla: the clipped surrogate; where the advantage is negative the loss is at"
                " most -clip_ratio_c * advantage (dual clip; token [1, 0] is beyond 3.0); 1e6 turns"
                " it off. The log-ratio is clamped to +-20."
            ),
            (
                "gspo: the ratio is exp(mean log-ratio of the sequence), its gradient goes through"
                " each token's own log-prob (sg[s] * pi / sg[pi]). Where the tokens of a sequence"
                " weigh alike, as in these modes, that is the gradient through the mean."
            ),
            (
                "cispo: the ratio is clamped to [1 - clip_low, 1 + clip_high], both sides, and"
                " detached; trl clamps above only."
            ),
        ],
        "inputs": {
            **{k: tokens[k] for k in ("logps", "old_logps", "mask")},
            "advantages": advantages,
        },
        "cases": cases,
    }


def verl_value_loss(core: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    old_values, returns = normal(3, 5), normal(3, 5)
    values = old_values + normal(3, 5, std=0.4)
    cases = []
    for mode in ("token-mean", "seq-mean-token-mean"):
        new = leaf(values)
        loss, _ = core["compute_value_loss"](new, returns, old_values, mask, 0.2, mode)
        loss.backward()
        cases.append({"clip_value": 0.2, "loss_agg_mode": mode, "loss": loss, "grad": new.grad})
    return {
        "notes": [
            "compute_value_loss: half of the larger of both squared errors, of the value and of the"
            " clipped one."
        ],
        "inputs": {"values": values, "old_values": old_values, "returns": returns, "mask": mask},
        "cases": cases,
    }


def verl_agg_loss(core: dict[str, Any]) -> dict[str, Any]:
    losses = normal(4, 5)
    masks = {"full": prefix([5, 3, 2, 4], 5), "one_empty": prefix([5, 3, 0, 4], 5)}
    kinds = [("token-mean", None), ("seq-mean-token-sum", None), ("seq-mean-token-mean", None)]
    kinds += [("seq-mean-token-sum-norm", None), ("seq-mean-token-sum-norm", 8)]
    cases = []
    for name, mask in masks.items():
        for mode, factor in kinds:
            matrix = leaf(losses)
            loss = core["agg_loss"](matrix, mask, mode, loss_scale_factor=factor)
            loss.backward()
            cases.append(
                {
                    "mask": name,
                    "loss_agg_mode": mode,
                    "loss_scale_factor": factor,
                    "loss": loss,
                    "grad": matrix.grad,
                }
            )
    return {
        "notes": [
            "agg_loss on [4, 5], one process, no global counts given.",
            (
                "Sequences without any token are left out of the sequence mean. seq-mean-token-mean"
                " divides by tokens + 1e-8."
            ),
            (
                "seq-mean-token-sum-norm (Dr. GRPO) divides the sequence mean of the sums by"
                " loss_scale_factor; without one, by the width of the padded matrix, 5, so the"
                " result depends on the padding."
            ),
        ],
        "inputs": {"losses": losses, "masks": masks},
        "cases": cases,
    }


def wheel_name(wheel: Path) -> str:
    return " ".join(wheel.name.split("-")[:2])


def plain(value: Any) -> Any:
    """Tensors and arrays as nested lists; anything but float64, integers and booleans is
    refused."""
    if isinstance(value, np.ndarray | np.generic):
        value = torch.from_numpy(np.array(value))
    if isinstance(value, Tensor):
        assert not value.is_floating_point() or value.dtype == torch.float64, value.dtype
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # Else quotients of counts inside the libraries are float32.
    torch.set_default_dtype(torch.float64)
    [old_trl], [verl_wheel] = folder.glob("trl-0.28.0-*.whl"), folder.glob("verl-*.whl")
    tokens = token_inputs()
    log_ratio = (tokens["logps"] - tokens["old_logps"]) * tokens["mask"]
    ratio = (log_ratio.sum(1) / tokens["mask"].sum(1)).exp()
    outside = (ratio > 1.28) | (ratio < 0.8)
    assert 0 < int(outside.sum()) < 3, "the sequence ratios should lie on both sides of a clip"
    recorded = {
        "about": {
            "made_by": "tests/references/make.py",
            "seed": SEED,
            "versions": {
                **{
                    name: version(name)
                    for name in ("torch", "transformers", "trl", "stable-baselines3", "numpy")
                },
                "trl (older, dpo_loss only)": wheel_name(old_trl).split()[1],
                "verl": wheel_name(verl_wheel).split()[1],
            },
            "sha256": {
                wheel.name: hashlib.sha256(wheel.read_bytes()).hexdigest()
                for wheel in (old_trl, verl_wheel)
            },
        },
        "trl": {
            "dpo": trl_dpo(old_trl),
            "kto": trl_kto(),
            "grpo_loss": trl_grpo_loss(tokens),
            "grpo_advantages": trl_grpo_advantages(),
        },
        "stable_baselines3": {"gae": sb3_gae(), "ppo": sb3_ppo()},
        "verl": verl(verl_wheel, tokens),
    }
    text = json.dumps(plain(recorded), indent=1, allow_nan=False)
    text = re.sub(
        r"\[\s+([^\[\]{}\"]*?)\s+\]",
        lambda found: "[" + re.sub(r",\s+", ", ", found[1]) + "]",
        text,
    )
    Path(__file__).with_name("recorded.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
