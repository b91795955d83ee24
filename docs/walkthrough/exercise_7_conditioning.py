"""Exercise 7 (step 6): which image conditions the update.

An adversarial response was sampled from pi_old(. | attacked image). The update multiplies its
advantage by a ratio pi(y | image) / pi_old(y | image). With `condition` "clean", the image is the
clean one for every response. With "sampled", it is the one that a response was sampled on. Both
policies see the same image, so the ratio of a policy that has not moved is 1. `recorded` is what
the sampler recorded. When may it be used?
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

    logp(images, tokens), logp_old(images, tokens): (N, D), (N,) -> (N,), the policy now and before
    clean, attacked: each response's two images, (N, D)
    tokens: the responses, one token each, (N,)
    adversarial: sampled on the attacked image, (N,) bool
    recorded: log pi_old(y_i | the image it was sampled on), (N,)
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
            arguments = (condition, clean, attacked, tokens, adversarial, recorded)
            found = log_ratios(policy(weights), policy(before), *arguments)
            expected = policy(weights)(images, tokens) - policy(old)(images, tokens)
            right = torch.allclose(found, expected, atol=1e-6)
            assert right or moved, f"{condition}: pi = pi_old, and the ratio is not 1"
            assert right, f"{condition}: not the ratio on the image that conditions"
            assert found.requires_grad, f"{condition}: no gradient reaches the policy"
            gradients = torch.autograd.grad(found.sum(), (weights, before), allow_unused=True)
            of_policy, of_old = (torch.zeros(D, V) if x is None else x for x in gradients)
            (expected,) = torch.autograd.grad(expected.sum(), weights)
            right = torch.allclose(of_policy, expected, atol=1e-5)
            assert right, f"{condition}: a wrong gradient"
            assert not of_old.any(), f"{condition}: the old log-probs carry a gradient"
