"""Compare the shared prompt with the plain way, on a tiny random model of every family (tiny.py).

    python -m tests.families            # all families; writes benchmarks/families.json
    python -m tests.families qwen2_vl   # these only; prints

The plain way: the processor's own chat call and the model's own forward, one response at a time,
nothing padded or cached. All in float32, on sharpened models (reference.py).
tests/test_families.py asserts on what is measured here.
"""

import copy
import functools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import egas
import tsec
from tests import reference, tiny
from vlm.families import FAMILIES
from vlm.pixels import fixed_resize, molmo2_resize
from vlm.policy import Policy

ROOT = Path(__file__).resolve().parent.parent
KINDS = list(tiny.BUILD)
TOLERANCE = 2e-5  # nats, or shares of a tensor's largest gradient: rounding in float32
PROBLEMS = [
    "how many dots ?",
    "which of the two pictures shows red ? look , then say 1 or 2 .",
    "what is 1 + 2 ?",
]
CHECKPOINTS = tempfile.TemporaryDirectory()  # removed at exit


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# One picture, two of other sizes, none.
PICTURES = [[picture(32, 32)], [picture(48, 32, 1), picture(32, 48, 2)], []]
SIZES = [(32, 32), (48, 32), (30, 61), (100, 40), (17, 5), (64, 64), (15, 900)]


def need_package(kind: str) -> None:
    """Skip the test where a package is missing that the family's vision tower needs."""
    package = FAMILIES[kind.split()[0]].package
    if package:
        pytest.importorskip(package, reason=f"{kind} needs {package}: pip install {package}")


@functools.cache
def checkpoint(kind: str) -> str:
    """A folder with a sharpened tiny model and its processor, as `--model` takes it."""
    need_package(kind)
    torch.manual_seed(0)
    model, processor = tiny.build(kind)
    folder = f"{CHECKPOINTS.name}/{kind}"
    reference.sharpen(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@functools.cache
def shared_policy(kind: str) -> Policy:
    """Not to be changed."""
    attention = "eager" if kind.endswith("gpt_oss") else "sdpa"
    return Policy.from_pretrained(checkpoint(kind), attention=attention)


def make_policy(kind: str) -> Policy:
    """A copy of one's own."""
    return copy.deepcopy(shared_policy(kind))


def final_size(policy: Policy, image: Image.Image) -> Image.Image:
    """The picture as the vision tower sees it. A further resize leaves it as it is."""
    pixels = (policy.to_unit_image(image) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def plain_inputs(policy: Policy, problem: str, pictures: list[Image.Image]) -> dict[str, Tensor]:
    """The processor's own chat call on pictures at their final size."""
    content = [{"type": "image", "image": final_size(policy, x)} for x in pictures]
    content.append({"type": "text", "text": problem})
    return policy.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=dict(policy.family.untiled),  # a copy: the call writes into it
    )


def plain_score(
    policy: Policy,
    problem: str,
    pictures: list[Image.Image],
    images: list[Tensor],
    response: Tensor,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (T,) of one response. `images` replace the pixels."""
    inputs = dict(plain_inputs(policy, problem, pictures))
    length = inputs["input_ids"].shape[1]
    ends = {"input_ids": response, "attention_mask": torch.ones_like(response)}
    for name, x in inputs.items():
        if x.shape == (1, length):
            end = ends.get(name, torch.zeros_like(response))  # token types: text
            inputs[name] = torch.cat([x, end[None]], dim=1)
    if images:
        inputs |= policy.to_pixel_values(images)
    if hasattr(policy.model.model, "rope_deltas"):
        policy.model.model.rope_deltas = None
    logits = policy.model(**inputs, use_cache=False).logits[0, length - 1 : -1]
    logp = logits.masked_fill(policy.banned, -torch.inf).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(policy.banned, 0.0)).sum(-1)
    return logp.gather(1, response[:, None]).squeeze(1), entropy


def responses(policy: Policy, P: int, n: int, T: int) -> tuple[Tensor, Tensor]:
    """Random allowed tokens of lengths from T (first row) to 1 (last).   -> (P n, T), (P n, T)"""
    g = torch.Generator().manual_seed(0)
    allowed = (~policy.banned).nonzero().flatten()
    lengths = torch.randint(1, T + 1, (P * n,), generator=g)
    lengths[0], lengths[-1] = T, 1
    mask = torch.arange(T) < lengths[:, None]
    tokens = allowed[torch.randint(len(allowed), (P * n, T), generator=g)]
    return tokens.masked_fill(~mask, policy.pad_id), mask


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest |a - b| of any tensor, as a share of the tensor's largest entry.

    Or of a hundredth of all tensors' largest: some weights have no influence (keys' biases), and
    gradients of pure rounding.
    """
    largest = max(b.abs().max().item() for b in theirs)
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        scale = max(b.abs().max().item(), 1e-2 * largest)
        shares.append((a - b).abs().max().item() / scale)
    return max(shares)


def compare(policy: Policy) -> dict[str, float]:
    """The shared prompt against the plain way, on three prompts at once, two responses each."""
    tokens, mask = responses(policy, 3, 2, 5)
    prompts = policy.encode(PROBLEMS, PICTURES)
    images = [x.clone().requires_grad_() for x in prompts.images]
    leaves = [*images, *(p for p in policy.parameters() if p.requires_grad)]
    ours = torch.stack(policy.score(prompts.with_images(images), tokens, mask))[:, mask]

    images_of = [images[:1], images[1:], []]
    rows = []
    for i in range(len(tokens)):
        p = i // 2
        response = tokens[i, mask[i]]
        row = plain_score(policy, PROBLEMS[p], PICTURES[p], images_of[p], response)
        rows.append(torch.stack(row))
    plain = torch.cat(rows, dim=1)  # (2, tokens)

    weights = torch.randn(2, *tokens.shape, generator=torch.Generator().manual_seed(1))[:, mask]
    our_grads = torch.autograd.grad((weights * ours).sum(), leaves, allow_unused=True)
    plain_grads = torch.autograd.grad((weights * plain).sum(), leaves, allow_unused=True)
    a, b = [], []
    for x, y in zip(our_grads, plain_grads, strict=True):
        assert (x is None or not x.any()) == (y is None or not y.any())
        if x is not None and y is not None:
            a.append(x)
            b.append(y)
    return {
        "log-probs": (ours - plain).abs().max().item(),
        "pixel gradient": relative(a[:3], b[:3]),
        "weight gradient": relative(a[3:], b[3:]),
    }


def attack(policy: Policy) -> tuple[float, float]:
    """Entropy of TsEC's tokens on the clean and on the attacked images: two PGD steps at 1/255."""
    prompts = policy.encode(PROBLEMS[:2], PICTURES[:2])
    sampled = policy.sample(prompts, 3, [1, 2], 6)
    tsec_mask = tsec.select_tokens(sampled.entropy, sampled.mask)

    def objective(images):
        entropy = policy.score(prompts.with_images(images), sampled.tokens, sampled.mask)[1]
        return tsec.selective_entropy(entropy, tsec_mask)

    attacked = egas.pgd_ascent(objective, prompts.images, eps=1 / 255, steps=2)
    with torch.no_grad():
        return objective(prompts.images).mean().item(), objective(attacked).mean().item()


def pixel_error(policy: Policy) -> float:
    """Ours against the image processor's, for pictures of all SIZES, alone and all together."""
    pictures = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    if policy.family.one_tile:  # the second tile of an oblong picture would be another image
        pictures = [final_size(policy, x) for x in pictures]
    worst = 0.0
    for group in [[x] for x in pictures] + [pictures]:
        ours = policy.to_pixel_values([policy.to_unit_image(x) for x in group])
        options = dict(return_tensors="pt", **policy.family.untiled)
        theirs = policy.processor.image_processor(images=group, **options)
        a, b = ours["pixel_values"], theirs["pixel_values"]
        if b.ndim == 5:  # a row per prompt, not per image
            b = b.view(a.shape)
        assert a.shape == b.shape
        worst = max(worst, (a - b).abs().max().item())
        for name in ours.keys() - {"pixel_values"}:
            assert ours[name].flatten().tolist() == theirs[name].flatten().tolist(), name
    return worst


def notes(policy: Policy) -> str:
    """What FAMILIES says, in words."""
    family = policy.family
    words = ["one size" if family.resize in (fixed_resize, molmo2_resize) else "any size"]
    if family.limits_per_pixel:
        words.append("min_pixels, max_pixels")
    words += [f"{name}={value}" for name, value in family.untiled.items()]
    if family.one_tile:
        words.append("thumbnail and one tile, the same image")
    if family.resize is molmo2_resize:
        words.append("thumbnail and one crop, the same image")
    if family.token_types:
        words.append(f"{family.token_types} in the prompt")
    return ", ".join(words)


def measure(kind: str) -> dict:
    """One row of the table."""
    policy = make_policy(kind)
    errors = {"pixel_values": pixel_error(policy), **compare(policy)}
    clean, attacked = attack(policy)
    return {
        "family": kind,
        **errors,
        "shared prompt": max(errors.values()) <= TOLERANCE,
        "self-check": policy.self_check()["logits"],
        "entropy": clean,
        "attacked": attacked,
        "notes": notes(policy),
    }


def main(kinds: list[str]) -> None:
    torch.set_num_threads(1)
    rows = []
    for kind in kinds or KINDS:
        rows.append(measure(kind))
        print(json.dumps(rows[-1]))
    if not kinds:
        (ROOT / "benchmarks/families.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
