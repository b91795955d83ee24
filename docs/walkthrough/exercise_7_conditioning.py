"""Exercise 7 (step 6): which image conditions the update.

An adversarial response was sampled from pi_old(. | attacked image). The update multiplies its advantage by a ratio
pi(y | image) / pi_old(y | image): with `condition` "clean" the image is the clean one, for every response; with
"sampled" it is the one a response was sampled from. The same image stands above and below, so that the ratio of a
policy that has not moved is 1. `recorded` is what the sampler wrote down. When may it be used?
"""

from collections.abc import Callable

import torch
from torch import Tensor


def log_ratios(
    logp: Callable[[Tensor, Tensor], Tensor],
    logp_old: Callable[[Tensor, Tensor], Tensor],
    condition: str,
    clean: Tensor,
    attacked: Tensor,
    tokens: Tensor,
    adversarial: Tensor,
    recorded: Tensor,
) -> Tensor:
    """log pi(y_i | image_i) - log pi_old(y_i | image_i), no gradient through the second.   -> (N,)

    logp(images, tokens), logp_old(images, tokens): (N, D), (N,) -> (N,), the policy now and before the step
    clean, attacked (N, D): each response's two images; tokens (N,): the responses, one token each
    adversarial (N,) bool: sampled on the attacked image; recorded (N,): log pi_old(y_i | the image it was sampled on)
    """
    raise NotImplementedError


def check(log_ratios) -> None:
    generator = torch.Generator().manual_seed(0)
    N, D, V = 6, 3, 5
    clean, attacked = torch.randn(2, N, D, generator=generator)
    tokens, adversarial = torch.arange(N) % V, torch.arange(N) >= 3
    old = torch.randn(D, V, generator=generator)
    sampled_on = torch.where(adversarial[:, None], attacked, clean)

    def policy(weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda images, y: (images @ weights).log_softmax(-1).gather(1, y[:, None])[:, 0]

    for condition, images in (("clean", clean), ("sampled", sampled_on)):
        for moved in (0.0, 0.3):
            weights = (old + moved * torch.randn(D, V, generator=generator)).requires_grad_()
            before = old.clone().requires_grad_()
            recorded = policy(old)(sampled_on, tokens)
            found = log_ratios(
                policy(weights),
                policy(before),
                condition,
                clean,
                attacked,
                tokens,
                adversarial,
                recorded,
            )
            expected = policy(weights)(images, tokens) - policy(old)(images, tokens)
            if moved == 0:
                assert torch.allclose(found, torch.zeros(N), atol=1e-6), (
                    f"{condition}: pi = pi_old, and the ratio not 1"
                )
            assert torch.allclose(found, expected, atol=1e-6), (
                f"{condition}: not the ratio on the image that conditions"
            )
            assert found.requires_grad, f"{condition}: no gradient reaches the policy"
            mine = torch.autograd.grad(found.sum(), (weights, before), allow_unused=True)
            theirs = torch.autograd.grad(expected.sum(), weights)[0]
            assert mine[0] is not None and torch.allclose(mine[0], theirs, atol=1e-5), (
                f"{condition}: a wrong gradient"
            )
            assert mine[1] is None or not mine[1].any(), (
                f"{condition}: the old log-probs carry a gradient"
            )
