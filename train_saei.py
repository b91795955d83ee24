"""SaEI: GRPO training of a vision-language model with selective adversarial entropy intervention, while sampling.

    accelerate launch train_saei.py --config recipes/demo.yaml
    accelerate launch train_saei.py --config recipes/demo.yaml --intervention none --output out/demo-grpo  # plain GRPO

One step, for P prompts (image I, question Q, answer):
    1. sample G_clean responses per prompt from pi_old(. | I, Q)
    2. TsEC: choose their tokens of moderate entropy
    3. EgAS: PGD on I, upward on the entropy of the chosen tokens
    4. sample G_adv responses from pi_old(. | I_adv, Q)
    5. reward all; advantages within the group of one prompt
    6. GRPO update, conditioned on the clean image or on the one a response was sampled from

Every field of Config carries the mark of its source: paper, second-hand, inferred, or ours (nothing is known); what is
published of other methods is known.
Rollouts, data order and random images follow from (seed, step, row) alone, not from the state of a random number
generator: a run is the same on any number of processes (but for tsec_scope batch) and after any resume, up to rounding.
"""

import contextlib
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, GradientAccumulationPlugin
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import HfArgumentParser

import egas
import grpo
import rewards
import tsec
from extras import entropy_controls as controls
from runtime import data, plan
from runtime import run as runs
from vlm import adapt as memory
from vlm.policy import Policy, Prompts, Responses

CONTROLS = "none bonus skywork aer ecvgpo vogue top_entropy clip_cov kl_cov sent".split()
CLEAN, ATTACK, FRESH, CONTROL = range(4)  # what a step draws random numbers for: each has its own
UNCLIPPED = ("kl_cov", "sent")  # their log-ratio penalty stands in the clip's place


def opt(default, mark: str, text: str):
    """A Config field: its default, where the choice comes from, what it does."""
    kind = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": f"[{mark}] {text}"})


@dataclass
class Config:
    model: str = opt(
        "demo/confident", "ours", "hub id or folder of a vision-language model and its processor"
    )
    dtype: str = opt(
        "float32", "ours", "parameters' dtype: float32 | bfloat16; autocast is accelerate's to set"
    )
    attention: str = opt(
        "sdpa", "ours", "attention implementation: sdpa | eager | flash_attention_2"
    )
    min_pixels: int | None = opt(
        None, "ours", "smallest area of a picture, Qwen families; unset: the processor's own"
    )
    max_pixels: int | None = opt(
        None, "ours", "largest area of a picture, Qwen families: image tokens, memory"
    )
    freeze: str = opt(
        "none", "ours", "what is not trained: none | vision (the tower) | vision+projector"
    )
    lora_rank: int = opt(
        0, "ours", "LoRA on the language model's projections, nothing else trained; 0: none"
    )
    lora_alpha: float = opt(32.0, "ours", "LoRA's scale is lora_alpha / lora_rank")
    checkpointing: bool = opt(
        False, "ours", "keep each layer's input alone, compute the layer again in the backward"
    )
    self_check: bool = opt(
        True, "ours", "compare pixel_values and logits with the library's own before the first step"
    )
    dataset: str = opt(
        "demo",
        "ours",
        "demo, a preset's name, a .jsonl/.json/.parquet/.csv file, a folder, a hub id",
    )
    preset: str | None = opt(
        None, "ours", "read the data set as this entry of presets.py; alone: the set it names"
    )
    dataset_config: str | None = opt(
        None, "ours", "the hub set's configuration; unset: the preset's, or none"
    )
    split: str | None = opt(
        None,
        "ours",
        "the split to train on; unset: the preset's, train, or the demo's shifted/train",
    )
    image_column: str | None = opt(
        None, "ours", "unset: images, image; none: text alone, or pictures within messages"
    )
    problem_column: str | None = opt(
        None, "ours", "text or messages; unset: problem, question, prompt"
    )
    answer_column: str | None = opt(None, "ours", "unset: answer, solution, ground_truth")
    choices_column: str | None = opt(
        None, "ours", "list of options; unset: choices, options, or there are none"
    )
    template: str | None = opt(
        None,
        "ours",
        "boxed | tags | none | a YAML file with user, system; unset: the preset's, none",
    )
    streaming: bool = opt(
        False, "ours", "do not store the set: rows are read, and checked, as they come"
    )
    bad_rows: str = opt(
        "refuse", "ours", "a row that cannot be used: refuse it at start | skip, counted and named"
    )
    order: str | None = opt(
        None, "ours", "JSON list of row numbers to train in this order; unset: shuffled each epoch"
    )
    max_prompt_tokens: int = opt(
        2048, "ours", "longer prompts are filtered out and counted, never truncated"
    )
    output: str = opt("out/demo", "ours", "the run's folder")
    overwrite: bool = opt(False, "ours", "replace a run that the folder already holds")
    dry_run: bool = opt(
        False, "ours", "print the resolved plan, its memory estimated, and stop; reads no weights"
    )
    resume: bool = opt(False, "ours", "go on from the folder's newest complete checkpoint, exactly")
    seed: int = opt(0, "ours", "decides data order, rollouts and random images")
    steps: int = opt(100, "ours", "batches of rollouts")
    save_every: int = opt(50, "ours", "steps between checkpoints; the last step always has one")
    keep_last: int = opt(0, "ours", "complete checkpoints that are kept, the newest; 0: all")
    report_to: str = opt("none", "ours", "tracker: none | tensorboard | wandb | trackio ...")
    profile: bool = opt(
        False,
        "ours",
        "trace the second step: trace.json (for chrome://tracing), top operators printed",
    )
    log_prompts: int = opt(
        1, "ours", "prompts a step whose responses and pictures go to samples.jsonl"
    )

    prompts_per_step: int = opt(16, "ours", "P, over all processes")
    rollouts: int = opt(
        8, "ours", "G responses per prompt, clean and adversarial together: the budget of every arm"
    )
    adversarial_rollouts: int = opt(
        4, "ours", "G_adv, how many of them are sampled on the intervened image"
    )
    max_new_tokens: int = opt(64, "ours", "longest response")
    temperature: float = opt(
        1.0, "ours", "of sampling, of the scored distribution and of the entropy"
    )
    intervention: str = opt(
        "egas", "paper", "none (plain GRPO) | random (signs) | noise (NoisyRollout's) | egas"
    )
    condition: str = opt(
        "clean", "ours, by the study", "image the update is conditioned on: clean | sampled"
    )

    tsec_low: float = opt(
        0.2, "ours", "TsEC's low cut, a quantile; 0: none. That there is a low cut: inferred"
    )
    tsec_high: float = opt(
        0.8, "ours", "TsEC's high cut, a quantile; 1: none. That there is a high cut: inferred"
    )
    tsec_scope: str = opt(
        "response", "ours", "what the quantiles are taken over: response | batch (a process's)"
    )
    tsec_keep: str = opt(
        "moderate",
        "ours",
        "tokens within the cuts, or, as a control, the extreme ones outside them",
    )
    eps: float = opt(
        2 / 255, "ours, by the study", "L-infinity radius of the attack, in [0, 1] pixel units"
    )
    pgd_steps: int = opt(3, "ours", "number of PGD steps")
    step_size: float | None = opt(
        None, "ours", "PGD's step, in pixel units; unset: 2.5 * eps / steps, at most eps"
    )
    random_start: bool = opt(False, "ours", "PGD begins at a random point of the ball")
    anneal: bool = opt(
        False, "ours", "eps follows NoisyRollout's schedule instead of staying constant"
    )
    noise_t: float = opt(
        500.0,
        "ours",
        "noise: diffusion step of 1,000 at the start, annealed (NoisyRollout's value)",
    )

    advantage_scale: str = opt(
        "std", "ours", "divide the centred rewards of a group by their std: std | none"
    )
    zero_variance: str = opt(
        "keep", "ours", "groups of equal accuracy: keep | drop from loss and normaliser"
    )
    clip_low: float = opt(0.2, "ours", "the ratio is clipped below 1 - clip_low")
    clip_high: float = opt(0.28, "ours", "and above 1 + clip_high (DAPO's clip-higher)")
    kl_coef: float = opt(0.0, "ours", "weight of k3 to the initial policy; 0 loads no reference")
    accuracy_weight: float = opt(
        0.9, "ours", "weight of the accuracy reward (NoisyRollout's, EasyR1's value)"
    )
    format_weight: float = opt(0.1, "ours", "weight of the format reward")
    length_weight: float = opt(
        0.0, "ours", "weight of DAPO's overlong penalty, from 0 to -1; 0 leaves it out"
    )
    length_buffer: int = opt(
        16, "ours", "tokens before max_new_tokens over which that penalty grows"
    )
    reward: list[str] = opt(
        [], "ours", "further rewards, each file.py:function or file.py:function:weight"
    )
    update_control: str = opt(
        "none", "ours", "entropy control in the update, in any arm: " + " | ".join(CONTROLS)
    )
    entropy_coef: float = opt(
        1e-3, "ours", "weight of the entropy bonus (EasyR1's); skywork, aer: where it begins"
    )
    skywork_target: float = opt(
        0.2, "known", "skywork: the bonus acts while the entropy, in nats, is not above"
    )
    skywork_step: float = opt(
        1e-4, "known", "skywork: what a step adds to the coefficient or takes away"
    )
    skywork_max: float = opt(5e-3, "known", "skywork: the coefficient's upper limit")
    aer_target: float = opt(
        0.4, "second-hand", "aer: the target, a share of the first step's entropy"
    )
    aer_rate: float = opt(
        0.01, "ours", "aer: what a nat below the target adds to the coefficient in a step"
    )
    aer_threshold: float = opt(1.0, "ours", "aer: prompts of this accuracy or more get no bonus")
    ecvgpo_power: float = opt(
        1.0, "inferred", "ecvgpo: power of the self-information; larger favours the unlikely"
    )
    vogue_visual: float = opt(
        1.0, "known", "vogue: advantage that a nat of divergence between the images adds"
    )
    vogue_entropy: float = opt(0.4, "known", "vogue: advantage that a nat of entropy adds")
    vogue_cap: float = opt(2.0, "known", "vogue: each adds at most |advantage| / vogue_cap")
    top_entropy: float = opt(
        0.2, "known", "top_entropy: share of the tokens that the policy gradient keeps"
    )
    cov_share: float = opt(
        2e-4, "known", "clip_cov, kl_cov, sent: share of the tokens that is chosen; at least 1"
    )
    penalty_coef: float | None = opt(
        None, "known", "weight of |log-ratio|; unset: 1 in kl_cov, 0.1 in sent"
    )
    updates_per_step: int = opt(
        1, "ours", "optimiser steps per batch of rollouts; 1 is on-policy, its ratios are 1"
    )
    micro_prompts: int = opt(
        16, "ours", "prompts a device attacks and updates at a time: memory, not the gradient"
    )
    sample_prompts: int = opt(
        0, "ours", "prompts a device samples at a time: memory, not the responses; 0: all its share"
    )
    micro_responses: int = opt(
        0, "ours", "responses the backward holds at a time, computed twice for it; 0: all"
    )
    lr: float = opt(1e-6, "ours", "AdamW's learning rate")
    warmup_steps: int = opt(0, "ours", "batches of rollouts over which lr grows to its value")
    weight_decay: float = opt(0.01, "ours", "AdamW's weight decay")
    max_grad_norm: float = opt(1.0, "ours", "gradients are scaled down to this norm")

    def __post_init__(self):
        for (
            name,
            kind,
        ) in Config.__annotations__.items():  # a recipe's values are what YAML makes of them
            kind = (
                list if name == "reward" else kind | int if kind in (float, float | None) else kind
            )
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")
        choices = {
            "dtype": ("float32", "bfloat16"),
            "freeze": ("none", "vision", "vision+projector"),
            "bad_rows": ("refuse", "skip"),
            "intervention": ("none", "random", "noise", "egas"),
            "condition": ("clean", "sampled"),
            "tsec_scope": ("response", "batch"),
            "tsec_keep": ("moderate", "extreme"),
            "advantage_scale": ("std", "none"),
            "zero_variance": ("keep", "drop"),
            "update_control": CONTROLS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.intervention == "none":
            self.adversarial_rollouts = 0
        rules = {
            "0 <= eps <= 1": 0 <= self.eps <= 1,
            "0 <= tsec_low < tsec_high <= 1": 0 <= self.tsec_low < self.tsec_high <= 1,
            "rollouts >= 2": self.rollouts >= 2,
            "0 <= adversarial_rollouts < rollouts": 0 <= self.adversarial_rollouts < self.rollouts,
            "adversarial_rollouts >= 1 with an intervention": (self.adversarial_rollouts > 0)
            == (self.intervention != "none"),
            "0 < length_buffer <= max_new_tokens": not self.length_weight
            or 0 < self.length_buffer <= self.max_new_tokens,
            # at pi = pi_old the gradient of |log pi - log pi_old| is 0: the control would do nothing, without a word
            "updates_per_step >= 2 with kl_cov or sent": self.updates_per_step >= 2
            or self.update_control not in UNCLIPPED,
            "order needs a stored data set, without streaming": not (self.order and self.streaming),
            "vogue needs an intervention": self.update_control != "vogue"
            or self.intervention != "none",
            "0 <= clip_low <= 1": 0 <= self.clip_low <= 1,
            "0 <= noise_t <= 1000": 0 <= self.noise_t <= 1000,
            "step_size >= 0": self.step_size is None or self.step_size >= 0,
            "0 <= top_entropy <= 1": 0 <= self.top_entropy <= 1,
            "0 < cov_share <= 1": 0 < self.cov_share <= 1,
            "penalty_coef > 0": self.penalty_coef is None or self.penalty_coef > 0,
        }
        one = "steps save_every prompts_per_step max_new_tokens pgd_steps updates_per_step micro_prompts".split()
        none = "entropy_coef aer_rate lora_rank ecvgpo_power micro_responses sample_prompts keep_last seed".split()
        none += "kl_coef clip_high weight_decay warmup_steps".split()
        above = "temperature lr aer_threshold vogue_cap max_grad_norm lora_alpha".split()
        rules |= {f"{name} >= 1": getattr(self, name) >= 1 for name in one}
        rules |= {f"{name} >= 0": getattr(self, name) >= 0 for name in none}
        rules |= {f"{name} > 0": getattr(self, name) > 0 for name in above}
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ValueError(f"the configuration breaks: {'; '.join(broken)}")

    @property
    def clean_rollouts(self) -> int:
        return self.rollouts - self.adversarial_rollouts


@runs.signals_given_back()
def main(cfg: Config) -> None:
    if cfg.dry_run:  # before the accelerator: no GPU is needed
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if os.environ.get("RANK", "0") == "0":
            print(plan.describe(cfg, split_work(cfg, processes)[0], processes))
        return
    accelerator = make_accelerator(cfg)
    micro, accelerator.gradient_accumulation_steps = split_work(cfg, accelerator.num_processes)
    first_step, source = runs.prepare_output(cfg, accelerator)
    policy = load_policy(cfg, source, first_step)
    reference = load_reference(cfg, accelerator, first_step) if cfg.kl_coef else None
    rows = load_rows(cfg, accelerator, policy, first_step)
    reward_functions = load_rewards(cfg, rows[0])
    wrapped, optimizer = prepare(
        cfg, accelerator, policy, source, first_step
    )  # `wrapped` is differentiated
    if cfg.self_check:
        with accelerator.autocast(), gathered(policy):
            errors = policy.self_check()
        accelerator.print(
            "self-check: largest difference to the library's own: " + json.dumps(errors)
        )
    log, stop = runs.Log(cfg, accelerator, first_step), runs.Stop(accelerator)

    for step in log.progress(range(first_step, cfg.steps)):
        n = None if cfg.streaming else len(rows)
        indices = my_rows(cfg, step, n, accelerator)
        batch = [rows[i % n if n else i] for i in indices]
        prompts = policy.encode(
            [r["problem"] for r in batch], [r["images"] for r in batch], cfg.max_prompt_tokens
        )
        clock = runs.Clock(accelerator.device)

        with accelerator.autocast(), gathered(policy):
            # 1  y ~ pi_old(. | I, Q); entropies and log-probs are recorded while sampling
            clean = sample(
                cfg, policy, prompts, cfg.clean_rollouts, seeds_of(cfg, step, indices, CLEAN)
            )
            clock.lap("sample")

            # 2  TsEC: tokens of moderate entropy
            cuts = (cfg.tsec_low, cfg.tsec_high, cfg.tsec_scope, cfg.tsec_keep)
            keep = tsec.select_tokens(clean.entropy, clean.mask, *cuts)

            # 3  EgAS: the image that raises their entropy (or what the other arms do to the image)
            seeds = seeds_of(cfg, step, indices, ATTACK)
            attacked = intervene(cfg, policy, prompts, clean, keep, step, seeds, micro)
            clock.lap("attack")

            # 4  y ~ pi_old(. | I_adv, Q)
            fresh = None
            if cfg.adversarial_rollouts:
                seeds = seeds_of(cfg, step, indices, FRESH)
                fresh = sample(cfg, policy, attacked, cfg.adversarial_rollouts, seeds)
            clock.lap("sample")

        # 5  rewards of all G responses, advantages within a prompt's group
        texts, scores = reward(reward_functions, policy, batch, clean, fresh)  # (P, G) each
        advantages = grpo.group_advantages(scores["reward"], scale=cfg.advantage_scale)
        rollouts = Rollouts(batch, prompts, attacked, clean, fresh, keep, texts, scores, advantages)
        with accelerator.autocast(), gathered(policy):
            metrics = sampling_metrics(
                cfg, policy, rollouts, micro
            )  # before the update: all of it is about pi_old
        clock.lap("measure")

        # 6  GRPO update, each response on the image that `condition` names
        losses = update(cfg, accelerator, wrapped, reference, optimizer, rollouts, micro, step)
        clock.lap("update")

        log.step(step, metrics | clock.seconds(), losses)
        log.samples(step, policy, rollouts)
        if stop.asked() or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            runs.save_checkpoint(cfg, accelerator, wrapped, step + 1)
        if stop.agreed:
            break
    accelerator.end_training()
    stop.leave()


# ------------------------------------------------------------------------------------------------ the steps, in detail


@dataclass
class Rollouts:
    """What steps 1 to 5 made of P prompts; fresh is None in plain GRPO, where attacked is prompts."""

    batch: list[dict]
    prompts: Prompts
    attacked: Prompts
    clean: Responses  # P * G_clean rows
    fresh: Responses | None  # P * G_adv rows
    keep: Tensor  # TsEC's choice among clean's tokens
    texts: list[list[str]]  # (P, G), the clean ones first
    scores: dict[str, Tensor]  # reward, accuracy, format: (P, G)
    advantages: Tensor  # (P, G)


def sample(cfg: Config, policy: Policy, prompts: Prompts, n: int, seeds: list[int]) -> Responses:
    """Steps 1 and 4: n responses per prompt, `sample_prompts` prompts at a time, padded to the longest."""
    width, parts = cfg.sample_prompts or len(prompts), []
    for i in range(0, len(prompts), width):
        part = slice(i, i + width)
        parts.append(
            policy.sample(prompts[part], n, seeds[part], cfg.max_new_tokens, cfg.temperature)
        )
    # two at least: each layer then runs as often in every process's update, and FSDP gathers it as often
    longest, fields = max(2, *(r.tokens.shape[1] for r in parts)), []
    for name, value in (
        ("tokens", policy.pad_id),
        ("mask", False),
        ("logprobs", 0.0),
        ("entropy", 0.0),
    ):
        columns = [getattr(r, name) for r in parts]
        fields.append(
            torch.cat(
                [
                    torch.nn.functional.pad(x, (0, longest - x.shape[1]), value=value)
                    for x in columns
                ]
            )
        )
    return Responses(*fields)


def intervene(
    cfg: Config,
    policy: Policy,
    prompts: Prompts,
    clean: Responses,
    keep: Tensor,
    step: int,
    seeds: list[int],
    micro: int,
) -> Prompts:
    """Step 3: the prompts with the images that the adversarial responses are sampled on.

    egas attacks `micro` prompts at a time, the parameters frozen so that nothing is stored for their gradients.
    random: signs at the same eps. noise: NoisyRollout's, annealed as there.
    """
    if cfg.intervention == "none":
        return prompts
    fade = annealing(step, cfg.steps)
    eps = cfg.eps * (fade if cfg.anneal else 1.0)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # one a prompt
    parts = [slice(i, i + micro) for i in range(0, len(prompts), micro)]
    images = []
    if cfg.intervention == "egas":
        for part in parts:
            own = [
                g
                for g, count in zip(generators[part], prompts.counts[part], strict=True)
                for _ in range(count)
            ]
            pgd = (eps, cfg.step_size, cfg.pgd_steps, cfg.random_start, own)
            if own:  # else text alone: nothing to attack
                objective = entropy_objective(policy, prompts, clean, keep, cfg.temperature, part)
                with frozen(policy):
                    images += egas.pgd_ascent(objective, prompts[part].images, *pgd)
        return prompts.with_images(images)
    change, size = egas.random_signs, eps
    if cfg.intervention == "noise":
        change, size = egas.diffusion_noise, cfg.noise_t * fade
    for i, generator in enumerate(generators):
        images += change(prompts[i : i + 1].images, size, generator)
    return prompts.with_images(images)


def entropy_objective(
    policy: Policy,
    prompts: Prompts,
    responses: Responses,
    keep: Tensor,
    temperature: float,
    part: slice = slice(None),
) -> Callable[[list[Tensor]], Tensor]:
    """H(images) = (1/n) sum over a prompt's n responses of the mean entropy of their kept tokens, teacher-forced.

    A function of the images of prompts[part].   -> (P,), differentiable in the images
    """
    P, prompts = len(prompts), prompts[part]
    tokens, mask, keep = (
        by_prompt(x, P)[part].flatten(0, 1) for x in (responses.tokens, responses.mask, keep)
    )

    def objective(images: list[Tensor]) -> Tensor:
        _, entropy = policy.score(
            prompts.with_images(images), tokens, mask, temperature
        )  # (P * n, T)
        return by_prompt(tsec.selective_entropy(entropy, keep), len(prompts)).mean(dim=1)

    return objective


def by_prompt(x: Tensor, P: int) -> Tensor:
    """(P * n, ...) -> (P, n, ...)"""
    return x.unflatten(0, (P, -1))


def annealing(step: int, steps: int) -> float:
    """NoisyRollout's schedule, 1 -> 0, scaled to the run: 1 - 1 / (1 + exp(-30 (step / steps - 2/3)))."""
    return 1 - 1 / (1 + math.exp(-30 * (step - steps * 2 / 3) / steps))


def reward(
    functions: rewards.Rewards,
    policy: Policy,
    batch: list[dict],
    clean: Responses,
    fresh: Responses | None,
) -> tuple[list[list[str]], dict[str, Tensor]]:
    """Step 5: the responses' texts and {"reward", "accuracy", "format", ...}, all (P, G), the clean ones first.

    A reward gets TRL's arguments: completions, completion_ids, the rows' columns, of which `row` is their number.
    """
    P, halves = len(batch), [r for r in (clean, fresh) if r]
    ids = [
        [tokens[mask].tolist() for tokens, mask in zip(r.tokens, r.mask, strict=True)]
        for r in halves
    ]
    both = [
        [np.fromiter(x, dtype=object).reshape(P, -1) for x in part]
        for part in (map(policy.decode, halves), ids)
    ]
    texts, ids = (np.concatenate(part, axis=1) for part in both)  # (P, G)
    repeated = [row for row in batch for _ in range(texts.shape[1])]
    columns = {name: [row[name] for row in repeated] for name in repeated[0] if name != "images"}
    scores = rewards.total_reward(
        texts.flatten().tolist(),
        rewards=functions,
        completion_ids=ids.flatten().tolist(),
        **columns,
    )
    return texts.tolist(), {
        name: by_prompt(torch.tensor(x, device=policy.device), P) for name, x in scores.items()
    }


class Part(NamedTuple):
    """Responses that are updated on the same prompts and images."""

    prompts: Prompts
    tokens: Tensor  # (P, n, T)
    mask: Tensor  # (P, n, T)
    keep: Tensor  # (P, n, T) the tokens whose policy gradient counts
    weights: Tensor  # (P, n, T) of |log pi - log pi_old|
    advantages: Tensor  # (P, n)
    bonus: Tensor  # (P, n) the entropy's coefficient

    def rows(self, start: int, stop: int) -> "Part":
        return Part(*(x[start:stop] for x in self))

    def score(self, policy: torch.nn.Module, temperature: float) -> tuple[Tensor, Tensor]:
        """-> log-probs, entropies: (P * n, T)"""
        return policy(self.prompts, self.tokens.flatten(0, 1), self.mask.flatten(0, 1), temperature)


def update(
    cfg: Config,
    accelerator: Accelerator,
    wrapped: torch.nn.Module,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    micro: int,
    step: int,
) -> dict[str, float]:
    """Step 6: updates_per_step optimiser steps, each over micro-batches with one normaliser: all its response tokens.

    Old log-probs are those of the image that conditions the update. With one update they are the scored ones, detached
    (ratio 1); with several they are computed first. Returns the global loss and its metrics.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        refuse_text_alone(cfg, rollouts.prompts, micro, step)
    parts = update_parts(
        cfg, rollouts, controlled(cfg, accelerator, wrapped, optimizer, rollouts, micro, step)
    )
    P, lr = len(rollouts.prompts), cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = lr
    old = None
    if cfg.updates_per_step > 1:
        with torch.no_grad():
            old = [
                [p.rows(i, i + micro).score(wrapped, cfg.temperature)[0] for p in parts]
                for i in range(0, P, micro)
            ]
    sums, norms, size = Counter(), [], P // cfg.updates_per_step
    for start in range(0, P, size):
        tokens = sum(part.mask[start : start + size].sum() for part in parts)
        tokens = accelerator.reduce(tokens, "sum").clamp(
            min=1
        )  # of the optimiser step, over all processes
        for i in range(start, start + size, micro):
            with accelerator.accumulate(wrapped):
                loss = 0.0
                for k, part in enumerate(part.rows(i, i + micro) for part in parts):
                    logprobs, entropy = part.score(wrapped, cfg.temperature)  # (P * n, T)
                    mask = part.mask.flatten(0, 1)
                    before = old[i // micro][k] if old else logprobs.detach()
                    advantages, keep = part.advantages.flatten(), part.keep.flatten(0, 1)
                    clip = (
                        (1.0, math.inf)
                        if cfg.update_control in UNCLIPPED
                        else (cfg.clip_low, cfg.clip_high)
                    )
                    part_loss, metrics = grpo.policy_loss(
                        logprobs, before, advantages, keep, *clip, tokens
                    )
                    if cfg.update_control != "none":
                        metrics |= control_terms(part, logprobs, before, entropy, tokens)
                        part_loss = part_loss + metrics["control/loss"]
                    if reference is not None:
                        with (
                            torch.no_grad(),
                            accelerator.autocast(),
                        ):  # as accelerate does for `wrapped`
                            anchor = part.score(reference, cfg.temperature)[0]
                        pair = (
                            x.masked_fill(~mask, 0.0) for x in (logprobs, anchor)
                        )  # padding: k3(0, 0) = 0
                        metrics["kl"] = grpo.kl_k3(*pair).sum() / tokens
                        part_loss = part_loss + cfg.kl_coef * metrics["kl"]
                    loss = loss + part_loss
                    sums.update(
                        {name: v.detach() for name, v in (metrics | {"loss": part_loss}).items()}
                    )
                # DDP averages over processes and accelerate divides by the micro-batches: the normaliser did both
                accelerator.backward(
                    loss * accelerator.num_processes * accelerator.gradient_accumulation_steps
                )
                if accelerator.sync_gradients:
                    norms.append(
                        float(accelerator.clip_grad_norm_(wrapped.parameters(), cfg.max_grad_norm))
                    )
                    stop_unless_finite(cfg, norms[-1], rollouts, accelerator, step)
                optimizer.step()
                optimizer.zero_grad()
    losses = torch.stack([sums[name] for name in sorted(sums)]) / cfg.updates_per_step
    losses = accelerator.reduce(losses, "sum").tolist()
    return dict(zip(sorted(sums), losses, strict=True)) | {
        "grad_norm": float(np.mean(norms)),
        "lr": lr,
    }


def joined(cfg: Config, x: Rollouts) -> tuple[Part, Tensor, Tensor]:
    """All G responses, the clean ones first; and the log-probs and entropies of their sampling: (P, G, T)."""
    halves = [(r.tokens, r.mask, r.logprobs, r.entropy) for r in (x.clean, x.fresh) if r]
    halves = [[by_prompt(y, len(x.prompts)) for y in half] for half in halves]
    longest = max(half[0].shape[2] for half in halves)
    padded = [
        [torch.nn.functional.pad(y, (0, longest - y.shape[2])) for y in half] for half in halves
    ]
    tokens, mask, logprobs, entropy = (torch.cat(y, dim=1) for y in zip(*padded, strict=True))
    if cfg.zero_variance == "drop":
        mask = mask & ~grpo.equal_groups(x.scores["accuracy"])[:, None, None]
    no_weights, no_bonus = torch.zeros_like(logprobs), torch.zeros_like(x.advantages)
    return (
        Part(x.prompts, tokens, mask, mask, no_weights, x.advantages, no_bonus),
        logprobs,
        entropy,
    )


def controlled(
    cfg: Config,
    accelerator: Accelerator,
    wrapped: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Rollouts,
    micro: int,
    step: int,
) -> Part:
    """All G responses as update_control treats them: once a batch of rollouts, over all processes'.

    An adaptive coefficient lives in the optimiser's parameter group: it is saved, and resumed, with it.
    """
    part, logprobs, entropy = joined(cfg, x)
    if cfg.update_control == "none":
        return part
    P = len(x.prompts)
    tensors = {
        "mask": part.mask,
        "logprobs": logprobs,
        "entropy": entropy,
        "advantages": x.advantages,
    }
    tensors |= {"accuracy": x.scores["accuracy"]}
    if (
        cfg.update_control == "vogue"
    ):  # what was sampled on the intervened image, scored on the clean one
        tokens, mask = (by_prompt(y, P) for y in (x.fresh.tokens, x.fresh.mask))
        noisy = part._replace(tokens=tokens, mask=mask)
        with torch.no_grad():
            raw = [
                noisy.rows(i, i + micro).score(wrapped, cfg.temperature)[0]
                for i in range(0, P, micro)
            ]
        tensors["divergence"] = by_prompt(
            controls.symmetric_kl(x.fresh.logprobs, torch.cat(raw)), P
        )
    own = {
        "clean_mask": x.clean.mask,
        "clean_entropy": x.clean.entropy,
    }  # dropped groups too: the policy's own entropy
    tensors |= {name: by_prompt(y, P) for name, y in own.items()}
    if accelerator.num_processes > 1:  # the controls choose among all of the step's tokens
        wide = {
            k: accelerator.pad_across_processes(y, dim=2).to(y.dtype).contiguous()
            for k, y in tensors.items()
        }
        apart = {
            k: y.unflatten(0, (-1, P)) for k, y in accelerator.gather(wide).items()
        }  # (processes, P, ...)
        tensors = {
            k: y.transpose(0, 1).flatten(0, 1) for k, y in apart.items()
        }  # as my_rows dealt them out
    mean_entropy = float(tensors.pop("clean_entropy")[tensors.pop("clean_mask")].mean())
    generator = torch.Generator().manual_seed(seeds_of(cfg, step, [0], CONTROL)[0])
    treated = controls.treat(
        cfg,
        **tensors,
        mean_entropy=mean_entropy,
        state=optimizer.param_groups[0],
        generator=generator,
    )
    own, T = slice(accelerator.process_index, None, accelerator.num_processes), part.mask.shape[2]
    mine = {name: y[own, :, :T] if y.ndim == 3 else y[own] for name, y in treated._asdict().items()}
    return part._replace(**mine)


def update_parts(cfg: Config, x: Rollouts, whole: Part) -> list[Part]:
    """condition clean: all G responses on the clean image; sampled: each on the image it was sampled from."""
    if cfg.condition == "clean" or x.fresh is None:
        return [whole]
    n, parts = cfg.clean_rollouts, []
    for prompts, own, half in (
        (x.prompts, slice(n), x.clean),
        (x.attacked, slice(n, None), x.fresh),
    ):
        T = half.tokens.shape[1]
        parts.append(
            Part(prompts, *(y[:, own, :T] if y.ndim == 3 else y[:, own] for y in whole[1:]))
        )
    return parts


def control_terms(
    part: Part, logprobs: Tensor, before: Tensor, entropy: Tensor, tokens: Tensor
) -> dict[str, Tensor]:
    """The control's own term of the loss, the share of tokens that it treats, the entropy's mean coefficient."""
    mask, keep, weights = (
        x.flatten(0, 1) for x in (part.mask, part.keep, part.weights)
    )  # (P * n, T)
    penalty = controls.log_ratio_penalty(logprobs, before, weights, mask, tokens)
    return {
        "control/loss": penalty
        + controls.entropy_bonus(entropy, mask, part.bonus.flatten(), tokens),
        "control/tokens": (mask & (~keep | (weights > 0))).sum() / tokens,
        "control/bonus": (part.bonus.flatten()[:, None] * mask).sum() / tokens,
    }


def refuse_text_alone(cfg: Config, prompts: Prompts, micro: int, step: int) -> None:
    """ZeRO-2 sums the processes' gradients in the order in which they come: each micro-batch must reach all of them."""
    if (
        cfg.freeze == "vision+projector" or cfg.lora_rank
    ):  # nothing that only pictures reach is trained
        return
    if not all(any(prompts.counts[i : i + micro]) for i in range(0, len(prompts), micro)):
        raise ValueError(
            f"step {step}: a micro-batch of text alone, which ZeRO-2 cannot train: take recipes/accelerate/fsdp2.yaml, "
            "--freeze vision+projector, or a larger --micro_prompts"
        )


def stop_unless_finite(
    cfg: Config, norm: float, rollouts: Rollouts, accelerator: Accelerator, step: int
) -> None:
    """All processes have the same norm, and stop together, before the parameters are touched (under ZeRO-2: after)."""
    if not math.isfinite(norm):
        path = Path(cfg.output) / f"failed-step-{step:06d}-process-{accelerator.process_index}.pt"
        torch.save(asdict(rollouts), path)
        raise FloatingPointError(
            f"step {step}: the gradient is not finite (norm {norm}); the batch is in {path}, the last checkpoint good. "
            "Likely causes: a learning rate too high, or bfloat16 parameters (float32 with mixed precision is safer)"
        )


def sampling_metrics(cfg: Config, policy: Policy, x: Rollouts, micro: int) -> dict[str, float]:
    """What this process's rollouts look like; every value a mean over its prompts. docs/metrics.md defines each name."""
    n, halves = cfg.clean_rollouts, [r for r in (x.clean, x.fresh) if r]
    quantile = lambda q: tsec.entropy_quantile(x.clean.entropy, x.clean.mask, q, cfg.tsec_scope)  # noqa: E731
    tensors = x.scores | {
        "zero_variance": grpo.equal_groups(x.scores["accuracy"]),
        "entropy/clean": tsec.selective_entropy(x.clean.entropy, x.clean.mask),
        "entropy/selected": tsec.selective_entropy(x.clean.entropy, x.keep),
        "tsec/kept": x.keep.sum(dim=1) / x.clean.mask.sum(dim=1),
        "tsec/low": quantile(cfg.tsec_low),
        "tsec/high": quantile(cfg.tsec_high),
        "distinct": torch.tensor([len(set(group)) / len(group) for group in x.texts]),
        "length": torch.cat([r.mask.sum(dim=1) for r in halves]),
        "truncated": torch.cat([r.truncated(policy.eos_ids) for r in halves]),
    }
    if x.fresh is not None:
        P = range(len(x.prompts))
        pairs = [
            list(zip(x.attacked[i : i + 1].images, x.prompts[i : i + 1].images, strict=True))
            for i in P
        ]
        parts = [slice(i, i + micro) for i in range(0, len(x.prompts), micro)]
        at = lambda part: entropy_objective(
            policy, x.prompts, x.clean, x.keep, cfg.temperature, part
        )  # noqa: E731
        with torch.no_grad():
            tensors["entropy/attacked"] = torch.cat(
                [at(part)(x.attacked[part].images) for part in parts]
            )
        tensors |= {
            "entropy/fresh": tsec.selective_entropy(x.fresh.entropy, x.fresh.mask),
            # a value a prompt, 0 and 99 of text alone or unchanged: then the mean over processes is that over prompts
            "attack/linf": torch.tensor(
                [max([(a - b).abs().max() for a, b in pair], default=0.0) for pair in pairs]
            ),
            "attack/psnr": torch.tensor(
                [min([99.0, *(egas.psnr(a, b) for a, b in pair)]) for pair in pairs]
            ),
        }
        for name in ("reward", "accuracy"):
            scores = x.scores[name]
            tensors |= {f"{name}/clean": scores[:, :n], f"{name}/adversarial": scores[:, n:]}
        found, found_fresh = (
            tensors[f"accuracy/{half}"].any(dim=1) for half in ("clean", "adversarial")
        )  # (P,)
        tensors |= {"rescued": found_fresh & ~found, "lost": found & ~found_fresh}
    return {name: values.float().mean().item() for name, values in tensors.items()}


# ----------------------------------------------------------------------------------------------------------- plumbing


def make_accelerator(cfg: Config) -> Accelerator:
    """DDP, or what the launcher's recipe says (recipes/accelerate)."""
    tracker = None if cfg.report_to == "none" else cfg.report_to
    # a micro-batch of text alone reaches no vision parameter, and in LLaVA's towers some are never reached
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    # sharded, gradients are reduced after every micro-batch: summed up before, they would be whole on every device
    accumulation = GradientAccumulationPlugin(num_steps=1, sync_each_batch=sharded)
    accelerator = Accelerator(
        log_with=tracker,
        project_dir=cfg.output,
        kwargs_handlers=[unused],
        gradient_accumulation_plugin=accumulation,
    )
    # FSDP warns of a view that is written to in place: log-probs and entropy are views, and not written to
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    if (
        sharded and accelerator.distributed_type == DistributedType.MULTI_CPU
    ):  # it takes DDP there, without a word
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    if (
        accelerator.mixed_precision == "fp16"
    ):  # its scale grows until a gradient overflows, which ends the run here
        raise ValueError("fp16 is not supported: take --mixed_precision bf16 or no")
    if tracker and not accelerator.log_with:  # accelerate leaves out what is not installed, quietly
        raise ValueError(f"the tracker {tracker} is not installed: pip install {tracker}")
    if sharded and accelerator.num_processes > 1 and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP's first version is not supported: set fsdp_version: 2, as recipes/accelerate/fsdp2.yaml"
        )
    if accelerator.is_fsdp2 and (precision := accelerator.state.fsdp_plugin.mixed_precision_policy):
        # as accelerate sets it, FSDP rounds pixels, log-probs, entropies and the gradients' sums to bfloat16
        exact = {"reduce_dtype": torch.float32, "output_dtype": None, "cast_forward_inputs": False}
        accelerator.state.fsdp_plugin.mixed_precision_policy = replace(precision, **exact)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "ZeRO-3 gathers at every token, and would wait for ever: recipes/accelerate/fsdp2.yaml"
            )
        # its engine clips, and steps, within accelerator.backward
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = cfg.max_grad_norm
    return accelerator


def load_policy(cfg: Config, source: str, first_step: int) -> Policy:
    """The model with what is frozen, adapted and computed again; `source`: a checkpoint if first_step > 0."""
    start = cfg.model if cfg.lora_rank else source  # adapters go on from the base model
    policy = Policy.from_pretrained(start, cfg.dtype, cfg.attention, cfg.min_pixels, cfg.max_pixels)
    memory.freeze(policy, cfg.freeze)
    if cfg.lora_rank:
        memory.add_lora(
            policy, cfg.lora_rank, cfg.lora_alpha, cfg.seed, source if first_step else None
        )
    if cfg.checkpointing:
        memory.checkpoint_layers(policy)
    policy.micro_responses = cfg.micro_responses
    return policy


def load_reference(cfg: Config, accelerator: Accelerator, first_step: int) -> Policy:
    """The policy that kl_coef pulls to: cfg.model as it was when the run began."""
    reference = Policy.from_pretrained(cfg.model, cfg.dtype, cfg.attention).to(accelerator.device)
    reference.requires_grad_(False)
    runs.same_reference(cfg, reference, accelerator, first_step)
    return reference


def prepare(
    cfg: Config, accelerator: Accelerator, policy: Policy, source: str, first_step: int
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The policy as the launcher wraps it, and AdamW; with the state of the checkpoint `source` if first_step > 0."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    if any(p.dtype == torch.bfloat16 for p in trained):
        text = "bfloat16 parameters lose most updates of a small lr: take --dtype float32 with --mixed_precision bf16, "
        warnings.warn(text + "or --lora_rank, whose adapters are float32", stacklevel=2)
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
    if cfg.update_control in (
        "skywork",
        "aer",
    ):  # before anything is loaded: FSDP loads the keys that are there
        optimizer.param_groups[0] |= {"entropy_coef": cfg.entropy_coef, "entropy_start": 0.0}
    wrapped, optimizer = accelerator.prepare(policy, optimizer)
    if isinstance(
        wrapped, FSDPModule
    ):  # a process whose prompts are text alone has no gradient of the vision tower
        wrapped.set_reduce_scatter_unused_params(True)
    runs.weights_apart(accelerator)
    if first_step:
        accelerator.load_state(str(Path(source) / "state"))
        accelerator.step = (
            0  # micro-batches so far: other processes or micro_prompts count otherwise
        )
    return wrapped, optimizer


def load_rows(
    cfg: Config, accelerator: Accelerator, policy: Policy, first_step: int
) -> data.Rows | data.Stream:
    """The rows to train on, checked; on resume, those that the run began with."""
    options = {name: getattr(cfg, name) for name in data.OPTIONS} | {"seed": cfg.seed}
    options |= {"prompt_tokens": policy.prompt_tokens, "max_prompt_tokens": cfg.max_prompt_tokens}
    rows = data.load_rows(cfg.dataset, cfg.split, cfg.bad_rows, **options)
    if cfg.order:
        check_order(cfg.order, rows)
    if not cfg.streaming:
        runs.same_rows(cfg, len(rows), accelerator, first_step)
    return rows


def load_rewards(cfg: Config, row: dict) -> rewards.Rewards:
    """{name: (function, weight)}: accuracy, format, the penalty on length, the user's; each called once, on `row`."""
    parts = {
        "accuracy": (rewards.accuracy_reward, cfg.accuracy_weight),
        "format": (rewards.format_reward, cfg.format_weight),
    }
    if cfg.length_weight:
        parts["length_penalty"] = (
            rewards.length_penalty(cfg.max_new_tokens, cfg.length_buffer),
            cfg.length_weight,
        )
    for spec in cfg.reward:
        name, function, weight = rewards.load_reward(spec)
        if name in parts:
            raise ValueError(
                f"reward {spec!r}: there is a reward called {name} already; rename the function"
            )
        parts[name] = function, weight
    columns = {name: [value] for name, value in row.items() if name != "images"} | {
        "completion_ids": [[0]]
    }
    rewards.total_reward(["<think>a synthetic call</think> \\boxed{0}"], rewards=parts, **columns)
    return parts


def seeds_of(cfg: Config, step: int, rows: list[int], branch: int) -> list[int]:
    """A seed from (run, step, row, branch): every prompt of every step has random numbers of its own."""
    words = [
        np.random.SeedSequence((cfg.seed, step, row, branch)).generate_state(2) for row in rows
    ]
    return [int(high) << 31 ^ int(low) for high, low in words]


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


@lru_cache(maxsize=1)
def given_order(path: str, n: int) -> list[int]:
    """The row numbers of --order; n rows are there."""
    rows = json.loads(Path(path).read_text())
    if not rows or not all(isinstance(row, int) and 0 <= row < n for row in rows):
        raise ValueError(
            f"{path} must be a JSON list of row numbers from 0 to {n - 1}, as extras/curriculum.py writes"
        )
    return rows


def check_order(path: str, rows: data.Rows) -> None:
    """Raises ValueError, before anything is trained, for a file that is no such list or counts other rows."""
    given_order(path, len(rows))
    if (
        dropped := rows.keep[-1] + 1 - len(rows)
    ):  # those after the last one that is kept shift no number
        raise ValueError(
            f"{path} counts all rows of the set, of which {dropped} are left out here: too long, or bad"
        )


def my_rows(cfg: Config, step: int, n: int | None, accelerator: Accelerator) -> list[int]:
    """This process's share of the step's rows; the n rows are shuffled anew each epoch, and no batch is short.

    n None: a stream, which comes shuffled and is read in its order. cfg.order: its rows, again and again.
    A row that comes again within a step is named row + n, row + 2 n ..., so that it has random numbers of its own.
    """
    stream = range(step * cfg.prompts_per_step, (step + 1) * cfg.prompts_per_step)
    if cfg.order:
        given = given_order(cfg.order, n)
        rows = [given[i % len(given)] for i in stream]
    else:
        rows = [int(epoch_order(cfg.seed, i // n, n)[i % n]) if n else i for i in stream]
    if n:
        rows = [row + n * rows[:i].count(row) for i, row in enumerate(rows)]
    return rows[accelerator.process_index :: accelerator.num_processes]


def split_work(cfg: Config, processes: int) -> tuple[int, int]:
    """-> prompts of a micro-batch, micro-batches of an optimiser step (both of one process)"""
    per_update, left = divmod(cfg.prompts_per_step, processes * cfg.updates_per_step)
    if left:
        raise ValueError(
            f"prompts_per_step={cfg.prompts_per_step} must be a multiple of processes ({processes}) times "
            f"updates_per_step ({cfg.updates_per_step})"
        )
    micro = min(cfg.micro_prompts, per_update)
    if per_update % micro:
        raise ValueError(
            f"micro_prompts={cfg.micro_prompts} must divide the {per_update} prompts of a process's update"
        )
    return micro, per_update // micro


@contextlib.contextmanager
def frozen(policy: Policy) -> Iterator[None]:
    """No parameter asks for a gradient inside."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@contextlib.contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Under FSDP2, all parameters are whole inside, and nothing that runs inside communicates.

    So processes whose responses or images differ in number and length need not wait for one another: rollouts and
    attack are those of one device. The price is one copy of the parameters, in the dtype of the computation.
    """
    units = [m for m in policy.modules() if isinstance(m, FSDPModule)]  # the root comes first

    def keep(whole: bool) -> None:
        for unit in units:
            unit.set_requires_gradient_sync(not whole, recurse=False)
            unit.set_reshard_after_backward(not whole, recurse=False)
            if unit is not policy:  # the root stays whole until its backward is done
                unit.set_reshard_after_forward(not whole, recurse=False)

    keep(True)
    if units:
        policy._get_fsdp_state()._lazy_init()  # else the first layer that is called would take itself for the root
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        keep(False)
        for unit in units:
            unit.reshard()


def load_config(argv: list[str]) -> Config:
    """Config's defaults, then the recipe of --config, then the command line. Raises ValueError for an unknown key."""
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="a YAML recipe: any of the options below, by name")
    path = parser.parse_known_args(argv)[0].config
    if path is not None:
        recipe = yaml.safe_load(Path(path).read_text()) or {}
        if not isinstance(recipe, dict):
            raise ValueError(f"{path} must map options to values, got {recipe!r:.80}")
        known = [f.name for f in fields(Config)]
        if unknown := sorted(set(recipe) - set(known)):
            raise ValueError(f"{path}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
        parser.set_defaults(**recipe)
    return parser.parse_args_into_dataclasses(argv)[0]


if __name__ == "__main__":
    try:
        config = load_config(sys.argv[1:])
    except (ValueError, OSError, yaml.YAMLError) as error:
        sys.exit(f"train_saei.py: {error}")
    main(config)
