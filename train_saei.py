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

Every field of Config carries the mark of its source: paper, second-hand, inferred, or ours (nothing is known).
Rollouts, data order and random images follow from (seed, step, row) alone, not from the state of a random number
generator: a run is the same on any number of processes and after any resume, up to rounding.
"""

import contextlib
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm
from transformers import HfArgumentParser

import data
import egas
import grpo
import rewards
import tsec
from policy import Policy, Prompts, Responses


def opt(default, mark: str, text: str):
    """A Config field: its default, where the choice comes from, what it does."""
    return field(default=default, metadata={"help": f"[{mark}] {text}"})


@dataclass
class Config:
    model: str = opt("demo/confident", "ours", "hub id or folder of a vision-language model and its processor")
    dtype: str = opt(
        "float32", "ours", "parameters' dtype: float32 | bfloat16 (autocast: accelerate's mixed_precision)"
    )
    attention: str = opt("sdpa", "ours", "attention implementation: sdpa | eager | flash_attention_2")
    dataset: str = opt("demo", "ours", "demo, a .jsonl/.json/.parquet file, a saved data set's folder, or a hub id")
    split: str = opt("shifted/train", "ours", "the split to train on")
    bad_rows: str = opt(
        "refuse", "ours", "a row that cannot be used: refuse (stop at start) | skip (count and name it)"
    )
    max_prompt_tokens: int = opt(2048, "ours", "longer prompts are filtered out and counted, never truncated")
    output: str = opt("out/demo", "ours", "the run's folder")
    overwrite: bool = opt(False, "ours", "replace a run that the folder already holds")
    resume: bool = opt(False, "ours", "go on from the folder's newest complete checkpoint, exactly")
    seed: int = opt(0, "ours", "decides data order, rollouts and random images")
    steps: int = opt(100, "ours", "optimisation steps (batches of rollouts)")
    save_every: int = opt(50, "ours", "steps between checkpoints; the last step always has one")
    report_to: str = opt("none", "ours", "tracker: none | tensorboard | wandb | trackio ...")
    log_prompts: int = opt(1, "ours", "prompts a step whose responses and pictures go to samples.jsonl")

    prompts_per_step: int = opt(16, "ours", "P, over all processes")
    rollouts: int = opt(8, "ours", "G responses per prompt, clean and adversarial together: the budget of every arm")
    adversarial_rollouts: int = opt(4, "ours", "G_adv, how many of them are sampled on the intervened image")
    max_new_tokens: int = opt(64, "ours", "longest response")
    temperature: float = opt(1.0, "ours", "of sampling, of the scored distribution and of the entropy")
    intervention: str = opt("egas", "paper", "none (plain GRPO) | random (signs) | noise (NoisyRollout's) | egas")
    condition: str = opt(
        "clean", "ours", "image that conditions the update: clean (as NoisyRollout) | sampled (on-policy)"
    )

    tsec_low: float = opt(0.2, "ours", "TsEC's low cut, a quantile; 0 keeps the low tail (that it goes: inferred)")
    tsec_high: float = opt(0.8, "ours", "TsEC's high cut, a quantile; 1 keeps the high tail (that it goes: inferred)")
    tsec_scope: str = opt("response", "ours", "what the quantiles are taken over: response | batch (a micro-batch's)")
    eps: float = opt(4 / 255, "ours", "L-infinity radius of the attack, in [0, 1] pixel units")
    pgd_steps: int = opt(3, "ours", "number of PGD steps (PGD on pixel inputs: the brief)")
    step_size: float | None = opt(
        None, "ours", "PGD's step in [0, 1] pixel units; none: 2.5 * eps / steps, at most eps"
    )
    random_start: bool = opt(False, "ours", "PGD begins at a random point of the ball")
    anneal: bool = opt(False, "ours", "eps follows NoisyRollout's schedule instead of staying constant")
    noise_t: float = opt(500.0, "ours", "noise: diffusion step of 1,000 at the start, annealed (NoisyRollout's value)")

    advantage_scale: str = opt("std", "ours", "divide the centred rewards of a group by their std: std | none")
    zero_variance: str = opt(
        "keep", "ours", "groups of equal accuracy: keep | drop (no loss, no share of the normaliser)"
    )
    clip_low: float = opt(0.2, "ours", "the ratio is clipped below 1 - clip_low")
    clip_high: float = opt(0.28, "ours", "and above 1 + clip_high (DAPO's clip-higher)")
    kl_coef: float = opt(0.0, "ours", "weight of k3 to the initial policy; 0 loads no reference")
    accuracy_weight: float = opt(0.9, "ours", "weight of the accuracy reward (NoisyRollout's, EasyR1's value)")
    format_weight: float = opt(0.1, "ours", "weight of the format reward")
    updates_per_step: int = opt(1, "ours", "optimiser steps per batch of rollouts; 1 is on-policy, its ratios are 1")
    micro_prompts: int = opt(
        16, "ours", "prompts a device computes at a time: memory only, the gradient stays the same"
    )
    lr: float = opt(1e-6, "ours", "AdamW's learning rate")
    warmup_steps: int = opt(0, "ours", "optimisation steps of linear warm-up")
    weight_decay: float = opt(0.01, "ours", "AdamW's weight decay")
    max_grad_norm: float = opt(1.0, "ours", "gradients are scaled down to this norm")

    def __post_init__(self):
        choices = {
            "dtype": ("float32", "bfloat16"),
            "bad_rows": ("refuse", "skip"),
            "intervention": ("none", "random", "noise", "egas"),
            "condition": ("clean", "sampled"),
            "tsec_scope": ("response", "batch"),
            "advantage_scale": ("std", "none"),
            "zero_variance": ("keep", "drop"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.intervention == "none":
            self.adversarial_rollouts = 0
        rules = {
            "0 <= eps <= 1": 0 <= self.eps <= 1,
            "0 <= tsec_low < tsec_high <= 1": 0 <= self.tsec_low < self.tsec_high <= 1,
            "rollouts >= 2": self.rollouts >= 2,
            "0 <= adversarial_rollouts < rollouts": 0 <= self.adversarial_rollouts < self.rollouts,
            "adversarial_rollouts >= 1 with an intervention": self.intervention == "none"
            or self.adversarial_rollouts > 0,
            "temperature > 0": self.temperature > 0,
            "lr > 0": self.lr > 0,
        }
        positive = "steps save_every prompts_per_step max_new_tokens pgd_steps updates_per_step micro_prompts"
        rules |= {f"{name} >= 1": getattr(self, name) >= 1 for name in positive.split()}
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ValueError(f"the configuration breaks: {'; '.join(broken)}")

    @property
    def clean_rollouts(self) -> int:
        return self.rollouts - self.adversarial_rollouts


def main(cfg: Config) -> None:
    accelerator = Accelerator(log_with=None if cfg.report_to == "none" else cfg.report_to)
    micro, accelerator.gradient_accumulation_steps = split_work(cfg, accelerator.num_processes)
    first_step, source = prepare_output(cfg, accelerator)
    policy = Policy.from_pretrained(source, cfg.dtype, cfg.attention)
    reference = (
        Policy.from_pretrained(cfg.model, cfg.dtype, cfg.attention).requires_grad_(False) if cfg.kl_coef else None
    )
    rows = data.load_rows(
        cfg.dataset,
        cfg.split,
        cfg.bad_rows,
        prompt_tokens=policy.prompt_tokens,
        max_prompt_tokens=cfg.max_prompt_tokens,
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    wrapped, optimizer = accelerator.prepare(policy, optimizer)  # `wrapped` is differentiated, `policy` samples
    reference = reference and reference.to(accelerator.device)
    weights_apart(accelerator)
    if first_step:
        accelerator.load_state(str(Path(source) / "state"))
    log = Log(cfg, accelerator, first_step)

    for step in log.progress(range(first_step, cfg.steps)):
        indices = my_rows(cfg, step, len(rows), accelerator)
        batch = [rows[i] for i in indices]
        prompts = policy.encode([r["problem"] for r in batch], [r["images"] for r in batch], cfg.max_prompt_tokens)
        clock = Clock(accelerator.device)

        with accelerator.autocast():
            # 1  y ~ pi_old(. | I, Q); entropies and log-probs are recorded while sampling
            seeds = [seed_of(cfg.seed, step, i, 0) for i in indices]
            clean = policy.sample(prompts, cfg.clean_rollouts, seeds, cfg.max_new_tokens, cfg.temperature)
            clock.lap("sample")

            # 2  TsEC: tokens of moderate entropy
            keep = tsec.select_tokens(clean.entropy, clean.mask, cfg.tsec_low, cfg.tsec_high, cfg.tsec_scope)

            # 3  EgAS: the image that raises their entropy (or what the other arms do to the image)
            attacked = intervene(cfg, policy, prompts, clean, keep, step, indices, micro)
            clock.lap("attack")

            # 4  y ~ pi_old(. | I_adv, Q)
            fresh = None
            if cfg.adversarial_rollouts:
                seeds = [seed_of(cfg.seed, step, i, 1) for i in indices]
                fresh = policy.sample(attacked, cfg.adversarial_rollouts, seeds, cfg.max_new_tokens, cfg.temperature)
            clock.lap("sample")

        # 5  rewards of all G responses, advantages within a prompt's group
        scores, texts = reward(cfg, policy, batch, clean, fresh)  # each (P, G)
        advantages = grpo.group_advantages(scores["reward"], scale=cfg.advantage_scale)

        # 6  GRPO update on (prompt, response, advantage), the prompt's image chosen by `condition`
        parts = update_parts(cfg, prompts, attacked, clean, fresh, advantages, scores["accuracy"])
        lr = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
        losses = update(cfg, accelerator, wrapped, reference, optimizer, parts, micro, lr, step)
        clock.lap("update")

        metrics = sampling_metrics(cfg, policy, prompts, attacked, clean, fresh, keep, scores, texts)
        log.step(step, metrics | clock.seconds(), losses | {"lr": lr})
        log.samples(step, indices, batch, prompts, attacked, clean, fresh, keep, scores, advantages, texts, policy)
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save_checkpoint(cfg, accelerator, wrapped, step + 1)
    accelerator.end_training()


# ------------------------------------------------------------------------------------------------ the steps, in detail


def intervene(
    cfg: Config,
    policy: Policy,
    prompts: Prompts,
    clean: Responses,
    keep: Tensor,
    step: int,
    rows: list[int],
    micro: int,
) -> Prompts:
    """Step 3: the prompts with the images that the adversarial responses are sampled on.

    egas: one attacked image per image, against the mean over a prompt's clean responses of their selective entropy,
    micro prompts at a time, the parameters frozen so that no weight gradient is computed. random: signs at the same eps.
    noise: NoisyRollout's, annealed as there.
    """
    if cfg.intervention == "none":
        return prompts
    fade = annealing(step, cfg.steps)
    eps = cfg.eps * (fade if cfg.anneal else 1.0)
    images = []
    with frozen(policy):
        for i in range(0, len(prompts), 1 if cfg.intervention != "egas" else micro):
            part = prompts[i : i + (1 if cfg.intervention != "egas" else micro)]
            generator = torch.Generator().manual_seed(seed_of(cfg.seed, step, rows[i], 2))
            if cfg.intervention == "random":
                images += egas.random_signs(part.images, eps, generator)
            elif cfg.intervention == "noise":
                images += egas.diffusion_noise(part.images, cfg.noise_t * fade, generator)
            else:
                objective = entropy_objective(policy, prompts, clean, keep, slice(i, i + micro), cfg.temperature)
                settings = (eps, cfg.step_size, cfg.pgd_steps, cfg.random_start, generator)
                images += egas.pgd_ascent(objective, part.images, *settings)
    return prompts.with_images(images)


def entropy_objective(
    policy: Policy, prompts: Prompts, clean: Responses, keep: Tensor, rows: slice, temperature: float
) -> Callable[[list[Tensor]], Tensor]:
    """H(images) = mean over a prompt's n responses of the mean entropy of their kept tokens, teacher-forced.   -> (P,)"""
    part, n = prompts[rows], len(clean.tokens) // len(prompts)
    tokens, mask, keep = (x.view(len(prompts), n, -1)[rows].flatten(0, 1) for x in (clean.tokens, clean.mask, keep))

    def objective(images: list[Tensor]) -> Tensor:
        _, entropy = policy.score(part.with_images(images), tokens, mask, temperature)  # (P * n, T)
        return tsec.selective_entropy(entropy, keep).view(len(part), n).mean(dim=1)

    return objective


def annealing(step: int, steps: int) -> float:
    """NoisyRollout's schedule, 1 -> 0, scaled to the run: 1 - 1 / (1 + exp(-30 (step - mid) / steps)), mid = 2/3 steps."""
    return 1 - 1 / (1 + math.exp(-30 * (step - steps * 2 / 3) / steps))


def reward(
    cfg: Config, policy: Policy, batch: list[dict], clean: Responses, fresh: Responses | None
) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Step 5: {"reward", "accuracy", "format"} of all responses, each (P, G), and their texts, clean ones first."""
    P = len(batch)
    texts = [[] for _ in range(P)]
    for responses in filter(None, (clean, fresh)):
        decoded = policy.decode(responses)
        n = len(decoded) // P
        for p in range(P):
            texts[p] += decoded[p * n : (p + 1) * n]
    G = len(texts[0])
    columns = {k: [row[k] for row in batch for _ in range(G)] for k in batch[0] if k not in ("images", "answer")}
    table = {
        "accuracy": (rewards.accuracy_reward, cfg.accuracy_weight),
        "format": (rewards.format_reward, cfg.format_weight),
    }
    answers = [row["answer"] for row in batch for _ in range(G)]
    scores = rewards.total_reward([text for row in texts for text in row], answers, table, **columns)
    return {name: torch.tensor(values, device=policy.device).view(P, G) for name, values in scores.items()}, texts


@dataclass
class Part:
    """What one conditioning image contributes to the update; P prompts, n responses each."""

    prompts: Prompts
    tokens: Tensor  # (P, n, T)
    mask: Tensor  # (P, n, T)
    advantages: Tensor  # (P, n)

    def __getitem__(self, rows: slice) -> "Part":
        return Part(self.prompts[rows], self.tokens[rows], self.mask[rows], self.advantages[rows])


def update_parts(
    cfg: Config,
    prompts: Prompts,
    attacked: Prompts,
    clean: Responses,
    fresh: Responses | None,
    advantages: Tensor,
    accuracy: Tensor,
) -> list[Part]:
    """condition clean: all G responses on the clean image; sampled: each on the image it was sampled from."""
    P, n = len(prompts), cfg.clean_rollouts
    stacks = [
        (r.tokens.view(P, -1, r.tokens.shape[1]), r.mask.view(P, -1, r.mask.shape[1])) for r in (clean, fresh) if r
    ]
    if cfg.condition == "clean" or fresh is None:
        longest = max(tokens.shape[2] for tokens, _ in stacks)
        padded = [[torch.nn.functional.pad(x, (0, longest - x.shape[2])) for x in stack] for stack in stacks]
        parts = [Part(prompts, *(torch.cat(x, dim=1) for x in zip(*padded, strict=True)), advantages)]
    else:
        parts = [Part(prompts, *stacks[0], advantages[:, :n]), Part(attacked, *stacks[1], advantages[:, n:])]
    if cfg.zero_variance == "drop":
        informative = ~grpo.equal_groups(accuracy)
        for part in parts:
            part.mask = part.mask & informative[:, None, None]
    return parts


def update(
    cfg: Config,
    accelerator: Accelerator,
    wrapped: torch.nn.Module,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    parts: list[Part],
    micro: int,
    lr: float,
    step: int,
) -> dict[str, float]:
    """Step 6: updates_per_step optimiser steps, each over micro-batches with one normaliser: all its response tokens.

    Old log-probs are those of the image that conditions the update. With one update they are the scored ones, detached
    (ratio 1); with several they are computed first. Sums over processes come back as the step's metrics.
    """
    P = len(parts[0].prompts)
    size = P // cfg.updates_per_step
    for group in optimizer.param_groups:
        group["lr"] = lr
    old = None
    if cfg.updates_per_step > 1:
        with torch.no_grad():
            old = [[score(wrapped, part[i : i + micro], cfg) for part in parts] for i in range(0, P, micro)]
    sums, norms = {}, []
    for start in range(0, P, size):
        tokens = sum(part.mask[start : start + size].sum() for part in parts)
        tokens = accelerator.reduce(tokens, "sum").clamp(min=1)  # of the optimiser step, over all processes
        for i in range(start, start + size, micro):
            with accelerator.accumulate(wrapped):
                loss = 0.0
                for k, part in enumerate(part[i : i + micro] for part in parts):
                    logprobs = score(wrapped, part, cfg)  # (P * n, T)
                    before = old[i // micro][k] if old else logprobs.detach()
                    mask = part.mask.flatten(0, 1)
                    part_loss, metrics = grpo.policy_loss(
                        logprobs, before, part.advantages.flatten(), mask, cfg.clip_low, cfg.clip_high, tokens
                    )
                    if reference is not None:
                        with torch.no_grad():
                            anchor = score(reference, part, cfg)
                        metrics["kl"] = grpo.kl_k3(logprobs, anchor).masked_fill(~mask, 0.0).sum() / tokens
                        part_loss = part_loss + cfg.kl_coef * metrics["kl"]
                    loss = loss + part_loss
                    for name, value in (metrics | {"loss": part_loss}).items():
                        sums[name] = sums.get(name, 0.0) + value.detach() / cfg.updates_per_step
                # DDP averages over processes and accelerate divides by the micro-batches: the normaliser did both
                accelerator.backward(loss * accelerator.num_processes * accelerator.gradient_accumulation_steps)
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(wrapped.parameters(), cfg.max_grad_norm))
                    stop_unless_finite(cfg, norms[-1], parts, accelerator, step)
                optimizer.step()
                optimizer.zero_grad()
    names = sorted(sums)
    totals = accelerator.reduce(torch.stack([sums[name] for name in names]), "sum").tolist()
    return dict(zip(names, totals, strict=True)) | {"grad_norm": float(sum(norms) / len(norms))}


def score(policy: torch.nn.Module, part: Part, cfg: Config) -> Tensor:
    """Log-probs of a part's responses.   -> (P * n, T)"""
    return policy(part.prompts, part.tokens.flatten(0, 1), part.mask.flatten(0, 1), cfg.temperature)[0]


def stop_unless_finite(cfg: Config, norm: Tensor, parts: list[Part], accelerator: Accelerator, step: int) -> None:
    """The norm is the same on all processes, so all stop together, before the parameters are touched."""
    if not math.isfinite(norm):
        path = Path(cfg.output) / f"failed-step-{step:06d}-process-{accelerator.process_index}.pt"
        torch.save([asdict(part) for part in parts], path)
        raise FloatingPointError(
            f"step {step}: the gradient is not finite (norm {float(norm)}); the batch is in {path}, the last checkpoint is "
            "good. Likely causes: a learning rate too high, bfloat16 parameters (try --dtype float32 with mixed precision)"
        )


def sampling_metrics(
    cfg: Config,
    policy: Policy,
    prompts: Prompts,
    attacked: Prompts,
    clean: Responses,
    fresh: Responses | None,
    keep: Tensor,
    scores: dict[str, Tensor],
    texts: list[list[str]],
) -> dict[str, float]:
    """What this process's rollouts look like; every value a mean over its prompts. The README defines each name."""
    n, groups = cfg.clean_rollouts, [r for r in (clean, fresh) if r]
    response_entropy = lambda r, chosen: tsec.selective_entropy(r.entropy, chosen).mean().item()  # noqa: E731
    quantile = lambda q: tsec.entropy_quantile(clean.entropy, clean.mask, q, cfg.tsec_scope).mean().item()  # noqa: E731
    metrics = {name: values.mean().item() for name, values in scores.items()} | {
        "zero_variance": grpo.equal_groups(scores["accuracy"]).float().mean().item(),
        "entropy/clean": response_entropy(clean, clean.mask),
        "entropy/selected": response_entropy(clean, keep),
        "tsec/kept": (keep.sum() / clean.mask.sum()).item(),
        "tsec/low": quantile(cfg.tsec_low),
        "tsec/high": quantile(cfg.tsec_high),
        "distinct": float(np.mean([len(set(row)) / len(row) for row in texts])),
        "length": torch.cat([r.mask.sum(1) for r in groups]).float().mean().item(),
        "truncated": torch.cat([r.truncated(policy.eos_ids) for r in groups]).float().mean().item(),
    }
    if fresh is not None:
        with torch.no_grad():
            rows = slice(0, len(prompts))
            objective = entropy_objective(policy, prompts, clean, keep, rows, cfg.temperature)
            metrics["entropy/attacked"] = objective(attacked.images).mean().item()
        pairs = list(zip(attacked.images, prompts.images, strict=True))
        metrics |= {
            "entropy/fresh": response_entropy(fresh, fresh.mask),
            "attack/linf": max((x - x0).abs().max().item() for x, x0 in pairs),
            "attack/psnr": float(np.mean([min(egas.psnr(x, x0), 99.0) for x, x0 in pairs])),  # 99: unchanged
        }
        for name in ("reward", "accuracy"):
            metrics[f"{name}/clean"] = scores[name][:, :n].mean().item()
            metrics[f"{name}/adversarial"] = scores[name][:, n:].mean().item()
    return metrics


# ----------------------------------------------------------------------------------------------------------- plumbing


def seed_of(*parts: int) -> int:
    """A seed from (run seed, step, row, branch): every prompt of every step has random numbers of its own."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def my_rows(cfg: Config, step: int, n: int, accelerator: Accelerator) -> list[int]:
    """This process's share of the step's rows; the rows are shuffled anew each epoch, and no batch is short."""
    stream = range(step * cfg.prompts_per_step, (step + 1) * cfg.prompts_per_step)
    rows = [int(epoch_order(cfg.seed, i // n, n)[i % n]) for i in stream]
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


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: a checkpoint gets its name when all of it is written."""
    return sorted(Path(folder).glob("checkpoints/step-[0-9]*"))


def prepare_output(cfg: Config, accelerator: Accelerator) -> tuple[int, str]:
    """Make, empty or continue the run's folder.   -> the first step, where the parameters come from"""
    out = Path(cfg.output)
    held, found = (out / "metrics.jsonl").exists(), checkpoints(out)
    if held and not (cfg.resume or cfg.overwrite):
        raise ValueError(f"{out} already holds a run: --resume goes on with it, --overwrite replaces it")
    if cfg.resume and found:
        same_config(cfg, found[-1] / "config.yaml")
    accelerator.wait_for_everyone()  # nobody deletes what another process has still to look at
    if accelerator.is_main_process:
        if held and not cfg.resume:
            for name in ("checkpoints", "pictures", "report", "eval"):
                shutil.rmtree(out / name, ignore_errors=True)
        if not cfg.resume or not found:
            for name in ("metrics.jsonl", "samples.jsonl"):
                (out / name).unlink(missing_ok=True)
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(yaml.safe_dump(asdict(cfg), sort_keys=False))
    accelerator.wait_for_everyone()
    if cfg.resume and found:
        return int(found[-1].name.removeprefix("step-")), str(found[-1])
    return 0, cfg.model


def same_config(cfg: Config, path: Path) -> None:
    """Refuse to go on with another configuration; what cannot change the result may differ."""
    free = {"output", "overwrite", "resume", "steps", "save_every", "report_to", "log_prompts", "micro_prompts"}
    if cfg.anneal or cfg.intervention == "noise":
        free.discard("steps")
    before = yaml.safe_load(path.read_text())
    changed = [f"{k}: {before.get(k)} -> {v}" for k, v in asdict(cfg).items() if k not in free and before.get(k) != v]
    if changed:
        raise ValueError(f"the run in {cfg.output} was started with another configuration ({'; '.join(changed)})")


def weights_apart(accelerator: Accelerator) -> None:
    """save_state and load_state leave the parameters to save_pretrained and from_pretrained: one copy on disk."""
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def save_checkpoint(cfg: Config, accelerator: Accelerator, wrapped: torch.nn.Module, step: int) -> None:
    """Write parameters, processor, optimiser and random states aside, then rename: a name means a whole checkpoint."""
    final = Path(cfg.output) / "checkpoints" / f"step-{step:06d}"
    aside = final.with_name(f".{final.name}")
    if accelerator.is_main_process:
        for old in (aside, final):
            shutil.rmtree(old, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    weights = accelerator.get_state_dict(wrapped)
    accelerator.save_state(str(aside / "state"))
    if accelerator.is_main_process:
        accelerator.unwrap_model(wrapped).save_pretrained(aside, weights)
        (aside / "config.yaml").write_text(yaml.safe_dump(asdict(cfg), sort_keys=False))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        aside.rename(final)


class Clock:
    """Seconds per phase of a step."""

    def __init__(self, device: torch.device):
        self.device, self.phases, self.start = device, {}, time.perf_counter()
        self.last = self.start

    def lap(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        return {f"seconds/{k}": v for k, v in self.phases.items()} | {"seconds/step": self.last - self.start}


class Log:
    """metrics.jsonl, samples.jsonl, pictures, the progress bar, the trackers, and warnings that name a cure."""

    def __init__(self, cfg: Config, accelerator: Accelerator, first_step: int):
        self.cfg, self.accelerator, self.out, self.earned = cfg, accelerator, Path(cfg.output), 0.0
        self.main = accelerator.is_main_process
        if self.main:
            for name in ("metrics.jsonl", "samples.jsonl"):  # a resumed run forgets what came after its checkpoint
                path = self.out / name
                lines = path.read_text().splitlines() if path.exists() else []
                kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < first_step]
                path.write_text("".join(line + "\n" for line in kept))
        if cfg.report_to != "none":
            accelerator.init_trackers("saei", config={k: v for k, v in asdict(cfg).items() if v is not None})

    def progress(self, steps: range) -> Iterator[int]:
        self.bar = tqdm(steps, initial=steps.start, total=steps.stop, disable=not self.main, unit="step")
        yield from self.bar

    def step(self, step: int, metrics: dict[str, float], losses: dict[str, float]) -> None:
        """metrics are means of this process's equal share: their mean is the global one; losses are global already."""
        names = sorted(metrics)
        values = torch.tensor([metrics[name] for name in names], device=self.accelerator.device, dtype=torch.float32)
        metrics = dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True)) | losses
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else memory
        self.warn(step, metrics)
        self.accelerator.log(metrics, step=step)
        if self.main:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step} | {k: round(v, 8) for k, v in metrics.items()}) + "\n")
            self.bar.set_postfix(reward=f"{metrics['reward']:.2f}", entropy=f"{metrics['entropy/clean']:.3f}")

    def warn(self, step: int, metrics: dict[str, float]) -> None:
        self.earned += metrics["accuracy"]
        if self.main and metrics["distinct"] <= 1 / self.cfg.rollouts:
            self.bar.write(f"warning: step {step}: all rollouts of every prompt are identical. Raise --temperature, or the "
                           "policy has collapsed (entropy {:.2g})".format(metrics["entropy/clean"]))  # fmt: skip
        if self.main and step == 4 and self.earned == 0:
            self.bar.write("warning: no correct answer in 5 steps. Does the prompt ask for \\boxed{} or <answer> tags, is "
                           "--max_new_tokens long enough (truncated: {truncated:.0%}), do the answers parse? Look at "
                           "samples.jsonl".format(**metrics))  # fmt: skip

    def samples(
        self,
        step: int,
        rows: list[int],
        batch: list[dict],
        prompts: Prompts,
        attacked: Prompts,
        clean: Responses,
        fresh: Responses | None,
        keep: Tensor,
        scores: dict[str, Tensor],
        advantages: Tensor,
        texts: list[list[str]],
        policy: Policy,
    ) -> None:
        """One line a response of the first prompts of the main process, with tokens, entropies and what TsEC kept."""
        if not self.main:
            return
        lines = []
        for p in range(min(self.cfg.log_prompts, len(batch))):
            names = {"clean": f"pictures/step-{step:06d}-{p}-clean.png"}
            save_image(prompts[p : p + 1].images, self.out / names["clean"])
            if fresh is not None:
                names["adversarial"] = f"pictures/step-{step:06d}-{p}-adversarial.png"
                save_image(attacked[p : p + 1].images, self.out / names["adversarial"])
            for g, text in enumerate(texts[p]):
                n = self.cfg.clean_rollouts
                r, i = (clean, p * n + g) if g < n else (fresh, p * (self.cfg.rollouts - n) + g - n)
                length = int(r.mask[i].sum())
                lines.append(
                    {
                        "step": step,
                        "prompt": p,
                        "row": rows[p],
                        "problem": batch[p]["problem"],
                        "answer": batch[p]["answer"],
                    }
                    | {"image": "clean" if r is clean else "adversarial", "response": text}
                    | {name: values[p, g].item() for name, values in scores.items()}
                    | {"advantage": advantages[p, g].item()}
                    | {"truncated": int(r.tokens[i, length - 1]) not in policy.eos_ids}
                    | {"tokens": [policy.processor.tokenizer.decode([t]) for t in r.tokens[i, :length].tolist()]}
                    | {"entropy": [round(h, 4) for h in r.entropy[i, :length].tolist()]}
                    | {"kept": keep[i, :length].tolist() if r is clean else None}
                    | {"clean_picture": names["clean"], "picture": names["clean" if r is clean else "adversarial"]}
                )
        with open(self.out / "samples.jsonl", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def load_config(argv: list[str]) -> Config:
    """Config's defaults, then the recipe of --config, then the command line. Raises ValueError for an unknown key."""
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="a YAML recipe: any of the options below, by name")
    path = parser.parse_known_args(argv)[0].config
    if path is not None:
        recipe = yaml.safe_load(Path(path).read_text())
        known = [f.name for f in fields(Config)]
        if unknown := sorted(set(recipe) - set(known)):
            raise ValueError(f"{path}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
        parser.set_defaults(**recipe)
    return parser.parse_args_into_dataclasses(argv)[0]


if __name__ == "__main__":
    try:
        config = load_config(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"train_saei.py: {error}")
    main(config)
