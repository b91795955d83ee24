"""--dry_run: what a run would do and what memory it would take, worked out from the model's config without its weights.

Apart from train_saei.py because the memory's formula is long and the loop reads without it. Parameters, gradients and
AdamW's state are counted on the model as it is built, on the meta device; all else is an estimate: tests/test_plan.py
says how near. For one process; with WORLD_SIZE=8 in the environment, for one of eight.

Symbols: P prompts at a time, L tokens of the longest, rows responses at a time, T = max_new_tokens, c bytes a number.
"""

import os
from dataclasses import asdict
from typing import NamedTuple

import torch
import yaml
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from runtime import data
from vlm import adapt as memory
from vlm.policy import LOGITS_PER_CHUNK, Policy

LOOK = 64  # rows whose prompts are measured
GIB = 2**30


class Shape(NamedTuple):
    """Sizes of one layer's attention, and how many layers there are."""

    layer: nn.Module
    count: int
    width: int
    q: int  # heads * size of a head
    kv: int  # the same of keys, or of values

    def kept(self, tokens: int, keys: int, trained: bool, recomputed: bool, half: bool) -> int:
        """Numbers that all layers keep for the backward, for this many tokens and attended keys (values as many).

        Frozen weights need no inputs of theirs: a norm's result and the last product of the MLP are not kept. half: the
        numbers are of two bytes, but norms keep float32, and so do adapters, each a copy of its input.
        """
        double = 2 if half else 1
        outside = (
            (4 if trained else 2) * tokens * self.width
        )  # embedding, last norm, what leads on from it
        if recomputed:
            return outside + self.count * tokens * self.width
        modules = dict(self.layer.named_modules())
        inner = max(
            m.in_features for m in modules.values() if isinstance(m, nn.Linear)
        )  # the MLP's
        norms = [
            m
            for m in modules.values()
            if "Norm" in type(m).__name__ and m.weight.numel() == self.width
        ]
        of_norms = (
            len(norms)
            * self.width
            * (1 if not trained else 3 if "RMS" in type(norms[0]).__name__ else 2)
        )
        adapters = sum(
            2 * m.in_features
            for name, m in modules.items()
            if half and trained and name.endswith("lora_A.default")
        )
        gated = any(name.endswith("gate_proj") for name in modules)
        mlp = inner * ((3 if gated else 1) + (1 if trained else 0))
        return outside + self.count * (
            tokens * (double * of_norms + 2 * self.q + mlp + adapters) + keys * 2 * self.kv
        )


def load(cfg) -> Policy:
    """The policy as it would be trained, its parameters on the meta device: only config and processor are read."""
    attention = "sdpa"  # flash_attention_2 may not be installed where the plan is made
    policy = Policy.from_pretrained(
        cfg.model, cfg.dtype, attention, cfg.min_pixels, cfg.max_pixels, weights=False
    )
    memory.freeze(policy, cfg.freeze)
    if cfg.lora_rank:
        memory.add_lora(policy, cfg.lora_rank, cfg.seed)
    return policy


def shapes(policy: Policy) -> tuple[Shape, Shape]:
    """-> the language model's layers, the vision tower's"""
    text, vision = policy.model.config.get_text_config(), policy.model.config.vision_config
    layers = {True: [], False: []}
    for name, m in policy.model.model.named_modules():
        if isinstance(m, GradientCheckpointingLayer):
            layers[policy.family.in_tower(name)].append(m)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    q, kv = text.num_attention_heads * head, text.num_key_value_heads * head
    wide = getattr(vision, "embed_dim", None) or vision.hidden_size
    language = Shape(layers[False][0], len(layers[False]), text.hidden_size, q, kv)
    return language, Shape(layers[True][0], len(layers[True]), wide, wide, wide)


def activations(
    cfg,
    policy: Policy,
    prompts: int,
    rows: int,
    L: int,
    T: int,
    patches: int,
    attack: bool,
    half: bool = False,
) -> int:
    """Numbers kept for the backward of `prompts` of L tokens and `patches` each, and of `rows` responses at a time.

    attack: the gradient goes to the pixels and no parameter has one. Else to the parameters, and a tower that is not
    trained keeps nothing.
    """
    language, vision = shapes(policy)
    trained = any(p.requires_grad for p in language.layer.parameters()) and not attack
    tower = any(p.requires_grad for p in vision.layer.parameters()) and not attack
    keys = (
        language if cfg.attention == "flash_attention_2" else language._replace(kv=language.q)
    )  # repeated for heads
    again = cfg.checkpointing
    total = keys.kept(prompts * L, prompts * L, trained, again, half) + keys.kept(
        rows * T, rows * (L + T), trained, again, half
    )
    if attack or tower:
        total += vision.kept(prompts * patches, prompts * patches, tower, again, half)
    if tower:
        total += prompts * patches * patch_numbers(policy)  # what the first product is of
    return total


def recomputing(policy: Policy, prompts: int, rows: int, L: int, T: int, half: bool = False) -> int:
    """With checkpointing, besides: the prompts' keys and values, each response's copy, one layer computed again."""
    language, _ = shapes(policy)
    one = language._replace(count=1, kv=language.q).kept(
        max(prompts * L, rows * T), rows * (L + T), True, False, half
    )
    return language.count * 2 * language.kv * (prompts + rows) * L + one


def number_bytes(cfg) -> int:
    """Of a number in the computation."""
    return (
        2
        if cfg.dtype == "bfloat16" or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        else 4
    )


def estimate(
    cfg, policy: Policy, prompts: int, micro: int, L: int, patches: int, processes: int = 1
) -> dict[str, int]:
    """Bytes by part on one device; `prompts` are a process's share of a step, `micro` of them are updated at a time."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    size = lambda parameters: sum(p.numel() * p.element_size() for p in parameters)  # noqa: E731
    c = number_bytes(cfg)
    out = {
        "parameters": size(policy.parameters()),
        "gradients": size(trained),
        "AdamW's state": 2 * size(trained),
    }
    if cfg.kl_coef:
        out["reference"] = size(policy.parameters())
    if processes > 1:
        out["DDP's buckets"] = size(trained)
    if c == 2 and cfg.dtype == "float32":
        out["autocast's copies of weights"] = 2 * sum(
            p.numel() for p in policy.parameters() if p.ndim == 2
        )
    language, _ = shapes(policy)
    lots = lambda n: min(n, cfg.micro_responses or n)  # noqa: E731
    common, vocabulary = (L, cfg.max_new_tokens, patches), len(policy.banned)
    for phase, n in (("update", cfg.rollouts), ("attack", cfg.clean_rollouts)):
        if phase == "update" or cfg.intervention == "egas":
            rows = lots(micro * n)
            out[f"{phase}: activations"] = c * activations(
                cfg, policy, micro, rows, *common, phase == "attack", c == 2
            )
            if cfg.checkpointing:
                out[f"{phase}: computed again"] = c * recomputing(
                    policy, micro, rows, *common[:2], c == 2
                )
    chunk = min(
        max(1, LOGITS_PER_CHUNK // vocabulary), lots(micro * cfg.rollouts) * cfg.max_new_tokens
    )
    out["update, attack: a chunk of the head"] = 6 * 4 * chunk * vocabulary
    rows = min(prompts, cfg.sample_prompts or prompts) * max(
        cfg.clean_rollouts, cfg.adversarial_rollouts
    )
    out["sampling: keys and values"] = (
        c * language.count * 2 * language.kv * rows * (L + cfg.max_new_tokens)
    )
    out["sampling: the head"] = (
        24 * rows * vocabulary
    )  # float32 logits, float64 probabilities and their sums
    return out


def peak(parts: dict[str, int]) -> int:
    """What stays, and the largest of what comes and goes: attack, update or sampling."""
    phases = {word: 0 for word in ("update", "attack", "sampling")}
    for name, n in parts.items():
        for word in phases.keys() & set(name.split(":")[0].split(", ")):
            phases[word] += n
    return sum(n for name, n in parts.items() if ":" not in name) + max(phases.values())


def describe(cfg, micro: int, processes: int) -> str:
    """The resolved plan, as text. Reads the data as training would: what is refused there is refused here."""
    policy = load(cfg)
    options = {name: getattr(cfg, name) for name in data.OPTIONS} | {"seed": cfg.seed}
    limits = (None, policy.prompt_tokens, cfg.max_prompt_tokens)
    rows = data.load_rows(cfg.dataset, cfg.split, cfg.bad_rows, *limits, **options)
    look = [rows[i] for i in range(LOOK if cfg.streaming else min(LOOK, len(rows)))]
    units = [[policy.to_unit_image(image) for image in row["images"]] for row in look]
    ids = [policy.prompt_ids(row) for row in look]
    lengths = [x.shape[1] for x in ids]
    image_tokens = max(int((x == policy.model.config.image_token_id).sum()) for x in ids)
    patches = [patches_of(policy, x) for x in units]
    sizes = sorted({f"{x.shape[2]} x {x.shape[1]}" for row in units for x in row}) or ["none"]
    numel = lambda ps: sum(p.numel() for p in ps)  # noqa: E731
    trained, prompts = (
        [p for p in policy.parameters() if p.requires_grad],
        cfg.prompts_per_step // processes,
    )
    lot = min(micro * cfg.rollouts, cfg.micro_responses or micro * cfg.rollouts)
    few = min(prompts, cfg.sample_prompts or prompts)
    epochs = "unknown" if cfg.streaming else f"{cfg.steps * cfg.prompts_per_step / len(rows):.2f}"
    parts = estimate(cfg, policy, prompts, micro, max(lengths), max(patches), processes)
    lines = {
        "model": f"{policy.model.config.model_type}, "
        f"{numel(policy.parameters()):,} parameters, {numel(trained):,} trained",
        "pictures": f"{', '.join(sizes[:3])}{' ...' if len(sizes) > 3 else ''} (first {len(look)} rows)",
        "image tokens": f"at most {image_tokens} a prompt (first {len(look)} rows)",
        "prompts": f"at most {max(lengths)} tokens (first {len(look)} rows; limit {cfg.max_prompt_tokens})",
        "data": "streamed" if cfg.streaming else f"{len(rows):,} rows",
        "steps": f"{cfg.steps}, epochs {epochs}, optimiser steps {cfg.steps * cfg.updates_per_step}",
        "a step": f"{cfg.prompts_per_step} prompts x {cfg.rollouts} responses = {cfg.prompts_per_step * cfg.rollouts} "
        f"rollouts ({cfg.adversarial_rollouts} of {cfg.rollouts} adversarial)",
        "a device": f"one of {processes}: samples {prompts} prompts, {prompts * cfg.clean_rollouts} + "
        f"{prompts * cfg.adversarial_rollouts} responses, {few} prompts at a time; "
        f"updates {micro} prompts, {lot} responses at a time",
    }
    text = yaml.safe_dump(asdict(cfg), sort_keys=False) + "\n"
    text += "".join(f"{name + ':':14}{value}\n" for name, value in lines.items())
    text += "\nmemory of a device, GiB; the first three counted, the rest estimates, for the longest prompt above and\n"
    text += f"responses of {cfg.max_new_tokens} tokens; what the allocator wastes and CUDA itself takes come on top\n"
    text += "".join(f"  {name:38}{n / GIB:9.2f}\n" for name, n in parts.items())
    text += f"  {'in all, of phases the largest':38}{peak(parts) / GIB:9.2f}\n"
    if processes > 1:
        shared, whole = (
            sum(list(parts.values())[:3]) / processes,
            number_bytes(cfg) * numel(policy.parameters()),
        )
        text += f"  {'FSDP2: the first three, sharded':38}{shared / GIB:9.2f}\n"
        text += f"  {'FSDP2: whole parameters, in sampling':38}{whole / GIB:9.2f}\n"
    return text + "dry run: nothing was trained or written\n"


def patches_of(policy: Policy, images: list[torch.Tensor]) -> int:
    """What the vision tower computes of one prompt's images."""
    return (
        policy.to_pixel_values(images)["pixel_values"].numel() // patch_numbers(policy)
        if images
        else 0
    )


def patch_numbers(policy: Policy) -> int:
    """Numbers of one patch of pixel_values, channels and temporal slots included."""
    vision = policy.model.config.vision_config
    p = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    return 3 * p * p * getattr(vision, "temporal_patch_size", 1)
