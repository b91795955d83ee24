"""The entropy controls of entropy_controls.py, applied to a batch of rollouts of train_saei.py.

The formulas are in entropy_controls.py. Here is what a control needs of a run: the tokens of all
processes, to choose among, and a coefficient that is saved and resumed.
"""

import torch
from torch import Tensor, nn

from extras import entropy_controls as controls
from runtime import data, distributed
from runtime.args import ControlArgs, require
from runtime.rollouts import Rollouts, TrainingBatch, by_prompt, joined, micro_batches
from runtime.run import Run
from vlm.policy import Prompts

UNCLIPPED = ("kl_cov", "sent")  # their log-ratio penalty stands in for the clip
BRANCH = 3  # of the step's random numbers; 0 to 2 are train_saei.py's


def check(control: ControlArgs, updates_per_step: int, intervention: str) -> None:
    """Raise ValueError for a control that would do nothing, or cannot work, in such a run."""
    name = control.update_control
    # At pi = pi_old the gradient of |log pi - log pi_old| is 0: one update has no penalty.
    require(name not in UNCLIPPED or updates_per_step >= 2, f"updates_per_step >= 2 with {name}")
    require(name != "vogue" or intervention != "none", "an intervention with vogue")


def initial_state(control: ControlArgs) -> dict[str, float]:
    """What an adaptive coefficient keeps in the optimiser's parameter group."""
    if control.update_control in ("skywork", "aer"):
        return {"entropy_coef": control.entropy_coef, "entropy_start": 0.0}
    return {}


def treat(
    control: ControlArgs,
    run: Run,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    batch: TrainingBatch,
    micro: int,
    step: int,
) -> TrainingBatch:
    """The batch as the control treats it, chosen among the tokens of all processes."""
    P, accelerator = len(rollouts.prompts), run.accelerator
    tensors = {
        "mask": batch.mask,
        "logprobs": joined(rollouts, "logprobs"),
        "entropy": joined(rollouts, "entropy"),
        "advantages": rollouts.advantages,
        "accuracy": rollouts.scores["accuracy"],
        # Dropped groups too: the policy's own entropy.
        "clean_mask": by_prompt(rollouts.clean.mask, P),
        "clean_entropy": by_prompt(rollouts.clean.entropy, P),
    }
    if control.update_control == "vogue":
        tensors["divergence"] = branch_divergence(rollouts, batch, wrapped, run.options, micro)
    tensors = distributed.gather_rows(accelerator, tensors)
    mean_entropy = float(tensors.pop("clean_entropy")[tensors.pop("clean_mask")].mean())
    seed = data.row_seeds(run.args.seed, step, [0], BRANCH)[0]
    treated = controls.treat(
        control,
        **tensors,
        mean_entropy=mean_entropy,
        state=optimizer.param_groups[0],
        generator=torch.Generator().manual_seed(seed),
    )
    changes, width = {}, batch.mask.shape[2]
    for name, x in treated._asdict().items():
        x = distributed.own_rows(accelerator, x)
        changes[name] = x[:, :, :width] if x.ndim == 3 else x
    return batch._replace(**changes)


@torch.no_grad()
def branch_divergence(
    rollouts: Rollouts, batch: TrainingBatch, wrapped: nn.Module, options: dict, micro: int
) -> Tensor:
    """VOGUE: responses sampled on the changed image, scored on the clean one.   (P, G_adv, T)

    An engine's log-probs are rounded in another way, so these are scored on the changed image, too.
    """
    P, sampled = len(rollouts.prompts), rollouts.adversarial
    tokens, mask = by_prompt(sampled.tokens, P), by_prompt(sampled.mask, P)

    def score(prompts: Prompts) -> Tensor:
        responses = batch._replace(prompts=prompts, tokens=tokens, mask=mask)
        parts = [responses.take(part) for part in micro_batches(P, micro)]
        return torch.cat([part.score(wrapped, options["temperature"])[0] for part in parts])

    noisy = sampled.logprobs if options["engine"] == ["own"] else score(rollouts.attacked)
    return by_prompt(controls.symmetric_kl(noisy, score(rollouts.prompts)), P)


def terms(
    batch: TrainingBatch, logprobs: Tensor, old: Tensor, entropy: Tensor, tokens: Tensor
) -> dict[str, Tensor]:
    """The control's term of the loss, the token share it treats, the mean entropy coefficient."""
    mask, loss_mask = batch.mask.flatten(0, 1), batch.loss_mask.flatten(0, 1)  # (P * n, T)
    weights, coef = batch.penalty_weights.flatten(0, 1), batch.entropy_coef.flatten()
    penalty = controls.log_ratio_penalty(logprobs, old, weights, mask, tokens)
    bonus = controls.entropy_bonus(entropy, mask, coef, tokens)
    treated = mask & (~loss_mask | (weights > 0))
    return {
        "control/loss": penalty + bonus,
        "control/tokens": treated.sum() / tokens,
        "control/bonus": (coef[:, None] * mask).sum() / tokens,
    }
