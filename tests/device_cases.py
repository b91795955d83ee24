"""One step's numbers on any device and in any precision, to compare: of tests/test_device.py.

benchmarks/gpu_jobs.py compares a GPU with the CPU by them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import egas
import grpo
import tsec
from demo.task import make_row
from runtime.faults import PROJECT
from tests import reference
from vlm.policy import Policy, Prompts, Responses

ROWS = [make_row("shifted/train", i) for i in range(4)]
EPS, PGD_STEPS, RESPONSES, TOKENS = 2 / 255, 3, 4, 24
ADVANTAGES = torch.tensor([1.5, -0.5, -0.5, -0.5]).repeat(len(ROWS))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def demo_policy(on: torch.device | str, dtype: str = "float32") -> Policy:
    """demo/mixed. dtype: float32 | bfloat16 | float64"""
    loaded = "float32" if dtype == "float64" else dtype
    policy = Policy.from_pretrained(str(PROJECT / "demo/mixed"), loaded)
    if dtype == "float64":
        reference.double(policy.model)
    return policy.to(on)


def encode(policy: Policy, rows: Sequence[dict] = ROWS) -> Prompts:
    return policy.encode([row["problem"] for row in rows], [row["images"] for row in rows])


def sample(policy: Policy, rows: Sequence[dict] = ROWS) -> Responses:
    """RESPONSES per row. A row's seed is its number."""
    return policy.sample(encode(policy, rows), RESPONSES, list(range(len(rows))), TOKENS)


def on_cpu(x: Tensor) -> Tensor:
    return x.detach().double().cpu()


def numbers(policy: Policy, responses: Responses) -> dict[str, list[Tensor]]:
    """Of given responses to ROWS, as lists of float64 tensors on the CPU.

    log-probs and entropies of the responses' tokens; the attacked images; the objective of the
    attack at these images, a value per prompt; the gradient of each parameter.
    """
    tokens, mask = responses.tokens.to(policy.device), responses.mask.to(policy.device)
    prompts = encode(policy)
    chosen = tsec.select_tokens(responses.entropy, responses.mask, 0.2, 0.8).to(policy.device)

    def objective(images: list[Tensor]) -> Tensor:
        _, entropy = policy.score(prompts.with_images(images), tokens, mask)
        return tsec.selective_entropy(entropy, chosen).view(len(prompts), -1).mean(dim=1)

    attacked = egas.pgd_ascent(objective, prompts.images, EPS, steps=PGD_STEPS)
    with torch.no_grad():
        reached = objective(attacked)
    logprobs, entropy = policy.score(prompts, tokens, mask)
    advantages = ADVANTAGES.to(policy.device)
    loss, _ = grpo.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2, 0.28, mask.sum())
    gradients = torch.autograd.grad(loss, list(policy.model.parameters()))
    return {
        "log-probs": [on_cpu(logprobs[mask])],
        "entropies": [on_cpu(entropy[mask])],
        "attacked images": [on_cpu(image) for image in attacked],
        "attacked entropy": [on_cpu(reached)],
        "gradients": [on_cpu(gradient) for gradient in gradients],
    }


def differences(found: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> dict[str, float]:
    """Largest absolute differences. gradients: as shares of each tensor's largest entry.

    attacked images: the share of pixels that are not equal. The sign of a gradient near 0 may
    differ, and then the pixel differs by up to 2 eps.
    """
    apart = {}
    for name, tensors in found.items():
        values = []
        for a, b in zip(tensors, other[name], strict=True):
            if name == "attacked images":
                values.append(((a - b).abs() > 1e-5).double().mean())
            elif name == "gradients":
                values.append((a - b).abs().max() / b.abs().max())
            else:
                values.append((a - b).abs().max())
        apart[name] = torch.stack(values).max().item()
    return apart


def ratios(policy: Policy) -> dict[str, float]:
    """|pi(scored) / pi(sampled) - 1| over the tokens of this policy's own responses."""
    responses = sample(policy)
    with torch.no_grad():
        logprobs, _ = policy.score(encode(policy), responses.tokens, responses.mask)
    apart = ((logprobs - responses.logprobs)[responses.mask].exp() - 1).abs()
    return {
        "mean": apart.mean().item(),
        "99%": apart.quantile(0.99).item(),
        "largest": apart.max().item(),
    }
