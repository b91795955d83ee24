"""The slow, obvious second implementation: one response at a time, on the model's plain forward.

It imports nothing of ours. Each response has its own prompt and images in front of it. Nothing is
padded, cached, repeated or batched. Prompt and pixel_values come from the processor's own chat call
(for an attacked image: from a loop over patches), positions from the model itself. Entropies,
quantiles, PGD, advantages and loss are loops.
"""

import math
import statistics
import types

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def sharpen(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that entropies are 1 to 5 nats and every input matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, w in model.named_parameters():
            noise = torch.randn(w.shape, generator=generator)
            if w.ndim >= 2:
                gain = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                w.copy_(gain * noise / w[0].numel() ** 0.5)
            elif name.endswith("dt_bias"):
                w.copy_(0.1 * noise - 3.0)  # a state that remembers
            else:
                one = w.mean().round() if name.endswith("weight") else 0.0
                w.copy_(0.1 * noise + one)  # norms' weights: around 0 where the norm adds the 1
            if name.endswith("language_model.norm.weight"):
                w.copy_(2.0 * w + (1.0 - one))  # twice the weight
    return model


def double(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64, its RMS norms too: the library's round to float32, hiding errors."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
    return model.double()


def prompt_inputs(processor, problem: str, pictures: list[Image.Image]) -> dict[str, Tensor]:
    """input_ids, mm_token_type_ids and, with pictures, pixel_values, image_grid_thw of a prompt."""
    content = [{"type": "image", "image": x} for x in pictures] + [
        {"type": "text", "text": problem}
    ]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def pixel_values(image: Tensor, processor) -> Tensor:
    """A [0, 1] image (3, H, W) -> rows of 3 * t * p * p, in blocks of m x m patches."""
    ip = processor.image_processor
    p, m, t = ip.patch_size, ip.merge_size, ip.temporal_patch_size
    rows = []
    for block_y in range(image.shape[1] // (p * m)):
        for block_x in range(image.shape[2] // (p * m)):
            for i in range(m):
                for j in range(m):
                    y, x = (block_y * m + i) * p, (block_x * m + j) * p
                    row = []
                    for c in range(3):
                        patch = (image[c, y : y + p, x : x + p] - ip.image_mean[c]) / ip.image_std[
                            c
                        ]
                        row += [patch.flatten()] * t  # each frame of a still picture
                    rows.append(torch.cat(row))
    return torch.stack(rows)


def allowed_tokens(processor) -> list[int]:
    """What may appear in a response: all that the tokenizer knows but <|...|>, and <|im_end|>."""
    names = [processor.tokenizer.convert_ids_to_tokens(v) for v in range(len(processor.tokenizer))]
    return [v for v, name in enumerate(names) if name == "<|im_end|>" or not name.startswith("<|")]


def distributions(
    model,
    processor,
    problem: str,
    pictures: list,
    response: list[int],
    temperature=1.0,
    images: list | None = None,
) -> list[Tensor]:
    """log p over allowed_tokens before each token of a response; `images` replace the pixels."""
    inputs = prompt_inputs(processor, problem, pictures)
    if images:
        inputs["pixel_values"] = torch.cat([pixel_values(x, processor) for x in images])
    ids = torch.cat([inputs["input_ids"], torch.tensor([response])], dim=1)
    types = torch.cat(
        [inputs["mm_token_type_ids"], torch.zeros(1, len(response), dtype=torch.long)], dim=1
    )
    model.model.rope_deltas = None
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=types,
        pixel_values=inputs.get("pixel_values"),
        image_grid_thw=inputs.get("image_grid_thw"),
        use_cache=False,
    ).logits[0]
    start, allowed = inputs["input_ids"].shape[1] - 1, allowed_tokens(processor)
    return [
        torch.log_softmax(logits[start + t, allowed].float() / temperature, -1)
        for t in range(len(response))
    ]


def score(
    model,
    processor,
    problem: str,
    pictures: list,
    response: list[int],
    temperature=1.0,
    images: list | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of one response's tokens.   -> (T,), (T,)"""
    allowed = allowed_tokens(processor)
    logprobs, entropy = [], []
    for token, logp in zip(
        response,
        distributions(model, processor, problem, pictures, response, temperature, images),
        strict=True,
    ):
        logprobs.append(logp[allowed.index(token)])
        entropy.append(-(logp.exp() * logp).sum())
    return torch.stack(logprobs), torch.stack(entropy)


def moderate(entropy: Tensor, low: float, high: float) -> list[bool]:
    """TsEC: between the two quantiles of the response's own entropies."""
    values = entropy.detach().numpy()
    lower, upper = np.quantile(values, low), np.quantile(values, high)
    return [bool(lower <= value <= upper) for value in values]


def mean_kept(values: Tensor, keep: list[bool]) -> Tensor | float:
    kept = [value for value, chosen in zip(values, keep, strict=True) if chosen]
    return sum(kept) / len(kept) if kept else 0.0


def image_entropy(
    model, processor, problem, pictures, images, responses, keeps, temperature=1.0
) -> Tensor:
    """The attack's objective for one prompt: mean over its responses of their kept tokens' H."""
    total = 0.0
    for response, keep in zip(responses, keeps, strict=True):
        _, entropy = score(model, processor, problem, pictures, response, temperature, images)
        total = total + mean_kept(entropy, keep)
    return total / len(responses)


def attack(
    model,
    processor,
    problem,
    pictures,
    clean,
    responses,
    keeps,
    eps,
    step_size,
    steps,
    temperature=1.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """PGD on one prompt's [0, 1] images.   -> attacked, each pixel's least |grad| / mean |grad|"""
    images = [x.clone() for x in clean]
    certainty = [torch.full_like(x, math.inf) for x in clean]
    for _ in range(steps):
        leaves = [x.detach().clone().requires_grad_() for x in images]
        value = image_entropy(
            model, processor, problem, pictures, leaves, responses, keeps, temperature
        )
        grads = torch.autograd.grad(value, leaves)
        for i, (x, x0, g) in enumerate(zip(leaves, clean, grads, strict=True)):
            moved = x.detach() + step_size * g.sign()
            moved = torch.where(moved > x0 + eps, x0 + eps, moved)
            moved = torch.where(moved < x0 - eps, x0 - eps, moved)
            images[i] = torch.where(moved > 1, 1.0, torch.where(moved < 0, 0.0, moved))
            certainty[i] = torch.minimum(certainty[i], g.abs() / g.abs().mean())
    return images, certainty


def advantages(rewards: list[float]) -> list[float]:
    """(r - mean) / (std + 1e-6) of one group, the std with G - 1; zeros when all are equal."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(r - mean) / (std + 1e-6) for r in rewards]


def clipped_loss(
    new: list[Tensor], old: list[Tensor], adv: list[float], low: float, high: float
) -> Tensor:
    """-(1 / all tokens) sum of min(rho A, clip(rho) A), token by token."""
    total, tokens = 0.0, 0
    for row_new, row_old, a in zip(new, old, adv, strict=True):
        for t in range(len(row_new)):
            ratio = (row_new[t] - row_old[t].detach()).exp()
            clipped = min(max(ratio, torch.tensor(1 - low)), torch.tensor(1 + high))
            total = total + min(ratio * a, clipped * a)
            tokens += 1
    return -total / tokens


def k3_mean(new: list[Tensor], ref: list[Tensor]) -> Tensor:
    """(1 / all tokens) sum of exp(d) - d - 1, d = log pi_ref - log pi."""
    d = torch.cat(ref).detach() - torch.cat(new)
    return (d.exp() - d - 1).sum() / len(d)
