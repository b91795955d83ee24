"""What EgAS raises: the entropy of the tokens that TsEC chose, as a function of the images."""

from torch import Tensor

import tsec
from runtime.rollouts import by_prompt
from vlm.cache import ReadPrompts
from vlm.policy import Policy, Prompts, Responses


class EntropyObjective:
    """H(images) = mean over a prompt's n responses of the mean entropy of their chosen tokens.

    The responses are teacher-forced.   images of prompts[part] -> (P,), differentiable in them
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Prompts,
        responses: Responses,
        tsec_mask: Tensor,
        temperature: float,
        part: slice = slice(None),
    ):
        P = len(prompts)
        self.policy, self.prompts, self.temperature = policy, prompts[part], temperature
        self.tokens = by_prompt(responses.tokens, P)[part].flatten(0, 1)  # (P * n, T)
        self.mask = by_prompt(responses.mask, P)[part].flatten(0, 1)
        self.chosen = by_prompt(tsec_mask, P)[part].flatten(0, 1)

    def score(self, images: list[Tensor], read: ReadPrompts | None = None) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the responses on these images, (P * n, T) each."""
        prompts = self.prompts.with_images(images)
        return self.policy.score(prompts, self.tokens, self.mask, self.temperature, read)

    def of(self, entropy: Tensor) -> Tensor:
        """(P * n, T) -> (P,)"""
        of_responses = tsec.selective_entropy(entropy, self.chosen)  # (P * n,)
        return by_prompt(of_responses, len(self.prompts)).mean(dim=1)

    def __call__(self, images: list[Tensor]) -> Tensor:
        return self.of(self.score(images)[1])
